// Rows of `Type` to messages. A block of 64 features goes through the arithmetic in the row's own order, each with the
// qparams of its own width, as four vectors; its codes, a byte each, are then dealt out to their tiers and packed there.

#pragma once

#include "codes.h"
#include "format.h"

namespace {

template <class Type>
class Encoder {
 public:
  using Word = typename Type::Word;
  const Layout layout;

  explicit Encoder(const LowbitFormat& format)
      : layout(format),
        runs_(layout, false),
        inverse_(padded(layout.features)),
        zero_(padded(layout.features)),
        per_step_(padded(layout.features)),
        middle_(padded(layout.features)),
        limit_(padded(layout.features)),
        top_(padded(layout.features)) {
    for (int64_t i = 0; i < padded(layout.features); ++i) limit_.get()[i] = static_cast<Limit>(-1);  // no codes, no limit
    for (const Tier& tier : layout.tiers) {
      if (tier.bits < 16) packers_.emplace_back(tier.bits);
      for (int64_t i = tier.feature; i < tier.feature + tier.count; ++i) {
        int64_t f = layout.order[i], at = f / kBlock * kBlock + Type::place(f % kBlock);
        if (tier.bits == 16) continue;  // makes codes that nobody reads
        inverse_.get()[at] = quiet(1.0f / format.scale[i]);
        zero_.get()[at] = quiet(format.zero_point[i]);
        per_step_.get()[at] = static_cast<float>(1 / tier.code_span());
        middle_.get()[at] = tier.largest() / 2;
        top_.get()[f] = static_cast<uint8_t>(tier.largest());
        limit_.get()[limit_place(at)] = static_cast<Limit>(tier.largest());
      }
    }
  }

  struct Scratch {
    explicit Scratch(const Layout& layout)
        : codes(kTokens * layout.slots), bytes(padded(layout.features)), ends(kTokens * kBlock) {}
    Buffer<uint8_t> codes, bytes;
    Buffer<Word> ends;
  };

  // T rows to T messages; returns how many values saturated.
  template <int T>
  int64_t encode(const Word* const* rows, uint8_t* const* out, Scratch& scratch) const {
    int64_t saturated = 0;
    Row from[T];
    bool broken[T];
    uint8_t header[T];
    float inverse[T];
    for (int t = 0; t < T; ++t) {
      Word* end = scratch.ends.get() + t * kBlock;
      int64_t whole = layout.features / kBlock * kBlock;
      std::memcpy(end, rows[t] + whole, (layout.features - whole) * sizeof(Word));
      from[t] = {rows[t], end, whole};
    }
    if (layout.rank1) {
      saturated = scales<T>(from, header, broken);
      for (int t = 0; t < T; ++t) {
        float scale = header_scale(header[t]);
        inverse[t] = scale > 0 ? 1.0f / scale : 0.0f;
      }
      codes<T, true>(from, inverse, scratch);
    } else {
      saturated = codes<T, false>(from, inverse, scratch);
      for (int t = 0; t < T; ++t) header[t] = broken[t] = holds_broken(from[t]);
    }
    for (int t = 0; t < T; ++t) {
      if (layout.header) out[t][0] = header[t];
      const uint8_t* codes = scratch.codes.get() + t * layout.slots;
      const Packer* packer = packers_.data();
      for (const Tier& tier : layout.tiers) {
        uint8_t* to = out[t] + tier.byte;
        if (tier.bits < 16)
          (packer++)->pack(codes + tier.slot, to, tier.size);
        else if (broken[t])
          std::memset(to, kBf16NaN & 0xff, tier.size);
        else
          for (int64_t i = 0; i < tier.count; ++i) {
            uint16_t word = Bfloat16::word(Type::value(rows[t][layout.order[tier.feature + i]]) + 0.0f);
            std::memcpy(to + 2 * i, &word, 2);
          }
      }
    }
    return saturated;
  }

 private:
  struct Row {
    const Word* words;
    const Word* end;  // its last features, padded to a block
    int64_t whole;    // features before them
    const Word* block(int64_t from) const { return from < whole ? words + from : end; }
  };

  // v of 16 features, in vector V of the block.
  template <int V>
  INLINE Floats normed(const Word* block, Floats inverse, Floats zero) const {
    return Type::template load<V>(block) * inverse + zero;
  }

  // Each rank-1 token's scale; returns how many values lie far out.
  template <int T>
  int64_t scales(const Row* rows, uint8_t* header, bool* broken) const {
    Lanes most[T] = {};  // bitwise: NaN is above all others
    for (int64_t from = 0; from < layout.features; from += kBlock) {
      each<kVectors>([&](auto v) INLINE {
        Floats inverse = load<Floats>(inverse_.get() + from + v * kLanes);
        Floats zero = load<Floats>(zero_.get() + from + v * kLanes);
        each<T>([&](auto t) INLINE {
          most[t] = larger(magnitude(normed<v.value>(rows[t].block(from), inverse, zero)), most[t]);
        });
      });
    }
    int64_t far = 0;
    for (int t = 0; t < T; ++t) {
      // Finite only if the whole row is: the features in bf16 are there times 0.
      float largest = as_float(largest_lane(most[t]));
      broken[t] = !std::isfinite(largest) && holds_broken(rows[t]);
      if (!(largest <= kFar)) far += count_far(rows[t], &largest);
      header[t] = broken[t] ? kBroken : scale_header(largest);
    }
    return far;
  }

  // The same for one row of which some values are far out or broken, and the largest of the coded ones.
  int64_t count_far(const Row& row, float* largest) const {
    int64_t far = 0;
    uint32_t most = 0;
    for (const Tier& tier : layout.tiers)
      for (int64_t i = tier.feature; tier.bits < 16 && i < tier.feature + tier.count; ++i) {
        int64_t f = layout.order[i], at = f / kBlock * kBlock + Type::place(f % kBlock);
        float v = std::fabs(Type::value(row.words[f]) * inverse_.get()[at] + zero_.get()[at]);
        far += !(v <= kFar);
        most = as_bits(v) > most ? as_bits(v) : most;
      }
    *largest = as_float(most);
    return far;
  }

  bool holds_broken(const Row& row) const {
    Largest<Word> largest;
    for (int64_t from = 0; from < layout.features; from += kBlock) largest.see(row.block(from));
    return largest.reached(Type::infinity);
  }

  // The codes of all features, at the slots of their tiers; returns how many values lie outside them (static).
  template <int T, bool kRank1>
  int64_t codes(const Row* rows, const float* token_inverse, Scratch& scratch) const {
    int64_t saturated = 0;
    for (int64_t from = 0; from < layout.features; from += kBlock) {
      Floats values[T][kVectors];
      const Word* block[T];
      for (int t = 0; t < T; ++t) block[t] = rows[t].block(from);
      each<kVectors>([&](auto v) INLINE {
        int64_t at = from + v * kLanes;
        Floats inverse = keep(load<Floats>(inverse_.get() + at)), zero = keep(load<Floats>(zero_.get() + at));
        Floats per_step = keep(load<Floats>(per_step_.get() + at)), middle = keep(load<Floats>(middle_.get() + at));
        each<T>([&](auto t) INLINE {
          Floats value = normed<v.value>(block[t], inverse, zero);
          if (kRank1) value = value * (splat(token_inverse[t]) * per_step) + middle;
          values[t][v] = value;
        });
      });
      Bytes bytes[T];
      each<T>([&](auto t) INLINE { bytes[t] = round(values[t], from, kRank1 ? nullptr : &saturated); });
      deal<T>(bytes, from, scratch.codes.get());
    }
    return saturated;
  }

  // 64 codes in the row's order. NaN goes to code 0, and counts as saturated.
  INLINE Bytes round(const Floats* values, int64_t from, int64_t* saturated) const {
#ifdef LOWBIT_AVX512
    __m512i codes[kVectors], words[2];
    for (int v = 0; v < kVectors; ++v)  // below the range of int32 are NaN and what is less, above it nothing
      codes[v] = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_set1_ps(0x7fff), (__m512)values[v]));
    for (int half = 0; half < 2; ++half) {
      words[half] = _mm512_packs_epi32(codes[2 * half], codes[2 * half + 1]);
      if (!saturated) continue;
      __m512i limit = _mm512_loadu_si512(limit_.get() + from + 32 * half);
      *saturated += __builtin_popcount(_mm512_cmpgt_epu16_mask(words[half], limit));  // unsigned: negative ones are large
    }
    __m512i bytes = _mm512_packus_epi16(words[0], words[1]);
    bytes = _mm512_permutexvar_epi8((__m512i)natural_, bytes);
    return (Bytes)_mm512_min_epu8(bytes, _mm512_loadu_si512(top_.get() + from));
#else
    Lanes codes[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      Floats value = values[v] > -32768.0f ? values[v] : splat(-32768.0f);  // NaN too
      value = value < 32767.0f ? value : splat(32767.0f);
      Lanes code = (Lanes)(value + splat(kMagic)) - as_bits(kMagic), limit = load<Lanes>(limit_.get() + from + v * kLanes);
      if (saturated)
        for (int i = 0; i < kLanes; ++i) *saturated += code[i] > limit[i];
      code = (Ints)code < 0 ? Lanes{} : code;
      codes[v] = code > limit ? limit : code;
    }
    uint8_t bytes[kBlock];
    if (Type::place(1) == 1)
      for (int i = 0; i < kBlock; ++i) bytes[i] = static_cast<uint8_t>(codes[i / kLanes][i % kLanes]);
    else
      for (int half = 0; half < 2; ++half) {
        Lanes pairs = codes[2 * half] | codes[2 * half + 1] << 8;
        uint16_t words[kLanes];
        for (int i = 0; i < kLanes; ++i) words[i] = static_cast<uint16_t>(pairs[i]);
        std::memcpy(bytes + 32 * half, words, sizeof words);
      }
    return load<Bytes>(bytes);
#endif
  }

  // The codes of a block to the slots of their tiers. Zeros, or what is overwritten next, follow them there.
  template <int T>
  INLINE void deal(const Bytes* block, int64_t from, uint8_t* codes) const {
#ifdef LOWBIT_AVX512
    if (!runs_.first.empty()) {
      const auto* end = &runs_.runs[runs_.first[from / kBlock + 1]];
      for (const auto* run = &runs_.runs[runs_.first[from / kBlock]]; run < end; ++run) {
        bool wide = __builtin_popcountll(run->mask) > kBlock / 2;  // a store of 64 bytes takes twice as long as one of 32
        each<T>([&](auto t) INLINE {
          __m512i own = _mm512_maskz_compress_epi8(run->mask, (__m512i)block[t]);
          uint8_t* to = codes + t * layout.slots + run->slot;
          _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(own));
          if (wide) _mm256_storeu_si256((__m256i*)to + 1, _mm512_extracti64x4_epi64(own, 1));
        });
      }
      return;
    }
#endif
    for (int t = 0; t < T; ++t)
      for (int64_t i = 0; i < kBlock && from + i < layout.features; ++i)
        codes[t * layout.slots + runs_.slot[from + i]] = block[t][i];
  }

#ifdef LOWBIT_AVX512
  // Packing saturates within quarters of a register: word w of two vectors is lane w / 8 * 4 + w % 4 of one of them.
  using Limit = uint16_t;
  static int64_t limit_place(int64_t at) { return at / 32 * 32 + at % 16 / 4 * 8 + at / 16 % 2 * 4 + at % 4; }
  Bytes natural_ = natural();
  static Bytes natural() {
    Bytes places;
    for (int i = 0; i < kBlock; ++i) {
      int64_t at = Type::place(i);
      places[i] = static_cast<uint8_t>(at % 16 / 4 * 16 + at / 16 * 4 + at % 4);
    }
    return places;
  }
#else
  using Limit = uint32_t;
  static int64_t limit_place(int64_t at) { return at; }
#endif

  Runs<kBlock> runs_;
  std::vector<Packer> packers_;
  Buffer<float> inverse_, zero_, per_step_, middle_;  // of the features in the order of Type::load
  Buffer<Limit> limit_;
  Buffer<uint8_t> top_;  // in the row's order
};

}  // namespace
