// Tokens on their way into a product: values of any dtype as float32 rows, then codes per token and group.

#pragma once

#include "vectors.h"

namespace {

enum DType { kFloat32, kBfloat16, kFloat16, kFloat64 };  // as in cpu.py

inline void widen(const void* from, DType dtype, float* to, int64_t count) {
  switch (dtype) {
    case kFloat32:
      std::memcpy(to, from, count * sizeof(float));
      return;
    case kBfloat16: {
      const uint16_t* words = static_cast<const uint16_t*>(from);
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes)
        store(to + i, __builtin_convertvector(load<HalfWords>(words + i), Lanes) << 16);
      for (; i < count; ++i) to[i] = as_float(static_cast<uint32_t>(words[i]) << 16);
      return;
    }
    case kFloat16:
      return convert(static_cast<const Half*>(from), to, count);
    case kFloat64:
      return convert(static_cast<const double*>(from), to, count);
  }
}

// The inverse of widen, half to even.
inline void narrow(const float* from, DType dtype, void* to, int64_t count) {
  if (dtype == kFloat32) {
    std::memcpy(to, from, count * sizeof(float));
  } else if (dtype == kFloat16) {
    convert(from, static_cast<Half*>(to), count);
  } else {
    uint16_t* words = static_cast<uint16_t*>(to);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      Floats v = load<Floats>(from + i);
      Lanes nan = (Lanes)(v != v), bits = (nan & 0x7fc00000u) | (~nan & round_to_bf16(v));
      store(words + i, __builtin_convertvector(bits >> 16, HalfWords));
    }
    for (; i < count; ++i) words[i] = std::isnan(from[i]) ? 0x7fc0 : Bfloat16::word(from[i]);
  }
}

inline int64_t bytes_of(DType dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

struct QParams {
  float scale, zero_point;
};

// quantizer.py's qparams_from_range: one float32 operation at a time.
inline QParams qparams_of(float low, float high, int bits) {
  const float levels = static_cast<float>((1 << bits) - 1);
  float scale = high / levels - low / levels;
  if (scale < std::numeric_limits<float>::min()) return {1.0f, -low};
  if (!std::isfinite(scale)) scale = std::numeric_limits<float>::quiet_NaN();
  return {scale, -std::nearbyint(low / scale)};
}

// The smallest and the largest of the values; NaN where one is NaN.
inline void range_of(const float* x, int64_t count, float* low, float* high) {
  float a = std::numeric_limits<float>::infinity(), b = -a;
  bool nan = false;
#ifdef LOWBIT_AVX512
  __m512 least[kVectors], most[kVectors];  // several, because one would wait for itself
  each<kVectors>([&](auto i) INLINE { least[i] = _mm512_set1_ps(a), most[i] = _mm512_set1_ps(b); });
  __mmask16 broken = 0;
  int64_t at = 0;
  for (; at + kBlock <= count; at += kBlock) {
    __m512 v[kVectors];
    each<kVectors>([&](auto i) INLINE {
      v[i] = _mm512_loadu_ps(x + at + i * kLanes);
      least[i] = _mm512_min_ps(least[i], v[i]);
      most[i] = _mm512_max_ps(most[i], v[i]);
    });
    each<kVectors / 2>([&](auto i) INLINE { broken |= _mm512_cmp_ps_mask(v[2 * i], v[2 * i + 1], _CMP_UNORD_Q); });
  }
  for (; at < count; at += kLanes) {
    const __mmask16 here = count - at < kLanes ? (1u << (count - at)) - 1 : 0xffff;
    const __m512 v = _mm512_maskz_loadu_ps(here, x + at);
    broken |= _mm512_mask_cmp_ps_mask(here, v, v, _CMP_UNORD_Q);
    least[0] = _mm512_mask_min_ps(least[0], here, v, least[0]);
    most[0] = _mm512_mask_max_ps(most[0], here, v, most[0]);
  }
  a = _mm512_reduce_min_ps(_mm512_min_ps(_mm512_min_ps(least[0], least[1]), _mm512_min_ps(least[2], least[3])));
  b = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3])));
  nan = broken;
#else
  Floats least = splat(a), most = splat(b);
  Lanes broken = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Floats v = load<Floats>(x + i);
    least = v < least ? v : least;
    most = v > most ? v : most;
    broken |= (Lanes)(v != v);
  }
  auto see = [&](float small, float large) {
    a = small < a ? small : a;
    b = large > b ? large : b;
  };
  for (; i < count; ++i) see(x[i], x[i]), nan |= x[i] != x[i];
  for (int lane = 0; lane < kLanes; ++lane) see(least[lane], most[lane]), nan |= broken[lane] != 0;
#endif
  *low = nan ? std::numeric_limits<float>::quiet_NaN() : a;
  *high = nan ? std::numeric_limits<float>::quiet_NaN() : b;
}

#ifdef LOWBIT_AVX512
// codes_of for 64 values at a time, as long as their quotients are not in doubt.
//
// A division takes as long as all the rest, so x times 1/scale has to do. It is off by less than 3 2^-24 of itself, less
// than kDoubt where the code is not cut off, and the two round alike unless the product is that close to a half. (A scale
// above 2^126, whose inverse has fewer bits, has at most 3 bits of codes.)
class QuickCodes {
 public:
  QuickCodes(QParams q, float levels)
      : inverse_(_mm512_set1_ps(1 / q.scale)),
        zero_(_mm512_set1_epi16(static_cast<int16_t>(q.zero_point))),
        levels_(_mm512_set1_epi8(static_cast<uint8_t>(levels))) {}
  // Whether they exist. No NaN is a zero point, and no value is NaN then.
  static bool fit(QParams q) { return std::abs(q.zero_point) <= 512; }

  // The sums of the codes of each 8 values; false, and no codes, where one is in doubt.
  INLINE inline bool put(const float* x, uint8_t* codes, __m512i* sums) const {
    constexpr float kDoubt = 0x1p-12f;
    __m512i whole[kVectors];
    Lanes farthest = {};
    each<kVectors>([&](auto i) INLINE {
      const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + i * kLanes), inverse_);
      whole[i] = _mm512_cvtps_epi32(v);  // half to even
      farthest = larger_magnitude((Floats)_mm512_sub_ps(v, _mm512_cvtepi32_ps(whole[i])), farthest);
    });
    if (__builtin_expect(_mm512_cmp_ps_mask((__m512)farthest, _mm512_set1_ps(0.5f - kDoubt), _CMP_NLE_UQ), 0)) return false;
    auto words = [&](auto i) INLINE { return _mm512_adds_epi16(_mm512_packs_epi32(whole[i], whole[i + 1]), zero_); };
    const __m512i bytes = _mm512_packus_epi16(words(std::integral_constant<int, 0>()), words(std::integral_constant<int, 2>()));
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i c = _mm512_min_epu8(_mm512_permutexvar_epi32(in_order, bytes), levels_);
    *sums = _mm512_sad_epu8(c, _mm512_setzero_si512());
    _mm512_storeu_si512(codes, c);
    return true;
  }

 private:
  const __m512 inverse_;
  const __m512i zero_, levels_;
};
#endif

// clamp(round(x / scale) + zero point, 0, 2^bits - 1), 0 for NaN; returns the sum of the codes. What a zero point is more
// than whole, that of a constant token, is added before the rounding.
inline int64_t codes_of(const float* x, int64_t count, QParams q, int bits, uint8_t* codes) {
  const float levels = static_cast<float>((1 << bits) - 1);
  const float whole = std::nearbyint(q.zero_point), rest = q.zero_point - whole;
  int64_t sum = 0, i = 0;
#ifdef LOWBIT_AVX512
  const __m512 scale = _mm512_set1_ps(q.scale), zero = _mm512_set1_ps(q.zero_point), top = _mm512_set1_ps(levels);
  __m512i total = _mm512_setzero_si512();
  auto divide = [&]() INLINE {
    __m512 v = _mm512_roundscale_ps(_mm512_div_ps(_mm512_loadu_ps(x + i), scale), _MM_FROUND_TO_NEAREST_INT);
    v = _mm512_max_ps(_mm512_add_ps(v, zero), _mm512_setzero_ps());  // of NaN, the second
    __m512i c = _mm512_cvttps_epi32(_mm512_min_ps(v, top));
    sum += _mm512_reduce_add_epi32(c);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(c));
    i += kLanes;
  };
  if (rest == 0 && QuickCodes::fit(q)) {
    const QuickCodes quick(q, levels);
    __m512i sums;
    while (i + kBlock <= count) {
      if (quick.put(x + i, codes + i, &sums)) total = _mm512_add_epi64(total, sums), i += kBlock;
      else each<kVectors>([&](auto) INLINE { divide(); });
    }
  }
  while (rest == 0 && i + kLanes <= count) divide();
  sum += _mm512_reduce_add_epi64(total);
#endif
  for (; i < count; ++i) {
    float v = std::nearbyint(x[i] / q.scale + rest) + whole;
    v = v > 0 ? v : 0;
    codes[i] = static_cast<uint8_t>(v < levels ? v : levels);
    sum += codes[i];
  }
  return sum;
}

}  // namespace
