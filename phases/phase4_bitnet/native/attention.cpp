// Causal self-attention with rotary positions from the fused projection and back to it. Tensors are float32 or
// bf16, all that is computed is float32.
//
// One (sample, head) at a time is gathered into scratch that stays in L2, rotated on the way, and worked on
// in blocks of queries against all the keys they may see. Nothing is permuted in memory, keys after the
// block are never multiplied, and backward keeps only the log of the softmax's sums.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <immintrin.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "elements.h"
#include "parallel.h"
#include "short_attention.h"
#include "vector_math.h"

namespace forge {
namespace {

using at::Tensor;

constexpr int64_t kBlock = 32;  // queries a block; also what the length is padded to
constexpr int64_t kRows = 8;    // rows of a product in registers

// C (+)= A B for kRows rows and Vectors * 16 columns. A's rows are `a_stride` apart, or its columns are
// where it is Transposed.
template <int Vectors, bool Accumulate, bool Transposed>
inline void multiply_tile(int64_t inner, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                          float* c, int64_t c_stride) {
  __m512 sum[kRows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v)
      sum[r][v] = Accumulate ? _mm512_loadu_ps(c + r * c_stride + v * 16) : _mm512_setzero_ps();
  for (int64_t k = 0; k < inner; ++k) {
    __m512 right[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) right[v] = _mm512_loadu_ps(b + v * 16);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512 left = _mm512_set1_ps(Transposed ? a[r] : a[r * a_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_fmadd_ps(left, right[v], sum[r][v]);
    }
    a += Transposed ? a_stride : 1;
    b += b_stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(c + r * c_stride + v * 16, sum[r][v]);
}

// rows in multiples of kRows, columns of 16.
template <bool Accumulate, bool Transposed>
void multiply(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t a_stride, const float* b,
              int64_t b_stride, float* c, int64_t c_stride) {
  for (int64_t j = 0; j < columns;) {
    const bool wide = columns - j >= 32;
    for (int64_t i = 0; i < rows; i += kRows) {
      const float* left = Transposed ? a + i : a + i * a_stride;
      float* out = c + i * c_stride + j;
      if (wide)
        multiply_tile<2, Accumulate, Transposed>(inner, left, a_stride, b + j, b_stride, out, c_stride);
      else
        multiply_tile<1, Accumulate, Transposed>(inner, left, a_stride, b + j, b_stride, out, c_stride);
    }
    j += wide ? 32 : 16;
  }
}

struct Shape {
  int64_t batch, length, heads, width, padded;

  explicit Shape(const Tensor& qkv)
      : batch(qkv.size(0)), length(qkv.size(1)), heads(qkv.size(3)), width(qkv.size(4)),
        padded((length + kBlock - 1) / kBlock * kBlock) {}
  ShortShape lanes() const { return {batch, length, heads, width}; }
  int64_t matrix() const { return padded * width; }
  // From row to row of a matrix whose rows are keys. A power of two would put a column of it into few sets
  // of the cache, which then evict each other.
  int64_t key_stride() const { return padded + 16; }
  // Floats from one position of the projection to the next, and from q to k and k to v.
  int64_t position() const { return 3 * heads * width; }
  int64_t part() const { return heads * width; }
};

// Rotate row x by its position: the "rotate half" layout. `turn` is 1, or -1 for the gradient.
template <typename In, typename Out>
inline void rotate(const In* x, const float* cos, const float* sin, float turn, float factor, int64_t width,
                   Out* out) {
  const int64_t half = width / 2;
  const __m512 by = _mm512_set1_ps(factor), back = _mm512_set1_ps(turn);
  for (int64_t d = 0; d < half; d += 16) {
    const __mmask16 mask = tail_mask(half - d);
    // Both halves of the tables are equal, so the transpose of the rotation is the rotation back.
    const __m512 c = _mm512_mul_ps(load(mask, cos + d), by);
    const __m512 s = _mm512_mul_ps(_mm512_mul_ps(load(mask, sin + d), by), back);
    const __m512 first = load(mask, x + d), second = load(mask, x + half + d);
    store(mask, out + d, _mm512_fnmadd_ps(second, s, _mm512_mul_ps(first, c)));
    store(mask, out + half + d, _mm512_fmadd_ps(first, s, _mm512_mul_ps(second, c)));
  }
}

template <typename In, typename Out>
inline void convert(const In* x, int64_t count, Out* out) {
  for (int64_t d = 0; d < count; d += 16) store(tail_mask(count - d), out + d, load(tail_mask(count - d), x + d));
}

// (rows, columns) -> (columns, rows), `stride` apart; both multiples of 16
void transpose(const float* from, int64_t rows, int64_t columns, int64_t stride, float* to) {
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < columns; j += 16) {
      __m512 block[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) block[r] = _mm512_loadu_ps(from + (i + r) * columns + j);
      transpose_16(block);
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c) _mm512_storeu_ps(to + (j + c) * stride + i, block[c]);
    }
}

// Cuts a thread's scratch into matrices.
struct Cutter {
  float* next;

  float* take(int64_t floats) {
    float* own = next;
    next += floats;
    return own;
  }
};

// One head's queries (scaled) and keys, rotated, and its values; rows past the length are zero.
template <typename T>
void gather(const T* qkv, const Shape& s, const float* cos, const float* sin, float* q, float* k, float* v) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.width));
  for (int64_t t = 0; t < s.length; ++t) {
    const T* own = qkv + t * s.position();
    rotate(own, cos + t * s.width, sin + t * s.width, 1, scale, s.width, q + t * s.width);
    rotate(own + s.part(), cos + t * s.width, sin + t * s.width, 1, 1, s.width, k + t * s.width);
    convert(own + 2 * s.part(), s.width, v + t * s.width);
  }
  for (float* each : {q, k, v})
    std::memset(each + s.length * s.width, 0, (s.padded - s.length) * s.width * sizeof(float));
}

inline __mmask16 seen(int64_t row, int64_t column) {
  const int64_t count = row - column + 1;  // keys up to the query's own position
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

template <typename T>
std::tuple<Tensor, Tensor> attend(const Tensor& qkv_in, const Tensor& cos_in, const Tensor& sin_in) {
  const Tensor qkv = qkv_in.contiguous(), cos = cos_in.contiguous(), sin = sin_in.contiguous();
  const Shape s(qkv);
  Tensor out = at::empty({s.batch, s.length, s.part()}, qkv.options());
  Tensor log_sums = at::empty({s.batch, s.heads, s.length}, cos.options());
  if (s.length <= kShort) {
    attend_short(s.lanes(), qkv.const_data_ptr<T>(), cos.const_data_ptr<float>(), sin.const_data_ptr<float>(),
                 out.mutable_data_ptr<T>(), log_sums.mutable_data_ptr<float>());
    return {out, log_sums};
  }
  const int64_t stride = s.key_stride(), floats = 3 * s.matrix() + stride * (s.width + kBlock) + kBlock * s.width;
  for_each_task(s.batch * s.heads, floats, [&](int64_t task, float* memory) {
    const int64_t sample = task / s.heads, head = task % s.heads;
    Cutter scratch{memory};
    float *q = scratch.take(s.matrix()), *k = scratch.take(s.matrix()), *v = scratch.take(s.matrix());
    float *k_t = scratch.take(s.width * stride), *scores = scratch.take(kBlock * stride);
    float* mixed = scratch.take(kBlock * s.width);
    gather(qkv.const_data_ptr<T>() + sample * s.length * s.position() + head * s.width, s,
           cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), q, k, v);
    T* to = out.mutable_data_ptr<T>() + sample * s.length * s.part() + head * s.width;
    float* logs = log_sums.mutable_data_ptr<float>() + (sample * s.heads + head) * s.length;
    transpose(k, s.padded, s.width, stride, k_t);
    for (int64_t first = 0; first < s.padded; first += kBlock) {
      const int64_t keys = first + kBlock, last = std::min(s.length, keys);
      multiply<false, false>(kBlock, keys, s.width, q + first * s.width, s.width, k_t, stride, scores, stride);
      float factors[kBlock];
      for (int64_t i = first; i < last; ++i) {
        float* row = scores + (i - first) * stride;
        __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        for (int64_t j = 0; j <= i; j += 16)
          top = _mm512_mask_max_ps(top, seen(i, j), top, _mm512_loadu_ps(row + j));
        const float largest = _mm512_reduce_max_ps(top);
        __m512 total = _mm512_setzero_ps();
        for (int64_t j = 0; j < keys; j += 16) {
          const __m512 x = _mm512_sub_ps(_mm512_loadu_ps(row + j), _mm512_set1_ps(largest));
          const __m512 weight = _mm512_maskz_mov_ps(seen(i, j), exp_nonpositive(x));
          total = _mm512_add_ps(total, weight);
          _mm512_storeu_ps(row + j, weight);
        }
        const float sum = _mm512_reduce_add_ps(total);
        factors[i - first] = 1.0f / sum;
        logs[i] = largest + std::log(sum);
      }
      multiply<false, false>(kBlock, s.width, keys, scores, stride, v, s.width, mixed, s.width);
      for (int64_t i = first; i < last; ++i)
        for (int64_t d = 0; d < s.width; d += 16) {
          const __m512 sum = _mm512_loadu_ps(mixed + (i - first) * s.width + d);
          store(0xffff, to + i * s.part() + d, _mm512_mul_ps(sum, _mm512_set1_ps(factors[i - first])));
        }
    }
  });
  return {out, log_sums};
}

template <typename T>
Tensor attend_backward(const Tensor& grad_in, const Tensor& qkv_in, const Tensor& cos_in, const Tensor& sin_in,
                       const Tensor& log_sums_in) {
  const Tensor grad = grad_in.contiguous(), qkv = qkv_in.contiguous(), cos = cos_in.contiguous();
  const Tensor sin = sin_in.contiguous(), log_sums = log_sums_in.contiguous();
  const Shape s(qkv);
  Tensor grad_qkv = at::empty_like(qkv);
  if (s.length <= kShort) {
    attend_short_backward(s.lanes(), grad.const_data_ptr<T>(), qkv.const_data_ptr<T>(), cos.const_data_ptr<float>(),
                          sin.const_data_ptr<float>(), log_sums.const_data_ptr<float>(),
                          grad_qkv.mutable_data_ptr<T>());
    return grad_qkv;
  }
  const int64_t stride = s.key_stride(), floats = 7 * s.matrix() + 2 * stride * (s.width + kBlock) + s.padded;
  for_each_task(s.batch * s.heads, floats, [&](int64_t task, float* memory) {
    const int64_t sample = task / s.heads, head = task % s.heads;
    Cutter scratch{memory};
    float *q = scratch.take(s.matrix()), *k = scratch.take(s.matrix()), *v = scratch.take(s.matrix());
    float *k_t = scratch.take(s.width * stride), *v_t = scratch.take(s.width * stride);
    float* d_out = scratch.take(s.matrix());
    float *d_q = scratch.take(s.matrix()), *d_k = scratch.take(s.matrix()), *d_v = scratch.take(s.matrix());
    float *weights = scratch.take(kBlock * stride), *d_scores = scratch.take(kBlock * stride);
    float* logs = scratch.take(s.padded);
    const int64_t offset = sample * s.length * s.position() + head * s.width;
    const float *cosines = cos.const_data_ptr<float>(), *sines = sin.const_data_ptr<float>();
    gather(qkv.const_data_ptr<T>() + offset, s, cosines, sines, q, k, v);
    std::memset(d_k, 0, s.matrix() * sizeof(float));
    std::memset(d_v, 0, s.matrix() * sizeof(float));
    std::memset(d_out, 0, s.matrix() * sizeof(float));
    std::memset(logs, 0, s.padded * sizeof(float));
    std::memcpy(logs, log_sums.const_data_ptr<float>() + (sample * s.heads + head) * s.length,
                s.length * sizeof(float));
    for (int64_t t = 0; t < s.length; ++t) {
      const int64_t at = (sample * s.length + t) * s.part() + head * s.width;
      convert(grad.const_data_ptr<T>() + at, s.width, d_out + t * s.width);
    }
    transpose(k, s.padded, s.width, stride, k_t);
    transpose(v, s.padded, s.width, stride, v_t);
    for (int64_t first = 0; first < s.padded; first += kBlock) {
      const int64_t keys = first + kBlock;
      const float *q_own = q + first * s.width, *d_own = d_out + first * s.width;
      multiply<false, false>(kBlock, keys, s.width, q_own, s.width, k_t, stride, weights, stride);
      multiply<false, false>(kBlock, keys, s.width, d_own, s.width, v_t, stride, d_scores, stride);
      for (int64_t i = first; i < keys; ++i) {
        float *weight = weights + (i - first) * stride, *d_score = d_scores + (i - first) * stride;
        const __m512 log = _mm512_set1_ps(logs[i]);
        // The mean of the row's d_score by its weights. Equal to grad * out, but not by an out that may have
        // been rounded to bf16.
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < keys; j += 16) {
          const __m512 p = _mm512_maskz_mov_ps(
              seen(i, j), exp_nonpositive(_mm512_sub_ps(_mm512_loadu_ps(weight + j), log)));
          _mm512_storeu_ps(weight + j, p);
          sum = _mm512_fmadd_ps(p, _mm512_loadu_ps(d_score + j), sum);
        }
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
        for (int64_t j = 0; j < keys; j += 16) {
          const __m512 off = _mm512_sub_ps(_mm512_loadu_ps(d_score + j), mean);
          _mm512_storeu_ps(d_score + j, _mm512_mul_ps(_mm512_loadu_ps(weight + j), off));
        }
      }
      multiply<true, true>(keys, s.width, kBlock, weights, stride, d_own, s.width, d_v, s.width);
      multiply<true, true>(keys, s.width, kBlock, d_scores, stride, q_own, s.width, d_k, s.width);
      multiply<false, false>(kBlock, s.width, keys, d_scores, stride, k, s.width, d_q + first * s.width, s.width);
    }
    const float scale = 1.0f / std::sqrt(static_cast<float>(s.width));
    T* to = grad_qkv.mutable_data_ptr<T>() + offset;
    for (int64_t t = 0; t < s.length; ++t) {
      const float *c = cosines + t * s.width, *n = sines + t * s.width;
      rotate(d_q + t * s.width, c, n, -1, scale, s.width, to + t * s.position());
      rotate(d_k + t * s.width, c, n, -1, 1, s.width, to + t * s.position() + s.part());
      convert(d_v + t * s.width, s.width, to + t * s.position() + 2 * s.part());
    }
  });
  return grad_qkv;
}

std::tuple<Tensor, Tensor> causal_attention(const Tensor& qkv, const Tensor& cos, const Tensor& sin) {
  return with_element(qkv.scalar_type(),
                      [&](auto element) { return attend<decltype(element)>(qkv, cos, sin); });
}

Tensor causal_attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                                 const Tensor& log_sums) {
  return with_element(qkv.scalar_type(), [&](auto element) {
    return attend_backward<decltype(element)>(grad, qkv, cos, sin, log_sums);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(forge, CPU, m) {
  m.impl("causal_attention", &causal_attention);
  m.impl("causal_attention_backward", &causal_attention_backward);
}

}  // namespace forge
