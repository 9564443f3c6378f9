// A state that fades, is written to and read, token by token: forward and backward, by chunks of
// tokens whose state and scores stay in the cache.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "linear/native/chunk.h"
#include "linear/native/one_token.h"

namespace attnzoo {
namespace {

using at::Tensor;
using Given = const Tensor&;
using Maybe = const std::optional<Tensor>&;

// How many states of a call are kept, one before every `span` tokens, which are whole chunks. 0:
// none is.
Index spans_of(const Recurrence& call, Index span) {
  TORCH_CHECK(span % TOKENS == 0, "a span has whole chunks of ", TOKENS, " tokens, got ", span);
  return span ? (call.length + span - 1) / span : 0;
}

// The states of a call: (batch, kv_heads, width, columns), or one for each span.
template <typename Number>
Number* place_of(const Tensor& states, Index sample, Index head) {
  return states.data_ptr<Number>() + sample * states.stride(0) + head * states.stride(1);
}

// A state of the call in the rows of a chunk, which are filled up to whole vectors, and back. What
// fills them up must be 0 each time: a NaN of another sample may have made it NaN.
template <typename Number>
void unpack(const Recurrence& call, const Number* from, Index columns, Number* to) {
  for (Index c = 0; c < call.width; ++c)
    std::fill(std::copy_n(from + c * call.columns, call.columns, to + c * columns),
              to + (c + 1) * columns, Number(0));
}

template <typename Number>
void pack(const Recurrence& call, const Number* from, Index columns, Number* to) {
  for (Index c = 0; c < call.width; ++c)
    std::copy_n(from + c * columns, call.columns, to + c * call.columns);
}

// The writes of a chunk's tokens, (TOKENS, columns) for each writer.
template <typename Number, typename Gates>
void find_writes(const Chunk<Number, Gates>& chunk, Index sample, Index head, const Number* state,
                 const std::vector<Number*>& writes, Number* unscaled) {
  chunk.read_values(sample, head, writes[0]);
  for (size_t w = 1; w < writes.size(); ++w)
    std::fill_n(writes[w], TOKENS * chunk.columns, Number(0));
  if (chunk.call.erases) chunk.solve(state, writes, unscaled);
}

template <typename Number, typename Gates>
std::vector<Tensor> forward_of(const Recurrence& call, Maybe before, double underflow,
                               Index span) {
  const Index value_dim = call.value_dim, length = call.length;
  Tensor out = at::empty({call.batch, call.q.size(1), length, value_dim}, call.q.options());
  Tensor divisors =
      at::empty({call.batch, call.q.size(1), call.normalizes ? length : 0}, call.q.options());
  Tensor states = at::empty({call.batch, call.kv_heads, spans_of(call, span), call.width,
                             call.columns}, call.q.options());
  Tensor after = at::empty({call.batch, call.kv_heads, call.width, call.columns},
                           call.q.options());
  at::parallel_for(0, call.batch * call.kv_heads, 1, [&](Index begin, Index end) {
    Memory<Number> memory;
    Chunk<Number, Gates> chunk(call, memory);
    const Index columns = chunk.columns;
    Number *state = memory.take(chunk.width * columns), *rows = memory.take(TOKENS * columns);
    Number* unscaled = memory.take(TOKENS * columns);
    std::vector<Number*> writes;
    for (size_t w = 0; w < chunk.writers.size(); ++w) writes.push_back(memory.take(TOKENS * columns));
    for (Index own = begin; own < end; ++own) {
      const Index sample = own / call.kv_heads, head = own % call.kv_heads;
      std::fill_n(state, chunk.width * columns, Number(0));
      if (before) unpack(call, place_of<Number>(*before, sample, head), columns, state);
      for (Index first = 0; first < length; first += TOKENS) {
        if (span && first % span == 0)
          pack(call, state, columns,
               place_of<Number>(states, sample, head) + first / span * states.stride(2));
        chunk.read(sample, head, first);
        find_writes(chunk, sample, head, state, writes, unscaled);
        for (Index r = 0; r < chunk.group; ++r) {
          chunk.read_out(r, state, writes, rows);
          const Index place = (sample * call.q.size(1) + head * chunk.group + r) * length + first;
          for (Index i = 0; i < chunk.rows; ++i) {
            Number* row = rows + i * columns;
            if (call.normalizes) {
              const Number sum = row[value_dim];
              const Number divisor =
                  std::abs(sum) < underflow ? std::numeric_limits<Number>::infinity() : sum;
              divisors.data_ptr<Number>()[place + i] = divisor;
              scale(row, 1 / divisor, columns, row);
            }
            std::copy_n(row, value_dim, out.data_ptr<Number>() + (place + i) * value_dim);
          }
        }
        chunk.write(state, writes);
      }
      pack(call, state, columns, place_of<Number>(after, sample, head));
    }
  });
  return {out, divisors, states, after};
}

// Gradients of what a call gives, and of the state before it. Each is undefined where there is no
// such tensor.
struct Gradients {
  Tensor q, k, v, log_decay, beta, removed, turned, state;
};

// The way back through the chunks of one head of keys.
template <typename Number, typename Gates>
class Backward {
 public:
  Backward(const Recurrence& call, Given sent, Given out, Given divisors, Given states,
           Maybe d_after, Index span, const Gradients& found)
      : call(call), sent(sent), out(out), divisors(divisors), states(states), d_after(d_after),
        span(span), found(found), chunk(call, memory), columns(chunk.columns), width(chunk.width),
        size(width * columns), area(TOKENS * columns) {
    replayed = memory.take((span / TOKENS + 1) * size);
    d_state = memory.take(size);
    kept_writes = memory.take(span / TOKENS * (chunk.writers.size() + 1) * area);
    sent_rows = memory.take(chunk.group * area);
    turned_sent = memory.take(area);
    turned_gradient = memory.take(TOKENS * width);
    for (size_t w = 0; w < chunk.writers.size(); ++w) {
      turned_writes.push_back(memory.take(area));
      d_writes.push_back(memory.take(area));
      d_products.push_back(memory.take(chunk.readers.size() * TOKENS * TOKENS));
    }
  }

  void run(Index own) {
    sample = own / call.kv_heads, head = own % call.kv_heads;
    std::fill_n(d_state, size, Number(0));
    if (d_after) unpack(call, place_of<Number>(*d_after, sample, head), columns, d_state);
    for (Index begin = (spans_of(call, span) - 1) * span; begin >= 0; begin -= span) {
      const Index end = std::min(call.length, begin + span);
      replay(begin, end);
      for (Index first = begin + (end - begin - 1) / TOKENS * TOKENS; first >= begin;
           first -= TOKENS)
        go_back(first, (first - begin) / TOKENS);
    }
    pack(call, d_state, columns, place_of<Number>(found.state, sample, head));
  }

 private:
  // The writes of a chunk of the span, and last what the solved ones are before beta.
  std::vector<Number*> writes_of(Index number) const {
    std::vector<Number*> places;
    for (size_t w = 0; w <= chunk.writers.size(); ++w)
      places.push_back(kept_writes + (number * (chunk.writers.size() + 1) + w) * area);
    return places;
  }

  // The states before each chunk of a span and behind the last, and the writes.
  void replay(Index begin, Index end) {
    unpack(call, place_of<Number>(states, sample, head) + begin / span * states.stride(2), columns,
           replayed);
    for (Index first = begin, number = 0; first < end; first += TOKENS, ++number) {
      std::vector<Number*> writes = writes_of(number);
      Number *unscaled = writes.back(), *state = replayed + number * size;
      writes.pop_back();
      chunk.read(sample, head, first);
      find_writes(chunk, sample, head, state, writes, unscaled);
      std::copy_n(state, size, state + size);
      chunk.write(state + size, writes);
    }
  }

  void go_back(Index first, Index number) {
    const Number *state = replayed + number * size, *after = state + size;
    const std::vector<Number*> writes = writes_of(number);
    const Index rows = (chunk.read(sample, head, first), chunk.rows);
    for (size_t w = 0; w < chunk.writers.size(); ++w) {
      transpose<Number>({writes[w], columns}, rows, columns, 1, turned_writes[w], TOKENS);
      multiply<false, Number>({chunk.writers[w].handed_on, 1, TOKENS}, {d_state, columns},
                              {d_writes[w], columns}, rows, columns, call.width);
    }
    for (Index r = 0; r < chunk.group; ++r) {
      read_sent(r);
      through_reader(r, sent_rows + r * area, state, chunk.writers.size());
    }
    if (call.erases) through_solution(state, writes.back());
    for (size_t w = 0; w < chunk.writers.size(); ++w)
      through_state(d_state, turned_writes[w], chunk.writers[w].gradient);
    if (call.log_decay) chunk.gates.begin_gradient(d_state, after, columns);
    chunk.gates.keep(d_state, columns);
    for (size_t r = 0; r < chunk.readers.size(); ++r) {
      const Number* d_rows = static_cast<Index>(r) < chunk.group ? sent_rows + r * area
                                                                 : d_writes.back();
      multiply<true, Number>({chunk.readers[r].carried, 1, width}, {d_rows, columns},
                             {d_state, columns}, call.width, columns, rows);
      chunk.gates.through_carried(chunk.readers[r]);
    }
    for (size_t w = 0; w < chunk.writers.size(); ++w)
      chunk.gates.through_products(chunk.readers, chunk.writers[w], d_products[w]);
    if (call.log_decay) write_gates();
    write_tokens();
  }

  // The gradient of a query's rows before they were divided by their sums, and of these sums.
  void read_sent(Index r) {
    const Index value_dim = call.value_dim;
    const Index place =
        (sample * call.q.size(1) + head * chunk.group + r) * call.length + chunk.first;
    for (Index i = 0; i < chunk.rows; ++i) {
      Number* row = sent_rows + r * area + i * columns;
      std::fill(std::copy_n(sent.const_data_ptr<Number>() + (place + i) * value_dim, value_dim, row),
                row + columns, Number(0));
      if (!call.normalizes) continue;
      row[value_dim] = -dot(row, out.const_data_ptr<Number>() + (place + i) * value_dim, value_dim);
      scale(row, 1 / divisors.const_data_ptr<Number>()[place + i], columns, row);
    }
  }

  // out (tokens, width) = turned (columns, TOKENS) back through a state, or its gradient.
  void through_state(const Number* of, const Number* turned, Number* to) {
    multiply<false, Number>({of, columns}, {turned, TOKENS}, {turned_gradient, TOKENS},
                            call.width, TOKENS, columns);
    transpose<Number>({turned_gradient, TOKENS}, width, TOKENS, 1, to, width);
  }

  // From the gradient of a reader's rows, (tokens, columns), to those of its products, of what it
  // carries, and of what the first writers wrote.
  void through_reader(Index r, const Number* d_rows, const Number* state, size_t writers) {
    transpose<Number>({d_rows, columns}, chunk.rows, columns, 1, turned_sent, TOKENS);
    through_state(state, turned_sent, chunk.readers[r].gradient);
    for (size_t w = 0; w < chunk.writers.size(); ++w) {
      Number* products = d_products[w] + r * TOKENS * TOKENS;
      multiply<false, Number>({d_rows, columns}, {turned_writes[w], TOKENS}, {products, TOKENS},
                              chunk.rows, TOKENS, columns);
      chunk.hide_later(r, products);
      if (w < writers)
        multiply<true, Number>({chunk.seen(r, w), 1, TOKENS}, {d_rows, columns},
                               {d_writes[w], columns}, chunk.rows, columns, chunk.rows);
    }
  }

  // The gradient of the last writer's writes becomes that of what was solved for them.
  void through_solution(const Number* state, const Number* unscaled) {
    const size_t last = chunk.writers.size() - 1;
    const Number* seen = chunk.seen(chunk.group, last);
    for (Index i = chunk.rows - 1; i >= 0; --i) {
      Number* own = d_writes[last] + i * columns;
      multiply<true, Number>({seen + (i + 1) * TOKENS + i, 1, TOKENS}, {own + columns, columns},
                             {own, columns}, 1, columns, chunk.rows - 1 - i);
      if (found.beta.defined())
        *place(found.beta, i) = dot(own, unscaled + i * columns, columns);
      if (chunk.beta[i] != 1) scale(own, chunk.beta[i], columns, own);
    }
    through_reader(chunk.group, d_writes[last], state, last);
  }

  // A token's place in a gradient.
  Number* place(const Tensor& of, Index i, Index part = 0, Index parts = 1) const {
    return of.data_ptr<Number>() + sample * of.stride(0) + (head * parts + part) * of.stride(1) +
           (chunk.first + i) * of.stride(2);
  }

  // A gate lets fade what was written before and is read behind it: its gradient is the sum of
  // those readers' rows times their gradients, less the keys of writers behind it times theirs.
  void write_gates() {
    for (Index i = chunk.rows - 1; i >= 0; --i) {
      for (const auto& reader : chunk.readers)
        if (reader.own) chunk.gates.add_to_gradient(reader.rows, reader.gradient, i, 1);
      for (const auto& writer : chunk.writers)
        chunk.gates.add_to_gradient(writer.rows, writer.gradient, i, -1);
      const auto gate = rows_of<Number>(*call.log_decay, sample, head, chunk.first + i);
      chunk.gates.write_gradient(gate.data, call.width, place(found.log_decay, i));
      for (const auto& reader : chunk.readers)
        if (!reader.own) chunk.gates.add_to_gradient(reader.rows, reader.gradient, i, 1);
    }
  }

  // Gradients of given rows, from those of what `Chunk::copy` made of them.
  void write_scaled(const Number* rows, const Number* gradient, const Source<Number>& given,
                    Number factor, Number scaled_by, Number* to) const {
    if (call.elu) {  // whose derivative is the feature below 0, and 1 above
      each_vector<Number>(call.width, [&](Index c, Index lanes) {
        const Vec<Number> slope =
            at::vec::minimum(Vec<Number>::loadu(rows + c, lanes), Vec<Number>(1));
        (slope * Vec<Number>::loadu(gradient + c, lanes)).store(to + c, static_cast<int>(lanes));
      });
      return;
    }
    const Number length = factor / scaled_by;
    const Number along =
        call.l2_norm ? dot(rows, gradient, call.width) * length * length : Number(0);
    each_vector<Number>(call.width, [&](Index c, Index lanes) {
      const Vec<Number> turned = Vec<Number>::loadu(given.data + c, lanes) * Vec<Number>(-along);
      at::vec::fmadd(Vec<Number>(factor), Vec<Number>::loadu(gradient + c, lanes), turned)
          .store(to + c, static_cast<int>(lanes));
    });
  }

  void write_tokens() {
    const auto& key = chunk.writers[0];
    if (call.delta)
      add_scaled(chunk.readers[chunk.group].gradient, Number(-1), chunk.rows * width, key.gradient);
    for (Index i = 0; i < chunk.rows; ++i) {
      const Index line = i * width;
      for (Index r = 0; r < chunk.group; ++r) {
        const auto given = rows_of<Number>(call.q, sample, head * chunk.group + r, chunk.first + i);
        write_scaled(chunk.readers[r].rows + line, chunk.readers[r].gradient + line, given,
                     chunk.q_factors[r * TOKENS + i], call.scale,
                     place(found.q, i, r, chunk.group));
      }
      write_scaled(key.rows + line, key.gradient + line,
                   rows_of<Number>(call.k, sample, head, chunk.first + i), chunk.k_factors[i], 1,
                   place(found.k, i));
      std::copy_n(d_writes[0] + i * columns, call.value_dim, place(found.v, i));
      if (call.removed) {
        std::copy_n(chunk.writers[1].gradient + line, call.width, place(found.turned, i));
        scale(chunk.readers[chunk.group].gradient + line, Number(-1), call.width,
              place(found.removed, i));
      }
      if (chunk.is_real(i)) continue;  // 0 by itself, unless a row is no number
      std::fill_n(place(found.k, i), call.width, Number(0));
      std::fill_n(place(found.v, i), call.value_dim, Number(0));
    }
  }

  const Recurrence& call;
  Given sent, out, divisors, states;
  Maybe d_after;
  const Index span;
  const Gradients& found;
  Memory<Number> memory;
  Chunk<Number, Gates> chunk;
  const Index columns, width, size, area;
  Index sample = 0, head = 0;
  Number *replayed, *d_state, *kept_writes, *sent_rows, *turned_sent, *turned_gradient;
  std::vector<Number*> turned_writes, d_writes, d_products;
};

template <typename Number, typename Gates>
void backward_of(const Recurrence& call, Given sent, Given out, Given divisors, Given states,
                 Maybe d_after, Index span, const Gradients& found) {
  at::parallel_for(0, call.batch * call.kv_heads, 1, [&](Index begin, Index end) {
    Backward<Number, Gates> backward(call, sent, out, divisors, states, d_after, span, found);
    for (Index own = begin; own < end; ++own) backward.run(own);
  });
}

// Calls run<Number, Gates>() with the types of a call.
#define DISPATCH(run, ...)                                                          \
  const bool by_channel = log_decay.has_value() && log_decay->dim() == 4;           \
  if (q.scalar_type() == at::kDouble)                                               \
    return by_channel ? run<double, ChannelGates<double>>(__VA_ARGS__)              \
                      : run<double, HeadGates<double>>(__VA_ARGS__);                \
  return by_channel ? run<float, ChannelGates<float>>(__VA_ARGS__)                  \
                    : run<float, HeadGates<float>>(__VA_ARGS__);

std::vector<Tensor> forward(Given q, Given k, Given v, Maybe log_decay, Maybe beta, Maybe removed,
                            Maybe turned, Maybe key_mask, Maybe before, bool delta, bool l2_norm,
                            bool normalizes, bool elu, double scale, double underflow, Index span) {
  const Recurrence call{q,        k,     v,       log_decay,  beta, removed, turned,
                        key_mask, delta, l2_norm, normalizes, elu,  scale};
  if (call.length == 1 && !span)
    return q.scalar_type() == at::kDouble ? of_one_token<double>(call, before, underflow)
                                          : of_one_token<float>(call, before, underflow);
  DISPATCH(forward_of, call, before, underflow, span)
}

void go_back(const Recurrence& call, Given sent, Given out, Given divisors, Given states,
             Maybe d_after, Index span, const Gradients& found) {
  Given q = call.q;
  Maybe log_decay = call.log_decay;
  DISPATCH(backward_of, call, sent, out, divisors, states, d_after, span, found)
}

std::vector<Tensor> backward(Given sent, Given out, Given divisors, Given states, Maybe d_after,
                             Given q, Given k, Given v, Maybe log_decay, Maybe beta, Maybe removed,
                             Maybe turned, Maybe key_mask, bool delta, bool l2_norm,
                             bool normalizes, bool elu, double scale, Index span) {
  const Recurrence call{q,        k,     v,       log_decay,  beta, removed, turned,
                        key_mask, delta, l2_norm, normalizes, elu,  scale};
  const auto like = [](Maybe x) { return x ? at::empty(x->sizes(), x->options()) : Tensor(); };
  const Gradients found{at::empty(q.sizes(), q.options()), at::empty(k.sizes(), k.options()),
                        at::empty(v.sizes(), v.options()), like(log_decay), like(beta),
                        like(removed), like(turned),
                        at::empty({q.size(0), k.size(1), k.size(3), call.columns}, q.options())};
  go_back(call, sent, out, divisors, states, d_after, span, found);
  std::vector<Tensor> all;
  for (const Tensor& x : {found.q, found.k, found.v, found.log_decay, found.beta, found.removed,
                          found.turned, found.state})
    if (x.defined()) all.push_back(x);
  return all;
}

}  // namespace
}  // namespace attnzoo

TORCH_LIBRARY_FRAGMENT(attnzoo, library) {
  library.def(
      "native_recurrence(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor? "
      "removed, Tensor? turned, Tensor? key_mask, Tensor? before, bool delta, bool l2_norm, bool "
      "normalizes, bool elu, float scale, float underflow, int span) -> Tensor[]");
  library.def(
      "native_recurrence_backward(Tensor sent, Tensor out, Tensor divisors, Tensor states, Tensor? "
      "d_after, Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor? removed, "
      "Tensor? turned, Tensor? key_mask, bool delta, bool l2_norm, bool normalizes, bool elu, "
      "float scale, int span) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(attnzoo, CPU, library) {
  library.impl("native_recurrence", &attnzoo::forward);
  library.impl("native_recurrence_backward", &attnzoo::backward);
}
