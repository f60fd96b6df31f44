// What the positions of query and key do to an attention beside rotating them: a window leaves keys out, and
// a bias is added to scores. Positions rise, so that the keys of a query are next to each other; where they
// rise by 1, the biases of a query's keys are too, on the diagonal that a worker makes for each head.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/attention_tasks.h"
#include "cpu/kernels.h"
#include "cpu/multiply_kernel.h"

namespace pruned_ops::CPU_CAPABILITY {

struct Keys {
  int64_t first, last;  // from the first to before the last

  // Whole panels, but for the end of the sequence.
  Keys in_panels(int64_t length) const {
    return {first / kPanel * kPanel, std::min(length, round_up(last, kPanel))};
  }
};

// A block of keys for some query rows of a task.
struct KeyBlock {
  float* scores;  // rows of `stride`; null until the worker says where they lie
  int64_t stride;
  int64_t row, rows;  // of the task: the first, and their number
  int64_t query;      // of the sequence: the first of these rows
  int64_t key, keys;  // the first key, from which a panel begins, and their number
  Keys own;           // those of the rows; what else there is fills panels up, and weighs nothing
  bool is_first;      // of these rows' blocks
};

class AttentionPositions {
 public:
  // Floats of scratch: two sequences, and what whole vectors read beyond.
  static int64_t scratch(const AttentionArgs& args) {
    return args.bias == nullptr ? 0 : round_up(2 * args.longest + 2 * kPanel, kLine);
  }

  AttentionPositions(const AttentionArgs& args, float* scratch) : args_(args), diagonal_(scratch) {}

  void begin(const Sequence& sequence, int64_t head) {
    length_ = sequence.length;
    positions_ = nullptr;
    if (args_.positions != nullptr && length_ > 0) {
      const int32_t* const own = args_.positions + sequence.first;
      if (static_cast<int64_t>(own[length_ - 1]) - own[0] != length_ - 1) positions_ = own;
    }
    if (args_.bias == nullptr) return;
    middle_ = args_.bias + head * (2 * args_.reach + 1) + args_.reach;
    if (positions_ != nullptr) return;
    for (int64_t distance = 1 - length_; distance < length_; ++distance) {
      diagonal_[distance + length_ - 1] = bias_at(distance);
    }
  }

  // The positions of the sequence where they do not rise by 1; null where they do.
  const int32_t* uneven() const { return positions_; }

  // The keys of some queries in a row, of any of them.
  Keys keys(int64_t query, int64_t count) const {
    if (args_.window < 0) return {0, length_};
    return {first_key(query), last_key(query + count - 1)};
  }

  // Calls visit(block) for a task's query rows, `at_once` of them, and their keys, `most` of them.
  template <typename Visit>
  void for_each_block(int64_t query, int64_t rows, int64_t at_once, int64_t most, const Visit& visit) const {
    const Keys all = keys(query, rows).in_panels(length_);
    for (int64_t begin = all.first; begin < all.last; begin += most) {
      for (int64_t row = 0; row < rows; row += at_once) {
        const int64_t count = std::min(at_once, rows - row);
        const Keys own = keys(query + row, count);
        const Keys read = own.in_panels(length_);
        const int64_t key = std::max(begin, read.first);
        const int64_t found = std::min(begin + most, read.last) - key;
        if (found <= 0) continue;
        visit(KeyBlock{nullptr, most, row, count, query + row, key, found, own, key == read.first});
      }
    }
  }

  // Adds the bias, and makes -infinity of what the window leaves out.
  void apply(const KeyBlock& block) const {
    if (args_.bias != nullptr) add_bias(block);
    if (args_.window >= 0) mask(block);
  }

 private:
  static constexpr int64_t kLine = 16;

  float bias_at(int64_t distance) const { return middle_[std::clamp(distance, -args_.reach, args_.reach)]; }

  // The first key that is near enough to the query, and the one after the last.
  int64_t first_key(int64_t query) const {
    if (positions_ == nullptr) return std::max<int64_t>(0, query - args_.window);
    const int64_t least = positions_[query] - args_.window;
    return std::lower_bound(positions_, positions_ + length_, least) - positions_;
  }
  int64_t last_key(int64_t query) const {
    if (positions_ == nullptr) return std::min(length_, query + args_.window + 1);
    const int64_t most = positions_[query] + args_.window;
    return std::upper_bound(positions_, positions_ + length_, most) - positions_;
  }

  void add_bias(const KeyBlock& block) const {
    for (int64_t row = 0; row < block.rows; ++row) {
      float* const values = block.scores + row * block.stride;
      const int64_t query = block.query + row;
      if (positions_ != nullptr) {
        for (int64_t i = 0; i < block.keys; ++i) {
          values[i] += bias_at(static_cast<int64_t>(positions_[block.key + i]) - positions_[query]);
        }
        continue;
      }
      const float* const biases = diagonal_ + block.key - query + length_ - 1;
      for (int64_t i = 0; i < block.keys; i += kLanes) {
        (Vec::loadu(values + i) + Vec::loadu(biases + i)).store(values + i);
      }
    }
  }

  void mask(const KeyBlock& block) const {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    for (int64_t row = 0; row < block.rows; ++row) {
      float* const values = block.scores + row * block.stride;
      const int64_t first = std::clamp<int64_t>(first_key(block.query + row) - block.key, 0, block.keys);
      const int64_t last = std::clamp<int64_t>(last_key(block.query + row) - block.key, 0, block.keys);
      std::fill(values, values + first, kNone);
      std::fill(values + std::max(first, last), values + block.keys, kNone);
    }
  }

  const AttentionArgs& args_;
  float* const diagonal_;               // biases of the distances from 1 - length to length - 1
  const int32_t* positions_ = nullptr;  // of the sequence, where they do not rise by 1
  const float* middle_ = nullptr;       // the head's bias at distance 0
  int64_t length_ = 0;
};

}  // namespace pruned_ops::CPU_CAPABILITY
