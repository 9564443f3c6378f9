// Products of small float32 matrices whose results stay in registers until they are whole.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

namespace attnzoo {

using Index = int64_t;
using Vec = at::vec::Vectorized<float>;

constexpr Index LANES = Vec::size();
// Vectors of columns and rows of a result in registers: 24 of AVX-512's 32, 12 of AVX2's 16.
constexpr Index WIDE = LANES == 16 ? 4 : 2;
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

using Source = Matrix<const float>;
using Target = Matrix<float>;

// A vector, or its first `count` numbers where it is the last of a row and `some` of it are there.
template <bool some>
inline Vec load(const float* x, Index count) {
  return some ? Vec::loadu(x, count) : Vec::loadu(x);
}

template <bool some>
inline void store(const Vec& x, float* to, Index count) {
  if (some)
    x.store(to, static_cast<int>(count));
  else
    x.store(to);
}

// out = left · right, or out += left · right, for `high` rows and `wide` vectors of columns; of
// `some` columns, for the first `count`.
template <Index high, Index wide, bool add, bool some>
inline void multiply_block(const Source& left, const Source& right, const Target& out,
                           Index depth, Index count) {
  Vec sums[high][wide];
#pragma GCC unroll 8
  for (Index i = 0; i < high; ++i)
#pragma GCC unroll 8
    for (Index j = 0; j < wide; ++j)
      sums[i][j] = add ? load<some>(out.data + i * out.row + j * LANES, count) : Vec(0.f);
  for (Index p = 0; p < depth; ++p) {
    Vec line[wide];
#pragma GCC unroll 8
    for (Index j = 0; j < wide; ++j)
      line[j] = load<some>(right.data + p * right.row + j * LANES, count);
#pragma GCC unroll 8
    for (Index i = 0; i < high; ++i) {
      const Vec one(left.data[i * left.row + p * left.column]);
#pragma GCC unroll 8
      for (Index j = 0; j < wide; ++j) sums[i][j] = at::vec::fmadd(one, line[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (Index i = 0; i < high; ++i)
#pragma GCC unroll 8
    for (Index j = 0; j < wide; ++j)
      store<some>(sums[i][j], out.data + i * out.row + j * LANES, count);
}

template <Index wide, bool add, bool some = false>
inline void multiply_strip(const Source& left, const Source& right, const Target& out, Index rows,
                           Index depth, Index count = LANES) {
  Index i = 0;
  for (; i + HIGH <= rows; i += HIGH)
    multiply_block<HIGH, wide, add, some>(left.at(i, 0), right, out.at(i, 0), depth, count);
  const Source rest = left.at(i, 0);
  const Target to = out.at(i, 0);
  switch (rows - i) {
    case 5: return multiply_block<5, wide, add, some>(rest, right, to, depth, count);
    case 4: return multiply_block<4, wide, add, some>(rest, right, to, depth, count);
    case 3: return multiply_block<3, wide, add, some>(rest, right, to, depth, count);
    case 2: return multiply_block<2, wide, add, some>(rest, right, to, depth, count);
    case 1: return multiply_block<1, wide, add, some>(rest, right, to, depth, count);
    default: return;
  }
}

// out (rows, columns) = or += left (rows, depth) · right (depth, columns), whose columns lie one
// after the other in right and out.
template <bool add>
void multiply(const Source& left, const Source& right, const Target& out, Index rows,
              Index columns, Index depth) {
  Index j = 0;
  for (; j + WIDE * LANES <= columns; j += WIDE * LANES)
    multiply_strip<WIDE, add>(left, right.at(0, j), out.at(0, j), rows, depth);
  for (; j + 2 * LANES <= columns; j += 2 * LANES)
    multiply_strip<2, add>(left, right.at(0, j), out.at(0, j), rows, depth);
  for (; j + LANES <= columns; j += LANES)
    multiply_strip<1, add>(left, right.at(0, j), out.at(0, j), rows, depth);
  if (j < columns)
    multiply_strip<1, add, true>(left, right.at(0, j), out.at(0, j), rows, depth, columns - j);
}

// So many rows in whole vectors.
inline Index whole(Index rows) { return (rows + LANES - 1) / LANES * LANES; }

// out (width, ROWS) = the transpose of x (rows, width) times a factor, with 0 in spare columns.
inline void transpose(const Source& x, Index rows, Index width, float factor, float* out) {
  if (rows < ROWS) std::fill(out, out + width * ROWS, 0.f);
  for (Index i = 0; i < rows; i += LANES)
    for (Index j = 0; j < width; j += LANES)
      at::vec::transpose_mxn<float>(x.at(i, j).data, x.row, out + j * ROWS + i, ROWS,
                                    static_cast<int>(std::min(LANES, rows - i)),
                                    static_cast<int>(std::min(LANES, width - j)));
  if (factor == 1.f) return;
  for (Index i = 0; i < width * ROWS; i += LANES)
    (Vec::loadu(out + i) * Vec(factor)).store(out + i);
}

inline float dot(const float* x, const float* y, Index width) {
  Vec sum(0.f);
  Index i = 0;
  for (; i + LANES <= width; i += LANES)
    sum = at::vec::fmadd(Vec::loadu(x + i), Vec::loadu(y + i), sum);
  alignas(64) float lanes[LANES];
  sum.store(lanes);
  float total = 0.f;
  for (; i < width; ++i) total += x[i] * y[i];
  for (const float lane : lanes) total += lane;
  return total;
}

}  // namespace attnzoo
