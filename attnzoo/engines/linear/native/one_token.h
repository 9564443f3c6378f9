// A pass over one token, as decoding takes it: the state is read twice and written once.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "linear/native/chunk.h"

namespace attnzoo {

constexpr Index WORTH_A_THREAD = 1 << 16;  // numbers of states that one thread is not spared

// One head of keys, its queries and its state.
template <typename Number>
class OneToken {
 public:
  OneToken(const Recurrence& call)
      : call(call), kept(call.width), key(call.width), value(call.columns), said(call.columns),
        queries(call.group * call.width), rows(call.group * call.columns) {}

  // before: null for a state of zeros. out: (group, value_dim). divisors: (group)
  void run(Index sample, Index head, const Number* before, Number* after, double underflow,
           Number* out, Number* divisors) {
    read(sample, head);
    std::fill(said.begin(), said.end(), Number(0));
    if (call.erases && before) find_said(before);
    if (!call.removed && call.delta) erase();
    std::fill(rows.begin(), rows.end(), Number(0));
    for (Index c = 0; c < call.width; ++c)
      write(before ? before + c * call.columns : nullptr, c, after + c * call.columns);
    for (Index r = 0; r < call.group; ++r) write_row(r, underflow, out, divisors);
  }

 private:
  static const Number* data_of(const at::Tensor& x, Index sample, Index head) {
    return x.const_data_ptr<Number>() + sample * x.stride(0) + head * x.stride(1);
  }

  void read(Index sample, Index head) {
    const bool* real = call.real(sample, 0);
    std::fill(key.begin(), key.end(), Number(0));
    std::fill(value.begin(), value.end(), Number(0));
    if (!real || *real) {
      read_row(call, data_of(call.k, sample, head), 1, key.data());
      std::copy_n(data_of(call.v, sample, head), call.value_dim, value.begin());
      if (call.normalizes) value[call.value_dim] = 1;
    }
    for (Index r = 0; r < call.group; ++r)
      read_row(call, data_of(call.q, sample, head * call.group + r), call.scale,
               queries.data() + r * call.width);
    beta = call.beta ? *data_of(*call.beta, sample, head) : Number(1);
    removed = call.removed ? data_of(*call.removed, sample, head) : nullptr;
    turned = call.removed ? data_of(*call.turned, sample, head) : nullptr;
    if (!call.log_decay) {
      std::fill(kept.begin(), kept.end(), Number(1));
      return;
    }
    const Number* given = data_of(*call.log_decay, sample, head);
    if (call.log_decay->dim() == 3) {
      std::fill(kept.begin(), kept.end(), std::exp(*given));
      return;
    }
    each_vector<Number>(call.width, [&](Index c, Index lanes) {
      Vec<Number>::loadu(given + c, lanes).exp().store(&kept[c], static_cast<int>(lanes));
    });
  }

  // What the state says of the key behind the gate, or of what is removed before it.
  void find_said(const Number* before) {
    for (Index c = 0; c < call.width; ++c) {
      const Number factor = removed ? removed[c] : kept[c] * key[c];
      const Number* line = before + c * call.columns;
      for (Index j = 0; j < whole; j += LANES<Number>) {
        const Vec<Number> sum = Vec<Number>::loadu(&said[j]);
        at::vec::fmadd(Vec<Number>(factor), Vec<Number>::loadu(line + j), sum).store(&said[j]);
      }
      for (Index j = whole; j < call.columns; ++j) said[j] += factor * line[j];
    }
  }

  // By the delta rule, the value less what is said of its key.
  void erase() {
    for (Index j = 0; j < call.columns; ++j) value[j] = (value[j] - said[j]) * beta;
  }

  // A row of the state, and its part in the rows that are read.
  void write(const Number* before, Index c, Number* after) {
    const Number left = kept[c], own = key[c], gone = removed ? -turned[c] : Number(0);
    for (Index j = 0; j < whole; j += LANES<Number>) {
      Vec<Number> line = Vec<Number>(own) * Vec<Number>::loadu(&value[j]);
      if (before) line = at::vec::fmadd(Vec<Number>(left), Vec<Number>::loadu(before + j), line);
      if (removed) line = at::vec::fmadd(Vec<Number>(gone), Vec<Number>::loadu(&said[j]), line);
      line.store(after + j);
      for (Index r = 0; r < call.group; ++r) {
        Number* row = &rows[r * call.columns + j];
        at::vec::fmadd(Vec<Number>(queries[r * call.width + c]), line, Vec<Number>::loadu(row))
            .store(row);
      }
    }
    for (Index j = whole; j < call.columns; ++j) {  // one by one, which costs less than a part
      Number line = own * value[j];
      if (before) line += left * before[j];
      if (removed) line += gone * said[j];
      after[j] = line;
      for (Index r = 0; r < call.group; ++r)
        rows[r * call.columns + j] += queries[r * call.width + c] * line;
    }
  }

  void write_row(Index r, double underflow, Number* out, Number* divisors) {
    const Number* row = &rows[r * call.columns];
    Number factor = 1;
    if (call.normalizes) {
      const Number sum = row[call.value_dim];
      divisors[r] = std::abs(sum) < underflow ? std::numeric_limits<Number>::infinity() : sum;
      factor = 1 / divisors[r];
    }
    scale(row, factor, call.value_dim, out + r * call.value_dim);
  }

  const Recurrence& call;
  const Index whole = call.columns / LANES<Number> * LANES<Number>;  // columns of whole vectors
  std::vector<Number> kept, key, value, said, queries, rows;
  const Number *removed = nullptr, *turned = nullptr;
  Number beta = 1;
};

// What `native_recurrence` gives for a call of one token whose states are not to be remembered.
template <typename Number>
std::vector<at::Tensor> of_one_token(const Recurrence& call,
                                     const std::optional<at::Tensor>& before, double underflow) {
  const Index heads = call.batch * call.kv_heads, size = call.width * call.columns;
  const auto options = call.q.options();
  at::Tensor out = at::empty({call.batch, call.q.size(1), 1, call.value_dim}, options);
  at::Tensor divisors = at::empty({call.batch, call.q.size(1), call.normalizes ? 1 : 0}, options);
  at::Tensor states =
      at::empty({call.batch, call.kv_heads, 0, call.width, call.columns}, options);
  at::Tensor after = at::empty({call.batch, call.kv_heads, call.width, call.columns}, options);
  const Number* from = before ? before->const_data_ptr<Number>() : nullptr;
  Number *to = after.data_ptr<Number>(), *rows = out.data_ptr<Number>();
  Number* sums = divisors.data_ptr<Number>();
  const Index together = std::max<Index>(1, WORTH_A_THREAD / std::max<Index>(1, size));
  at::parallel_for(0, heads, together, [&](Index begin, Index end) {
    OneToken<Number> token(call);
    for (Index own = begin; own < end; ++own)
      token.run(own / call.kv_heads, own % call.kv_heads, from ? from + own * size : nullptr,
                to + own * size, underflow, rows + own * call.group * call.value_dim,
                sums + own * call.group);
  });
  return {out, divisors, states, after};
}

}  // namespace attnzoo
