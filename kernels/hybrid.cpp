// The three ops of hybrid.py for CPUs, bit for bit; hybrid.py defines the format and the arithmetic. cpu.py builds this
// file and calls the functions at its end on plain pointers.
//
// A row is worked on in groups of 32 features of one tier, as two vectors of 16 floats: those at even and those at odd
// places of the wire. A 32-bit lane then holds a pair of neighbours in every form that comes up (two bf16 words, two
// 8-bit codes, two 4-bit codes), and a shift or a mask takes them apart, without a shuffle. Tiers are padded to whole
// groups in scratch memory; a padded place has zero scale, zero point and value.
//
// Vectors are GCC's own (vector_size), which any target compiles; what AVX-512 does better has its own branch. Several
// tokens go through a loop together, because reading the qparams would otherwise take longer than the arithmetic.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Mirrored by the ctypes structure in cpu.py. scale, zero_point: [ranks, features] in wire order.
struct LowbitFormat {
  const float* scale;
  const float* zero_point;
  const int64_t* order;
  const int64_t* tiers;  // bits, count, bits, count, ...
  int64_t num_tiers;
  int64_t features;
  int64_t rank1;
};

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Lanes __attribute__((vector_size(64)));
typedef uint16_t Words __attribute__((vector_size(64)));
typedef uint16_t HalfWords __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

constexpr int kLanes = 16;
constexpr int kGroup = 2 * kLanes;
constexpr int kTokens = 4;  // that go through a loop together
constexpr int64_t kMinParallel = 1 << 16;  // values; below this, starting threads costs more than they save
constexpr uint16_t kBf16NaN = 0xffff;      // the one that torch's vectorized cast makes
constexpr uint8_t kBroken = 255;           // header of a rank-1 token that holds NaN or Inf
constexpr float kFar = 16.0f;              // standard deviations beyond which a rank-1 value counts as saturated
constexpr float kMagic = 0x1.8p23f;  // a small value plus this has it rounded, half to even, in its low mantissa bits

enum DType { kFloat32, kBfloat16, kFloat16, kFloat64 };  // as in cpu.py

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

inline Floats splat(float value) { return Floats{} + value; }

// max, min: the second operand where one is NaN.
inline Floats max(Floats a, Floats b) {
#ifdef __AVX512F__
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

inline Floats min(Floats a, Floats b) {
#ifdef __AVX512F__
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

inline int count_unequal(Floats a, Floats b) {
#ifdef __AVX512F__
  return __builtin_popcount(_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NEQ_UQ));
#else
  auto unequal = a != b;
  int count = 0;
  for (int i = 0; i < kLanes; ++i) count -= unequal[i];
  return count;
#endif
}

// Casts of whole vectors. GCC 12 takes __builtin_convertvector between integers of different sizes element by element,
// while it vectorizes the loop.
template <class To, class From>
inline To cast(From v) {
  constexpr int size = sizeof(v) / sizeof(v[0]);
  To to;
  for (int i = 0; i < size; ++i) to[i] = static_cast<std::decay_t<decltype(to[0])>>(v[i]);
  return to;
}

inline Bytes low_bytes(Lanes v) {
#ifdef __AVX512F__
  return (Bytes)_mm512_cvtepi32_epi8((__m512i)v);
#else
  return cast<Bytes>(v);
#endif
}

inline HalfWords low_words(Lanes v) {
#ifdef __AVX512F__
  return (HalfWords)_mm512_cvtepi32_epi16((__m512i)v);
#else
  return cast<HalfWords>(v);
#endif
}

inline Lanes widen(Bytes v) {
#ifdef __AVX512F__
  return (Lanes)_mm512_cvtepu8_epi32((__m128i)v);
#else
  return cast<Lanes>(v);
#endif
}

inline Lanes widen(HalfWords v) {
#ifdef __AVX512F__
  return (Lanes)_mm512_cvtepu16_epi32((__m256i)v);
#else
  return cast<Lanes>(v);
#endif
}

inline Floats to_floats(Lanes small) {
  typedef int32_t Ints __attribute__((vector_size(64)));
  return __builtin_convertvector((Ints)small, Floats);
}

// A pair of neighbours per lane.
struct Pair {
  Floats even, odd;
};

inline Pair operator+(Pair a, Pair b) { return {a.even + b.even, a.odd + b.odd}; }
inline Pair operator-(Pair a, Pair b) { return {a.even - b.even, a.odd - b.odd}; }
inline Pair operator*(Pair a, Pair b) { return {a.even * b.even, a.odd * b.odd}; }
inline Pair both(float value) { return {splat(value), splat(value)}; }
inline Pair load_pair(const float* from) { return {load<Floats>(from), load<Floats>(from + kLanes)}; }
inline void store_pair(float* to, Pair p) { store(to, p.even), store(to + kLanes, p.odd); }

// The place of feature i of a tier in an array of pairs: the 16 even ones of a group, then its odd ones.
inline int64_t paired(int64_t i) { return i / kGroup * kGroup + i % 2 * kLanes + i % kGroup / 2; }
inline int64_t padded(int64_t count) { return (count + kGroup - 1) / kGroup * kGroup; }

// ---- Dtypes. `Word` is how one value lies in memory; per_group vectors of words make a group.

// As the hardware rounds to bf16, but a NaN may become any NaN with a low half of zero; see quiet().
inline Lanes round_to_bf16(Floats v) {
  Lanes bits = (Lanes)v;
  return bits + 0x7fffu + (bits >> 16 & 1u);
}

struct Bfloat16 {
  using Word = uint16_t;
  static constexpr int per_group = 1;
  static constexpr uint32_t infinity = 0x7f80;
  static Pair load(const Lanes* raw) { return {(Floats)(raw[0] << 16), (Floats)(raw[0] & 0xffff0000u)}; }
  static void store(Word* to, Pair p) {
    ::store(to, (round_to_bf16(p.even) >> 16) | (round_to_bf16(p.odd) & 0xffff0000u));
  }
};

struct Float16 {
  using Word = uint16_t;
  static constexpr int per_group = 1;
  static constexpr uint32_t infinity = 0x7c00;
  static Floats widen(Lanes half) {
    Lanes magnitude = (half & 0x7fffu) << 13;
    Lanes bits = (Lanes)((Floats)magnitude * 0x1p112f);  // moves the exponent, exact for subnormals too
    bits |= magnitude >= 0x0f800000u ? Lanes{} + 0x7f800000u : Lanes{};
    return (Floats)(bits | (half & 0x8000u) << 16);
  }
  static Lanes narrow(Floats v) {
    Lanes sign = (Lanes)v & 0x80000000u, magnitude = (Lanes)v ^ sign;
    Lanes subnormal = (Lanes)((Floats)magnitude + 0.5f) - 0x3f000000u;  // 0.5 has the ulp of a subnormal half
    Lanes normal = (magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13;
    Lanes special = magnitude > 0x7f800000u ? Lanes{} + 0x7e00u : Lanes{} + 0x7c00u;
    Lanes half = magnitude < 0x38800000u ? subnormal : normal;
    return (magnitude >= 0x47800000u ? special : half) | sign >> 16;
  }
  static Pair load(const Lanes* raw) { return {widen(raw[0] & 0xffffu), widen(raw[0] >> 16)}; }
  static void store(Word* to, Pair p) { ::store(to, narrow(p.even) | narrow(p.odd) << 16); }
};

struct Float32 {
  using Word = uint32_t;
  static constexpr int per_group = 2;
  static constexpr uint32_t infinity = 0x7f800000;
  static Pair load(const Lanes* raw) { return {(Floats)raw[0], (Floats)raw[1]}; }
  static void store(Word* to, Pair p) { ::store(to, p.even), ::store(to + kLanes, p.odd); }
};

// Where feature i of a tier lies among the words of the tier.
template <class Type>
int64_t word_of(int64_t i) {
  return Type::per_group == 1 ? i : paired(i);
}

// The largest magnitude seen, bitwise: NaN and Inf are above all others.
template <class Word>
struct Largest {
  Lanes seen = {};
  void see(Lanes raw) {
    if constexpr (sizeof(Word) == 2) {
      Words now = (Words)(raw & 0x7fff7fffu), before = (Words)seen;
      seen = (Lanes)(now > before ? now : before);
    } else {
      Lanes now = raw & 0x7fffffffu;
      seen = now > seen ? now : seen;
    }
  }
  bool reached(uint32_t limit) const {
    Word all[sizeof seen / sizeof(Word)];
    std::memcpy(all, &seen, sizeof seen);
    for (Word one : all)
      if (one >= limit) return true;
    return false;
  }
};

// Scratch memory, zeroed, with room for a vector read past its end.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : words_(size + 128 / sizeof(T)) {
    size_t bytes = words_ * sizeof(T);
    data_ = static_cast<T*>(::operator new(bytes, std::align_val_t(64)));
    std::memset(static_cast<void*>(data_), 0, bytes);
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : words_(other.words_), data_(other.data_) { other.data_ = nullptr; }
  T* get() { return data_; }
  const T* get() const { return data_; }

 private:
  int64_t words_;
  T* data_;
};

// ---- The permutation of a row's words, a vector of output at a time.
//
// Orders are long ascending runs with few features taken out, so that one vector of output comes from two neighbouring
// vectors of the source: AVX-512 picks any words of two registers in one instruction. A few such steps make a block
// that spans more, as at the seam of two tiers; words that lie all over the row are copied one by one.
template <class Word>
class Gather {
 public:
  static constexpr int per_block = 64 / sizeof(Word);

  // index: the source of every output word, -1 for zero (only at the end of a block). `many`: worth planning for.
  Gather(const std::vector<int32_t>& index, int64_t source_words, bool many)
      : index_(index), size_(static_cast<int64_t>(index.size())) {
    for (int64_t from = 0; from < size_; from += per_block) {
      int count = static_cast<int>(size_ - from < per_block ? size_ - from : per_block);
      while (count > 0 && index_[from + count - 1] < 0) --count;
      blocks_.push_back({count, static_cast<int>(steps_.size()), 0});
#ifdef __AVX512BW__
      if (many && source_words >= 2 * per_block) plan(&index_[from], source_words);
#endif
    }
    (void)many, (void)source_words;
  }

  Lanes block(const Word* source, int64_t number) const {
    const Block& here = blocks_[number];
#ifdef __AVX512BW__
    if (here.steps) {
      const Step* step = &steps_[here.first];
      Lanes all = pick(source, step[0]);
      for (int i = 1; i < here.steps; ++i) all |= pick(source, step[i]);
      return all;
    }
#endif
    alignas(64) Word words[per_block] = {};
    const int32_t* index = &index_[number * per_block];
    for (int i = 0; i < here.count; ++i) words[i] = source[index[i]];
    return load<Lanes>(words);
  }

  // All words of a row, and none beyond.
  void row(const Word* source, Word* to) const {
    int64_t whole = size_ / per_block;
    for (int64_t number = 0; number < whole; ++number) store(to + number * per_block, block(source, number));
    if (size_ % per_block) {
      Lanes last = block(source, whole);
      std::memcpy(to + whole * per_block, &last, size_ % per_block * sizeof(Word));
    }
  }

 private:
  struct Block {
    int count, first, steps;
  };
  struct Step {
    Word pick[per_block];  // from two vectors of the source
    uint32_t mask;         // of the output words that come from them
    int32_t base;
  };
  static constexpr int kMaxSteps = 6;  // as many take about as long as copying words one by one

#ifdef __AVX512BW__
  static Lanes pick(const Word* source, const Step& step) {
    __m512i low = _mm512_loadu_si512(source + step.base), high = _mm512_loadu_si512(source + step.base + per_block);
    __m512i pick = _mm512_loadu_si512(step.pick);
    if constexpr (sizeof(Word) == 2) return (Lanes)_mm512_maskz_permutex2var_epi16(step.mask, low, pick, high);
    return (Lanes)_mm512_maskz_permutex2var_epi32(static_cast<__mmask16>(step.mask), low, pick, high);
  }

  void plan(const int32_t* index, int64_t source_words) {
    Block& here = blocks_.back();
    uint64_t left = (uint64_t{1} << here.count) - 1;
    while (left) {
      int32_t base = std::numeric_limits<int32_t>::max();
      for (int i = 0; i < here.count; ++i)
        if (left >> i & 1 && index[i] < base) base = index[i];
      base = base / per_block * per_block;
      if (base > source_words - 2 * per_block) base = static_cast<int32_t>(source_words - 2 * per_block);
      Step step = {{}, 0, base};
      for (int i = 0; i < here.count; ++i) {
        if (!(left >> i & 1) || index[i] >= base + 2 * per_block) continue;
        step.pick[i] = static_cast<Word>(index[i] - base);
        step.mask |= uint32_t{1} << i;
      }
      left &= ~uint64_t{step.mask};
      if (++here.steps > kMaxSteps) {
        steps_.resize(here.first);
        here.steps = 0;
        return;
      }
      steps_.push_back(step);
    }
  }
#endif

  std::vector<int32_t> index_;
  int64_t size_;
  std::vector<Block> blocks_;
  std::vector<Step> steps_;
};

// ---- Bytes of codes. `codes`: one byte each, padded to whole groups.

// The low `bits` of eight bytes, side by side.
class Squeeze {
 public:
  explicit Squeeze(int bits) : bits_(bits), mask_(0x0101010101010101u * ((1u << bits) - 1)) {}

#if defined(__BMI2__) && !defined(__znver1__) && !defined(__znver2__)  // where these two are slow microcode
  uint64_t together(uint64_t x) const { return _pext_u64(x, mask_); }
  uint64_t apart(uint64_t x) const { return _pdep_u64(x, mask_); }
#else
  uint64_t together(uint64_t x) const {
    uint64_t all = 0;
    for (int i = 0; i < 8; ++i) all |= (x >> 8 * i & 0xff) << bits_ * i;
    return all;
  }
  uint64_t apart(uint64_t x) const {
    uint64_t all = 0;
    for (int i = 0; i < 8; ++i) all |= (x >> bits_ * i & 0xff) << 8 * i;
    return all & mask_;
  }
#endif

 private:
  int bits_;
  uint64_t mask_;
};

void pack_codes(const uint8_t* codes, int bits, uint8_t* to, int64_t size) {
  Squeeze squeeze(bits);
  int64_t at = 0;
  for (; at + 8 <= size; at += bits, codes += 8) {
    uint64_t run = squeeze.together(load<uint64_t>(codes));
    std::memcpy(to + at, &run, 8);  // the bytes past the run are overwritten by the next
  }
  for (; at < size; at += bits, codes += 8) {
    uint64_t run = squeeze.together(load<uint64_t>(codes));
    std::memcpy(to + at, &run, size - at < bits ? size - at : bits);
  }
}

void unpack_codes(const uint8_t* from, int bits, uint8_t* codes, int64_t size) {
  Squeeze squeeze(bits);
  int64_t at = 0;
  for (; at + 8 <= size; at += bits, codes += 8) store(codes, squeeze.apart(load<uint64_t>(from + at)));
  for (; at < size; at += bits, codes += 8) {
    uint64_t run = 0;
    std::memcpy(&run, from + at, size - at < bits ? size - at : bits);
    store(codes, squeeze.apart(run));
  }
}

// How a group lies in a row, or, for widths that fill no whole number of lanes, in a buffer of bytes.
inline int form_of(int bits) { return bits == 16 || bits == 4 ? bits : 8; }
constexpr int64_t group_bytes(int form) { return kGroup / 8 * form; }

template <int kForm>
inline void store_group(uint8_t* to, Lanes pairs, int64_t bytes) {
  if constexpr (kForm == 4) {
    Bytes out = low_bytes(pairs);
    if (bytes == sizeof out) return store(to, out);
    std::memcpy(to, &out, bytes);
  } else {
    HalfWords out = low_words(pairs);
    if (bytes == sizeof out) return store(to, out);
    std::memcpy(to, &out, bytes);
  }
}

template <int kForm>
inline Pair load_group(const uint8_t* from) {
  if constexpr (kForm == 16) {
    Lanes raw = load<Lanes>(from);
    return Bfloat16::load(&raw);
  } else if constexpr (kForm == 4) {
    Lanes pairs = widen(load<Bytes>(from));
    return {to_floats(pairs & 15u), to_floats(pairs >> 4)};
  } else {
    Lanes pairs = widen(load<HalfWords>(from));
    return {to_floats(pairs & 255u), to_floats(pairs >> 8)};
  }
}

// ---- Formats

// By bits: how much of a rank-1 token's scale its codes span.
constexpr double kLoading[] = {0, 0, 0.65, 0.8, 0.88, 0.95, 1.05, 1.1, 1.1};

// Mantissa bits of 2^(i / 8), and of the thresholds between them.
constexpr uint32_t kMantissas[] = {0, 759234, 1587184, 2490071, 3474675, 4548394, 5719293, 6996167};
constexpr uint32_t kThresholds[] = {371396, 1164244, 2028851, 2971711, 3999908, 5121165, 6343903, 7677310};

// The largest |v| of a rank-1 token -> the byte of the nearest scale 2^(j / 8), which is j + 128.
inline uint8_t scale_header(float largest) {
  if (!std::isfinite(largest)) return kBroken;
  if (largest == 0) return 0;
  uint32_t bits;
  std::memcpy(&bits, &largest, 4);
  int j = 8 * (static_cast<int>(bits >> 23) - 127);
  for (uint32_t threshold : kThresholds) j += (bits & 0x7fffff) >= threshold;
  return static_cast<uint8_t>((j < -127 ? -127 : j > 126 ? 126 : j) + 128);
}

inline float header_scale(uint8_t header) {
  if (header == 0) return 0.0f;
  if (header == kBroken) return std::numeric_limits<float>::quiet_NaN();
  int j = header - 128;
  uint32_t bits = static_cast<uint32_t>((j >> 3) + 127) << 23 | kMantissas[j & 7];
  float scale;
  std::memcpy(&scale, &bits, 4);
  return scale;
}

struct Tier {
  int bits;
  int64_t count;
  int64_t feature;  // the first one, in wire order
  int64_t slot;     // its place in padded arrays
  int64_t byte;     // in the row
  int64_t size;     // bytes
  float largest() const { return static_cast<float>((1 << bits) - 1); }
  double code_span() const { return 2 * kLoading[bits] / ((1 << bits) - 1); }
};

int64_t packed_bytes(int64_t count, int bits) {
  int64_t per_word = 1;
  while (per_word * bits % 8) per_word *= 2;
  return (count + per_word - 1) / per_word * per_word * bits / 8;
}

// A NaN whose low half is zero, so that rounding it to bf16 leaves a NaN.
inline float quiet(float value) { return std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : value; }

struct Layout {
  std::vector<Tier> tiers;
  int64_t features, header, row_bytes, slots = 0;
  const int64_t* order;
  bool rank1;

  explicit Layout(const LowbitFormat& format)
      : features(format.features), order(format.order), rank1(format.rank1 != 0) {
    bool bf16 = false;
    for (int64_t i = 0; i < format.num_tiers; ++i) bf16 |= format.tiers[2 * i] == 16;
    header = rank1 || !bf16;
    row_bytes = header;
    int64_t feature = 0;
    for (int64_t i = 0; i < format.num_tiers; ++i) {
      int bits = static_cast<int>(format.tiers[2 * i]);
      int64_t count = format.tiers[2 * i + 1], size = bits == 16 ? 2 * count : packed_bytes(count, bits);
      if (count) tiers.push_back({bits, count, feature, slots, row_bytes, size});
      feature += count, slots += padded(count), row_bytes += size;
    }
  }

  // Each feature once.
  bool valid() const {
    std::vector<bool> seen(features);
    for (int64_t i = 0; i < features; ++i) {
      if (order[i] < 0 || order[i] >= features || seen[order[i]]) return false;
      seen[order[i]] = true;
    }
    return true;
  }

  // The words of a padded row from those of `source`, where feature f is at place[f].
  template <class Type>
  std::vector<int32_t> to_wire(const std::vector<int32_t>* place) const {
    std::vector<int32_t> index(slots, -1);
    for (const Tier& tier : tiers)
      for (int64_t i = 0; i < tier.count; ++i) {
        int64_t f = order[tier.feature + i];
        index[tier.slot + word_of<Type>(i)] = place ? (*place)[f] : static_cast<int32_t>(f);
      }
    return index;
  }

  // Where in a padded row every feature is.
  template <class Type>
  std::vector<int32_t> from_wire() const {
    std::vector<int32_t> index(features);
    for (const Tier& tier : tiers)
      for (int64_t i = 0; i < tier.count; ++i)
        index[order[tier.feature + i]] = static_cast<int32_t>(tier.slot + word_of<Type>(i));
    return index;
  }

  // Qparams of one rank, in pairs.
  void pad(const float* values, float* to, bool inverse) const {
    for (const Tier& tier : tiers)
      for (int64_t i = 0; i < tier.count; ++i) {
        float value = values[tier.feature + i];
        to[tier.slot + paired(i)] = quiet(inverse ? 1.0f / value : value);
      }
  }
};

// Loops are unrolled here, and bodies inlined, before the compiler decides what to keep in registers: arrays of a
// value per token are to stay there.
#define INLINE __attribute__((always_inline))

template <class Body, size_t... I>
INLINE inline void each_of(std::index_sequence<I...>, Body& body) {
  (body(std::integral_constant<int, I>()), ...);
}

// body(t) for t < T, each a constant.
template <int T, class Body>
INLINE inline void each_token(Body body) {
  each_of(std::make_index_sequence<T>(), body);
}

// body(group, bytes of it in its form) for all groups of a tier; the last may be cut short.
template <int kForm, class Body>
INLINE inline void each_group(const Tier& tier, Body body) {
  int64_t groups = padded(tier.count) / kGroup, rest = group_bytes(kForm);
  if (tier.bits == kForm) rest = tier.size - (groups - 1) * group_bytes(kForm);
  for (int64_t group = 0; group < groups; ++group) body(group, group + 1 < groups ? group_bytes(kForm) : rest);
}

// ---- Encoding rows of `Type`

template <class Type>
class Encoder {
 public:
  using Word = typename Type::Word;

  // place: where a row has its features; their own order if null. source_words: that may be read of a row.
  Encoder(const LowbitFormat& format, const std::vector<int32_t>* place, int64_t source_words, bool many)
      : layout(format),
        gather_(layout.template to_wire<Type>(place), source_words, many),
        inverse_(layout.slots),
        zero_(layout.slots) {
    layout.pad(format.scale, inverse_.get(), true);
    layout.pad(format.zero_point, zero_.get(), false);
  }

  struct Scratch {
    explicit Scratch(const Layout& layout)
        : stride(layout.slots + kGroup), codes(kTokens * stride), normed(layout.rank1 ? kTokens * stride : 0) {}
    int64_t stride;
    Buffer<uint8_t> codes;
    Buffer<float> normed;
  };

  const Layout layout;

  // T rows to T messages; returns how many values saturated.
  template <int T>
  int64_t encode(const Word* const* rows, uint8_t* const* out, Scratch& scratch) const {
    int64_t saturated = 0;
    Largest<Word> largest[T];
    uint8_t header[T] = {};
    // The coded features go first: they stream through memory in order, and the few in bf16 then lie in cache.
    if (layout.rank1)
      saturated += normalize<T>(rows, scratch, largest, header);
    else
      for (const Tier& tier : layout.tiers) {
        if (tier.bits == 16) continue;
        saturated += tier.bits == 4 ? static_tier<T, 4>(tier, rows, out, scratch, largest)
                                    : static_tier<T, 8>(tier, rows, out, scratch, largest);
      }
    for (const Tier& tier : layout.tiers)
      if (tier.bits == 16) bf16_tier<T>(tier, rows, out, largest);
    if (layout.rank1)
      for (int t = 0; t < T; ++t) {
        if (largest[t].reached(Type::infinity)) header[t] = kBroken;
        for (const Tier& tier : layout.tiers) {
          if (tier.bits == 16) continue;
          const float* normed = scratch.normed.get() + t * scratch.stride + tier.slot;
          uint8_t* codes = scratch.codes.get();
          tier.bits == 4 ? ranged_tier<4>(tier, normed, header_scale(header[t]), out[t], codes)
                         : ranged_tier<8>(tier, normed, header_scale(header[t]), out[t], codes);
        }
      }
    for (int t = 0; t < T; ++t) {
      bool broken = largest[t].reached(Type::infinity);
      if (layout.header) out[t][0] = layout.rank1 ? header[t] : broken;
      if (broken)
        for (const Tier& tier : layout.tiers)
          if (tier.bits == 16) std::memset(out[t] + tier.byte, kBf16NaN & 0xff, tier.size);
    }
    return saturated;
  }

 private:
  Pair values(const Word* row, int64_t group, Largest<Word>& largest) const {
    Lanes raw[Type::per_group];
    for (int i = 0; i < Type::per_group; ++i) {
      raw[i] = gather_.block(row, group * Type::per_group + i);
      largest.see(raw[i]);
    }
    return Type::load(raw);
  }

  // The codes of two vectors, side by side in a lane, as the low bits of a float near kMagic.
  template <int kForm>
  static Lanes join(Pair clamped) {
    Pair rounded = clamped + both(kMagic);
    return (Lanes)rounded.even | (Lanes)rounded.odd << kForm;
  }

  // The values that round to a code. NaN goes to the least of them, and so to code 0.
  struct Bounds {
    explicit Bounds(const Tier& tier) : bottom(splat(-0.5f)), top(splat(std::nextafter(tier.largest() + 0.5f, 0.0f))) {}
    Pair clamp(Pair v) const { return {min(max(v.even, bottom), top), min(max(v.odd, bottom), top)}; }
    Floats bottom, top;
  };

  template <int T>
  void bf16_tier(const Tier& tier, const Word* const* rows, uint8_t* const* out, Largest<Word>* largest) const {
    each_group<16>(tier, [&](int64_t group, int64_t bytes) INLINE {
      each_token<T>([&](auto t) INLINE {
        uint16_t words[kGroup];
        Bfloat16::store(words, values(rows[t], tier.slot / kGroup + group, largest[t]) + both(0.0f));
        std::memcpy(out[t] + tier.byte + group * group_bytes(16), words, bytes);
      });
    });
  }

  template <int T, int kForm>
  int64_t static_tier(
      const Tier& tier, const Word* const* rows, uint8_t* const* out, Scratch& scratch, Largest<Word>* largest) const {
    int64_t saturated = 0;
    const Bounds bounds(tier);
    uint8_t* to[T];
    Largest<Word> here[T];
    each_token<T>([&](auto t) INLINE {
      to[t] = tier.bits == kForm ? out[t] + tier.byte : scratch.codes.get() + t * scratch.stride;
      here[t] = largest[t];
    });
    each_group<kForm>(tier, [&](int64_t group, int64_t bytes) INLINE {
      int64_t slot = tier.slot + group * kGroup;
      Pair inverse = load_pair(inverse_.get() + slot), zero = load_pair(zero_.get() + slot);
      each_token<T>([&](auto t) INLINE {
        Pair v = values(rows[t], slot / kGroup, here[t]) * inverse + zero;
        Pair clamped = bounds.clamp(v);
        saturated += count_unequal(clamped.even, v.even) + count_unequal(clamped.odd, v.odd);
        store_group<kForm>(to[t] + group * group_bytes(kForm), join<kForm>(clamped), bytes);
      });
    });
    each_token<T>([&](auto t) INLINE {
      largest[t] = here[t];
      if (tier.bits != kForm) pack_codes(to[t], tier.bits, out[t] + tier.byte, tier.size);
    });
    return saturated;
  }

  // Normalizes the features that are not bf16 into scratch.normed and finds each token's scale; returns how many values
  // lie far out.
  template <int T>
  int64_t normalize(const Word* const* rows, Scratch& scratch, Largest<Word>* largest, uint8_t* header) const {
    Lanes most[T];  // magnitudes, bitwise: NaN is above all others
    Largest<Word> here[T];
    each_token<T>([&](auto t) INLINE { most[t] = Lanes{}, here[t] = largest[t]; });
    for (const Tier& tier : layout.tiers) {
      if (tier.bits == 16) continue;
      each_group<8>(tier, [&](int64_t group, int64_t) INLINE {
        int64_t slot = tier.slot + group * kGroup;
        Pair inverse = load_pair(inverse_.get() + slot), zero = load_pair(zero_.get() + slot);
        each_token<T>([&](auto t) INLINE {
          Pair v = values(rows[t], slot / kGroup, here[t]) * inverse + zero;  // 0 in padded places
          store_pair(scratch.normed.get() + t * scratch.stride + slot, v);
          Lanes even = (Lanes)v.even & 0x7fffffffu, odd = (Lanes)v.odd & 0x7fffffffu;
          Lanes more = even > odd ? even : odd;
          most[t] = more > most[t] ? more : most[t];
        });
      });
    }
    int64_t far = 0;
    each_token<T>([&](auto t) INLINE {
      largest[t] = here[t];
      uint32_t bits = 0;
      for (int i = 0; i < kLanes; ++i) bits = most[t][i] > bits ? most[t][i] : bits;
      float greatest;
      std::memcpy(&greatest, &bits, 4);
      header[t] = scale_header(greatest);
      if (greatest <= kFar) return;
      for (const Tier& tier : layout.tiers)
        for (int64_t i = 0; tier.bits != 16 && i < padded(tier.count); ++i)
          far += !(std::fabs(scratch.normed.get()[t * scratch.stride + tier.slot + i]) <= kFar);
    });
    return far;
  }

  // The codes of a broken token, whose scale is NaN, mean nothing.
  template <int kForm>
  static void ranged_tier(const Tier& tier, const float* normed, float scale, uint8_t* message, uint8_t* codes) {
    const Bounds bounds(tier);
    const float per_step = static_cast<float>(1 / tier.code_span());
    const Pair steps = both((scale > 0 ? 1.0f / scale : 0.0f) * per_step), middle = both(tier.largest() / 2);
    uint8_t* to = tier.bits == kForm ? message + tier.byte : codes;
    each_group<kForm>(tier, [&](int64_t group, int64_t bytes) INLINE {
      Lanes pairs = join<kForm>(bounds.clamp(load_pair(normed + group * kGroup) * steps + middle));
      int64_t count = tier.count - group * kGroup;
      if (count < kGroup) {  // padded places send code 0
        for (int i = 0; i < kLanes; ++i)
          if (2 * i + 1 >= count) pairs[i] &= 2 * i >= count ? 0 : (1u << kForm) - 1;
      }
      store_group<kForm>(to + group * group_bytes(kForm), pairs, bytes);
    });
    if (tier.bits != kForm) pack_codes(to, tier.bits, message + tier.byte, tier.size);
  }

  Gather<Word> gather_;
  Buffer<float> inverse_, zero_;
};

// ---- Decoding to padded rows of `Type`

class Decoder {
 public:
  Decoder(const LowbitFormat& format, int64_t ranks) : layout(format), ranks_(ranks) {
    for (int64_t r = 0; r < ranks; ++r) {
      scale_.emplace_back(layout.slots);
      zero_.emplace_back(layout.slots);
      layout.pad(format.scale + r * layout.features, scale_.back().get(), false);
      layout.pad(format.zero_point + r * layout.features, zero_.back().get(), false);
    }
  }

  struct Scratch {
    Scratch(const Decoder& decoder)
        : stride(decoder.layout.slots + kGroup),
          codes(decoder.ranks_ * kTokens * stride),
          tails(decoder.ranks_ * kTokens * 2 * kGroup),
          from(decoder.ranks_ * kTokens),
          step(decoder.ranks_ * kTokens) {}
    int64_t stride;
    Buffer<uint8_t> codes, tails;
    std::vector<const uint8_t*> from;
    std::vector<float> step;
  };

  const Layout layout;

  // messages: the first of T rows that follow each other by row_stride, and of the ranks by rank_stride.
  template <class Type, int T>
  void decode(const uint8_t* messages, int64_t rank_stride, int64_t row_stride, typename Type::Word* const* total,
              Scratch& scratch) const {
    for (const Tier& tier : layout.tiers) {
      if (tier.bits == 16)
        tier_sum<Type, T, 16, false>(tier, messages, rank_stride, row_stride, total, scratch);
      else if (tier.bits == 4 && layout.rank1)
        tier_sum<Type, T, 4, true>(tier, messages, rank_stride, row_stride, total, scratch);
      else if (tier.bits == 4)
        tier_sum<Type, T, 4, false>(tier, messages, rank_stride, row_stride, total, scratch);
      else if (layout.rank1)
        tier_sum<Type, T, 8, true>(tier, messages, rank_stride, row_stride, total, scratch);
      else
        tier_sum<Type, T, 8, false>(tier, messages, rank_stride, row_stride, total, scratch);
    }
    if (layout.rank1 || !layout.header) return;
    for (int t = 0; t < T; ++t) {
      bool broken = false;
      for (int64_t r = 0; r < ranks_; ++r) broken |= messages[r * rank_stride + t * row_stride] != 0;
      for (int64_t slot = 0; broken && slot < layout.slots; slot += kGroup)
        Type::store(total[t] + slot, both(std::numeric_limits<float>::quiet_NaN()));
    }
  }

 private:
  template <class Type, int T, int kForm, bool kRanged>
  void tier_sum(const Tier& tier, const uint8_t* messages, int64_t rank_stride, int64_t row_stride,
                typename Type::Word* const* total, Scratch& scratch) const {
    const uint8_t** from = scratch.from.data();
    const Pair middle = both(tier.largest() / 2);
    for (int64_t r = 0; r < ranks_; ++r)
      for (int t = 0; t < T; ++t) {
        const uint8_t* row = messages + r * rank_stride + t * row_stride;
        int64_t i = r * T + t;
        from[i] = row + tier.byte;
        if (kForm == 8 && tier.bits != 8) {
          uint8_t* codes = scratch.codes.get() + i * scratch.stride;
          unpack_codes(from[i], tier.bits, codes, tier.size);
          from[i] = codes;
        }
        if (kRanged) scratch.step[i] = header_scale(row[0]) * static_cast<float>(tier.code_span());
      }
    each_group<kForm>(tier, [&](int64_t group, int64_t bytes) INLINE {
      int64_t slot = tier.slot + group * kGroup;
      if (bytes < group_bytes(kForm)) {  // nothing may be read past a row
        for (int64_t i = 0; i < ranks_ * T; ++i) {
          uint8_t* tail = scratch.tails.get() + i * 2 * kGroup;
          std::memcpy(tail, from[i] + group * group_bytes(kForm), bytes);
          from[i] = tail - group * group_bytes(kForm);
        }
      }
      Pair sum[T];
      each_token<T>([&](auto t) INLINE { sum[t] = both(0.0f); });
      for (int64_t r = 0; r < ranks_; ++r) {
        Pair scale, zero;
        if (kForm != 16) scale = load_pair(scale_[r].get() + slot), zero = load_pair(zero_[r].get() + slot);
        each_token<T>([&](auto t) INLINE {
          int64_t i = r * T + t;
          Pair v = load_group<kForm>(from[i] + group * group_bytes(kForm));
          if (kRanged) v = (v - middle) * both(scratch.step[i]);
          if (kForm != 16) v = (v - zero) * scale;
          sum[t] = sum[t] + v;
        });
      }
      each_token<T>([&](auto t) INLINE { Type::store(total[t] + slot, sum[t]); });
    });
  }

  int64_t ranks_;
  std::vector<Buffer<float>> scale_, zero_;
};

// ---- Calls

bool worth_planning(int64_t tokens) { return tokens >= 8; }

int threads_for(int64_t tokens, int64_t features, int threads) {
  int64_t blocks = (tokens + kTokens - 1) / kTokens;
  if (tokens * features < kMinParallel) return 1;
  return static_cast<int>(threads < blocks ? threads : blocks);
}

// work(first token, std::integral_constant of how many) for blocks of kTokens tokens, and one by one at the end.
template <int T>
struct Count {
  static constexpr int value = T;
};

template <class Work>
void by_tokens(int64_t first, int64_t last, Work work) {
  for (; first + kTokens <= last; first += kTokens) work(first, Count<kTokens>());
  for (; first < last; ++first) work(first, Count<1>());
}

// body(first token, last token) on every thread; the ranges are whole blocks, so that any number of threads does the
// same arithmetic.
template <class Body>
void in_parallel(int64_t tokens, int threads, Body body) {
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    int64_t blocks = (tokens + kTokens - 1) / kTokens;
    int64_t first = blocks * part / threads * kTokens, last = blocks * (part + 1) / threads * kTokens;
    body(first, last < tokens ? last : tokens);
  }
}

template <class Type, class Value>
int pack(const LowbitFormat& format, const Value* x, int64_t tokens, int64_t row_stride, uint8_t* out,
         int64_t* saturated, int threads) {
  using Word = typename Type::Word;
  constexpr bool kConvert = sizeof(Value) != sizeof(Word);  // float64, to a row of float32
  Encoder<Type> encoder(format, nullptr, format.features, worth_planning(tokens));
  const Layout& layout = encoder.layout;
  int64_t total = 0;
  in_parallel(tokens, threads_for(tokens, layout.features, threads), [&](int64_t first, int64_t last) {
    typename Encoder<Type>::Scratch scratch(layout);
    Buffer<float> converted(kConvert ? kTokens * layout.features : 0);
    int64_t here = 0;
    by_tokens(first, last, [&](int64_t token, auto count) {
      const Word* rows[count.value];
      uint8_t* messages[count.value];
      for (int t = 0; t < count.value; ++t) {
        const Value* row = x + (token + t) * row_stride;
        rows[t] = reinterpret_cast<const Word*>(row);
        if constexpr (kConvert) {
          float* to = converted.get() + t * layout.features;
          for (int64_t f = 0; f < layout.features; ++f) to[f] = static_cast<float>(row[f]);
          rows[t] = reinterpret_cast<const Word*>(to);
        }
        messages[t] = out + (token + t) * layout.row_bytes;
      }
      here += encoder.template encode<count.value>(rows, messages, scratch);
    });
    __atomic_fetch_add(&total, here, __ATOMIC_RELAXED);
  });
  *saturated = total;
  return 0;
}

template <class Type, class Value>
int unpack_reduce(const LowbitFormat& format, const uint8_t* messages, int64_t ranks, int64_t tokens,
                  int64_t rank_stride, int64_t row_stride, Value* out, int threads) {
  using Word = typename Type::Word;
  constexpr bool kConvert = sizeof(Value) != sizeof(Word);  // to float64, from a row of float32
  Decoder decoder(format, ranks);
  const Layout& layout = decoder.layout;
  Gather<Word> gather(layout.from_wire<Type>(), layout.slots + 128 / sizeof(Word), worth_planning(tokens));
  in_parallel(tokens, threads_for(tokens, layout.features * ranks, threads), [&](int64_t first, int64_t last) {
    Decoder::Scratch scratch(decoder);
    std::vector<Buffer<Word>> totals;
    for (int t = 0; t < kTokens; ++t) totals.emplace_back(layout.slots);
    Buffer<float> converted(kConvert ? layout.features : 0);
    by_tokens(first, last, [&](int64_t token, auto count) {
      Word* rows[count.value];
      for (int t = 0; t < count.value; ++t) rows[t] = totals[t].get();
      decoder.decode<Type, count.value>(messages + token * row_stride, rank_stride, row_stride, rows, scratch);
      for (int t = 0; t < count.value; ++t) {
        Value* to = out + (token + t) * layout.features;
        if constexpr (kConvert) {
          gather.row(rows[t], reinterpret_cast<Word*>(converted.get()));
          for (int64_t f = 0; f < layout.features; ++f) to[f] = converted.get()[f];
        } else {
          gather.row(rows[t], reinterpret_cast<Word*>(to));
        }
      }
    });
  });
  return 0;
}

}  // namespace

extern "C" {

// Whether `order` has every feature once; what follows relies on it.
int lowbit_valid(const LowbitFormat* format) { return Layout(*format).valid(); }

// x: [tokens, features] of dtype, rows row_stride values apart; out: [tokens, row_bytes], rows without gaps.
int lowbit_pack(const LowbitFormat* format, const void* x, int dtype, int64_t tokens, int64_t row_stride, uint8_t* out,
                int64_t* saturated, int threads) {
  auto words = static_cast<const uint16_t*>(x);
  switch (dtype) {
    case kFloat32:
      return pack<Float32>(*format, static_cast<const float*>(x), tokens, row_stride, out, saturated, threads);
    case kBfloat16:
      return pack<Bfloat16>(*format, words, tokens, row_stride, out, saturated, threads);
    case kFloat16:
      return pack<Float16>(*format, words, tokens, row_stride, out, saturated, threads);
    case kFloat64:
      return pack<Float32>(*format, static_cast<const double*>(x), tokens, row_stride, out, saturated, threads);
  }
  return 1;
}

// messages: [ranks, tokens, row_bytes], strides in bytes; out: [tokens, features] of dtype.
int lowbit_unpack_reduce(const LowbitFormat* format, const uint8_t* messages, int64_t ranks, int64_t tokens,
                         int64_t rank_stride, int64_t row_stride, void* out, int dtype, int threads) {
  auto call = [&](auto type, auto* to) {
    return unpack_reduce<decltype(type)>(*format, messages, ranks, tokens, rank_stride, row_stride, to, threads);
  };
  switch (dtype) {
    case kFloat32:
      return call(Float32(), static_cast<float*>(out));
    case kBfloat16:
      return call(Bfloat16(), static_cast<uint16_t*>(out));
    case kFloat16:
      return call(Float16(), static_cast<uint16_t*>(out));
    case kFloat64:
      return call(Float32(), static_cast<double*>(out));
  }
  return 1;
}

// The two above in one pass; the sum of a token stays in cache. out: [tokens, row_bytes of `second`].
int lowbit_requantize(const LowbitFormat* format, const uint8_t* messages, int64_t ranks, int64_t tokens,
                      int64_t rank_stride, int64_t row_stride, const LowbitFormat* second, uint8_t* out,
                      int64_t* saturated, int threads) {
  Decoder decoder(*format, ranks);
  std::vector<int32_t> place = decoder.layout.from_wire<Float32>();
  int64_t slots = decoder.layout.slots;
  Encoder<Float32> encoder(*second, &place, slots + 32, worth_planning(tokens));
  int64_t total = 0;
  int number = threads_for(tokens, decoder.layout.features * ranks, threads);
  in_parallel(tokens, number, [&](int64_t first, int64_t last) {
    Decoder::Scratch decoding(decoder);
    Encoder<Float32>::Scratch encoding(encoder.layout);
    std::vector<Buffer<uint32_t>> totals;
    for (int t = 0; t < kTokens; ++t) totals.emplace_back(slots);
    int64_t here = 0;
    by_tokens(first, last, [&](int64_t token, auto count) {
      uint32_t* rows[count.value];
      uint8_t* to[count.value];
      for (int t = 0; t < count.value; ++t) {
        rows[t] = totals[t].get();
        to[t] = out + (token + t) * encoder.layout.row_bytes;
      }
      decoder.decode<Float32, count.value>(messages + token * row_stride, rank_stride, row_stride, rows, decoding);
      here += encoder.encode<count.value>(rows, to, encoding);
    });
    __atomic_fetch_add(&total, here, __ATOMIC_RELAXED);
  });
  *saturated = total;
  return 0;
}
}
