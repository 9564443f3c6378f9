// The plan of `native_attention` for blocks of keys that the data select: which rows meet which keys.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "softmax/native/tile_plan.h"

namespace attnzoo {
namespace {

using at::Tensor;
using Given = const Tensor&;
using Maybe = const std::optional<Tensor>&;

// The tables of a plan, as far as they have been made; `tile_plan.h` says what they hold.
template <typename Number>
struct Tables {
  std::vector<int32_t> tiles, runs, caps, spans, ranges;
  std::vector<Number> limits;

  template <typename Table>
  static Index count(const Table& table, Index width = 1) {
    return static_cast<Index>(table.size()) / width;
  }

  // Keys first .. end - 1. A row's sums are made of stretches of KEYS keys, whatever other rows of
  // its tile see: these may depend on later tokens.
  void add_runs(Index first, Index end) {
    while (first < end) {
      const Index stretch = first / KEYS, stop = std::min(end, (stretch + 1) * KEYS);
      for (const Index one : {first, stop - first, stretch})
        runs.push_back(static_cast<int32_t>(one));
      first = stop;
    }
  }

  // Caps a block whose keys are seen alike, by the rows that have a 1 in `seen`.
  void cap_block(Index first, Index end, Index rows, const uint8_t* seen) {
    add_cap(first, end, {count(limits), count(spans) / 2}, 0);
    Index low = rows, high = 0;
    for (Index row = 0; row < rows; ++row) {
      limits.push_back(seen[row] ? INFINITE : -INFINITE);
      if (seen[row]) low = std::min(low, row), high = row + 1;
    }
    add_span(low, high);
  }

  // Caps keys first .. end - 1 of a tile: row i sees keys 0 .. ahead + i of these. What is the same
  // in many tiles stands once.
  void cap_future(Index first, Index end, Index rows, Index ahead) {
    const auto [known, is_new] = futures.try_emplace({end - first, rows, ahead}, Places{});
    if (is_new) {
      known->second = {count(limits), count(spans) / 2};
      for (Index key = 0; key < end - first; ++key) {
        const Index low = std::clamp<Index>(key - ahead, 0, rows);
        limits.insert(limits.end(), low, -INFINITE);
        limits.insert(limits.end(), rows - low, INFINITE);
        add_span(low, rows);
      }
    }
    add_cap(first, end, known->second, 1);
  }

  std::vector<Tensor> tensors(Given like) const {
    const auto ints = like.options().dtype(at::kInt);
    return {copied(tiles, 6, ints), copied(runs, 3, ints), copied(caps, 5, ints),
            copied(spans, 2, ints), copied(limits, 0, like.options()), copied(ranges, 2, ints)};
  }

 private:
  using Places = std::array<Index, 2>;  // of the limits of a cap, and of its spans

  static constexpr Number INFINITE = std::numeric_limits<Number>::infinity();
  std::map<std::array<Index, 3>, Places> futures;

  void add_cap(Index first, Index end, const Places& places, Index step) {
    const Index fields[] = {first, end, places[0], places[1], step};
    for (const Index one : fields) caps.push_back(static_cast<int32_t>(one));
  }

  void add_span(Index low, Index high) {
    spans.push_back(static_cast<int32_t>(low));
    spans.push_back(static_cast<int32_t>(high));
  }

  template <typename Kind>
  static Tensor copied(const std::vector<Kind>& table, Index width, at::TensorOptions options) {
    const Index size = static_cast<Index>(table.size());
    Tensor found = width ? at::empty({size / width, width}, options) : at::empty({size}, options);
    std::copy(table.begin(), table.end(), found.template data_ptr<Kind>());
    return found;
  }
};

// blocks: (batch, choosers, choices, width) int64, negative for none
// choice_of: (batch or 1, rows) int64, which of the choices a row takes; each its own without
// positions: (batch or 1, rows) int64, where the rows stand, each one behind the row before it; a row
// sees nothing behind itself. Without them rows see what is behind them, too
// like: a tensor of the dtype of the limits
template <typename Number>
std::vector<Tensor> plan_of(Given blocks, Maybe choice_of, Maybe positions, Given like, Index rows,
                            Index keys, Index block_size) {
  const Index samples = blocks.size(0), choosers = blocks.size(1), choices = blocks.size(2);
  const Index width = blocks.size(3), key_blocks = (keys + block_size - 1) / block_size;
  const auto of_sample = [rows](Maybe table, Index sample) {
    const Index own = table && table->size(0) > 1 ? sample * rows : 0;
    return table ? table->const_data_ptr<int64_t>() + own : nullptr;
  };
  Tables<Number> found;
  std::vector<uint8_t> seen(ROWS * key_blocks);
  std::vector<Index> counts(key_blocks);  // rows of a tile that see each block
  for (Index sample = 0; sample < samples; ++sample) {
    const int64_t* choice = of_sample(choice_of, sample);
    const int64_t* position = of_sample(positions, sample);
    for (Index chooser = 0; chooser < choosers; ++chooser) {
      const Index own = (sample * choosers + chooser) * choices * width;
      const int64_t* chosen = blocks.const_data_ptr<int64_t>() + own;
      found.ranges.push_back(static_cast<int32_t>(found.count(found.tiles, 6)));
      for (Index first = 0; first < rows; first += ROWS) {
        const Index size = std::min(ROWS, rows - first);
        std::fill(seen.begin(), seen.end(), uint8_t(0));
        std::fill(counts.begin(), counts.end(), Index(0));
        for (Index row = 0; row < size; ++row) {
          const Index which = choice ? choice[first + row] : first + row;
          for (Index i = 0; i < width; ++i)
            if (const Index block = chosen[which * width + i]; block >= 0)
              counts[block] += !std::exchange(seen[block * ROWS + row], uint8_t(1));
        }
        const Index run = found.count(found.runs, 3), cap = found.count(found.caps, 5);
        Index column = 0;
        for (Index block = 0; block < key_blocks; ++block) {
          if (!counts[block]) continue;
          const Index place = block * block_size, end = std::min(block_size, keys - place) + column;
          found.add_runs(place, place + end - column);
          if (counts[block] < size) found.cap_block(column, end, size, seen.data() + block * ROWS);
          if (position && position[first] < place + end - column - 1)
            found.cap_future(column, end, size, position[first] - place);
          column = end;
        }
        const Index fields[] = {first, size, run, found.count(found.runs, 3),
                                cap,   found.count(found.caps, 5)};
        for (const Index one : fields) found.tiles.push_back(static_cast<int32_t>(one));
      }
      found.ranges.push_back(static_cast<int32_t>(found.count(found.tiles, 6)));
    }
  }
  return found.tensors(like);
}

std::vector<Tensor> plan(Given blocks, Maybe choice_of, Maybe positions, Given like, Index rows,
                         Index keys, Index block_size) {
  const auto run = like.scalar_type() == at::kDouble ? plan_of<double> : plan_of<float>;
  return run(blocks, choice_of, positions, like, rows, keys, block_size);
}

}  // namespace
}  // namespace attnzoo

TORCH_LIBRARY_FRAGMENT(attnzoo, library) {
  library.def(
      "native_plan_of_blocks(Tensor blocks, Tensor? choice_of, Tensor? positions, Tensor like, "
      "int rows, int keys, int block_size) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(attnzoo, CPU, library) {
  library.impl("native_plan_of_blocks", &attnzoo::plan);
}
