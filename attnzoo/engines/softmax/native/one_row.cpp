// One row of attention for every head, over keys that may stand anywhere: what decoding takes.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "native/products.h"

namespace attnzoo {
namespace {

using at::Tensor;
using Given = const Tensor&;
using Maybe = const std::optional<Tensor>&;

constexpr double CLOSED = -1e5;               // a gate from here down hides all that stands before
constexpr Index WORTH_A_THREAD = 1 << 15;     // numbers of keys that one thread is not spared
constexpr Index WIDEST = 4;                   // vectors of a row of values in registers

// What is asked for. Numbers of a query, a key, a value or a head lie together.
struct Asked {
  Given q, k, v;
  Maybe key_mask;     // (batch, keys), also with the heads in between
  Maybe bias;         // (batch or 1, heads, keys), added to the scores
  Maybe log_decay;    // (batch, heads, keys), gates whose sums are added to them
  Maybe blocks;       // (batch or 1, choosers, width), of keys that are seen; -1: none
  Maybe sink_logits;  // (heads), one more score
  Maybe subtracted;   // (batch or 1, heads or 1), how much of a second map is taken off the first
  Index block_size;
  double scale;
  bool sigmoid;                      // whether a score is weighed by itself
  std::optional<double> row_bias;    // added to those; none: -log of how many keys are seen
  const Index heads = q.size(1), group = heads / k.size(1), keys = k.size(2);
  const Index maps = subtracted ? 2 : 1, width = q.size(3) / maps, value_dim = v.size(3);
};

// The place of a row of x, whose leading axes of size 1 are broadcast.
template <typename Number>
const Number* row_of(Given x, Index sample, Index head) {
  const Index first = x.size(0) > 1 ? sample : 0, second = x.size(1) > 1 ? head : 0;
  return x.const_data_ptr<Number>() + first * x.stride(0) + second * x.stride(1);
}

template <typename Number>
class OneRow {
 public:
  explicit OneRow(const Asked& call) : call(call), places(call.keys), own(call.keys) {
    for (auto& map : scores) map.resize(whole<Number>(call.keys));
  }

  void run(Index sample, Index head, Number* out) {
    std::fill_n(out, call.value_dim, Number(0));
    find_places(sample, head);
    if (!count) return;
    score(row_of<Number>(call.q, sample, head),
          head_of<Number>(call.k, sample, head / call.group));
    add_to_scores(sample, head);
    if (call.sigmoid) {
      weigh_each();
    } else {
      const Number sink = call.sink_logits ? *(call.sink_logits->const_data_ptr<Number>() + head)
                                           : -std::numeric_limits<Number>::infinity();
      for (Index map = 0; map < call.maps; ++map) weigh(scores[map].data(), sink);
    }
    if (call.subtracted) subtract(*row_of<Number>(*call.subtracted, sample, head));
    sum_values(head_of<Number>(call.v, sample, head / call.group), out);
  }

 private:
  // Lists the keys that are seen, and what gates add to their scores.
  void find_places(Index sample, Index head) {
    const bool* real = call.key_mask ? mask_of(*call.key_mask, sample, head) : nullptr;
    Index first = 0;
    if (call.log_decay) first = add_gates(row_of<Number>(*call.log_decay, sample, head));
    count = 0;
    const auto take = [&](Index begin, Index end) {
      for (Index key = std::max(begin, first); key < end; ++key)
        if (!real || real[key]) places[count++] = key;
    };
    if (!call.blocks) return take(0, call.keys);
    const Tensor& blocks = *call.blocks;
    const int64_t* chosen = row_of<int64_t>(blocks, sample, head * blocks.size(1) / call.heads);
    for (Index i = 0; i < blocks.size(2); ++i)
      if (chosen[i] >= 0)
        take(chosen[i] * call.block_size,
             std::min((chosen[i] + 1) * call.block_size, call.keys));
  }

  static const bool* mask_of(Given mask, Index sample, Index head) {
    return mask.const_data_ptr<bool>() + sample * mask.stride(0) +
           (mask.dim() == 3 ? head * mask.stride(1) : 0);
  }

  // Sums the gates behind every key, from the last on, and returns the first key that none of them
  // hides. One that is no number spoils all.
  Index add_gates(const Number* gates) {
    double sum = 0;
    Index first = 0;
    for (Index key = call.keys - 1; key >= 0; --key) {
      const double gate = gates[key];
      if (std::isnan(gate)) return std::fill_n(own.begin(), call.keys, gates[key]), 0;
      own[key] = static_cast<Number>(sum);
      if (gate > CLOSED)
        sum += gate;
      else
        first = std::max(first, key);
    }
    return first;
  }

  // scores = scale · query · key, of a vector of keys at a time.
  void score(const Number* query, const Source<Number>& keys) {
    for (Index first = 0; first < count; first += LANES<Number>)
      for (Index map = 0; map < call.maps; ++map)
        dot_lines(query + map * call.width, call.width, std::min(LANES<Number>, count - first),
                  static_cast<Number>(call.scale),
                  [&](Index i) { return keys.at(places[first + i], map * call.width).data; },
                  &scores[map][first]);
  }

  void add_to_scores(Index sample, Index head) {
    const Number* bias = call.bias ? row_of<Number>(*call.bias, sample, head) : nullptr;
    if (!bias && !call.log_decay) return;
    for (Index map = 0; map < call.maps; ++map)
      for (Index i = 0; i < count; ++i) {
        if (bias) scores[map][i] += bias[places[i]];
        if (call.log_decay) scores[map][i] += own[places[i]];
      }
  }

  // Softmax in the place of scores. sink: one more of them. 0 where all are -inf.
  void weigh(Number* x, Number sink) const {
    const auto larger = [](const Vec<Number>& a, const Vec<Number>& b) {
      return at::vec::maximum(a, b);
    };
    const auto add = [](const Vec<Number>& a, const Vec<Number>& b) { return a + b; };
    const Number found = at::vec::reduce_all<Number>(larger, x, count);
    const Number largest = sink > found ? sink : found;
    if (largest == -std::numeric_limits<Number>::infinity()) {
      std::fill_n(x, count, Number(0));
      return;
    }
    const Vec<Number> shift(largest);
    at::vec::map<Number>([&](Vec<Number> s) { return (s - shift).exp(); }, x, x, count);
    const Number sum = at::vec::reduce_all<Number>(add, x, count) + std::exp(sink - largest);
    scale(x, 1 / sum, count, x);
  }

  // The sigmoid in the place of every score.
  void weigh_each() {
    const double bias = call.row_bias ? *call.row_bias : -std::log(static_cast<double>(count));
    const Vec<Number> more(static_cast<Number>(bias)), one(1);
    Number* x = scores[0].data();
    at::vec::map<Number>([&](Vec<Number> s) { return one / (one + (s + more).neg().exp()); }, x, x,
                         count);
  }

  void subtract(Number factor) {
    for (Index i = 0; i < count; ++i) scores[0][i] -= factor * scores[1][i];
  }

  // out = the sum of the values, each times its weight.
  void sum_values(const Source<Number>& values, Number* out) const {
    Index j = 0;
    for (; j + WIDEST * LANES<Number> <= call.value_dim; j += WIDEST * LANES<Number>)
      sum_columns<WIDEST>(values.at(0, j), LANES<Number>, out + j);
    for (; j < call.value_dim; j += LANES<Number>)
      sum_columns<1>(values.at(0, j), std::min(LANES<Number>, call.value_dim - j), out + j);
  }

  // The same for some vectors of columns, of `lanes` each.
  template <Index wide>
  void sum_columns(const Source<Number>& values, Index lanes, Number* out) const {
    Vec<Number> sums[wide];
#pragma GCC unroll 4
    for (Index c = 0; c < wide; ++c) sums[c] = Vec<Number>(0);
    for (Index i = 0; i < count; ++i) {
      const Vec<Number> weight(scores[0][i]);
      const Number* line = values.at(places[i], 0).data;
#pragma GCC unroll 4
      for (Index c = 0; c < wide; ++c) {
        const Vec<Number> part = wide == 1 ? Vec<Number>::loadu(line, lanes)
                                           : Vec<Number>::loadu(line + c * LANES<Number>);
        sums[c] = at::vec::fmadd(weight, part, sums[c]);
      }
    }
#pragma GCC unroll 4
    for (Index c = 0; c < wide; ++c)
      sums[c].store(out + c * LANES<Number>, static_cast<int>(lanes));
  }

  const Asked& call;
  std::vector<Index> places;
  std::vector<Number> own, scores[2];
  Index count = 0;
};

template <typename Number>
Tensor rows_of_all(const Asked& call) {
  const Index batch = call.q.size(0), heads = call.heads;
  Tensor out = at::empty({batch, heads, 1, call.value_dim}, call.q.options());
  const Index read = call.blocks ? std::min(call.keys, call.blocks->size(2) * call.block_size)
                                 : call.keys;
  const Index size = std::max<Index>(1, read * (call.q.size(3) + call.value_dim));
  const Index together = std::max<Index>(1, WORTH_A_THREAD / size);
  at::parallel_for(0, batch * heads, together, [&](Index begin, Index end) {
    OneRow<Number> row(call);
    for (Index one = begin; one < end; ++one)
      row.run(one / heads, one % heads, out.data_ptr<Number>() + one * call.value_dim);
  });
  return out;
}

Tensor one_row(Given q, Given k, Given v, Maybe key_mask, Maybe bias, Maybe log_decay, Maybe blocks,
               Index block_size, Maybe sink_logits, Maybe subtracted, double scale, bool sigmoid,
               std::optional<double> row_bias) {
  const Asked call{q,           k,          v,          key_mask, bias,    log_decay, blocks,
                   sink_logits, subtracted, block_size, scale,    sigmoid, row_bias};
  return q.scalar_type() == at::kDouble ? rows_of_all<double>(call) : rows_of_all<float>(call);
}

}  // namespace
}  // namespace attnzoo

TORCH_LIBRARY_FRAGMENT(attnzoo, library) {
  library.def(
      "native_row(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? bias, Tensor? log_decay, "
      "Tensor? blocks, int block_size, Tensor? sink_logits, Tensor? subtracted, float scale, bool "
      "sigmoid, float? row_bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(attnzoo, CPU, library) { library.impl("native_row", &attnzoo::one_row); }
