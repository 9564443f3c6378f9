// Buckets of directions, as decoding keeps them of every key: bucket · 2^32 + 2^32 - 1 - rank, the
// rank among the keys of the bucket, of each hash round; and the keys that one query sees by them.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "native/products.h"

namespace attnzoo {
namespace {

using at::Tensor;
using Given = const Tensor&;
using Maybe = const std::optional<Tensor>&;

constexpr int64_t BUCKET = int64_t(1) << 32;

// Rotations of vectors, (rounds, width, directions) in double: half as many directions as buckets,
// for each factor one after the other.
struct Hashing {
  const Tensor rotations;
  at::IntArrayRef factors;
  const Index rounds = rotations.size(0), width = rotations.size(1), directions = rotations.size(2);

  // The first code of a vector's bucket in one round.
  template <typename Number>
  int64_t first_code(const Number* x, Index round, std::vector<double>& projected) const {
    const double* line = rotations.const_data_ptr<double>() + round * width * directions;
    projected.assign(directions, 0.0);
    for (Index c = 0; c < width; ++c, line += directions)
      for (Index d = 0; d < directions; ++d) projected[d] += static_cast<double>(x[c]) * line[d];
    int64_t bucket = 0;
    const double* some = projected.data();
    for (const int64_t factor : factors) {
      if (factor < 2) continue;
      const Index half = factor / 2;
      bucket = bucket * factor + farthest(some, half);
      some += half;
    }
    return bucket * BUCKET;
  }

  // Which of some numbers and their opposites is the largest; of equal ones the first.
  static Index farthest(const double* x, Index count) {
    Index best = 0;
    const auto number = [&](Index i) { return i < count ? x[i] : -x[i - count]; };
    for (Index i = 1; i < 2 * count; ++i)
      if (number(i) > number(best)) best = i;
    return best;
  }
};

// The rank of the last key of a bucket; -1 where it has none.
int64_t last_rank(const int64_t* codes, Index keys, int64_t first) {
  int64_t least = BUCKET;
  for (Index key = 0; key < keys; ++key) least = std::min(least, codes[key] ^ first);
  return BUCKET - 1 - least;
}

const int64_t* codes_of(Given codes, Index sample, Index line) {
  return codes.const_data_ptr<int64_t>() + sample * codes.stride(0) + line * codes.stride(1);
}

template <typename Number>
Tensor codes_of_one(Given k, const Hashing& hashing, Maybe before) {
  const Index batch = k.size(0), heads = k.size(1), rounds = hashing.rounds;
  Tensor out = at::empty({batch, heads * rounds, 1}, k.options().dtype(at::kLong));
  int64_t* code = out.data_ptr<int64_t>();
  std::vector<double> projected;
  for (Index sample = 0; sample < batch; ++sample)
    for (Index line = 0; line < heads * rounds; ++line) {
      const Number* key = head_of<Number>(k, sample, line / rounds).data;
      const int64_t first = hashing.first_code(key, line % rounds, projected);
      const int64_t rank =
          before ? last_rank(codes_of(*before, sample, line), before->size(2), first) + 1 : 0;
      *code++ = first + (BUCKET - 1 - rank);
    }
  return out;
}

// Shows the keys of a query's own chunk, in which the last key of its bucket stands, and of the one
// before it.
void show(const int64_t* codes, Index keys, int64_t first, Index size, bool* shown) {
  const int64_t last = last_rank(codes, keys, first);
  if (last < 0) return;
  const int64_t most = BUCKET - 1 - std::max<int64_t>(last / size - 1, 0) * size;
  for (Index key = 0; key < keys; ++key) shown[key] |= (codes[key] ^ first) <= most;
}

template <typename Number>
Tensor keys_of_one(Given q, Given codes, const Hashing& hashing, Index size, bool shared) {
  const Index batch = q.size(0), heads = q.size(1), rounds = hashing.rounds, keys = codes.size(2);
  const Index group = heads * rounds / codes.size(1);
  Tensor out = at::zeros({batch, heads, keys}, q.options().dtype(at::kBool));
  std::vector<double> projected;
  for (Index one = 0; one < batch * heads; ++one) {
    const Index sample = one / heads, head = one % heads;
    const Number* query = head_of<Number>(q, sample, head).data;
    bool* shown = out.data_ptr<bool>() + one * keys;
    for (Index round = 0; round < rounds; ++round)
      show(codes_of(codes, sample, head / group * rounds + round), keys,
           hashing.first_code(query, round, projected), size, shown);
    bool& own = shown[keys - 1];
    if (shared) {  // the query's own key is seen where nothing else is
      own = false;
      own = std::none_of(shown, shown + keys, [](bool one) { return one; });
    } else {
      own = true;
    }
  }
  return out;
}

#define OF_NUMBERS(x, run, ...) \
  (x.scalar_type() == at::kDouble ? run<double>(__VA_ARGS__) : run<float>(__VA_ARGS__))

Tensor bucket_codes(Given k, Given rotations, at::IntArrayRef factors, Maybe before) {
  const Hashing hashing{rotations.to(at::kDouble).contiguous(), factors};
  return OF_NUMBERS(k, codes_of_one, k, hashing, before);
}

Tensor bucket_keys(Given q, Given codes, Given rotations, at::IntArrayRef factors, Index size,
                   bool shared) {
  const Hashing hashing{rotations.to(at::kDouble).contiguous(), factors};
  return OF_NUMBERS(q, keys_of_one, q, codes, hashing, size, shared);
}

}  // namespace
}  // namespace attnzoo

TORCH_LIBRARY_FRAGMENT(attnzoo, library) {
  library.def(
      "native_bucket_codes(Tensor k, Tensor rotations, int[] factors, Tensor? before) -> Tensor");
  library.def(
      "native_bucket_keys(Tensor q, Tensor codes, Tensor rotations, int[] factors, int chunk_size, "
      "bool shared) -> Tensor");
}

TORCH_LIBRARY_IMPL(attnzoo, CPU, library) {
  library.impl("native_bucket_codes", &attnzoo::bucket_codes);
  library.impl("native_bucket_keys", &attnzoo::bucket_keys);
}
