// The blocks of keys that one query of a call sees, by means of blocks or by an indexer; and softmax
// over the means themselves. All scores are double, as in torch.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "candidates.h"

namespace attnzoo {
namespace {

using at::Tensor;
using Given = const Tensor&;
using Maybe = const std::optional<Tensor>&;

constexpr Index WORTH_A_THREAD = 1 << 16;  // products that one thread is not spared
constexpr double LOWEST = -std::numeric_limits<double>::infinity();
// Above any share of a softmax: blocks that are chosen before all others.
constexpr double FIRST = 0x1p60, PREVIOUS = 0x1p61, OWN = 0x1p62;
constexpr double DIGITS = 0x1p30;  // to which shares are compared

// A sample: which of its keys are real, and where its query stands among them.
struct Sample {
  const Index number, keys, size;
  const bool* real;
  Index position;

  Sample(Index number, Maybe key_mask, Given positions, Index keys, Index size)
      : number(number), keys(keys), size(size),
        real(key_mask ? key_mask->const_data_ptr<bool>() + number * key_mask->stride(0) : nullptr),
        position(positions.const_data_ptr<int64_t>()[positions.size(0) > 1 ? number : 0]) {}

  Index own() const { return position < 0 ? NONE : position / size; }
  Index end(Index block) const { return std::min((block + 1) * size, keys); }
  bool has(Index key) const { return !real || real[key]; }

  // How many real keys a block has.
  Index count(Index block) const {
    if (!real) return end(block) - block * size;
    return std::count(real + block * size, real + end(block), true);
  }
};

// What is asked for: blocks by their means.
struct Pools {
  Given q, k, v;
  Maybe key_sums, value_sums;  // (batch, kv_heads, blocks, width) in double, of the first blocks
  Maybe key_mask;              // (batch, keys)
  Given positions;             // (batch or 1, 1)
  const bool is_causal;
  const Index size;  // keys of a block
  const Index batch = q.size(0), heads = q.size(1), kv_heads = k.size(1), group = heads / kv_heads;
  const Index keys = k.size(2), width = k.size(3), blocks = (keys + size - 1) / size;

  // Calls visit(sample, head) for every key head.
  template <typename Visit>
  void each_head(const Visit& visit) const {
    const Index products = std::max<Index>(1, blocks * (width + v.size(3)) * (group + 1));
    const Index together = std::max<Index>(1, WORTH_A_THREAD / products);
    at::parallel_for(0, batch * kv_heads, together, [&](Index begin, Index end) {
      for (Index one = begin; one < end; ++one)
        visit(Sample(one / kv_heads, key_mask, positions, keys, size), one % kv_heads);
    });
  }
};

// The means of x over the real keys of blocks that have some, each times a factor.
template <typename Number>
class Means {
 public:
  Means(Given x, Maybe sums, const Sample& sample, Index head)
      : x(head_of<Number>(x, sample.number, head)), width(x.size(3)), sample(sample),
        known(sums ? sums->size(2) : 0) {
    if (sums) sum = head_of<double>(*sums, sample.number, head);
  }

  void add(Index block) {
    const Index count = sample.count(block);
    if (block < known && (count & (count - 1)) == 0) {  // a quotient by a power of 2 is a product
      found.push_back({sum.at(block, 0).data, 1.0 / count});
      return;
    }
    std::vector<double>& mean = made.emplace_back(width);
    if (block < known)
      std::copy_n(sum.at(block, 0).data, width, mean.begin());
    else
      for (Index key = block * sample.size; key < sample.end(block); ++key)
        if (sample.has(key))
          for (Index c = 0; c < width; ++c) mean[c] += x.at(key, c).data[0];
    for (double& number : mean) number /= count;
    found.push_back({mean.data(), 1.0});
  }

  double dot_with(const std::vector<double>& query, Index place) const {
    return found[place].factor * exact_dot(query.data(), found[place].data, width);
  }

  void add_to(std::vector<double>& row, double weight, Index place) const {
    weight *= found[place].factor;
    for (Index c = 0; c < width; ++c) row[c] += weight * found[place].data[c];
  }

 private:
  struct Mean {
    const double* data;
    double factor;
  };

  const Source<Number> x;
  const Index width;
  const Sample& sample;
  Source<double> sum{nullptr, 0};
  const Index known;
  std::vector<Mean> found;
  std::vector<std::vector<double>> made;
};

// Its query in double.
template <typename Number>
std::vector<double> query_of(Given q, const Sample& sample, Index head) {
  const Number* row = head_of<Number>(q, sample.number, head).data;
  return std::vector<double>(row, row + q.size(3));
}

// Of every head the blocks whose means it likes best, its own before all others.
template <typename Number>
Tensor best_means_of(const Pools& call, Index wanted) {
  Tensor out = at::empty({call.batch, call.heads, wanted}, call.q.options().dtype(at::kLong));
  call.each_head([&](const Sample& sample, Index head) {
    const Index own = sample.own(), seen = call.is_causal ? own : call.blocks;
    Means<Number> means(call.k, call.key_sums, sample, head);
    std::vector<Index> candidates;
    for (Index block = 0; block < seen; ++block) {
      if (block == own || !sample.count(block)) continue;
      candidates.push_back(block);
      means.add(block);
    }
    Best best(call.blocks);
    for (Index row = head * call.group; row < (head + 1) * call.group; ++row) {
      const auto query = query_of<Number>(call.q, sample, row);
      for (size_t i = 0; i < candidates.size(); ++i)
        best.offer(candidates[i], means.dot_with(query, i));
      if (own >= 0) best.offer(own, std::numeric_limits<double>::infinity());
      best.take(wanted, out.data_ptr<int64_t>() + (sample.number * call.heads + row) * wanted);
    }
  });
  return out;
}

// Softmax in the place of scores.
void weigh(std::vector<double>& scores) {
  double largest = LOWEST, sum = 0;
  for (const double score : scores) largest = std::isnan(score) ? score : std::max(largest, score);
  for (double& score : scores) sum += score = std::exp(score - largest);
  for (double& score : scores) score /= sum;
}

// How the blocks of a choice by shares are ranked.
struct Ranks {
  Index wanted;
  double scale;
  bool first_block;  // whether the first block is chosen before others
  bool of_logits;    // whether the heads of a choice share the softmax of the mean of their scores
};

// Softmax over the means of the blocks that have ended, and of every key head the blocks with the
// largest shares; the own block, the one before it, and the first before all others.
template <typename Number>
class PooledRow {
 public:
  PooledRow(const Pools& call, const Ranks& ranks, const Sample& sample, Index head)
      : call(call), ranks(ranks), sample(sample), head(head),
        keys(call.k, call.key_sums, sample, head), values(call.v, call.value_sums, sample, head) {
    for (Index block = 0; (block + 1) * call.size <= sample.position + 1; ++block) {
      if (block >= call.blocks || !sample.count(block)) continue;
      ended.push_back(block);
      keys.add(block);
      values.add(block);
    }
  }

  void run(Number* rows, int64_t* blocks) {
    std::vector<double> scores(ended.size()), shares(ended.size());
    for (Index row = 0; row < call.group; ++row) {
      const auto query = query_of<Number>(call.q, sample, head * call.group + row);
      for (size_t i = 0; i < ended.size(); ++i) {
        scores[i] = ranks.scale * keys.dot_with(query, i);
        if (ranks.of_logits) shares[i] += scores[i] / call.group;
      }
      weigh(scores);
      for (size_t i = 0; !ranks.of_logits && i < ended.size(); ++i)
        shares[i] += scores[i] / call.group;
      sum_values(scores, rows + row * call.v.size(3));
    }
    if (ranks.of_logits) weigh(shares);
    choose(shares, blocks);
  }

 private:
  void sum_values(const std::vector<double>& weights, Number* out) const {
    std::vector<double> row(call.v.size(3));
    for (size_t i = 0; i < ended.size(); ++i) values.add_to(row, weights[i], i);
    std::copy(row.begin(), row.end(), out);
  }

  void choose(const std::vector<double>& shares, int64_t* out) const {
    const Index own = sample.own();
    std::vector<double> score(call.blocks);  // 0 of a block that has not ended
    for (size_t i = 0; i < ended.size(); ++i) score[ended[i]] = std::nearbyint(shares[i] * DIGITS);
    if (ranks.first_block) score[0] = FIRST;
    if (own >= 1) score[own - 1] = PREVIOUS;
    if (own >= 0) score[own] = OWN;
    Best best(call.blocks);
    for (Index block = 0; block <= own; ++block)
      if (block == own || sample.count(block)) best.offer(block, score[block]);
    best.take(ranks.wanted, out);
  }

  const Pools& call;
  const Ranks& ranks;
  const Sample& sample;
  const Index head;
  Means<Number> keys, values;
  std::vector<Index> ended;  // blocks that have these means
};

template <typename Number>
std::tuple<Tensor, Tensor> pooled_row_of(const Pools& call, const Ranks& ranks) {
  const Index width = call.v.size(3), wanted = ranks.wanted;
  Tensor rows = at::empty({call.batch, call.heads, 1, width}, call.q.options());
  Tensor blocks =
      at::empty({call.batch, call.kv_heads, wanted}, call.q.options().dtype(at::kLong));
  call.each_head([&](const Sample& sample, Index head) {
    const Index place = sample.number * call.kv_heads + head;
    PooledRow<Number>(call, ranks, sample, head)
        .run(rows.data_ptr<Number>() + place * call.group * width,
             blocks.data_ptr<int64_t>() + place * wanted);
  });
  return {rows, blocks};
}

// Keys that an indexer ranks: Σ_h w_h ReLU(q_h · k) over the heads of a chooser.
struct Ranked {
  Given q, k;      // (batch, index heads, 1, width), (batch, key heads, keys, width)
  Maybe w;         // (batch, index heads, 1); none: all are 1
  Maybe key_mask;  // (batch, keys)
  Given positions;
  const bool is_causal;
  const Index choosers, size;
  const Index keys = k.size(2), blocks = (keys + size - 1) / size, each = q.size(1) / choosers;
};

constexpr Index TOGETHER = 128;  // keys that a thread ranks at a time

// The scores of some keys.
template <typename Number>
void rank(const Ranked& call, Index number, Index chooser, Index first, Index last,
          double* scores) {
  const Index heads = call.q.size(1), width = call.q.size(3);
  for (Index head = chooser * call.each; head < (chooser + 1) * call.each; ++head) {
    const auto keys = head_of<Number>(call.k, number, head * call.k.size(1) / heads);
    const Number* query = head_of<Number>(call.q, number, head).data;
    const double weight = call.w ? call.w->const_data_ptr<Number>()[number * heads + head] : 1.0;
    for (Index key = first; key < last; ++key) {
      const double product = exact_dot(query, keys.at(key, 0).data, width);
      scores[key] += weight * (product < 0 ? 0.0 : product);
    }
  }
}

// Of every chooser the blocks whose best keys have the largest scores.
template <typename Number>
Tensor best_keys_of(const Ranked& call, Index wanted) {
  const Index batch = call.q.size(0), rows = batch * call.choosers;
  const Index parts = (call.keys + TOGETHER - 1) / TOGETHER;
  Tensor out = at::empty({batch, call.choosers, wanted}, call.q.options().dtype(at::kLong));
  std::vector<double> scores(rows * call.keys);
  const Index products = std::max<Index>(1, TOGETHER * call.each * call.q.size(3));
  const Index together = std::max<Index>(1, WORTH_A_THREAD / products);
  at::parallel_for(0, rows * parts, together, [&](Index begin, Index end) {
    for (Index one = begin; one < end; ++one) {
      const Index row = one / parts, first = one % parts * TOGETHER;
      rank<Number>(call, row / call.choosers, row % call.choosers, first,
                   std::min(first + TOGETHER, call.keys), &scores[row * call.keys]);
    }
  });
  Best best(call.blocks);
  std::vector<double> tops(call.blocks);
  for (Index row = 0; row < rows; ++row) {
    const Sample sample(row / call.choosers, call.key_mask, call.positions, call.keys, call.size);
    const Index seen = call.is_causal ? std::min(sample.position + 1, call.keys) : call.keys;
    std::fill(tops.begin(), tops.end(), LOWEST);
    for (Index key = 0; key < seen; ++key) {
      const double score = scores[row * call.keys + key];
      double& top = tops[key / call.size];
      if (sample.has(key) && !(score <= top)) top = score;
    }
    for (Index block = 0; block < call.blocks; ++block) best.offer(block, tops[block]);
    best.take(wanted, out.data_ptr<int64_t>() + row * wanted);
  }
  return out;
}

#define OF_NUMBERS(run, ...)                                                  \
  (q.scalar_type() == at::kDouble ? run<double>(__VA_ARGS__) : run<float>(__VA_ARGS__))

Tensor best_means(Given q, Given k, Maybe key_sums, Maybe key_mask, Given positions,
                  bool is_causal, Index size, Index wanted) {
  const Pools call{q, k, k, key_sums, std::nullopt, key_mask, positions, is_causal, size};
  return OF_NUMBERS(best_means_of, call, wanted);
}

std::tuple<Tensor, Tensor> pooled_row(Given q, Given k, Given v, Maybe key_sums, Maybe value_sums,
                                      Maybe key_mask, Given positions, Index size, Index wanted,
                                      double scale, bool first_block, bool of_logits) {
  const Pools call{q, k, v, key_sums, value_sums, key_mask, positions, true, size};
  const Ranks ranks{wanted, scale, first_block, of_logits};
  return OF_NUMBERS(pooled_row_of, call, ranks);
}

Tensor best_keys(Given q, Given k, Maybe w, Maybe key_mask, Given positions, bool is_causal,
                 Index choosers, Index size, Index wanted) {
  const Ranked call{q, k, w, key_mask, positions, is_causal, choosers, size};
  return OF_NUMBERS(best_keys_of, call, wanted);
}

}  // namespace
}  // namespace attnzoo

TORCH_LIBRARY_FRAGMENT(attnzoo, library) {
  library.def(
      "native_best_means(Tensor q, Tensor k, Tensor? key_sums, Tensor? key_mask, Tensor positions, "
      "bool is_causal, int block_size, int width) -> Tensor");
  library.def(
      "native_pooled_row(Tensor q, Tensor k, Tensor v, Tensor? key_sums, Tensor? value_sums, "
      "Tensor? key_mask, Tensor positions, int block_size, int width, float scale, bool "
      "first_block, bool of_logits) -> (Tensor, Tensor)");
  library.def(
      "native_best_keys(Tensor q, Tensor k, Tensor? w, Tensor? key_mask, Tensor positions, bool "
      "is_causal, int choosers, int block_size, int width) -> Tensor");
}

TORCH_LIBRARY_IMPL(attnzoo, CPU, library) {
  library.impl("native_best_means", &attnzoo::best_means);
  library.impl("native_pooled_row", &attnzoo::pooled_row);
  library.impl("native_best_keys", &attnzoo::best_keys);
}
