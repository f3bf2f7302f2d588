// Messages of N ranks to the sum of their rows. Features stay in wire order, where neighbours have as many bits, until
// the row is summed: four vectors at a time, in registers over all ranks. Then they move to their own places.

#pragma once

#include "codes.h"
#include "format.h"

namespace {

// Of codes of up to 5 bits, the value of each comes from a table: what the arithmetic of the others makes of it.
enum class Lookup { kSmall, kMedium, kNone };
constexpr int kTable = 2;  // vectors

template <class Type>
class Decoder {
 public:
  using Word = typename Type::Word;
  const Layout layout;

  Decoder(const LowbitFormat& format, int64_t ranks)
      : layout(format), ranks_(ranks), runs_(layout, true), qparams_(2 * ranks * layout.slots) {
    for (const Tier& tier : layout.tiers) {
      unpackers_.emplace_back(tier.bits);
      if (tier.bits == 16 && tier.count) mark_ = tier.byte;
    }
    for (int64_t r = 0; r < ranks; ++r)
      for (const Tier& tier : layout.tiers)
        for (int64_t i = 0; i < tier.count; ++i) {
          float* at = qparams(tier.slot + i / kBlock * kBlock, r) + Unpacker::place(i % kBlock);
          int64_t feature = r * layout.features + layout.order[tier.feature + i];
          float scale = quiet(format.scale[feature]), zero = quiet(format.zero_point[feature]);
          at[0] = scale, at[kBlock] = zero;
          // A value of at least 2^-25 and a zero of at least 2^-29 are multiples of 2^-52, and so is their difference;
          // times 2^-50 that is 0 or a multiple of 2^-126, the smallest normal number, as then all sums are.
          if (tier.bits < 16) normal_ &= std::fabs(scale) >= 0x1p-50f && (zero == 0 || std::fabs(zero) >= 0x1p-29f);
        }
#ifdef LOWBIT_AVX512
    for (auto& run : runs_.runs) run.index = (Bytes)_mm512_maskz_expand_epi8(run.mask, (__m512i)iota<Bytes>());
#endif
  }

  struct Scratch {
    explicit Scratch(const Decoder& decoder)
        : sums(kTokens * decoder.layout.slots), codes(decoder.ranks_ * kTokens) {}
    struct Codes {
      Floats table[kTable];
      const uint8_t* from;
      float middle, span, scale = 1;
    };
    Buffer<Word> sums;
    std::vector<Codes> codes;
  };

  // messages: the first of T rows that follow each other by row_stride, and of the ranks by rank_stride.
  template <int T>
  void decode(const uint8_t* messages, int64_t rank_stride, int64_t row_stride, Word* const* out,
              Scratch& scratch) const {
    const Unpacker* unpacker = unpackers_.data();
    for (const Tier& tier : layout.tiers) {
      if (tier.bits == 16)
        sum_bf16<T>(tier, messages, rank_stride, row_stride, scratch);
      else if (kTables && tier.bits <= 4)
        sum_codes<T, Lookup::kSmall>(tier, *unpacker, messages, rank_stride, row_stride, scratch);
      else if (kTables && tier.bits == 5)
        sum_codes<T, Lookup::kMedium>(tier, *unpacker, messages, rank_stride, row_stride, scratch);
      else
        sum_codes<T, Lookup::kNone>(tier, *unpacker, messages, rank_stride, row_stride, scratch);
      ++unpacker;
    }
    place<T>(scratch.sums.get(), out);
    for (int t = 0; t < T && !layout.per_token; ++t) {
      bool broken = false;
      for (int64_t r = 0; r < ranks_; ++r) broken |= travels_as_nan(messages + r * rank_stride + t * row_stride);
      Word nan = Type::word(std::numeric_limits<float>::quiet_NaN());
      for (int64_t f = 0; broken && f < layout.features; ++f) out[t][f] = nan;
    }
  }

 private:
  // Of a static format: by its header or, without one, by its first bf16 value.
  bool travels_as_nan(const uint8_t* row) const {
    if (layout.header) return row[0] != 0;
    if (mark_ < 0) return false;
    uint16_t word;
    std::memcpy(&word, row + mark_, 2);
    return (word & 0x7fff) > 0x7f80;
  }

#ifdef LOWBIT_AVX512
  static constexpr bool kTables = true;
#else
  static constexpr bool kTables = false;
#endif

  template <int T>
  void sum_bf16(const Tier& tier, const uint8_t* messages, int64_t rank_stride, int64_t row_stride,
                Scratch& scratch) const {
    for (int t = 0; t < T; ++t)
      for (int64_t first = 0; first < tier.count; first += kBlock) {
        float sum[kBlock] = {};
        Floats placed[kVectors];
        uint16_t words[kBlock] = {};
        int64_t count = tier.count - first < kBlock ? tier.count - first : kBlock;
        for (int64_t r = 0; r < ranks_; ++r) {
          std::memcpy(words, messages + r * rank_stride + t * row_stride + tier.byte + 2 * first, 2 * count);
          for (int i = 0; i < kBlock; ++i) sum[i] += Bfloat16::value(words[i]);
        }
        Word* to = scratch.sums.get() + t * layout.slots + tier.slot + first;
        for (int i = 0; i < kBlock; ++i) to[i] = Type::word(sum[i]);
      }
  }

  template <int T, Lookup kLookup>
  void sum_codes(const Tier& tier, const Unpacker& shared, const uint8_t* messages, int64_t rank_stride,
                 int64_t row_stride, Scratch& scratch) const {
    const Unpacker unpacker = shared;
    const uint32_t largest = (1u << tier.bits) - 1;
    const Lanes mask = Lanes{} + largest;
    auto* codes = scratch.codes.data();
    for (int64_t r = 0; r < ranks_; ++r)
      for (int t = 0; t < T; ++t) {
        const uint8_t* row = messages + r * rank_stride + t * row_stride;
        auto& own = codes[r * T + t];
        own.from = row + tier.byte;
        own.middle = tier.largest() / 2, own.span = static_cast<float>(tier.code_span());
        if (layout.per_token) own.scale = header_scale(row[0]);
        if (kLookup != Lookup::kNone)
          for (int i = 0; i < kTable; ++i)  // again and again: the bits above a code are its neighbours'
            own.table[i] = decoded((iota<Lanes>() + i * kLanes) & largest, own);
      }
    for (int64_t block = 0; block < tier.count; block += kBlock) {
      int64_t at = block / 8 * tier.bits;
      Floats sum[T][kVectors] = {};
      for (int64_t r = 0; r < ranks_; ++r) {
        const auto* own = codes + r * T;
        const float* scales = qparams(tier.slot + block, r);
        const float* zeros = scales + kBlock;
        Lanes fours[T];
        each<T>([&](auto t) INLINE {
          fours[t] = unpacker.fours(own[t].from + at, tier.size - at);
          fetch_early(own[t].from + at + T * row_stride);
        });
        each<kVectors>([&](auto j) INLINE {
          Floats scale = keep(load<Floats>(scales + j * kLanes)), zero = keep(load<Floats>(zeros + j * kLanes));
          each<T>([&](auto t) INLINE {
            Floats v = value<kLookup>(fours[t], mask, own[t]);
            sum[t][j] += (v - zero) * scale;
            fours[t] >>= unpacker.next;
          });
        });
      }
      each<T>([&](auto t) INLINE {
        Type::store_block(scratch.sums.get() + t * layout.slots + tier.slot + block, sum[t], normal_);
      });
    }
  }

  // v^ of codes.
  INLINE Floats decoded(Lanes codes, const typename Scratch::Codes& own) const {
    Floats value = to_floats(codes);
    if (!layout.per_token) return value;
    value = (value - own.middle) * own.span;
    return (value - clip(value * 0.5f, kKnee)) * own.scale;
  }

  template <Lookup kLookup>
  INLINE Floats value(Lanes codes, Lanes mask, const typename Scratch::Codes& own) const {
#ifdef LOWBIT_AVX512
    const Floats* table = own.table;
    if (kLookup == Lookup::kSmall) return (Floats)_mm512_permutexvar_ps((__m512i)codes, (__m512)table[0]);
    if (kLookup == Lookup::kMedium)
      return (Floats)_mm512_permutex2var_ps((__m512)table[0], (__m512i)codes, (__m512)table[1]);
#endif
    return decoded(codes & mask, own);
  }

  // Sums in wire order to rows.
  template <int T>
  void place(const Word* sums, Word* const* out) const {
#ifdef LOWBIT_AVX512
    for (int64_t number : runs_.by_runs) {
      Lanes block[T] = {};
      const auto* end = runs_.runs.data() + runs_.first[number + 1];
      for (const auto* run = runs_.runs.data() + runs_.first[number]; run < end; ++run)
        each<T>([&](auto t) INLINE {
          __m512i words = _mm512_loadu_si512(sums + t * layout.slots + run->slot);
          block[t] = (Lanes)_mm512_mask_permutexvar_epi8((__m512i)block[t], run->mask, (__m512i)run->index, words);
        });
      int64_t from = number * kRun, left = layout.features - from;
      each<T>([&](auto t) INLINE {
        Lanes whole = block[t];  // a copy, so that the others need no address
        fetch_early(out[t] + from + T * layout.features);
        if (left >= kRun)
          store(out[t] + from, whole);
        else
          std::memcpy(out[t] + from, &whole, left * sizeof(Word));
      });
    }
#endif
    for (const auto& single : runs_.singles)
      for (int t = 0; t < T; ++t) out[t][single.feature] = sums[t * layout.slots + single.slot];
  }

  static constexpr int kRun = 64 / sizeof(Word);
  int64_t ranks_;
  Runs<kRun> runs_;
  std::vector<Unpacker> unpackers_;
  Buffer<float> qparams_;  // of 64 features in wire order, as Unpacker has them, every rank's scales and zeros
  float* qparams(int64_t slot, int64_t rank) const {
    return const_cast<float*>(qparams_.get()) + 2 * (slot * ranks_ + rank * kBlock);
  }
  bool normal_ = true;  // no sum is subnormal
  int64_t mark_ = -1;   // the first bf16 value's place in a row
};

}  // namespace
