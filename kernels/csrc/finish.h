// The outputs of a tile: tokens by outputs, from their dot products.
//
// Where outputs are bf16 and weights have one scale per output, most go by way of float32, in half the instructions or fewer.
// A bracket is a whole number, and 32-bit integers that wrap around hold it. With u = 2^-24 and m the largest of the sums
// over the blocks on their way, in float32 every step of the sum is off by less than u m (3 u m where a bracket needs more
// than 24 bits), the product with S by u m S, and so are the two ends of the range that they leave. Where both ends round
// to the same bf16, the definition's float64 does too, because rounding keeps the order. The rest, one output in
// 700 with eight blocks and fewer with one, NaN, infinity and numbers below 2^-126, are computed in float64.

#pragma once

#include "brackets.h"

namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(LOWBIT_AVX512)
#define LOWBIT_QUICK
constexpr int kDoubtful = 0xb9;  // NaN, infinity, subnormal

// A sum over blocks in float32, and its largest number on the way, which for one block is the sum itself.
template <bool OneBlock>
struct QuickSum {
  Floats sum = {};
  Lanes largest = {};

  // dots: of a token with 16 outputs; ones, zeros: of the outputs
  INLINE inline void add(const uint32_t* dots, const Tokens::Quick& token, const int32_t* ones, Lanes zeros) {
    __m512i bracket = load<__m512i>(dots);
    bracket = _mm512_dpwssd_epi32(bracket, _mm512_set1_epi32(token.zero), load<__m512i>(ones));
    bracket = _mm512_dpwssd_epi32(bracket, _mm512_set1_epi32(token.rest), (__m512i)zeros);
    sum = (Floats)_mm512_fmadd_ps(_mm512_cvtepi32_ps(bracket), _mm512_set1_ps(token.scale), (__m512)sum);
    if (!OneBlock) largest = larger_magnitude(sum, largest);
  }

  // 16 outputs; false if they are in doubt. error: of a sum and what follows, over its largest number, in units of u.
  INLINE inline bool store(uint16_t* to, Floats scales, int error) const {
    const Floats y = sum * scales;
    const __mmask16 special = _mm512_fpclass_ps_mask((__m512)y, kDoubtful);
    if constexpr (OneBlock) {
      // u |y| is no more than the unit in the last place, so both ends round alike unless the lower half is near a tie.
      const __m512i from_tie = _mm512_sub_epi16((__m512i)y, _mm512_set1_epi16(static_cast<int16_t>(0x8000 - error)));
      const __mmask32 near = _mm512_mask_cmple_epu16_mask(0x55555555u, from_tie, _mm512_set1_epi16(2 * error));
      if (__builtin_expect(near | special, 0)) return false;
      ::store(to, _mm512_cvtneps_pbh((__m512)y));
    } else {
      const Floats off = (Floats)largest * scales * (error * 0x1p-24f);
      const __m256i low = (__m256i)_mm512_cvtneps_pbh((__m512)(y - off)), high = (__m256i)_mm512_cvtneps_pbh((__m512)(y + off));
      if (__builtin_expect(_mm256_cmpneq_epi16_mask(low, high) | special, 0)) return false;
      ::store(to, low);
    }
    return true;
  }
};

template <int Count, bool OneBlock>
void finish_quickly(const Tokens& tokens, int64_t token, int rows, const Channels& channels, int64_t panel, int output,
                    const uint32_t* dots, int error, bool exact, const Output& to) {
  constexpr int kParts = Count / kLanes;
  auto finish_in_doubt = exact ? finish_exactly<true, uint32_t> : finish_exactly<false, uint32_t>;
  const int32_t* of_ones = channels.quick_sums.get() + output;
  const int64_t blocks = OneBlock ? 1 : tokens.blocks;
  Lanes zeros[kParts];
  Floats scales[kParts];
  each<kParts>([&](auto i) INLINE {
    zeros[i] = load<Lanes>(channels.quick_zero.get() + output + i * kLanes);
    scales[i] = load<Floats>(channels.quick_scale.get() + output + i * kLanes);
  });
  for (int r = 0; r < rows; ++r) {
    const Tokens::Quick* of_token = tokens.quick.get() + (token + r) * blocks;
    const uint32_t* row = dots + r * blocks * Count;
    QuickSum<OneBlock> sums[kParts];
    for (int64_t b = 0; b < blocks; ++b)
      each<kParts>([&](auto i) INLINE {
        sums[i].add(row + b * Count + i * kLanes, of_token[b], of_ones + b * kPanel + i * kLanes, zeros[i]);
      });
    each<kParts>([&](auto i) INLINE {
      const int64_t first = panel * kPanel + output + i * kLanes;
      uint16_t* at = static_cast<uint16_t*>(to.data) + (token + r) * to.outputs + first;
      if (__builtin_expect(first + kLanes > to.outputs || !sums[i].store(at, scales[i], error), 0))
        finish_in_doubt(tokens, token + r, 1, channels, panel, output + i * kLanes, kLanes, {row + i * kLanes, Count}, to);
    });
  }
}
#endif

// How the outputs of some tokens and a panel are computed.
struct Finish {
  bool exact = false;  // is_exact
  int error = 0;       // of finish_quickly, in units of u m; 0: not that way

  // reach: of the tokens; inputs: of a block
  Finish(double reach, const Channels& channels, int64_t inputs, DType dtype) {
    const double largest = largest_bracket(reach, channels, inputs);
    exact = is_exact(largest);
    const bool quick = dtype == kBfloat16 && channels.quick && inputs <= kQuickInputs && reach <= kQuickReach &&
                       channels.reach.get()[0] <= kQuickReach;
    if (quick) error = static_cast<int>((largest <= 1 << 24 ? 1 : 3) * channels.blocks + 4);
  }
  Finish() = default;
};

// The outputs [output, output + Count) of the panel for `rows` tokens from `token` on. dots: [rows][blocks][Count].
template <int Count, class Value>
void finish_rows(const Finish& how, const Tokens& tokens, int64_t token, int rows, const Channels& channels, int64_t panel,
                 int output, const Value* dots, const Output& to) {
#ifdef LOWBIT_QUICK
  if constexpr (std::is_same<Value, uint32_t>::value)
    if (how.error) {
      auto finish_quick = tokens.blocks == 1 ? finish_quickly<Count, true> : finish_quickly<Count, false>;
      return finish_quick(tokens, token, rows, channels, panel, output, dots, how.error, how.exact, to);
    }
#endif
  auto finish = how.exact ? finish_exactly<true, Value> : finish_exactly<false, Value>;
  finish(tokens, token, rows, channels, panel, output, Count, {dots, Count}, to);
}

}  // namespace
