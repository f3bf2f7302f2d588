// Codes as bf16 numbers, which hold 0 .. 255 exactly.

#pragma once

#include "panels.h"

#if defined(__AVX512BW__)
namespace {

// bf16 of 0 .. 63, by the number.
struct Bfloat16Table {
  alignas(64) uint16_t of[64];
  constexpr Bfloat16Table() : of() {
    for (int n = 1; n < 64; ++n) {
      int exponent = 0;
      while (n >> (exponent + 1)) ++exponent;
      of[n] = static_cast<uint16_t>((127 + exponent) << 7 | (n << (7 - exponent) & 127));
    }
  }
};
constexpr Bfloat16Table kBfloat16Table;

template <int Bits>
INLINE inline Pairs as_bfloat16(Pairs codes) {
  const __m512i low = _mm512_load_si512(kBfloat16Table.of);
  if constexpr (Bits <= 4) return (Pairs)_mm512_permutexvar_epi16((__m512i)codes, low);
  if constexpr (Bits == 6) {
    const __m512i high = _mm512_load_si512(kBfloat16Table.of + 32);
    return (Pairs)_mm512_permutex2var_epi16(low, (__m512i)codes, high);
  }
  // Even and odd codes as float32, whose upper halves are the bf16 numbers.
  const __m512i words = (__m512i)codes;
  const __m512 even = _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff)));
  const __m512 odd = _mm512_cvtepi32_ps(_mm512_srli_epi32(words, 16));
  const __m512i upper = _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  return (Pairs)_mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), upper);
}

}  // namespace
#endif
