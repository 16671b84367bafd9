// Register-blocked int8 products for AVX-512 VNNI.
//
// vpdpbusd multiplies unsigned by signed bytes, four at a time, into int32. The left operand (activations or
// gradients) is the signed one. The right one is shifted to be unsigned, and the shift times the sum of the
// left row is taken off again: a * b = a * (b + offset) - offset * sum(a). All of it is exact.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"

namespace forge {

constexpr int64_t kTileRows = 8;                  // rows of the left operand in registers
constexpr int64_t kVectors = 3;                   // vectors of 16 columns of the right operand
constexpr int64_t kTileColumns = 16 * kVectors;   // 24 accumulators in all

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Accumulate Rows x kTileColumns products over `steps` groups of four.
//
// left: signed bytes; row r, group s at left + r * row_stride + s * step_stride.
// right: unsigned bytes, packed [step][kTileColumns][4].
template <int Rows>
inline void multiply_tile(const int8_t* left, int64_t row_stride, int64_t step_stride, const uint8_t* right,
                          int64_t steps, __m512i (&sums)[kTileRows][kVectors]) {
  __m512i acc[Rows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_setzero_si512();
  for (int64_t s = 0; s < steps; ++s) {
    __m512i b[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) b[v] = _mm512_loadu_si512(right + (s * kVectors + v) * 64);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      int32_t four;
      std::memcpy(&four, left + r * row_stride + s * step_stride, 4);
      const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], b[v], a);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sums[r][v] = acc[r][v];
}

// The same for a number of rows known at run time, 1 to kTileRows.
inline void multiply_rows(int64_t rows, const int8_t* left, int64_t row_stride, int64_t step_stride,
                          const uint8_t* right, int64_t steps, __m512i (&sums)[kTileRows][kVectors]) {
  switch (rows) {
    case 8: return multiply_tile<8>(left, row_stride, step_stride, right, steps, sums);
    case 7: return multiply_tile<7>(left, row_stride, step_stride, right, steps, sums);
    case 6: return multiply_tile<6>(left, row_stride, step_stride, right, steps, sums);
    case 5: return multiply_tile<5>(left, row_stride, step_stride, right, steps, sums);
    case 4: return multiply_tile<4>(left, row_stride, step_stride, right, steps, sums);
    case 3: return multiply_tile<3>(left, row_stride, step_stride, right, steps, sums);
    case 2: return multiply_tile<2>(left, row_stride, step_stride, right, steps, sums);
    default: return multiply_tile<1>(left, row_stride, step_stride, right, steps, sums);
  }
}

inline int32_t sum_of_bytes(const int8_t* values, int64_t count) {
  __m512i total = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < count; i += 64) {
    const int64_t left = std::min<int64_t>(64, count - i);
    const __mmask64 mask = left == 64 ? ~0ull : (1ull << left) - 1;
    total = _mm512_dpbusd_epi32(total, ones, _mm512_maskz_loadu_epi8(mask, values + i));
  }
  return _mm512_reduce_add_epi32(total);
}

// Pack columns [first, first + kTileColumns) of a (depth, columns) matrix: [depth / 4][kTileColumns][4].
// Each byte is shifted by `offset`; what lies outside the matrix is zero before the shift, which is as good
// as anything since the left operand is zero there or the result is not stored.
inline void pack_interleaved(const int8_t* source, int64_t depth, int64_t columns, int64_t first,
                             int8_t offset, uint8_t* packed) {
  const __m128i shift = _mm_set1_epi8(offset);
  for (int64_t d = 0; d < depth; d += 4) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t column = first + v * 16;
      const int64_t width = std::clamp<int64_t>(columns - column, 0, 16);
      const __mmask16 mask = static_cast<__mmask16>((1u << width) - 1);
      __m128i row[4];
      for (int64_t i = 0; i < 4; ++i) {
        row[i] = d + i < depth && width ? _mm_maskz_loadu_epi8(mask, source + (d + i) * columns + column)
                                        : _mm_setzero_si128();
        row[i] = _mm_add_epi8(row[i], shift);
      }
      const __m128i low01 = _mm_unpacklo_epi8(row[0], row[1]), high01 = _mm_unpackhi_epi8(row[0], row[1]);
      const __m128i low23 = _mm_unpacklo_epi8(row[2], row[3]), high23 = _mm_unpackhi_epi8(row[2], row[3]);
      auto* out = reinterpret_cast<__m128i*>(packed + ((d / 4) * kTileColumns + v * 16) * 4);
      _mm_storeu_si128(out, _mm_unpacklo_epi16(low01, low23));
      _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(low01, low23));
      _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(high01, high23));
      _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(high01, high23));
    }
  }
}

// Pack rows [first, first + kTileColumns) of a (rows, depth) matrix, as the columns of its transpose.
inline void pack_transposed(const int8_t* source, int64_t rows, int64_t depth, int64_t first, int8_t offset,
                            uint8_t* packed) {
  const int64_t count = std::min(kTileColumns, rows - first), whole = depth / 4;
  const uint32_t shift = 0x01010101u * static_cast<uint8_t>(offset);
  auto* out = reinterpret_cast<uint32_t*>(packed);
  for (int64_t s = 0; s < ceil_div(depth, 4); ++s) {
    const int64_t bytes = s < whole ? 4 : depth - whole * 4;
    for (int64_t c = 0; c < kTileColumns; ++c) {
      uint32_t four = 0;
      if (c < count) std::memcpy(&four, source + (first + c) * depth + s * 4, bytes);
      // Bytes of -1, 0, 1 plus one: no carry leaves a byte once the sign bit is dealt with apart.
      out[s * kTileColumns + c] = ((four & 0x7f7f7f7fu) + (shift & 0x7f7f7f7fu)) ^ ((four ^ shift) & 0x80808080u);
    }
  }
}

}  // namespace forge
