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

// What is known of the tokens, per block: s, z, x.1 - k z and the largest |x - z|; float64 [tokens, blocks].
struct Tokens {
  int64_t blocks;
  Buffer<double> scale, zero, rest, reach;

  Tokens(int64_t tokens, int64_t blocks)
      : blocks(blocks), scale(tokens * blocks), zero(tokens * blocks), rest(tokens * blocks), reach(tokens * blocks) {}

  void set(int64_t token, int64_t block, double s, double z, double sum, int64_t inputs, double reach_of_codes) {
    int64_t at = token * blocks + block;
    scale.get()[at] = s;
    zero.get()[at] = z;
    rest.get()[at] = sum - static_cast<double>(inputs) * z;
    reach.get()[at] = reach_of_codes;
  }
};

// What is known of the 64 outputs of a panel: 1.w per block; S, Z and the largest |w - Z| per group of weights.
struct Channels {
  int64_t blocks, groups;
  Buffer<double> sums, scale, zero, reach;

  Channels(int64_t blocks, int64_t groups)
      : blocks(blocks),
        groups(groups),
        sums(blocks * kPanel),
        scale(groups * kPanel),
        zero(groups * kPanel),
        reach(groups) {}

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
struct RowSums {
  double *inner, *total;
};
template <int Size>
struct Sums {
  alignas(64) double inner[Size], total[Size];
  RowSums from(int at) { return {inner + at, total + at}; }
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

// The largest |x - z| of a block of `rows` tokens.
inline double reach_of(const Tokens& tokens, int64_t token, int rows, int64_t block) {
  double reach = 0;
  for (int r = 0; r < rows; ++r) reach = std::max(reach, tokens.reach.get()[(token + r) * tokens.blocks + block]);
  return reach;
}

// Whether float64 holds every product on a bracket's way into the sums, but the last: brackets are whole and below 2^29,
// and scales have 24 bits. (1.w and z, of 24 bits each, always have such products.)
inline bool is_exact(double reach, const Channels& channels, const Block& block, int64_t inputs) {
  return static_cast<double>(inputs) * reach * channels.reach.get()[block.group] < double{1 << 29};
}

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

// Adds a block's dot products of `rows` tokens with `Count` outputs, a multiple of 16, and stores the outputs after the
// last block. output: the first in the panel; dots, sums: [rows][Count]. What is the same for all rows is read once: the
// compiler does not know that the sums, which are stored, are none of it.
template <bool Exact, int Count, class Value>
__attribute__((noinline)) void finish_rows(const Tokens& tokens, int64_t token, int rows, const Channels& channels,
                                           int64_t panel, const Block& block, int output, const Value* dots,
                                           RowSums sums, const Output& to) {
  constexpr int kParts = Count / kHalf;
  const int64_t group = block.group * kPanel + output, stride = tokens.blocks, t = token * stride + block.index;
  const double *s = tokens.scale.get() + t, *z = tokens.zero.get() + t, *rest = tokens.rest.get() + t;
  const double *of_ones = channels.sums.get() + block.index * kPanel + output, *of_zeros = channels.zero.get() + group;
  Doubles ones[kParts], zeros[kParts];
  each<kParts>([&](auto i) INLINE {
    ones[i] = load<Doubles>(of_ones + i * kHalf);
    zeros[i] = load<Doubles>(of_zeros + i * kHalf);
  });
  auto by_row = [&](auto work) INLINE {
    const Value* row = dots;
    for (int r = 0; r < rows; ++r, row += Count, s += stride, z += stride, rest += stride) {
      const Doubles s_r = eight_of(*s), z_r = eight_of(*z), rest_r = eight_of(*rest);
      work(r, [&](auto i, auto first) INLINE {
        const Doubles whole = minus_product<true>(to_doubles(row + i * kHalf), z_r, ones[i]);
        const Doubles bracket = minus_product<Exact>(whole, rest_r, zeros[i]);
        return plus_product<Exact>(first ? Doubles{} : load<Doubles>(sums.inner + r * Count + i * kHalf), s_r, bracket);
      });
    }
  };
  auto add = [&](auto first) INLINE {
    by_row([&](int r, auto inner) INLINE {
      each<kParts>([&](auto i) INLINE { store(sums.inner + r * Count + i * kHalf, inner(i, first)); });
    });
  };
  if (!block.last) return block.first ? add(std::true_type()) : add(std::false_type());
  const double* scales = channels.scale.get() + group;
  const Output out = to;
  const bool first_group = block.first_group, end = block.end;
  auto finish = [&](auto first) INLINE {
    by_row([&](int r, auto inner) INLINE {
      auto total = [&](auto i) INLINE {
        const Doubles scale = load<Doubles>(scales + i * kHalf), sum = inner(i, first);
        // Fused to a zero, the product is rounded once as well.
        return first_group ? plus_product<true>(Doubles{}, sum, scale)
                           : load<Doubles>(sums.total + r * Count + i * kHalf) + sum * scale;
      };
      each<kParts / 2>([&](auto i) INLINE {
        const Doubles a = total(std::integral_constant<int, 2 * i>());
        const Doubles b = total(std::integral_constant<int, 2 * i + 1>());
        if (end) return store_sixteen(out, token + r, panel * kPanel + output + i * 2 * kHalf, a, b);
        store(sums.total + r * Count + i * 2 * kHalf, a);
        store(sums.total + r * Count + i * 2 * kHalf + kHalf, b);
      });
    });
  };
  return block.first ? finish(std::true_type()) : finish(std::false_type());
}

}  // namespace
