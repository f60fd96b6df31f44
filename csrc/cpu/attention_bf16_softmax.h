// The softmax between the two products of attention in bfloat16, in fp32, over blocks of keys: a row's
// weights are taken relative to its largest score so far.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>

#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

// Keys whose scores are held at once. Their scores and weights, 36 KB for 12 rows, stay near.
constexpr int64_t kPairKeyBlock = 512;

// 2^x for x <= 0, to a relative error of 1.1e-4, which is a quarter of what rounding to bfloat16 takes.
inline __m512 rough_power_of_two(__m512 x) {
  // Not a number stays so, because it is the second operand.
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const __m512 whole = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(bounded, whole);
  __m512 sum = _mm512_set1_ps(5.5171773e-02f);
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.4261120e-01f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.9326098e-01f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.9992807e-01f));
  return _mm512_scalef_ps(sum, whole);
}

// The rows of one task. Some of them at a time have scores, and from these weights, for one block of keys;
// all have a context, (kQueryBlock, head_dim), and the largest score and the sum of weights that it was made
// with.
class PairSoftmax {
 public:
  PairSoftmax(int64_t head_dim, float* scores, uint16_t* weights, float* context, float* maxima, float* sums)
      : head_dim_(head_dim),
        scale_(static_cast<float>(std::numbers::log2e / std::sqrt(static_cast<double>(head_dim)))),
        scores_(scores),
        weights_(weights),
        context_(context),
        maxima_(maxima),
        sums_(sums) {}

  float* scores() { return scores_; }                                 // rows of kPairKeyBlock
  const uint16_t* weights() const { return weights_; }                // rows of kPairKeyBlock
  float* context(int64_t row) { return context_ + row * head_dim_; }  // without the division by the sum

  // Makes weights 2^(scale * (score - maximum)) of the scores of `rows` rows from `row` on, with each row's
  // maximum so far; sums and contexts under an earlier maximum are scaled down. Weights of the padding are 0.
  // All maxima come first: a row alone would wait for each step of its own.
  void exponentiate(int64_t row, int64_t rows, int64_t keys, int64_t padded, bool first) {
    float maxima[kQueryBlock];
    for (int64_t i = 0; i < rows; ++i) {
      const float largest = largest_score(scores_ + i * kPairKeyBlock, keys, padded);
      maxima[i] = first ? largest : std::max(largest, maxima_[row + i]);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float total =
          powers(scores_ + i * kPairKeyBlock, weights_ + i * kPairKeyBlock, padded, maxima[i]);
      sums_[row + i] = first ? total : total + sums_[row + i] * rescale(row + i, maxima[i]);
      maxima_[row + i] = maxima[i];
    }
  }

  // Writes the head_dim numbers of a row's result.
  void store(int64_t row, float* out) {
    const __m512 inverse = _mm512_set1_ps(1.0f / sums_[row]);
    for (int64_t channel = 0; channel < head_dim_; channel += kLanes) {
      _mm512_storeu_ps(out + channel, _mm512_mul_ps(_mm512_loadu_ps(context(row) + channel), inverse));
    }
  }

 private:
  // The largest of a row's scores, and no less than the least float: a difference from -infinity is no
  // number. The row's padding becomes -infinity.
  static float largest_score(float* scores, int64_t keys, int64_t padded) {
    for (int64_t key = keys; key < padded; ++key) scores[key] = -std::numeric_limits<float>::infinity();
    __m512 even = _mm512_set1_ps(std::numeric_limits<float>::lowest());
    __m512 odd = even;
    int64_t key = 0;
    for (; key + kPanel <= padded; key += kPanel) {
      even = _mm512_max_ps(even, _mm512_loadu_ps(scores + key));
      odd = _mm512_max_ps(odd, _mm512_loadu_ps(scores + key + kLanes));
    }
    if (key < padded) even = _mm512_max_ps(even, _mm512_loadu_ps(scores + key));
    return _mm512_reduce_max_ps(_mm512_max_ps(even, odd));
  }

  // Returns the sum of the weights, before they are rounded. A score that is no number gives such a sum.
  float powers(const float* scores, uint16_t* weights, int64_t padded, float maximum) const {
    const __m512 scale = _mm512_set1_ps(scale_);
    // Rounding this product changes all weights of the row by one factor, which the sum takes out again.
    const __m512 shift = _mm512_set1_ps(maximum * scale_);
    const auto power = [&](int64_t key) {
      return rough_power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(scores + key), scale, shift));
    };
    __m512 even = _mm512_setzero_ps();
    __m512 odd = _mm512_setzero_ps();
    int64_t key = 0;
    for (; key + kPanel <= padded; key += kPanel) {
      const __m512 first = power(key);
      const __m512 second = power(key + kLanes);
      even = _mm512_add_ps(even, first);
      odd = _mm512_add_ps(odd, second);
      _mm512_storeu_si512(weights + key, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
    }
    if (key < padded) {
      const __m512 last = power(key);
      even = _mm512_add_ps(even, last);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + key),
                          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(last)));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
  }

  // Brings a row's context under its new maximum; returns the factor.
  float rescale(int64_t row, float maximum) {
    if (maximum == maxima_[row]) return 1.0f;
    const float factor = std::exp2((maxima_[row] - maximum) * scale_);
    for (int64_t channel = 0; channel < head_dim_; channel += kLanes) {
      float* const at = context(row) + channel;
      _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(factor)));
    }
    return factor;
  }

  const int64_t head_dim_;
  const float scale_;  // log2(e) / sqrt(head_dim): exponents are of 2
  float* const scores_;
  uint16_t* const weights_;
  float *const context_, *const maxima_, *const sums_;
};

}  // namespace pruned_ops::CPU_CAPABILITY
