// Tokens quantized and brought back: as bytes that lie in a KV cache between the two, or at once.
//
//   row   codes as in packing.py | float32 scale | float32 zero point

#pragma once

#include "codes.h"
#include "tokens.h"

namespace {

constexpr int64_t kQParamBytes = sizeof(QParams);

// What the ends of a token's range are multiplied with, and the bits of its codes.
struct TokenBits {
  int bits;
  float low_ratio, high_ratio;

  // codes: of `count` values; returns what they were quantized with.
  QParams quantize(const float* x, int64_t count, uint8_t* codes) const {
    float low, high;
    range_of(x, count, &low, &high);
    const QParams q = qparams_of(low * low_ratio, high * high_ratio, bits);
    codes_of(x, count, q, bits, codes);
    return q;
  }
};

// (code - zero point) * scale
inline void values_of(const uint8_t* codes, int64_t count, QParams q, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = (static_cast<float>(codes[i]) - q.zero_point) * q.scale;
}

// The same of packed codes. bytes: of them; to: room for whole blocks of 64.
inline void values_of(const Unpacker& unpacker, const uint8_t* packed, int64_t bytes, int64_t count, int bits, QParams q,
                      float* to) {
  const uint32_t mask = (1u << bits) - 1;
  for (int64_t first = 0; first < count; first += kBlock, packed += 8 * bits, bytes -= 8 * bits) {
    const Lanes fours = unpacker.fours(packed, bytes);
    float values[kBlock];
    for (int j = 0; j < kVectors; ++j)
      store(values + j * kLanes, (to_floats(fours >> (unpacker.next * j) & mask) - q.zero_point) * q.scale);
    for (int i = 0; i < kBlock; ++i) to[first + i] = values[Unpacker::place(i)];
  }
}

// Of one thread: room for a token of `width` values.
class TokenRows {
 public:
  TokenRows(int64_t width, DType dtype, TokenBits how)
      : width_(width), dtype_(dtype), how_(how), packer_(how.bits), unpacker_(how.bits), codes_(up64(width)), values_(up64(width)) {}

  // codes: a byte each; scale, zero_point: of each group.
  void quantize(const void* x, int64_t groups, uint8_t* codes, float* scale, float* zero_point) {
    const int64_t group = width_ / groups;
    widen(x, dtype_, values_.get(), width_);
    for (int64_t g = 0; g < groups; ++g) {
      const QParams q = how_.quantize(values_.get() + g * group, group, codes + g * group);
      scale[g] = q.scale;
      zero_point[g] = q.zero_point;
    }
  }

  // row: of `bytes`, codes and what they were quantized with.
  void encode(const void* x, uint8_t* row, int64_t bytes) {
    widen(x, dtype_, values_.get(), width_);
    const QParams q = how_.quantize(values_.get(), width_, codes_.get());
    Packer::pack(packer_, codes_.get(), row, bytes - kQParamBytes);
    std::memcpy(row + bytes - kQParamBytes, &q, sizeof q);
  }

  void decode(const uint8_t* row, int64_t bytes, void* x) {
    QParams q;
    std::memcpy(&q, row + bytes - kQParamBytes, sizeof q);
    values_of(unpacker_, row, bytes - kQParamBytes, width_, how_.bits, q, values_.get());
    narrow(values_.get(), dtype_, x, width_);
  }

  void round(const void* x, int64_t groups, void* to) {
    const int64_t group = width_ / groups;
    widen(x, dtype_, values_.get(), width_);
    for (float* at = values_.get(); groups--; at += group)
      values_of(codes_.get(), group, how_.quantize(at, group, codes_.get()), at);
    narrow(values_.get(), dtype_, to, width_);
  }

 private:
  static int64_t up64(int64_t count) { return (count + kBlock - 1) / kBlock * kBlock; }

  const int64_t width_;
  const DType dtype_;
  const TokenBits how_;
  const Packer packer_;
  const Unpacker unpacker_;
  Buffer<uint8_t> codes_;  // zeros behind the last
  Buffer<float> values_;
};

}  // namespace
