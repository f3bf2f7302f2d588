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

// x: float64 [tokens, inputs].
template <int Bits>
void multiply_doubles(const TileJob& job, const double* x, int64_t tokens, int64_t panel) {
  const Panels& panels = job.panels;
  Buffer<double> dots(tokens * kPanel), inputs(kStep * kPanel);
  auto sums = std::make_unique<Sums<kPanel>[]>(tokens);
  const uint8_t* step = panels.panel(panel);
  for (int64_t b = 0; b < panels.blocks; ++b) {
    std::fill_n(dots.get(), tokens * kPanel, 0.0);
    for (int64_t s = 0; s < panels.steps(); ++s, step += panels.step_bytes()) {
      expand_doubles<Bits>(step, inputs.get());
      const int64_t first = b * panels.block() + s * kStep, count = std::min<int64_t>(kStep, panels.block() - s * kStep);
      for (int64_t token = 0; token < tokens; ++token) {
        Doubles total[kPanel / kHalf];
        each<kPanel / kHalf>([&](auto i) INLINE { total[i] = load<Doubles>(dots.get() + token * kPanel + i * kHalf); });
        for (int64_t k = 0; k < count; ++k) {
          const double value = x[token * panels.inputs + first + k];
          each<kPanel / kHalf>([&](auto i) INLINE {
            total[i] = total[i] + value * load<Doubles>(inputs.get() + k * kPanel + i * kHalf);
          });
        }
        each<kPanel / kHalf>([&](auto i) INLINE { store(dots.get() + token * kPanel + i * kHalf, total[i]); });
      }
    }
    const Block block(b, job.channels);
    for (int64_t token = 0; token < tokens; ++token)
      finish_rows<false, kPanel>(job.tokens, token, 1, job.channels, panel, block, 0, dots.get() + token * kPanel,
                                 sums[token].from(0), job.to);
  }
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define LOWBIT_BF16
// Rows tokens by 64 outputs. x: bf16 [tokens, width], each block padded to whole steps.
template <int Bits, int Rows>
__attribute__((noinline)) void pair_tile(const TileJob& job, const uint16_t* x, int64_t width, int64_t token, int64_t panel) {
  constexpr int64_t kStepBytes = kStep * kPanel / 8 * Bits;
  Sums<Rows * kPanel> sums;
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
    alignas(64) float dots[Rows * kPanel];
    each<Rows * kGroups>([&](auto i) INLINE { _mm512_store_ps(dots + i * 16, total[i]); });
    const Block block(b, job.channels);
    finish_rows<false, kPanel>(job.tokens, token, Rows, job.channels, panel, block, 0, dots, sums.from(0), job.to);
  }
}

template <int Bits>
void multiply_pairs(const TileJob& job, const uint16_t* x, int64_t width, int64_t tokens, int64_t panel) {
  int64_t token = 0;
  for (; token + 4 <= tokens; token += 4) pair_tile<Bits, 4>(job, x, width, token, panel);
  for (; token < tokens; ++token) pair_tile<Bits, 1>(job, x, width, token, panel);
}
#endif

}  // namespace
