// decode_attention on NumPy arrays, one key head.
#include <algorithm>
#include <vector>

#include "attention/decode.h"
#include "common/host.h"
#define RK_ROWS "attention/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

FloatArray decode_attention(const FloatArray& q, const FloatArray& k, const FloatArray& v, float scale) {
  require(q.ndim() == 2 && k.ndim() == 2 && v.ndim() == 2 && k.shape(0) == v.shape(0) &&
              q.shape(1) == k.shape(1) && q.shape(1) == v.shape(1),
          "decode_attention: expected q [H, D], k and v [keys, D]");
  const int64_t heads = q.shape(0), size = q.shape(1), keys = k.shape(0);
  FloatArray out(shape(q));
  if (heads * size == 0) return out;
  const int64_t splits = std::max<int64_t>((keys + kDecodeSplit - 1) / kDecodeSplit, 1);
  const int64_t state = (*RK_PICK(decode_state))(size);
  std::vector<float> scratch((*RK_PICK(decode_scratch))(heads, size)), states(splits * heads * state);
  for (int64_t i = 0; i < splits; ++i) {
    const int64_t first = i * kDecodeSplit;
    const DecodeSplit<float> split{q.data(),
                                   k.data() + first * size,
                                   v.data() + first * size,
                                   size,
                                   size,
                                   size,
                                   heads,
                                   std::min(kDecodeSplit, keys - first),
                                   size,
                                   scale};
    RK_PICK(decode_split<float, Products::kFloats>)
    (split, scratch.data(), states.data() + i * heads * state, splits == 1 ? out.mutable_data() : nullptr);
  }
  for (int64_t h = 0; h < heads && splits > 1; ++h) RK_PICK(decode_combine<float>)
  (states.data() + h * state, splits, heads * state, size, scale, out.mutable_data() + h * size);
  return out;
}

const Binding binding([](py::module_& m) {
  m.def(
      "bfloat16_products",
      [] {
        const Products found = products();
        return found == Products::kTiles ? "tiles" : found == Products::kPairs ? "pairs" : "floats";
      },
      "How decode_attention multiplies bfloat16: as floats, in pairs (AVX512_BF16), by tiles (AMX).");
  m.def("decode_attention", &decode_attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("scale"),
        "softmax(scale q k^T) v for q [H, D], k and v [keys, D], float32.");
});

}  // namespace
}  // namespace rk
