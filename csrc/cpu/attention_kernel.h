// softmax(q k^T / sqrt(head_dim)) v, with what positions add to the scores. A task owns kQueryBlock query
// rows of one (sequence, head). A thread keeps that pair's K and V, laid out as panels, while consecutive
// tasks share them; a task keeps the sums, score maxima and context of its rows, and a few rows of scores. It
// writes its rows of the context, once.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>

#include "cpu/attention_positions_kernel.h"
#include "cpu/attention_relative_kernel.h"
#include "cpu/attention_tasks.h"
#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"
#include "cpu/power_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

// Keys whose scores are held at once: kRegisterRows rows of them stay in L1 between the two products,
// and their K and V stay in L2 while the task's rows pass over them.
constexpr int64_t kKeyBlock = 512;
static_assert(kKeyBlock % kPanel == 0 && kQueryBlock % kRegisterRows == 0);

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Where a thread's scratch is cut. Sizes are in floats; every part starts on a 64-byte line.
struct AttentionLayout {
  explicit AttentionLayout(const AttentionArgs& args)
      : context_width(round_up(args.head_dim, kLanes)),
        values(round_up(round_up(args.longest, kLanes) * args.head_dim, kLine)),
        scores(values + round_up(args.longest * context_width, kLine)),
        context(scores + kRegisterRows * kKeyBlock),
        maxima(context + round_up(kQueryBlock * context_width, kLine)),
        sums(maxima + kQueryBlock),
        positions(sums + kQueryBlock),
        relative(positions + AttentionPositions::scratch(args)),
        total(relative + RelativeTerms::scratch(args)) {}

  static constexpr int64_t kLine = 16;
  int64_t context_width;  // head_dim, padded to whole vectors
  int64_t values, scores, context, maxima, sums, positions, relative, total;
};

// (keys, head_dim) rows -> panels [head_dim][kPanel] of transposed keys; the padding keys are zero.
inline void lay_out_keys(const float* source, int64_t stride, int64_t keys, int64_t head_dim, float* panel) {
  constexpr int64_t kBlock = 16;  // the most that transpose_mxn takes
  for (int64_t first = 0; first < keys; first += kPanel, panel += head_dim * kPanel) {
    const int64_t count = std::min(keys - first, kPanel);
    const int64_t width = std::min(round_up(count, kLanes), kPanel);
    if (count < width) std::memset(panel, 0, head_dim * width * sizeof(float));
    for (int64_t key = 0; key < count; key += kBlock) {
      for (int64_t channel = 0; channel < head_dim; channel += kBlock) {
        at::vec::transpose_mxn<float>(source + (first + key) * stride + channel, stride,
                                      panel + channel * width + key, width,
                                      static_cast<int>(std::min(count - key, kBlock)),
                                      static_cast<int>(std::min(head_dim - channel, kBlock)));
      }
    }
  }
}

// (keys, head_dim) rows -> panels [keys][kPanel] of values; the padding channels are zero.
inline void lay_out_values(const float* source, int64_t stride, int64_t keys, int64_t head_dim,
                           float* panel) {
  for (int64_t first = 0; first < head_dim; first += kPanel) {
    const int64_t count = std::min(head_dim - first, kPanel);
    const int64_t width = std::min(round_up(count, kLanes), kPanel);
    for (int64_t key = 0; key < keys; ++key, panel += width) {
      const float* row = source + key * stride + first;
      for (int64_t channel = 0; channel < width; channel += kLanes) {
        const int64_t lanes = std::min(count - channel, kLanes);
        Vec::loadu(row + channel, lanes).store(panel + channel);
      }
    }
  }
}

// One thread's state while it runs its share of the tasks.
class AttentionWorker {
 public:
  AttentionWorker(const AttentionArgs& args, float* scratch)
      : args_(args),
        layout_(args),
        scale_(static_cast<float>(std::numbers::log2e /
                                  std::sqrt(static_cast<double>(args.head_dim * args.relative.terms())))),
        positions_(args, scratch + layout_.positions),
        relative_(args, scratch + layout_.relative),
        keys_(scratch),
        values_(scratch + layout_.values),
        scores_(scratch + layout_.scores),
        context_(scratch + layout_.context),
        maxima_(scratch + layout_.maxima),
        sums_(scratch + layout_.sums) {}

  void lay_out(const Sequence& sequence, int64_t head) {
    positions_.begin(sequence, head);
    relative_.begin(sequence, head, positions_.uneven(), rows_of(sequence, 1, head));
    lay_out_keys(rows_of(sequence, 1, head), args_.row_stride, sequence.length, args_.head_dim, keys_);
    lay_out_values(rows_of(sequence, 2, head), args_.row_stride, sequence.length, args_.head_dim, values_);
  }

  void attend(const Sequence& sequence, int64_t head, int64_t query, int64_t rows) {
    const float* queries = rows_of(sequence, 0, head) + query * args_.row_stride;
    positions_.for_each_block(query, rows, kRegisterRows, kKeyBlock, [&](KeyBlock block) {
      block.scores = scores_;
      add_block(sequence, queries + block.row * args_.row_stride, block);
    });
    for (int64_t row = 0; row < rows; ++row) store(sequence.first + query + row, head, row);
  }

 private:
  // part: 0 for the query, 1 for the key, 2 for the value.
  const float* rows_of(const Sequence& sequence, int64_t part, int64_t head) const {
    return static_cast<const float*>(args_.qkv) + sequence.first * args_.row_stride +
           (part * args_.num_heads + head) * args_.head_dim;
  }

  // Adds one block of keys to the sums and contexts of up to kRegisterRows rows.
  void add_block(const Sequence& sequence, const float* queries, const KeyBlock& block) {
    const int64_t row = block.row, rows = block.rows;
    const bool first = block.is_first;
    const int64_t padded = round_up(block.keys, kLanes);
    float* context = context_ + row * layout_.context_width;
    score(queries, rows, keys_ + block.key * args_.head_dim, padded);
    relative_.add(block, queries);
    positions_.apply(block);
    exponentiate(row, rows, block.keys, padded, first);
    // Panels of V are [length][width]: the last may be narrow, and starts where the full ones end.
    const int64_t full = layout_.context_width / kPanel * kPanel;
    const int64_t key = std::max(block.key, block.own.first);
    const int64_t keys = std::min(block.key + block.keys, block.own.last) - key;
    const float* const weights = scores_ + key - block.key;
    multiply_panels(rows, weights, kKeyBlock, values_ + key * kPanel, sequence.length * kPanel, keys, context,
                    layout_.context_width, full, !first);
    multiply_panels(rows, weights, kKeyBlock, values_ + sequence.length * full + key * kLanes, 0, keys,
                    context + full, layout_.context_width, layout_.context_width - full, !first);
  }

  // q k^T for a block of keys, in chains of kChain products.
  void score(const float* queries, int64_t rows, const float* keys, int64_t padded) {
    const int64_t full = padded / kPanel * kPanel;
    for (int64_t channel = 0; channel < args_.head_dim; channel += kChain) {
      const int64_t depth = std::min(kChain, args_.head_dim - channel);
      multiply_panels(rows, queries + channel, args_.row_stride, keys + channel * kPanel,
                      args_.head_dim * kPanel, depth, scores_, kKeyBlock, full, channel != 0);
      // The last panel may be narrow: its vectors then lie closer together.
      multiply_panels(rows, queries + channel, args_.row_stride,
                      keys + full * args_.head_dim + channel * kLanes, 0, depth, scores_ + full, kKeyBlock,
                      padded - full, channel != 0);
    }
  }

  // scores -> 2^(scale * (score - maximum)), with each row's maximum so far; sums under an earlier maximum
  // are scaled down. All maxima come first: a row alone would wait for each step of its own.
  void exponentiate(int64_t row, int64_t rows, int64_t keys, int64_t padded, bool first) {
    float maxima[kRegisterRows];
    for (int64_t i = 0; i < rows; ++i) {
      maxima[i] = new_maximum(scores_ + i * kKeyBlock, keys, padded, first ? nullptr : maxima_ + row + i);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float maximum = maxima[i];
      const float total = powers(scores_ + i * kKeyBlock, padded, maximum);
      sums_[row + i] = first ? total : total + sums_[row + i] * rescale(row + i, maximum);
      maxima_[row + i] = maximum;
    }
  }

  // The largest of a row's scores and of `old`. The row's padding becomes -infinity.
  float new_maximum(float* scores, int64_t keys, int64_t padded, const float* old) const {
    for (int64_t key = keys; key < padded; ++key) scores[key] = -kInfinity;
    Vec even(-kInfinity);
    Vec odd(-kInfinity);
    int64_t key = 0;
    for (; key + kPanel <= padded; key += kPanel) {
      even = at::vec::maximum(even, Vec::loadu(scores + key));
      odd = at::vec::maximum(odd, Vec::loadu(scores + key + kLanes));
    }
    if (key < padded) even = at::vec::maximum(even, Vec::loadu(scores + key));
    const auto maximum = [](Vec& x, Vec& y) { return at::vec::maximum(x, y); };
    const float largest = at::vec::vec_reduce_all<float>(maximum, at::vec::maximum(even, odd));
    // Not std::max: a NaN on either side has to stay.
    return old != nullptr && !(largest > *old) && largest == largest ? *old : largest;
  }

  // scores -> 2^(scale * (score - maximum)); returns their sum. The maximum is subtracted first, which leaves
  // 0 for the largest score. scale * score - scale * maximum in one fused multiply-add is less work, but
  // rounds one product and not the other, which differ by more than an exponent can hold where scores are
  // large.
  float powers(float* scores, int64_t padded, float maximum) const {
    const Vec scale(scale_);
    // Where all scores so far are -infinity, their difference from the maximum would be NaN.
    const Vec largest(maximum == -kInfinity ? std::numeric_limits<float>::lowest() : maximum);
    const auto power = [&](int64_t key) {
      const Vec weight = power_of_two((Vec::loadu(scores + key) - largest) * scale);
      weight.store(scores + key);
      return weight;
    };
    Vec even(0.0f);
    Vec odd(0.0f);
    int64_t key = 0;
    for (; key + kPanel <= padded; key += kPanel) {
      even = even + power(key);
      odd = odd + power(key + kLanes);
    }
    if (key < padded) even = even + power(key);
    const auto plus = [](Vec& x, Vec& y) { return x + y; };
    return at::vec::vec_reduce_all<float>(plus, even + odd);
  }

  // Brings a row's context under its new maximum; returns the factor.
  float rescale(int64_t row, float maximum) {
    if (maximum == maxima_[row]) return 1.0f;
    const float factor = std::exp2((maxima_[row] - maximum) * scale_);
    float* context = context_ + row * layout_.context_width;
    for (int64_t channel = 0; channel < layout_.context_width; channel += kLanes) {
      (Vec::loadu(context + channel) * Vec(factor)).store(context + channel);
    }
    return factor;
  }

  void store(int64_t token, int64_t head, int64_t row) const {
    const float* context = context_ + row * layout_.context_width;
    float* out = args_.context + (token * args_.num_heads + head) * args_.head_dim;
    // maximum - maximum is 0, or NaN where softmax has no value: powers turn NaN into a number.
    const Vec sum(sums_[row] + (maxima_[row] - maxima_[row]));
    for (int64_t channel = 0; channel < args_.head_dim; channel += kLanes) {
      const int64_t lanes = std::min(args_.head_dim - channel, kLanes);
      (Vec::loadu(context + channel) / sum).store(out + channel, lanes);
    }
  }

  const AttentionArgs& args_;
  const AttentionLayout layout_;
  const float scale_;  // log2(e) / sqrt(head_dim * terms): exponents are of 2
  AttentionPositions positions_;
  RelativeTerms relative_;
  float* const keys_;
  float* const values_;
  float* const scores_;
  float* const context_;
  float* const maxima_;
  float* const sums_;
};

inline int64_t attention_scratch(const AttentionArgs& args) {
  return AttentionLayout(args).total;
}

inline void attention(const AttentionArgs& args, int64_t begin, int64_t end, float* scratch) {
  AttentionWorker worker(args, scratch);
  for_each_task(args, begin, end, worker);
}

}  // namespace pruned_ops::CPU_CAPABILITY
