// Disentangled attention (He et al. 2021): to the product of a query and a key are added that of the query
// with a key of their distance, and that of the key with a query of their distance. A thread keeps the latter
// for all keys of one (sequence, head) while its tasks share them, and the former for a few query rows; both
// are products with the rows that the distances there have, and are read along diagonals. Distances share
// rows, so that neither is as large as the sequence times itself.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

#include "cpu/attention_positions_kernel.h"
#include "cpu/attention_tasks.h"
#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

// values[index[i]] for each lane i; the indices lie in [0, kLanes).
inline Vec picked(const Vec& values, const at::vec::Vectorized<int32_t>& index) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_permutexvar_ps(index, values);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_permutevar8x32_ps(values, index);
#else
  float from[kLanes], to[kLanes];
  int32_t lanes[kLanes];
  values.store(from);
  index.store(lanes);
  for (int64_t i = 0; i < kLanes; ++i) to[i] = from[lanes[i] & (kLanes - 1)];
  return Vec::loadu(to);
#endif
}

// Products of `count` rows of a with the panels from `first` to before `last` of a weight (out, depth), as
// panels.h draws it, in chains of kChain products. Column 0 of c is the first of panel 0.
inline void multiply_weight(int64_t count, const float* a, int64_t a_stride, const float* weight,
                            int64_t depth, int64_t first, int64_t last, float* c, int64_t c_stride) {
  static_assert(kWeightPanel % kPanel == 0);
  for (int64_t panel = first; panel < last; ++panel) {
    for (int64_t part = 0; part < kWeightPanel; part += kPanel) {
      const float* const b = weight + panel * depth * kWeightPanel + part;
      for (int64_t channel = 0; channel < depth; channel += kChain) {
        multiply_rows<kPanelVectors>(count, a + channel, a_stride, b + channel * kWeightPanel, kWeightPanel,
                                     std::min(kChain, depth - channel), c + panel * kWeightPanel + part,
                                     c_stride, channel != 0);
      }
    }
  }
}

class RelativeTerms {
 public:
  // Floats of scratch.
  static int64_t scratch(const AttentionArgs& args) {
    if (!args.relative.is_given()) return 0;
    const int64_t stride = widest(args);
    const int64_t of_keys = args.relative.queries == nullptr ? 0 : args.longest;
    return distances(args.longest) + (of_keys + kRegisterRows) * stride + 2 * kTile;
  }

  RelativeTerms(const AttentionArgs& args, float* scratch) : args_(args), relative_(args.relative) {
    if (!relative_.is_given()) return;
    rows_ = reinterpret_cast<int32_t*>(scratch);
    stride_ = widest(args);
    tile_ = scratch + distances(args.longest);
    turned_ = tile_ + kTile;
    of_queries_ = turned_ + kTile;
    of_keys_ = of_queries_ + kRegisterRows * stride_;
  }

  // positions: those of the sequence, or null where they rise by 1. keys: its rows of k for this head.
  void begin(const Sequence& sequence, int64_t head, const int32_t* positions, const float* keys) {
    if (!relative_.is_given()) return;
    length_ = sequence.length;
    positions_ = positions;
    const int64_t floats = panel_count(args_) * args_.head_dim * kWeightPanel;
    keys_ = relative_.keys == nullptr ? nullptr : relative_.keys + head * floats;
    queries_ = relative_.queries == nullptr ? nullptr : relative_.queries + head * floats;
    origin_ = panels(place(0) - place(length_ - 1), 0).first * kWeightPanel;
    // Distances beyond the farthest are what whole vectors read; they have its row.
    for (int64_t i = 0; is_even() && i < 2 * length_ - 1 + kTileRows; ++i) {
      rows_[i] = static_cast<int32_t>(row_of(std::min(i, 2 * length_ - 2) + 1 - length_) - origin_);
    }
    if (queries_ == nullptr) return;
    for (int64_t key = 0; key < length_; key += kRegisterRows) {
      const int64_t count = std::min<int64_t>(kRegisterRows, length_ - key);
      multiply(count, keys + key * args_.row_stride, queries_,
               panels(place(key) - place(length_ - 1), place(key + count - 1) - place(0)),
               of_keys_ + key * stride_);
    }
  }

  // Adds both products to a block's scores. queries: the block's rows of q.
  void add(const KeyBlock& block, const float* queries) {
    if (!relative_.is_given()) return;
    if (keys_ != nullptr) {
      const int64_t last_query = block.query + block.rows - 1, last_key = block.key + block.keys - 1;
      multiply(block.rows, queries, keys_,
               panels(place(block.key) - place(last_query), place(last_key) - place(block.query)),
               of_queries_);
    }
    if (!is_even()) return add_each(block);
    if (keys_ != nullptr) add_of_queries(block);
    if (queries_ != nullptr) add_of_keys(block);
  }

 private:
  static constexpr int64_t kLine = 16;
  // Keys whose products are brought into L1 ahead: they lie too far apart for the processor to guess.
  static constexpr int64_t kKeysAhead = 8;
  static constexpr int64_t kTileRows = (kRegisterRows + kLanes - 1) / kLanes * kLanes;
  static constexpr int64_t kTile = kLanes * kTileRows;

  struct Panels {
    int64_t first, last;  // from the first to before the last
  };

  static int64_t panel_count(const AttentionArgs& args) {
    return (args.relative.rows + kWeightPanel - 1) / kWeightPanel;
  }

  // Floats from one row of products to the next: the rows that distances can have, what whole vectors read
  // beyond, and an odd number of lines.
  static int64_t widest(const AttentionArgs& args) {
    return (panel_count(args) * kWeightPanel + kLanes + kLine - 1) / kLine / 2 * 2 * kLine + kLine;
  }

  // Floats of the table of distances.
  static int64_t distances(int64_t longest) { return round_up(2 * longest + kTileRows, kLine); }

  // Whether the row of a distance can be read from the table: positions rise by 1, and kLanes distances one
  // after the other have no more than kLanes rows.
  bool is_even() const { return positions_ == nullptr && relative_.is_gradual; }

  int64_t place(int64_t token) const { return positions_ == nullptr ? token : positions_[token]; }

  int64_t row_of(int64_t distance) const {
    return relative_
        .row_of_distance[std::clamp(distance, -relative_.reach, relative_.reach) + relative_.reach];
  }

  // The panels that hold the rows of all distances from the least to the most.
  Panels panels(int64_t least, int64_t most) const {
    return {row_of(least) / kWeightPanel, row_of(most) / kWeightPanel + 1};
  }

  void multiply(int64_t count, const float* rows, const float* weight, const Panels& panels, float* out) {
    multiply_weight(count, rows, args_.row_stride, weight, args_.head_dim, panels.first, panels.last,
                    out - origin_, stride_);
  }

  // The table's rows from the distance of a key and a query on, for the keys that follow.
  const int32_t* rows_from(int64_t key, int64_t query) const { return rows_ + key - query + length_ - 1; }

  // The products of a row with the distances whose rows these are.
  static Vec read(const float* products, const int32_t* rows) {
    using Rows = at::vec::Vectorized<int32_t>;
    const int32_t first = *rows;
    return picked(Vec::loadu(products + first), Rows::loadu(rows) - Rows(first));
  }

  void add_of_queries(const KeyBlock& block) const {
    for (int64_t row = 0; row < block.rows; ++row) {
      float* const scores = block.scores + row * block.stride;
      const float* const products = of_queries_ + row * stride_;
      const int32_t* const rows = rows_from(block.key, block.query + row);
      for (int64_t key = 0; key < block.keys; key += kLanes) {
        (Vec::loadu(scores + key) + read(products, rows + key)).store(scores + key);
      }
    }
  }

  // A key's products lie along its queries, last query first, and are turned by tiles into rows of keys.
  void add_of_keys(const KeyBlock& block) const {
    const int64_t last_query = block.query + block.rows - 1;
    for (int64_t key = 0; key < block.keys; key += kLanes) {
      const int64_t count = std::min(kLanes, block.keys - key);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = block.key + key + i, ahead = std::min(at + kKeysAhead, length_ - 1);
        const float* const next = of_keys_ + ahead * stride_ + *rows_from(ahead, last_query);
        __builtin_prefetch(next);
        __builtin_prefetch(next + block.rows - 1);
        const int32_t* const rows = rows_from(at, last_query);
        for (int64_t row = 0; row < block.rows; row += kLanes) {
          read(of_keys_ + at * stride_, rows + row).store(tile_ + i * kTileRows + row);
        }
      }
      at::vec::transpose_mxn<float>(tile_, kTileRows, turned_, kLanes, static_cast<int>(count),
                                    static_cast<int>(block.rows));
      for (int64_t row = 0; row < block.rows; ++row) {
        float* const scores = block.scores + (block.rows - 1 - row) * block.stride + key;
        (Vec::loadu(scores) + Vec::loadu(turned_ + row * kLanes)).store(scores);
      }
    }
  }

  // The same one by one, where distances are not in order.
  void add_each(const KeyBlock& block) const {
    for (int64_t row = 0; row < block.rows; ++row) {
      for (int64_t i = 0; i < block.keys; ++i) {
        const int64_t key = block.key + i;
        const int64_t at = row_of(place(key) - place(block.query + row)) - origin_;
        float sum = keys_ == nullptr ? 0.0f : of_queries_[row * stride_ + at];
        if (queries_ != nullptr) sum += of_keys_[key * stride_ + at];
        block.scores[row * block.stride + i] += sum;
      }
    }
  }

  const AttentionArgs& args_;
  const RelativeArgs& relative_;
  int32_t* rows_ = nullptr;      // of the distances from 1 - length to length - 1, less `origin_`
  float* of_queries_ = nullptr;  // (kRegisterRows, stride): products of a block's queries
  float* of_keys_ = nullptr;     // (length, stride): products of the keys
  float *tile_ = nullptr, *turned_ = nullptr;
  int64_t stride_ = 0;
  const int32_t* positions_ = nullptr;                // of the sequence, where they do not rise by 1
  const float *keys_ = nullptr, *queries_ = nullptr;  // the head's panels; null without such products
  int64_t origin_ = 0;                                // the row in column 0 of the products
  int64_t length_ = 0;
};

}  // namespace pruned_ops::CPU_CAPABILITY
