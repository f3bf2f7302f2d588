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

inline Doubles eight_of(double value) { return Doubles{value, value, value, value, value, value, value, value}; }

// A sum with a product, and a difference. Where float64 holds the product exactly, one fused operation rounds as the two
// do, and takes half the time.
template <bool Exact>
INLINE inline Doubles plus_product(Doubles sum, Doubles a, Doubles b) {
#ifdef __AVX512F__
  if constexpr (Exact) return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#endif
  return sum + a * b;
}
template <bool Exact>
INLINE inline Doubles minus_product(Doubles sum, Doubles a, Doubles b) {
#ifdef __AVX512F__
  if constexpr (Exact) return (Doubles)_mm512_fnmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#endif
  return sum - a * b;
}

// The largest distance of a code of `bits` bits from a whole zero point; infinity for one that is not whole.
inline double reach_of(double zero, int bits) {
  const double levels = (1 << bits) - 1;
  return zero == std::nearbyint(zero) ? std::max(std::abs(zero), std::abs(levels - zero))
                                      : std::numeric_limits<double>::infinity();
}

// A whole number as a product of 16-bit numbers takes it, two at once (vpdpwssd): v = low + 128 high, and its partner's
// negative, by which low and high are multiplied. |v| < 2^22; |partner| <= 255.
inline int32_t split(int32_t v) { return (v & 127) | (v >> 7) * 65536; }
inline int32_t negative_twice(int32_t partner) { return (-partner & 0xffff) | -128 * partner * 65536; }

constexpr double kQuickReach = 255;
constexpr int64_t kQuickInputs = (1 << 22) / 255;  // of a block
constexpr int64_t kQuickTokens = 8;

// What is known of the tokens, per block: s, z and x.1 - k z, float64 [tokens, blocks], and the same as finish.h's quick
// way takes them, where |x - z| allows. reach: the largest |x - z| of a token.
struct Tokens {
  struct Quick {
    int32_t zero, rest;
    float scale;
  };
  int64_t blocks;
  Buffer<double> scale, zero, rest, reach;
  Buffer<Quick> quick;

  Tokens(int64_t tokens, int64_t blocks)
      : blocks(blocks),
        scale(tokens * blocks),
        zero(tokens * blocks),
        rest(tokens * blocks),
        reach(tokens),
        quick(tokens * blocks) {}

  void set(int64_t token, int64_t block, double s, double z, double sum, int64_t inputs, double reach_of_codes) {
    int64_t at = token * blocks + block;
    scale.get()[at] = s;
    zero.get()[at] = z;
    rest.get()[at] = sum - static_cast<double>(inputs) * z;
    reach.get()[token] = std::max(reach.get()[token], reach_of_codes);
    if (reach_of_codes <= kQuickReach && inputs <= kQuickInputs)
      quick.get()[at] = {negative_twice(static_cast<int32_t>(z)), split(static_cast<int32_t>(rest.get()[at])),
                         static_cast<float>(s)};
  }
};

// What is known of the 64 outputs of a panel: 1.w per block; S, Z and the largest |w - Z| per group of weights. The quick
// ones are those of one group; making them pays for several tokens only.
struct Channels {
  int64_t blocks, groups;
  bool quick;
  Buffer<double> sums, scale, zero, reach;
  Buffer<int32_t> quick_sums, quick_zero;
  Buffer<float> quick_scale;

  Channels(int64_t blocks, int64_t groups, int64_t tokens)
      : blocks(blocks),
        groups(groups),
        quick(groups == 1 && tokens >= kQuickTokens),
        sums(blocks * kPanel),
        scale(groups * kPanel),
        zero(groups * kPanel),
        reach(groups),
        quick_sums(quick ? blocks * kPanel : 0),
        quick_zero(kPanel),
        quick_scale(kPanel) {}

  // scale, zero_point: float32 [outputs, groups]
  void read(const Panels& panels, int64_t panel, const float* of_scale, const float* of_zero) {
    const int64_t first = panel * kPanel, outputs = std::min<int64_t>(kPanel, panels.outputs - first);
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t o = 0; o < kPanel; ++o) sums.get()[b * kPanel + o] = panels.sums(b)[first + o];
    std::fill_n(reach.get(), groups, 0.0);
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t h = 0; h < groups; ++h) {
        scale.get()[h * kPanel + o] = of_scale[(first + o) * groups + h];
        zero.get()[h * kPanel + o] = of_zero[(first + o) * groups + h];
        reach.get()[h] = std::max(reach.get()[h], reach_of(of_zero[(first + o) * groups + h], panels.bits));
      }
    if (!quick || reach.get()[0] > kQuickReach) return;
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t o = 0; o < kPanel; ++o) quick_sums.get()[b * kPanel + o] = split(panels.sums(b)[first + o]);
    for (int64_t o = 0; o < outputs; ++o) {
      quick_zero.get()[o] = negative_twice(static_cast<int32_t>(zero.get()[o]));
      quick_scale.get()[o] = of_scale[first + o];
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

// The largest |x - z| of `rows` tokens.
inline double reach_of(const Tokens& tokens, int64_t token, int rows) {
  double reach = 0;
  for (int r = 0; r < rows; ++r) reach = std::max(reach, tokens.reach.get()[token + r]);
  return reach;
}

// The largest bracket of blocks of `inputs` can be.
inline double largest_bracket(double reach, const Channels& channels, int64_t inputs) {
  return static_cast<double>(inputs) * reach * *std::max_element(channels.reach.get(), channels.reach.get() + channels.groups);
}

// Whether float64 holds every product on a bracket's way into the sums, but the last: brackets are whole and below 2^29,
// and scales have 24 bits. (1.w and z, of 24 bits each, always have such products.)
inline bool is_exact(double largest) { return largest < double{1 << 29}; }

#ifdef __AVX512BW__
// 16 outputs with one rounding to bf16 for all: the same bits as store_outputs. A float32 that is cut off and then has
// its last bit set is rounded to odd; 0xa1 are NaNs and numbers below 2^-126, which are rare and left to the caller.
INLINE inline bool store_bfloat16(uint16_t* to, Doubles a, Doubles b) {
  auto odd = [](Doubles y) INLINE {
    const __m512i bits = (__m512i)y;
    const __mmask8 lost = _mm512_test_epi64_mask(bits, _mm512_set1_epi64((int64_t{1} << 29) - 1));
    const __m512i marked = _mm512_mask_or_epi64(bits, lost, bits, _mm512_set1_epi64(int64_t{1} << 29));
    return _mm512_cvt_roundpd_ps((__m512d)marked, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  };
  const __m512 v = _mm512_insertf32x8(_mm512_castps256_ps512(odd(a)), odd(b), 1);
  if (__builtin_expect(_mm512_fpclass_ps_mask(v, 0xa1), 0)) return false;
#ifdef __AVX512BF16__
  const __m256i words = (__m256i)_mm512_cvtneps_pbh(v);
#else
  const Lanes bits = (Lanes)v, rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)rounded, 16));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
  return true;
}
#endif

// 16 outputs from `output` on.
INLINE inline void store_sixteen(const Output& to, int64_t token, int64_t output, Doubles a, Doubles b) {
#ifdef __AVX512BW__
  if (to.dtype == kBfloat16 && output + 2 * kHalf <= to.outputs)
    if (store_bfloat16(static_cast<uint16_t*>(to.data) + token * to.outputs + output, a, b)) return;
#endif
  store_outputs(to, token, output, a);
  store_outputs(to, token, output + kHalf, b);
}

// The dot products of a tile with all its blocks: [rows of the tile][blocks][outputs of the tile].
template <class Value>
struct Dots {
  const Value* values;
  int64_t outputs;
};

// What is known of a token and a block, for eight outputs at a time. Values that are no codes' have s = 1 and z = 0.
struct TokenBlock {
  Doubles s, z, rest;

  TokenBlock(const Tokens& tokens, int64_t at)
      : s(eight_of(tokens.scale.get()[at])), z(eight_of(tokens.zero.get()[at])), rest(eight_of(tokens.rest.get()[at])) {}

  // sum + s bracket
  template <bool Exact, class Value>
  INLINE inline Doubles add(Doubles sum, const Value* dots, Doubles ones, Doubles zeros) const {
    const Doubles dot = to_doubles(dots);
    if constexpr (!std::is_same<Value, uint32_t>::value) return sum + (dot - rest * zeros);
    return plus_product<Exact>(sum, s, minus_product<Exact>(minus_product<true>(dot, z, ones), rest, zeros));
  }
};

// y of 16 outputs of a token, from `output` of the panel on. dots: of its first block with these outputs.
template <bool Exact, class Value>
INLINE inline void finish_sixteen(const Tokens& tokens, int64_t token, const Channels& channels, int64_t panel, int output,
                                  Dots<Value> dots, const Output& to) {
  const int64_t per_group = channels.blocks / channels.groups;
  const double* ones = channels.sums.get() + output;
  Doubles total[2] = {};
  int64_t t = token * tokens.blocks;
  for (int64_t h = 0; h < channels.groups; ++h) {
    const double *zeros = channels.zero.get() + h * kPanel + output, *scales = channels.scale.get() + h * kPanel + output;
    Doubles inner[2] = {};
    for (int64_t b = 0; b < per_group; ++b, ++t, ones += kPanel, dots.values += dots.outputs) {
      const TokenBlock block(tokens, t);
      each<2>([&](auto i) INLINE {
        const Doubles of_ones = load<Doubles>(ones + i * kHalf), of_zeros = load<Doubles>(zeros + i * kHalf);
        inner[i] = block.add<Exact>(inner[i], dots.values + i * kHalf, of_ones, of_zeros);
      });
    }
    each<2>([&](auto i) INLINE { total[i] += inner[i] * load<Doubles>(scales + i * kHalf); });
  }
  store_sixteen(to, token, panel * kPanel + output, total[0], total[1]);
}

// The same of one block for several tokens: what is known of the outputs stays in registers.
template <bool Exact, class Value>
INLINE inline void finish_sixteen_of_one_block(const Tokens& tokens, int64_t token, int rows, const Channels& channels,
                                               int64_t panel, int output, Dots<Value> dots, const Output& to) {
  Doubles ones[2], zeros[2], scales[2];
  each<2>([&](auto i) INLINE {
    ones[i] = load<Doubles>(channels.sums.get() + output + i * kHalf);
    zeros[i] = load<Doubles>(channels.zero.get() + output + i * kHalf);
    scales[i] = load<Doubles>(channels.scale.get() + output + i * kHalf);
  });
  const Output out = to;
  for (int r = 0; r < rows; ++r, dots.values += dots.outputs) {
    const TokenBlock block(tokens, token + r);
    Doubles y[2];
    each<2>([&](auto i) INLINE {
      // Fused to a zero, the product is rounded once as well.
      y[i] = plus_product<true>(Doubles{}, block.add<Exact>(Doubles{}, dots.values + i * kHalf, ones[i], zeros[i]), scales[i]);
    });
    store_sixteen(out, token + r, panel * kPanel + output, y[0], y[1]);
  }
}

// Outputs of `rows` tokens, [output, output + count) of the panel.
template <bool Exact, class Value>
__attribute__((noinline)) void finish_exactly(const Tokens& tokens, int64_t token, int rows, const Channels& channels,
                                              int64_t panel, int output, int count, Dots<Value> dots, const Output& to) {
  for (int i = 0; i < count; i += 2 * kHalf, dots.values += 2 * kHalf) {
    if (tokens.blocks == 1)
      finish_sixteen_of_one_block<Exact>(tokens, token, rows, channels, panel, output + i, dots, to);
    else
      for (int r = 0; r < rows; ++r) {
        const Value* row = dots.values + r * tokens.blocks * dots.outputs;
        finish_sixteen<Exact>(tokens, token + r, channels, panel, output + i, Dots<Value>{row, dots.outputs}, to);
      }
  }
}

}  // namespace
