// A linear layer on 2-bit codes: y = (int8(x) @ codes.T) * (scale_x * scale) + bias.
//
// Codes stay two bits wide until they are in a register, so one row reads a sixteenth of what float32 reads.
//
// Tile: 64 bytes hold 16 outputs by 16 inputs. Byte 4 * o + i holds, in its bit pair f, code + 1 of output o
// and input 4 * f + i. Masking one bit pair of a tile thus gives the 16 x 4 bytes that vpdpbusd multiplies
// with four activations, broadcast to all outputs. Code + 1 lies in {0, 1, 2} and is the unsigned operand;
// the sum of the activations, taken off at the end, undoes the 1.
//
// The bit pairs are masked and never shifted down: pair f counts 4**f times, in a sum of its own that is
// shifted once at the end.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace {

constexpr int64_t kTile = 16;  // outputs and inputs of a tile
constexpr int64_t kTileBytes = 64;
constexpr int kMaxRows = 6;  // rows that a tile is multiplied with while it is in registers
constexpr float kFloor = 1e-5f;  // SCALE_FLOOR of ternary.py
constexpr float kInt8Max = 127.0f;
// A thread that has fewer products, or values to quantize, costs more than it brings.
constexpr int64_t kGrain = 1 << 21;
constexpr int64_t kQuantizeGrain = 1 << 16;
constexpr int64_t kCachedBytes = 1 << 19;  // of tiles that all rows pass before the next ones

// What the kernel reads of the activations, all quantized.
struct Rows {
  const int8_t* codes;  // (rows, stride), zero where a row has ended
  int64_t stride;
  const int32_t* sums;  // (rows), of the codes
  const float* factors;  // (rows), scale_x * scale
};

__mmask16 first(int64_t count) {
  return count >= 16 ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
}

// quantize_rows of ternary.py for one row, bit for bit; returns the sum of the codes.
int32_t quantize_row(const float* x, int64_t inner, int64_t stride, int8_t* codes, float* scale_x) {
  // As integers magnitudes have the same order as the floats, and NaN is above all: it is not lost.
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < inner; i += 16) {
    const __m512i bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(first(inner - i), x + i));
    most = _mm512_max_epu32(most, _mm512_and_si512(bits, magnitude));
  }
  const uint32_t most_bits = _mm512_reduce_max_epu32(most);
  float largest;
  std::memcpy(&largest, &most_bits, sizeof(largest));
  if (largest < kFloor) largest = kFloor;
  *scale_x = largest / kInt8Max;
  // torch divides a number by a tensor as reciprocal times number.
  const __m512 factor = _mm512_set1_ps((1.0f / largest) * kInt8Max);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < stride; i += 16) {
    const __m512 values = _mm512_maskz_loadu_ps(first(std::max<int64_t>(inner - i, 0)), x + i);
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(values, factor)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), bytes);
    sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(bytes));
  }
  return _mm512_reduce_add_epi32(sum);
}

// sums += codes * the four activations at `four`, which go to all outputs. Written in assembly because gcc 12
// copies the sums to other registers and back around the intrinsic, which costs more than the product.
inline void add_products(__m512i& sums, __m512i codes, const int8_t* four) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codes), "m"(*reinterpret_cast<const int32_t*>(four)));
}

// R rows by B blocks of 16 outputs.
template <int R, int B>
void multiply(const Rows& rows, int64_t row, const uint8_t* tiles, int64_t tiles_a_block, int64_t output,
              int64_t outputs, const float* bias, float* out) {
  const int8_t* x = rows.codes + row * rows.stride;
  __m512i sums[R][B][4];
  __m512i mask[4];
#pragma GCC unroll 4
  for (int f = 0; f < 4; ++f) mask[f] = _mm512_set1_epi8(static_cast<char>(3 << (2 * f)));
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
      for (int f = 0; f < 4; ++f) sums[r][b][f] = _mm512_setzero_si512();
  for (int64_t t = 0; t < tiles_a_block; ++t) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const __m512i tile = _mm512_loadu_si512(tiles + (b * tiles_a_block + t) * kTileBytes);
#pragma GCC unroll 4
      for (int f = 0; f < 4; ++f) {
        const __m512i codes = _mm512_and_si512(tile, mask[f]);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          add_products(sums[r][b][f], codes, x + r * rows.stride + t * kTile + 4 * f);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m512 factor = _mm512_set1_ps(rows.factors[row + r]);
    const __m512i own = _mm512_set1_epi32(rows.sums[row + r]);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      __m512i total = sums[r][b][0];
#pragma GCC unroll 4
      for (int f = 1; f < 4; ++f) total = _mm512_add_epi32(total, _mm512_srai_epi32(sums[r][b][f], 2 * f));
      const int64_t at = output + b * kTile;
      const __mmask16 there = first(outputs - at);
      __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(total, own)), factor);
      if (bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(there, bias + at));
      _mm512_mask_storeu_ps(out + (row + r) * outputs + at, there, y);
    }
  }
}

// All blocks in [first_block, last_block) for R rows; B at a time while there are B.
template <int R, int B>
void multiply_blocks(const Rows& rows, int64_t row, const uint8_t* packed, int64_t tiles_a_block,
                     int64_t first_block, int64_t last_block, int64_t outputs, const float* bias, float* out) {
  const int64_t block_bytes = tiles_a_block * kTileBytes;
  int64_t block = first_block;
  for (; block + B <= last_block; block += B)
    multiply<R, B>(rows, row, packed + block * block_bytes, tiles_a_block, block * kTile, outputs, bias, out);
  for (; block < last_block; ++block)
    multiply<R, 1>(rows, row, packed + block * block_bytes, tiles_a_block, block * kTile, outputs, bias, out);
}

using Multiply = void (*)(const Rows&, int64_t, const uint8_t*, int64_t, int64_t, int64_t, int64_t,
                          const float*, float*);
// Blocks at a time are as many as leave the sums in registers.
constexpr Multiply kMultiply[kMaxRows] = {multiply_blocks<1, 4>, multiply_blocks<2, 3>, multiply_blocks<3, 2>,
                                          multiply_blocks<4, 1>, multiply_blocks<5, 1>, multiply_blocks<6, 1>};

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale,
                         const std::optional<at::Tensor>& bias, int64_t outputs) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.dim() >= 1, "packed_linear: x is not float32 rows");
  const int64_t inner = x.size(-1);
  const int64_t blocks = (outputs + kTile - 1) / kTile;
  const int64_t tiles_a_block = (inner + kTile - 1) / kTile;
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kByte && packed.is_contiguous() && packed.dim() == 3 &&
                        packed.size(0) == blocks && packed.size(1) == tiles_a_block &&
                        packed.size(2) == kTileBytes,
                    "packed_linear: packed codes have shape ", packed.sizes(), ", wanted contiguous uint8 [",
                    blocks, ", ", tiles_a_block, ", ", kTileBytes, "] for x of ", inner, " features and ",
                    outputs, " outputs");
  TORCH_CHECK_VALUE(scale.scalar_type() == at::kFloat && scale.numel() == 1,
                    "packed_linear: scale is not one float32");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs;
  at::Tensor out = at::empty(shape, x.options());
  const int64_t count = outputs ? out.numel() / outputs : 0;
  if (count == 0) return out;
  const at::Tensor input = x.contiguous();
  at::Tensor added;
  if (bias.has_value()) {
    added = bias->contiguous();
    TORCH_CHECK_VALUE(added.scalar_type() == at::kFloat && added.numel() == outputs,
                      "packed_linear: bias is not float32 of ", outputs, " values");
  }

  const int64_t stride = tiles_a_block * kTile;
  const at::Tensor space = at::empty({count * (stride + 8)}, packed.options());
  auto* sums = static_cast<int32_t*>(space.data_ptr());
  auto* factors = reinterpret_cast<float*>(sums + count);
  auto* codes = reinterpret_cast<int8_t*>(factors + count);
  const float* values = input.const_data_ptr<float>();
  const float weight_scale = *scale.const_data_ptr<float>();
  const int64_t some_rows = std::max<int64_t>(1, kQuantizeGrain / std::max<int64_t>(1, inner));
  at::parallel_for(0, count, some_rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float scale_x;
      sums[r] = quantize_row(values + r * inner, inner, stride, codes + r * stride, &scale_x);
      factors[r] = scale_x * weight_scale;
    }
  });

  const Rows rows{codes, stride, sums, factors};
  const uint8_t* tiles = packed.const_data_ptr<uint8_t>();
  const float* bias_values = added.defined() ? added.const_data_ptr<float>() : nullptr;
  float* result = out.mutable_data_ptr<float>();
  const int64_t groups = (count + kMaxRows - 1) / kMaxRows;  // of rows, as even as they can be
  const int64_t block_work = std::max<int64_t>(1, count * stride * kTile);
  at::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / block_work), [&](int64_t begin, int64_t end) {
    const int64_t block_bytes = std::max<int64_t>(1, tiles_a_block * kTileBytes);
    const int64_t step = std::max<int64_t>(1, kCachedBytes / block_bytes);
    for (int64_t block = begin; block < end; block += step)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t row = g * count / groups, next = (g + 1) * count / groups;
        kMultiply[next - row - 1](rows, row, tiles, tiles_a_block, block, std::min(block + step, end), outputs,
                                  bias_values, result);
      }
  });
  return out;
}

}  // namespace

// The schema is in inference.py.
TORCH_LIBRARY_IMPL(forge, CPU, m) {
  m.impl("packed_linear", packed_linear);
}
