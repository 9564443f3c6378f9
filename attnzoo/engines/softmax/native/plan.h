// Which rows meet which keys: tiles of rows, runs of keys, and caps on their scores.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <algorithm>

#include "products.h"

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

// Lanes of a chunk, and the lines outside of which none of their rows sees a key.
struct Band {
  Index lane, lane_end, line, line_end;
};

// At most KEYS keys of a tile, of which the first is key `column`, against some of its rows.
struct Chunk {
  Stretch stretches[KEYS];
  Band bands[ROWS / 8];
  Index parts, count, column, band_count;

  c10::ArrayRef<Stretch> parts_of() const {
    return {stretches, static_cast<size_t>(parts)};
  }
  c10::ArrayRef<Band> bands_of() const { return {bands, static_cast<size_t>(band_count)}; }
};

// The plan that `plan.py` makes, in its tensors.
struct Plan {
  const int32_t* tiles;   // (tiles, 6): the numbers of a Tile
  const int32_t* runs;    // (runs, 2): first key, number of keys
  const int32_t* caps;    // (caps, 4): first and end among the tile's keys, places below
  const int32_t* spans;   // of each cap and key, the first row that sees it and the end of those
  const float* limits;    // the largest scores, of each cap (its keys, rows of the tile)
  const int32_t* starts;  // (heads + 1,): the first tile of each head
  Index heads;            // 1 where all heads share their tiles, or the heads of one or all samples

  Plan(const at::Tensor& tiles, const at::Tensor& runs, const at::Tensor& caps,
       const at::Tensor& spans, const at::Tensor& limits, const at::Tensor& starts)
      : tiles(tiles.const_data_ptr<int32_t>()),
        runs(runs.const_data_ptr<int32_t>()),
        caps(caps.const_data_ptr<int32_t>()),
        spans(spans.const_data_ptr<int32_t>()),
        limits(limits.const_data_ptr<float>()),
        starts(starts.const_data_ptr<int32_t>()),
        heads(starts.size(0) - 1) {}

  Index first_tile(Index head) const { return starts[head % heads]; }
  Index end_tile(Index head) const { return starts[head % heads + 1]; }

  Tile tile(Index number) const {
    const int32_t* x = tiles + 6 * number;
    return {x[0], x[1], x[2], x[3], x[4], x[5]};
  }

  // Calls visit(chunk) for the keys of a tile in order, against its rows from `skipped` on.
  template <typename Visit>
  void each_chunk(const Tile& tile, Index skipped, const Visit& visit) const {
    Chunk chunk, narrow;
    chunk.parts = chunk.count = chunk.column = 0;
    const auto finish = [&] {
      divide(tile, skipped, chunk, narrow);
      if (narrow.parts) visit(narrow);
      chunk.column += chunk.count;
      chunk.parts = chunk.count = 0;
    };
    for (Index run = tile.run; run < tile.run_end; ++run) {
      Index first = runs[2 * run], left = runs[2 * run + 1];
      while (left > 0) {
        const Index count = std::min(left, KEYS - chunk.count);
        chunk.stretches[chunk.parts++] = {first, count, chunk.count, 0, 0};
        chunk.count += count;
        first += count;
        left -= count;
        if (chunk.count == KEYS) finish();
      }
    }
    if (chunk.count) finish();
  }

  // Calls visit(key of the cap, key of the chunk, place of the cap's limits, place of its spans).
  template <typename Visit>
  void each_capped(const Tile& tile, const Chunk& chunk, const Visit& visit) const {
    for (Index number = tile.cap; number < tile.cap_end; ++number) {
      const int32_t* cap = caps + 4 * number;
      const Index first = std::max<Index>(cap[0], chunk.column);
      const Index end = std::min<Index>(cap[1], chunk.column + chunk.count);
      for (Index key = first; key < end; ++key)
        visit(key - cap[0], key - chunk.column, cap[2], cap[3]);
    }
  }

  // The stretches of a chunk cut into those whose keys are seen by the same lanes, and its bands.
  void divide(const Tile& tile, Index skipped, const Chunk& chunk, Chunk& out) const {
    const Index rows = tile.together(skipped), lanes = whole(rows);
    Index low[KEYS], high[KEYS];
    std::fill_n(low, chunk.count, 0);
    std::fill_n(high, chunk.count, rows);
    each_capped(tile, chunk, [&](Index own, Index key, Index, Index place) {
      const int32_t* span = spans + 2 * (place + own);
      low[key] = std::max<Index>(low[key], span[0] - skipped);
      high[key] = std::min<Index>(high[key], span[1] - skipped);
    });
    out.parts = out.band_count = 0;
    out.count = chunk.count;
    out.column = chunk.column;
    for (Index part = 0; part < chunk.parts; ++part) {
      const Stretch& whole_part = chunk.stretches[part];
      for (Index i = 0; i < whole_part.count; i += GROUP) {
        const Index count = std::min(GROUP, whole_part.count - i), line = whole_part.line + i;
        Index lane = ROWS, end = 0;
        for (Index key = line; key < line + count; ++key)
          if (low[key] < high[key]) {
            lane = std::min(lane, low[key] / LANES * LANES);
            end = std::max(end, whole(high[key]));
          }
        if (lane >= end) continue;
        Stretch* last = out.parts && i ? &out.stretches[out.parts - 1] : nullptr;
        if (last && last->line + last->count == line && last->lane == lane && last->lane_end == end)
          last->count += count;
        else
          out.stretches[out.parts++] = {whole_part.first + i, count, line, lane, end};
      }
    }
    for (Index lane = 0; lane < lanes; lane += LANES) {
      Index line = KEYS, end = 0;
      for (Index part = 0; part < out.parts; ++part) {
        const Stretch& own = out.stretches[part];
        if (own.lane > lane || own.lane_end <= lane) continue;
        line = std::min(line, own.line);
        end = std::max(end, own.line + own.count);
      }
      if (line >= end) continue;
      Band* last = out.band_count ? &out.bands[out.band_count - 1] : nullptr;
      if (last && last->lane_end == lane && last->line == line && last->line_end == end)
        last->lane_end += LANES;
      else
        out.bands[out.band_count++] = {lane, lane + LANES, line, end};
    }
  }

  // Lowers scores (keys of the chunk, ROWS) to the caps of rows skipped.. of the tile.
  void limit(const Tile& tile, const Chunk& chunk, Index skipped, float* scores) const {
    const Index rows = tile.together(skipped);
    each_capped(tile, chunk, [&](Index own, Index key, Index place, Index) {
      const float* most = limits + place + own * tile.rows + skipped;
      float* line = scores + key * ROWS;
      Index i = 0;
      for (; i + LANES <= rows; i += LANES)
        at::vec::minimum(Vec::loadu(line + i), Vec::loadu(most + i)).store(line + i);
      for (; i < rows; ++i) line[i] = std::min(line[i], most[i]);
    });
  }
};

}  // namespace attnzoo
