// The plan of `native_attention` for blocks of keys that the data select: which rows meet which keys.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
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

  Index count(const std::vector<int32_t>& table, Index width) const {
    return static_cast<Index>(table.size()) / width;
  }

  // Caps a block whose keys are seen alike, by the rows for which seen(row) holds.
  template <typename Seen>
  void cap_block(Index first, Index end, Index rows, const Seen& seen) {
    add_cap(first, end, 0);
    Index low = rows, high = 0;
    for (Index row = 0; row < rows; ++row) {
      const bool is_seen = seen(row);
      limits.push_back(is_seen ? INFINITE : -INFINITE);
      if (is_seen) low = std::min(low, row), high = row + 1;
    }
    for (Index key = first; key < end; ++key) add_span(low, high);
  }

  // Caps keys that a row sees from its own position on: row i of the tile stands at at(i), which
  // ascends, and key j of the block at place + j.
  template <typename At>
  void cap_future(Index first, Index end, Index rows, Index place, const At& at) {
    add_cap(first, end, 1);
    for (Index key = 0; key < end - first; ++key) {
      Index low = 0;
      while (low < rows && at(low) < place + key) ++low;
      for (Index row = 0; row < rows; ++row) limits.push_back(row < low ? -INFINITE : INFINITE);
      add_span(low, low < rows ? rows : low);
    }
  }

  std::vector<Tensor> tensors(Given like) const {
    const auto ints = like.options().dtype(at::kInt);
    return {copied(tiles, 6, ints), copied(runs, 2, ints), copied(caps, 5, ints),
            copied(spans, 2, ints), copied(limits, 0, like.options()), copied(ranges, 2, ints)};
  }

 private:
  static constexpr Number INFINITE = std::numeric_limits<Number>::infinity();

  void add_cap(Index first, Index end, Index step) {
    const Index places[] = {first, end, static_cast<Index>(limits.size()), count(spans, 2), step};
    for (const Index one : places) caps.push_back(static_cast<int32_t>(one));
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
// positions: (batch or 1, rows) int64, where the rows stand, behind which they see nothing
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
  for (Index sample = 0; sample < samples; ++sample) {
    const int64_t* choice = of_sample(choice_of, sample);
    const int64_t* position = of_sample(positions, sample);
    for (Index chooser = 0; chooser < choosers; ++chooser) {
      const Index own = (sample * choosers + chooser) * choices * width;
      const int64_t* chosen = blocks.const_data_ptr<int64_t>() + own;
      found.ranges.push_back(static_cast<int32_t>(found.count(found.tiles, 6)));
      for (Index first = 0; first < rows; first += ROWS) {
        const Index count = std::min(ROWS, rows - first);
        std::fill(seen.begin(), seen.end(), uint8_t(0));
        for (Index row = 0; row < count; ++row) {
          const Index which = choice ? choice[first + row] : first + row;
          for (Index i = 0; i < width; ++i)
            if (const Index block = chosen[which * width + i]; block >= 0)
              seen[block * ROWS + row] = 1;
        }
        const Index run = found.count(found.runs, 2), cap = found.count(found.caps, 5);
        Index column = 0;
        for (Index block = 0; block < key_blocks; ++block) {
          const uint8_t* of_rows = seen.data() + block * ROWS;
          if (std::none_of(of_rows, of_rows + count, [](uint8_t x) { return x; })) continue;
          const Index place = block * block_size, size = std::min(block_size, keys - place);
          found.runs.push_back(static_cast<int32_t>(place));
          found.runs.push_back(static_cast<int32_t>(size));
          if (!std::all_of(of_rows, of_rows + count, [](uint8_t x) { return x; }))
            found.cap_block(column, column + size, count, [&](Index row) { return of_rows[row]; });
          if (position && position[first] < place + size - 1)
            found.cap_future(column, column + size, count, place,
                             [&](Index row) { return position[first + row]; });
          column += size;
        }
        const Index fields[] = {first, count, run, found.count(found.runs, 2),
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
