// Vectors of 16 lanes for the kernels, and the dtypes of partial sums.
//
// They are GCC's own (vector_size), which any target compiles, split where a register is smaller. What AVX-512 of today
// (Ice Lake, Zen 4 and later) does in an instruction has its own branch: LOWBIT_AVX512.

#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX512VBMI2__) && defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define LOWBIT_AVX512
#include <immintrin.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Lanes __attribute__((vector_size(64)));
typedef uint16_t Words __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));

constexpr int kLanes = 16;
constexpr int kBlock = 64;                 // values that a step of a loop works on, as four vectors
constexpr int kVectors = kBlock / kLanes;
constexpr int kTokens = 4;                 // that go through a loop together: reading qparams takes longer than using them
constexpr float kMagic = 0x1.8p23f;        // a small value plus this has it rounded, half to even, in its low mantissa bits

inline int64_t padded(int64_t count) { return (count + kBlock - 1) / kBlock * kBlock; }
inline uint64_t low_bits(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// Loops are unrolled here, and bodies inlined, before the compiler decides what to keep in registers: arrays of a
// value per token are to stay there.
#define INLINE __attribute__((always_inline))

template <class Body, size_t... I>
INLINE inline void each_of(std::index_sequence<I...>, Body& body) {
  (body(std::integral_constant<int, I>()), ...);
}

// body(i) for i < N, each a constant.
template <int N, class Body>
INLINE inline void each(Body body) {
  each_of(std::make_index_sequence<N>(), body);
}

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

// Memory that the next tokens go through. A kernel has four rows of each message at hand, more than the hardware sees
// coming: without this, adding up the messages of two ranks took 1.3 to 1.9 times as long. It may be past the end.
INLINE inline void fetch_early(const void* memory) { __builtin_prefetch(memory, 0, 2); }

// A value in a register: compilers would rather load it again for every use, and loads are what a loop waits for.
INLINE inline Floats keep(Floats v) {
#ifdef LOWBIT_AVX512
  asm("" : "+v"(v));
#endif
  return v;
}

// 0, 1, 2, ...
template <class V>
inline V iota() {
  V v;
  for (size_t i = 0; i < sizeof v / sizeof v[0]; ++i) v[i] = i;
  return v;
}

inline Floats splat(float value) { return Floats{} + value; }

// clamp(v, -limit, limit); of NaN, AVX-512 has the limit.
inline Floats clip(Floats v, float limit) {
#ifdef LOWBIT_AVX512
  return (Floats)_mm512_range_ps((__m512)v, (__m512)splat(limit), 0b0010);  // the smaller magnitude, the sign of v
#else
  v = v > limit ? splat(limit) : v;
  return v < -limit ? splat(-limit) : v;
#endif
}

inline Floats to_floats(Lanes small) { return __builtin_convertvector((Ints)small, Floats); }
inline Lanes magnitude(Floats v) { return (Lanes)v & 0x7fffffffu; }

inline Lanes larger(Lanes a, Lanes b) {
#ifdef LOWBIT_AVX512
  return (Lanes)_mm512_max_epu32((__m512i)a, (__m512i)b);
#else
  return a > b ? a : b;
#endif
}

// The larger magnitude of the two; of a NaN and a number, AVX-512 has the number, others NaN.
inline Lanes larger_magnitude(Floats a, Lanes b) {
#ifdef LOWBIT_AVX512
  return (Lanes)_mm512_range_ps((__m512)a, (__m512)b, 0b1011);
#else
  return larger(magnitude(a), b);
#endif
}

inline uint32_t largest_lane(Lanes v) {
  uint32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// The largest lane of each of N vectors, side by side.
template <int N>
INLINE inline void store_largest(const Lanes* v, uint32_t* to) {
#ifdef LOWBIT_AVX512
  if constexpr (N == 4) {
    auto high = [](const Lanes& a, const Lanes& b) INLINE {
      __m512i x = (__m512i)a, y = (__m512i)b;
      return _mm512_max_epu32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
    };
    __m512i ab = high(v[0], v[1]), cd = high(v[2], v[3]);
    __m512i all = _mm512_max_epu32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i half = _mm256_max_epu32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    __m128i quarter = _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), quarter);
  }
#endif
  for (int i = 0; i < N; ++i) to[i] = largest_lane(v[i]);
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// A NaN whose low half is zero, so that rounding it to bf16 leaves a NaN.
inline float quiet(float value) { return std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : value; }

// As the hardware rounds to bf16, but a NaN may become any NaN with a low half of zero; see quiet().
inline Lanes round_to_bf16(Floats v) {
  Lanes bits = (Lanes)v;
  return bits + 0x7fffu + (bits >> 16 & 1u);
}

// ---- Dtypes: how 64 values lie in memory, and in four vectors.
//
//   load          64 neighbours; place(i): the index of neighbour i among the 4 x 16 lanes that come out
//   store_block   64 codes' values, that of code i in lane Unpacker::place(i), side by side; normal: none is subnormal

struct Bfloat16 {
  using Word = uint16_t;
  static constexpr uint32_t infinity = 0x7f80;
  static int64_t place(int64_t i) { return i / 32 * 32 + i % 2 * kLanes + i % 32 / 2; }

  template <int V>
  static Floats load(const Word* from) {
    Lanes pairs = ::load<Lanes>(from + V / 2 * 32);
    return (Floats)(V % 2 ? pairs & 0xffff0000u : pairs << 16);
  }

  static float value(Word word) { return as_float(static_cast<uint32_t>(word) << 16); }

  static void store_block(Word* to, const Floats* v, bool normal) {
#ifdef LOWBIT_AVX512
    for (int half = 0; half < 2; ++half) {
      Floats a = v[2 * half], b = v[2 * half + 1];
#ifdef __AVX512BF16__
      if (__builtin_expect(normal, 1)) {
        ::store(to + 32 * half, _mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
        continue;
      }
#endif
      const Words odd = 2 * iota<Words>() + 1;
      ::store(to + 32 * half,
              _mm512_permutex2var_epi16((__m512i)round_to_bf16(a), (__m512i)odd, (__m512i)round_to_bf16(b)));
    }
#else
    Lanes first = round_to_bf16(v[0]) >> 16 | (round_to_bf16(v[1]) & 0xffff0000u);
    Lanes second = round_to_bf16(v[2]) >> 16 | (round_to_bf16(v[3]) & 0xffff0000u);
    uint32_t pairs[2 * kLanes];
    for (int i = 0; i < kLanes; ++i) pairs[2 * i] = first[i], pairs[2 * i + 1] = second[i];
    std::memcpy(to, pairs, sizeof pairs);
#endif
  }

  static Word word(float value) {
    uint32_t bits = as_bits(value);
    return static_cast<Word>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
};

struct Float32 {
  using Word = uint32_t;
  static constexpr uint32_t infinity = 0x7f800000;
  static int64_t place(int64_t i) { return i; }

  template <int V>
  static Floats load(const Word* from) {
    return ::load<Floats>(from + V * kLanes);
  }

  static float value(Word word) { return as_float(word); }

  static void store_block(Word* to, const Floats* v, bool) {
#ifdef LOWBIT_AVX512
    std::memcpy(to, v, kBlock * sizeof *to);
#else
    float all[kBlock];
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kVectors; ++j) all[kVectors * i + j] = v[j][i];
    std::memcpy(to, all, sizeof all);
#endif
  }

  static Word word(float value) { return as_bits(value); }
};

// Rows of float16 and float64 become rows of float32 and back; only exact.h reads float16 as it is.
struct Float16 {
  using Word = uint16_t;

  static Lanes widen(Lanes half) {
    Lanes size = (half & 0x7fffu) << 13;
    Lanes bits = (Lanes)((Floats)size * 0x1p112f);  // moves the exponent, exact for subnormals too
    bits |= size >= 0x0f800000u ? Lanes{} + 0x7f800000u : Lanes{};
    return bits | (half & 0x8000u) << 16;
  }

  static Lanes narrow(Floats v) {
    Lanes size = magnitude(v), sign = (Lanes)v ^ size;
    Lanes subnormal = (Lanes)((Floats)size + 0.5f) - 0x3f000000u;  // 0.5 has the ulp of a subnormal half
    Lanes normal = (size + 0xc8000fffu + (size >> 13 & 1u)) >> 13;
    Lanes special = size > 0x7f800000u ? Lanes{} + 0x7e00u : Lanes{} + 0x7c00u;
    Lanes half = size < 0x38800000u ? subnormal : normal;
    return (size >= 0x47800000u ? special : half) | sign >> 16;
  }
};

struct Half {
  uint16_t bits;
};

typedef uint16_t HalfWords __attribute__((vector_size(32)));

inline void convert(const double* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

inline void convert(const float* from, double* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

inline void convert(const Half* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    HalfWords words = {};
    int64_t here = count - i < kLanes ? count - i : kLanes;
    std::memcpy(&words, from + i, here * sizeof(Half));
    Lanes wide = Float16::widen(__builtin_convertvector(words, Lanes));
    std::memcpy(to + i, &wide, here * sizeof(float));
  }
}

inline void convert(const float* from, Half* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats wide = {};
    int64_t here = count - i < kLanes ? count - i : kLanes;
    std::memcpy(&wide, from + i, here * sizeof(float));
    HalfWords words = __builtin_convertvector(Float16::narrow(wide), HalfWords);
    std::memcpy(to + i, &words, here * sizeof(Half));
  }
}

// The largest magnitude among words, bitwise: NaN and Inf are above all others.
template <class Word>
struct Largest {
  Lanes seen = {};
  void see(const Word* block) {
    for (size_t i = 0; i < kBlock * sizeof(Word); i += sizeof seen) {
      Lanes raw = load<Lanes>(reinterpret_cast<const char*>(block) + i);
      if constexpr (sizeof(Word) == 4) {
        seen = larger(raw & 0x7fffffffu, seen);
      } else {
#ifdef LOWBIT_AVX512
        seen = (Lanes)_mm512_max_epu16((__m512i)(raw & 0x7fff7fffu), (__m512i)seen);
#else
        Words now = (Words)(raw & 0x7fff7fffu), before = (Words)seen;
        seen = (Lanes)(now > before ? now : before);
#endif
      }
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

enum Content { kZeros, kAnything };

// Large blocks of memory that a thread has used, for its next buffers: from the heap they would be new pages at every
// call, and leave holes between what lives longer.
class Blocks {
 public:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kLeast = ~size_t{0};  // none, because the sanitizer watches the heap
#else
  static constexpr size_t kLeast = 64 << 10;  // bytes of a block
#endif
  static constexpr size_t kMost = 16 << 20;  // of all that are kept

  static Blocks& of_thread() {
    thread_local Blocks blocks;
    return blocks;
  }
  // bytes: a multiple of kLeast
  void* take(size_t bytes) {
    for (size_t i = kept_.size(); i-- > 0;)
      if (kept_[i].second == bytes) {
        void* data = kept_[i].first;
        kept_.erase(kept_.begin() + i);
        bytes_ -= bytes;
        return data;
      }
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    return data;
  }
  void give(void* data, size_t bytes) {
    kept_.emplace_back(data, bytes);
    bytes_ += bytes;
    while (bytes_ > kMost) {  // the one that was given first
      munmap(kept_.front().first, kept_.front().second);
      bytes_ -= kept_.front().second;
      kept_.erase(kept_.begin());
    }
  }
  ~Blocks() {
    for (auto& block : kept_) munmap(block.first, block.second);
  }

 private:
  std::vector<std::pair<void*, size_t>> kept_;
  size_t bytes_ = 0;
};

// Scratch memory with room for a vector read or written past its end.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size, Content content = kZeros) : bytes_(size * sizeof(T) + 128) {
    if (bytes_ >= Blocks::kLeast) {
      bytes_ = (bytes_ + Blocks::kLeast - 1) / Blocks::kLeast * Blocks::kLeast;
      data_ = static_cast<T*>(Blocks::of_thread().take(bytes_));
    } else {
      data_ = static_cast<T*>(::operator new(bytes_, std::align_val_t(64)));
    }
    if (content == kZeros) std::memset(static_cast<void*>(data_), 0, bytes_);
  }
  ~Buffer() {
    if (!data_) return;
    if (bytes_ >= Blocks::kLeast) Blocks::of_thread().give(data_, bytes_);
    else ::operator delete(data_, std::align_val_t(64));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  T* get() { return data_; }
  const T* get() const { return data_; }

 private:
  T* data_;
  size_t bytes_;
};

}  // namespace
