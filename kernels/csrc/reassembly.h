// Channel reassembly (reassembly.py), after an RMS norm or without, token by token.

#pragma once

#include "tokens.h"

namespace {

struct Plan {
  std::vector<int32_t> from, to;  // of the entries; the first `width` go to channels 0, 1, 2, ...
  const float* coefficient;
  int64_t width;

  Plan(const int64_t* from, const int64_t* to, const float* coefficient, int64_t entries, int64_t width)
      : from(from, from + entries), to(to, to + entries), coefficient(coefficient), width(width) {}

  bool fits(int64_t inputs) const {
    auto within = [](const std::vector<int32_t>& indices, int64_t count) {
      return std::all_of(indices.begin(), indices.end(), [&](int32_t index) { return 0 <= index && index < count; });
    };
    return within(from, inputs) && within(to, width);
  }

  void apply(const float* x, float* y) const {
    int64_t c = 0;
#ifdef LOWBIT_AVX512
    for (; c + kLanes <= width; c += kLanes) {
      const __m512 values = _mm512_i32gather_ps(_mm512_loadu_si512(from.data() + c), x, sizeof(float));
      _mm512_storeu_ps(y + c, _mm512_mul_ps(values, _mm512_loadu_ps(coefficient + c)));
    }
#endif
    for (; c < width; ++c) y[c] = x[from[c]] * coefficient[c];
    for (size_t e = width; e < from.size(); ++e) y[to[e]] += x[from[e]] * coefficient[e];
  }
};

// x / sqrt(mean of x^2 + eps): the mean in float64, the factor rounded to float32.
inline void normalize(float* x, int64_t count, double eps) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int lane = 0; lane < 8; ++lane) sums[lane] += static_cast<double>(x[i + lane]) * x[i + lane];
  for (int lane = 0; i < count; ++i, ++lane) sums[lane] += static_cast<double>(x[i]) * x[i];
  double sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  const float factor = static_cast<float>(1 / std::sqrt(sum / static_cast<double>(count) + eps));
  for (i = 0; i + kLanes <= count; i += kLanes) store(x + i, load<Floats>(x + i) * factor);
  for (; i < count; ++i) x[i] *= factor;
}

}  // namespace
