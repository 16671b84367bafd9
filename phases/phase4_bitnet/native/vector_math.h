// What vectors of 16 float32 are computed with beyond single instructions.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace forge {

// e**x for x <= 0 within 2 units of the last place; NaN stays. Cody-Waite reduction by ln 2 in two parts,
// then the Taylor polynomial to degree 7 on [-ln 2 / 2, ln 2 / 2].
inline __m512 exp_nonpositive(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // the second operand is returned where one is NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// ln x within 2 units of the last place for finite x >= 1. With x = m 2**e, m in [0.75, 1.5), and
// r = (m - 1) / (m + 1), ln m is the series 2 (r + r**3 / 3 + ...); |r| <= 1 / 5, and r**11 is left out.
inline __m512 log_from_one(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  __m512 e = _mm512_getexp_ps(x);
  e = _mm512_mask_add_ps(e, _mm512_cmp_ps_mask(m, one, _CMP_LT_OQ), e, one);
  const __m512 r = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one));
  const __m512 square = _mm512_mul_ps(r, r);
  __m512 p = _mm512_set1_ps(2.0f / 9);
  for (const float c : {2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f}) p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(c));
  return _mm512_fmadd_ps(e, _mm512_set1_ps(0.69314718056f), _mm512_mul_ps(r, p));
}

// 16 x 16: in each step rows that are 1, 2, 4, 8 apart trade half of their elements.
inline void transpose_16(__m512 (&a)[16]) {
  __m512 b[16];
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512d low = _mm512_castps_pd(b[r + h]), high = _mm512_castps_pd(b[r + 2 + h]);
      a[r + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[r + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  // Now a[4 g + c] has, in its quarter l, column 4 l + c of rows 4 g to 4 g + 3.
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) b[r] = a[r];
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), odd01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    a[c] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    a[4 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    a[8 + c] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    a[12 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
}

}  // namespace forge
