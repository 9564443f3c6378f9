// Products of small matrices whose results stay in registers until they are whole.
#pragma once

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
constexpr Index ROWS = 64;  // columns of what `transpose` writes

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

// So many rows in whole vectors.
template <typename Number>
Index whole(Index rows) {
  return (rows + LANES<Number> - 1) / LANES<Number> * LANES<Number>;
}

// out (width, ROWS) = the transpose of x (rows, width) times a factor, with 0 in spare columns.
template <typename Number>
void transpose(const Source<Number>& x, Index rows, Index width, Number factor, Number* out) {
  if (rows < ROWS) std::fill(out, out + width * ROWS, Number(0));
  for (Index i = 0; i < rows; i += LANES<Number>)
    for (Index j = 0; j < width; j += LANES<Number>)
      at::vec::transpose_mxn<Number>(x.at(i, j).data, x.row, out + j * ROWS + i, ROWS,
                                    static_cast<int>(std::min(LANES<Number>, rows - i)),
                                    static_cast<int>(std::min(LANES<Number>, width - j)));
  if (factor == 1) return;
  for (Index i = 0; i < width * ROWS; i += LANES<Number>)
    (Vec<Number>::loadu(out + i) * Vec<Number>(factor)).store(out + i);
}

template <typename Number>
Number dot(const Number* x, const Number* y, Index width) {
  Vec<Number> sum(0);
  Index i = 0;
  for (; i + LANES<Number> <= width; i += LANES<Number>)
    sum = at::vec::fmadd(Vec<Number>::loadu(x + i), Vec<Number>::loadu(y + i), sum);
  alignas(64) Number lanes[LANES<Number>];
  sum.store(lanes);
  Number total = 0;
  for (; i < width; ++i) total += x[i] * y[i];
  for (const Number lane : lanes) total += lane;
  return total;
}

}  // namespace attnzoo
