// One token of a Fenwick tree of states: each bucket that is full fades, is read and, where the
// token writes by the delta rule, is written to; then the token's own bucket merges with those of 1,
// 2, 4 ... tokens that are full.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <tuple>

#include "linear/native/one_token.h"

namespace attnzoo {
namespace {

using at::Tensor;
using Given = const Tensor&;
using Maybe = const std::optional<Tensor>&;

// The buckets of a head of keys: of 1, 2, 4 ... tokens.
template <typename Number>
class Buckets {
 public:
  // call: of the token; others: the same with a value of 0, which is all that earlier tokens gain.
  Buckets(const Recurrence& call, const Recurrence& others, Given levels)
      : call(call), levels(levels), own(call), other(others),
        size(call.width * call.columns), state(size), row(call.group * call.value_dim) {}

  // tokens: before this one. before, after: (buckets, width, columns), `count` after. out: (group,
  // value_dim)
  void run(Index sample, Index head, Index tokens, const Number* before, Number* after, Index count,
           Number* out) {
    Index target = 0;  // the first bucket that is not full
    while (tokens >> target & 1) ++target;
    std::fill_n(out, row.size(), Number(0));
    own.run(sample, head, nullptr, after + target * size, 0, row.data(), nullptr);
    add_row(sample, head, 0, out);
    for (Index bucket = 0; bucket < count; ++bucket) {
      const bool is_full = tokens >> bucket & 1;
      if (bucket != target && (!is_full || bucket < target))
        std::fill_n(after + bucket * size, size, Number(0));
      if (!is_full) continue;
      Number* to = bucket < target ? state.data() : after + bucket * size;
      other.run(sample, head, before + bucket * size, to, 0, row.data(), nullptr);
      add_row(sample, head, bucket + 1, out);
      for (Index i = 0; to == state.data() && i < size; ++i) after[target * size + i] += state[i];
    }
  }

 private:
  // Adds the rows of a bucket, each times what its query weighs the level by.
  void add_row(Index sample, Index head, Index level, Number* out) const {
    for (Index r = 0; r < call.group; ++r) {
      const Number* weights = levels.const_data_ptr<Number>() + sample * levels.stride(0) +
                              (head * call.group + r) * levels.stride(1);
      for (Index j = 0; j < call.value_dim; ++j)
        out[r * call.value_dim + j] += weights[level] * row[r * call.value_dim + j];
    }
  }

  const Recurrence& call;
  Given levels;
  OneToken<Number> own, other;
  const Index size;
  std::vector<Number> state, row;
};

template <typename Number>
std::tuple<Tensor, Tensor> tree_step_of(const Recurrence& call, const Recurrence& others,
                                        Given levels, Given tree, Index tokens, Maybe counts) {
  Index buckets = 0;
  while ((tokens + 1) >> buckets) ++buckets;
  const Index heads = call.batch * call.kv_heads, size = call.width * call.columns;
  Tensor out = at::empty({call.batch, call.q.size(1), 1, call.value_dim}, call.q.options());
  Tensor after = at::empty({call.batch, call.kv_heads, buckets, call.width, call.columns},
                           call.q.options());
  const Index held = tree.size(2), rows = call.group * call.value_dim;
  const Index together = std::max<Index>(1, WORTH_A_THREAD / std::max<Index>(1, size * buckets));
  at::parallel_for(0, heads, together, [&](Index begin, Index end) {
    Buckets<Number> own(call, others, levels);
    for (Index one = begin; one < end; ++one)
      own.run(one / call.kv_heads, one % call.kv_heads,
              counts ? counts->const_data_ptr<int64_t>()[one / call.kv_heads] : tokens, tree.const_data_ptr<Number>() + one * held * size,
              after.data_ptr<Number>() + one * buckets * size, buckets,
              out.data_ptr<Number>() + one * rows);
  });
  return {out, after};
}

std::tuple<Tensor, Tensor> tree_step(Given q, Given k, Given v, Maybe log_decay, Maybe beta,
                                     Given levels, Given tree, Index tokens, Maybe counts,
                                     bool delta, bool l2_norm, double scale) {
  const std::optional<Tensor> none;
  const Tensor nothing = at::zeros_like(v);
  const Recurrence call{q,    k,     v,       log_decay, beta,  none, none,
                        none, delta, l2_norm, false,     false, scale};
  const Recurrence others{q,    k,     nothing, log_decay, beta,  none, none,
                          none, delta, l2_norm, false,     false, scale};
  return q.scalar_type() == at::kDouble
             ? tree_step_of<double>(call, others, levels, tree, tokens, counts)
             : tree_step_of<float>(call, others, levels, tree, tokens, counts);
}

}  // namespace
}  // namespace attnzoo

TORCH_LIBRARY_FRAGMENT(attnzoo, library) {
  library.def(
      "native_tree_step(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor "
      "levels, Tensor tree, int tokens, Tensor? counts, bool delta, bool l2_norm, float "
      "scale) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(attnzoo, CPU, library) {
  library.impl("native_tree_step", &attnzoo::tree_step);
}
