// The ops of quantizer.py, reassembly.py, hadamard.py and linear.py for CPUs. cpu_linear.py builds this file and calls
// the functions at its end on plain pointers. Every path makes the same bits: codes are multiplied exactly, and the
// float64 part is brackets.h.

#include "amx.h"
#include "hadamard.h"
#include "reassembly.h"
#include "tiles.h"
#include "token_rows.h"
#include "weight_only.h"

#include <optional>

namespace {

constexpr int kFloatBits = 16;  // of activations that are not quantized
constexpr int64_t kMinParallel = 1 << 18;  // multiplications; below this, starting threads costs more than they save

// As in cpu_linear.py.
struct Linear {
  const void* x;  // [tokens, inputs]
  int64_t tokens, row_stride;
  int32_t x_dtype, y_dtype;
  const uint8_t* panels;
  int64_t outputs, inputs;
  const float *scale, *zero_point;  // [outputs, weight_groups]
  int64_t weight_groups;
  int32_t weight_bits, act_bits;
  int64_t act_groups;
  void* y;  // [tokens, outputs]
  int32_t threads;
  float low_ratio, high_ratio;  // what is left of the ends of a token's range
  const float* matrix;  // none, or C_m of hadamard.h: each of the act_groups slices of a token is rotated first
  double rotation_factor;
};

// A linear, with the rotation of its slices, if there is one.
struct Job : Linear {
  const Rotation<float>* rotation;
};

// Of a group of a token's activations.
struct Range {
  float low, high;
  QParams q;
};

// A token in float32, as it is or rotated; of those in 16 bits the rotated values are rounded to 16 bits, as the op
// hadamard would store them.
class Row {
 public:
  explicit Row(const Job& job)
      : row_(job.inputs), rotated_(job.rotation ? job.inputs + kRegister / 4 : 0), ranges_(job.act_groups) {}

  const float* read(const Job& job, const void* x) {
    const DType dtype = static_cast<DType>(job.x_dtype);
    widen(x, dtype, row_.get(), job.inputs);
    if (!job.rotation) return row_.get();
    const int64_t group = job.inputs / job.act_groups;
    for (int64_t g = 0; g < job.act_groups; ++g) job.rotation->apply(row_.get() + g * group, rotated_.get() + g * group);
    if (dtype == kFloat32) return rotated_.get();
    narrow(rotated_.get(), dtype, row_.get(), job.inputs);
    widen(row_.get(), dtype, rotated_.get(), job.inputs);
    return rotated_.get();
  }

  Range* ranges() { return ranges_.get(); }

 private:
  Buffer<float> row_, rotated_;
  Buffer<Range> ranges_;
};

int64_t common_multiple(int64_t a, int64_t b) {
  int64_t multiple = a;
  while (multiple % b) multiple += a;
  return multiple;
}

const void* row_of(const Job& job, int64_t token) {
  return static_cast<const char*>(job.x) + token * job.row_stride * bytes_of(static_cast<DType>(job.x_dtype));
}

// Codes of a token, each block padded to whole units of inputs; fills in what the brackets need. First the ranges of all
// groups, then their scales, then the codes: a group would wait for its own.
void quantize_token(const Job& job, const Panels& panels, int64_t token, int64_t unit, Tokens& tokens, Row& room,
                    uint8_t* codes) {
  const float* row = room.read(job, row_of(job, token));
  const int64_t blocks_per_group = panels.blocks / job.act_groups, group = job.inputs / job.act_groups;
  const int64_t block = panels.block(), stride = up(block, unit);
  Range* ranges = room.ranges();
  for (int64_t g = 0; g < job.act_groups; ++g) range_of(row + g * group, group, &ranges[g].low, &ranges[g].high);
  for (int64_t g = 0; g < job.act_groups; ++g)
    ranges[g].q = qparams_of(ranges[g].low * job.low_ratio, ranges[g].high * job.high_ratio, job.act_bits);
  for (int64_t b = 0; b < panels.blocks; ++b) {
    const QParams q = ranges[b / blocks_per_group].q;
    const int64_t sum = codes_of(row + b * block, block, q, job.act_bits, codes + b * stride);
    tokens.set(token, b, q.scale, q.zero_point, static_cast<double>(sum), block, reach_of(q.zero_point, job.act_bits));
  }
}

// The range [first, last) of a thread among `count` things.
struct Share {
  int64_t first, last;
  Share(int64_t count, int thread, int threads) : first(count * thread / threads), last(count * (thread + 1) / threads) {}
};

int threads_of(const Job& job, const Panels& panels) {
  if (job.tokens * job.inputs * job.outputs < kMinParallel) return 1;
  return static_cast<int>(std::min<int64_t>(job.threads, std::max<int64_t>(panels.count(), 1)));
}

// work(thread) on every thread, then the next.
template <class First, class Then>
void in_two_phases(int threads, First first, Then then) {
  if (threads == 1) return first(0), then(0);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; ++part) first(part);  // waits for the others
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; ++part) then(part);
  }
}

// A token that is not quantized: s = 1, z = 0, and the sum of every block.
template <class Value>
void set_floats(const Panels& panels, int64_t token, const Value* row, Tokens& tokens) {
  for (int64_t b = 0; b < panels.blocks; ++b)
    tokens.set(token, b, 1.0, 0.0, sum_of(row + b * panels.block(), panels.block()), panels.block(),
               std::numeric_limits<double>::infinity());
}

// A row of bf16 values, each block padded to `stride` values.
void pad_floats(const Job& job, const Panels& panels, int64_t token, int64_t stride, Tokens& tokens, uint16_t* to) {
  const uint16_t* row = static_cast<const uint16_t*>(row_of(job, token));
  for (int64_t b = 0; b < panels.blocks; ++b)
    std::memcpy(to + b * stride, row + b * panels.block(), panels.block() * sizeof *to);
  set_floats(panels, token, row, tokens);
}

// prepare(first token, last token), then multiply(what a tile needs, panel) for every panel. tile_bytes: of the dot
// products of a tile with a block.
template <class Prepare, class Multiply>
void by_panels(const Job& job, const Panels& panels, const Tokens& tokens, const Output& to, int64_t parts, int64_t tile_bytes,
               Prepare prepare, Multiply multiply) {
  const int threads = threads_of(job, panels);
  in_two_phases(
      threads,
      [&](int thread) {
        const Share share(parts, thread, threads);
        prepare(share.first, share.last);
      },
      [&](int thread) {
        Channels channels(panels.blocks, job.weight_groups, job.tokens);
        Buffer<char> dots(panels.blocks * tile_bytes, kAnything);
        const Share share(panels.count(), thread, threads);
        for (int64_t panel = share.first; panel < share.last; ++panel) {
          channels.read(panels, panel, job.scale, job.zero_point);
          multiply(TileJob{panels, tokens, channels, to, dots.get()}, panel);
        }
      });
}

template <int Bits>
void by_tiles(const Job& job, const Panels& panels, const Output& to) {
  constexpr int64_t kMost = most_rows(Bits);
  const int64_t count = (job.tokens + kMost - 1) / kMost, width = panels.blocks * panels.steps() * kStep;
  auto first_of = [&](int64_t part) { return job.tokens * part / count; };  // tiles of nearly the same height
  auto rows_of = [&](int64_t part) { return static_cast<int>(first_of(part + 1) - first_of(part)); };
  Tokens tokens(job.tokens, panels.blocks);
  Buffer<int8_t> x(job.tokens * width);
  by_panels(
      job, panels, tokens, to, count, kTileBytes,
      [&](int64_t begin, int64_t end) {
        Row row(job);
        Buffer<uint8_t> codes(width);
        for (int64_t part = begin; part < end; ++part)
          for (int r = 0; r < rows_of(part); ++r) {
            const int64_t first = first_of(part);
            quantize_token(job, panels, first + r, kStep, tokens, row, codes.get());
            interleave(codes.get(), width / kStep, r, rows_of(part), x.get() + first * width);
          }
      },
      [&](const TileJob& tile_job, int64_t panel) {
        for (int64_t part = 0; part < count; ++part)
          tiles<Bits>(tile_job, rows_of(part), x.get() + first_of(part) * width, first_of(part), panel);
      });
}

#ifdef LOWBIT_AMX
// put(token, what the brackets need, room for a token in float32, the token's padded row)
template <class Operand, class Put>
void by_amx(const Job& job, const Panels& panels, const Output& to, Put put) {
  const AmxShape<Operand> shape(panels, job.tokens);
  Tokens tokens(job.tokens, panels.blocks);
  Buffer<uint8_t> x(shape.x_bytes(), kAnything);  // what lies behind the last token becomes sums that nobody reads
  const int threads = threads_of(job, panels);
  in_two_phases(
      threads,
      [&](int thread) {
        Row room(job);
        Buffer<uint8_t> row(shape.row_bytes());
        const Share share(job.tokens, thread, threads);
        for (int64_t token = share.first; token < share.last; ++token) {
          put(token, tokens, room, row.get());
          shape.put_row(row.get(), token, x.get());
        }
      },
      [&](int thread) {
        const Share share(panels.count(), thread, threads);
        multiply_panels<Operand>(panels, shape, x.get(), tokens, job.scale, job.zero_point, job.weight_groups,
                                 share.first, share.last, to);
      });
}

template <int Bits>
void codes_by_amx(const Job& job, const Panels& panels, const Output& to) {
  using Operand = CodeOperand<Bits>;
  by_amx<Operand>(job, panels, to, [&](int64_t token, Tokens& tokens, Row& room, uint8_t* codes) {
    quantize_token(job, panels, token, Operand::kInputs, tokens, room, codes);
  });
}

template <int Bits>
void floats_by_amx(const Job& job, const Panels& panels, const Output& to) {
  using Operand = Bfloat16Operand<Bits>;
  const int64_t stride = up(panels.block(), Operand::kInputs);
  by_amx<Operand>(job, panels, to, [&](int64_t token, Tokens& tokens, Row&, uint8_t* row) {
    pad_floats(job, panels, token, stride, tokens, reinterpret_cast<uint16_t*>(row));
  });
}
#endif

// Weight-only, in float64: any dtype, any processor.
template <int Bits>
void floats_by_doubles(const Job& job, const Panels& panels, const Output& to) {
  Tokens tokens(job.tokens, panels.blocks);
  Buffer<double> x(job.tokens * job.inputs);
  by_panels(
      job, panels, tokens, to, job.tokens, kDoubleBytes,
      [&](int64_t first, int64_t last) {
        Buffer<float> row(job.inputs);
        for (int64_t token = first; token < last; ++token) {
          double* values = x.get() + token * job.inputs;
          if (job.x_dtype == kFloat64) {
            std::memcpy(values, row_of(job, token), job.inputs * sizeof(double));
          } else {
            widen(row_of(job, token), static_cast<DType>(job.x_dtype), row.get(), job.inputs);
            convert(row.get(), values, job.inputs);
          }
          set_floats(panels, token, values, tokens);
        }
      },
      [&](const TileJob& tile_job, int64_t panel) {
        multiply_doubles<Bits>(tile_job, x.get(), job.tokens, panel);
      });
}

#ifdef LOWBIT_BF16
template <int Bits>
void floats_by_pairs(const Job& job, const Panels& panels, const Output& to) {
  const int64_t stride = panels.steps() * kStep, width = panels.blocks * stride;
  Tokens tokens(job.tokens, panels.blocks);
  Buffer<uint16_t> x(job.tokens * width);
  by_panels(
      job, panels, tokens, to, job.tokens, kTileBytes,
      [&](int64_t first, int64_t last) {
        for (int64_t token = first; token < last; ++token)
          pad_floats(job, panels, token, stride, tokens, x.get() + token * width);
      },
      [&](const TileJob& tile_job, int64_t panel) {
        multiply_pairs<Bits>(tile_job, x.get(), width, job.tokens, panel);
      });
}
#endif

// Rotates the slices [first, last) of all tokens. T: float64 for a float64 x, else float32.
template <class T>
void rotate(const char* x, DType dtype, int64_t row_stride, int64_t groups, const Rotation<T>& rotation, int64_t n,
            char* y, Share slices) {
  Buffer<T> row(n), z(n);
  const int64_t bytes = bytes_of(dtype);
  for (int64_t slice = slices.first; slice < slices.last; ++slice) {
    const char* from = x + (slice / groups * row_stride + slice % groups * n) * bytes;
    char* to = y + slice * n * bytes;
    if constexpr (sizeof(T) == 8) {
      std::memcpy(row.get(), from, n * bytes);
      rotation.apply(row.get(), z.get());
      std::memcpy(to, z.get(), n * bytes);
    } else {
      widen(from, dtype, row.get(), n);
      rotation.apply(row.get(), z.get());
      narrow(z.get(), dtype, to, n);
    }
  }
}

template <class T>
void rotate_all(const void* x, DType dtype, int64_t tokens, int64_t row_stride, int64_t width, int64_t groups,
                const void* matrix, double factor, void* y, int threads) {
  const int64_t n = width / groups, m = n / (n & -n);
  const Rotation<T> rotation(n, static_cast<const T*>(matrix), factor);
  if (tokens * width * m < kMinParallel) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int part = 0; part < threads; ++part)
    rotate(static_cast<const char*>(x), dtype, row_stride, groups, rotation, n, static_cast<char*>(y),
           Share(tokens * groups, part, threads));
}

// work(token rows of one thread, number of a token) for all tokens.
template <class Work>
void by_tokens(int64_t tokens, int64_t width, DType dtype, TokenBits how, int threads, Work work) {
  if (tokens * width < kMinParallel / 16) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    TokenRows rows(width, dtype, how);
    const Share share(tokens, part, threads);
    for (int64_t token = share.first; token < share.last; ++token) work(rows, token);
  }
}

Panels panels_of(const uint8_t* data, int64_t outputs, int64_t inputs, int64_t blocks, int bits) {
  return {data, outputs, inputs, blocks, stored_bits(bits)};
}

}  // namespace

extern "C" {

// The instructions that multiply: amx, avx512_vnni, avx512, avx_vnni, avx2 or plain.
const char* lowbit_linear_path() {
#ifdef LOWBIT_AMX
  if (amx_allowed()) return "amx";
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return "avx512_vnni";
#elif defined(__AVX512BW__)
  return "avx512";
#elif defined(__AVXVNNI__)
  return "avx_vnni";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "plain";
#endif
}

int64_t lowbit_panel_bytes(int64_t outputs, int64_t inputs, int64_t blocks, int bits) {
  return panels_of(nullptr, outputs, inputs, blocks, bits).bytes();
}

// rows: [outputs, row_bytes] of codes of `bits` bits; pairs: for activations that are not quantized.
void lowbit_pack_panels(const uint8_t* rows, int64_t row_bytes, int64_t outputs, int64_t inputs, int64_t blocks,
                        int bits, int pairs, uint8_t* to, int threads) {
  const Panels panels = panels_of(to, outputs, inputs, blocks, bits);
  pack_panels(Rows{rows, row_bytes, bits}, panels, pairs ? kPairs : kQuads, to, threads);
}

void lowbit_unpack_panels(const uint8_t* from, int64_t outputs, int64_t inputs, int64_t blocks, int bits, int pairs,
                          uint8_t* codes, int threads) {
  unpack_panels(panels_of(from, outputs, inputs, blocks, bits), pairs ? kPairs : kQuads, codes, threads);
}

// x: [tokens, features] of any dtype; codes: uint8 alike; scale, zero_point: [tokens, groups].
void lowbit_quantize_tokens(const void* x, int dtype, int64_t tokens, int64_t row_stride, int64_t features, int bits,
                            int64_t groups, float low_ratio, float high_ratio, uint8_t* codes, float* scale,
                            float* zero_point, int threads) {
  by_tokens(tokens, features, static_cast<DType>(dtype), {bits, low_ratio, high_ratio}, threads,
            [&](TokenRows& room, int64_t token) {
              const char* from = static_cast<const char*>(x) + token * row_stride * bytes_of(static_cast<DType>(dtype));
              const int64_t at = token * groups;
              room.quantize(from, groups, codes + token * features, scale + at, zero_point + at);
            });
}

// x: [tokens, width], not float64 -> rows: [tokens, row_bytes] (token_rows.h).
void lowbit_encode_tokens(const void* x, int dtype, int64_t tokens, int64_t stride, int64_t width, int bits,
                          float low_ratio, float high_ratio, uint8_t* rows, int64_t row_bytes, int threads) {
  const DType type = static_cast<DType>(dtype);
  by_tokens(tokens, width, type, {bits, low_ratio, high_ratio}, threads, [&](TokenRows& room, int64_t token) {
    room.encode(static_cast<const char*>(x) + token * stride * bytes_of(type), rows + token * row_bytes, row_bytes);
  });
}

// rows: [outer, tokens, row_bytes], the first two with strides -> x: [outer, tokens, width].
void lowbit_decode_tokens(const uint8_t* rows, int64_t outer, int64_t outer_stride, int64_t tokens, int64_t stride,
                          int64_t row_bytes, int bits, int64_t width, int dtype, void* x, int threads) {
  const DType type = static_cast<DType>(dtype);
  by_tokens(outer * tokens, width, type, {bits, 1, 1}, threads, [&](TokenRows& room, int64_t token) {
    room.decode(rows + token / tokens * outer_stride + token % tokens * stride, row_bytes,
                static_cast<char*>(x) + token * width * bytes_of(type));
  });
}

// x: [tokens, width] -> y: [tokens, width], quantized in `groups` and brought back.
void lowbit_round_tokens(const void* x, int dtype, int64_t tokens, int64_t stride, int64_t width, int bits,
                         int64_t groups, float low_ratio, float high_ratio, void* y, int threads) {
  const DType type = static_cast<DType>(dtype);
  by_tokens(tokens, width, type, {bits, low_ratio, high_ratio}, threads, [&](TokenRows& room, int64_t token) {
    room.round(static_cast<const char*>(x) + token * stride * bytes_of(type), groups,
               static_cast<char*>(y) + token * width * bytes_of(type));
  });
}

// x: [tokens, inputs] -> y: [tokens, width] of the same dtype, not float64; eps below 0: no norm before it. 1 for an
// index that is not there.
int lowbit_reassemble(const void* x, int dtype, int64_t tokens, int64_t row_stride, int64_t inputs, const int64_t* from,
                       const int64_t* to, const float* coefficient, int64_t entries, int64_t width, double eps, void* y,
                       int threads) {
  const Plan plan(from, to, coefficient, entries, width);
  if (!plan.fits(inputs)) return 1;
  const DType type = static_cast<DType>(dtype);
  if (tokens * entries < kMinParallel / 16) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    Buffer<float> row(inputs), out(width);
    const Share share(tokens, part, threads);
    for (int64_t token = share.first; token < share.last; ++token) {
      widen(static_cast<const char*>(x) + token * row_stride * bytes_of(type), type, row.get(), inputs);
      if (eps >= 0) normalize(row.get(), inputs, eps);
      plan.apply(row.get(), out.get());
      narrow(out.get(), type, static_cast<char*>(y) + token * width * bytes_of(type), width);
    }
  }
  return 0;
}

// x: [tokens, width] -> y: [tokens, width] of the same dtype. matrix: C_m [m, m], float64 for a float64 x, else float32;
// factor: 2^(-k/2), of slices of 2^k m channels.
void lowbit_hadamard(const void* x, int dtype, int64_t tokens, int64_t row_stride, int64_t width, int64_t groups,
                     const void* matrix, double factor, void* y, int threads) {
  const DType type = static_cast<DType>(dtype);
  if (type == kFloat64)
    rotate_all<double>(x, type, tokens, row_stride, width, groups, matrix, factor, y, threads);
  else
    rotate_all<float>(x, type, tokens, row_stride, width, groups, matrix, factor, y, threads);
}

void lowbit_linear(const Linear* given) {
  if (!given->tokens) return;
  std::optional<Rotation<float>> rotation;
  if (given->matrix) rotation.emplace(given->inputs / given->act_groups, given->matrix, given->rotation_factor);
  const Job job{*given, rotation ? &*rotation : nullptr};
  const int64_t act_groups = job.act_bits == kFloatBits ? 1 : job.act_groups;
  const int64_t blocks = common_multiple(act_groups, job.weight_groups);
  const Panels panels = panels_of(job.panels, job.outputs, job.inputs, blocks, job.weight_bits);
  const Output to{job.y, static_cast<DType>(job.y_dtype), job.outputs};
  with_bits(panels.bits, [&](auto bits) {
    if (job.act_bits == kFloatBits) {
#ifdef LOWBIT_AMX
      if (job.x_dtype == kBfloat16 && amx_allowed()) return floats_by_amx<bits>(job, panels, to);
#endif
#ifdef LOWBIT_BF16
      if (job.x_dtype == kBfloat16) return floats_by_pairs<bits>(job, panels, to);
#endif
      return floats_by_doubles<bits>(job, panels, to);
    }
#ifdef LOWBIT_AMX
    if (job.tokens >= kLeastAmxTokens && amx_allowed()) return codes_by_amx<bits>(job, panels, to);
#endif
    by_tiles<bits>(job, panels, to);
  });
}
}
