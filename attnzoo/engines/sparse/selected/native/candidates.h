// Blocks of keys by how good they are.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "native/products.h"

namespace attnzoo {

constexpr Index NONE = -1;  // stands for no block

// A block and its best score. What is better comes first, of equals the earlier.
struct Candidate {
  double score;
  Index block;

  bool operator<(const Candidate& other) const {
    return score > other.score || (score == other.score && block < other.block);
  }
};

// x · y of numbers of which double holds every product.
template <typename Number>
double exact_dot(const Number* x, const Number* y, Index width) {
  double lanes[8] = {}, rest = 0;
  Index i = 0;
  for (; i + 8 <= width; i += 8)
    for (Index j = 0; j < 8; ++j) lanes[j] += static_cast<double>(x[i + j]) * y[i + j];
  for (; i < width; ++i) rest += static_cast<double>(x[i]) * y[i];
  for (Index half = 4; half; half /= 2)
    for (Index j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0] + rest;
}

// The best of some blocks: -inf stands for none, and what is no number comes first.
class Best {
 public:
  explicit Best(Index blocks) : is_chosen(blocks) { found.reserve(blocks); }

  void offer(Index block, double score) {
    if (std::isnan(score)) score = std::numeric_limits<double>::infinity();
    if (score > -std::numeric_limits<double>::infinity()) found.push_back({score, block});
  }

  // Writes so many of those offered in ascending order, and NONE where there are fewer.
  void take(Index wanted, int64_t* out) {
    const Index count = std::min<Index>(wanted, found.size());
    if (count < static_cast<Index>(found.size()))
      std::nth_element(found.begin(), found.begin() + count, found.end());
    std::fill(is_chosen.begin(), is_chosen.end(), 0);
    for (Index i = 0; i < count; ++i) is_chosen[found[i].block] = 1;
    int64_t* next = out;
    for (Index block = 0; block < static_cast<Index>(is_chosen.size()); ++block)
      if (is_chosen[block]) *next++ = block;
    std::fill(next, out + wanted, NONE);
    found.clear();
  }

 private:
  std::vector<Candidate> found;
  std::vector<char> is_chosen;
};

}  // namespace attnzoo
