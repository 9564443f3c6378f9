// One chunk of a head's tokens: what they read and write, and what the chunk makes of the state.
//
// A token reads the state by its queries, one for each head of its group. It writes its value under
// its key; by the delta rule, less what the state says of the key, times beta. Where it removes, it
// writes, under `turned`, the negative of what the state says of `removed`. So at most one of two
// writers is solved for: its writes u depend on earlier ones, u = beta (values + erasing rows of the
// state + erasing products · u), where the erasing rows are the negative keys.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <limits>
#include <optional>

#include "linear/native/chunk_gates.h"

namespace attnzoo {

constexpr double NORM_EPSILON = 1e-6;

// What a call asks for, of tensors (batch, heads or kv_heads, length, ...), and its sizes.
struct Recurrence {
  const at::Tensor &q, &k, &v;
  const std::optional<at::Tensor>&log_decay, &beta, &removed, &turned, &key_mask;
  bool delta, l2_norm, normalizes, elu;
  double scale;
  Index batch = q.size(0), kv_heads = k.size(1), length = q.size(2), width = k.size(3);
  Index value_dim = v.size(3), columns = value_dim + normalizes;  // the last one: of ones
  Index group = kv_heads ? q.size(1) / kv_heads : 1;
  bool erases = delta || removed.has_value();

  // Which tokens of a sample are real, from `first` on; nullptr where all are. Of others neither key
  // nor value is read: they are 0.
  const bool* real(Index sample, Index first) const {
    return key_mask ? key_mask->const_data_ptr<bool>() + sample * length + first : nullptr;
  }
};

template <typename Number>
Source<Number> rows_of(const at::Tensor& x, Index sample, Index head, Index first) {
  return {x.const_data_ptr<Number>() + sample * x.stride(0) + head * x.stride(1) +
              first * x.stride(2),
          x.stride(2)};
}

// A row of queries or keys as the call reads it: its features elu + 1, exp(min(x, 0)) + max(x, 0),
// which keeps the digits of small values; else brought to length 1 where that is asked for, and
// times a factor. Returns what it was multiplied by.
template <typename Number>
Number read_row(const Recurrence& call, const Number* row, double factor, Number* out) {
  if (call.elu) {
    each_vector<Number>(call.width, [&](Index c, Index lanes) {
      const Vec<Number> one = Vec<Number>::loadu(row + c, lanes), zero(0);
      (at::vec::minimum(one, zero).exp() + at::vec::maximum(one, zero))
          .store(out + c, static_cast<int>(lanes));
    });
    return static_cast<Number>(factor);
  }
  Number scaled_by = factor;
  if (call.l2_norm) scaled_by /= std::sqrt(dot(row, row, call.width) + Number(NORM_EPSILON));
  scale(row, scaled_by, call.width, out);
  return scaled_by;
}

// out (rows, columns) += seen (rows, TOKENS) · writes (rows, columns). A write that is no finite
// number must not reach earlier rows, whose factor for it is 0.
template <typename Number>
void add_seen(const Number* seen, const Number* writes, Index rows, Index columns, Number* out) {
  Vec<Number> wrong(0);
  for (Index i = 0; i < rows * columns; i += LANES<Number>)
    wrong = at::vec::fmadd(Vec<Number>::loadu(writes + i), Vec<Number>(0), wrong);
  if (wrong.zero_mask() == (1 << LANES<Number>) - 1) {
    multiply<true, Number>({seen, TOKENS}, {writes, columns}, {out, columns}, rows, columns, rows);
    return;
  }
  for (Index i = 0; i < rows; ++i)
    multiply<true, Number>({seen + i * TOKENS, TOKENS}, {writes, columns},
                           {out + i * columns, columns}, 1, columns, i + 1);
}

template <typename Number, typename Gates>
class Chunk {
 public:
  Chunk(const Recurrence& call, Memory<Number>& memory)
      : call(call), group(call.group), width(whole<Number>(call.width)),
        columns(whole<Number>(call.columns)), gates(width, memory) {
    const Index readers_count = group + call.erases, writers_count = call.removed ? 2 : 1;
    const auto rows_of_width = [&] { return memory.take(TOKENS * width); };
    for (Index r = 0; r < readers_count; ++r)
      readers.push_back({rows_of_width(), rows_of_width(), rows_of_width(),
                         r < group || !call.removed.has_value()});
    for (Index w = 0; w < writers_count; ++w) {
      writers.push_back({rows_of_width(), rows_of_width(), rows_of_width(), rows_of_width()});
      products.push_back(memory.take(readers_count * TOKENS * TOKENS));
    }
    q_factors = memory.take(group * TOKENS);
    k_factors = memory.take(TOKENS);
    beta = memory.take(TOKENS);
  }

  // Reads the tokens from `first` on.
  void read(Index sample, Index head, Index first_token) {
    first = first_token;
    rows = std::min(TOKENS, call.length - first);
    real = call.real(sample, first);
    for (Index r = 0; r < group; ++r) {
      const auto queries = rows_of<Number>(call.q, sample, head * group + r, first);
      copy(queries, readers[r].rows, call.scale, q_factors + r * TOKENS);
    }
    copy(rows_of<Number>(call.k, sample, head, first), writers[0].rows, 1, k_factors, real);
    if (call.removed) {
      copy_plainly(rows_of<Number>(*call.turned, sample, head, first), 1, writers[1].rows);
      copy_plainly(rows_of<Number>(*call.removed, sample, head, first), -1, readers[group].rows);
    } else if (call.delta) {
      scale(writers[0].rows, Number(-1), rows * width, readers[group].rows);
    }
    std::fill(beta, beta + TOKENS, Number(1));
    for (Index i = 0; call.beta && i < rows; ++i)
      beta[i] = *rows_of<Number>(*call.beta, sample, head, first + i).data;
    const at::Tensor* decay = call.log_decay ? &*call.log_decay : nullptr;
    gates.read(decay ? rows_of<Number>(*decay, sample, head, first).data : nullptr,
               decay ? decay->stride(2) : 0, rows, call.width);
    for (const auto& reader : readers) gates.carry(reader);
    for (size_t w = 0; w < writers.size(); ++w) {
      transpose<Number>({writers[w].rows, width}, rows, width, 1, writers[w].columns, TOKENS);
      gates.multiply_rows(readers, writers[w], products[w]);
      for (size_t r = 0; r < readers.size(); ++r) hide_later(r, seen(r, w));
    }
  }

  // The values of the tokens, (TOKENS, columns).
  void read_values(Index sample, Index head, Number* out) const {
    const auto values = rows_of<Number>(call.v, sample, head, first);
    for (Index i = 0; i < rows; ++i) {
      std::fill_n(out + i * columns, columns, Number(0));
      if (!is_real(i)) continue;
      std::copy_n(values.at(i, 0).data, call.value_dim, out + i * columns);
      if (call.normalizes) out[i * columns + call.value_dim] = 1;
    }
  }

  bool is_real(Index i) const { return !real || real[i]; }

  // Solves for the writes of the last writer. writes: of each writer, (TOKENS, columns), which
  // hold the values, of a second one 0. unscaled: what they are before they are multiplied by beta.
  void solve(const Number* state, const std::vector<Number*>& writes, Number* unscaled) const {
    const size_t last = writers.size() - 1;
    const Reader<Number>& erasing = readers[group];
    multiply<true, Number>({erasing.carried, width}, {state, columns}, {writes[last], columns},
                           rows, columns, call.width);
    for (size_t w = 0; w < last; ++w)
      add_seen(seen(group, w), writes[w], rows, columns, writes[last]);
    for (Index i = 0; i < rows; ++i) {
      Number* own = writes[last] + i * columns;
      multiply<true, Number>({seen(group, last) + i * TOKENS, TOKENS}, {writes[last], columns},
                             {own, columns}, 1, columns, i);
      std::copy_n(own, columns, unscaled + i * columns);
      if (beta[i] != 1) scale(own, beta[i], columns, own);
    }
  }

  // out (TOKENS, columns): the rows of a query.
  void read_out(size_t r, const Number* state, const std::vector<Number*>& writes,
                Number* out) const {
    multiply<false, Number>({readers[r].carried, width}, {state, columns}, {out, columns}, rows,
                            columns, call.width);
    for (size_t w = 0; w < writers.size(); ++w) add_seen(seen(r, w), writes[w], rows, columns, out);
  }

  // The state behind the chunk, in the place of the one before.
  void write(Number* state, const std::vector<Number*>& writes) const {
    gates.keep(state, columns);
    for (size_t w = 0; w < writers.size(); ++w)
      multiply<true, Number>({writers[w].handed_on, TOKENS}, {writes[w], columns},
                             {state, columns}, call.width, columns, rows);
  }

  Number* seen(size_t r, size_t w) const { return products[w] + r * TOKENS * TOKENS; }

  // Products (tokens, TOKENS) of a reader: 0 for keys that it does not see.
  void hide_later(size_t r, Number* found) const {
    const bool with_own = static_cast<Index>(r) < group;
    for (Index j = 0; j < TOKENS; j += LANES<Number>) {
      const Vec<Number> token = Vec<Number>::arange(static_cast<Number>(j), 1);
      for (Index i = 0; i < rows; ++i) {
        const Vec<Number> end(static_cast<Number>(with_own ? i + 1 : i));
        Number* line = found + i * TOKENS + j;
        Vec<Number>::blendv(Vec<Number>(0), Vec<Number>::loadu(line), token < end).store(line);
      }
    }
  }

  const Recurrence& call;
  const Index group, width, columns;  // the last two filled up to whole vectors
  Index first = 0, rows = 0;
  const bool* real = nullptr;  // of the chunk's tokens, as `Recurrence::real`
  Gates gates;
  Readers<Number> readers;  // the queries of a group, then what erases
  std::vector<Writer<Number>> writers;
  std::vector<Number*> products;  // of each writer: (readers, TOKENS, TOKENS)
  Number *q_factors, *k_factors, *beta;

 private:
  void copy_plainly(const Source<Number>& from, Number factor, Number* out) const {
    for (Index i = 0; i < rows; ++i)
      scale(from.at(i, 0).data, factor, call.width, out + i * width);
  }

  // shown: which rows there are; nullptr: all. Others become 0.
  void copy(const Source<Number>& from, Number* out, double factor, Number* factors,
            const bool* shown = nullptr) const {
    for (Index i = 0; i < rows; ++i)
      if (!shown || shown[i])
        factors[i] = read_row(call, from.at(i, 0).data, factor, out + i * width);
      else
        std::fill_n(out + i * width, width, Number(0));
  }
};

}  // namespace attnzoo
