// From dot products to outputs: the float64 part of the definition in linear.py, in its order, and the last rounding.
//
//   bracket = x.w - z (1.w) - (x.1 - k z) Z
//   y       = sum_h S_h sum_g s_g bracket_gh

#pragma once

#include "panels.h"
#include "tokens.h"

namespace {

typedef double Doubles __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(64)));
typedef uint32_t HalfLanes __attribute__((vector_size(32)));
typedef float HalfFloats __attribute__((vector_size(32)));
constexpr int kHalf = 8;  // outputs that are finished together

inline Doubles to_doubles(const uint32_t* whole) {
#ifdef __AVX512F__
  return (Doubles)_mm512_cvtepu32_pd((__m256i)load<HalfLanes>(whole));  // which GCC does not make of the line below
#else
  return __builtin_convertvector(load<HalfLanes>(whole), Doubles);
#endif
}
inline Doubles to_doubles(const float* values) { return __builtin_convertvector(load<HalfFloats>(values), Doubles); }
inline Doubles to_doubles(const double* values) { return load<Doubles>(values); }

// What is known of the tokens, per block: s, z and x.1 - k z; float64 [tokens, blocks].
struct Tokens {
  int64_t blocks;
  Buffer<double> scale, zero, rest;

  Tokens(int64_t tokens, int64_t blocks)
      : blocks(blocks), scale(tokens * blocks), zero(tokens * blocks), rest(tokens * blocks) {}

  void set(int64_t token, int64_t block, double s, double z, double sum, int64_t inputs) {
    int64_t at = token * blocks + block;
    scale.get()[at] = s;
    zero.get()[at] = z;
    rest.get()[at] = sum - static_cast<double>(inputs) * z;
  }
};

// What is known of the 64 outputs of a panel: 1.w per block; S and Z per group of weights.
struct Channels {
  int64_t blocks, groups;
  Buffer<double> sums, scale, zero;

  Channels(int64_t blocks, int64_t groups)
      : blocks(blocks), groups(groups), sums(blocks * kPanel), scale(groups * kPanel), zero(groups * kPanel) {}

  // scale, zero_point: float32 [outputs, groups]
  void read(const Panels& panels, int64_t panel, const float* of_scale, const float* of_zero) {
    const int64_t first = panel * kPanel, outputs = std::min<int64_t>(kPanel, panels.outputs - first);
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t o = 0; o < kPanel; ++o) sums.get()[b * kPanel + o] = panels.sums(b)[first + o];
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t h = 0; h < groups; ++h) {
        scale.get()[h * kPanel + o] = of_scale[(first + o) * groups + h];
        zero.get()[h * kPanel + o] = of_zero[(first + o) * groups + h];
      }
  }
};

struct Output {
  void* data;
  DType dtype;
  int64_t outputs;  // of a row
};

// One rounding: the bits that float32 cannot hold are cut off and leave their mark in the last one that it holds
// (rounding to odd), which decides no tie of a 16-bit dtype wrongly.
inline HalfFloats round_to_odd(Doubles y) {
  const int64_t beyond = (int64_t{1} << 29) - 1;
  Longs bits = (Longs)y, lost = (bits & beyond) != 0;
  return __builtin_convertvector((Doubles)((bits & ~beyond) | (lost & (beyond + 1))), HalfFloats);
}

typedef uint16_t Shorts __attribute__((vector_size(16)));

inline Shorts to_bfloat16(HalfFloats v) {
  HalfLanes bits = (HalfLanes)v, nan = (HalfLanes)(v != v);
  HalfLanes rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  return __builtin_convertvector(((nan & 0x7fc00000u) | (~nan & rounded)) >> 16, Shorts);
}

inline Shorts to_float16(HalfFloats v) {
  Floats wide = {};
  std::memcpy(&wide, &v, sizeof v);
  Lanes half = Float16::narrow(wide);
  HalfLanes low;
  std::memcpy(&low, &half, sizeof low);
  return __builtin_convertvector(low, Shorts);
}

// y: of 8 outputs from `output` on, of which the row may have fewer.
INLINE inline void store_outputs(const Output& to, int64_t token, int64_t output, Doubles y) {
  const int64_t here = std::min<int64_t>(kHalf, to.outputs - output), at = token * to.outputs + output;
  auto put = [&](auto* data, auto values) INLINE {
    if (__builtin_expect(here == kHalf, 1)) store(data + at, values);
    else if (here > 0) std::memcpy(data + at, &values, here * sizeof *data);
  };
  if (to.dtype == kBfloat16) return put(static_cast<uint16_t*>(to.data), to_bfloat16(round_to_odd(y)));
  if (to.dtype == kFloat32) return put(static_cast<float*>(to.data), __builtin_convertvector(y, HalfFloats));
  if (to.dtype == kFloat64) return put(static_cast<double*>(to.data), y);
  put(static_cast<uint16_t*>(to.data), to_float16(round_to_odd(y)));
}

// The sums of a tile of tokens and outputs while its blocks go by: over g, and over h; float64 [tokens, outputs].
template <int Size>
struct Sums {
  alignas(64) double inner[Size], total[Size];
};

// A block on its way through the sums.
struct Block {
  int64_t index, group;       // of all; of weights
  bool first, last, first_group, end;  // of its group; of all

  Block(int64_t index, const Channels& channels) : index(index) {
    const int64_t per_group = channels.blocks / channels.groups;
    group = index / per_group;
    first = index % per_group == 0;
    last = (index + 1) % per_group == 0;
    first_group = group == 0;
    end = index + 1 == channels.blocks;
  }
};

// Adds a block's dot products of a token with 8 outputs, and stores the outputs after the last block. at: of the 8 in
// the sums; output: the first of the 8 in the panel.
// Adds a block that is not the last of its group.
template <bool First, int Size, class Value>
INLINE inline void add_block(const Tokens& tokens, int64_t t, const double* ones, const double* zeros, const Value* dot,
                             Sums<Size>& sums, int at) {
  Doubles bracket = to_doubles(dot) - tokens.zero.get()[t] * load<Doubles>(ones);
  bracket = bracket - tokens.rest.get()[t] * load<Doubles>(zeros);
  const Doubles before = First ? Doubles{} : load<Doubles>(sums.inner + at);
  store(sums.inner + at, before + tokens.scale.get()[t] * bracket);
}

// The float64 part for 8 outputs, whose only block this is.
template <class Value>
INLINE inline Doubles only_block(const Tokens& tokens, int64_t token, const Channels& channels, int output,
                                 const Value* dot) {
  Doubles bracket = to_doubles(dot) - tokens.zero.get()[token] * load<Doubles>(channels.sums.get() + output);
  bracket = bracket - tokens.rest.get()[token] * load<Doubles>(channels.zero.get() + output);
  return Doubles{} + (Doubles{} + tokens.scale.get()[token] * bracket) * load<Doubles>(channels.scale.get() + output);
}

#ifdef __AVX512BW__
// Two times 8 outputs, with one rounding to bf16 for all: the same bits as store_outputs.
INLINE inline void store_bfloat16(uint16_t* to, Doubles a, Doubles b) {
  const HalfFloats low = round_to_odd(a), high = round_to_odd(b);
  const Floats v = (Floats)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)low), (__m256)high, 1);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const Lanes bits = (Lanes)v, rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const __m512i words = _mm512_mask_mov_epi32(_mm512_srli_epi32((__m512i)rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(words));
}
#endif

template <int Size, class Value>
INLINE inline void finish_block(const Tokens& tokens, int64_t token, const Channels& channels, int64_t panel,
                                const Block& block, int output, const Value* dot, Sums<Size>& sums, int at,
                                const Output& to) {
  const int64_t t = token * tokens.blocks + block.index, group = block.group * kPanel + output;
  const Doubles ones = load<Doubles>(channels.sums.get() + block.index * kPanel + output);
  Doubles bracket = to_doubles(dot) - tokens.zero.get()[t] * ones;
  bracket = bracket - tokens.rest.get()[t] * load<Doubles>(channels.zero.get() + group);
  Doubles inner = (block.first ? Doubles{} : load<Doubles>(sums.inner + at)) + tokens.scale.get()[t] * bracket;
  if (!block.last) return store(sums.inner + at, inner);
  Doubles total = block.first_group ? Doubles{} : load<Doubles>(sums.total + at);
  total = total + inner * load<Doubles>(channels.scale.get() + group);
  if (!block.end) return store(sums.total + at, total);
  store_outputs(to, token, panel * kPanel + output, total);
}

}  // namespace
