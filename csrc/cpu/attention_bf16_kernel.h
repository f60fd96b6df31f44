// softmax(q k^T / sqrt(head_dim)) v on q, k and v in bfloat16, by instructions that multiply two numbers a
// lane and add them in fp32: twice the products of fp32 in the same time. The softmax is in fp32; its weights
// are rounded to bfloat16 for the product with v. Tasks, layout and order are those of attention_kernel.h.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numbers>

#include "cpu/attention_tasks.h"
#include "cpu/kernels.h"
#include "cpu/multiply_bf16_kernel.h"
#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

// Keys whose scores are held at once. Their scores and weights, 36 KB for kRegisterRows rows, stay near.
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

// Where a thread's scratch is cut, in units of 4 bytes: a pair of bfloat16, or a float.
struct PairLayout {
  explicit PairLayout(const AttentionArgs& args)
      : values(round_up(args.longest, kLanes) * args.head_dim / kPair),
        scores(values + round_up(args.longest, kPair) * args.head_dim / kPair),
        weights(scores + kRegisterRows * kPairKeyBlock),
        context(weights + kRegisterRows * kPairKeyBlock / kPair),
        maxima(context + kQueryBlock * args.head_dim),
        sums(maxima + kQueryBlock),
        total(sums + kQueryBlock) {}

  int64_t values, scores, weights, context, maxima, sums, total;
};

// One thread's state while it runs its share of the tasks. head_dim is a multiple of 16.
class PairWorker {
 public:
  PairWorker(const AttentionArgs& args, float* scratch)
      : args_(args),
        qkv_(static_cast<const uint16_t*>(args.qkv)),
        pairs_(args.head_dim / kPair),
        scale_(static_cast<float>(std::numbers::log2e / std::sqrt(static_cast<double>(args.head_dim)))) {
    const PairLayout layout(args);
    keys_ = reinterpret_cast<uint16_t*>(scratch);
    values_ = reinterpret_cast<uint16_t*>(scratch + layout.values);
    scores_ = scratch + layout.scores;
    weights_ = reinterpret_cast<uint16_t*>(scratch + layout.weights);
    context_ = scratch + layout.context;
    maxima_ = scratch + layout.maxima;
    sums_ = scratch + layout.sums;
  }

  void lay_out(const Sequence& sequence, int64_t head) {
    lay_out_keys(rows_of(sequence, 1, head), sequence.length);
    lay_out_values(rows_of(sequence, 2, head), sequence.length);
  }

  void attend(const Sequence& sequence, int64_t head, int64_t query, int64_t rows) {
    const uint16_t* queries = rows_of(sequence, 0, head) + query * args_.row_stride;
    for (int64_t key = 0; key < sequence.length; key += kPairKeyBlock) {
      const int64_t keys = std::min(kPairKeyBlock, sequence.length - key);
      for (int64_t row = 0; row < rows; row += kRegisterRows) {
        const int64_t count = std::min<int64_t>(kRegisterRows, rows - row);
        add_block(sequence, queries + row * args_.row_stride, row, count, key, keys);
      }
    }
    for (int64_t row = 0; row < rows; ++row) store(sequence.first + query + row, head, row);
  }

 private:
  // part: 0 for the query, 1 for the key, 2 for the value.
  const uint16_t* rows_of(const Sequence& sequence, int64_t part, int64_t head) const {
    return qkv_ + sequence.first * args_.row_stride + (part * args_.num_heads + head) * args_.head_dim;
  }

  // (keys, head_dim) rows -> panels [head_dim / 2][32 keys] of pairs; the last may have 16 keys. The padding
  // keys are zero.
  void lay_out_keys(const uint16_t* source, int64_t keys) {
    uint16_t* panel = keys_;
    for (int64_t first = 0; first < keys; first += kPanel) {
      const int64_t width = keys - first > kLanes ? kPanel : kLanes;
      for (int64_t key = 0; key < width; key += kLanes) {
        for (int64_t pair = 0; pair < pairs_; pair += kLanes) {
          transpose_pairs(source + (first + key) * args_.row_stride + pair * kPair, keys - first - key,
                          std::min(pairs_ - pair, kLanes), panel + (pair * width + key) * kPair, width);
        }
      }
      panel += pairs_ * width * kPair;
    }
  }

  // 16 rows (those from `count` on are zero) of `pairs` pairs, 8 or 16 -> as many rows of 16 pairs.
  void transpose_pairs(const uint16_t* source, int64_t count, int64_t pairs, uint16_t* to, int64_t width) {
    __m512i rows[16];
    const auto mask = static_cast<__mmask16>((1u << pairs) - 1u);
#pragma GCC unroll 16
    for (int64_t row = 0; row < 16; ++row) {
      rows[row] = row < count ? _mm512_maskz_loadu_epi32(mask, source + row * args_.row_stride)
                              : _mm512_setzero_si512();
    }
    __m512i fours[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
      const __m512i low01 = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
      const __m512i high01 = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
      const __m512i low23 = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
      const __m512i high23 = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
      fours[i] = _mm512_unpacklo_epi64(low01, low23);
      fours[i + 1] = _mm512_unpackhi_epi64(low01, low23);
      fours[i + 2] = _mm512_unpacklo_epi64(high01, high23);
      fours[i + 3] = _mm512_unpackhi_epi64(high01, high23);
    }
    // fours[4 i + j] holds pairs j, j + 4, j + 8, j + 12 of rows 4 i to 4 i + 3, a quarter each.
#pragma GCC unroll 16
    for (int j = 0; j < 4; ++j) {
      const __m512i even01 = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
      const __m512i odd01 = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd);
      const __m512i even23 = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
      const __m512i odd23 = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
      const __m512i made[4] = {
          _mm512_shuffle_i32x4(even01, even23, 0x88), _mm512_shuffle_i32x4(odd01, odd23, 0x88),
          _mm512_shuffle_i32x4(even01, even23, 0xdd), _mm512_shuffle_i32x4(odd01, odd23, 0xdd)};
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        if (4 * k + j < pairs) _mm512_storeu_si512(to + (4 * k + j) * width * kPair, made[k]);
      }
    }
  }

  // (keys, head_dim) rows -> panels [keys / 2][32 channels] of pairs of keys; the last may have 16 channels.
  // The key that fills the last pair up is zero.
  void lay_out_values(const uint16_t* source, int64_t keys) {
    uint16_t* panel = values_;
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23,
                                           7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t first = 0; first < args_.head_dim; first += kPanel) {
      const int64_t width = std::min(args_.head_dim - first, kPanel);
      for (int64_t key = 0; key < keys; key += kPair) {
        const uint16_t* row = source + key * args_.row_stride + first;
        for (int64_t channel = 0; channel < width; channel += kLanes, panel += kLanes * kPair) {
          const __m256i even = load_channels(row + channel);
          const __m256i odd =
              key + 1 < keys ? load_channels(row + args_.row_stride + channel) : _mm256_setzero_si256();
          const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
          _mm512_storeu_si512(panel, _mm512_permutexvar_epi16(order, both));
        }
      }
    }
  }

  static __m256i load_channels(const uint16_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }

  // Adds one block of keys to the sums and contexts of up to kRegisterRows rows.
  void add_block(const Sequence& sequence, const uint16_t* queries, int64_t row, int64_t rows, int64_t key,
                 int64_t keys) {
    const int64_t padded = round_up(keys, kLanes);
    score(queries, rows, keys_ + key * args_.head_dim, padded);
    exponentiate(row, rows, keys, padded, key == 0);
    float* context = context_ + row * args_.head_dim;
    const int64_t steps = (keys + 1) / kPair;
    const int64_t panel_pairs = (sequence.length + 1) / kPair;  // steps of a whole panel
    const uint16_t* panel = values_;
    for (int64_t channel = 0; channel < args_.head_dim; channel += kPanel) {
      const int64_t width = std::min(args_.head_dim - channel, kPanel);
      const uint16_t* from = panel + key * width;
      if (width == kPanel) {
        multiply_pair_rows<2>(rows, weights_, kPairKeyBlock, from, steps, context + channel, args_.head_dim,
                              key != 0);
      } else {
        multiply_pair_rows<1>(rows, weights_, kPairKeyBlock, from, steps, context + channel, args_.head_dim,
                              key != 0);
      }
      panel += panel_pairs * width * kPair;
    }
  }

  // q k^T for a block of keys.
  void score(const uint16_t* queries, int64_t rows, const uint16_t* keys, int64_t padded) {
    int64_t key = 0;
    for (; key + kPanel <= padded; key += kPanel) {
      multiply_pair_rows<2>(rows, queries, args_.row_stride, keys + key * args_.head_dim, pairs_,
                            scores_ + key, kPairKeyBlock, false);
    }
    if (key < padded) {
      multiply_pair_rows<1>(rows, queries, args_.row_stride, keys + key * args_.head_dim, pairs_,
                            scores_ + key, kPairKeyBlock, false);
    }
  }

  // scores -> weights 2^(scale * (score - maximum)), with each row's maximum so far; sums and contexts under
  // an earlier maximum are scaled down. All maxima come first: a row alone would wait for each step of its
  // own.
  void exponentiate(int64_t row, int64_t rows, int64_t keys, int64_t padded, bool first) {
    float maxima[kRegisterRows];
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
    float* context = context_ + row * args_.head_dim;
    for (int64_t channel = 0; channel < args_.head_dim; channel += kLanes) {
      const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(context + channel), _mm512_set1_ps(factor));
      _mm512_storeu_ps(context + channel, scaled);
    }
    return factor;
  }

  void store(int64_t token, int64_t head, int64_t row) const {
    const float* context = context_ + row * args_.head_dim;
    float* out = args_.context + (token * args_.num_heads + head) * args_.head_dim;
    const __m512 inverse = _mm512_set1_ps(1.0f / sums_[row]);
    for (int64_t channel = 0; channel < args_.head_dim; channel += kLanes) {
      _mm512_storeu_ps(out + channel, _mm512_mul_ps(_mm512_loadu_ps(context + channel), inverse));
    }
  }

  const AttentionArgs& args_;
  const uint16_t* const qkv_;
  const int64_t pairs_;  // of a head's row
  const float scale_;    // log2(e) / sqrt(head_dim): exponents are of 2
  uint16_t *keys_, *values_, *weights_;
  float *scores_, *context_, *maxima_, *sums_;
};

inline int64_t attention_bf16_scratch(const AttentionArgs& args) {
  return PairLayout(args).total;
}

inline void attention_bf16(const AttentionArgs& args, int64_t begin, int64_t end, float* scratch) {
  PairWorker worker(args, scratch);
  for_each_task(args, begin, end, worker);
}

}  // namespace pruned_ops::CPU_CAPABILITY
