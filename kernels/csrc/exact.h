// The two ops of exact.py, bit for bit, on vectors of 16 neighbours.

#pragma once

#include "format.h"

namespace {

// The qparams of a row, up to a whole vector.
struct ExactPlan {
  Buffer<float> center, step, inverse;
  int64_t features;
  float largest;
  bool quick;

  ExactPlan(const float* centers, const float* steps, int64_t features, float largest)
      : center(features), step(features + kLanes), inverse(features + kLanes), features(features), largest(largest) {
    quick = kFused;
    for (int64_t i = 0; i < features + kLanes; ++i) {
      center.get()[i] = i < features ? quiet(centers[i]) : 0;
      float own = step.get()[i] = i < features ? quiet(steps[i]) : 1;
      inverse.get()[i] = 1 / own;
      quick &= own >= 0x1p-60f && own <= 0x1p60f && (as_bits(own) & 0x7fffff) != 0x7fffff;
    }
  }

  // The rounded quotient of x by steps, or where it is beyond the codes, something beyond. A division takes longer than
  // all of what replaces it. Of a quotient with an error of one unit in the last place, adding its remainder times the
  // rounded reciprocal makes the rounded one (Markstein 1990), unless the step's mantissa is all ones or something
  // leaves the range; the product with the reciprocal may be farther off, so this is done twice.
  INLINE Floats quotient(Floats x, int64_t from) const {
    Floats by = load<Floats>(step.get() + from);
#ifdef LOWBIT_AVX512
    if (quick) {
      Floats factor = load<Floats>(inverse.get() + from), near = x * factor;
      for (int turn = 0; turn < 2; ++turn) {
        near = clamped(near);
        Floats rest = (Floats)_mm512_fnmadd_ps((__m512)near, (__m512)by, (__m512)x);
        near = (Floats)_mm512_fmadd_ps((__m512)rest, (__m512)factor, (__m512)near);
      }
      return near;
    }
#endif
    return x / by;
  }

  // NaN goes to the lower end.
  INLINE Floats clamped(Floats v) const {
    const Floats least = splat(-largest - 1), most = splat(largest + 1);
#ifdef LOWBIT_AVX512
    return (Floats)_mm512_min_ps(_mm512_max_ps((__m512)v, (__m512)least), (__m512)most);
#else
    v = v > least ? v : least;
    return v < most ? v : most;
#endif
  }

#ifdef LOWBIT_AVX512
  static constexpr bool kFused = true;
#else
  static constexpr bool kFused = false;
#endif
};

template <class Type>
INLINE inline Floats widened(Lanes words) {
  if (std::is_same<Type, Float32>::value) return (Floats)words;
  return (Floats)(std::is_same<Type, Bfloat16>::value ? words << 16 : Float16::widen(words));
}

template <class Type>
INLINE inline Lanes narrowed(Floats v) {
  if (std::is_same<Type, Float32>::value) return (Lanes)v;
  return std::is_same<Type, Bfloat16>::value ? round_to_bf16(v) >> 16 : Float16::narrow(v);
}

// 16 numbers from or to memory, or `left` where there are fewer.
template <class V, class T>
INLINE inline V load_some(const T* from, int64_t left) {
  if (left >= kLanes) return load<V>(from);
  T copy[kLanes] = {};
  std::memcpy(copy, from, left * sizeof(T));
  return load<V>(copy);
}

template <class V, class T>
INLINE inline void store_some(T* to, V v, int64_t left) {
  std::memcpy(to, &v, left >= kLanes ? sizeof v : left * sizeof(T));
}

// One row to its codes, int8 or int16.
template <class Type, class Code>
void exact_encode_row(const typename Type::Word* row, const ExactPlan& plan, Code* out, Tally& tally) {
  typedef typename Type::Word WordsOf __attribute__((vector_size(kLanes * sizeof(typename Type::Word))));
  typedef Code Codes __attribute__((vector_size(kLanes * sizeof(Code))));
  const float largest = plan.largest;
  Ints saturated = {};
  Lanes broken = {};
  for (int64_t from = 0; from < plan.features; from += kLanes) {
    int64_t left = plan.features - from;
    Floats x = widened<Type>(__builtin_convertvector(load_some<WordsOf>(row + from, left), Lanes));
    broken = larger(broken, magnitude(x));
    Floats v = plan.quotient(x - load<Floats>(plan.center.get() + from), from);
    Floats code = plan.clamped(v) + kMagic - kMagic;  // rounded, half to even
    Ints low = code < -largest, high = code > largest;
    saturated -= low | high;
    code = low ? splat(-largest) : high ? splat(largest) : code;
    code = v == v ? code : Floats{};
    store_some(out + from, __builtin_convertvector(__builtin_convertvector(code, Ints), Codes), left);
  }
  out[plan.features] = largest_lane(broken) >= 0x7f800000u;
  for (int i = 0; i < kLanes; ++i) tally.saturated += saturated[i];
  tally.nonfinite += out[plan.features];
}

template <class Type, class Code>
void exact_decode_row(const Code* total, const ExactPlan& plan, typename Type::Word* out) {
  typedef typename Type::Word WordsOf __attribute__((vector_size(kLanes * sizeof(typename Type::Word))));
  typedef Code Codes __attribute__((vector_size(kLanes * sizeof(Code))));
  const bool broken = total[plan.features] != 0;
  for (int64_t from = 0; from < plan.features; from += kLanes) {
    int64_t left = plan.features - from;
    Floats codes = __builtin_convertvector(__builtin_convertvector(load_some<Codes>(total + from, left), Ints), Floats);
    Floats y = codes * load<Floats>(plan.step.get() + from) + load<Floats>(plan.center.get() + from);
    if (broken) y = splat(std::numeric_limits<float>::quiet_NaN());
    store_some(out + from, __builtin_convertvector(narrowed<Type>(y), WordsOf), left);
  }
}

// Two codes of 16 bits as the int32 high * 2^16 + low, and back. `codes` has room for whole vectors.
inline void join_codes(const int16_t* codes, int64_t words, int32_t* out) {
  for (int64_t i = 0; i < words; i += kLanes) {
    Lanes pairs = load<Lanes>(codes + 2 * i);
    store_some(out + i, (pairs << 16) + (Lanes)((Ints)pairs >> 16), words - i);
  }
}

inline void part_codes(const int32_t* words, int64_t count, int16_t* codes) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Lanes both = load_some<Lanes>(words + i, count - i), low = both << 16;
    store(codes + 2 * i, low | (both - (Lanes)((Ints)low >> 16)) >> 16);
  }
}

}  // namespace
