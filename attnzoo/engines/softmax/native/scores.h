// Scores of some rows of a head against a chunk of keys, laid out as (keys, rows): the maxima and
// sums of rows are those of vectors.
#pragma once

#include <limits>
#include <optional>

#include "tile_plan.h"

namespace attnzoo {

template <typename Number>
constexpr Number INFINITE = std::numeric_limits<Number>::infinity();

// float32's takes NaN and inf for large numbers: rows with such scores are told apart otherwise.
inline Vec<float> exponential(const Vec<float>& x) { return x.exp_u20(); }
inline Vec<double> exponential(const Vec<double>& x) { return x.exp(); }

// scores (keys of the chunk, ROWS) = keys · packed rows, -inf where a row does not see a key, in the
// lanes of each stretch.
template <typename Number>
void score(const Plan<Number>& plan, const Tile& tile, const Chunk& chunk, Index skipped,
           const Source<Number>& keys, const Number* packed, Index width, Number* scores) {
  for (const Stretch& part : chunk)
    multiply<false, Number>(keys.at(part.first, 0), {packed + part.lane, ROWS},
                            {scores + part.line * ROWS + part.lane, ROWS}, part.count,
                            part.lane_end - part.lane, width);
  plan.limit(tile, chunk, skipped, scores);
}

// out (rows, width) += the transpose of x (keys of the chunk, ROWS) · the chunk's keys or values.
template <typename Number>
void add_transposed(const Chunk& chunk, const Number* x, const Source<Number>& keys, Number* out,
                    Index rows, Index width) {
  for (const Stretch& part : chunk)
    multiply<true, Number>({x + part.line * ROWS + part.lane, 1, ROWS}, keys.at(part.first, 0),
                           {out + part.lane * width, width},
                           std::min(part.lane_end, rows) - part.lane, width, part.count);
}

template <typename Number>
void scale_rows(Number* rows, Index count, Index width, const Number* factors) {
  for (Index i = 0; i < count; ++i) {
    if (factors[i] == 1) continue;
    for (Index j = 0; j < width; ++j) rows[i * width + j] *= factors[i];
  }
}

// The largest score of up to ROWS rows so far, and the sum of their exponentials relative to it.
template <typename Number>
struct Sums {
  alignas(64) Number largest[ROWS], total[ROWS], factor[ROWS];

  // A sink logit is one more score of every row.
  explicit Sums(const Number* sink_logit) {
    std::fill(largest, largest + ROWS, sink_logit ? *sink_logit : -INFINITE<Number>);
    std::fill(total, total + ROWS, sink_logit ? Number(1) : Number(0));
  }

  // Scores become exponentials, and `factor` by what earlier ones must be multiplied.
  void take(const Chunk& chunk, Number* scores) {
    for (Index j = 0; j < ROWS; j += LANES<Number>) {
      const Lanes before = Lanes::loadu(largest + j);
      Lanes top = before, sum(0);
      each(chunk, j, scores, [&](Number* x) { top = at::vec::maximum(top, Lanes::loadu(x)); });
      const Lanes base = Lanes::blendv(top, Lanes(0), top == Lanes(-INFINITE<Number>));
      const Lanes scaled = exponential(before - base);
      each(chunk, j, scores, [&](Number* x) {
        const Lanes weight = exponential(Lanes::loadu(x) - base);
        weight.store(x);
        sum = sum + weight;
      });
      at::vec::fmadd(Lanes::loadu(total + j), scaled, sum).store(total + j);
      top.store(largest + j);
      scaled.store(factor + j);
    }
  }

  // `total` becomes its inverse, 0 for a row that sees nothing, and `largest` the logarithm of the
  // sum; both NaN for a row with NaN or inf among its scores.
  void finish() {
    const Lanes zero(0), lost(std::numeric_limits<Number>::quiet_NaN());
    for (Index j = 0; j < ROWS; j += LANES<Number>) {
      const Lanes top = Lanes::loadu(largest + j), sum = Lanes::loadu(total + j);
      const Lanes none = sum == zero, wrong = (top != top) | (top == Lanes(INFINITE<Number>));
      const Lanes inverse = Lanes::blendv(Lanes(1) / sum, zero, none);
      const Lanes log_sum = Lanes::blendv(top + sum.log(), zero, none);
      Lanes::blendv(inverse, lost, wrong).store(total + j);
      Lanes::blendv(log_sum, lost, wrong).store(largest + j);
    }
  }

 private:
  using Lanes = Vec<Number>;

  // Calls visit(scores of a key) for the keys that lanes j.. see.
  template <typename Visit>
  void each(const Chunk& chunk, Index j, Number* scores, const Visit& visit) {
    for (const Stretch& part : chunk)
      if (part.lane <= j && j < part.lane_end)
        for (Index i = part.line; i < part.line + part.count; ++i) visit(scores + i * ROWS + j);
  }
};

}  // namespace attnzoo
