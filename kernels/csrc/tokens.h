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
  __m512 least = _mm512_set1_ps(a), most = _mm512_set1_ps(b);
  __mmask16 broken = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 here = count - i < kLanes ? (1u << (count - i)) - 1 : 0xffff;
    const __m512 v = _mm512_maskz_loadu_ps(here, x + i);
    broken |= _mm512_mask_cmp_ps_mask(here, v, v, _CMP_UNORD_Q);
    least = _mm512_mask_min_ps(least, here, v, least);
    most = _mm512_mask_max_ps(most, here, v, most);
  }
  a = _mm512_reduce_min_ps(least), b = _mm512_reduce_max_ps(most), nan = broken;
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

// clamp(round(x / scale) + zero point, 0, 2^bits - 1), 0 for NaN; returns the sum of the codes. What a zero point is more
// than whole, that of a constant token, is added before the rounding.
inline int64_t codes_of(const float* x, int64_t count, QParams q, int bits, uint8_t* codes) {
  const float levels = static_cast<float>((1 << bits) - 1);
  const float whole = std::nearbyint(q.zero_point), rest = q.zero_point - whole;
  int64_t sum = 0, i = 0;
#ifdef LOWBIT_AVX512
  const __m512 scale = _mm512_set1_ps(q.scale), zero = _mm512_set1_ps(q.zero_point), top = _mm512_set1_ps(levels);
  __m512i total = _mm512_setzero_si512();
  for (; rest == 0 && i + kLanes <= count; i += kLanes) {
    __m512 v = _mm512_roundscale_ps(_mm512_div_ps(_mm512_loadu_ps(x + i), scale), _MM_FROUND_TO_NEAREST_INT);
    v = _mm512_max_ps(_mm512_add_ps(v, zero), _mm512_setzero_ps());  // of NaN, the second
    __m512i c = _mm512_cvttps_epi32(_mm512_min_ps(v, top));
    total = _mm512_add_epi32(total, c);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(c));
  }
  sum = _mm512_reduce_add_epi32(total);
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
