// RMSNorm with its gradient, and the squared ReLU before it where there is one, each in one pass over memory.
//
// torch's CPU operator is made of elementwise ones, of which autograd keeps the intermediate results: outside of
// torch.compile a norm is fifteen passes over memory, and fresh memory for most of them.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <immintrin.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <optional>

#include "elements.h"
#include "parallel.h"
#include "quantize.h"

namespace forge {
namespace {

using at::Tensor;

// Rows whose share of the gain's gradient is added up together. Fixed, so that the sum does not depend on the
// number of threads.
constexpr int64_t kRowsATask = 64;

struct Rows {
  int64_t count, width, tasks;

  explicit Rows(const Tensor& x)
      : count(x.size(0)), width(x.size(1)), tasks((count + kRowsATask - 1) / kRowsATask) {}
};

// What is normalized: x, or relu(x) squared. NaN stays NaN.
template <bool Squared>
inline __m512 value_of(__m512 x) {
  if constexpr (!Squared) return x;
  const __m512 positive = _mm512_max_ps(_mm512_setzero_ps(), x);  // the second operand is returned where one is NaN
  return _mm512_mul_ps(positive, positive);
}

template <bool Squared, typename In, typename Out>
void normalize_row(const In* x, const float* gain, int64_t width, float eps, Out* out, float* inverse) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t d = 0; d < width; d += 16) {
    const __m512 value = value_of<Squared>(load(tail_mask(width - d), x + d));
    sum = _mm512_fmadd_ps(value, value, sum);
  }
  *inverse = 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(width) + eps);
  const __m512 by = _mm512_set1_ps(*inverse);
  for (int64_t d = 0; d < width; d += 16) {
    const __mmask16 mask = tail_mask(width - d);
    __m512 value = _mm512_mul_ps(value_of<Squared>(load(mask, x + d)), by);
    if (gain) value = _mm512_mul_ps(value, load(mask, gain + d));
    store(mask, out + d, value);
  }
}

// dx = r (g w - n mean(g w n)) with n = value * r, times the derivative of the squared ReLU where there is one;
// adds g n to `d_gain`.
template <bool Squared, typename In, typename Grad>
void normalize_row_backward(const Grad* grad, const In* x, const float* gain, int64_t width, float inverse, In* d_x,
                            float* d_gain) {
  const __m512 by = _mm512_set1_ps(inverse);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t d = 0; d < width; d += 16) {
    const __mmask16 mask = tail_mask(width - d);
    const __m512 normal = _mm512_mul_ps(value_of<Squared>(load(mask, x + d)), by);
    const __m512 product = _mm512_mul_ps(load(mask, grad + d), normal);
    if (gain) {
      store(mask, d_gain + d, _mm512_add_ps(load(mask, d_gain + d), product));
      sum = _mm512_fmadd_ps(product, load(mask, gain + d), sum);
    } else {
      sum = _mm512_add_ps(sum, product);
    }
  }
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / static_cast<float>(width));
  for (int64_t d = 0; d < width; d += 16) {
    const __mmask16 mask = tail_mask(width - d);
    const __m512 own = load(mask, x + d), normal = _mm512_mul_ps(value_of<Squared>(own), by);
    __m512 slope = load(mask, grad + d);
    if (gain) slope = _mm512_mul_ps(slope, load(mask, gain + d));
    __m512 out = _mm512_mul_ps(by, _mm512_fnmadd_ps(normal, mean, slope));
    if constexpr (Squared) {
      const __m512 positive = _mm512_max_ps(_mm512_setzero_ps(), own);
      out = _mm512_mul_ps(out, _mm512_add_ps(positive, positive));
    }
    store(mask, d_x + d, out);
  }
}

// Call work with whether to square, as a type.
template <typename Work>
auto with_squared(bool squared, const Work& work) {
  return squared ? work(std::true_type()) : work(std::false_type());
}

// The gain as it lies in memory for the kernels, which trust its length.
std::optional<Tensor> gain_of_width(const std::optional<Tensor>& gain, int64_t width) {
  if (!gain) return gain;
  TORCH_CHECK(gain->numel() == width, "the gain has ", gain->numel(), " elements and a row ", width);
  return gain->contiguous();
}

const float* data_or_null(const std::optional<Tensor>& gain) {
  return gain ? gain->const_data_ptr<float>() : nullptr;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_in, const std::optional<Tensor>& gain_in, double eps, bool squared,
                                    at::ScalarType dtype) {
  const Tensor x = x_in.contiguous();
  const Rows rows(x);
  const std::optional<Tensor> gain = gain_of_width(gain_in, rows.width);
  Tensor out = at::empty_like(x, x.options().dtype(dtype));
  Tensor inverse = at::empty({rows.count}, x.options().dtype(at::kFloat));
  with_squared(squared, [&](auto is_squared) {
    with_element(x.scalar_type(), [&](auto in) {
      with_element(dtype, [&](auto element) {
        const auto* from = x.const_data_ptr<decltype(in)>();
        auto* to = out.mutable_data_ptr<decltype(element)>();
        for_each_task(rows.tasks, [&](int64_t task) {
          for (int64_t i = task * kRowsATask; i < std::min(rows.count, (task + 1) * kRowsATask); ++i)
            normalize_row<decltype(is_squared)::value>(from + i * rows.width, data_or_null(gain), rows.width,
                                                       static_cast<float>(eps), to + i * rows.width,
                                                       inverse.mutable_data_ptr<float>() + i);
        });
      });
    });
  });
  return {out, inverse};
}

// The same, rounded to int8 by row before it is written: it is never in memory in float.
std::tuple<Tensor, Tensor, Tensor> rms_norm_quantize(const Tensor& x_in, const std::optional<Tensor>& gain_in,
                                                     double eps, bool squared, double floor) {
  const Tensor x = x_in.contiguous();
  const Rows rows(x);
  const std::optional<Tensor> gain = gain_of_width(gain_in, rows.width);
  Tensor out = at::empty_like(x, x.options().dtype(at::kChar));
  Tensor scale = at::empty({rows.count, 1}, x.options().dtype(at::kFloat));
  Tensor inverse = at::empty({rows.count}, x.options().dtype(at::kFloat));
  with_squared(squared, [&](auto is_squared) {
    with_element(x.scalar_type(), [&](auto in) {
      const auto* from = x.const_data_ptr<decltype(in)>();
      auto* to = out.mutable_data_ptr<int8_t>();
      for_each_task(rows.tasks, rows.width, [&](int64_t task, float* row) {
        for (int64_t i = task * kRowsATask; i < std::min(rows.count, (task + 1) * kRowsATask); ++i) {
          normalize_row<decltype(is_squared)::value>(from + i * rows.width, data_or_null(gain), rows.width,
                                                     static_cast<float>(eps), row,
                                                     inverse.mutable_data_ptr<float>() + i);
          scale.mutable_data_ptr<float>()[i] =
              quantize_row(row, rows.width, static_cast<float>(floor), to + i * rows.width);
        }
      });
    });
  });
  return {out, scale, inverse};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_in, const Tensor& x_in,
                                             const std::optional<Tensor>& gain_in, const Tensor& inverse,
                                             bool squared) {
  const Tensor grad = grad_in.contiguous(), x = x_in.contiguous();
  const Rows rows(x);
  const std::optional<Tensor> gain = gain_of_width(gain_in, rows.width);
  Tensor d_x = at::empty_like(x);
  Tensor d_gain = at::empty({gain ? rows.width : 0}, inverse.options());
  Tensor shares = at::empty({gain ? rows.tasks : 0, rows.width}, inverse.options());
  float *share = shares.mutable_data_ptr<float>(), *total = d_gain.mutable_data_ptr<float>();
  with_squared(squared, [&](auto is_squared) {
    with_element(x.scalar_type(), [&](auto in) {
      with_element(grad.scalar_type(), [&](auto element) {
        const auto* slopes = grad.const_data_ptr<decltype(element)>();
        const auto* from = x.const_data_ptr<decltype(in)>();
        auto* to = d_x.mutable_data_ptr<decltype(in)>();
        for_each_task(rows.tasks, [&](int64_t task) {
          float* own = gain ? share + task * rows.width : nullptr;
          if (gain) std::memset(own, 0, rows.width * sizeof(float));
          for (int64_t i = task * kRowsATask; i < std::min(rows.count, (task + 1) * kRowsATask); ++i)
            normalize_row_backward<decltype(is_squared)::value>(
                slopes + i * rows.width, from + i * rows.width, data_or_null(gain), rows.width,
                inverse.const_data_ptr<float>()[i], to + i * rows.width, own);
        });
      });
    });
  });
  if (gain) {
    std::memset(total, 0, rows.width * sizeof(float));
    for (int64_t task = 0; task < rows.tasks; ++task)
      for (int64_t d = 0; d < rows.width; ++d) total[d] += share[task * rows.width + d];
  }
  return {d_x, d_gain};
}

}  // namespace

TORCH_LIBRARY_IMPL(forge, CPU, m) {
  m.impl("rms_norm", &rms_norm);
  m.impl("rms_norm_quantize", &rms_norm_quantize);
  m.impl("rms_norm_backward", &rms_norm_backward);
}

}  // namespace forge
