// decode_attention on the CPU: schema, memory-safety checks, splits of the keys in parallel.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "attention/decode.h"
#include "common/tensor.h"
#define RK_ROWS "attention/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

// Floats that begin with a line of the cache, by which tiles are loaded.
constexpr std::align_val_t kLine{64};
struct Free {
  void operator()(float* floats) const { ::operator delete[](floats, kLine); }
};
std::unique_ptr<float[], Free> aligned_floats(int64_t n) {
  return std::unique_ptr<float[], Free>(static_cast<float*>(::operator new[](n * sizeof(float), kLine)));
}

// [B] whole numbers, or one for all where the tensor is absent.
struct Whole {
  Whole(const std::optional<Tensor>& given, int64_t batch, int64_t otherwise) : otherwise(otherwise) {
    if (!given) return;
    const ScalarType dtype = given->scalar_type();
    STD_TORCH_CHECK(given->numel() == batch && (dtype == ScalarType::Long || dtype == ScalarType::Int),
                    "decode_attention: lengths and starts must be [B], int64 or int32");
    tensor = given->is_contiguous() ? *given : torch::stable::contiguous(*given);
    (dtype == ScalarType::Long ? wide : narrow) = tensor->data_ptr();
  }

  int64_t operator[](int64_t b) const {
    return wide     ? static_cast<const int64_t*>(wide)[b]
           : narrow ? static_cast<const int32_t*>(narrow)[b]
                    : otherwise;
  }

  std::optional<Tensor> tensor;  // keeps a copy alive
  const void *wide = nullptr, *narrow = nullptr;
  int64_t otherwise;
};

// One row of the batch: the slots that it sees, and its tasks, all splits of a key head after one another.
struct Row {
  int64_t start, keys, splits, first_task;
};

std::vector<Row> rows_of(const Whole& starts, const Whole& lengths, int64_t batch, int64_t groups,
                         int64_t slots) {
  std::vector<Row> rows(batch);
  int64_t task = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t start = std::clamp<int64_t>(starts[b], 0, slots);
    const int64_t keys = std::max<int64_t>(std::min(lengths[b], slots) - start, 0);
    const int64_t splits = std::max<int64_t>((keys + kDecodeSplit - 1) / kDecodeSplit, 1);
    rows[b] = {start, keys, splits, task};
    task += groups * splits;
  }
  return rows;
}

Tensor flat_rows(const Tensor& t) {
  const Shape shape(t);
  STD_TORCH_CHECK(shape.dim == 4, "decode_attention: q, k_cache and v_cache must have four dimensions");
  return shape.strides[3] == 1 || shape.sizes[3] == 1 ? t : torch::stable::contiguous(t);
}

Tensor decode_attention(const Tensor& query, const Tensor& k_cache, const Tensor& v_cache,
                        const std::optional<Tensor>& lengths, const std::optional<Tensor>& starts,
                        double scale, int64_t grain) {
  const Tensor q = flat_rows(query), k = flat_rows(k_cache), v = flat_rows(v_cache);
  const Shape qs(q), ks(k), vs(v);
  const int64_t batch = qs.sizes[0], heads = qs.sizes[1], size = qs.sizes[3];
  const int64_t groups = ks.sizes[1], slots = ks.sizes[2];
  STD_TORCH_CHECK(qs.sizes[2] == 1 && ks.sizes[0] == batch && ks.sizes[3] == size &&
                      std::equal(ks.sizes, ks.sizes + 4, vs.sizes) && groups > 0 && heads % groups == 0 &&
                      q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "decode_attention: q, k_cache and v_cache do not fit");
  Tensor out = new_like(q, qs.sizes, 4);
  if (batch * heads * size == 0) return out;
  const int64_t each = heads / groups;  // query heads of one key head
  const std::vector<Row> rows =
      rows_of(Whole(starts, batch, 0), Whole(lengths, batch, slots), batch, groups, slots);
  const int64_t tasks = rows.back().first_task + groups * rows.back().splits;
  dispatch_float(q.scalar_type(), "decode_attention", [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, double>) {
      STD_TORCH_CHECK(false, "decode_attention: float64 is not supported");
    } else {
      auto split = RK_PICK(decode_split<T, Products::kFloats>);
      if constexpr (std::is_same_v<T, bf16>) {
        if (products() == Products::kPairs) split = RK_PICK(decode_split<T, Products::kPairs>);
        if (products() == Products::kTiles) split = RK_PICK(decode_split<T, Products::kTiles>);
      }
      const auto combine = RK_PICK(decode_combine<T>);
      const int64_t scratch = (*RK_PICK(decode_scratch))(each, size), state = (*RK_PICK(decode_state))(size);
      const bool cut = tasks > batch * groups;
      const std::unique_ptr<float[]> states(cut ? new float[tasks * each * state] : nullptr);
      T* to = static_cast<T*>(out.data_ptr());

      int64_t keys = 0;
      for (const Row& row : rows) keys += row.keys;
      parallel_rows(tasks, keys * heads * size / tasks, grain, [&](int64_t begin, int64_t end) {
        const auto own = aligned_floats(scratch);
        const auto after = [](int64_t task, const Row& row) { return task < row.first_task; };
        auto row = std::upper_bound(rows.begin(), rows.end(), begin, after) - 1;
        for (int64_t task = begin; task < end; ++task) {
          while (task >= row->first_task + groups * row->splits) ++row;
          const int64_t b = row - rows.begin(), within = task - row->first_task;
          const int64_t g = within / row->splits, first = within % row->splits * kDecodeSplit;
          const int64_t slot = row->start + first;
          const DecodeSplit<T> in{
              static_cast<const T*>(q.data_ptr()) + b * qs.strides[0] + g * each * qs.strides[1],
              static_cast<const T*>(k.data_ptr()) + b * ks.strides[0] + g * ks.strides[1] +
                  slot * ks.strides[2],
              static_cast<const T*>(v.data_ptr()) + b * vs.strides[0] + g * vs.strides[1] +
                  slot * vs.strides[2],
              qs.strides[1],
              ks.strides[2],
              vs.strides[2],
              each,
              std::min(kDecodeSplit, row->keys - first),
              size,
              float(scale)};
          split(in, own.get(), cut ? states.get() + task * each * state : nullptr,
                row->splits == 1 ? to + (b * groups + g) * each * size : nullptr);
        }
      });
      if (!cut) return;
      parallel_rows(batch * heads, tasks / (batch * groups) * size, grain, [&](int64_t begin, int64_t end) {
        for (int64_t head = begin; head < end; ++head) {
          const Row& row = rows[head / heads];
          if (row.splits == 1) continue;
          const int64_t first = row.first_task + head % heads / each * row.splits;
          combine(states.get() + (first * each + head % each) * state, row.splits, each * state, size,
                  float(scale), to + head * size);
        }
      });
    }
  });
  return out;
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_kernels_native, m) {
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? lengths, Tensor? starts, float "
      "scale,"
      " int grain=1000000) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&rk::decode_attention));
}
