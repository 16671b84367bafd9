// Tensors of float32 and of bf16, read and written as vectors of 16 float32.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <immintrin.h>

#include <cstdint>

namespace forge {

inline __mmask16 tail_mask(int64_t left) {
  return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

inline __m512 load(__mmask16 mask, const float* from) { return _mm512_maskz_loadu_ps(mask, from); }

inline __m512 load(__mmask16 mask, const c10::BFloat16* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

inline void store(__mmask16 mask, float* to, __m512 x) { _mm512_mask_storeu_ps(to, mask, x); }

// To the nearest, ties to even, as torch rounds. The instruction for it (AVX-512 BF16) takes denormals for
// zero and is not on every machine.
inline void store(__mmask16 mask, c10::BFloat16* to, __m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// Call work with a value of the element type of a tensor.
template <typename Work>
auto with_element(at::ScalarType dtype, const Work& work) {
  if (dtype == at::kBFloat16) return work(c10::BFloat16());
  TORCH_CHECK(dtype == at::kFloat, "the kernel takes float32 or bfloat16, not ", dtype);
  return work(float());
}

}  // namespace forge
