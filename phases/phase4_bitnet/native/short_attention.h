// Causal self-attention with rotary positions for a few positions. A head of four positions has ten products of
// query and key: one vector along its width would be summed up for each of them. Here a vector holds one number
// of 16 (sample, head) pairs, so everything is elementwise; they are transposed on the way in and out.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "elements.h"
#include "parallel.h"
#include "vector_math.h"

namespace forge {

constexpr int64_t kShort = 16;  // most positions
constexpr int64_t kLanes = 16;

struct ShortShape {
  int64_t batch, length, heads, width;

  int64_t part() const { return heads * width; }
  int64_t groups() const { return (batch * heads + kLanes - 1) / kLanes; }
  // Floats of a row and of a matrix, of all lanes.
  int64_t row() const { return width * kLanes; }
  int64_t matrix() const { return length * row(); }
};

// Where the pairs of a group begin. Lanes past the last pair repeat the first; `count` are written.
struct Lanes {
  int64_t first, count, fused[kLanes], merged[kLanes];

  Lanes(const ShortShape& s, int64_t group) : first(group * kLanes) {
    count = std::min(kLanes, s.batch * s.heads - first);
    for (int64_t r = 0; r < kLanes; ++r) {
      const int64_t pair = r < count ? first + r : first;
      merged[r] = pair / s.heads * s.length * s.part() + pair % s.heads * s.width;
      fused[r] = pair / s.heads * s.length * 3 * s.part() + pair % s.heads * s.width;
    }
  }
};

inline __m512 lanes_at(const float* x, int64_t d) { return _mm512_loadu_ps(x + d * kLanes); }

template <typename T>
inline void take_row(const T* from, const int64_t* begins, int64_t width, float* to) {
  for (int64_t d = 0; d < width; d += 16) {
    __m512 block[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) block[r] = load(0xffff, from + begins[r] + d);
    transpose_16(block);
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) _mm512_storeu_ps(to + (d + c) * kLanes, block[c]);
  }
}

template <typename T>
inline void give_row(const float* from, const int64_t* begins, int64_t count, int64_t width, T* to) {
  for (int64_t d = 0; d < width; d += 16) {
    __m512 block[16];
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) block[c] = lanes_at(from, d + c);
    transpose_16(block);
    if (count == kLanes) {
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) store(0xffff, to + begins[r] + d, block[r]);
    } else {
      for (int64_t r = 0; r < count; ++r) store(0xffff, to + begins[r] + d, block[r]);
    }
  }
}

// Rotate a row in place by its position, times `factor`; `turn` is 1, or -1 for the gradient.
inline void turn_row(float* x, const float* cos, const float* sin, float turn, float factor, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t d = 0; d < half; ++d) {
    const __m512 c = _mm512_set1_ps(cos[d] * factor), s = _mm512_set1_ps(sin[d] * factor * turn);
    const __m512 low = lanes_at(x, d), high = lanes_at(x, half + d);
    _mm512_storeu_ps(x + d * kLanes, _mm512_fnmadd_ps(high, s, _mm512_mul_ps(low, c)));
    _mm512_storeu_ps(x + (half + d) * kLanes, _mm512_fmadd_ps(low, s, _mm512_mul_ps(high, c)));
  }
}

// to = factor * from, or to += that where it is not the first of a sum.
inline void add_row(bool first, __m512 factor, const float* from, int64_t width, float* to) {
  if (first) {
    for (int64_t d = 0; d < width; ++d) _mm512_storeu_ps(to + d * kLanes, _mm512_mul_ps(factor, lanes_at(from, d)));
  } else {
    for (int64_t d = 0; d < width; ++d)
      _mm512_storeu_ps(to + d * kLanes, _mm512_fmadd_ps(factor, lanes_at(from, d), lanes_at(to, d)));
  }
}

// The products of a row with rows 0 to `last` of a matrix, four at a time; past `last` they are not to be used.
inline void products(const float* row, const float* matrix, int64_t last, const ShortShape& s, __m512* out) {
  for (int64_t j = 0; j <= last; j += 4) {
    const float* key[4];
    __m512 sum[4];
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      key[u] = matrix + std::min(j + u, last) * s.row();
      sum[u] = _mm512_setzero_ps();
    }
    for (int64_t d = 0; d < s.width; ++d) {
      const __m512 x = lanes_at(row, d);
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) sum[u] = _mm512_fmadd_ps(x, lanes_at(key[u], d), sum[u]);
    }
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) out[j + u] = sum[u];
  }
}

// Queries (scaled) and keys, rotated, and values of a group.
template <typename T>
void take_group(const ShortShape& s, const Lanes& lanes, const T* qkv, const float* cos, const float* sin, float* q,
                float* k, float* v) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.width));
  const int64_t row = s.row();
  for (int64_t t = 0; t < s.length; ++t) {
    const T* own = qkv + t * 3 * s.part();
    take_row(own, lanes.fused, s.width, q + t * row);
    take_row(own + s.part(), lanes.fused, s.width, k + t * row);
    take_row(own + 2 * s.part(), lanes.fused, s.width, v + t * row);
    turn_row(q + t * row, cos + t * s.width, sin + t * s.width, 1, scale, s.width);
    turn_row(k + t * row, cos + t * s.width, sin + t * s.width, 1, 1, s.width);
  }
}

// log_sums: (batch, heads, length)
template <typename T>
void attend_short(const ShortShape& s, const T* qkv, const float* cos, const float* sin, T* out, float* log_sums) {
  const int64_t row = s.row();
  for_each_task(s.groups(), 3 * s.matrix() + row, [&](int64_t group, float* memory) {
    const Lanes lanes(s, group);
    float *q = memory, *k = q + s.matrix(), *v = k + s.matrix(), *mixed = v + s.matrix();
    take_group(s, lanes, qkv, cos, sin, q, k, v);
    for (int64_t i = 0; i < s.length; ++i) {
      __m512 weights[kShort];
      products(q + i * row, k, i, s, weights);
      __m512 top = weights[0], total = _mm512_setzero_ps();
      for (int64_t j = 1; j <= i; ++j) top = _mm512_max_ps(top, weights[j]);
      for (int64_t j = 0; j <= i; ++j) {
        weights[j] = exp_nonpositive(_mm512_sub_ps(weights[j], top));
        total = _mm512_add_ps(total, weights[j]);
      }
      const __m512 share = _mm512_div_ps(_mm512_set1_ps(1.0f), total);
      for (int64_t j = 0; j <= i; ++j) weights[j] = _mm512_mul_ps(weights[j], share);
      for (int64_t j = 0; j <= i; ++j) add_row(j == 0, weights[j], v + j * row, s.width, mixed);
      give_row(mixed, lanes.merged, lanes.count, s.width, out + i * s.part());
      alignas(64) float logs[kLanes];
      _mm512_store_ps(logs, _mm512_add_ps(top, log_from_one(total)));
      for (int64_t r = 0; r < lanes.count; ++r) log_sums[(lanes.first + r) * s.length + i] = logs[r];
    }
  });
}

template <typename T>
void attend_short_backward(const ShortShape& s, const T* grad, const T* qkv, const float* cos, const float* sin,
                           const float* log_sums, T* grad_qkv) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.width));
  const int64_t row = s.row();
  for_each_task(s.groups(), 5 * s.matrix() + 2 * row, [&](int64_t group, float* memory) {
    const Lanes lanes(s, group);
    float *q = memory, *k = q + s.matrix(), *v = k + s.matrix();
    float *d_k = v + s.matrix(), *d_v = d_k + s.matrix(), *d_out = d_v + s.matrix(), *d_q = d_out + row;
    take_group(s, lanes, qkv, cos, sin, q, k, v);
    for (int64_t i = 0; i < s.length; ++i) {
      take_row(grad + i * s.part(), lanes.merged, s.width, d_out);
      alignas(64) float logs[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        const int64_t pair = lanes.first + (r < lanes.count ? r : 0);
        logs[r] = log_sums[pair * s.length + i];
      }
      __m512 weights[kShort], d_scores[kShort], mean = _mm512_setzero_ps();
      products(q + i * row, k, i, s, weights);
      products(d_out, v, i, s, d_scores);
      for (int64_t j = 0; j <= i; ++j) {
        weights[j] = exp_nonpositive(_mm512_sub_ps(weights[j], _mm512_load_ps(logs)));
        mean = _mm512_fmadd_ps(weights[j], d_scores[j], mean);
      }
      for (int64_t j = 0; j <= i; ++j) d_scores[j] = _mm512_mul_ps(weights[j], _mm512_sub_ps(d_scores[j], mean));
      for (int64_t j = 0; j <= i; ++j) {
        // Key j is seen first by query j.
        add_row(j == i, weights[j], d_out, s.width, d_v + j * row);
        add_row(j == i, d_scores[j], q + i * row, s.width, d_k + j * row);
        add_row(j == 0, d_scores[j], k + j * row, s.width, d_q);
      }
      turn_row(d_q, cos + i * s.width, sin + i * s.width, -1, scale, s.width);
      give_row(d_q, lanes.fused, lanes.count, s.width, grad_qkv + i * 3 * s.part());
    }
    for (int64_t t = 0; t < s.length; ++t) {
      T* to = grad_qkv + t * 3 * s.part();
      turn_row(d_k + t * row, cos + t * s.width, sin + t * s.width, -1, 1, s.width);
      give_row(d_k + t * row, lanes.fused, lanes.count, s.width, to + s.part());
      give_row(d_v + t * row, lanes.fused, lanes.count, s.width, to + 2 * s.part());
    }
  });
}

}  // namespace forge
