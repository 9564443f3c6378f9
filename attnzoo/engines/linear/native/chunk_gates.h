// What is left, inside a chunk of tokens, of what each of them wrote and of the state before it.
//
// Readers are what tokens read the state by: their queries, and the keys by which they erase.
// Writers are the keys under which they write. What is left is always a product of gates, none of
// them above 1: nothing overflows where a gate closes, and a closed gate costs no digits of what
// follows it. What the state keeps over a chunk is exp of one sum, so that errors do not add up by
// tokens.
#pragma once

#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "native/products.h"

namespace attnzoo {

constexpr Index TOKENS = 16;  // of a chunk: one vector or a few hold a number of each

// What one thread works in.
template <typename Number>
class Memory {
 public:
  // So many numbers, all 0, from the start of a line of the cache on.
  Number* take(Index count) {
    void* raw = ::operator new[](count * sizeof(Number), std::align_val_t(64));
    Number* found = new (raw) Number[count];
    std::fill(found, found + count, Number(0));
    taken_.emplace_back(found);
    return found;
  }

 private:
  struct Free {
    void operator()(Number* x) const { ::operator delete[](x, std::align_val_t(64)); }
  };
  std::vector<std::unique_ptr<Number[], Free>> taken_;
};

// Rows by which tokens read the state, (tokens, width), and what is left of the state before the
// chunk times these. `own`: whether a row reads behind its own token's gate.
// gradient: begins as that of `carried`, and becomes that of `rows`.
template <typename Number>
struct Reader {
  Number *rows, *carried, *gradient;
  bool own;
};

// Keys under which tokens write, (tokens, width) and as columns, (width, TOKENS), and these times
// what is left of them behind the chunk.
// gradient, (tokens, width): begins as that of `handed_on`, and becomes that of `rows`.
template <typename Number>
struct Writer {
  Number *rows, *columns, *handed_on, *gradient;
};

template <typename Number>
using Readers = std::vector<Reader<Number>>;

// A gate for each token of a head, or none.
template <typename Number>
class HeadGates {
 public:
  // width: of keys, filled up to whole vectors
  HeadGates(Index width, Memory<Number>& memory)
      : width_(width), gates_(memory.take(TOKENS)), since_start_(memory.take(TOKENS)),
        between_(memory.take(TOKENS * TOKENS)) {}

  // log_decay: of the first token, then every `step` numbers; nullptr: nothing fades.
  void read(const Number* log_decay, Index step, Index rows, Index) {
    rows_ = rows;
    std::fill(gates_, gates_ + TOKENS, Number(0));
    for (Index i = 0; log_decay && i < rows; ++i) gates_[i] = log_decay[i * step];
    for (Index j = 0; j < TOKENS; j += LANES<Number>) {
      const Vec<Number> token = Vec<Number>::arange(static_cast<Number>(j), 1);
      Vec<Number> sum(0);
      for (Index i = 0; i < rows; ++i) {
        const Vec<Number> earlier = token < Vec<Number>(static_cast<Number>(i));
        sum = Vec<Number>::blendv(sum, sum + Vec<Number>(gates_[i]), earlier);
        sum.exp().store(between_ + i * TOKENS + j);
      }
    }
    for (Index i = 1; i < rows; ++i) gates_[i] += gates_[i - 1];
    for (Index j = 0; j < TOKENS; j += LANES<Number>)
      Vec<Number>::loadu(gates_ + j).exp().store(since_start_ + j);
  }

  void carry(const Reader<Number>& reader) const {
    for (Index i = 0; i < rows_; ++i)
      scale(reader.rows + i * width_, since_start_[i], width_, reader.carried + i * width_);
  }

  // products (readers, TOKENS, TOKENS): rows of readers by the writer's keys, faded in between.
  void multiply_rows(const Readers<Number>& readers, const Writer<Number>& writer,
                     Number* products) const {
    for (const Reader<Number>& reader : readers) {
      multiply<false, Number>({reader.rows, width_}, {writer.columns, TOKENS}, {products, TOKENS},
                              rows_, TOKENS, width_);
      scale_by(products, between_, rows_ * TOKENS);
      products += TOKENS * TOKENS;
    }
    for (Index c = 0; c < width_; ++c) {
      std::copy_n(writer.columns + c * TOKENS, TOKENS, writer.handed_on + c * TOKENS);
      scale_by(writer.handed_on + c * TOKENS, last_left(), TOKENS);
    }
  }

  // The state after the chunk, (width, columns), as far as it is left of the one before.
  void keep(Number* state, Index columns) const {
    const Number left = since_start_[rows_ - 1];
    if (left != 1) scale(state, left, width_ * columns, state);
  }

  // From the gradients of products (overwritten), carried rows and keys handed on to those of the
  // rows and keys.
  void through_carried(const Reader<Number>& reader) const {
    for (Index i = 0; i < rows_; ++i)
      scale(reader.gradient + i * width_, since_start_[i], width_, reader.gradient + i * width_);
  }

  void through_products(const Readers<Number>& readers, const Writer<Number>& writer,
                        Number* products) const {
    for (Index i = 0; i < rows_; ++i)
      scale(writer.gradient + i * width_, last_left()[i], width_, writer.gradient + i * width_);
    for (const Reader<Number>& reader : readers) {
      scale_by(products, between_, rows_ * TOKENS);
      multiply<true, Number>({products, TOKENS}, {writer.rows, width_}, {reader.gradient, width_},
                             rows_, width_, rows_);
      multiply<true, Number>({products, 1, TOKENS}, {reader.rows, width_},
                             {writer.gradient, width_}, rows_, width_, rows_);
      products += TOKENS * TOKENS;
    }
  }

  // The gradient of gates begins with that of the gates' product over the chunk, from the state
  // behind it and its gradient, and goes back by tokens, adding rows times their gradients.
  void begin_gradient(const Number* d_state, const Number* state, Index columns) {
    gradient_ = dot(d_state, state, width_ * columns);
  }

  void add_to_gradient(const Number* rows, const Number* d_rows, Index i, Number sign) {
    gradient_ += sign * dot(rows + i * width_, d_rows + i * width_, width_);
  }

  void write_gradient(const Number* log_decay, Index, Number* out) const {
    *out = std::isinf(*log_decay) ? Number(0) : gradient_;  // a closed gate stays closed
  }

 private:
  const Number* last_left() const { return between_ + (rows_ - 1) * TOKENS; }

  Index width_, rows_ = 0;
  Number *gates_, *since_start_, *between_;
  Number gradient_ = 0;
};

// A gate for each token and channel of the keys.
template <typename Number>
class ChannelGates {
 public:
  ChannelGates(Index width, Memory<Number>& memory)
      : width_(width), open_(memory.take(TOKENS * width)), since_start_(memory.take(TOKENS * width)),
        faded_(memory.take(TOKENS * width)), sums_(memory.take(width)),
        gradient_(memory.take(width)) {}

  void read(const Number* log_decay, Index step, Index rows, Index channels) {
    rows_ = rows;
    std::fill(sums_, sums_ + width_, Number(0));
    for (Index i = 0; i < rows; ++i) {
      std::fill(std::copy_n(log_decay + i * step, channels, open_ + i * width_),
                open_ + (i + 1) * width_, Number(0));
      for (Index c = 0; c < width_; c += LANES<Number>) {
        const Vec<Number> gate = Vec<Number>::loadu(open_ + i * width_ + c);
        const Vec<Number> sum = Vec<Number>::loadu(sums_ + c) + gate;
        sum.store(sums_ + c);
        sum.exp().store(since_start_ + i * width_ + c);
        gate.exp().store(open_ + i * width_ + c);
      }
    }
  }

  void carry(const Reader<Number>& reader) const {
    std::copy_n(reader.rows, rows_ * width_, reader.carried);
    through_gates(reader.own, reader.carried);
  }

  void multiply_rows(const Readers<Number>& readers, const Writer<Number>& writer,
                     Number* products) const {
    Number* faded = writer.handed_on;
    std::copy_n(writer.columns, width_ * TOKENS, faded);
    for (Index i = 0; i < rows_; ++i) {
      for (const bool own : {false, true}) {
        for (size_t r = 0; r < readers.size(); ++r)
          if (readers[r].own == own)
            multiply_row(readers[r].rows + i * width_, faded,
                         products + (r * TOKENS + i) * TOKENS);
        if (!own && i) fade_earlier(faded, i);
      }
    }
  }

  void keep(Number* state, Index columns) const {
    const Number* left = since_start_ + (rows_ - 1) * width_;
    for (Index c = 0; c < width_; ++c)
      scale(state + c * columns, left[c], columns, state + c * columns);
  }

  void through_carried(const Reader<Number>& reader) const {
    through_gates(reader.own, reader.gradient);
  }

  void through_products(const Readers<Number>& readers, const Writer<Number>& writer,
                        Number* products) const {
    const auto at = [&](size_t r, Index i, Index j) {
      return products[(r * TOKENS + i) * TOKENS + j];
    };
    std::copy_n(writer.rows, rows_ * width_, faded_);
    for (Index i = 0; i < rows_; ++i)
      for (const bool own : {false, true}) {
        for (size_t r = 0; r < readers.size(); ++r)
          for (Index j = 0; readers[r].own == own && j < i + own; ++j)
            add_scaled(faded_ + j * width_, at(r, i, j), width_, readers[r].gradient + i * width_);
        for (Index j = 0; !own && j < i; ++j)
          scale_by(faded_ + j * width_, open_ + i * width_, width_);
      }
    for (Index i = rows_ - 1; i >= 0; --i)
      for (const bool own : {true, false}) {
        for (size_t r = 0; r < readers.size(); ++r)
          for (Index j = 0; readers[r].own == own && j < i + own; ++j)
            add_scaled(readers[r].rows + i * width_, at(r, i, j), width_,
                       writer.gradient + j * width_);
        for (Index j = 0; own && j < i; ++j)
          scale_by(writer.gradient + j * width_, open_ + i * width_, width_);
      }
  }

  void begin_gradient(const Number* d_state, const Number* state, Index columns) {
    for (Index c = 0; c < width_; ++c)
      gradient_[c] = dot(d_state + c * columns, state + c * columns, columns);
  }

  void add_to_gradient(const Number* rows, const Number* d_rows, Index i, Number sign) {
    for (Index c = 0; c < width_; c += LANES<Number>) {
      const Vec<Number> row = Vec<Number>::loadu(rows + i * width_ + c) * Vec<Number>(sign);
      at::vec::fmadd(row, Vec<Number>::loadu(d_rows + i * width_ + c),
                     Vec<Number>::loadu(gradient_ + c))
          .store(gradient_ + c);
    }
  }

  void write_gradient(const Number* log_decay, Index channels, Number* out) const {
    for (Index c = 0; c < channels; ++c) out[c] = std::isinf(log_decay[c]) ? Number(0) : gradient_[c];
  }

 private:
  // rows (tokens, width) times what is left at each of the state before the chunk.
  void through_gates(bool own, Number* rows) const {
    for (Index i = own ? 0 : 1; i < rows_; ++i)
      scale_by(rows + i * width_, since_start_ + (own ? i : i - 1) * width_, width_);
  }

  // out (TOKENS): the row times each column of `faded`. Four sums, so that none waits for the last.
  void multiply_row(const Number* row, const Number* faded, Number* out) const {
    for (Index j = 0; j < TOKENS; j += LANES<Number>) {
      Vec<Number> sums[4] = {Vec<Number>(0), Vec<Number>(0), Vec<Number>(0), Vec<Number>(0)};
      for (Index c = 0; c < width_; c += 4)
#pragma GCC unroll 4
        for (Index s = 0; s < 4; ++s)
          sums[s] = at::vec::fmadd(Vec<Number>(row[c + s]),
                                   Vec<Number>::loadu(faded + (c + s) * TOKENS + j), sums[s]);
      ((sums[0] + sums[1]) + (sums[2] + sums[3])).store(out + j);
    }
  }

  // Columns of tokens before the i-th pass its gates.
  void fade_earlier(Number* faded, Index i) const {
    for (Index j = 0; j < TOKENS && j < i; j += LANES<Number>) {
      const Vec<Number> token = Vec<Number>::arange(static_cast<Number>(j), 1);
      const Vec<Number> earlier = token < Vec<Number>(static_cast<Number>(i));
      for (Index c = 0; c < width_; ++c) {
        Number* line = faded + c * TOKENS + j;
        const Vec<Number> gate = Vec<Number>::blendv(Vec<Number>(1), Vec<Number>(open_[i * width_ + c]),
                                                     earlier);
        (Vec<Number>::loadu(line) * gate).store(line);
      }
    }
  }

  Index width_, rows_ = 0;
  Number *open_, *since_start_, *faded_, *sums_, *gradient_;
};

}  // namespace attnzoo
