// Products of small matrices whose results stay in registers until they are whole.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

namespace attnzoo {

using Index = int64_t;
template <typename Number>
using Vec = at::vec::Vectorized<Number>;
template <typename Number>
constexpr Index LANES = Vec<Number>::size();

// Vectors of columns and rows of a result in registers: 24 of AVX-512's 32, 12 of AVX2's 16.
constexpr Index WIDE = LANES<float> == 16 ? 4 : 2;
constexpr Index HIGH = 6;
constexpr Index ROWS = 64;  // columns of what `transpose` writes, unless told otherwise

// A matrix that is read or written in place: entry (i, j) is data[i * row + j * column].
template <typename Number>
struct Matrix {
  Number* data;
  Index row;
  Index column = 1;

  Matrix at(Index i, Index j) const { return {data + i * row + j * column, row, column}; }
};

template <typename Number>
using Source = Matrix<const Number>;
template <typename Number>
using Target = Matrix<Number>;

// The matrix of one head of x (batch, heads, rows, width), whose numbers of a row lie together.
template <typename Number>
Source<Number> head_of(const at::Tensor& x, Index sample, Index head) {
  return {x.const_data_ptr<Number>() + sample * x.stride(0) + head * x.stride(1), x.stride(2)};
}

// out = left · right, or out += left · right, for `high` rows and `wide` vectors of columns; of
// `some` columns, for the first `count`.
template <Index high, Index wide, bool add, bool some, typename Number>
inline void multiply_block(const Source<Number>& left, const Source<Number>& right,
                           const Target<Number>& out, Index depth, Index count) {
  const Index lanes = some ? count : LANES<Number>;
  Vec<Number> sums[high][wide];
#pragma GCC unroll 8
  for (Index i = 0; i < high; ++i)
#pragma GCC unroll 8
    for (Index j = 0; j < wide; ++j)
      sums[i][j] = add ? Vec<Number>::loadu(out.data + i * out.row + j * LANES<Number>, lanes)
                       : Vec<Number>(0);
  for (Index p = 0; p < depth; ++p) {
    Vec<Number> line[wide];
#pragma GCC unroll 8
    for (Index j = 0; j < wide; ++j)
      line[j] = Vec<Number>::loadu(right.data + p * right.row + j * LANES<Number>, lanes);
#pragma GCC unroll 8
    for (Index i = 0; i < high; ++i) {
      const Vec<Number> one(left.data[i * left.row + p * left.column]);
#pragma GCC unroll 8
      for (Index j = 0; j < wide; ++j) sums[i][j] = at::vec::fmadd(one, line[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (Index i = 0; i < high; ++i)
#pragma GCC unroll 8
    for (Index j = 0; j < wide; ++j)
      sums[i][j].store(out.data + i * out.row + j * LANES<Number>, static_cast<int>(lanes));
}

template <Index wide, bool add, bool some, typename Number>
inline void multiply_strip(const Source<Number>& left, const Source<Number>& right,
                           const Target<Number>& out, Index rows, Index depth, Index count) {
  Index i = 0;
  for (; i + HIGH <= rows; i += HIGH)
    multiply_block<HIGH, wide, add, some>(left.at(i, 0), right, out.at(i, 0), depth, count);
  const Source<Number> rest = left.at(i, 0);
  const Target<Number> to = out.at(i, 0);
  if (rows - i == 5) multiply_block<5, wide, add, some>(rest, right, to, depth, count);
  if (rows - i == 4) multiply_block<4, wide, add, some>(rest, right, to, depth, count);
  if (rows - i == 3) multiply_block<3, wide, add, some>(rest, right, to, depth, count);
  if (rows - i == 2) multiply_block<2, wide, add, some>(rest, right, to, depth, count);
  if (rows - i == 1) multiply_block<1, wide, add, some>(rest, right, to, depth, count);
}

// out (rows, columns) = or += left (rows, depth) · right (depth, columns), whose columns lie one
// after the other in right and out.
template <bool add, typename Number>
void multiply(const Source<Number>& left, const Source<Number>& right, const Target<Number>& out,
              Index rows, Index columns, Index depth) {
  Index j = 0;
  for (; j + WIDE * LANES<Number> <= columns; j += WIDE * LANES<Number>)
    multiply_strip<WIDE, add, false>(left, right.at(0, j), out.at(0, j), rows, depth,
                                     LANES<Number>);
  for (; j + 2 * LANES<Number> <= columns; j += 2 * LANES<Number>)
    multiply_strip<2, add, false>(left, right.at(0, j), out.at(0, j), rows, depth,
                                     LANES<Number>);
  for (; j + LANES<Number> <= columns; j += LANES<Number>)
    multiply_strip<1, add, false>(left, right.at(0, j), out.at(0, j), rows, depth,
                                     LANES<Number>);
  if (j < columns)
    multiply_strip<1, add, true>(left, right.at(0, j), out.at(0, j), rows, depth, columns - j);
}

// Calls visit(place, lanes) for vectors that together hold `count` numbers.
template <typename Number, typename Visit>
inline void each_vector(Index count, const Visit& visit) {
  Index i = 0;
  for (; i + LANES<Number> <= count; i += LANES<Number>) visit(i, LANES<Number>);
  if (i < count) visit(i, count - i);
}

template <typename Number>
void scale(const Number* x, Number factor, Index count, Number* out) {
  each_vector<Number>(count, [&](Index i, Index lanes) {
    (Vec<Number>::loadu(x + i, lanes) * Vec<Number>(factor)).store(out + i, static_cast<int>(lanes));
  });
}

// What follows goes over `count` numbers, a whole number of vectors.

template <typename Number>
void scale_by(Number* x, const Number* factors, Index count) {
  for (Index i = 0; i < count; i += LANES<Number>)
    (Vec<Number>::loadu(x + i) * Vec<Number>::loadu(factors + i)).store(x + i);
}

template <typename Number>
void add_scaled(const Number* x, Number factor, Index count, Number* out) {
  for (Index i = 0; i < count; i += LANES<Number>)
    at::vec::fmadd(Vec<Number>(factor), Vec<Number>::loadu(x + i), Vec<Number>::loadu(out + i))
        .store(out + i);
}

// So many rows in whole vectors.
template <typename Number>
Index whole(Index rows) {
  return (rows + LANES<Number> - 1) / LANES<Number> * LANES<Number>;
}

// out (width, columns) = the transpose of x (rows, width) times a factor, with 0 in spare columns.
template <typename Number>
void transpose(const Source<Number>& x, Index rows, Index width, Number factor, Number* out,
               Index columns = ROWS) {
  if (rows < columns) std::fill(out, out + width * columns, Number(0));
  for (Index i = 0; i < rows; i += LANES<Number>)
    for (Index j = 0; j < width; j += LANES<Number>)
      at::vec::transpose_mxn<Number>(x.at(i, j).data, x.row, out + j * columns + i, columns,
                                    static_cast<int>(std::min(LANES<Number>, rows - i)),
                                    static_cast<int>(std::min(LANES<Number>, width - j)));
  if (factor != 1) scale(out, factor, width * columns, out);
}

// The products of x with up to LANES lines times a factor, in one vector: each line has a vector of
// sums, and these are added up together.
template <typename Number, typename Line>
void dot_lines(const Number* x, Index width, Index count, Number factor, const Line& line,
               Number* out) {
  constexpr Index L = LANES<Number>;
  alignas(64) Number sums[L * L] = {}, turned[L * L];
  for (Index i = 0; i < count; ++i) {
    const Number* y = line(i);
    Vec<Number> sum(0);
    Index c = 0;
    for (; c + L <= width; c += L)
      sum = at::vec::fmadd(Vec<Number>::loadu(x + c), Vec<Number>::loadu(y + c), sum);
    if (c < width)
      sum = at::vec::fmadd(Vec<Number>::loadu(x + c, width - c), Vec<Number>::loadu(y + c, width - c),
                           sum);
    sum.store(sums + i * L);
  }
  at::vec::transpose_mxn<Number>(sums, L, turned, L, static_cast<int>(L), static_cast<int>(L));
  Vec<Number> total(0);
  for (Index lane = 0; lane < L; ++lane) total = total + Vec<Number>::loadu(turned + lane * L);
  (total * Vec<Number>(factor)).store(out);
}

template <typename Number>
Number dot(const Number* x, const Number* y, Index width) {
  const auto add = [](const Vec<Number>& one, const Vec<Number>& other) { return one + other; };
  // Four sums, so that none waits for the one before.
  Vec<Number> sums[4] = {Vec<Number>(0), Vec<Number>(0), Vec<Number>(0), Vec<Number>(0)};
  Index i = 0;
  for (; i + 4 * LANES<Number> <= width; i += 4 * LANES<Number>)
#pragma GCC unroll 4
    for (Index s = 0; s < 4; ++s)
      sums[s] = at::vec::fmadd(Vec<Number>::loadu(x + i + s * LANES<Number>),
                               Vec<Number>::loadu(y + i + s * LANES<Number>), sums[s]);
  for (; i + LANES<Number> <= width; i += LANES<Number>)
    sums[0] = at::vec::fmadd(Vec<Number>::loadu(x + i), Vec<Number>::loadu(y + i), sums[0]);
  Number total = at::vec::vec_reduce_all<Number>(add, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (; i < width; ++i) total += x[i] * y[i];
  return total;
}

}  // namespace attnzoo
