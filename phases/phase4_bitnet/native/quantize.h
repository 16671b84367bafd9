// Rounding a row to int8 by its largest magnitude.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "elements.h"

namespace forge {

constexpr float kInt8Max = 127.0f;

// Non-negative floats compare as their bits do, and NaN is above all of them: a maximum that keeps NaN.
inline __m512i magnitude_bits(__m512 x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <typename T>
float largest_magnitude(const T* x, int64_t count, float floor) {
  __m512i top = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16)
    top = _mm512_max_epu32(top, magnitude_bits(load(tail_mask(count - i), x + i)));
  const float largest = float_of_bits(_mm512_reduce_max_epu32(top));
  return largest < floor ? floor : largest;  // NaN stays
}

// q = round(x * 127 / max|x|), ties to even; returns the scale max|x| / 127.
template <typename T>
float quantize_row(const T* x, int64_t count, float floor, int8_t* q) {
  const float largest = largest_magnitude(x, count, floor);
  const __m512 factor = _mm512_set1_ps(1.0f / largest * kInt8Max);  // torch's order for 127 / largest
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = tail_mask(count - i);
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load(mask, x + i), factor));
    _mm_mask_storeu_epi8(q + i, mask, _mm512_cvtepi32_epi8(rounded));
  }
  return largest / kInt8Max;
}

}  // namespace forge
