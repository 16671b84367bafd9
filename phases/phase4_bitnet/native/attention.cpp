// Causal self-attention with rotary positions, float32, from the fused projection and back to it.
//
// One (sample, head) at a time is gathered into scratch that stays in L2, rotated on the way, and worked on
// in blocks of queries against all the keys they may see. Nothing is permuted in memory, keys after the
// block are never multiplied, and backward keeps only the log of the softmax's sums.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <immintrin.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

namespace forge {
namespace {

using at::Tensor;

constexpr int64_t kBlock = 32;  // queries a block; also what the length is padded to
constexpr int64_t kRows = 8;    // rows of a product in registers

// C (+)= A B for kRows rows and Vectors * 16 columns; A(r, k) at a + r * row_stride + k * step.
template <int Vectors, bool Accumulate>
inline void multiply_tile(int64_t inner, const float* a, int64_t row_stride, int64_t step, const float* b,
                          int64_t b_stride, float* c, int64_t c_stride) {
  __m512 sum[kRows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v)
      sum[r][v] = Accumulate ? _mm512_loadu_ps(c + r * c_stride + v * 16) : _mm512_setzero_ps();
  for (int64_t k = 0; k < inner; ++k) {
    __m512 right[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) right[v] = _mm512_loadu_ps(b + k * b_stride + v * 16);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512 left = _mm512_set1_ps(a[r * row_stride + k * step]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_fmadd_ps(left, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(c + r * c_stride + v * 16, sum[r][v]);
}

// rows in multiples of kRows, columns of 16.
template <bool Accumulate>
void multiply(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t row_stride, int64_t step,
              const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  for (int64_t j = 0; j < columns;) {
    const bool wide = columns - j >= 32;
    for (int64_t i = 0; i < rows; i += kRows) {
      const float* left = a + i * row_stride;
      float* out = c + i * c_stride + j;
      if (wide)
        multiply_tile<2, Accumulate>(inner, left, row_stride, step, b + j, b_stride, out, c_stride);
      else
        multiply_tile<1, Accumulate>(inner, left, row_stride, step, b + j, b_stride, out, c_stride);
    }
    j += wide ? 32 : 16;
  }
}

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

struct Shape {
  int64_t batch, length, heads, width, padded;

  explicit Shape(const Tensor& qkv)
      : batch(qkv.size(0)), length(qkv.size(1)), heads(qkv.size(3)), width(qkv.size(4)),
        padded((length + kBlock - 1) / kBlock * kBlock) {}
  int64_t matrix() const { return padded * width; }
  // Floats from one position of the projection to the next, and from q to k and k to v.
  int64_t position() const { return 3 * heads * width; }
  int64_t part() const { return heads * width; }
};

// Rotate row x by its position: the "rotate half" layout. `turn` is 1, or -1 for the gradient.
inline void rotate(const float* x, const float* cos, const float* sin, float turn, float factor, int64_t width,
                   float* out) {
  const int64_t half = width / 2;
  for (int64_t d = 0; d < half; ++d) {
    // Both halves of the tables are equal, so the transpose of the rotation is the rotation back.
    const float c = cos[d] * factor, s = sin[d] * factor * turn;
    const float first = x[d], second = x[d + half];
    out[d] = first * c - second * s;
    out[d + half] = second * c + first * s;
  }
}

// (padded, width) -> (width, padded)
void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t r = 0; r < 16; ++r) to[j * rows + i + r] = from[(i + r) * columns + j];
}

struct Scratch {
  std::unique_ptr<float[]> memory;
  float* next;

  explicit Scratch(int64_t floats) : memory(new float[floats]), next(memory.get()) {}
  float* take(int64_t floats) {
    float* own = next;
    next += floats;
    return own;
  }
};

// One head's queries (scaled) and keys, rotated, and its values; rows past the length are zero.
void gather(const float* qkv, const Shape& s, const float* cos, const float* sin, float* q, float* k, float* v) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.width));
  for (int64_t t = 0; t < s.length; ++t) {
    const float* own = qkv + t * s.position();
    rotate(own, cos + t * s.width, sin + t * s.width, 1, scale, s.width, q + t * s.width);
    rotate(own + s.part(), cos + t * s.width, sin + t * s.width, 1, 1, s.width, k + t * s.width);
    std::memcpy(v + t * s.width, own + 2 * s.part(), s.width * sizeof(float));
  }
  for (float* each : {q, k, v})
    std::memset(each + s.length * s.width, 0, (s.padded - s.length) * s.width * sizeof(float));
}

inline __mmask16 seen(int64_t row, int64_t column) {
  const int64_t count = row - column + 1;  // keys up to the query's own position
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

template <typename Task>
void for_each_head(const Shape& s, const Task& task) {
  at::parallel_for(0, s.batch * s.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i / s.heads, i % s.heads);
  });
}

std::tuple<Tensor, Tensor> causal_attention(const Tensor& qkv_in, const Tensor& cos_in, const Tensor& sin_in) {
  const Tensor qkv = qkv_in.contiguous(), cos = cos_in.contiguous(), sin = sin_in.contiguous();
  const Shape s(qkv);
  Tensor out = at::empty({s.batch, s.length, s.part()}, qkv.options());
  Tensor log_sums = at::empty({s.batch, s.heads, s.length}, qkv.options());
  for_each_head(s, [&](int64_t sample, int64_t head) {
    Scratch scratch(4 * s.matrix() + kBlock * (s.padded + s.width));
    float *q = scratch.take(s.matrix()), *k = scratch.take(s.matrix()), *v = scratch.take(s.matrix());
    float *k_t = scratch.take(s.matrix()), *scores = scratch.take(kBlock * s.padded);
    float* mixed = scratch.take(kBlock * s.width);
    gather(qkv.const_data_ptr<float>() + sample * s.length * s.position() + head * s.width, s,
           cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), q, k, v);
    transpose(k, s.padded, s.width, k_t);
    float* to = out.mutable_data_ptr<float>() + sample * s.length * s.part() + head * s.width;
    float* logs = log_sums.mutable_data_ptr<float>() + (sample * s.heads + head) * s.length;
    for (int64_t first = 0; first < s.padded; first += kBlock) {
      const int64_t keys = first + kBlock, last = std::min(s.length, keys);
      multiply<false>(kBlock, keys, s.width, q + first * s.width, s.width, 1, k_t, s.padded, scores, keys);
      float factors[kBlock];
      for (int64_t i = first; i < last; ++i) {
        float* row = scores + (i - first) * keys;
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
      multiply<false>(kBlock, s.width, keys, scores, keys, 1, v, s.width, mixed, s.width);
      for (int64_t i = first; i < last; ++i)
        for (int64_t d = 0; d < s.width; ++d)
          to[i * s.part() + d] = mixed[(i - first) * s.width + d] * factors[i - first];
    }
  });
  return {out, log_sums};
}

Tensor causal_attention_backward(const Tensor& grad_in, const Tensor& qkv_in, const Tensor& cos_in,
                                 const Tensor& sin_in, const Tensor& out_in, const Tensor& log_sums_in) {
  const Tensor grad = grad_in.contiguous(), qkv = qkv_in.contiguous(), cos = cos_in.contiguous();
  const Tensor sin = sin_in.contiguous(), out = out_in.contiguous(), log_sums = log_sums_in.contiguous();
  const Shape s(qkv);
  Tensor grad_qkv = at::empty_like(qkv);
  for_each_head(s, [&](int64_t sample, int64_t head) {
    Scratch scratch(9 * s.matrix() + 2 * kBlock * s.padded + 2 * s.padded);
    float *q = scratch.take(s.matrix()), *k = scratch.take(s.matrix()), *v = scratch.take(s.matrix());
    float *k_t = scratch.take(s.matrix()), *v_t = scratch.take(s.matrix()), *d_out = scratch.take(s.matrix());
    float *d_q = scratch.take(s.matrix()), *d_k = scratch.take(s.matrix()), *d_v = scratch.take(s.matrix());
    float *weights = scratch.take(kBlock * s.padded), *d_scores = scratch.take(kBlock * s.padded);
    float *logs = scratch.take(s.padded), *deltas = scratch.take(s.padded);
    const int64_t offset = sample * s.length * s.position() + head * s.width;
    const float *cosines = cos.const_data_ptr<float>(), *sines = sin.const_data_ptr<float>();
    gather(qkv.const_data_ptr<float>() + offset, s, cosines, sines, q, k, v);
    transpose(k, s.padded, s.width, k_t);
    transpose(v, s.padded, s.width, v_t);
    std::memset(d_k, 0, s.matrix() * sizeof(float));
    std::memset(d_v, 0, s.matrix() * sizeof(float));
    std::memset(d_out, 0, s.matrix() * sizeof(float));
    std::memset(logs, 0, 2 * s.padded * sizeof(float));
    std::memcpy(logs, log_sums.const_data_ptr<float>() + (sample * s.heads + head) * s.length,
                s.length * sizeof(float));
    for (int64_t t = 0; t < s.length; ++t) {
      const int64_t at = (sample * s.length + t) * s.part() + head * s.width;
      const float *own = grad.const_data_ptr<float>() + at, *result = out.const_data_ptr<float>() + at;
      std::memcpy(d_out + t * s.width, own, s.width * sizeof(float));
      __m512 product = _mm512_setzero_ps();
      for (int64_t d = 0; d < s.width; d += 16)
        product = _mm512_fmadd_ps(_mm512_loadu_ps(own + d), _mm512_loadu_ps(result + d), product);
      deltas[t] = _mm512_reduce_add_ps(product);
    }
    for (int64_t first = 0; first < s.padded; first += kBlock) {
      const int64_t keys = first + kBlock;
      const float *q_own = q + first * s.width, *d_own = d_out + first * s.width;
      multiply<false>(kBlock, keys, s.width, q_own, s.width, 1, k_t, s.padded, weights, keys);
      multiply<false>(kBlock, keys, s.width, d_own, s.width, 1, v_t, s.padded, d_scores, keys);
      for (int64_t i = first; i < keys; ++i) {
        float *weight = weights + (i - first) * keys, *d_score = d_scores + (i - first) * keys;
        const __m512 log = _mm512_set1_ps(logs[i]), delta = _mm512_set1_ps(deltas[i]);
        for (int64_t j = 0; j < keys; j += 16) {
          const __m512 p = _mm512_maskz_mov_ps(
              seen(i, j), exp_nonpositive(_mm512_sub_ps(_mm512_loadu_ps(weight + j), log)));
          _mm512_storeu_ps(weight + j, p);
          _mm512_storeu_ps(d_score + j, _mm512_mul_ps(p, _mm512_sub_ps(_mm512_loadu_ps(d_score + j), delta)));
        }
      }
      multiply<true>(keys, s.width, kBlock, weights, 1, keys, d_own, s.width, d_v, s.width);
      multiply<true>(keys, s.width, kBlock, d_scores, 1, keys, q_own, s.width, d_k, s.width);
      multiply<false>(kBlock, s.width, keys, d_scores, keys, 1, k, s.width, d_q + first * s.width, s.width);
    }
    const float scale = 1.0f / std::sqrt(static_cast<float>(s.width));
    float* to = grad_qkv.mutable_data_ptr<float>() + offset;
    for (int64_t t = 0; t < s.length; ++t) {
      const float *c = cosines + t * s.width, *n = sines + t * s.width;
      rotate(d_q + t * s.width, c, n, -1, scale, s.width, to + t * s.position());
      rotate(d_k + t * s.width, c, n, -1, 1, s.width, to + t * s.position() + s.part());
      std::memcpy(to + t * s.position() + 2 * s.part(), d_v + t * s.width, s.width * sizeof(float));
    }
  });
  return grad_qkv;
}

}  // namespace

TORCH_LIBRARY_IMPL(forge, CPU, m) {
  m.impl("causal_attention", &causal_attention);
  m.impl("causal_attention_backward", &causal_attention_backward);
}

}  // namespace forge
