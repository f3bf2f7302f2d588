// Messages of N ranks to the sum of their rows. Features stay in wire order, where neighbours have as many bits, until
// the row is summed: four vectors at a time, in registers over all ranks. Then they move to their own places.

#pragma once

#include "codes.h"
#include "format.h"

namespace {

// Of codes of up to 5 bits, the value of each comes from a table: what the arithmetic of the others makes of it.
enum class Lookup { kSmall, kMedium, kNone };
constexpr int kTable = 32;

template <class Type>
class Decoder {
 public:
  using Word = typename Type::Word;
  const Layout layout;

  Decoder(const LowbitFormat& format, int64_t ranks) : layout(format), ranks_(ranks), runs_(layout, true) {
    for (int64_t r = 0; r < ranks; ++r) {
      scale_.emplace_back(layout.slots);
      zero_.emplace_back(layout.slots);
      for (const Tier& tier : layout.tiers)
        for (int64_t i = 0; i < tier.count; ++i) {
          int64_t at = tier.slot + i / kBlock * kBlock + i % kVectors * kLanes + i % kBlock / kVectors;
          scale_[r].get()[at] = quiet(format.scale[r * layout.features + tier.feature + i]);
          zero_[r].get()[at] = quiet(format.zero_point[r * layout.features + tier.feature + i]);
        }
    }
  }

  struct Scratch {
    explicit Scratch(const Decoder& decoder)
        : sums(kTokens * decoder.layout.slots), codes(decoder.ranks_ * kTokens) {}
    struct Codes {
      const uint8_t* from;
      float middle, step;
      float table[kTable];
    };
    Buffer<Word> sums;
    std::vector<Codes> codes;
  };

  // messages: the first of T rows that follow each other by row_stride, and of the ranks by rank_stride.
  template <int T>
  void decode(const uint8_t* messages, int64_t rank_stride, int64_t row_stride, Word* const* out,
              Scratch& scratch) const {
    for (const Tier& tier : layout.tiers) {
      if (tier.bits == 16)
        sum_bf16<T>(tier, messages, rank_stride, row_stride, scratch);
      else if (kTables && tier.bits <= 4)
        sum_codes<T, Lookup::kSmall>(tier, messages, rank_stride, row_stride, scratch);
      else if (kTables && tier.bits == 5)
        sum_codes<T, Lookup::kMedium>(tier, messages, rank_stride, row_stride, scratch);
      else
        sum_codes<T, Lookup::kNone>(tier, messages, rank_stride, row_stride, scratch);
    }
    place<T>(scratch.sums.get(), out);
    for (int t = 0; t < T && layout.header && !layout.rank1; ++t) {
      bool broken = false;
      for (int64_t r = 0; r < ranks_; ++r) broken |= messages[r * rank_stride + t * row_stride] != 0;
      Word nan = Type::word(std::numeric_limits<float>::quiet_NaN());
      for (int64_t f = 0; broken && f < layout.features; ++f) out[t][f] = nan;
    }
  }

 private:
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
  void sum_codes(const Tier& tier, const uint8_t* messages, int64_t rank_stride, int64_t row_stride,
                 Scratch& scratch) const {
    const Unpacker unpacker(tier.bits);
    const Lanes mask = Lanes{} + ((1u << tier.bits) - 1), bits = Lanes{} + static_cast<uint32_t>(tier.bits);
    auto* codes = scratch.codes.data();
    for (int64_t r = 0; r < ranks_; ++r)
      for (int t = 0; t < T; ++t) {
        const uint8_t* row = messages + r * rank_stride + t * row_stride;
        auto& own = codes[r * T + t];
        own.from = row + tier.byte;
        own.middle = layout.rank1 ? tier.largest() / 2 : 0.0f;
        own.step = layout.rank1 ? header_scale(row[0]) * static_cast<float>(tier.code_span()) : 1.0f;
        if (kLookup != Lookup::kNone)
          for (int i = 0; i < kTable; ++i)  // again and again: the bits above a code are its neighbours'
            own.table[i] = (static_cast<float>(i & ((1 << tier.bits) - 1)) - own.middle) * own.step;
      }
    for (int64_t block = 0; block < tier.count; block += kBlock) {
      int64_t at = block / 8 * tier.bits;
      Floats sum[T][kVectors] = {};
      for (int64_t r = 0; r < ranks_; ++r) {
        const auto* own = codes + r * T;
        const float* scales = scale_[r].get() + tier.slot + block;
        const float* zeros = zero_[r].get() + tier.slot + block;
        Lanes fours[T];
        each<T>([&](auto t) INLINE { fours[t] = unpacker.fours(own[t].from + at, tier.size - at); });
        each<kVectors>([&](auto j) INLINE {
          Floats scale = keep(load<Floats>(scales + j * kLanes)), zero = keep(load<Floats>(zeros + j * kLanes));
          each<T>([&](auto t) INLINE {
            Floats v = value<kLookup>(fours[t], mask, own[t]);
            sum[t][j] += (v - zero) * scale;
            fours[t] >>= bits;
          });
        });
      }
      each<T>([&](auto t) INLINE {
        Type::store_fours(scratch.sums.get() + t * layout.slots + tier.slot + block, sum[t]);
      });
    }
  }

  template <Lookup kLookup>
  static INLINE Floats value(Lanes codes, Lanes mask, const typename Scratch::Codes& own) {
#ifdef LOWBIT_AVX512
    __m512 table = _mm512_loadu_ps(own.table);
    if (kLookup == Lookup::kSmall) return (Floats)_mm512_permutexvar_ps((__m512i)codes, table);
    if (kLookup == Lookup::kMedium)
      return (Floats)_mm512_permutex2var_ps(table, (__m512i)codes, _mm512_loadu_ps(own.table + kLanes));
#endif
    return (to_floats(codes & mask) - splat(own.middle)) * splat(own.step);
  }

  // Sums in wire order to rows.
  template <int T>
  void place(const Word* sums, Word* const* out) const {
#ifdef LOWBIT_AVX512
    if (!runs_.first.empty()) {
      for (int64_t from = 0; from < layout.features; from += kRun) {
        Lanes block[T] = {};
        const auto* end = &runs_.runs[runs_.first[from / kRun + 1]];
        for (const auto* run = &runs_.runs[runs_.first[from / kRun]]; run < end; ++run)
          each<T>([&](auto t) INLINE { block[t] = spread(block[t], run->mask, sums + t * layout.slots + run->slot); });
        each<T>([&](auto t) INLINE {
          Lanes whole = block[t];  // a copy, so that the others need no address
          if (from + kRun <= layout.features)
            store(out[t] + from, whole);
          else
            std::memcpy(out[t] + from, &whole, (layout.features - from) * sizeof(Word));
        });
      }
      return;
    }
#endif
    for (int t = 0; t < T; ++t)
      for (int64_t f = 0; f < layout.features; ++f) out[t][f] = sums[t * layout.slots + runs_.slot[f]];
  }

#ifdef LOWBIT_AVX512
  static INLINE Lanes spread(Lanes block, uint64_t mask, const Word* run) {
    __m512i words = _mm512_loadu_si512(run);
    if constexpr (sizeof(Word) == 2)
      return (Lanes)_mm512_mask_expand_epi16((__m512i)block, static_cast<__mmask32>(mask), words);
    else
      return (Lanes)_mm512_mask_expand_epi32((__m512i)block, static_cast<__mmask16>(mask), words);
  }
#endif

  static constexpr int kRun = 64 / sizeof(Word);
  int64_t ranks_;
  Runs<kRun> runs_;
  std::vector<Buffer<float>> scale_, zero_;
};

}  // namespace
