// The optimizer step in one pass over memory, and the ternary codes of latents.
//
// AdamW reads and writes its moments, and with a gradient filter the slow average, once per step: what a step
// costs is traffic, so everything that touches an element is done while it is in a register - clipping,
// filter, moments, decay, latent, and the code of the new latent. The threshold of a code is half the mean of
// the whole layer, which is known only afterwards; codes are written for the previous mean, the few latents
// near the threshold are noted, and once the new mean is known those are looked at again.
//
// Work is cut into blocks that threads take in order, so that many small and a few large parameters balance.
// Sums are taken in float64, block by block in a fixed order: results do not depend on the threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "elements.h"

namespace forge {
namespace {

constexpr int64_t kBlock = 16384;  // elements of one piece of work
constexpr int kAhead = 192;        // elements; a core alone does not keep enough cache lines in flight
constexpr float kBand = 1.0f / 256;  // a mean that moves less than this in a step spares the second pass
constexpr int kMostNear = 1024;    // latents of a block that may be noted; past that the layer is read again
constexpr float kScaleFloor = 1e-5f;   // SCALE_FLOOR of ternary.py
constexpr float kLargestHalf = 65504.0f;

using Mask = __mmask16;

struct Near {
  int64_t index;
  float latent;
};

// The codes of one layer. `guess` is the threshold by the scale that it had, `half` that by its new mean.
struct Layer {
  int8_t* codes = nullptr;
  float* scale = nullptr;
  bool sign_only = false;  // one bit: -1 and 1
  bool reread = false;     // there is no earlier mean, or it moved too far
  float guess = -1, low = 1, high = 0, half = 0;
};

// One tensor that is updated, with the layer that its codes belong to.
struct Part {
  float* latent = nullptr;
  int64_t size = 0;
  int layer = -1;
};

// Calls body(at, mask) for sixteen elements at a time; the mask is a constant but for the rest at the end.
template <class Body>
inline __attribute__((always_inline)) void sweep(int64_t begin, int64_t end, Body body) {
  int64_t at = begin;
  for (; at + 16 <= end; at += 16) body(at, static_cast<Mask>(0xffff));
  if (at < end) body(at, tail_mask(end - at));
}

inline void prefetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0); }

// 32 well mixed bits for each of 16 counters; the function of hash_bits in grokfast_trainer.py.
inline __m512i hash_bits(__m512i x) {
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
  x = _mm512_mullo_epi32(x, _mm512_set1_epi32(0x7feb352d));
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
  x = _mm512_mullo_epi32(x, _mm512_set1_epi32(static_cast<int>(0x846ca68bu)));
  return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

// Rounds up with a probability equal to the fraction that is cut off.
inline void store_bf16_at_random(c10::BFloat16* to, Mask k, __m512 x, __m512i counter) {
  __m512i noise = _mm512_srli_epi32(hash_bits(counter), 16);
  __m512i bits = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(x), noise), 16);
  _mm256_mask_storeu_epi16(to, k, _mm512_cvtepi32_epi16(bits));
}

// Sums in float64: eight lanes for the lower and eight for the upper half of a vector.
struct Sum {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  void add(__m512 x) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
  }
  void add_square(__m512 x) {
    __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x)), b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    low = _mm512_fmadd_pd(a, a, low);
    high = _mm512_fmadd_pd(b, b, high);
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

// round(clip(w / mean, -1, 1)) is not 0 exactly where |w| > mean / 2: the quotient as float32 rounds it exceeds
// one half only then. No division, and the codes of the formula to the bit.
inline void write_codes(int8_t* to, Mask k, __m512 latent, __m512 magnitude, float threshold, bool sign_only) {
  Mask large = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(threshold), _CMP_GT_OQ);
  if (sign_only) large = 0xffff;
  Mask negative = large & _mm512_cmp_ps_mask(latent, _mm512_setzero_ps(), _CMP_LT_OQ);
  __m128i codes = _mm_maskz_mov_epi8(large, _mm_set1_epi8(1));
  _mm_mask_storeu_epi8(to, k, _mm_mask_mov_epi8(codes, negative, _mm_set1_epi8(-1)));
}

void note(std::vector<Near>& near, __m512 latent, int64_t at, unsigned close) {
  if (near.size() > kMostNear) return;
  alignas(64) float values[16];
  _mm512_store_ps(values, latent);
  for (; close; close &= close - 1) near.push_back({at + __builtin_ctz(close), values[__builtin_ctz(close)]});
}

// What a block finds out about the codes of its layer: nothing, the sum |w|, or also codes for the mean that
// was guessed, with a note of the latents near their threshold.
enum class Task { none, sum, code };

template <Task task>
class Coder {
 public:
  Coder(const Layer& layer, std::vector<Near>& near)
      : codes_(layer.codes),
        sign_only_(layer.sign_only),
        guess_(layer.guess),
        low_(_mm512_set1_ps(layer.low)),
        high_(_mm512_set1_ps(layer.high)),
        near_(near) {}

  inline void take(__m512 latent, int64_t at, Mask k) {
    if constexpr (task == Task::none) return;
    const __m512 magnitude = _mm512_abs_ps(latent);
    sum_.add(magnitude);
    if constexpr (task == Task::sum) return;
    write_codes(codes_ + at, k, latent, magnitude, guess_, sign_only_);
    Mask close = _mm512_mask_cmp_ps_mask(k, magnitude, low_, _CMP_GE_OQ);
    close = _mm512_mask_cmp_ps_mask(close, magnitude, high_, _CMP_LE_OQ);
    if (__builtin_expect(close != 0, 0)) note(near_, latent, at, close);
  }
  double total() const { return sum_.total(); }

 private:
  int8_t* const codes_;
  const bool sign_only_;
  const float guess_;
  const __m512 low_, high_;
  std::vector<Near>& near_;
  Sum sum_;
};

struct Filter {
  // average += rest * (clip g - average); g' = of_gradient * (clip g) + of_average * average
  float clip, rest, of_gradient, of_average;
};

// The slow average of one tensor, float32 or bfloat16; neither where there is no filter.
struct Average {
  float* full = nullptr;
  c10::BFloat16* half = nullptr;
  uint32_t seed = 0;
};

enum class Kept { none, full, half };

template <Kept kept>
struct Filtered {
  explicit Filtered(const Filter& f)
      : clip(_mm512_set1_ps(f.clip)),
        rest(_mm512_set1_ps(f.rest)),
        of_gradient(_mm512_set1_ps(f.of_gradient)),
        of_average(_mm512_set1_ps(f.of_average)) {}

  static void ahead(const Average& a, int64_t at) {
    if constexpr (kept == Kept::full) prefetch(a.full + at);
    if constexpr (kept == Kept::half) prefetch(a.half + at);
  }
  inline __m512 operator()(__m512 g, const Average& a, int64_t at, Mask k) const {
    g = _mm512_mul_ps(clip, g);
    if constexpr (kept == Kept::none) return g;
    __m512 slow = kept == Kept::full ? load(k, a.full + at) : load(k, a.half + at);
    slow = _mm512_fmadd_ps(rest, _mm512_sub_ps(g, slow), slow);
    if constexpr (kept == Kept::full) {
      store(k, a.full + at, slow);
    } else {
      __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      store_bf16_at_random(a.half + at, k, slow, _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(a.seed + at)), lanes));
    }
    return _mm512_fmadd_ps(of_average, slow, _mm512_mul_ps(of_gradient, g));
  }

  __m512 clip, rest, of_gradient, of_average;
};

struct AdamW {
  const float* grad;
  float *first, *second;
  Average average;
  float keep, rate, first_rest, beta2, second_rest, eps, second_correction;
};

template <Kept kept, Task task>
double adamw_block(const AdamW& a, const Filter& f, float* latents, int64_t begin, int64_t end, Coder<task> coder) {
  const Filtered<kept> filtered(f);
  const __m512 keep = _mm512_set1_ps(a.keep), rate = _mm512_set1_ps(a.rate), eps = _mm512_set1_ps(a.eps);
  const __m512 first_rest = _mm512_set1_ps(a.first_rest), beta2 = _mm512_set1_ps(a.beta2);
  const __m512 second_rest = _mm512_set1_ps(a.second_rest), correction = _mm512_set1_ps(a.second_correction);
  sweep(begin, end, [&](int64_t at, Mask k) __attribute__((always_inline)) {
    prefetch(latents + at + kAhead);
    prefetch(a.grad + at + kAhead);
    prefetch(a.first + at + kAhead);
    prefetch(a.second + at + kAhead);
    filtered.ahead(a.average, at + kAhead);
    const __m512 g = filtered(load(k, a.grad + at), a.average, at, k);
    __m512 first = load(k, a.first + at), second = load(k, a.second + at);
    first = _mm512_fmadd_ps(first_rest, _mm512_sub_ps(g, first), first);
    second = _mm512_fmadd_ps(_mm512_mul_ps(second_rest, g), g, _mm512_mul_ps(beta2, second));
    store(k, a.first + at, first);
    store(k, a.second + at, second);
    const __m512 scaled = _mm512_fmadd_ps(_mm512_sqrt_ps(second), correction, eps);
    __m512 latent = _mm512_mul_ps(keep, load(k, latents + at));
    latent = _mm512_maskz_mov_ps(k, _mm512_fnmadd_ps(rate, _mm512_div_ps(first, scaled), latent));
    store(k, latents + at, latent);
    coder.take(latent, at, k);
  });
  return coder.total();
}

template <Task task>
double read_block(const float* latents, int64_t begin, int64_t end, Coder<task> coder) {
  sweep(begin, end, [&](int64_t at, Mask k) __attribute__((always_inline)) {
    prefetch(latents + at + 2 * kAhead);
    coder.take(load(k, latents + at), at, k);
  });
  return coder.total();
}

void code_block(const float* latents, const Layer& layer, int64_t begin, int64_t end) {
  sweep(begin, end, [&](int64_t at, Mask k) __attribute__((always_inline)) {
    prefetch(latents + at + 2 * kAhead);
    const __m512 latent = load(k, latents + at);
    write_codes(layer.codes + at, k, latent, _mm512_abs_ps(latent), layer.half, layer.sign_only);
  });
}

struct Block {
  int part;
  bool codes;  // false: update; true: codes for the mean that the update gave
  int64_t begin, end;
  int64_t update = 0;  // of a codes block: the block that updated the same elements
};

struct Progress {
  std::atomic<int> left{0};
  std::atomic<bool> ready{false};
  int64_t first = 0, last = 0;  // its update blocks
};

// Gives a layer its mean from the sums of its blocks, and decides whether the guess can be mended.
void settle(Layer& layer, const Part& part, const double* sums, const std::vector<Near>* near, int64_t blocks) {
  double sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += sums[b];
  const float mean = part.size ? static_cast<float>(sum / static_cast<double>(part.size)) : 0.0f;
  layer.half = 0.5f * std::max(mean, kScaleFloor);
  *layer.scale = static_cast<float>(c10::Half(std::min(std::max(mean, kScaleFloor), kLargestHalf)));
  if (layer.reread || layer.sign_only) return;
  layer.reread = !(layer.half > layer.low && layer.half < layer.high);
  for (int64_t b = 0; b < blocks; ++b) layer.reread |= near[b].size() > kMostNear;
}

// Runs `update(part, begin, end, coder)` -> sum |w| over all parts and brings the codes of their layers up to date.
template <class Update>
void run(std::vector<Part>& parts, std::vector<Layer>& layers, const Update& update) {
  std::vector<Block> blocks;
  auto progress = std::make_unique<Progress[]>(parts.size());
  // The codes of a part come one part later, when no thread is likely to be still at it.
  int waiting = -1;
  auto add_codes = [&](int part) {
    const int64_t first = progress[part].first, last = progress[part].last;
    for (int64_t b = first; b < last; ++b) blocks.push_back({part, true, blocks[b].begin, blocks[b].end, b});
  };
  for (int part = 0; part < static_cast<int>(parts.size()); ++part) {
    Progress& own = progress[part];
    own.first = static_cast<int64_t>(blocks.size());
    for (int64_t begin = 0; begin < parts[part].size; begin += kBlock)
      blocks.push_back({part, false, begin, std::min(begin + kBlock, parts[part].size)});
    own.last = static_cast<int64_t>(blocks.size());
    own.left = static_cast<int>(own.last - own.first);
    if (waiting >= 0) add_codes(waiting);
    waiting = parts[part].layer >= 0 ? part : -1;
    if (own.left == 0 && waiting >= 0) settle(layers[parts[part].layer], parts[part], nullptr, nullptr, 0);
  }
  if (waiting >= 0) add_codes(waiting);

  std::vector<double> sums(blocks.size());
  std::vector<std::vector<Near>> near(blocks.size());
  std::atomic<size_t> next{0};
  auto work = [&](int64_t, int64_t) {
    for (size_t i = next.fetch_add(1); i < blocks.size(); i = next.fetch_add(1)) {
      const Block& block = blocks[i];
      const Part& part = parts[block.part];
      Progress& own = progress[block.part];
      if (!block.codes) {
        if (part.layer < 0) {
          update(block.part, block.begin, block.end, Coder<Task::none>({}, near[i]));
          continue;
        }
        const Layer& layer = layers[part.layer];
        sums[i] = layer.reread ? update(block.part, block.begin, block.end, Coder<Task::sum>(layer, near[i]))
                               : update(block.part, block.begin, block.end, Coder<Task::code>(layer, near[i]));
        if (own.left.fetch_sub(1) == 1) {
          settle(layers[part.layer], part, &sums[own.first], &near[own.first], own.last - own.first);
          own.ready.store(true, std::memory_order_release);
        }
        continue;
      }
      // Blocks are taken in order, so whoever has the ones waited for is at work on them.
      while (!own.ready.load(std::memory_order_acquire)) std::this_thread::yield();
      Layer& layer = layers[part.layer];
      if (layer.reread) {
        code_block(part.latent, layer, block.begin, block.end);
      } else if (!layer.sign_only) {
        for (const Near& one : near[block.update]) {
          const float magnitude = std::fabs(one.latent);
          if ((magnitude > layer.half) != (magnitude > layer.guess))
            layer.codes[one.index] = static_cast<int8_t>((one.latent > layer.half) - (one.latent < -layer.half));
        }
      }
      near[block.update] = {};
    }
  };
  at::parallel_for(0, blocks.size() > 1 ? at::get_num_threads() : 1, 1, work);
}

float* floats(const at::Tensor& t) {
  TORCH_CHECK(t.is_contiguous() && t.scalar_type() == at::kFloat, "forge: a contiguous float32 tensor is needed");
  return t.data_ptr<float>();
}

void same_size(const at::Tensor& t, const at::Tensor& like) {
  TORCH_CHECK(t.numel() == like.numel(), "forge: ", t.numel(), " elements beside ", like.numel());
}

Layer layer_of(const at::Tensor& codes, const at::Tensor& scale, int64_t bits, bool guess) {
  TORCH_CHECK(codes.is_contiguous() && codes.scalar_type() == at::kChar, "forge: contiguous int8 codes are needed");
  TORCH_CHECK(scale.numel() == 1, "forge: a layer has one scale");
  Layer layer;
  layer.codes = codes.data_ptr<int8_t>();
  layer.scale = floats(scale);
  layer.sign_only = bits == 1;
  layer.reread = !guess && !layer.sign_only;
  if (guess && !layer.sign_only) {
    layer.guess = 0.5f * *layer.scale;
    layer.low = layer.guess * (1 - kBand);
    layer.high = layer.guess * (1 + kBand);
  }
  return layer;
}

Average average_of(const at::Tensor& slow, const at::Tensor& like, int64_t seed) {
  same_size(slow, like);
  Average average;
  if (slow.scalar_type() == at::kBFloat16) {
    TORCH_CHECK(slow.is_contiguous(), "forge: a contiguous average is needed");
    average.half = slow.data_ptr<c10::BFloat16>();
  } else {
    average.full = floats(slow);
  }
  average.seed = static_cast<uint32_t>(seed);
  return average;
}

std::vector<Layer> layers_of(at::TensorList codes, at::TensorList scales, at::IntArrayRef bits) {
  std::vector<Layer> layers;
  for (size_t i = 0; i < codes.size(); ++i) layers.push_back(layer_of(codes[i], scales[i], bits[i], true));
  return layers;
}

bool is_plain(const at::Tensor& t, int64_t size) {
  return t.is_cpu() && t.layout() == at::kStrided && t.scalar_type() == at::kFloat && t.is_contiguous() &&
      t.numel() == size;
}

// hyper: lr, beta1, beta2, eps, weight decay of each group. layer: index into codes, -1 for none.
// Returns whether it takes tensors like these; if not, it has changed nothing.
bool adamw_step(
    at::TensorList params,
    at::TensorList grads,
    at::TensorList firsts,
    at::TensorList seconds,
    at::TensorList steps,
    at::TensorList slow,
    at::IntArrayRef seeds,
    at::IntArrayRef group,
    at::ArrayRef<double> hyper,
    at::IntArrayRef layer,
    at::TensorList codes,
    at::TensorList scales,
    at::IntArrayRef bits,
    double clip,
    double decay,
    double of_gradient,
    double of_average) {
  const size_t count = params.size();
  std::vector<at::Tensor> read(count);  // the gradients, contiguous
  for (size_t i = 0; i < count; ++i) {
    const int64_t size = params[i].numel();
    if (grads[i].layout() != at::kStrided) return false;
    read[i] = grads[i].contiguous();
    for (const at::Tensor* t : std::initializer_list<const at::Tensor*>{&params[i], &read[i], &firsts[i], &seconds[i]})
      if (!is_plain(*t, size)) return false;
    if (!is_plain(steps[i], 1)) return false;
    if (slow.empty()) continue;
    const bool half = slow[i].scalar_type() == at::kBFloat16 && slow[i].is_contiguous() && slow[i].numel() == size;
    if (!half && !is_plain(slow[i], size)) return false;
  }
  const Filter filter{
      static_cast<float>(clip),
      static_cast<float>(1 - decay),
      static_cast<float>(of_gradient),
      static_cast<float>(of_average)};
  std::vector<Layer> layers = layers_of(codes, scales, bits);
  std::vector<Part> parts(count);
  std::vector<AdamW> updates(count);
  for (size_t i = 0; i < count; ++i) {
    parts[i] = {floats(params[i]), params[i].numel(), static_cast<int>(layer[i])};
    if (layer[i] >= 0) same_size(codes[layer[i]], params[i]);
    const double *own = &hyper[5 * group[i]], lr = own[0], beta1 = own[1], beta2 = own[2];
    const double step = (*floats(steps[i]) += 1);
    updates[i] = {
        floats(read[i]),
        floats(firsts[i]),
        floats(seconds[i]),
        slow.empty() ? Average{} : average_of(slow[i], params[i], seeds.empty() ? 0 : seeds[i]),
        static_cast<float>(1 - lr * own[4]),
        static_cast<float>(lr / (1 - std::pow(beta1, step))),
        static_cast<float>(1 - beta1),
        static_cast<float>(beta2),
        static_cast<float>(1 - beta2),
        static_cast<float>(own[3]),
        static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)))};
  }
  run(parts, layers, [&](int part, int64_t begin, int64_t end, auto coder) {
    const AdamW& own = updates[part];
    float* latents = parts[part].latent;
    if (own.average.full) return adamw_block<Kept::full>(own, filter, latents, begin, end, coder);
    if (own.average.half) return adamw_block<Kept::half>(own, filter, latents, begin, end, coder);
    return adamw_block<Kept::none>(own, filter, latents, begin, end, coder);
  });
  return true;
}

template <Kept kept>
void filter_block(float* grad, const Average& average, const Filter& f, int64_t begin, int64_t end) {
  const Filtered<kept> filtered(f);
  sweep(begin, end, [&](int64_t at, Mask k) __attribute__((always_inline)) {
    prefetch(grad + at + kAhead);
    filtered.ahead(average, at + kAhead);
    store(k, grad + at, filtered(load(k, grad + at), average, at, k));
  });
}

void filter_gradients(
    at::TensorList grads, at::TensorList slow, at::IntArrayRef seeds, double decay, double of_gradient, double of_average) {
  const Filter filter{
      1.0f, static_cast<float>(1 - decay), static_cast<float>(of_gradient), static_cast<float>(of_average)};
  std::vector<Part> parts(grads.size());
  std::vector<Average> averages(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    parts[i] = {floats(grads[i]), grads[i].numel(), -1};
    averages[i] = average_of(slow[i], grads[i], seeds.empty() ? 0 : seeds[i]);
  }
  std::vector<Layer> none;
  run(parts, none, [&](int part, int64_t begin, int64_t end, auto) {
    if (averages[part].full) filter_block<Kept::full>(parts[part].latent, averages[part], filter, begin, end);
    else filter_block<Kept::half>(parts[part].latent, averages[part], filter, begin, end);
    return 0.0;
  });
}

void requantize(at::TensorList weights, at::TensorList codes, at::TensorList scales, int64_t bits) {
  std::vector<Layer> layers;
  std::vector<Part> parts;
  for (size_t i = 0; i < weights.size(); ++i) {
    same_size(codes[i], weights[i]);
    layers.push_back(layer_of(codes[i], scales[i], bits, true));
    parts.push_back({floats(weights[i]), weights[i].numel(), static_cast<int>(i)});
  }
  run(parts, layers, [&](int part, int64_t begin, int64_t end, auto coder) {
    return read_block(parts[part].latent, begin, end, coder);
  });
}

std::tuple<at::Tensor, at::Tensor> ternary_codes(const at::Tensor& weight, int64_t bits) {
  at::Tensor codes = at::empty(weight.sizes(), weight.options().dtype(at::kChar));
  at::Tensor scale = at::empty({}, weight.options());
  std::vector<Layer> layers{layer_of(codes, scale, bits, false)};
  std::vector<Part> parts{{floats(weight), weight.numel(), 0}};
  run(parts, layers, [&](int, int64_t begin, int64_t end, auto coder) {
    return read_block(parts[0].latent, begin, end, coder);
  });
  return {codes, scale};
}

double squares_of_block(const float* from, int64_t size) {
  Sum sum[4];
  int64_t at = 0;
  if (size == kBlock) {  // four streams: a core has more cache lines in flight than with one
    constexpr int64_t part = kBlock / 4;
    for (; at < part; at += 16)
      for (int stream = 0; stream < 4; ++stream) {
        const float* own = from + stream * part + at;
        prefetch(own + kAhead);
        sum[stream].add_square(_mm512_loadu_ps(own));
      }
    at = size;
  }
  sweep(at, size, [&](int64_t i, Mask k) __attribute__((always_inline)) { sum[0].add_square(load(k, from + i)); });
  return (sum[0].total() + sum[1].total()) + (sum[2].total() + sum[3].total());
}

at::Tensor sum_of_squares(at::TensorList tensors) {
  std::vector<std::pair<const float*, int64_t>> blocks;
  for (const at::Tensor& t : tensors) {
    const float* from = floats(t);
    for (int64_t begin = 0; begin < t.numel(); begin += kBlock)
      blocks.emplace_back(from + begin, std::min(kBlock, t.numel() - begin));
  }
  std::vector<double> sums(blocks.size());
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 8, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) sums[i] = squares_of_block(blocks[i].first, blocks[i].second);
  });
  at::Tensor total = at::empty({}, at::TensorOptions().dtype(at::kDouble));
  double& value = *total.data_ptr<double>() = 0;
  for (double sum : sums) value += sum;
  return total;
}

}  // namespace
}  // namespace forge

TORCH_LIBRARY_FRAGMENT(forge, m) {
  m.def(
      "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] firsts, Tensor(c!)[] seconds, "
      "Tensor(d!)[] steps, Tensor(e!)[] slow, int[] seeds, int[] group, float[] hyper, int[] layer, "
      "Tensor(f!)[] codes, Tensor(g!)[] scales, int[] bits, float clip, float decay, float of_gradient, "
      "float of_average) -> bool");
  m.def(
      "filter_gradients_(Tensor(a!)[] grads, Tensor(b!)[] slow, int[] seeds, float decay, float of_gradient, "
      "float of_average) -> ()");
  m.def("requantize_(Tensor[] weights, Tensor(a!)[] codes, Tensor(b!)[] scales, int bits) -> ()");
  m.def("sum_of_squares(Tensor[] tensors) -> Tensor");
}

TORCH_LIBRARY_IMPL(forge, CPU, m) {
  m.impl("adamw_step_", &forge::adamw_step);
  m.impl("filter_gradients_", &forge::filter_gradients);
  m.impl("requantize_", &forge::requantize);
  m.impl("ternary_codes", &forge::ternary_codes);
  m.impl("sum_of_squares", &forge::sum_of_squares);
}
