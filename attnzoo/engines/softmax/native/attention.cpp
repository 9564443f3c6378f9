// Softmax attention on a CPU, tile by tile: some rows of one head with the keys that they see. No
// tensor of the size of all scores leaves the cache.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <utility>
#include <vector>

#include "scores.h"

namespace attnzoo {
namespace {

using at::Tensor;
using Given = const Tensor&;
using Maybe = const std::optional<Tensor>&;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// The sizes of a call.
struct Sizes {
  Index batch, heads, kv_heads, rows, keys, width, value_width, group;

  Sizes(Given q, Given k, Given v)
      : batch(q.size(0)), heads(q.size(1)), kv_heads(k.size(1)), rows(q.size(2)),
        keys(k.size(2)), width(q.size(3)), value_width(v.size(3)),
        group(kv_heads ? heads / kv_heads : 1) {}

  // Which keys of a sample rows may see; nullptr where they may see all.
  const bool* real_keys(Maybe key_mask, Index sample) const {
    if (!key_mask) return nullptr;
    return key_mask->const_data_ptr<bool>() + (key_mask->size(0) > 1 ? sample * keys : 0);
  }
};

template <typename Number>
std::tuple<Tensor, Tensor> forward_of(Given q, Given k, Given v, Maybe key_mask, Maybe sink_logits,
                                      at::TensorList tensors, double scale) {
  const Sizes size(q, k, v);
  const Plan<Number> plan(tensors);
  const Index width = size.width, value_width = size.value_width;
  Tensor out = at::empty({size.batch, size.heads, size.rows, value_width}, q.options());
  Tensor log_sums = at::empty({size.batch, size.heads, size.rows}, q.options());
  Number *outs = out.data_ptr<Number>(), *logs = log_sums.data_ptr<Number>();
  std::vector<std::pair<Index, Index>> work;  // heads of the batch and their tiles
  for (Index head = 0; head < size.batch * size.heads; ++head)
    for (Index tile = plan.first_tile(head); tile < plan.end_tile(head); ++tile)
      work.emplace_back(head, tile);
  at::parallel_for(0, static_cast<Index>(work.size()), 1, [&](Index begin, Index end) {
    std::vector<Number> memory((width + KEYS + value_width) * ROWS);
    Number *packed = memory.data(), *scores = packed + width * ROWS, *sum = scores + KEYS * ROWS;
    for (Index one = begin; one < end; ++one) {
      const Index head = work[one].first, sample = head / size.heads, h = head % size.heads;
      const Tile tile = plan.tile(work[one].second);
      const auto keys = head_of<Number>(k, sample, h / size.group);
      const auto values = head_of<Number>(v, sample, h / size.group);
      const bool* real = size.real_keys(key_mask, sample);
      const Number* logit = sink_logits ? sink_logits->const_data_ptr<Number>() + h : nullptr;
      for (Index skipped = 0; skipped < tile.rows; skipped += ROWS) {
        const Index rows = tile.together(skipped), first = tile.first + skipped;
        const auto queries = head_of<Number>(q, sample, h).at(first, 0);
        transpose<Number>(queries, rows, width, scale, packed);
        std::fill(sum, sum + rows * value_width, Number(0));
        Sums<Number> sums(logit);
        plan.each_chunk(tile, skipped, real, [&](const Chunk& chunk) {
          score(plan, tile, chunk, skipped, keys, packed, width, scores);
          sums.take(chunk, scores);
          if (chunk.column) scale_rows(sum, rows, value_width, sums.factor);
          add_transposed(chunk, scores, values, sum, rows, value_width);
        });
        sums.finish();
        scale_rows(sum, rows, value_width, sums.total);
        const Index place = head * size.rows + first;
        std::copy(sum, sum + rows * value_width, outs + place * value_width);
        std::copy(sums.largest, sums.largest + rows, logs + place);
      }
    }
  });
  return {out, log_sums};
}

// The gradients of q, k and v. Weights are computed again from the logarithms of their sums.
template <typename Number>
Gradients backward_of(Given sent, Given out, Given log_sums, Given q, Given k, Given v,
                      Maybe key_mask, at::TensorList tensors, double scale) {
  using Lanes = Vec<Number>;
  const Sizes size(q, k, v);
  const Plan<Number> plan(tensors);
  const Index width = size.width, value_width = size.value_width;
  Tensor dq = at::empty(q.sizes(), q.options());
  Tensor dk = at::zeros(k.sizes(), k.options()), dv = at::zeros(v.sizes(), v.options());
  Number *to_q = dq.data_ptr<Number>(), *to_k = dk.data_ptr<Number>();
  Number* to_v = dv.data_ptr<Number>();
  // One thread has all rows of a head of keys: its sums need no lock and have one order.
  at::parallel_for(0, size.batch * size.kv_heads, 1, [&](Index begin, Index end) {
    std::vector<Number> memory((2 * width + value_width + 2 * KEYS) * ROWS);
    Number *packed = memory.data(), *packed_sent = packed + width * ROWS;
    Number *weights = packed_sent + value_width * ROWS, *slopes = weights + KEYS * ROWS;
    Number* sum = slopes + KEYS * ROWS;
    for (Index own = begin; own < end; ++own) {
      const Index sample = own / size.kv_heads, kv_head = own % size.kv_heads;
      const auto keys = head_of<Number>(k, sample, kv_head);
      const auto values = head_of<Number>(v, sample, kv_head);
      const Target<Number> to_keys{to_k + own * size.keys * width, width};
      const Target<Number> to_values{to_v + own * size.keys * value_width, value_width};
      const bool* real = size.real_keys(key_mask, sample);
      const auto go_through = [&](Index head, const Tile& tile, Index skipped) {
        const Index rows = tile.together(skipped), first = tile.first + skipped;
        const Index place = head * size.rows + first;
        const auto queries = head_of<Number>(q, sample, head % size.heads).at(first, 0);
        const Source<Number> gradient{sent.const_data_ptr<Number>() + place * value_width,
                                      value_width};
        const Number* results = out.const_data_ptr<Number>() + place * value_width;
        alignas(64) Number log_sum[ROWS] = {}, mean[ROWS] = {};
        std::copy_n(log_sums.const_data_ptr<Number>() + place, rows, log_sum);
        for (Index i = 0; i < rows; ++i)
          mean[i] = dot(gradient.at(i, 0).data, results + i * value_width, value_width);
        transpose<Number>(queries, rows, width, scale, packed);
        transpose<Number>(gradient, rows, value_width, 1, packed_sent);
        std::fill(sum, sum + rows * width, Number(0));
        plan.each_chunk(tile, skipped, real, [&](const Chunk& chunk) {
          score(plan, tile, chunk, skipped, keys, packed, width, weights);
          for (const Stretch& part : chunk) {
            const Index place_of = part.line * ROWS, end_of = place_of + part.count * ROWS;
            multiply<false, Number>(values.at(part.first, 0), {packed_sent + part.lane, ROWS},
                                    {slopes + place_of + part.lane, ROWS}, part.count,
                                    part.lane_end - part.lane, value_width);
            for (Index j = part.lane; j < part.lane_end; j += LANES<Number>) {
              const Lanes log_of = Lanes::loadu(log_sum + j), mean_of = Lanes::loadu(mean + j);
              const Lanes lost = log_of - log_of;  // 0, or NaN, which `exponential` would lose
              for (Index i = place_of + j; i < end_of; i += ROWS) {
                const Lanes weight = exponential(Lanes::loadu(weights + i) - log_of) + lost;
                weight.store(weights + i);
                (weight * (Lanes::loadu(slopes + i) - mean_of) * Lanes(scale)).store(slopes + i);
              }
            }
            const Index depth = std::min(part.lane_end, rows) - part.lane;
            multiply<true, Number>({weights + place_of + part.lane, ROWS},
                                   gradient.at(part.lane, 0), to_values.at(part.first, 0),
                                   part.count, value_width, depth);
            multiply<true, Number>({slopes + place_of + part.lane, ROWS},
                                   queries.at(part.lane, 0), to_keys.at(part.first, 0),
                                   part.count, width, depth);
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

std::tuple<Tensor, Tensor> forward(Given q, Given k, Given v, Maybe key_mask, Maybe sink_logits,
                                   at::TensorList plan, double scale) {
  const auto run = q.scalar_type() == at::kDouble ? forward_of<double> : forward_of<float>;
  return run(q, k, v, key_mask, sink_logits, plan, scale);
}

Gradients backward(Given sent, Given out, Given log_sums, Given q, Given k, Given v,
                   Maybe key_mask, at::TensorList plan, double scale) {
  const auto run = q.scalar_type() == at::kDouble ? backward_of<double> : backward_of<float>;
  return run(sent, out, log_sums, q, k, v, key_mask, plan, scale);
}

}  // namespace
}  // namespace attnzoo

TORCH_LIBRARY_FRAGMENT(attnzoo, library) {
  library.def(
      "native_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? sink_logits, "
      "Tensor[] plan, float scale) -> (Tensor, Tensor)");
  library.def(
      "native_attention_backward(Tensor sent, Tensor out, Tensor log_sums, Tensor q, Tensor k, "
      "Tensor v, Tensor? key_mask, Tensor[] plan, float scale) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(attnzoo, CPU, library) {
  library.impl("native_attention", &attnzoo::forward);
  library.impl("native_attention_backward", &attnzoo::backward);
}
