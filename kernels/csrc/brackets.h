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

inline Doubles to_doubles(const uint32_t* whole) { return __builtin_convertvector(load<HalfLanes>(whole), Doubles); }
inline Doubles to_doubles(const float* values) { return __builtin_convertvector(load<HalfFloats>(values), Doubles); }
inline Doubles to_doubles(const double* values) { return load<Doubles>(values); }

// What is known of the tokens, per block: s, z and x.1 - k z; float64 [tokens, blocks].
struct Tokens {
  int64_t blocks;
  Buffer<double> scale, zero, rest;

  Tokens(int64_t tokens, int64_t blocks) : blocks(blocks), scale(tokens * blocks), zero(tokens * blocks), rest(tokens * blocks) {}

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

// y: of 8 outputs from `output` on, of which the row may have fewer.
inline void store_outputs(const Output& to, int64_t token, int64_t output, Doubles y) {
  const int64_t here = std::min<int64_t>(kHalf, to.outputs - output), at = token * to.outputs + output;
  if (here <= 0) return;
  auto put = [&](auto* data, const auto& values) {
    if (here == kHalf) std::memcpy(data + at, &values, kHalf * sizeof *data);
    else std::memcpy(data + at, &values, here * sizeof *data);
  };
  switch (to.dtype) {
    case kFloat64:
      return put(static_cast<double*>(to.data), y);
    case kFloat32:
      return put(static_cast<float*>(to.data), __builtin_convertvector(y, HalfFloats));
    default:
      break;
  }
  HalfFloats odd = round_to_odd(y);
  typedef uint16_t Shorts __attribute__((vector_size(16)));
  if (to.dtype == kBfloat16) {
    HalfLanes bits = (HalfLanes)odd;
    HalfLanes rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    HalfLanes nan = (HalfLanes)(odd != odd);
    rounded = (nan & 0x7fc00000u) | (~nan & rounded);
    return put(static_cast<uint16_t*>(to.data), __builtin_convertvector(rounded >> 16, Shorts));
  }
  Floats wide = {};
  std::memcpy(&wide, &odd, sizeof odd);
  Lanes half = Float16::narrow(wide);
  HalfLanes low;
  std::memcpy(&low, &half, sizeof low);
  put(static_cast<uint16_t*>(to.data), __builtin_convertvector(low, Shorts));
}

// The sums of a tile of tokens and outputs while its blocks go by: over g, and over h; float64 [tokens, outputs].
template <int Size>
struct Sums {
  alignas(64) double inner[Size], total[Size];
};

// Adds a block's dot products of a token with 8 outputs, and stores the outputs after the last block. at: of the 8 in
// the sums; output: the first of the 8 in the panel.
template <int Size, class Value>
INLINE inline void finish_block(const Tokens& tokens, int64_t token, const Channels& channels, int64_t panel, int64_t block,
                                int output, const Value* dot, Sums<Size>& sums, int at, const Output& to) {
  const int64_t per_group = channels.blocks / channels.groups, group = block / per_group;
  const int64_t t = token * tokens.blocks + block;
  const double* zeros = channels.zero.get() + group * kPanel + output;
  Doubles bracket = to_doubles(dot) - tokens.zero.get()[t] * load<Doubles>(channels.sums.get() + block * kPanel + output);
  bracket = bracket - tokens.rest.get()[t] * load<Doubles>(zeros);
  Doubles inner = block % per_group ? load<Doubles>(sums.inner + at) : Doubles{};
  inner = inner + tokens.scale.get()[t] * bracket;
  if ((block + 1) % per_group) return store(sums.inner + at, inner);
  Doubles total = group ? load<Doubles>(sums.total + at) : Doubles{};
  total = total + inner * load<Doubles>(channels.scale.get() + group * kPanel + output);
  if (block + 1 < channels.blocks) return store(sums.total + at, total);
  store_outputs(to, token, panel * kPanel + output, total);
}

}  // namespace
