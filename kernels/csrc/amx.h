// Products in tile registers (Intel AMX): 16 tokens by 16 outputs, 64 bytes of each at a time.
//
// Weights are expanded, panel by panel, to what a tile register holds, and stay in the second-level cache while all
// tokens go by; 32 tokens and 32 outputs are multiplied at once, four accumulators. Codes are bytes, unsigned on both
// sides, and x.w is exact below 2^32. bf16 activations meet codes as bf16, which holds them exactly, in float32; the
// order of the sum is the hardware's and the same for every batch.

#pragma once

#include "finish.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define LOWBIT_AMX
#include <sys/syscall.h>
#include <unistd.h>

#include <memory>

#include "bf16_codes.h"

namespace {

constexpr int64_t kLeastAmxTokens = 5;         // below, tiles.h is faster: it does not expand
constexpr int64_t kTile = 1024;                // bytes of a tile register
constexpr int64_t kExpanded = 1 << 20;         // bytes of expanded weights, which the tokens share a 2 MiB cache with
constexpr int64_t kMostTiles = 64;             // of a token that are multiplied at a time
constexpr int kRows = 16;

// Linux lends the tile registers on request (arch_prctl, ARCH_REQ_XCOMP_PERM of XTILEDATA).
inline bool amx_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return allowed;
}

// The shape of all eight registers: 16 rows of 64 bytes, but for those of tokens, 0 .. 4, where these are fewer. Held as
// long as the object lives.
struct TileRegisters {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
  };
  explicit TileRegisters(int tokens) {
    Config config;
    for (int i = 0; i < 8; ++i) config.bytes_per_row[i] = 64, config.rows[i] = i < 5 ? tokens : kRows;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
};

// What is multiplied, by GCC's own instructions in its own words: its functions for them take literal numbers only.
// expand: a panel's step (16 inputs) as rows of 64 bytes, [4 groups] apart by kTile.
template <int Bits>
struct CodeOperand {
  static constexpr int kInputs = 64;  // of a tile
  static constexpr int kBytes = 1;    // of an input
  using Dot = uint32_t;

  static void expand(const uint8_t* step, uint8_t* to) {
    each<kGroups>([&](auto g) INLINE {
      each<4>([&](auto q) INLINE { store(to + g * kTile + q * kVector, quad<Bits, q>(step, g)); });
    });
  }
  template <int C, int A, int B>
  static INLINE inline void multiply() {
    asm volatile("tdpbuud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

template <int Bits>
struct Bfloat16Operand {
  static constexpr int kInputs = 32;
  static constexpr int kBytes = 2;
  using Dot = float;

  static void expand(const uint8_t* step, uint8_t* to) {
    each<kGroups>([&](auto g) INLINE {
      each<8>([&](auto p) INLINE {
        store(to + g * kTile + p * kVector, as_bfloat16<Bits>(pair<Bits, p>(step, g)));
      });
    });
  }
  template <int C, int A, int B>
  static INLINE inline void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

// Tokens as tiles: [tokens / 16][inputs / kInputs][16 rows][64 bytes], each block padded to whole tiles.
template <class Operand>
struct AmxShape {
  int64_t tokens, blocks, tiles;  // tiles: of a block

  AmxShape(const Panels& panels, int64_t tokens)
      : tokens(tokens), blocks(panels.blocks), tiles(up(panels.block(), Operand::kInputs) / Operand::kInputs) {}
  int64_t block_bytes() const { return tiles * kVector; }
  int64_t row_bytes() const { return blocks * block_bytes(); }
  int64_t x_bytes() const { return up(tokens, kRows) * row_bytes(); }

  // row: row_bytes() of a token.
  void put_row(const uint8_t* row, int64_t token, uint8_t* x) const {
    uint8_t* to = x + token / kRows * kRows * row_bytes() + token % kRows * kVector;
    for (int64_t tile = 0; tile < blocks * tiles; ++tile) std::memcpy(to + tile * kTile, row + tile * kVector, kVector);
  }
};

// GCC's tile instructions do not tell the compiler that they read and write memory.
inline void fence() { asm volatile("" ::: "memory"); }

// The next tiles of a block: [tiles][4 groups][kTile]. steps: that are left of it; zeros follow. Returns the step after.
template <class Operand>
const uint8_t* expand(const uint8_t* step, int64_t step_bytes, int64_t steps, int64_t tiles, uint8_t* to) {
  constexpr int64_t kSteps = Operand::kInputs / kStep, kStepRows = kTile / kSteps;
  for (int64_t s = 0; s < tiles * kSteps; ++s) {
    uint8_t* at = to + s / kSteps * kGroups * kTile + s % kSteps * kStepRows;
    if (s < steps) {
      fetch_codes(step, step_bytes);
      Operand::expand(step, at);
      step += step_bytes;
    } else {
      for (int g = 0; g < kGroups; ++g) std::memset(at + g * kTile, 0, kStepRows);
    }
  }
  return step;
}

constexpr int kColumns = 32;                     // outputs that are multiplied at once
constexpr int kHalves = kPanel / kColumns;       // of a panel
constexpr int64_t kDots = 2 * kRows * kColumns;

// 32 tokens by 32 outputs, a piece of a block. x: the tiles of 16 tokens, the next 16 `x_stride` further; w: of two
// groups; dots: [32][32], rows `row` bytes apart, added to unless this is the first piece; meanwhile(): called at every
// tile.
template <class Operand, class Meanwhile>
inline void multiply_two(const uint8_t* x, int64_t x_stride, const uint8_t* w, int64_t tiles, bool first, void* dots,
                         int64_t row, Meanwhile meanwhile) {
  char* to = static_cast<char*>(dots);
  fence();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, to, row);
    _tile_loadd(1, to + 64, row);
    _tile_loadd(2, to + kRows * row, row);
    _tile_loadd(3, to + kRows * row + 64, row);
  }
  for (int64_t t = 0; t < tiles; ++t, x += kTile, w += kGroups * kTile) {
    _tile_loadd(4, x, 64);
    _tile_loadd(6, w, 64);
    Operand::template multiply<0, 4, 6>();
    _tile_loadd(5, x + x_stride, 64);
    Operand::template multiply<2, 5, 6>();
    _tile_loadd(7, w + kTile, 64);
    Operand::template multiply<1, 4, 7>();
    Operand::template multiply<3, 5, 7>();
    meanwhile();
  }
  _tile_stored(0, to, row);
  _tile_stored(1, to + 64, row);
  _tile_stored(2, to + kRows * row, row);
  _tile_stored(3, to + kRows * row + 64, row);
  fence();
}

// 16 tokens by 32 outputs.
template <class Operand, class Meanwhile>
inline void multiply_one(const uint8_t* x, const uint8_t* w, int64_t tiles, bool first, void* dots,
                         int64_t row, Meanwhile meanwhile) {
  char* to = static_cast<char*>(dots);
  fence();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
  } else {
    _tile_loadd(0, to, row);
    _tile_loadd(1, to + 64, row);
  }
  for (int64_t t = 0; t < tiles; ++t, x += kTile, w += kGroups * kTile) {
    _tile_loadd(4, x, 64);
    _tile_loadd(6, w, 64);
    Operand::template multiply<0, 4, 6>();
    _tile_loadd(7, w + kTile, 64);
    Operand::template multiply<1, 4, 7>();
    meanwhile();
  }
  _tile_stored(0, to, row);
  _tile_stored(1, to + 64, row);
  fence();
}

// A range of the tiles of every block of some panels, expanded: what is in the second-level cache at a time.
template <class Operand>
struct ExpandedPanels {
  const int64_t block_bytes, panel_bytes;
  Buffer<uint8_t> weights;
  std::vector<Channels> channels;
  int64_t first_tile = 0;

  // tiles: of a block, at most at a time; together: panels.
  ExpandedPanels(const Panels& panels, int64_t tokens, int64_t tiles, int64_t together, int64_t weight_groups)
      : block_bytes(tiles * kGroups * kTile),
        panel_bytes(panels.blocks * block_bytes),
        weights(together * panel_bytes, kAnything) {
    for (int64_t i = 0; i < together; ++i) channels.emplace_back(panels.blocks, weight_groups, tokens);
  }

  void expand_tiles(const Panels& panels, int64_t first, int64_t last, int64_t tile, int64_t tiles) {
    constexpr int64_t kSteps = Operand::kInputs / kStep;
    first_tile = tile;
    for (int64_t p = first; p < last; ++p)
      for (int64_t b = 0; b < panels.blocks; ++b)
        expand<Operand>(panels.panel(p) + (b * panels.steps() + tile * kSteps) * panels.step_bytes(), panels.step_bytes(),
                        panels.steps() - tile * kSteps, tiles,
                        weights.get() + (p - first) * panel_bytes + b * block_bytes);
  }

  const uint8_t* of(int64_t half, int64_t block, int64_t tile) const {
    return weights.get() + half / kHalves * panel_bytes + block * block_bytes + (tile - first_tile) * kGroups * kTile +
           half % kHalves * 2 * kTile;
  }
};

// A tile whose dot products wait for finish.h, which is called for a few of its tokens at a time while the next tile is
// multiplied: the processor has units for both.
template <class Dot>
struct Unfinished {
  Finish how;
  int64_t token = 0, panel = 0;
  int rows = 0, done = 0, output = 0;
  const Channels* channels = nullptr;
  const Dot* dots = nullptr;  // [rows][blocks][kColumns]

  void finish(const Tokens& tokens, int count, const Output& to) {
    count = std::min(count, rows - done);
    if (count <= 0) return;
    finish_rows<kColumns>(how, tokens, token + done, count, *channels, panel, output,
                          dots + done * tokens.blocks * kColumns, to);
    done += count;
  }
};

// All tokens with the panels [first, last), where tokens are many: weights are expanded once for all of them. A piece of
// 32 tokens stays in the first-level cache while all the panels go by; where a token has several blocks, while one panel
// does, because their dot products have to stay in a cache, too. Where a token is long and one block, the panels are taken
// a part of their inputs at a time, more of them together: tokens are read less often, and their dot products wait.
template <class Operand>
void multiply_wide(const Panels& panels, const AmxShape<Operand>& shape, const uint8_t* x, const Tokens& tokens,
                   const float* scale, const float* zero_point, int64_t weight_groups, int64_t first, int64_t last,
                   const Output& to) {
  using Dot = typename Operand::Dot;
  constexpr int64_t kMostPiece = 16;     // tiles
  constexpr int64_t kLeastFinished = 4;  // tokens
  const int64_t blocks = shape.blocks, parts = blocks == 1 ? (shape.tiles + kMostTiles - 1) / kMostTiles : 1;
  const int64_t part = (shape.tiles + parts - 1) / parts, part_bytes = blocks * part * kGroups * kTile;
  const int64_t together = std::min(last - first, std::max<int64_t>(1, kExpanded / part_bytes));
  const int64_t pieces = (part + kMostPiece - 1) / kMostPiece, piece_tiles = (part + pieces - 1) / pieces;
  const int64_t x_stride = kRows * shape.row_bytes(), pairs = up(shape.tokens, 2 * kRows) / (2 * kRows);
  const int64_t waiting = parts > 1 ? pairs : 1;  // whose dot products are kept
  const int64_t kept = blocks > 1 ? kHalves : waiting * together * kHalves;  // tiles
  const int64_t row = blocks * kColumns * sizeof(Dot);  // bytes of a token's dot products
  ExpandedPanels<Operand> expanded(panels, shape.tokens, part, together, weight_groups);
  Buffer<Dot> dots(kept * blocks * kDots, kAnything);
  Unfinished<Dot> unfinished;
  for (int64_t begin = first; begin < last; begin += together) {
    const int64_t end = std::min(begin + together, last), halves = (end - begin) * kHalves;
    for (int64_t p = begin; p < end; ++p) expanded.channels[p - begin].read(panels, p, scale, zero_point);
    for (int64_t from = 0; from < shape.tiles; from += part) {
      const int64_t until = std::min(from + part, shape.tiles);
      expanded.expand_tiles(panels, begin, end, from, until - from);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t token = pair * 2 * kRows;
        const int rows = static_cast<int>(std::min<int64_t>(2 * kRows, shape.tokens - token));
        const double reach = reach_of(tokens, token, rows);
        // Two halves at a time where there are several blocks, else all. of_half: dot products of a half.
        auto multiply = [&](int64_t first_half, int64_t last_half, Dot* pair_dots) {
          auto of_half = [&](int64_t half) { return pair_dots + (half - first_half) * blocks * kDots; };
          for (int64_t b = 0; b < blocks; ++b)
            for (int64_t tile = from; tile < until; tile += piece_tiles)
              for (int64_t half = first_half; half < last_half; ++half) {
                const uint8_t* piece = x + token * shape.row_bytes() + (b * shape.tiles + tile) * kTile;
                const uint8_t* w = expanded.of(half, b, tile);
                const int64_t tiles = std::min(piece_tiles, until - tile);
                if (unfinished.dots == of_half(half)) unfinished.finish(tokens, 2 * kRows, to);
                Dot* block_dots = of_half(half) + b * kColumns;
                const int share = static_cast<int>(std::max(kLeastFinished, (2 * kRows + tiles - 1) / tiles));
                auto meanwhile = [&]() INLINE { unfinished.finish(tokens, share, to); };
                if (rows > kRows) multiply_two<Operand>(piece, x_stride, w, tiles, !tile, block_dots, row, meanwhile);
                else multiply_one<Operand>(piece, w, tiles, !tile, block_dots, row, meanwhile);
                if (b + 1 < blocks || tile + tiles < shape.tiles) continue;
                unfinished.finish(tokens, 2 * kRows, to);
                const Channels& channels = expanded.channels[half / kHalves];
                unfinished = {Finish(reach, channels, panels.block(), to.dtype), token, begin + half / kHalves, rows, 0,
                              static_cast<int>(half % kHalves * kColumns), &channels, of_half(half)};
              }
        };
        if (blocks > 1) {
          for (int64_t half = 0; half < halves; half += kHalves) multiply(half, half + kHalves, dots.get());
        } else {
          multiply(0, halves, dots.get() + pair % waiting * halves * kDots);
        }
      }
    }
    unfinished.finish(tokens, 2 * kRows, to);
  }
}

// At most 16 tokens: weights are expanded a few tiles at a time, which the first-level cache holds.
template <class Operand>
void multiply_narrow(const Panels& panels, const AmxShape<Operand>& shape, const uint8_t* x, const Tokens& tokens,
                     const float* scale, const float* zero_point, int64_t weight_groups, int64_t first, int64_t last,
                     const Output& to) {
  using Dot = typename Operand::Dot;
  constexpr int64_t kSteps = Operand::kInputs / kStep, kTogether = 4;
  const int64_t row = shape.blocks * kPanel * sizeof(Dot);  // bytes of a token's dot products
  Buffer<uint8_t> expanded(kTogether * kGroups * kTile);
  Channels channels(panels.blocks, weight_groups, shape.tokens);
  Buffer<Dot> dots(kRows * shape.blocks * kPanel, kAnything);
  const int rows = static_cast<int>(shape.tokens);
  const double reach = reach_of(tokens, 0, rows);
  for (int64_t p = first; p < last; ++p) {
    channels.read(panels, p, scale, zero_point);
    const uint8_t *step = panels.panel(p), *tile = x;
    for (int64_t b = 0; b < panels.blocks; ++b) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t t = 0; t < shape.tiles; t += kTogether) {
        const int64_t here = std::min(kTogether, shape.tiles - t);
        step = expand<Operand>(step, panels.step_bytes(), panels.steps() - t * kSteps, here, expanded.get());
        fence();
        const uint8_t* w = expanded.get();
        for (int64_t i = 0; i < here; ++i, tile += kTile, w += kGroups * kTile) {
          _tile_loadd(4, tile, 64);
          _tile_loadd(5, w, 64);
          Operand::template multiply<0, 4, 5>();
          _tile_loadd(6, w + kTile, 64);
          Operand::template multiply<1, 4, 6>();
          _tile_loadd(5, w + 2 * kTile, 64);
          Operand::template multiply<2, 4, 5>();
          _tile_loadd(6, w + 3 * kTile, 64);
          Operand::template multiply<3, 4, 6>();
        }
        fence();
      }
      char* out = reinterpret_cast<char*>(dots.get() + b * kPanel);
      _tile_stored(0, out, row);
      _tile_stored(1, out + 64, row);
      _tile_stored(2, out + 128, row);
      _tile_stored(3, out + 192, row);
      fence();
    }
    const Finish how(reach, channels, panels.block(), to.dtype);
    finish_rows<kPanel>(how, tokens, 0, rows, channels, p, 0, dots.get(), to);
  }
}

template <class Operand>
void multiply_panels(const Panels& panels, const AmxShape<Operand>& shape, const uint8_t* x, const Tokens& tokens,
                     const float* scale, const float* zero_point, int64_t weight_groups, int64_t first, int64_t last,
                     const Output& to) {
  const TileRegisters registers(static_cast<int>(std::min<int64_t>(shape.tokens, kRows)));
  auto multiply = shape.tokens <= kRows ? multiply_narrow<Operand> : multiply_wide<Operand>;
  multiply(panels, shape, x, tokens, scale, zero_point, weight_groups, first, last, to);
}

}  // namespace
#endif
