// Softmax attention of float32 tensors on a CPU, tile by tile: some rows of one head with the keys
// that they see. Scores are laid out as (keys, rows), so that the maxima and sums of rows are those
// of vectors, and no tensor of the size of all scores leaves the cache.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "plan.h"

namespace attnzoo {
namespace {

using at::Tensor;

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

Source head_of(const Tensor& x, Index sample, Index head) {
  const float* data = x.const_data_ptr<float>() + sample * x.stride(0) + head * x.stride(1);
  return {data, x.stride(2)};
}

// The sizes of a call, and what its heads share.
struct Sizes {
  Index batch, heads, kv_heads, rows, keys, width, value_width, group;

  Sizes(const Tensor& q, const Tensor& k, const Tensor& v)
      : batch(q.size(0)), heads(q.size(1)), kv_heads(k.size(1)), rows(q.size(2)),
        keys(k.size(2)), width(q.size(3)), value_width(v.size(3)),
        group(kv_heads ? heads / kv_heads : 1) {}

  const float* cap_of(const std::optional<Tensor>& key_cap, Index sample) const {
    if (!key_cap) return nullptr;
    return key_cap->const_data_ptr<float>() + (key_cap->size(0) > 1 ? sample * keys : 0);
  }
};

// scores (keys of the chunk, ROWS) = keys · packed rows where a row sees a key, -inf elsewhere.
void score(const Plan& plan, const Tile& tile, const Chunk& chunk, Index skipped,
           const Source& keys, const float* packed, Index width, const float* key_cap,
           float* scores) {
  const Index lanes = whole(tile.together(skipped));
  for (const Stretch& part : chunk.parts_of()) {
    multiply<false>(keys.at(part.first, 0), {packed + part.lane, ROWS},
                    {scores + part.line * ROWS + part.lane, ROWS}, part.count,
                    part.lane_end - part.lane, width);
    for (Index i = part.line; i < part.line + part.count; ++i) {
      float* line = scores + i * ROWS;
      std::fill(line, line + part.lane, -INFINITE);
      std::fill(line + part.lane_end, line + lanes, -INFINITE);
    }
  }
  plan.limit(tile, chunk, skipped, scores);
  if (!key_cap) return;
  for (const Stretch& part : chunk.parts_of())
    for (Index i = 0; i < part.count; ++i)
      if (key_cap[part.first + i] < 0.f) {
        float* line = scores + (part.line + i) * ROWS;
        std::fill(line, line + lanes, -INFINITE);
      }
}

// out (rows, width) += the transpose of x (keys of the chunk, ROWS) · the chunk's keys or values.
void add_transposed(const Chunk& chunk, const float* x, const Source& keys, float* out, Index rows,
                    Index width) {
  for (const Band& band : chunk.bands_of())
    for (const Stretch& part : chunk.parts_of()) {
      const Index line = std::max(part.line, band.line);
      const Index end = std::min(part.line + part.count, band.line_end);
      if (line >= end) continue;
      multiply<true>({x + line * ROWS + band.lane, 1, ROWS},
                     keys.at(part.first + line - part.line, 0), {out + band.lane * width, width},
                     std::min(band.lane_end, rows) - band.lane, width, end - line);
    }
}

// The largest score of up to ROWS rows so far, and the sum of their exponentials relative to it.
struct Sums {
  alignas(64) float largest[ROWS], total[ROWS], factor[ROWS];

  explicit Sums(const float* sink_logit) {
    std::fill(largest, largest + ROWS, sink_logit ? *sink_logit : -INFINITE);
    std::fill(total, total + ROWS, sink_logit ? 1.f : 0.f);
  }

  // The scores of a band become exponentials, and `factor` by what earlier ones are multiplied.
  void take(const Band& band, float* scores) {
    for (Index j = band.lane; j < band.lane_end; j += LANES) {
      float *line = scores + band.line * ROWS + j, *end = scores + band.line_end * ROWS + j;
      const Vec before = Vec::loadu(largest + j);
      Vec top = before;
      for (const float* x = line; x < end; x += ROWS) top = at::vec::maximum(top, Vec::loadu(x));
      const Vec base = Vec::blendv(top, Vec(0.f), top == Vec(-INFINITE));
      const Vec scaled = (before - base).exp_u20();
      Vec sum(0.f);
      for (float* x = line; x < end; x += ROWS) {
        const Vec weight = (Vec::loadu(x) - base).exp_u20();
        weight.store(x);
        sum = sum + weight;
      }
      at::vec::fmadd(Vec::loadu(total + j), scaled, sum).store(total + j);
      top.store(largest + j);
      scaled.store(factor + j);
    }
  }

  // `total` becomes its inverse, 0 for a row that sees nothing, and `largest` the logarithm of the
  // sum. exp_u20 takes NaN and inf for large numbers, hence both are told from `largest`.
  void finish() {
    for (Index j = 0; j < ROWS; j += LANES) {
      const Vec top = Vec::loadu(largest + j), sum = Vec::loadu(total + j);
      const Vec none = sum == Vec(0.f), wrong = (top != top) | (top == Vec(INFINITE));
      const Vec lost(NOT_A_NUMBER);
      Vec::blendv(Vec::blendv(Vec(1.f) / sum, Vec(0.f), none), lost, wrong).store(total + j);
      Vec::blendv(Vec::blendv(top + sum.log(), Vec(0.f), none), lost, wrong).store(largest + j);
    }
  }
};

void scale_rows(float* rows, Index first, Index end, Index width, const float* factors) {
  for (Index i = first; i < end; ++i) {
    if (factors[i] == 1.f) continue;
    for (Index j = 0; j < width; ++j) rows[i * width + j] *= factors[i];
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const std::optional<Tensor>& key_cap,
                                   const std::optional<Tensor>& sink_logits, const Tensor& tiles,
                                   const Tensor& runs, const Tensor& caps, const Tensor& spans,
                                   const Tensor& limits, const Tensor& starts, double scale) {
  const Sizes size(q, k, v);
  const Plan plan(tiles, runs, caps, spans, limits, starts);
  const Index width = size.width, value_width = size.value_width;
  Tensor out = at::empty({size.batch, size.heads, size.rows, value_width}, q.options());
  Tensor log_sums = at::empty({size.batch, size.heads, size.rows}, q.options());
  float *outs = out.data_ptr<float>(), *logs = log_sums.data_ptr<float>();
  std::vector<std::pair<Index, Index>> work;  // heads of the batch and their tiles
  for (Index head = 0; head < size.batch * size.heads; ++head)
    for (Index tile = plan.first_tile(head); tile < plan.end_tile(head); ++tile)
      work.emplace_back(head, tile);
  at::parallel_for(0, static_cast<Index>(work.size()), 1, [&](Index begin, Index end) {
    std::vector<float> memory((width + KEYS + value_width) * ROWS);
    float *packed = memory.data(), *scores = packed + width * ROWS, *sum = scores + KEYS * ROWS;
    for (Index one = begin; one < end; ++one) {
      const Index head = work[one].first, sample = head / size.heads, h = head % size.heads;
      const Tile tile = plan.tile(work[one].second);
      const Source keys = head_of(k, sample, h / size.group);
      const Source values = head_of(v, sample, h / size.group);
      const float* cap = size.cap_of(key_cap, sample);
      const float* logit = sink_logits ? sink_logits->const_data_ptr<float>() + h : nullptr;
      for (Index skipped = 0; skipped < tile.rows; skipped += ROWS) {
        const Index rows = std::min(ROWS, tile.rows - skipped), first = tile.first + skipped;
        transpose(head_of(q, sample, h).at(first, 0), rows, width, scale, packed);
        std::fill(sum, sum + rows * value_width, 0.f);
        Sums sums(logit);
        plan.each_chunk(tile, skipped, [&](const Chunk& chunk) {
          score(plan, tile, chunk, skipped, keys, packed, width, cap, scores);
          for (const Band& band : chunk.bands_of()) {
            sums.take(band, scores);
            const Index end = std::min(band.lane_end, rows);
            if (chunk.column) scale_rows(sum, band.lane, end, value_width, sums.factor);
          }
          add_transposed(chunk, scores, values, sum, rows, value_width);
        });
        sums.finish();
        scale_rows(sum, 0, rows, value_width, sums.total);
        const Index place = head * size.rows + first;
        std::copy(sum, sum + rows * value_width, outs + place * value_width);
        std::copy(sums.largest, sums.largest + rows, logs + place);
      }
    }
  });
  return {out, log_sums};
}

// The gradients of q, k and v. Weights are computed again from the logarithms of their sums.
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& sent, const Tensor& out, const Tensor& log_sums, const Tensor& q,
    const Tensor& k, const Tensor& v, const std::optional<Tensor>& key_cap, const Tensor& tiles,
    const Tensor& runs, const Tensor& caps, const Tensor& spans, const Tensor& limits,
    const Tensor& starts, double scale) {
  const Sizes size(q, k, v);
  const Plan plan(tiles, runs, caps, spans, limits, starts);
  const Index width = size.width, value_width = size.value_width;
  Tensor dq = at::empty(q.sizes(), q.options());
  Tensor dk = at::zeros(k.sizes(), k.options()), dv = at::zeros(v.sizes(), v.options());
  float *to_q = dq.data_ptr<float>(), *to_k = dk.data_ptr<float>(), *to_v = dv.data_ptr<float>();
  // One thread has all rows of a head of keys, which therefore needs no lock and no order.
  at::parallel_for(0, size.batch * size.kv_heads, 1, [&](Index begin, Index end) {
    std::vector<float> memory((2 * width + value_width + 2 * KEYS) * ROWS);
    float *packed = memory.data(), *packed_sent = packed + width * ROWS;
    float *weights = packed_sent + value_width * ROWS, *slopes = weights + KEYS * ROWS;
    float* sum = slopes + KEYS * ROWS;
    for (Index own = begin; own < end; ++own) {
      const Index sample = own / size.kv_heads, kv_head = own % size.kv_heads;
      const Source keys = head_of(k, sample, kv_head), values = head_of(v, sample, kv_head);
      const Target to_keys{to_k + own * size.keys * width, width};
      const Target to_values{to_v + own * size.keys * value_width, value_width};
      const float* cap = size.cap_of(key_cap, sample);
      const auto go_through = [&](Index head, const Tile& tile, Index skipped) {
        const Index rows = std::min(ROWS, tile.rows - skipped), first = tile.first + skipped;
        const Index place = head * size.rows + first;
        const Source queries = head_of(q, sample, head % size.heads).at(first, 0);
        const Source gradient{sent.const_data_ptr<float>() + place * value_width, value_width};
        const float* results = out.const_data_ptr<float>() + place * value_width;
        alignas(64) float log_sum[ROWS] = {}, mean[ROWS] = {};
        std::copy_n(log_sums.const_data_ptr<float>() + place, rows, log_sum);
        for (Index i = 0; i < rows; ++i)
          mean[i] = dot(gradient.at(i, 0).data, results + i * value_width, value_width);
        transpose(queries, rows, width, scale, packed);
        transpose(gradient, rows, value_width, 1.f, packed_sent);
        std::fill(sum, sum + rows * width, 0.f);
        plan.each_chunk(tile, skipped, [&](const Chunk& chunk) {
          score(plan, tile, chunk, skipped, keys, packed, width, cap, weights);
          for (const Stretch& part : chunk.parts_of())
            multiply<false>(values.at(part.first, 0), {packed_sent + part.lane, ROWS},
                            {slopes + part.line * ROWS + part.lane, ROWS}, part.count,
                            part.lane_end - part.lane, value_width);
          for (const Stretch& part : chunk.parts_of())
            for (Index j = part.lane; j < part.lane_end; j += LANES) {
              const Vec log_of = Vec::loadu(log_sum + j), mean_of = Vec::loadu(mean + j);
              const Vec lost = log_of - log_of;  // 0, or NaN, which exp_u20 would lose
              for (Index i = part.line * ROWS + j; i < (part.line + part.count) * ROWS; i += ROWS) {
                const Vec weight = (Vec::loadu(weights + i) - log_of).exp_u20() + lost;
                weight.store(weights + i);
                (weight * (Vec::loadu(slopes + i) - mean_of) * Vec(scale)).store(slopes + i);
              }
            }
          for (const Stretch& part : chunk.parts_of()) {
            const Index place = part.line * ROWS + part.lane;
            const Index depth = std::min(part.lane_end, rows) - part.lane;
            multiply<true>({weights + place, ROWS}, gradient.at(part.lane, 0),
                           to_values.at(part.first, 0), part.count, value_width, depth);
            multiply<true>({slopes + place, ROWS}, queries.at(part.lane, 0),
                           to_keys.at(part.first, 0), part.count, width, depth);
          }
          add_transposed(chunk, slopes, keys, sum, rows, width);
        });
        std::copy(sum, sum + rows * width, to_q + place * width);
      };
      for (Index h = kv_head * size.group; h < (kv_head + 1) * size.group; ++h) {
        const Index head = sample * size.heads + h;
        for (Index number = plan.first_tile(head); number < plan.end_tile(head); ++number) {
          const Tile tile = plan.tile(number);
          for (Index skipped = 0; skipped < tile.rows; skipped += ROWS)
            go_through(head, tile, skipped);
        }
      }
    }
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace attnzoo

TORCH_LIBRARY(attnzoo, library) {
  library.def(
      "native_attention(Tensor q, Tensor k, Tensor v, Tensor? key_cap, Tensor? sink_logits, "
      "Tensor tiles, Tensor runs, Tensor caps, Tensor spans, Tensor limits, Tensor starts, "
      "float scale) -> "
      "(Tensor, Tensor)");
  library.def(
      "native_attention_backward(Tensor sent, Tensor out, Tensor log_sums, Tensor q, Tensor k, "
      "Tensor v, Tensor? key_cap, Tensor tiles, Tensor runs, Tensor caps, Tensor spans, "
      "Tensor limits, Tensor starts, float scale) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(attnzoo, CPU, library) {
  library.impl("native_attention", &attnzoo::forward);
  library.impl("native_attention_backward", &attnzoo::backward);
}
