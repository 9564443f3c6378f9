// Which rows meet which keys: tiles of rows, runs of keys, and caps on their scores.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <utility>

#include "native/products.h"

namespace attnzoo {

constexpr Index KEYS = 64;   // keys that a tile meets at a time
constexpr Index GROUP = 16;  // keys of which it is known together which rows see any of them

// Some rows of one head, the runs of keys that they see in order, and the caps on some of them.
struct Tile {
  Index first, rows, run, run_end, cap, cap_end;

  // The rows from `skipped` on that are computed together, each of which stands in a lane.
  Index together(Index skipped) const { return std::min(ROWS, rows - skipped); }
};

// Keys first .. first + count - 1 of a chunk, whose scores stand from line `line` on, and the lanes
// outside of which no row sees any of them.
struct Stretch {
  Index first, count, line, lane, lane_end;
};

// At most KEYS keys of a tile, of which the first is key `column`, against some of its rows.
struct Chunk {
  Stretch stretches[KEYS];
  Index parts, count, column;

  const Stretch* begin() const { return stretches; }
  const Stretch* end() const { return stretches + parts; }
};

// The plan that `tile_plan.py` makes, in its tensors.
template <typename Number>
struct Plan {
  const int32_t* tiles;   // (tiles, 6): the numbers of a Tile
  const int32_t* runs;    // (runs, 3): first key, number of keys, and a number that runs share
                          // which may be computed together
  const int32_t* caps;    // (caps, 5): first and end among the tile's keys, places below, and 1
                          // where each key has its own of both, 0 where all keys share one
  const int32_t* spans;   // of each key or cap, the first row that sees it and the end of those
  const Number* limits;   // the largest scores, of each cap (its keys or 1, rows of the tile)
  const int32_t* ranges;  // (heads, 2): the first tile of each head, and the end of its tiles
  Index heads;            // 1 where all heads share their tiles, or the heads of one or all samples

  explicit Plan(at::TensorList tensors)
      : tiles(tensors[0].const_data_ptr<int32_t>()),
        runs(tensors[1].const_data_ptr<int32_t>()),
        caps(tensors[2].const_data_ptr<int32_t>()),
        spans(tensors[3].const_data_ptr<int32_t>()),
        limits(tensors[4].const_data_ptr<Number>()),
        ranges(tensors[5].const_data_ptr<int32_t>()),
        heads(tensors[5].size(0)) {}

  Index first_tile(Index head) const { return ranges[2 * (head % heads)]; }
  Index end_tile(Index head) const { return ranges[2 * (head % heads) + 1]; }

  Tile tile(Index number) const {
    const int32_t* x = tiles + 6 * number;
    return {x[0], x[1], x[2], x[3], x[4], x[5]};
  }

  // Calls visit(chunk) for the keys of a tile in order, against its rows from `skipped` on.
  // real: whether each key of the sample is one that rows may see; nullptr where all are. Others
  // are in no chunk, so that nothing reads them
  template <typename Visit>
  void each_chunk(const Tile& tile, Index skipped, const bool* real, const Visit& visit) const {
    Chunk chunk;
    chunk.parts = chunk.count = chunk.column = 0;
    const auto finish = [&] {
      if (real) leave_out(real, chunk);
      narrow(tile, skipped, chunk);
      if (chunk.parts) visit(chunk);
      chunk.column += chunk.count;
      chunk.parts = chunk.count = 0;
    };
    for (Index run = tile.run; run < tile.run_end; ++run) {
      if (chunk.count && runs[3 * run + 2] != runs[3 * run - 1]) finish();
      for (Index first = runs[3 * run], end = first + runs[3 * run + 1]; first < end;) {
        const Index count = std::min({end - first, KEYS - chunk.count, GROUP});
        chunk.stretches[chunk.parts++] = {first, count, chunk.count, 0, 0};
        chunk.count += count;
        first += count;
        if (chunk.count == KEYS) finish();
      }
    }
    if (chunk.count) finish();
  }

  // Calls visit(key of the cap, key of the chunk, the cap) for the capped keys of a chunk.
  template <typename Visit>
  void each_capped(const Tile& tile, const Chunk& chunk, const Visit& visit) const {
    for (Index number = tile.cap; number < tile.cap_end; ++number) {
      const int32_t* cap = caps + 5 * number;
      const Index first = std::max<Index>(cap[0], chunk.column);
      const Index end = std::min<Index>(cap[1], chunk.column + chunk.count);
      for (Index key = first; key < end; ++key)
        visit(key - cap[0], key - chunk.column, cap);
    }
  }

  // Cuts the stretches of a chunk at keys that are not real.
  static void leave_out(const bool* real, Chunk& chunk) {
    Stretch whole[KEYS];
    std::copy(chunk.begin(), chunk.end(), whole);
    const Index count = std::exchange(chunk.parts, 0);
    for (const Stretch* part = whole; part < whole + count; ++part)
      for (Index i = 0; i < part->count; ++i) {
        if (!real[part->first + i]) continue;
        const bool begins = i == 0 || !real[part->first + i - 1];
        if (begins) chunk.stretches[chunk.parts++] = {part->first + i, 0, part->line + i, 0, 0};
        ++chunk.stretches[chunk.parts - 1].count;
      }
  }

  // Finds the lanes of the stretches of a chunk, leaves out those that no row sees, and joins what
  // lies together.
  void narrow(const Tile& tile, Index skipped, Chunk& chunk) const {
    Index low[KEYS] = {}, high[KEYS], parts = 0;
    std::fill_n(high, chunk.count, tile.together(skipped));
    each_capped(tile, chunk, [&](Index own, Index key, const int32_t* cap) {
      const int32_t* span = spans + 2 * (cap[3] + cap[4] * own);
      low[key] = std::max<Index>(low[key], span[0] - skipped);
      high[key] = std::min<Index>(high[key], span[1] - skipped);
    });
    for (const Stretch part : chunk) {
      Index lane = ROWS, end = 0;
      for (Index key = part.line; key < part.line + part.count; ++key)
        if (low[key] < high[key]) {
          lane = std::min(lane, low[key] / LANES<Number> * LANES<Number>);
          end = std::max(end, whole<Number>(high[key]));
        }
      if (lane >= end) continue;
      Stretch& last = chunk.stretches[parts ? parts - 1 : 0];
      const bool joined = parts && last.line + last.count == part.line && last.lane == lane &&
                          last.lane_end == end && last.first + last.count == part.first;
      if (joined)
        last.count += part.count;
      else
        chunk.stretches[parts++] = {part.first, part.count, part.line, lane, end};
    }
    chunk.parts = parts;
  }

  // Lowers scores (keys of the chunk, ROWS) to the caps of rows skipped.. of the tile.
  void limit(const Tile& tile, const Chunk& chunk, Index skipped, Number* scores) const {
    const Index rows = tile.together(skipped);
    each_capped(tile, chunk, [&](Index own, Index key, const int32_t* cap) {
      const Number* most = limits + cap[2] + cap[4] * own * tile.rows + skipped;
      Number* line = scores + key * ROWS;
      Index i = 0;
      for (; i + LANES<Number> <= rows; i += LANES<Number>)
        at::vec::minimum(Vec<Number>::loadu(line + i), Vec<Number>::loadu(most + i))
            .store(line + i);
      for (; i < rows; ++i) line[i] = std::min(line[i], most[i]);
    });
  }
};

}  // namespace attnzoo
