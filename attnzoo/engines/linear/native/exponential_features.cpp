// Features exp(ωx) of one token, of its queries and of its key, relative to the largest exponent:
// what decoding takes of random features whose products estimate softmax's kernel.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "linear/native/one_token.h"

namespace attnzoo {
namespace {

using at::Tensor;
using Given = const Tensor&;
using Maybe = const std::optional<Tensor>&;
using Features = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// ω as rows, (directions, width), and what their products are multiplied by.
template <typename Number>
struct Directions {
  const Number* rows;
  const Index count, width;
  const Number factor;
  const bool is_signed;  // whether exp(-ωx) is a feature, too

  Index features() const { return is_signed ? 2 * count : count; }

  // Writes the features and returns the largest exponent, which is taken out of them.
  Number write(const Number* x, Number* out) const {
    for (Index i = 0; i < count; i += LANES<Number>)
      dot_lines(x, width, std::min(LANES<Number>, count - i), factor,
                [&](Index line) { return rows + (i + line) * width; }, out + i);
    if (is_signed)
      for (Index i = 0; i < count; ++i) out[count + i] = -out[i];
    const auto larger = [](const Vec<Number>& a, const Vec<Number>& b) {
      return at::vec::maximum(a, b);
    };
    const Number largest = at::vec::reduce_all<Number>(larger, out, features());
    const Vec<Number> shift(largest);
    at::vec::map<Number>([&](Vec<Number> s) { return (s - shift).exp(); }, out, out, features());
    return largest;
  }
};

// q (batch, heads, 1, width), k (batch, kv_heads, 1, width). earlier: (batch, kv_heads), the largest
// log_scale of a key so far; none: there was no key. Returns the features of queries, of keys times
// exp(log_scale - largest), what earlier keys fade by, (batch, kv_heads, 1), and the largest
// log_scale, (batch, kv_heads).
template <typename Number>
Features features_of(Given q, Given k, const Directions<Number>& directions, double scale,
                     Maybe earlier) {
  const Index batch = q.size(0), heads = q.size(1), kv_heads = k.size(1);
  const Index width = directions.width, features = directions.features();
  const Number lowest = std::numeric_limits<Number>::lowest();
  Tensor queries = at::empty({batch, heads, 1, features}, q.options());
  Tensor keys = at::empty({batch, kv_heads, 1, features}, q.options());
  Tensor fades = at::empty({batch, kv_heads, 1}, q.options());
  Tensor largest = at::empty({batch, kv_heads}, q.options());
  const Index each = heads + kv_heads, padded = whole<Number>(directions.count);
  const Index together = std::max<Index>(1, WORTH_A_THREAD / (directions.count * width));
  at::parallel_for(0, batch * each, together, [&](Index begin, Index end) {
    std::vector<Number> made(padded + features);
    for (Index one = begin; one < end; ++one) {
      const Index sample = one / each, place = one % each;
      if (place < heads) {
        directions.write(head_of<Number>(q, sample, place).data, made.data());
        std::copy_n(made.data(), features,
                    queries.data_ptr<Number>() + (sample * heads + place) * features);
        continue;
      }
      const Index own = sample * kv_heads + place - heads;
      const Number* key = head_of<Number>(k, sample, place - heads).data;
      Number log_scale = directions.write(key, made.data());
      log_scale -= std::log(Number(features)) / 2 + Number(scale) / 2 * dot(key, key, width);
      const Number before = earlier ? earlier->const_data_ptr<Number>()[own] : log_scale;
      const Number now = before > log_scale ? before : log_scale;  // NaN where the key has one
      const Number finite = now < lowest ? lowest : now, earlier_one = before < lowest ? lowest : before;
      attnzoo::scale(made.data(), std::exp(log_scale - finite), features,
                keys.data_ptr<Number>() + own * features);
      fades.data_ptr<Number>()[own] = std::min(earlier_one - finite, Number(0));
      largest.data_ptr<Number>()[own] = now;
    }
  });
  return {queries, keys, fades, largest};
}

template <typename Number>
Features exponential_features_of(Given q, Given k, Given directions, double scale, bool is_signed,
                                 Maybe earlier) {
  const Directions<Number> own{directions.const_data_ptr<Number>(), directions.size(0),
                               directions.size(1), static_cast<Number>(std::sqrt(scale)), is_signed};
  return features_of<Number>(q, k, own, scale, earlier);
}

Features exponential_features(Given q, Given k, Given directions, double scale, bool is_signed,
                              Maybe earlier) {
  return q.scalar_type() == at::kDouble
             ? exponential_features_of<double>(q, k, directions, scale, is_signed, earlier)
             : exponential_features_of<float>(q, k, directions, scale, is_signed, earlier);
}

}  // namespace
}  // namespace attnzoo

TORCH_LIBRARY_FRAGMENT(attnzoo, library) {
  library.def(
      "native_exponential_features(Tensor q, Tensor k, Tensor directions, float scale, bool "
      "is_signed, Tensor? earlier) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(attnzoo, CPU, library) {
  library.impl("native_exponential_features", &attnzoo::exponential_features);
}
