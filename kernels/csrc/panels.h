// How the codes of a weight lie in memory for the kernels: panels of 64 outputs, as many bytes as the artifact's rows.
//
//   panel    64 outputs, all inputs; the rest of the last one is zeros
//   block    inputs that share their scales and zero points; padded with zeros to whole steps
//   step     16 inputs of the 64 outputs, 128 bytes per bit; four groups of 16 outputs, one after another in each plane
//   plane    4 bits (two vectors of 64 bytes per group), then 2 bits (one); 8-bit codes are bytes (four)
//
// Codes of 3 bits lie in 4, of 5 in 4 + 2, of 7 in 8. Behind the panels: the sum of the codes of every block and output,
// int32 [blocks, outputs padded to 64].
//
// Inside a group the order is that of what reads it. Integer dot products take four neighbouring inputs of an output,
// side by side in its lane of 32 bits: quads. Those of bf16 take two, in lanes of 16 bits: pairs.

#pragma once

#include "vectors.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int kPanel = 64;             // outputs
constexpr int kGroups = kPanel / 16;   // of 16 outputs
constexpr int kStep = 16;              // inputs
constexpr int kVector = 64;            // bytes

enum Order { kQuads, kPairs };

inline int64_t up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Bits that a code takes in a panel.
inline int stored_bits(int bits) { return bits <= 2 ? 2 : bits <= 4 ? 4 : bits <= 6 ? 6 : 8; }

struct Panels {
  const uint8_t* data;
  int64_t outputs, inputs, blocks;
  int bits;  // stored

  int64_t count() const { return up(outputs, kPanel) / kPanel; }
  int64_t block() const { return inputs / blocks; }
  int64_t steps() const { return up(block(), kStep) / kStep; }  // of a block
  int64_t step_bytes() const { return kStep * kPanel / 8 * bits; }
  int64_t panel_bytes() const { return blocks * steps() * step_bytes(); }
  int64_t bytes() const { return count() * panel_bytes() + blocks * count() * kPanel * 4; }
  const uint8_t* panel(int64_t index) const { return data + index * panel_bytes(); }
  const int32_t* sums(int64_t of_block) const {
    return reinterpret_cast<const int32_t*>(data + count() * panel_bytes()) + of_block * count() * kPanel;
  }
};

// Where in a step a code's bits of a plane are: a byte, and how far they are shifted in it.
struct Place {
  int64_t byte;
  int shift;
};

// plane_bits: 4, 2 or 8; input 0..15 and output 0..63 of the step.
inline Place place(Order order, int plane_bits, int input, int output) {
  const int per_byte = 8 / plane_bits, vectors = kStep / 4 / per_byte, lane = output % 16;
  int64_t group = output / 16 * vectors * kVector;
  if (order == kQuads) {
    int quad = input / 4;
    return {group + quad / per_byte * kVector + lane * 4 + input % 4, quad % per_byte * plane_bits};
  }
  const int per_word = 2 * per_byte, pair = input / 2, slot = pair % per_word;
  int64_t word = group + pair / per_word * kVector + (lane * 2 + input % 2) * 2;
  return {word + slot / per_byte, slot % per_byte * plane_bits};
}

// f(plane's place, its lowest bit, its mask) for each plane of the code.
template <class F>
inline void for_planes(int bits, Order order, int input, int output, F f) {
  if (bits == 8) return f(place(order, 8, input, output), 0, 255);
  if (bits & 4) f(place(order, 4, input, output), 0, 15);
  if (bits & 2) {
    Place at = place(order, 2, input, output);
    if (bits & 4) at.byte += kStep * kPanel / 2;
    f(at, bits & 4, 3);
  }
}

// f(output of the panel, input, step's first byte, input of the step) for all codes of a panel that there are.
template <class F>
inline void for_codes(const Panels& panels, int64_t index, F f) {
  int64_t outputs = std::min<int64_t>(kPanel, panels.outputs - index * kPanel);
  for (int64_t b = 0; b < panels.blocks; ++b)
    for (int64_t i = 0; i < panels.block(); ++i) {
      int64_t step = index * panels.panel_bytes() + (b * panels.steps() + i / kStep) * panels.step_bytes();
      for (int64_t o = 0; o < outputs; ++o) f(o, b * panels.block() + i, step, static_cast<int>(i % kStep));
    }
}

// Rows of codes as artifacts store them (packing.py): one after another from the lowest bit on, rows of whole bytes.
struct Rows {
  const uint8_t* data;
  int64_t row_bytes;
  int bits;

  int code(int64_t row, int64_t index) const {
    const uint8_t* at = data + row * row_bytes + index * bits / 8;
    const int shift = static_cast<int>(index * bits % 8);
    const int word = shift + bits > 8 ? at[0] | at[1] << 8 : at[0];
    return word >> shift & ((1 << bits) - 1);
  }
};

// [outputs, inputs] -> panels.
inline void pack_panels(const Rows& rows, const Panels& panels, Order order, uint8_t* to, int threads) {
  std::memset(to, 0, panels.bytes());
  int32_t* sums = reinterpret_cast<int32_t*>(to + panels.count() * panels.panel_bytes());
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t p = 0; p < panels.count(); ++p)
    for_codes(panels, p, [&](int64_t output, int64_t input, int64_t step, int i) {
      int code = rows.code(p * kPanel + output, input);
      sums[input / panels.block() * panels.count() * kPanel + p * kPanel + output] += code;
      for_planes(panels.bits, order, i, static_cast<int>(output), [&](Place at, int low, int mask) {
        to[step + at.byte] |= static_cast<uint8_t>((code >> low & mask) << at.shift);
      });
    });
}

// The inverse.
inline void unpack_panels(const Panels& panels, Order order, uint8_t* codes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t p = 0; p < panels.count(); ++p)
    for_codes(panels, p, [&](int64_t output, int64_t input, int64_t step, int i) {
      int code = 0;
      for_planes(panels.bits, order, i, static_cast<int>(output), [&](Place at, int low, int mask) {
        code |= (panels.data[step + at.byte] >> at.shift & mask) << low;
      });
      codes[(p * kPanel + output) * panels.inputs + input] = static_cast<uint8_t>(code);
    });
}

// Codes are read once, from main memory, and the hardware looks ahead to the end of a page only: one token took 1.4 times
// as long without this. step: bytes of it; further on may be past the end.
constexpr int64_t kReadAhead = 8192;
INLINE inline void fetch_codes(const uint8_t* step, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kVector) __builtin_prefetch(step + kReadAhead + i, 0, 2);
}

// What is loaded at once: all lanes of a group, or half of them where a register holds 32 bytes.
#if defined(__AVX512BW__)
constexpr int kWide = 64;
#else
constexpr int kWide = 32;
#endif
constexpr int kVectorsPerPanel = kPanel * 4 / kWide;
typedef uint32_t Quads __attribute__((vector_size(kWide)));   // 4 codes of an output in each lane
typedef uint16_t Pairs __attribute__((vector_size(kVector)));  // the codes of two inputs, output by output

// Quad Q (inputs 4 Q .. 4 Q + 3) of the vector-th kWide / 4 outputs: a code per byte.
template <int Bits, int Q>
INLINE inline Quads quad(const uint8_t* step, int vector) {
  const int group = vector * kWide / kVector, rest = vector * kWide % kVector;
  if constexpr (Bits == 8) return load<Quads>(step + (group * 4 + Q) * kVector + rest);
  Quads low = {}, high = {};
  if constexpr (Bits & 4) {
    low = load<Quads>(step + (group * 2 + Q / 2) * kVector + rest);
    low = (Q % 2 ? low >> 4 : low) & 0x0f0f0f0fu;
  }
  if constexpr (Bits & 2) {
    high = load<Quads>(step + (Bits & 4 ? kStep * kPanel / 2 : 0) + group * kVector + rest);
    high = high >> (2 * Q) & 0x03030303u;
    if constexpr (Bits & 4) high <<= 4;
  }
  return low | high;
}

// Pair P (inputs 2 P and 2 P + 1) of a group of 16 outputs: a code per 16 bits.
template <int Bits, int P>
INLINE inline Pairs pair(const uint8_t* step, int group) {
  if constexpr (Bits == 8) {
    Pairs both = load<Pairs>(step + (group * 4 + P / 2) * kVector);
    return P % 2 ? both >> 8 : both & 255;
  }
  Pairs low = {}, high = {};
  if constexpr (Bits & 4) low = load<Pairs>(step + (group * 2 + P / 4) * kVector) >> (4 * (P % 4)) & 15;
  if constexpr (Bits & 2) {
    high = load<Pairs>(step + (Bits & 4 ? kStep * kPanel / 2 : 0) + group * kVector) >> (2 * P) & 3;
    if constexpr (Bits & 4) high <<= 4;
  }
  return low | high;
}

// f(std::integral_constant of the stored bits)
template <class F>
inline void with_bits(int bits, F f) {
  switch (bits) {
    case 2: return f(std::integral_constant<int, 2>());
    case 4: return f(std::integral_constant<int, 4>());
    case 6: return f(std::integral_constant<int, 6>());
    default: return f(std::integral_constant<int, 8>());
  }
}

}  // namespace
