// Weight-only products: activations that are not quantized, with the codes of the weight.
//
// bf16 pairs (AVX512_BF16) sum in float32, everything else in float64, each in the order of the inputs, whatever the
// batch. A product of a float32 value and a code is exact in float64.

#pragma once

#include <memory>

#include "bf16_codes.h"
#include "tiles.h"

namespace {

inline Doubles eight(const double* x) { return load<Doubles>(x); }
inline Doubles eight(const uint16_t* bfloat16) {
  return __builtin_convertvector((HalfFloats)(__builtin_convertvector(load<Shorts>(bfloat16), HalfLanes) << 16), Doubles);
}

// In float64, eight sums side by side.
template <class Value>
inline double sum_of(const Value* x, int64_t count) {
  Doubles sums = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) sums += eight(x + i);
  Value rest[8] = {};
  std::memcpy(rest, x + i, (count - i) * sizeof(Value));
  sums += eight(rest);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// The 16 inputs of a step for all 64 outputs: float64 [input][output].
template <int Bits>
inline void expand_doubles(const uint8_t* step, double* to) {
  for (int group = 0; group < kGroups; ++group)
    each<kStep / 2>([&](auto p) INLINE {
      const Pairs codes = pair<Bits, p>(step, group);
      for (int output = 0; output < 16; ++output)
        for (int half = 0; half < 2; ++half) to[(2 * p + half) * kPanel + group * 16 + output] = codes[2 * output + half];
    });
}

constexpr int64_t kDoubleTokens = 64;  // that are multiplied with a step of weights once it is expanded
constexpr int64_t kDoubleBytes = kDoubleTokens * kPanel * sizeof(double);

// x: float64 [tokens, inputs].
template <int Bits>
void multiply_doubles(const TileJob& job, const double* x, int64_t tokens, int64_t panel) {
  const Panels& panels = job.panels;
  double* dots = static_cast<double*>(job.dots);
  Buffer<double> inputs(kStep * kPanel);
  for (int64_t token = 0; token < tokens; token += kDoubleTokens) {
    const int rows = static_cast<int>(std::min(kDoubleTokens, tokens - token));
    std::fill_n(dots, rows * panels.blocks * kPanel, 0.0);
    const uint8_t* step = panels.panel(panel);
    for (int64_t b = 0; b < panels.blocks; ++b)
      for (int64_t s = 0; s < panels.steps(); ++s, step += panels.step_bytes()) {
        expand_doubles<Bits>(step, inputs.get());
        const int64_t first = b * panels.block() + s * kStep, count = std::min<int64_t>(kStep, panels.block() - s * kStep);
        for (int r = 0; r < rows; ++r) {
          double* row = dots + (r * panels.blocks + b) * kPanel;
          Doubles total[kPanel / kHalf];
          each<kPanel / kHalf>([&](auto i) INLINE { total[i] = load<Doubles>(row + i * kHalf); });
          for (int64_t k = 0; k < count; ++k) {
            const double value = x[(token + r) * panels.inputs + first + k];
            each<kPanel / kHalf>([&](auto i) INLINE {
              total[i] = total[i] + value * load<Doubles>(inputs.get() + k * kPanel + i * kHalf);
            });
          }
          each<kPanel / kHalf>([&](auto i) INLINE { store(row + i * kHalf, total[i]); });
        }
      }
    finish_rows<kPanel>(Finish(), job.tokens, token, rows, job.channels, panel, 0, dots, job.to);
  }
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define LOWBIT_BF16
// Rows tokens by 64 outputs. x: bf16 [tokens, width], each block padded to whole steps.
template <int Bits, int Rows>
__attribute__((noinline)) void pair_tile(const TileJob& job, const uint16_t* x, int64_t width, int64_t token, int64_t panel) {
  constexpr int64_t kStepBytes = kStep * kPanel / 8 * Bits;
  float* dots = static_cast<float*>(job.dots);
  const uint8_t* step = job.panels.panel(panel);
  x += token * width;
  for (int64_t b = 0; b < job.panels.blocks; ++b) {
    __m512 total[Rows * kGroups];
    each<Rows * kGroups>([&](auto i) INLINE { total[i] = _mm512_setzero_ps(); });
    for (int64_t s = 0; s < job.panels.steps(); ++s, step += kStepBytes, x += kStep) {
      fetch_codes(step, kStepBytes);
      each<kStep / 2>([&](auto p) INLINE {
        __m512bh weights[kGroups];
        each<kGroups>([&](auto g) INLINE { weights[g] = (__m512bh)as_bfloat16<Bits>(pair<Bits, p>(step, g)); });
        each<Rows>([&](auto r) INLINE {
          int32_t two;
          std::memcpy(&two, x + r * width + 2 * p, 4);
          const __m512bh values = (__m512bh)_mm512_set1_epi32(two);
          each<kGroups>([&](auto g) INLINE {
            total[r * kGroups + g] = _mm512_dpbf16_ps(total[r * kGroups + g], values, weights[g]);
          });
        });
      });
    }
    each<Rows>([&](auto r) INLINE {
      float* row = dots + (r * job.panels.blocks + b) * kPanel;
      each<kGroups>([&](auto g) INLINE { _mm512_store_ps(row + g * 16, total[r * kGroups + g]); });
    });
  }
  finish_rows<kPanel>(Finish(), job.tokens, token, Rows, job.channels, panel, 0, dots, job.to);
}

template <int Bits>
void multiply_pairs(const TileJob& job, const uint16_t* x, int64_t width, int64_t tokens, int64_t panel) {
  int64_t token = 0;
  for (; token + 4 <= tokens; token += 4) pair_tile<Bits, 4>(job, x, width, token, panel);
  for (; token < tokens; ++token) pair_tile<Bits, 1>(job, x, width, token, panel);
}
#endif

}  // namespace
