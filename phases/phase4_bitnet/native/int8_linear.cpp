// The three products of a ternary linear layer, each with its quantization and scaling in the same pass.
//
// Formulas and rounding are those of phase4_bitnet/layers.py, to the bit; see int8_gemm.h for the products.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "elements.h"
#include "int8_gemm.h"
#include "quantize.h"

namespace forge {
namespace {

using at::Tensor;

constexpr int64_t kLeftBlock = 24 * kTileRows;  // rows that stay in L2 while the panels go by
Tensor empty_bytes(int64_t count) { return at::empty({count}, at::TensorOptions().dtype(at::kByte)); }

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x_in, double floor) {
  const Tensor x = x_in.contiguous();
  const int64_t m = x.size(0), k = x.size(1);
  Tensor rows = at::empty({m, k}, x.options().dtype(at::kChar));
  Tensor scale = at::empty({m, 1}, x.options().dtype(at::kFloat));
  int8_t* to = rows.mutable_data_ptr<int8_t>();
  float* scales = scale.mutable_data_ptr<float>();
  const int64_t block = std::max<int64_t>(1, 32768 / std::max<int64_t>(k, 1));
  with_element(x.scalar_type(), [&](auto element) {
    const auto* from = x.const_data_ptr<decltype(element)>();
    for_each_task(ceil_div(m, block), [&](int64_t task) {
      for (int64_t i = task * block; i < std::min(m, (task + 1) * block); ++i)
        scales[i] = quantize_row(from + i * k, k, static_cast<float>(floor), to + i * k);
    });
  });
  return {rows, scale};
}

// out[i, j] = (sum_d left[i, d] * right[d, j]) * (row_scale[i] * scale), int32 sums, rounded once to the element of out.
//
// left: (m, stride) signed bytes of which `depth` count, zeros from there to the next multiple of four.
// packed: panels of the right operand, shifted by `offset`.
template <typename Out>
void multiply_scaled(const int8_t* left, int64_t stride, int64_t m, int64_t depth, const uint8_t* packed,
                     int64_t columns, int32_t offset, const float* row_scale, float scale, Out* out) {
  const int64_t steps = ceil_div(depth, 4), panels = ceil_div(columns, kTileColumns);
  const int64_t panel_bytes = steps * kTileColumns * 4, blocks = ceil_div(m, kLeftBlock);
  if (!blocks || !panels) return;
  // A few rows alone are shared out by columns.
  const int64_t parts = std::min(panels, ceil_div(2 * at::get_num_threads(), blocks));
  for_each_task(blocks * parts, [&](int64_t task) {
    const int64_t block = task / parts, part = task % parts;
    const int64_t row_end = std::min(m, (block + 1) * kLeftBlock);
    int32_t shift[kLeftBlock];
    for (int64_t i = block * kLeftBlock; i < row_end; ++i)
      shift[i - block * kLeftBlock] = offset * sum_of_bytes(left + i * stride, depth);
    for (int64_t panel = part * panels / parts; panel < (part + 1) * panels / parts; ++panel) {
      for (int64_t i = block * kLeftBlock; i < row_end; i += kTileRows) {
        const int64_t rows = std::min(kTileRows, row_end - i);
        __m512i sums[kTileRows][kVectors];
        multiply_rows(rows, left + i * stride, stride, 4, packed + panel * panel_bytes, steps, sums);
        for (int64_t r = 0; r < rows; ++r) {
          const __m512i own = _mm512_set1_epi32(shift[i + r - block * kLeftBlock]);
          const __m512 factor = _mm512_set1_ps(row_scale[i + r] * scale);
          for (int64_t v = 0; v < kVectors; ++v) {
            const int64_t column = panel * kTileColumns + v * 16;
            if (column >= columns) break;
            const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][v], own));
            store(tail_mask(columns - column), out + (i + r) * columns + column, _mm512_mul_ps(exact, factor));
          }
        }
      }
    }
  });
}

// rows with the depth padded to a multiple of four by zeros; the same memory where nothing is to be added.
Tensor padded_rows(const Tensor& rows) {
  const int64_t m = rows.size(0), k = rows.size(1), stride = ceil_div(k, 4) * 4;
  if (stride == k) return rows.contiguous();
  const Tensor own = rows.contiguous();
  Tensor padded = at::empty({m, stride}, own.options());
  int8_t* to = padded.mutable_data_ptr<int8_t>();
  const int8_t* from = own.const_data_ptr<int8_t>();
  for (int64_t i = 0; i < m; ++i) {
    std::memcpy(to + i * stride, from + i * k, k);
    std::memset(to + i * stride + k, 0, stride - k);
  }
  return padded;
}

Tensor int8_linear(const Tensor& rows, const Tensor& row_scale, const Tensor& codes, const Tensor& scale,
                   at::ScalarType dtype) {
  const int64_t m = rows.size(0), k = rows.size(1), n = codes.size(0);
  Tensor out = at::empty({m, n}, row_scale.options().dtype(dtype));
  const Tensor left = padded_rows(rows), weight = codes.contiguous(), scales = row_scale.contiguous();
  const int64_t panels = ceil_div(n, kTileColumns), panel_bytes = ceil_div(k, 4) * kTileColumns * 4;
  Tensor packed = empty_bytes(panels * panel_bytes);
  uint8_t* to = packed.mutable_data_ptr<uint8_t>();
  for_each_task(panels, [&](int64_t panel) {
    pack_transposed(weight.const_data_ptr<int8_t>(), n, k, panel * kTileColumns, 1, to + panel * panel_bytes);
  });
  with_element(dtype, [&](auto element) {
    multiply_scaled(left.const_data_ptr<int8_t>(), left.size(1), m, k, to, n, 1,
                    scales.const_data_ptr<float>(), *scale.const_data_ptr<float>(),
                    out.mutable_data_ptr<decltype(element)>());
  });
  return out;
}

// dx[i, d] = (sum_j q[i, j] * codes[j, d]) * (q_scale[i] * scale)
Tensor input_gradient(const Tensor& q, const Tensor& q_scale, int64_t n, const Tensor& codes, float scale,
                      at::ScalarType dtype) {
  const int64_t m = q.size(0), k = codes.size(1);
  Tensor out = at::empty({m, k}, q_scale.options().dtype(dtype));
  const int64_t panels = ceil_div(k, kTileColumns), panel_bytes = ceil_div(n, 4) * kTileColumns * 4;
  Tensor packed = empty_bytes(panels * panel_bytes);
  uint8_t* to = packed.mutable_data_ptr<uint8_t>();
  for_each_task(panels, [&](int64_t panel) {
    pack_interleaved(codes.const_data_ptr<int8_t>(), n, k, panel * kTileColumns, 1, to + panel * panel_bytes);
  });
  with_element(dtype, [&](auto element) {
    multiply_scaled(q.const_data_ptr<int8_t>(), q.size(1), m, n, to, k, 1, q_scale.const_data_ptr<float>(),
                    scale, out.mutable_data_ptr<decltype(element)>());
  });
  return out;
}

// Both operands of the weight gradient in the order in which they are read, block of rows by block.
struct FoldedGradient {
  Tensor left;    // the gradient times the input's row scale: [block][n tile][step][kTileRows][4] int8
  Tensor right;   // the input, shifted by 128: [panel][block][step][kTileColumns][4]
  Tensor scales;  // [block][n_padded] float32, of the left one's columns
  Tensor sums;    // [block][n_padded] int32, sums of its bytes by column
  int64_t block, blocks, block_steps, n_padded;

  FoldedGradient(int64_t m, int64_t n, int64_t k, int64_t block, const at::TensorOptions& options)
      : block(block), blocks(ceil_div(m, block)), block_steps(ceil_div(block, 8) * 2), n_padded(ceil_div(n, 16) * 16) {
    const int64_t steps = blocks * block_steps;
    left = at::empty({steps * n_padded * 4}, options.dtype(at::kChar));
    right = empty_bytes(ceil_div(k, kTileColumns) * steps * kTileColumns * 4);
    scales = at::empty({blocks, n_padded}, options);
    sums = at::empty({blocks, n_padded}, options.dtype(at::kInt));
  }
  int64_t left_tile() const { return block_steps * kTileRows * 4; }
  int64_t right_block() const { return block_steps * kTileColumns * 4; }
};

// The largest magnitude of x * factor by column, as bits, into `top`.
template <typename T>
void raise_columns(const T* x, int64_t count, float factor, uint32_t* top) {
  const __m512 by = _mm512_set1_ps(factor);
  for (int64_t j = 0; j < count; j += 16) {
    const __mmask16 mask = tail_mask(count - j);
    const __m512 folded = _mm512_mul_ps(load(mask, x + j), by);
    _mm512_storeu_si512(top + j, _mm512_max_epu32(_mm512_loadu_si512(top + j), magnitude_bits(folded)));
  }
}

// Four rows of 16 columns, times their row scales and the columns' factors, rounded: one dword a column.
template <typename T>
inline __m512i fold_four(const T* grad, int64_t n, const float* row_scale, int64_t rows, __mmask16 mask,
                         __m512 factor) {
  __m512i four = _mm512_setzero_si512();
  const __m512i low = _mm512_set1_epi32(0xff);
  for (int64_t r = 0; r < std::min<int64_t>(rows, 4); ++r) {
    const __m512 folded = _mm512_mul_ps(load(mask, grad + r * n), _mm512_set1_ps(row_scale[r]));
    const __m512i q = _mm512_and_si512(_mm512_cvtps_epi32(_mm512_mul_ps(folded, factor)), low);
    four = _mm512_or_si512(four, _mm512_sll_epi32(q, _mm_cvtsi32_si128(static_cast<int>(8 * r))));
  }
  return four;
}

// Quantize one block of `count` rows by column. `top` holds the columns' largest magnitudes as bits and is
// overwritten by their factors. Rows are taken eight at a time: two steps of a tile fill a cache line.
template <typename T>
void fold_block(const T* grad, const float* row_scale, int64_t n, int64_t count, float floor, uint32_t* top,
                int64_t block_steps, int8_t* left, float* scales, int32_t* sums) {
  auto* factors = reinterpret_cast<float*>(top);
  const __m512 most = _mm512_set1_ps(kInt8Max), least = _mm512_set1_ps(floor);
  for (int64_t j = 0; j < n; j += 16) {
    __m512 largest = _mm512_castsi512_ps(_mm512_loadu_si512(top + j));
    largest = _mm512_mask_mov_ps(largest, _mm512_cmp_ps_mask(largest, least, _CMP_LT_OQ), least);
    _mm512_storeu_ps(scales + j, _mm512_div_ps(largest, most));
    _mm512_storeu_ps(factors + j, _mm512_mul_ps(_mm512_div_ps(_mm512_set1_ps(1.0f), largest), most));
    _mm512_storeu_si512(sums + j, _mm512_setzero_si512());
  }
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < count; i += 8)
    for (int64_t j = 0; j < n; j += 16) {
      const __mmask16 mask = tail_mask(n - j);
      const __m512 factor = _mm512_loadu_ps(factors + j);
      const T* from = grad + i * n + j;
      const __m512i first = fold_four(from, n, row_scale + i, count - i, mask, factor);
      const __m512i second = fold_four(from + 4 * n, n, row_scale + i + 4, count - i - 4, mask, factor);
      const __m512i sum = _mm512_dpbusd_epi32(_mm512_loadu_si512(sums + j), ones, first);
      _mm512_storeu_si512(sums + j, _mm512_dpbusd_epi32(sum, ones, second));
      int8_t* to = left + (j / kTileRows * block_steps + i / 4) * kTileRows * 4;
      _mm512_storeu_si512(to, _mm512_shuffle_i64x2(first, second, 0x44));
      _mm512_storeu_si512(to + block_steps * kTileRows * 4, _mm512_shuffle_i64x2(first, second, 0xee));
    }
}

// dW[j, d] = sum over blocks of (sum_i q[i, j] * rows[i, d]) * q_scale[block, j]
Tensor weight_gradient(const FoldedGradient& q, int64_t m, int64_t n, int64_t k, const at::TensorOptions& options) {
  Tensor out = at::empty({n, k}, options);
  const int8_t* left = q.left.const_data_ptr<int8_t>();
  const uint8_t* right = q.right.const_data_ptr<uint8_t>();
  const float* scales = q.scales.const_data_ptr<float>();
  const int32_t* sums_of = q.sums.const_data_ptr<int32_t>();
  float* to = out.mutable_data_ptr<float>();
  const int64_t panels = ceil_div(k, kTileColumns), tiles = ceil_div(n, kTileRows);
  const int64_t group = std::max<int64_t>(1, tiles / (4 * at::get_num_threads()));
  for_each_task(ceil_div(tiles, group), [&](int64_t task) {
    // A block of the right panel stays in L1 while the tiles go by; the sums gather in the output.
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t block = 0; block < q.blocks; ++block) {
        const int64_t steps = ceil_div(std::min(q.block, m - block * q.block), 4);
        const uint8_t* own_right = right + (panel * q.blocks + block) * q.right_block();
        for (int64_t tile = task * group; tile < std::min(tiles, (task + 1) * group); ++tile) {
          __m512i sums[kTileRows][kVectors];
          multiply_tile<kTileRows>(left + block * q.n_padded * q.block_steps * 4 + tile * q.left_tile(), 4,
                                   kTileRows * 4, own_right, steps, sums);
          const int64_t count = std::min(kTileRows, n - tile * kTileRows);
          for (int64_t r = 0; r < count; ++r) {
            const int64_t at = block * q.n_padded + tile * kTileRows + r;
            const __m512i own = _mm512_set1_epi32(128 * sums_of[at]);
            const __m512 factor = _mm512_set1_ps(scales[at]);
            for (int64_t v = 0; v < kVectors; ++v) {
              const int64_t column = panel * kTileColumns + v * 16;
              if (column >= k) break;
              const __mmask16 mask = tail_mask(k - column);
              float* sum = to + (tile * kTileRows + r) * k + column;
              __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][v], own)), factor);
              if (block) part = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, sum), part);
              _mm512_mask_storeu_ps(sum, mask, part);
            }
          }
        }
      }
  });
  return out;
}

std::tuple<Tensor, Tensor> int8_linear_backward(const Tensor& grad_in, const Tensor& rows_in,
                                                const Tensor& row_scale_in, const Tensor& codes_in,
                                                const Tensor& scale, double floor_in, int64_t block,
                                                bool want_input, bool want_weight) {
  const Tensor grad = grad_in.contiguous(), rows = rows_in.contiguous(), codes = codes_in.contiguous();
  const Tensor row_scale = row_scale_in.contiguous();
  const int64_t m = grad.size(0), n = grad.size(1), k = codes.size(1), stride = ceil_div(n, 4) * 4;
  const float floor = static_cast<float>(floor_in);
  const at::TensorOptions floats = row_scale.options();
  const Tensor q = at::empty({want_input ? m : 0, stride}, rows.options());
  const Tensor q_scale = at::empty({want_input ? m : 0}, floats);
  const FoldedGradient folded(want_weight ? m : 0, n, k, block, floats);
  const float* scales = row_scale.const_data_ptr<float>();
  with_element(grad.scalar_type(), [&](auto element) {
    const auto* from = grad.const_data_ptr<decltype(element)>();
    for_each_task(ceil_div(m, block), folded.n_padded, [&](int64_t task, float* scratch) {
      const int64_t first = task * block, count = std::min(block, m - first);
      auto* top = reinterpret_cast<uint32_t*>(scratch);
      std::memset(top, 0, folded.n_padded * sizeof(uint32_t));
      for (int64_t i = first; i < first + count; ++i) {
        if (want_input) {
          int8_t* to = q.mutable_data_ptr<int8_t>() + i * stride;
          q_scale.mutable_data_ptr<float>()[i] = quantize_row(from + i * n, n, floor, to);
          std::memset(to + n, 0, stride - n);
        }
        if (want_weight) raise_columns(from + i * n, n, scales[i], top);
      }
      if (!want_weight) return;
      fold_block(from + first * n, scales + first, n, count, floor, top, folded.block_steps,
                 folded.left.mutable_data_ptr<int8_t>() + task * folded.n_padded * folded.block_steps * 4,
                 folded.scales.mutable_data_ptr<float>() + task * folded.n_padded,
                 folded.sums.mutable_data_ptr<int32_t>() + task * folded.n_padded);
      for (int64_t panel = 0; panel < ceil_div(k, kTileColumns); ++panel)
        pack_interleaved(rows.const_data_ptr<int8_t>() + first * k, count, k, panel * kTileColumns, -128,
                         folded.right.mutable_data_ptr<uint8_t>() + (panel * folded.blocks + task) * folded.right_block());
    });
  });
  const Tensor none = at::empty({0}, floats);
  return {want_input ? input_gradient(q, q_scale, n, codes, *scale.const_data_ptr<float>(), grad.scalar_type()) : none,
          want_weight ? weight_gradient(folded, m, n, k, floats) : none};
}

}  // namespace

TORCH_LIBRARY_IMPL(forge, CPU, m) {
  m.impl("quantize_rows", &quantize_rows);
  m.impl("int8_linear", &int8_linear);
  m.impl("int8_linear_backward", &int8_linear_backward);
}

}  // namespace forge
