// Rows of `Type` to messages. A block of 64 features goes through the arithmetic in the row's own order, each with the
// qparams of its own width, as four vectors; its codes, a byte each, are then dealt out to their tiers and packed there.
//
// With AVX-512, the quick path leaves out the search for NaN and Inf and the clamping of what is beyond an int32: 8
// instructions for 64 values. It sees from the codes that a token holds such a value; that token is done again.

#pragma once

#include "codes.h"
#include "format.h"

namespace {

template <class Type>
class Encoder {
 public:
  using Word = typename Type::Word;
  const Layout layout;

  explicit Encoder(const LowbitFormat& format, int64_t /*ranks*/)
      : layout(format),
        runs_(layout, false),
        qparams_(4 * padded(layout.features)),
        limit_(padded(layout.features)),
        top_(padded(layout.features)) {
    for (int64_t i = 0; i < padded(layout.features); ++i) limit_.get()[i] = static_cast<Limit>(-1);  // no codes, no limit
    for (const Tier& tier : layout.tiers) {
      if (tier.bits < 16) packers_.emplace_back(tier.bits);
      for (int64_t i = tier.feature; i < tier.feature + tier.count; ++i) {
        if (tier.bits == 16) continue;  // makes codes that nobody reads
        int64_t f = layout.order[i], block = f / kBlock * kBlock, place = Type::place(f % kBlock);
        float* at = qparams_.get() + 4 * block + place;
        at[kInverse] = quiet(1.0f / format.scale[f]);
        at[kZero] = quiet(format.zero_point[f]);
        at[kPerStep] = static_cast<float>(1 / tier.code_span());
        at[kMiddle] = tier.largest() / 2;
        limit_.get()[block + limit_place(place)] = static_cast<Limit>(tier.largest());
        top_.get()[block + byte_place(place)] = static_cast<uint8_t>(tier.largest());
      }
    }
#ifdef LOWBIT_AVX512
    Bytes places;
    for (int i = 0; i < kBlock; ++i) places[i] = static_cast<uint8_t>(byte_place(Type::place(i)));
    for (auto& run : runs_.runs) run.index = (Bytes)_mm512_maskz_compress_epi8(run.mask, (__m512i)places);
#endif
    for (auto& single : runs_.singles)
      single.feature += static_cast<int32_t>(byte_place(Type::place(single.feature % kBlock))) - single.feature % kBlock;
  }

  struct Scratch {
    explicit Scratch(const Layout& layout)
        : codes(kTokens * layout.slots),
          row(kTokens * padded(layout.features)),
          ends(kTokens * kBlock),
          groups(kTokens * padded(layout.features) / kBlock + kLanes) {}
    Buffer<uint8_t> codes, row;  // in the slots of the tiers, and in the row's order
    Buffer<Word> ends;
    Buffer<uint32_t> groups;  // largest |v|, as bits: of T tokens' first 64 features, of the next, and so on
  };

  // T rows to T messages. The next rows are `ahead` values behind these.
  template <int T>
  void encode(const Word* const* rows, int64_t ahead, uint8_t* const* out, Scratch& scratch, Tally& tally) const {
    Token tokens[T];
    for (int t = 0; t < T; ++t) {
      Word* end = scratch.ends.get() + t * kBlock;
      int64_t whole = layout.features / kBlock * kBlock;
      std::memcpy(end, rows[t] + whole, (layout.features - whole) * sizeof(Word));
      tokens[t].words = rows[t], tokens[t].end = end, tokens[t].whole = whole;
      tokens[t].codes = scratch.codes.get() + t * layout.slots;
      tokens[t].row = scratch.row.get() + t * padded(layout.features);
    }
    if (layout.per_token) {
      scales<T>(tokens, ahead, scratch.groups.get());
      codes<T, true, kQuick>(tokens, 0);
    } else {
      codes<T, false, kQuick>(tokens, ahead);
      for (int t = 0; !kQuick && t < T; ++t) tokens[t].odd = holds_broken(tokens[t]);
    }
    for (int t = 0; t < T; ++t) {
      if (__builtin_expect(tokens[t].odd, 0)) again(tokens[t], scratch.groups.get());
      tally.saturated += tokens[t].saturated;
      tally.nonfinite += tokens[t].header == (layout.per_token ? kBroken : 1);
      write(tokens[t], out[t]);
    }
  }

 private:
  struct Token {
    const Word* words;
    const Word* end;  // its last features, padded to a block
    int64_t whole;    // features before them
    uint8_t* codes;
    uint8_t* row;
    uint8_t header = 0;
    bool odd = false;  // to be done again: may hold NaN or Inf
    bool broken = false;
    bool far = false;   // may hold a value far out
    float inverse = 0;  // of its scale
    int64_t saturated = 0;
    const Word* block(int64_t from) const { return from < whole ? words + from : end; }
    void set_scale(uint8_t of_header) {
      header = of_header;
      float scale = header_scale(header);
      inverse = scale > 0 ? 1.0f / scale : 0.0f;
    }
  };

  static void fetch_block(const Word* block) {
    for (int i = 0; i < kBlock; i += 64 / sizeof(Word)) fetch_early(block + i);
  }

  // v of 16 features, in vector V of the block.
  template <int V>
  INLINE Floats normed(const Word* block, Floats inverse, Floats zero) const {
    return Type::template load<V>(block) * inverse + zero;
  }

  // The tokens' per-token scales, and how many values lie far out.
  template <int T>
  void scales(Token* tokens, int64_t ahead, uint32_t* groups) const {
    for (int64_t from = 0; from < layout.features; from += kBlock) {
      const float* qparams = qparams_.get() + 4 * from;
      const Word* block[T];
      for (int t = 0; t < T; ++t) {
        block[t] = tokens[t].block(from);
        if (ahead) fetch_block(block[t] + ahead);
      }
      Lanes most[T] = {};
      each<kVectors>([&](auto v) INLINE {
        Floats inverse = load<Floats>(qparams + kInverse + v * kLanes), zero = load<Floats>(qparams + kZero + v * kLanes);
        each<T>([&](auto t) INLINE {
          most[t] = larger_magnitude(normed<v.value>(block[t], inverse, zero), most[t]);  // of bf16 features times 0
        });
      });
      store_largest<T>(most, groups + from / kBlock * T);
    }
    set_scales<T>(tokens, groups);
    for (int t = 0; t < T; ++t) {
      tokens[t].odd = tokens[t].header == kBroken;
      if (__builtin_expect(tokens[t].far, 0)) tokens[t].saturated = measure(tokens[t], nullptr);
    }
  }

  // token_header of wire_format.py, and whether a value lies far out.
  template <int T>
  void set_scales(Token* tokens, uint32_t* groups) const {
    static_assert(kLanes % T == 0);
    const int64_t count = padded(layout.features) / kBlock * T;
    std::memset(groups + count, 0, kLanes * sizeof *groups);
    Lanes largest = {}, most = {}, sum = {}, given = {};
    for (int64_t i = 0; i < count; i += kLanes) {  // token t has every T-th
      Lanes bits = load<Lanes>(groups + i), headers = scale_headers(bits);
      largest = larger(largest, bits), most = larger(most, headers);
      sum += headers, given -= (Lanes)(headers != 0);
    }
    for (int t = 0; t < T; ++t) {
      uint32_t far = 0, high = 0, total = 0, some = 0;
      for (int i = t; i < kLanes; i += T) {
        far = std::max(far, largest[i]), high = std::max(high, most[i]);
        total += sum[i], some += given[i];
      }
      uint32_t mean = some ? (2 * total + some) / (2 * some) : 0;
      uint32_t least = high > layout.headroom ? high - layout.headroom : 0;
      tokens[t].far = far > as_bits(kFar);
      tokens[t].set_scale(static_cast<uint8_t>(high == kBroken ? kBroken : std::max(mean, least)));
    }
  }

  // One by one, of a token whose values may be anything: returns how many lie far out, and fills `groups` if not null.
  int64_t measure(const Token& token, uint32_t* groups) const {
    int64_t far = 0;
    if (groups) std::memset(groups, 0, padded(layout.features) / kBlock * sizeof *groups);
    for (const Tier& tier : layout.tiers)
      for (int64_t i = tier.feature; tier.bits < 16 && i < tier.feature + tier.count; ++i) {
        int64_t f = layout.order[i], block = f / kBlock * kBlock;
        const float* at = qparams_.get() + 4 * block + Type::place(f % kBlock);
        float v = std::fabs(Type::value(token.words[f]) * at[kInverse] + at[kZero]);
        far += !(v <= kFar);
        if (groups) groups[f / kBlock] = std::max(groups[f / kBlock], as_bits(v));  // of NaN above all others
      }
    return far;
  }

  bool holds_broken(const Token& token) const {
    Largest<Word> largest;
    for (int64_t from = 0; from < layout.features; from += kBlock) largest.see(token.block(from));
    return largest.reached(Type::infinity);
  }

  // A token whose values may be anything.
  void again(Token& token, uint32_t* groups) const {
    token.broken = holds_broken(token);
    token.saturated = 0;
    if (layout.per_token) {
      token.saturated = measure(token, groups);
      set_scales<1>(&token, groups);
      if (token.broken) token.set_scale(kBroken);
      codes<1, true, false>(&token, 0);
    } else {
      token.header = token.broken;
      codes<1, false, false>(&token, 0);
    }
  }

  // The codes of all features, at the slots of their tiers; counts the values that lie outside them (static).
  template <int T, bool kPerToken, bool quick>
  void codes(Token* tokens, int64_t ahead) const {
    Lanes least[T] = {};  // as 16-bit words
    Floats scale[T];
    int64_t saturated[T] = {};
    uint8_t* row[T];
    uint8_t* out[T];
    for (int t = 0; t < T; ++t) scale[t] = splat(tokens[t].inverse), row[t] = tokens[t].row, out[t] = tokens[t].codes;
    for (int64_t from = 0; from < layout.features; from += kBlock) {
      const float* qparams = qparams_.get() + 4 * from;
      const Word* block[T];
      for (int t = 0; t < T; ++t) {
        block[t] = tokens[t].block(from);
        if (ahead) fetch_block(block[t] + ahead);
      }
      Lanes codes[T][kVectors];
      each<kVectors>([&](auto v) INLINE {
        auto own = [&](int which) INLINE { return keep(load<Floats>(qparams + which + v * kLanes)); };
        Floats inverse = own(kInverse), zero = own(kZero), per_step = own(kPerStep), middle = own(kMiddle);
        each<T>([&](auto t) INLINE {
          Floats value = normed<v.value>(block[t], inverse, zero);
          if (kPerToken) {
            value = value * scale[t];
            value = (value + clip(value, kKnee)) * per_step + middle;
          }
          codes[t][v] = round<quick>(value);
          // Of two vectors at once; four of each token are more than there are registers.
          if (v % 2) pair<quick>(codes[t] + v - 1, from + v / 2 * 32, kPerToken ? nullptr : saturated + t, least[t]);
        });
      });
      Bytes bytes[T];
      each<T>([&](auto t) INLINE {
        bytes[t] = joined(codes[t], from);
        store(row[t] + from, bytes[t]);
      });
#ifdef LOWBIT_AVX512
      // What follows the codes of a run is overwritten by the next one of its tier.
      const auto* end = runs_.runs.data() + runs_.first[from / kBlock + 1];
      for (const auto* run = runs_.runs.data() + runs_.first[from / kBlock]; run < end; ++run)
        each<T>([&](auto t) INLINE {
          store(out[t] + run->slot, _mm512_permutexvar_epi8((__m512i)run->index, (__m512i)bytes[t]));
        });
#endif
    }
    for (int t = 0; t < T; ++t) {
      for (const auto& single : runs_.singles) out[t][single.slot] = row[t][single.feature];
      for (const Tier& tier : layout.tiers) std::memset(out[t] + tier.slot + tier.count, 0, 8);
      if (!kPerToken) tokens[t].saturated = saturated[t];
#ifdef LOWBIT_AVX512
      if (quick) tokens[t].odd = _mm512_cmpeq_epi16_mask((__m512i)least[t], _mm512_set1_epi16(-32768));
#endif
    }
  }

  // NaN goes to a code below all others. Quick: so do values beyond an int32.
  template <bool quick>
  static INLINE Lanes round(Floats value) {
#ifdef LOWBIT_AVX512
    return (Lanes)_mm512_cvtps_epi32(quick ? (__m512)value : _mm512_min_ps(_mm512_set1_ps(0x7fff), (__m512)value));
#else
    value = value > -32768.0f ? value : splat(-32768.0f);  // NaN too
    value = value < 32767.0f ? value : splat(32767.0f);
    return (Lanes)(value + splat(kMagic)) - as_bits(kMagic);
#endif
  }

  // The codes of two vectors, as words of 16 bits in the first; counts those that lie outside their range. Quick: those
  // that were too low have `least` reach the least int16.
  template <bool quick>
  INLINE void pair(Lanes* codes, int64_t from, int64_t* saturated, Lanes& least) const {
#ifdef LOWBIT_AVX512
    __m512i words = _mm512_packs_epi32((__m512i)codes[0], (__m512i)codes[1]);
    if (quick) least = (Lanes)_mm512_min_epi16((__m512i)least, words);
    if (saturated) {
      __m512i limit = _mm512_loadu_si512(limit_.get() + from);
      *saturated += __builtin_popcount(_mm512_cmpgt_epu16_mask(words, limit));  // unsigned: negative ones are large
    }
    codes[0] = (Lanes)words;
#else
    for (int v = 0; v < 2; ++v) {
      Lanes limit = load<Lanes>(limit_.get() + from + v * kLanes);
      if (saturated)
        for (int i = 0; i < kLanes; ++i) *saturated += codes[v][i] > limit[i];
      codes[v] = (Ints)codes[v] < 0 ? Lanes{} : codes[v];
      codes[v] = codes[v] > limit ? limit : codes[v];
    }
#endif
  }

  // Two pairs' codes, clamped, feature i's at byte_place(Type::place(i)).
  INLINE Bytes joined(const Lanes* codes, int64_t from) const {
#ifdef LOWBIT_AVX512
    __m512i bytes = _mm512_packus_epi16((__m512i)codes[0], (__m512i)codes[2]);
    return (Bytes)_mm512_min_epu8(bytes, _mm512_loadu_si512(top_.get() + from));
#else
    uint8_t bytes[kBlock];
    for (int i = 0; i < kBlock; ++i) bytes[i] = static_cast<uint8_t>(codes[i / kLanes][i % kLanes]);
    return load<Bytes>(bytes);
#endif
  }

  // The message of a token whose codes are there.
  void write(const Token& token, uint8_t* out) const {
    if (layout.header) out[0] = token.header;
    const Packer* packer = packers_.data();
    for (const Tier& tier : layout.tiers) {
      uint8_t* to = out + tier.byte;
      if (tier.bits < 16)
        Packer::pack(*packer++, token.codes + tier.slot, to, tier.size);
      else if (token.broken)
        std::memset(to, kBf16NaN & 0xff, tier.size);
      else
        for (int64_t i = 0; i < tier.count; ++i) {
          uint16_t word = Bfloat16::word(Type::value(token.words[layout.order[tier.feature + i]]) + 0.0f);
          std::memcpy(to + 2 * i, &word, 2);
        }
    }
  }

#ifdef LOWBIT_AVX512
  // Packing saturates within quarters of a register: word w of two vectors is lane w / 8 * 4 + w % 4 of one of them.
  using Limit = uint16_t;
  static constexpr bool kQuick = true;
  static int64_t limit_place(int64_t at) { return at / 32 * 32 + at % 16 / 4 * 8 + at / 16 % 2 * 4 + at % 4; }
  static int64_t byte_place(int64_t at) { return at % 16 / 4 * 16 + at / 16 * 4 + at % 4; }
#else
  using Limit = uint32_t;
  static constexpr bool kQuick = false;
  static int64_t limit_place(int64_t at) { return at; }
  static int64_t byte_place(int64_t at) { return at; }
#endif

  static constexpr int kInverse = 0, kZero = kBlock, kPerStep = 2 * kBlock, kMiddle = 3 * kBlock;
  Runs<kBlock> runs_;
  std::vector<Packer> packers_;
  Buffer<float> qparams_;  // of 64 features in the order of Type::load, 64 of each kind
  Buffer<Limit> limit_;
  Buffer<uint8_t> top_;
};

}  // namespace
