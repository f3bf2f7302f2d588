// The ops of hybrid.py and exact.py for CPUs, bit for bit; these define the formats and the arithmetic. cpu.py builds
// this file and calls the functions at its end on plain pointers.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "decode.h"
#include "encode.h"
#include "exact.h"
#include "plans.h"

namespace {

constexpr int64_t kMinParallel = 1 << 16;  // values; below this, starting threads costs more than they save

constexpr int kNotValid = 1;
enum DType { kFloat32, kBfloat16, kFloat16, kFloat64 };  // as in cpu.py

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

// Memory of a large new tensor has no pages yet; mapping them 4 KiB at a time takes longer than the kernels do.
void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  uintptr_t from = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  uintptr_t to = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
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
         int64_t* tally, int threads) {
  using Word = typename Type::Word;
  constexpr bool kConvert = sizeof(Value) != sizeof(Word);  // to a row of float32
  const auto kept = plan_of<Encoder<Type>>(format, 1);
  if (!kept) return kNotValid;
  const Encoder<Type>& encoder = kept->plan;
  const Layout& layout = encoder.layout;
  prefer_huge_pages(out, tokens * layout.row_bytes);
  Tally total{tokens * layout.features};
  in_parallel(tokens, threads_for(tokens, layout.features, threads), [&](int64_t first, int64_t last) {
    typename Encoder<Type>::Scratch scratch(layout);
    Buffer<float> converted(kConvert ? kTokens * layout.features : 0);
    Tally here;
    by_tokens(first, last, [&](int64_t token, auto count) {
      const Word* rows[count.value];
      uint8_t* messages[count.value];
      for (int t = 0; t < count.value; ++t) {
        const Value* row = x + (token + t) * row_stride;
        rows[t] = reinterpret_cast<const Word*>(row);
        if constexpr (kConvert) {
          float* to = converted.get() + t * layout.features;
          convert(row, to, layout.features);
          rows[t] = reinterpret_cast<const Word*>(to);
        }
        messages[t] = out + (token + t) * layout.row_bytes;
      }
      encoder.template encode<count.value>(rows, kConvert ? 0 : count.value * row_stride, messages, scratch, here);
    });
    total.add(here);
  });
  total.store(tally);
  return 0;
}

template <class Type, class Value>
int unpack_reduce(const LowbitFormat& format, const uint8_t* messages, int64_t ranks, int64_t tokens,
                  int64_t rank_stride, int64_t row_stride, Value* out, int threads) {
  using Word = typename Type::Word;
  constexpr bool kConvert = sizeof(Value) != sizeof(Word);  // from a row of float32
  const auto kept = plan_of<Decoder<Type>>(format, ranks);
  if (!kept) return kNotValid;
  const Decoder<Type>& decoder = kept->plan;
  const int64_t features = decoder.layout.features;
  prefer_huge_pages(out, tokens * features * sizeof(Value));
  in_parallel(tokens, threads_for(tokens, features * ranks, threads), [&](int64_t first, int64_t last) {
    typename Decoder<Type>::Scratch scratch(decoder);
    Buffer<float> rows(kConvert ? kTokens * features : 0);
    by_tokens(first, last, [&](int64_t token, auto count) {
      Word* to[count.value];
      for (int t = 0; t < count.value; ++t)
        to[t] = kConvert ? reinterpret_cast<Word*>(rows.get() + t * features)
                         : reinterpret_cast<Word*>(out + (token + t) * features);
      decoder.template decode<count.value>(messages + token * row_stride, rank_stride, row_stride, to, scratch);
      if constexpr (kConvert) convert(rows.get(), out + token * features, count.value * features);
    });
  });
  return 0;
}

// Codes of one byte lie in `out` as they are, those of two are joined.
template <class Type>
int exact_encode(const typename Type::Word* x, int64_t tokens, int64_t row_stride, int64_t features,
                 const float* center, const float* step, float largest, int bits, void* out, int64_t* tally,
                 int threads) {
  prefer_huge_pages(out, tokens * (bits == 8 ? features + 1 : 4 * (features / 2 + 1)));
  const ExactPlan plan(center, step, features, largest);
  Tally total{tokens * features};
  in_parallel(tokens, threads_for(tokens, features, threads), [&](int64_t first, int64_t last) {
    Buffer<int16_t> codes(features + 2);
    int64_t words = features / 2 + 1;
    Tally here;
    for (int64_t t = first; t < last; ++t) {
      const auto* row = x + t * row_stride;
      if (bits == 8) {
        exact_encode_row<Type>(row, plan, static_cast<int8_t*>(out) + t * (features + 1), here);
      } else {
        exact_encode_row<Type>(row, plan, codes.get(), here);
        join_codes(codes.get(), words, static_cast<int32_t*>(out) + t * words);
      }
    }
    total.add(here);
  });
  total.store(tally);
  return 0;
}

template <class Type>
int exact_decode(const void* total, int64_t tokens, int64_t features, const float* center, const float* step, int bits,
                 typename Type::Word* out, int threads) {
  prefer_huge_pages(out, tokens * features * sizeof(*out));
  const ExactPlan plan(center, step, features, 0);
  in_parallel(tokens, threads_for(tokens, features, threads), [&](int64_t first, int64_t last) {
    Buffer<int16_t> codes(features + 2);
    int64_t words = features / 2 + 1;
    for (int64_t t = first; t < last; ++t) {
      auto* to = out + t * features;
      if (bits == 8) {
        exact_decode_row<Type>(static_cast<const int8_t*>(total) + t * (features + 1), plan, to);
      } else {
        part_codes(static_cast<const int32_t*>(total) + t * words, words, codes.get());
        exact_decode_row<Type>(codes.get(), plan, to);
      }
    }
  });
  return 0;
}

}  // namespace

extern "C" {

// The three that take a format return 1, and do nothing, where its `order` does not have every feature once.

// x: [tokens, features] of dtype, rows row_stride values apart; out: [tokens, row_bytes], rows without gaps.
int lowbit_pack(const LowbitFormat* format, const void* x, int dtype, int64_t tokens, int64_t row_stride, uint8_t* out,
                int64_t* tally, int threads) {
  auto words = static_cast<const uint16_t*>(x);
  switch (dtype) {
    case kFloat32:
      return pack<Float32>(*format, static_cast<const float*>(x), tokens, row_stride, out, tally, threads);
    case kBfloat16:
      return pack<Bfloat16>(*format, words, tokens, row_stride, out, tally, threads);
    case kFloat16:
      return pack<Float32>(*format, static_cast<const Half*>(x), tokens, row_stride, out, tally, threads);
    case kFloat64:
      return pack<Float32>(*format, static_cast<const double*>(x), tokens, row_stride, out, tally, threads);
  }
  return kNotValid;
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
      return call(Float32(), static_cast<Half*>(out));
    case kFloat64:
      return call(Float32(), static_cast<double*>(out));
  }
  return kNotValid;
}

// The two above in one pass; the sum of a token stays in cache. out: [tokens, row_bytes of `second`].
int lowbit_requantize(const LowbitFormat* format, const uint8_t* messages, int64_t ranks, int64_t tokens,
                      int64_t rank_stride, int64_t row_stride, const LowbitFormat* second, uint8_t* out,
                      int64_t* tally, int threads) {
  const auto first_kept = plan_of<Decoder<Float32>>(*format, ranks);
  const auto second_kept = plan_of<Encoder<Float32>>(*second, 1);
  if (!first_kept || !second_kept) return kNotValid;
  const Decoder<Float32>& decoder = first_kept->plan;
  const Encoder<Float32>& encoder = second_kept->plan;
  const int64_t features = decoder.layout.features;
  prefer_huge_pages(out, tokens * encoder.layout.row_bytes);
  Tally total{tokens * features};
  in_parallel(tokens, threads_for(tokens, features * ranks, threads), [&](int64_t first, int64_t last) {
    Decoder<Float32>::Scratch decoding(decoder);
    Encoder<Float32>::Scratch encoding(encoder.layout);
    Buffer<uint32_t> rows(kTokens * features);
    Tally here;
    by_tokens(first, last, [&](int64_t token, auto count) {
      uint32_t* sums[count.value];
      uint8_t* to[count.value];
      for (int t = 0; t < count.value; ++t) {
        sums[t] = rows.get() + t * features;
        to[t] = out + (token + t) * encoder.layout.row_bytes;
      }
      decoder.decode<count.value>(messages + token * row_stride, rank_stride, row_stride, sums, decoding);
      encoder.encode<count.value>(sums, 0, to, encoding, here);
    });
    total.add(here);
  });
  total.store(tally);
  return 0;
}

// x: [tokens, features] of float32, bfloat16 or float16; out: int8 [tokens, features + 1], or int32 of two codes.
int lowbit_exact_encode(const void* x, int dtype, int64_t tokens, int64_t row_stride, int64_t features,
                        const float* center, const float* step, float largest, int bits, void* out, int64_t* tally,
                        int threads) {
  auto call = [&](auto type) {
    auto words = static_cast<const typename decltype(type)::Word*>(x);
    return exact_encode<decltype(type)>(words, tokens, row_stride, features, center, step, largest, bits, out, tally,
                                        threads);
  };
  return dtype == kFloat32 ? call(Float32()) : dtype == kBfloat16 ? call(Bfloat16()) : call(Float16());
}

// The inverse; center: the sum of the ranks'.
int lowbit_exact_decode(const void* total, int64_t tokens, int64_t features, const float* center, const float* step,
                        int bits, void* out, int dtype, int threads) {
  auto call = [&](auto type) {
    auto words = static_cast<typename decltype(type)::Word*>(out);
    return exact_decode<decltype(type)>(total, tokens, features, center, step, bits, words, threads);
  };
  return dtype == kFloat32 ? call(Float32()) : dtype == kBfloat16 ? call(Bfloat16()) : call(Float16());
}
}
