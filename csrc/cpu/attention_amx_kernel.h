// softmax(q k^T / sqrt(head_dim)) v on q, k and v in bfloat16 by AMX, with the softmax of
// attention_bf16_softmax.h. A step takes 16 query rows through a block of keys: q k^T, softmax, p v. Keys and
// values lie as tiles of 16 pairs by 16 columns, one after the other; zeros fill up what is no whole tile.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "cpu/amx_tiles.h"
#include "cpu/attention_bf16_layout.h"
#include "cpu/attention_bf16_softmax.h"
#include "cpu/attention_positions_kernel.h"
#include "cpu/attention_tasks.h"
#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

constexpr int64_t kAmxDepth = 32;                   // bfloat16 numbers of a tile's row
constexpr int64_t kAmxTile = kAmxRows * kAmxDepth;  // of a tile
constexpr int64_t kAmxSums = 4;                     // tiles of sums side by side
static_assert(kQueryBlock % kAmxRows == 0 && kPairKeyBlock % kAmxDepth == 0);

// A row of tiles: c (16, 16 * kTiles) (+)= a (16, 32 * steps) times tiles of b. Strides: bytes between rows
// of a and c; numbers between the first tiles of b's columns, whose tiles of further depth follow one
// another.
template <int kTiles>
void multiply_amx_row(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_stride, int64_t steps,
                      float* c, int64_t c_stride, bool accumulate) {
  order_memory(c);
  if (accumulate) {
    _tile_loadd(0, c, c_stride);
    if constexpr (kTiles > 1) _tile_loadd(1, c + 16, c_stride);
    if constexpr (kTiles > 2) _tile_loadd(2, c + 32, c_stride);
    if constexpr (kTiles > 3) _tile_loadd(3, c + 48, c_stride);
  } else {
    _tile_zero(0);
    if constexpr (kTiles > 1) _tile_zero(1);
    if constexpr (kTiles > 2) _tile_zero(2);
    if constexpr (kTiles > 3) _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step, a += kAmxDepth, b += kAmxTile) {
    _tile_loadd(4, a, a_stride);
    _tile_loadd(6, b, kAmxBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTiles > 1) {
      _tile_loadd(7, b + b_stride, kAmxBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTiles > 2) {
      _tile_loadd(6, b + 2 * b_stride, kAmxBytes);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (kTiles > 3) {
      _tile_loadd(7, b + 3 * b_stride, kAmxBytes);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, c, c_stride);
  if constexpr (kTiles > 1) _tile_stored(1, c + 16, c_stride);
  if constexpr (kTiles > 2) _tile_stored(2, c + 32, c_stride);
  if constexpr (kTiles > 3) _tile_stored(3, c + 48, c_stride);
  order_memory(c);
}

// The same for any number of columns, a multiple of 16.
inline void multiply_amx_rows(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_stride,
                              int64_t steps, float* c, int64_t c_stride, int64_t columns, bool accumulate) {
  for (; columns >= kAmxSums * kLanes; columns -= kAmxSums * kLanes) {
    multiply_amx_row<kAmxSums>(a, a_stride, b, b_stride, steps, c, c_stride, accumulate);
    b += kAmxSums * b_stride;
    c += kAmxSums * kLanes;
  }
  const int64_t tiles = columns / kLanes;
  if (tiles == 1) multiply_amx_row<1>(a, a_stride, b, b_stride, steps, c, c_stride, accumulate);
  if (tiles == 2) multiply_amx_row<2>(a, a_stride, b, b_stride, steps, c, c_stride, accumulate);
  if (tiles == 3) multiply_amx_row<3>(a, a_stride, b, b_stride, steps, c, c_stride, accumulate);
}

// Where a thread's scratch is cut, in units of 4 bytes: a pair of bfloat16, or a float.
struct AmxLayout {
  explicit AmxLayout(const AttentionArgs& args)
      : depth(round_up(args.head_dim, kAmxDepth)),
        values(round_up(args.longest, kLanes) * depth / kPair),
        queries(values + round_up(args.longest, kAmxDepth) * args.head_dim / kPair),
        scores(queries + kQueryBlock * depth / kPair),
        weights(scores + kAmxRows * kPairKeyBlock),
        context(weights + kAmxRows * kPairKeyBlock / kPair),
        maxima(context + kQueryBlock * args.head_dim),
        sums(maxima + kQueryBlock),
        positions(sums + kQueryBlock),
        total(positions + AttentionPositions::scratch(args)) {}

  int64_t depth;  // of q k^T, in whole tiles
  int64_t values, queries, scores, weights, context, maxima, sums, positions, total;
};

// One thread's state while it runs its share of the tasks. head_dim is a multiple of 16.
class AmxWorker {
 public:
  AmxWorker(const AttentionArgs& args, float* scratch) : AmxWorker(args, scratch, AmxLayout(args)) {}

  void lay_out(const Sequence& sequence, int64_t head) {
    positions_.begin(sequence, head);
    lay_out_keys(rows_of(sequence, 1, head), sequence.length);
    lay_out_values(rows_of(sequence, 2, head), sequence.length);
  }

  void attend(const Sequence& sequence, int64_t head, int64_t query, int64_t rows) {
    lay_out_queries(rows_of(sequence, 0, head) + query * args_.row_stride, rows);
    positions_.for_each_block(query, rows, kAmxRows, kPairKeyBlock, [&](KeyBlock block) {
      block.scores = softmax_.scores();
      add_block(sequence, block);
    });
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t token = sequence.first + query + row;
      softmax_.store(row, args_.context + (token * args_.num_heads + head) * args_.head_dim);
    }
  }

 private:
  AmxWorker(const AttentionArgs& args, float* scratch, const AmxLayout& layout)
      : args_(args),
        qkv_(static_cast<const uint16_t*>(args.qkv)),
        depth_(layout.depth),
        positions_(args, scratch + layout.positions),
        keys_(reinterpret_cast<uint16_t*>(scratch)),
        values_(reinterpret_cast<uint16_t*>(scratch + layout.values)),
        queries_(reinterpret_cast<uint16_t*>(scratch + layout.queries)),
        weights_(reinterpret_cast<uint16_t*>(scratch + layout.weights)),
        softmax_(args.head_dim, scratch + layout.scores, weights_, scratch + layout.context,
                 scratch + layout.maxima, scratch + layout.sums) {}

  // part: 0 for the query, 1 for the key, 2 for the value.
  const uint16_t* rows_of(const Sequence& sequence, int64_t part, int64_t head) const {
    return qkv_ + sequence.first * args_.row_stride + (part * args_.num_heads + head) * args_.head_dim;
  }

  // Copies rows of queries, filled up to whole tiles of depth. Rows of a tile past the last keep what they
  // had: no other row depends on them.
  void lay_out_queries(const uint16_t* source, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t channel = 0; channel < depth_; channel += kAmxDepth) {
        const int64_t count = std::min(args_.head_dim - channel, kAmxDepth);
        const auto mask = static_cast<__mmask32>((uint64_t{1} << count) - 1);
        _mm512_storeu_si512(queries_ + row * depth_ + channel,
                            _mm512_maskz_loadu_epi16(mask, source + row * args_.row_stride + channel));
      }
    }
  }

  // (keys, head_dim) rows -> tiles [keys / 16][depth / 32] of 16 pairs of channels by 16 keys.
  void lay_out_keys(const uint16_t* source, int64_t keys) {
    uint16_t* tile = keys_;
    for (int64_t key = 0; key < keys; key += kLanes) {
      for (int64_t channel = 0; channel < depth_; channel += kAmxDepth, tile += kAmxTile) {
        transpose_pairs(source + key * args_.row_stride + channel, args_.row_stride, keys - key,
                        std::min(args_.head_dim - channel, kAmxDepth) / kPair, tile, kLanes, kLanes);
      }
    }
  }

  // (keys, head_dim) rows -> tiles [head_dim / 16][keys / 32] of 16 pairs of keys by 16 channels.
  void lay_out_values(const uint16_t* source, int64_t keys) {
    uint16_t* pairs = values_;
    for (int64_t channel = 0; channel < args_.head_dim; channel += kLanes) {
      const uint16_t* row = source + channel;
      int64_t key = 0;
      for (; key < keys; key += kPair, row += kPair * args_.row_stride, pairs += kLanes * kPair) {
        pair_channels(row, key + 1 < keys ? row + args_.row_stride : nullptr, pairs);
      }
      for (; key < round_up(keys, kAmxDepth); key += kPair, pairs += kLanes * kPair) {
        _mm512_storeu_si512(pairs, _mm512_setzero_si512());
      }
    }
  }

  // Adds one block of keys to the sums and contexts of up to 16 rows.
  void add_block(const Sequence& sequence, const KeyBlock& block) {
    const int64_t row = block.row, rows = block.rows, key = block.key, keys = block.keys;
    constexpr int64_t kNumberBytes = sizeof(*weights_), kFloatBytes = sizeof(float);
    const int64_t padded = round_up(keys, kLanes);
    multiply_amx_rows(queries_ + row * depth_, depth_ * kNumberBytes, keys_ + key * depth_, kLanes * depth_,
                      depth_ / kAmxDepth, softmax_.scores(), kPairKeyBlock * kFloatBytes, padded, false);
    positions_.apply(block);
    softmax_.exponentiate(row, rows, keys, padded, block.is_first);
    const int64_t whole = round_up(keys, kAmxDepth);
    for (int64_t i = 0; padded < whole && i < rows; ++i) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights_ + i * kPairKeyBlock + padded),
                          _mm256_setzero_si256());
    }
    multiply_amx_rows(weights_, kPairKeyBlock * kNumberBytes, values_ + key * kLanes,
                      round_up(sequence.length, kAmxDepth) * kLanes, whole / kAmxDepth, softmax_.context(row),
                      args_.head_dim * kFloatBytes, args_.head_dim, !block.is_first);
  }

  const AttentionArgs& args_;
  const uint16_t* const qkv_;
  const int64_t depth_;
  AttentionPositions positions_;
  uint16_t *const keys_, *const values_, *const queries_, *const weights_;
  PairSoftmax softmax_;
};

inline int64_t attention_amx_scratch(const AttentionArgs& args) {
  return AmxLayout(args).total;
}

inline void attention_amx(const AttentionArgs& args, int64_t begin, int64_t end, float* scratch) {
  const AmxShapes shapes(kAmxRows);
  AmxWorker worker(args, scratch);
  for_each_task(args, begin, end, worker);
}

}  // namespace pruned_ops::CPU_CAPABILITY
