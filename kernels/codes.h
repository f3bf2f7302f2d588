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
  void pack(const uint8_t* codes, uint8_t* to, int64_t size) const {
    if (bits_ == 8) return void(std::memcpy(to, codes, size));
    int64_t at = 0;
#ifdef LOWBIT_AVX512
    for (; at + kBlock <= size; at += 8 * bits_, codes += kBlock) store(to + at, squeezed(codes));
    for (; at < size; at += 8 * bits_, codes += kBlock) {
      int64_t left = size - at < 8 * bits_ ? size - at : 8 * bits_;
      _mm512_mask_storeu_epi8(to + at, low_bits(left), (__m512i)squeezed(codes));
    }
#else
    for (; at < size; at += bits_, codes += 8) {
      uint64_t run = 0;
      for (int i = 0; i < 8; ++i) run |= static_cast<uint64_t>(codes[i]) << bits_ * i;
      std::memcpy(to + at, &run, size - at < 8 ? (size - at < bits_ ? size - at : bits_) : 8);
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

// The inverse, four neighbours a lane: code 4 i + j is the lowest bits of lane i >> b j, with others' above them.
class Unpacker {
 public:
  explicit Unpacker(int bits) : bits_(bits) {
#ifdef LOWBIT_AVX512
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < 4; ++j) bytes_[4 * i + j] = static_cast<uint8_t>((bits * i / 2 + j) % kBlock);
      shift_[i] = bits * i % 2 * 4;
    }
#endif
  }

  // The 64 codes at `from`, or fewer: nothing is read past `bytes`.
  Lanes fours(const uint8_t* from, int64_t bytes) const {
#ifdef LOWBIT_AVX512
    __m512i raw = _mm512_maskz_loadu_epi8(low_bits(bytes), from);
    return (Lanes)_mm512_permutexvar_epi8((__m512i)bytes_, raw) >> shift_;
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
  Bytes bytes_;
  Lanes shift_;
#endif
};

}  // namespace
