// Exact integer products in registers: unsigned codes of weights with signed ones of activations (code - 128).
//
// A tile is Rows tokens by Vectors x 16 (or 8) outputs. Its accumulators start at 128 (1.w), so that they end at x.w of
// the codes themselves; 32 bits wrap around and hold every x.w below 2^32, that is 65,536 inputs of 8-bit codes.

#pragma once

#include "finish.h"

namespace {

// sums + the products of four neighbouring codes in each lane.
//
// Without the instructions for it, AVX2 multiplies bytes to pairs that saturate at 32767: weights below 128 cannot
// reach it (127 * 128 * 2 = 32512), 8-bit ones could, so they are multiplied as 16-bit numbers.
template <int Bits>
INLINE inline Quads dot4(Quads sums, Quads weights, int32_t four) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return (Quads)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(four));
#elif defined(__AVX512BW__)
  const __m512i w = (__m512i)weights, x = _mm512_set1_epi32(four);
  if constexpr (Bits < 8) {
    const __m512i pairs = _mm512_maddubs_epi16(w, x);
    return sums + (Quads)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
  }
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
  return sums + (Quads)even + (Quads)_mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
#elif defined(__AVXVNNI__)
  return (Quads)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights, _mm256_set1_epi32(four));
#elif defined(__AVX2__)
  const __m256i w = (__m256i)weights, x = _mm256_set1_epi32(four);
  if constexpr (Bits < 8) {
    const __m256i pairs = _mm256_maddubs_epi16(w, x);
    return sums + (Quads)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  return sums + (Quads)even + (Quads)_mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
#else
  for (int j = 0; j < 4; ++j)
    sums += (weights >> (8 * j) & 255u) * static_cast<uint32_t>(static_cast<int8_t>(four >> (8 * j)));
  return sums;
#endif
}

// Registers: 32 with AVX-512, 16 elsewhere; they hold the accumulators, a vector of weights for each column, one token,
// and what 6-bit codes are put together from. Where amx.h takes larger batches, taller tiles would only be compiled.
#if defined(__AVX512BW__)
#if defined(__AMX_INT8__)
constexpr int most_rows(int) { return 4; }
#else
constexpr int most_rows(int bits) { return bits == 6 ? 10 : 12; }
#endif
constexpr int columns_of(int rows) { return rows <= 4 ? 4 : 2; }
#elif defined(__AVXVNNI__)
constexpr int most_rows(int) { return 5; }
constexpr int columns_of(int rows) { return rows == 1 ? 4 : 2; }
#else  // products of bytes need registers of their own
constexpr int most_rows(int) { return 3; }
constexpr int columns_of(int) { return 2; }
#endif

// Codes of a tile's tokens as the tile reads them, step by step: [steps][4 quads][rows][4 inputs], less 128.
inline void interleave(const uint8_t* codes, int64_t steps, int row, int rows, int8_t* to) {
  for (int64_t quad = 0; quad < steps * 4; ++quad) {
    uint32_t four;
    std::memcpy(&four, codes + 4 * quad, 4);
    four ^= 0x80808080u;
    std::memcpy(to + (quad * rows + row) * 4, &four, 4);
  }
}

struct TileJob {
  const Panels& panels;
  const Tokens& tokens;
  const Channels& channels;
  const Output& to;
  void* dots;  // room for those of a tile with all blocks
};

constexpr int64_t kTileBytes = 12 * 2 * 16 * 4;  // of the dot products of a tile with a block, at most

template <int Bits, int Rows>
__attribute__((noinline)) void tile(const TileJob& job, const int8_t* x, int64_t token, int64_t panel, int first) {
  constexpr int Columns = columns_of(Rows), kOutputs = kWide / 4;
  constexpr int64_t kStepBytes = kStep * kPanel / 8 * Bits, kColumnBytes = kStepBytes / kVectorsPerPanel;
  constexpr int kCount = Columns * kOutputs;
  uint32_t* dots = static_cast<uint32_t*>(job.dots);
  const uint8_t* step = job.panels.panel(panel);
  for (int64_t block = 0; block < job.panels.blocks; ++block) {
    Quads total[Rows * Columns];
    each<Columns>([&](auto c) INLINE {
      Quads start = load<Quads>(job.panels.sums(block) + panel * kPanel + (first + c) * kOutputs) << 7;
      each<Rows>([&](auto r) INLINE { total[r * Columns + c] = start; });
    });
    for (int64_t s = 0; s < job.panels.steps(); ++s, step += kStepBytes, x += Rows * kStep) {
      fetch_codes(step + first * kColumnBytes, Columns * kColumnBytes);
      each<4>([&](auto q) INLINE {
        Quads weights[Columns];
        each<Columns>([&](auto c) INLINE { weights[c] = quad<Bits, q>(step, first + c); });
        each<Rows>([&](auto r) INLINE {
          int32_t four;
          std::memcpy(&four, x + (q * Rows + r) * 4, 4);
          each<Columns>([&](auto c) INLINE {
            total[r * Columns + c] = dot4<Bits>(total[r * Columns + c], weights[c], four);
          });
        });
      });
    }
    each<Rows>([&](auto r) INLINE {
      uint32_t* row = dots + (r * job.panels.blocks + block) * kCount;
      each<Columns>([&](auto c) INLINE { store(row + c * kOutputs, total[r * Columns + c]); });
    });
  }
  const Finish how(reach_of(job.tokens, token, Rows), job.channels, job.panels.block(), job.to.dtype);
  finish_rows<kCount>(how, job.tokens, token, Rows, job.channels, panel, first * kOutputs,
                      dots, job.to);
}

// The whole panel for `rows` tokens, at most most_rows(Bits).
template <int Bits, int Rows = most_rows(Bits)>
void tiles(const TileJob& job, int rows, const int8_t* x, int64_t token, int64_t panel) {
  if constexpr (Rows > 0) {
    if (rows != Rows) return tiles<Bits, Rows - 1>(job, rows, x, token, panel);
    for (int first = 0; first < kVectorsPerPanel; first += columns_of(Rows)) tile<Bits, Rows>(job, x, token, panel, first);
  }
}

}  // namespace
