// The rotation of slices of 2^k m channels, m odd (hadamard.py). A slice is 2^k rows of m channels.
//
// Up to eight rows are multiplied by C_m together, a register of their channels at a time, and what pairs them with
// each other is done before they are stored. From then on pairs lie 8m, 16m, ... channels apart, whole groups of eight.

#pragma once

#include "reassembly.h"

namespace {

#if defined(__AVX512F__)
constexpr int kRegister = 64;  // bytes
#elif defined(__AVX__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

// Lanes i and i ^ Distance of eight: their sum in the first, their difference in the second.
template <int Distance, class T, class Eight, class Bits, size_t... I>
INLINE inline Eight pair_lanes(Eight v, std::index_sequence<I...>) {
#ifdef __clang__
  const Eight other = __builtin_shufflevector(v, v, (I ^ Distance)...);
#else
  const Eight other = __builtin_shuffle(v, Bits{(I ^ Distance)...});
#endif
  constexpr auto sign = decltype(Bits{}[0] + 0){1} << (8 * sizeof(T) - 1);
  return other + (Eight)((Bits)v ^ Bits{(I & Distance ? sign : 0)...});
}

template <class T>
class Rotation {
 public:
  // matrix: C_m [m, m]; factor: 2^(-k/2)
  Rotation(int64_t channels, const T* matrix, double factor)
      : channels_(channels), rows_(channels & -channels), m_(channels / rows_), matrix_(matrix), stride_(m_),
        factor_(static_cast<T>(factor)), padded_(m_ < kWide ? m_ * kWide : 0) {
    if (m_ >= kWide) return;
    for (int64_t j = 0; j < m_; ++j) std::copy_n(matrix + j * m_, m_, padded_.get() + j * kWide);
    matrix_ = padded_.get(), stride_ = kWide;
  }

  // x: `channels` values; z: room for as many and a register more. They lie apart.
  void apply(const T* x, T* z) const {
    if (m_ == 1 && rows_ >= 8) {
      for (int64_t i = 0; i < channels_; i += 8) store(z + i, pair_eight(load<Eight>(x + i)));
    } else if (rows_ >= 8) {
      mix<8>(x, z);
    } else if (rows_ == 4) {
      mix<4>(x, z);
    } else if (rows_ == 2) {
      mix<2>(x, z);
    } else {
      mix<1>(x, z);
    }
    for (int64_t run = 8 * m_; run < channels_; run *= 2)
      run % kWide ? pair_runs<Eight>(z, run) : pair_runs<Vector>(z, run);
    for (int64_t i = 0; i < channels_; i += kWide) store(z + i, load<Vector>(z + i) * factor_);
  }

 private:
  static constexpr int kWide = kRegister / sizeof(T);
  typedef T Vector __attribute__((vector_size(kRegister)));
  typedef T Eight __attribute__((vector_size(8 * sizeof(T))));
  typedef std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t> Word;
  typedef Word Bits __attribute__((vector_size(8 * sizeof(T))));

  // The sums of products from left to right, of Rows rows together, and the pairs among these rows.
  template <int Rows>
  void mix(const T* x, T* z) const {
    for (int64_t row = 0; row < rows_; row += Rows, x += Rows * m_, z += Rows * m_)
      for (int64_t i = 0; i < m_; i += kWide) {
        const int64_t first = std::max<int64_t>(std::min(i, m_ - kWide), 0);  // the last register ends with the row
        const T* factors = matrix_ + first;
        Vector sums[Rows], column = load<Vector>(factors);
        each<Rows>([&](auto r) INLINE { sums[r] = column * x[r * m_]; });
        for (int64_t j = 1; j < m_; ++j) {
          column = load<Vector>(factors + j * stride_);
          each<Rows>([&](auto r) INLINE { sums[r] = sums[r] + column * x[r * m_ + j]; });
        }
        pair_rows<1, Rows>(sums);
        pair_rows<2, Rows>(sums);
        pair_rows<4, Rows>(sums);
        each<Rows>([&](auto r) INLINE { store(z + r * m_ + first, sums[r]); });  // the next row mends what is past one
      }
  }

  template <int Distance, int Rows>
  INLINE static void pair_rows(Vector* sums) {
    if constexpr (Distance < Rows)
      each<Rows>([&](auto r) INLINE {
        if constexpr (!(r & Distance)) {
          const Vector a = sums[r], b = sums[r + Distance];
          sums[r] = a + b, sums[r + Distance] = a - b;
        }
      });
  }

  INLINE static Eight pair_eight(Eight v) {
    constexpr auto lanes = std::make_index_sequence<8>();
    v = pair_lanes<1, T, Eight, Bits>(v, lanes);
    v = pair_lanes<2, T, Eight, Bits>(v, lanes);
    return pair_lanes<4, T, Eight, Bits>(v, lanes);
  }

  // Channels `run` apart, a multiple of V's lanes.
  template <class V>
  void pair_runs(T* z, int64_t run) const {
    for (T* end = z + channels_; z < end; z += 2 * run)
      for (int64_t i = 0; i < run; i += sizeof(V) / sizeof(T)) {
        const V a = load<V>(z + i), b = load<V>(z + run + i);
        store(z + i, a + b), store(z + run + i, a - b);
      }
  }

  int64_t channels_, rows_, m_;
  const T* matrix_;
  int64_t stride_;
  T factor_;
  Buffer<T> padded_;
};

}  // namespace
