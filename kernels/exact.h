// The two ops of exact.py, bit for bit. Plain loops over blocks of 64 values, which any compiler vectorizes.

#pragma once

#include "vectors.h"

namespace {

// A block of a row, zeroed where the row has ended.
template <class T>
struct Part {
  T at[kBlock] = {};
  Part(const T* from, int64_t count) { std::memcpy(at, from, (count < kBlock ? count : kBlock) * sizeof(T)); }
};

// One row to its codes, int8 or int16; returns how many values saturated.
template <class Type, class Code>
int64_t exact_encode_row(const typename Type::Word* row, int64_t features, const float* center, const float* step,
                         float largest, Code* out) {
  Largest<typename Type::Word> seen;
  int64_t saturated = 0;
  for (int64_t from = 0; from < features; from += kBlock) {
    int64_t left = features - from;
    const Part<typename Type::Word> words(row + from, left);
    const Part<float> middle(center + from, left), steps(step + from, left);
    seen.see(words.at);
    Code codes[kBlock];
    int32_t beyond = 0;
    for (int i = 0; i < kBlock; ++i) {
      float v = (Type::value(words.at[i]) - middle.at[i]) / (i < left ? steps.at[i] : 1.0f);
      float near = v > -largest - 1 ? v : -largest - 1;  // NaN too
      near = near < largest + 1 ? near : largest + 1;
      float code = near + kMagic - kMagic;  // rounded, half to even
      beyond += std::fabs(code) > largest;
      code = code < -largest ? -largest : code > largest ? largest : code;
      codes[i] = static_cast<Code>(v == v ? static_cast<int32_t>(code) : 0);
    }
    saturated += beyond;
    std::memcpy(out + from, codes, (left < kBlock ? left : kBlock) * sizeof(Code));
  }
  out[features] = seen.reached(Type::infinity);
  return saturated;
}

template <class Type, class Code>
void exact_decode_row(const Code* total, int64_t features, const float* center, const float* step,
                      typename Type::Word* out) {
  const bool broken = total[features] != 0;
  for (int64_t from = 0; from < features; from += kBlock) {
    int64_t left = features - from;
    const Part<Code> codes(total + from, left);
    const Part<float> middle(center + from, left), steps(step + from, left);
    typename Type::Word words[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      float y = static_cast<float>(codes.at[i]) * steps.at[i] + middle.at[i];
      words[i] = Type::word(broken || y != y ? std::numeric_limits<float>::quiet_NaN() : y);
    }
    std::memcpy(out + from, words, (left < kBlock ? left : kBlock) * sizeof words[0]);
  }
}

// Two codes of 16 bits as the int32 high * 2^16 + low, and back.
inline void join_codes(const int16_t* codes, int64_t words, int32_t* out) {
  for (int64_t i = 0; i < words; ++i)
    out[i] = static_cast<int32_t>((static_cast<uint32_t>(static_cast<int32_t>(codes[2 * i])) << 16) + codes[2 * i + 1]);
}

inline void part_codes(const int32_t* words, int64_t count, int16_t* codes) {
  for (int64_t i = 0; i < count; ++i) {
    int16_t low = static_cast<int16_t>(words[i]);
    codes[2 * i] = static_cast<int16_t>((words[i] - low) >> 16), codes[2 * i + 1] = low;
  }
}

}  // namespace
