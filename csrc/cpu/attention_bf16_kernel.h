// softmax(q k^T / sqrt(head_dim)) v on q, k and v in bfloat16, by instructions that multiply two numbers a
// lane and add them in fp32: twice the products of fp32 in the same time. The softmax is in fp32; its weights
// are rounded to bfloat16 for the product with v. Tasks, layout and order are those of attention_kernel.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/attention_bf16_layout.h"
#include "cpu/attention_bf16_softmax.h"
#include "cpu/attention_positions_kernel.h"
#include "cpu/attention_tasks.h"
#include "cpu/kernels.h"
#include "cpu/multiply_bf16_kernel.h"
#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

// Where a thread's scratch is cut, in units of 4 bytes: a pair of bfloat16, or a float.
struct PairLayout {
  explicit PairLayout(const AttentionArgs& args)
      : values(round_up(args.longest, kLanes) * args.head_dim / kPair),
        scores(values + round_up(args.longest, kPair) * args.head_dim / kPair),
        weights(scores + kRegisterRows * kPairKeyBlock),
        context(weights + kRegisterRows * kPairKeyBlock / kPair),
        maxima(context + kQueryBlock * args.head_dim),
        sums(maxima + kQueryBlock),
        positions(sums + kQueryBlock),
        total(positions + AttentionPositions::scratch(args)) {}

  int64_t values, scores, weights, context, maxima, sums, positions, total;
};

// One thread's state while it runs its share of the tasks. head_dim is a multiple of 16.
class PairWorker {
 public:
  PairWorker(const AttentionArgs& args, float* scratch) : PairWorker(args, scratch, PairLayout(args)) {}

  void lay_out(const Sequence& sequence, int64_t head) {
    positions_.begin(sequence, head);
    lay_out_keys(rows_of(sequence, 1, head), sequence.length);
    lay_out_values(rows_of(sequence, 2, head), sequence.length);
  }

  void attend(const Sequence& sequence, int64_t head, int64_t query, int64_t rows) {
    const uint16_t* queries = rows_of(sequence, 0, head) + query * args_.row_stride;
    positions_.for_each_block(query, rows, kRegisterRows, kPairKeyBlock, [&](KeyBlock block) {
      block.scores = softmax_.scores();
      add_block(sequence, queries + block.row * args_.row_stride, block);
    });
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t token = sequence.first + query + row;
      softmax_.store(row, args_.context + (token * args_.num_heads + head) * args_.head_dim);
    }
  }

 private:
  PairWorker(const AttentionArgs& args, float* scratch, const PairLayout& layout)
      : args_(args),
        qkv_(static_cast<const uint16_t*>(args.qkv)),
        pairs_(args.head_dim / kPair),
        positions_(args, scratch + layout.positions),
        keys_(reinterpret_cast<uint16_t*>(scratch)),
        values_(reinterpret_cast<uint16_t*>(scratch + layout.values)),
        softmax_(args.head_dim, scratch + layout.scores,
                 reinterpret_cast<uint16_t*>(scratch + layout.weights), scratch + layout.context,
                 scratch + layout.maxima, scratch + layout.sums) {}

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
          const int64_t made = std::min(pairs_ - pair, kLanes);
          transpose_pairs(source + (first + key) * args_.row_stride + pair * kPair, args_.row_stride,
                          keys - first - key, made, panel + (pair * width + key) * kPair, width, made);
        }
      }
      panel += pairs_ * width * kPair;
    }
  }

  // (keys, head_dim) rows -> panels [keys / 2][32 channels] of pairs of keys; the last may have 16 channels.
  // The key that fills the last pair up is zero.
  void lay_out_values(const uint16_t* source, int64_t keys) {
    uint16_t* panel = values_;
    for (int64_t first = 0; first < args_.head_dim; first += kPanel) {
      const int64_t width = std::min(args_.head_dim - first, kPanel);
      for (int64_t key = 0; key < keys; key += kPair) {
        const uint16_t* row = source + key * args_.row_stride + first;
        for (int64_t channel = 0; channel < width; channel += kLanes, panel += kLanes * kPair) {
          const uint16_t* const second = key + 1 < keys ? row + args_.row_stride + channel : nullptr;
          pair_channels(row + channel, second, panel);
        }
      }
    }
  }

  // Adds one block of keys to the sums and contexts of up to kRegisterRows rows.
  void add_block(const Sequence& sequence, const uint16_t* queries, const KeyBlock& block) {
    const int64_t rows = block.rows, key = block.key, keys = block.keys;
    const int64_t padded = round_up(keys, kLanes);
    score(queries, rows, keys_ + key * args_.head_dim, padded);
    positions_.apply(block);
    softmax_.exponentiate(block.row, rows, keys, padded, block.is_first);
    float* const context = softmax_.context(block.row);
    const int64_t steps = (keys + 1) / kPair;
    const int64_t panel_pairs = (sequence.length + 1) / kPair;  // steps of a whole panel
    const uint16_t* panel = values_;
    for (int64_t channel = 0; channel < args_.head_dim; channel += kPanel) {
      const int64_t width = std::min(args_.head_dim - channel, kPanel);
      const uint16_t* from = panel + key * width;
      if (width == kPanel) {
        multiply_pair_rows<2>(rows, softmax_.weights(), kPairKeyBlock, from, steps, context + channel,
                              args_.head_dim, !block.is_first);
      } else {
        multiply_pair_rows<1>(rows, softmax_.weights(), kPairKeyBlock, from, steps, context + channel,
                              args_.head_dim, !block.is_first);
      }
      panel += panel_pairs * width * kPair;
    }
  }

  // q k^T for a block of keys.
  void score(const uint16_t* queries, int64_t rows, const uint16_t* keys, int64_t padded) {
    int64_t key = 0;
    for (; key + kPanel <= padded; key += kPanel) {
      multiply_pair_rows<2>(rows, queries, args_.row_stride, keys + key * args_.head_dim, pairs_,
                            softmax_.scores() + key, kPairKeyBlock, false);
    }
    if (key < padded) {
      multiply_pair_rows<1>(rows, queries, args_.row_stride, keys + key * args_.head_dim, pairs_,
                            softmax_.scores() + key, kPairKeyBlock, false);
    }
  }

  const AttentionArgs& args_;
  const uint16_t* const qkv_;
  const int64_t pairs_;  // of a head's row
  AttentionPositions positions_;
  uint16_t *const keys_, *const values_;
  PairSoftmax softmax_;
};

inline int64_t attention_bf16_scratch(const AttentionArgs& args) {
  return PairLayout(args).total;
}

inline void attention_bf16(const AttentionArgs& args, int64_t begin, int64_t end, float* scratch) {
  PairWorker worker(args, scratch);
  for_each_task(args, begin, end, worker);
}

}  // namespace pruned_ops::CPU_CAPABILITY
