// The format of a row (wire_format.py): its tiers, the scales of per-token tokens, and which features of a row each tier has.

#pragma once

#include "vectors.h"

// Mirrored by the ctypes structure in cpu.py. scale, zero_point: [ranks, features], features in their own order.
struct LowbitFormat {
  const float* scale;
  const float* zero_point;
  const int64_t* order;
  const int64_t* tiers;  // bits, count, bits, count, ...
  int64_t num_tiers;
  int64_t features;
  int64_t per_token;
};

namespace {

constexpr uint16_t kBf16NaN = 0xffff;  // the one that torch's vectorized cast makes
constexpr uint8_t kBroken = 255;       // header of a per-token token that holds NaN or Inf
constexpr float kFar = 16.0f;          // standard deviations beyond which a per-token value counts as saturated

// What encoding counts: values, those far from what was calibrated, and tokens that travel as NaN.
struct Tally {
  int64_t values = 0, saturated = 0, nonfinite = 0;

  void add(const Tally& of_a_thread) {
    __atomic_fetch_add(&saturated, of_a_thread.saturated, __ATOMIC_RELAXED);
    __atomic_fetch_add(&nonfinite, of_a_thread.nonfinite, __ATOMIC_RELAXED);
  }
  void store(int64_t* to) const { to[0] = values, to[1] = saturated, to[2] = nonfinite; }
};

// By bits: where a per-token token's codes end, and where their steps double.
constexpr double kLoading[] = {0, 0, 1.1, 1.5, 1.6, 1.7, 1.9, 2.0, 2.2};
constexpr float kKnee = 0.6f;

// Mantissa bits of 2^(i / 8), and of the thresholds between them.
constexpr uint32_t kMantissas[] = {0, 759234, 1587184, 2490071, 3474675, 4548394, 5719293, 6996167};
constexpr uint32_t kThresholds[] = {371396, 1164244, 2028851, 2971711, 3999908, 5121165, 6343903, 7677310};

// Largest magnitudes, as bits of floats, -> the bytes of the nearest scales 2^(j / 8), which are j + 128.
inline Lanes scale_headers(Lanes largest) {
  Lanes mantissa = largest & 0x7fffffu, exponent = largest >> 23;
  Lanes j = 8 * exponent;  // 8 * 127 + 128 too much, to stay positive
  for (uint32_t threshold : kThresholds) j -= (Lanes)(mantissa >= threshold);  // true is -1
  constexpr uint32_t kOffset = 8 * 127 - 128, kLeast = kOffset + 1, kMost = kOffset + 254;
  j = (j < kLeast ? Lanes{} + kLeast : j > kMost ? Lanes{} + kMost : j) - kOffset;
  j = largest == 0 ? Lanes{} : j;
  return largest >= 0x7f800000u ? Lanes{} + kBroken : j;
}

inline float header_scale(uint8_t header) {
  if (header == 0) return 0.0f;
  if (header == kBroken) return std::numeric_limits<float>::quiet_NaN();
  int j = header - 128;
  return as_float(static_cast<uint32_t>((j >> 3) + 127) << 23 | kMantissas[j & 7]);
}

struct Tier {
  int bits;
  int64_t count;
  int64_t feature;  // the first one, in wire order
  int64_t slot;     // its place in arrays where tiers are padded to whole blocks, and one more that may be overwritten
  int64_t byte;     // in the row
  int64_t size;     // bytes
  float largest() const { return static_cast<float>((1 << bits) - 1); }
  double code_span() const { return 2 * kLoading[bits] / ((1 << bits) - 1); }
};

inline int64_t packed_bytes(int64_t count, int bits) {
  int64_t per_word = 1;
  while (per_word * bits % 8) per_word *= 2;
  return (count + per_word - 1) / per_word * per_word * bits / 8;
}

struct Layout {
  std::vector<Tier> tiers;
  int64_t features, header, row_bytes, slots = 0;
  uint32_t headroom;  // of the largest header of a per-token token's groups above that of its scale
  const int64_t* order;
  bool per_token, ascending = true;  // ascending: the features of every tier

  explicit Layout(const LowbitFormat& format)
      : features(format.features), order(format.order), per_token(format.per_token != 0) {
    bool bf16 = false;
    for (int64_t i = 0; i < format.num_tiers; ++i) bf16 |= format.tiers[2 * i] == 16;
    header = per_token || !bf16;
    row_bytes = header;
    int64_t feature = 0, coded = features;
    for (int64_t i = 0; i < format.num_tiers; ++i) {
      int bits = static_cast<int>(format.tiers[2 * i]);
      int64_t count = format.tiers[2 * i + 1], size = bits == 16 ? 2 * count : packed_bytes(count, bits);
      if (count) tiers.push_back({bits, count, feature, slots, row_bytes, size});
      for (int64_t f = feature + 1; f < feature + count; ++f) ascending &= order[f - 1] < order[f];
      feature += count, slots += padded(count) + kBlock, row_bytes += size;
      if (bits == 16) coded -= count;
    }
    headroom = static_cast<uint32_t>(std::floor(8 * std::log2(1 + coded / 1280.0)));
  }
};

// Whether `order` has every feature once; all else relies on it.
inline bool valid(const LowbitFormat& format) {
  std::vector<bool> seen(format.features);
  for (int64_t i = 0; i < format.features; ++i) {
    int64_t feature = format.order[i];
    if (feature < 0 || feature >= format.features || seen[feature]) return false;
    seen[feature] = true;
  }
  return true;
}

// Where the features of a row are among the slots of the tiers, a block of kSize features at a time.
//
// Inside a tier features ascend. Those of a block that are in one tier are then neighbours there: the row's block comes
// from a run of each tier, each spread to the places in a mask, or is taken apart into them, which AVX-512 does in one
// permutation. Features of tiers that have one in a block at most, or that do not ascend, are copied one by one.
template <int kSize>
struct Runs {
  struct Run {
    uint64_t mask;  // the bytes of its features among the 64 of the block
    int64_t slot;
    Bytes index;  // of the permutation, by who does it
  };
  struct Single {
    int32_t feature, slot;
  };
  std::vector<Run> runs;         // block by block
  std::vector<int32_t> first;    // run of every block, and the end
  std::vector<int32_t> by_runs;  // blocks in the order of how many runs they have: loops over them are predictable
  std::vector<Single> singles;

  Runs(const Layout& layout, bool with_bf16) {
    constexpr int kUnit = 64 / kSize;
    std::vector<std::vector<Run>> blocks((layout.features + kSize - 1) / kSize);
    for (const Tier& tier : layout.tiers) {
      if (tier.bits == 16 && !with_bf16) continue;
      bool in_runs = kInRuns && layout.ascending && tier.count * kSize > layout.features;
      int64_t last = -1;
      for (int64_t i = 0; i < tier.count; ++i) {
        int64_t feature = layout.order[tier.feature + i], block = feature / kSize, slot = tier.slot + i;
        if (!in_runs) {
          singles.push_back({static_cast<int32_t>(feature), static_cast<int32_t>(slot)});
          continue;
        }
        if (block != last) blocks[block].push_back({0, slot, Bytes{}});
        blocks[block].back().mask |= low_bits(kUnit) << feature % kSize * kUnit;
        last = block;
      }
    }
    for (const auto& block : blocks) {
      by_runs.push_back(static_cast<int32_t>(first.size()));
      first.push_back(static_cast<int32_t>(runs.size()));
      runs.insert(runs.end(), block.begin(), block.end());
    }
    first.push_back(static_cast<int32_t>(runs.size()));
    auto fewer = [&](int32_t a, int32_t b) { return blocks[a].size() < blocks[b].size(); };
    std::stable_sort(by_runs.begin(), by_runs.end(), fewer);
  }

#ifdef LOWBIT_AVX512
  static constexpr bool kInRuns = true;
#else
  static constexpr bool kInRuns = false;
#endif
};

}  // namespace
