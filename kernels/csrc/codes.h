// Codes of 2 to 8 bits, packed as in packing.py: code i of a tier is bits [b i, b i + b) of its bytes.

#pragma once

#include "vectors.h"

namespace {

// Codes that lie in a byte each, side by side; zero up to the end of the last whole word.
class Packer {
 public:
  explicit Packer(int bits) : bits_(bits) {
#ifdef LOWBIT_AVX512
    for (int i = 0; i < kBlock; ++i) {
      bytes_[i] = static_cast<uint8_t>(i / bits * 8 + i % bits);
      times_[i] = static_cast<uint8_t>(i % 2 ? 1 << bits : 1);
    }
    for (int i = 0; i < kBlock / 2; ++i) times_two_[i] = static_cast<uint16_t>(i % 2 ? 1 << 2 * bits : 1);
    for (int i = 0; i < kLanes; i += 2) front_[i] = (1u << (4 * bits) % 32) - 1;
#endif
  }

  // codes -> `size` bytes at `to`.
  static void pack(const Packer& shared, const uint8_t* codes, uint8_t* to, int64_t size) {
    const Packer own = shared;  // in registers; the bytes written could be its members
    if (own.bits_ == 8) return void(std::memcpy(to, codes, size));
    int64_t at = 0;
#ifdef LOWBIT_AVX512
    for (; at + kBlock <= size; at += 8 * own.bits_, codes += kBlock) store(to + at, own.squeezed(codes));
    for (; at < size; at += 8 * own.bits_, codes += kBlock) {
      int64_t left = size - at < 8 * own.bits_ ? size - at : 8 * own.bits_;
      _mm512_mask_storeu_epi8(to + at, low_bits(left), (__m512i)own.squeezed(codes));
    }
#else
    for (const int bits = own.bits_; at < size; at += bits, codes += 8) {
      uint64_t run = 0;
      for (int i = 0; i < 8; ++i) run |= static_cast<uint64_t>(codes[i]) << bits * i;
      std::memcpy(to + at, &run, size - at < 8 ? (size - at < bits ? size - at : bits) : 8);
    }
#endif
  }

 private:
#ifdef LOWBIT_AVX512
  // 64 codes in the first 8 b bytes: two side by side in 16 bits, four in 32, eight in 64, whose low bytes move together.
  Bytes squeezed(const uint8_t* codes) const {
    __m512i twos = _mm512_maddubs_epi16((__m512i)times_, _mm512_loadu_si512(codes));
    __m512i fours = _mm512_madd_epi16(twos, (__m512i)times_two_);
    typedef uint64_t Longs __attribute__((vector_size(64)));
    Longs moved = (Longs)fours >> (32 - 4 * bits_);
    Longs eights = ((Longs)fours & (Longs)front_) | (moved & ~(Longs)front_);
    return (Bytes)_mm512_permutexvar_epi8((__m512i)bytes_, (__m512i)eights);
  }

  Bytes bytes_, times_;
  Words times_two_;
  Lanes front_ = {};
#endif
  int bits_;
};

// The inverse, four codes a lane: the first is its lowest bits, the next is after `next` bits, with others' above them.
// Code i of 64 is that of lane place(i) % 16 which comes as number place(i) / 16.
class Unpacker {
 public:
#ifdef LOWBIT_AVX512
  static constexpr int next = 8;
  static int64_t place(int64_t i) { return i; }

  // Two neighbours, 16 j + 2 q and the next, lie in 16 bits, which go to quarter j of 64-bit word q. (Of 7 bits: one
  // alone.) From there an instruction takes 8 bits at any bit.
  explicit Unpacker(int bits) : bits_(bits) {
    for (int i = 0; i < kBlock; ++i) {
      int j = i % 4, q = i / 8, pair = bits * (16 * j + 2 * q), odd = i % 8 / 4;
      from_[i] = static_cast<uint8_t>(16 * j + pair % 8 + bits * odd);
      from_alone_[i] = static_cast<uint8_t>(16 * j + (pair + bits) % 8);
      int quarter = bits * (16 * (i % 8 / 2) + 2 * q);
      bytes_[i] = static_cast<uint8_t>((quarter / 8 + i % 2) % kBlock);
      bytes_alone_[i] = static_cast<uint8_t>(((quarter + bits) / 8 + i % 2) % kBlock);
    }
  }
#else
  const int next;
  static int64_t place(int64_t i) { return i % kVectors * kLanes + i / kVectors; }

  explicit Unpacker(int bits) : next(bits), bits_(bits) {}
#endif

  // The 64 codes at `from`, or fewer: nothing is read past `bytes`.
  INLINE Lanes fours(const uint8_t* from, int64_t bytes) const {
#ifdef LOWBIT_AVX512
    __m512i raw = bytes >= kBlock ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(low_bits(bytes), from);
    __m512i out = _mm512_multishift_epi64_epi8((__m512i)from_, _mm512_permutexvar_epi8((__m512i)bytes_, raw));
    if (__builtin_expect(bits_ != 7, 1)) return (Lanes)out;
    raw = _mm512_permutexvar_epi8((__m512i)bytes_alone_, raw);
    return (Lanes)_mm512_mask_multishift_epi64_epi8(out, 0xf0f0f0f0f0f0f0f0u, (__m512i)from_alone_, raw);
#else
    uint8_t end[kBlock] = {};
    if (bytes < kBlock) std::memcpy(end, from, bytes), from = end;
    Lanes out;
    for (int i = 0; i < kLanes; ++i) out[i] = load<uint32_t>(from + bits_ * i / 2) >> bits_ * i % 2 * 4;
    return out;
#endif
  }

 private:
  int bits_;
#ifdef LOWBIT_AVX512
  Bytes from_, bytes_, from_alone_, bytes_alone_;
#endif
};

}  // namespace
