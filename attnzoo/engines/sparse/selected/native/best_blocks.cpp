// The blocks of keys that an indexer ranks highest for every query of a call. Scores stay in the
// cache: what leaves it are the numbers of the blocks.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "candidates.h"

namespace attnzoo {
namespace {

using at::Tensor;
using Given = const Tensor&;
using Maybe = const std::optional<Tensor>&;
using Lanes = Vec<float>;

constexpr float LOWEST = -std::numeric_limits<float>::infinity();
constexpr Index SCORED = 4 * HIGH;  // keys at a time

// The sizes of a call, and of a choice.
struct Sizes {
  Index batch, heads, key_heads, rows, keys, width, choosers, block, blocks, chosen;

  Sizes(Given q, Given k, Index choosers, Index block, Index chosen)
      : batch(q.size(0)), heads(q.size(1)), key_heads(k.size(1)), rows(q.size(2)),
        keys(k.size(2)), width(q.size(3)), choosers(choosers), block(block),
        blocks((k.size(2) + block - 1) / block), chosen(chosen) {}
};

// Up to ROWS queries of one sample, each in a lane, and the best score of every block for them.
struct Tile {
  Index sample, first, rows;
  Index position;  // of the first query among the keys
  bool is_causal;

  // How many keys, from the first on, query `row` and those before it see.
  Index seen(Index row, const Sizes& size) const {
    return is_causal ? std::clamp<Index>(position + row + 1, 0, size.keys) : size.keys;
  }
};

class Scorer {
 public:
  Scorer(const Sizes& size, Given q, Given k, Maybe w, Maybe key_mask)
      : size(size), q(q), k(k), w(w), key_mask(key_mask),
        queries(size.heads * size.width * ROWS), weights(size.heads * ROWS, 1.0f),
        best(size.blocks * ROWS) {}

  // Lays the queries and weights of a tile out in lanes.
  void load(const Tile& of) {
    tile = of;
    mask = key_mask ? key_mask->const_data_ptr<bool>() + tile.sample * size.keys : nullptr;
    for (Index head = 0; head < size.heads; ++head) {
      transpose<float>(head_of<float>(q, tile.sample, head).at(tile.first, 0), tile.rows,
                       size.width, 1, &queries[head * size.width * ROWS]);
      if (!w) continue;
      const Index place = (tile.sample * size.heads + head) * size.rows + tile.first;
      std::copy_n(w->const_data_ptr<float>() + place, tile.rows, &weights[head * ROWS]);
    }
  }

  // Finds the best scores of every block among the heads of a chooser.
  void score(Index chooser) {
    const Index seen = tile.seen(tile.rows - 1, size);
    std::fill(best.begin(), best.end(), LOWEST);
    for (Index first = 0; first < seen;) {
      const Index block = first / size.block, end = std::min((block + 1) * size.block, seen);
      const Index count = std::min(SCORED, end - first);
      score_keys(chooser, first, count);
      keep_best(first, count, &best[block * ROWS]);
      first += count;
    }
  }

  // Writes the blocks of a query in ascending order. Where scores that are off by `error` leave
  // open which these are, those that may be are scored again in double. Returns whether it cannot
  // tell, of scores that are no numbers.
  bool choose(Index chooser, Index row, float error, int64_t* out) {
    const Index blocks = (tile.seen(row, size) + size.block - 1) / size.block;
    found.clear();
    std::fill(out, out + size.chosen, NONE);
    if (!std::isfinite(error)) return true;
    for (Index block = 0; block < blocks; ++block) {
      const float score = best[block * ROWS + row];
      if (std::isnan(score)) return true;
      if (score > LOWEST) found.push_back({score, block});
    }
    Index count = std::min<Index>(size.chosen, found.size());
    if (count < static_cast<Index>(found.size())) {
      const auto next = found.begin() + count;
      std::nth_element(found.begin(), next, found.end());
      const double last = std::max_element(found.begin(), next)->score, off = 2.0 * error;
      if (!(last - next->score > off)) {
        const auto open = std::partition(found.begin(), found.end(),
                                         [&](auto& one) { return one.score > last + off; });
        const auto end = std::partition(open, found.end(),
                                        [&](auto& one) { return one.score >= last - off; });
        for (auto one = open; one != end; ++one) one->score = exact_best(chooser, row, one->block);
        std::nth_element(open, next, end);
      }
    }
    for (Index i = 0; i < count; ++i) out[i] = found[i].block;
    std::sort(out, out + count);
    return false;
  }

 private:
  // scores (count, ROWS) of some keys: the sum over the chooser's heads of w · ReLU(q · k).
  void score_keys(Index chooser, Index first, Index count) {
    const Index each = size.heads / size.choosers;
    for (Index head = chooser * each; head < (chooser + 1) * each; ++head) {
      multiply<false, float>(keys_of(head).at(first, 0),
                             {&queries[head * size.width * ROWS], ROWS}, {products, ROWS}, count,
                             ROWS, size.width);
      const bool is_first = head == chooser * each;
      for (Index j = 0; j < ROWS; j += LANES<float>) {
        const Lanes weight = Lanes::loadu(&weights[head * ROWS + j]);
        for (Index i = j; i < count * ROWS; i += ROWS) {
          const Lanes part = at::vec::maximum(Lanes::loadu(products + i), Lanes(0));
          const Lanes before = is_first ? Lanes(0) : Lanes::loadu(scores + i);
          at::vec::fmadd(weight, part, before).store(scores + i);
        }
      }
    }
  }

  // Raises the best scores of a block to those of some of its keys that the queries see.
  void keep_best(Index first, Index count, float* top) {
    for (Index i = 0; i < count; ++i) {
      if (mask && !mask[first + i]) continue;
      float* line = scores + i * ROWS;
      const Index ahead = tile.is_causal ? first + i - tile.position : 0;  // of so many queries
      if (ahead > 0) std::fill(line, line + std::min(ahead, ROWS), LOWEST);
      for (Index j = 0; j < ROWS; j += LANES<float>)
        at::vec::maximum(Lanes::loadu(top + j), Lanes::loadu(line + j)).store(top + j);
    }
  }

  // The best score of a block for a query, in double.
  double exact_best(Index chooser, Index row, Index block) const {
    const Index each = size.heads / size.choosers, begin = chooser * each;
    const Index end = std::min((block + 1) * size.block, tile.seen(row, size));
    bool may_exceed_0 = false;
    for (Index head = begin; head < begin + each; ++head)
      may_exceed_0 |= weights[head * ROWS + row] > 0;
    double highest = -std::numeric_limits<double>::infinity();
    for (Index key = block * size.block; key < end; ++key) {
      if (mask && !mask[key]) continue;
      double sum = 0;
      for (Index head = begin; head < begin + each; ++head) {
        const float* own = head_of<float>(q, tile.sample, head).at(tile.first + row, 0).data;
        const double product = exact_dot(own, keys_of(head).at(key, 0).data, size.width);
        sum += weights[head * ROWS + row] * std::max(product, 0.0);
      }
      highest = std::max(highest, sum);
      if (highest == 0 && !may_exceed_0) break;
    }
    return highest;
  }

  Source<float> keys_of(Index head) const {
    return head_of<float>(k, tile.sample, head * size.key_heads / size.heads);
  }

  const Sizes size;
  Given q, k;
  Maybe w, key_mask;
  Tile tile;
  const bool* mask;
  std::vector<float> queries, weights, best;
  std::vector<Candidate> found;
  alignas(64) float products[SCORED * ROWS], scores[SCORED * ROWS];
};

// The blocks, (batch, choosers, rows, width), -1 where a row has fewer, and which rows are left to
// do, (batch, rows).
// w: weights of the heads; none: all are 1
// positions: where every query stands among the keys, of a causal call
// errors: (batch, rows), what a score in float is off by at most
std::tuple<Tensor, Tensor> best_blocks(Given q, Given k, Maybe w, Maybe positions, Maybe key_mask,
                                       Given errors, Index choosers, Index block, Index chosen) {
  const Sizes size(q, k, choosers, block, chosen);
  const auto options = q.options();
  Tensor out = at::empty({size.batch, choosers, size.rows, chosen}, options.dtype(at::kLong));
  Tensor left = at::zeros({size.batch, size.rows}, options.dtype(at::kBool));
  const Index tiles = (size.rows + ROWS - 1) / ROWS;
  at::parallel_for(0, size.batch * tiles, 1, [&](Index begin, Index end) {
    Scorer scorer(size, q, k, w, key_mask);
    for (Index one = begin; one < end; ++one) {
      const Index sample = one / tiles, place = one % tiles;
      // Causal tiles have more and more keys: from both ends in turn, so that threads have as much.
      const Index first = (place % 2 ? tiles - 1 - place / 2 : place / 2) * ROWS;
      Tile tile{sample, first, std::min(ROWS, size.rows - first), 0, positions.has_value()};
      if (positions) {
        const Index row = positions->size(0) > 1 ? sample : 0;
        tile.position = positions->const_data_ptr<int64_t>()[row * size.rows + first];
      }
      scorer.load(tile);
      for (Index chooser = 0; chooser < choosers; ++chooser) {
        scorer.score(chooser);
        for (Index row = 0; row < tile.rows; ++row) {
          const Index at = sample * size.rows + first + row;
          int64_t* to = out.data_ptr<int64_t>() +
                        ((sample * choosers + chooser) * size.rows + first + row) * chosen;
          if (scorer.choose(chooser, row, errors.const_data_ptr<float>()[at], to))
            left.data_ptr<bool>()[at] = true;
        }
      }
    }
  });
  return {out, left};
}

}  // namespace
}  // namespace attnzoo

TORCH_LIBRARY_FRAGMENT(attnzoo, library) {
  library.def(
      "native_best_blocks(Tensor q, Tensor k, Tensor? w, Tensor? positions, Tensor? key_mask, "
      "Tensor errors, int choosers, int block_size, int width) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(attnzoo, CPU, library) {
  library.impl("native_best_blocks", &attnzoo::best_blocks);
}
