// exp and the 16-bit conversions on NumPy arrays, so that their whole range can be checked.
#include "common/host.h"
#define RK_ROWS "common/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

using BitsArray = py::array_t<uint16_t, py::array::c_style | py::array::forcecast>;

FloatArray exp_fast(const FloatArray& x) {
  FloatArray out(shape(x));
  RK_PICK(exp_row)(x.data(), out.mutable_data(), x.size());
  return out;
}

template <class T>
FloatArray from_bits(const BitsArray& bits) {
  FloatArray out(shape(bits));
  RK_PICK(load_row<T>)(reinterpret_cast<const T*>(bits.data()), out.mutable_data(), bits.size());
  return out;
}

template <class T>
BitsArray to_bits(const FloatArray& x) {
  BitsArray out(shape(x));
  RK_PICK(store_row<T>)(x.data(), reinterpret_cast<T*>(out.mutable_data()), x.size());
  return out;
}

const Binding binding([](py::module_& m) {
  m.def("exp", &exp_fast, py::arg("x"), "The exp of the row kernels, elementwise, float32.");
  m.def("from_bfloat16", &from_bits<bf16>, py::arg("bits"), "bfloat16 bits as float32.");
  m.def("to_bfloat16", &to_bits<bf16>, py::arg("x"), "float32 rounded to bfloat16, as bits.");
  m.def("from_float16", &from_bits<fp16>, py::arg("bits"), "float16 bits as float32.");
  m.def("to_float16", &to_bits<fp16>, py::arg("x"), "float32 rounded to float16, as bits.");
});

}  // namespace
}  // namespace rk
