// Runs the CPU kernels of every capability that this ARM processor has, without torch: a static program,
// which an emulator runs in seconds (tests/ops/test_arm.py). The int8 kernels have to give the bits of the
// plain ones and exact sums, the fp32 ones what double precision gives. Memory that is read ends at a page
// that may not be. It prints the capabilities that ran; the first fault ends it with status 1.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/arm_features.h"
#include "cpu/kernels.h"

namespace pruned_ops {

namespace DEFAULT {
extern const Kernels table;
extern const Int8Kernels int8_table;
}  // namespace DEFAULT
namespace NEON_DOTPROD {
extern const Int8Kernels int8_table;
}
namespace NEON_I8MM {
extern const Int8Kernels int8_table;
}

namespace {

using Sizes = std::vector<int64_t>;
constexpr int64_t kPage = 4096;
std::mt19937 generator(0);

void require(bool is_right, const std::string& what) {
  if (is_right) return;
  std::printf("wrong: %s\n", what.c_str());
  std::exit(1);
}

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// `count` zeros, behind which nothing may be accessed.
template <typename T>
class AtEnd {
 public:
  explicit AtEnd(int64_t count)
      : bytes_(count * static_cast<int64_t>(sizeof(T))), pages_(round_up(bytes_, kPage)) {
    base_ = static_cast<char*>(
        mmap(nullptr, pages_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    require(mprotect(base_ + pages_, kPage, PROT_NONE) == 0, "mprotect");
  }
  AtEnd(const AtEnd&) = delete;
  ~AtEnd() { munmap(base_, pages_ + kPage); }

  T* data() const { return reinterpret_cast<T*>(base_ + pages_ - bytes_); }
  T& operator[](int64_t i) const { return data()[i]; }

 private:
  int64_t bytes_, pages_;
  char* base_;
};

float normal() {
  return std::normal_distribution<float>()(generator);
}

void fill(float* values, int64_t count) {
  std::generate(values, values + count, normal);
}

// What an int8 kernel makes of a row: its outputs, those of the linear that ends in GELU, and their scales.
struct Int8Result {
  std::vector<float> linear;
  std::vector<uint8_t> bytes;
  std::vector<float> scales;

  bool operator==(const Int8Result& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;  // NaN has bits, too
    };
    return same(linear, other.linear) && bytes == other.bytes && same(scales, other.scales);
  }
};

class Int8Case {
 public:
  Int8Case(int64_t in, int64_t out, int64_t rows)
      : in_(in),
        out_(out),
        rows_(rows),
        weight_(out * in),
        panels_(round_up(out, kWeightPanel) / kWeightPanel * (1 + steps()) * kStepBytes),
        bias_(out),
        scales_(out),
        x_(rows * in) {
    const bool at_ends = generator() % 3 == 0;      // sums as large as they become
    std::memset(panels_.data(), 0x55, kStepBytes);  // start values, which are not ours to read
    for (int64_t channel = 0; channel < out; ++channel) {
      int8_t* const panel = panels_.data() + channel / kWeightPanel * (1 + steps()) * kStepBytes;
      for (int64_t i = 0; i < in; ++i) {
        const int value =
            at_ends ? (generator() % 2 ? 127 : -127) : static_cast<int>(generator() % 255) - 127;
        weight_[channel * in + i] = static_cast<int8_t>(value);
        panel[(1 + i / kInt8Group) * kStepBytes + channel % kWeightPanel * kInt8Group + i % kInt8Group] =
            static_cast<int8_t>(value);
      }
      bias_[channel] = normal();
      scales_[channel] = 0.01f + std::abs(normal());
    }
    for (float& value : x_) value = at_ends ? (generator() % 2 ? 1.0f : -1.0f) : normal();
    if (generator() % 5 == 0) std::fill_n(x_.begin() + rows / 2 * in, in, 0.0f);
    const unsigned strange = generator() % 20;
    if (strange == 0) x_.back() = NAN;
    if (strange == 1) x_.back() = INFINITY;
  }

  std::string name() const {
    return std::to_string(rows_) + " rows, " + std::to_string(in_) + " to " + std::to_string(out_);
  }

  Int8Result run(const Int8Kernels& kernels, bool check_sums) const {
    const Int8LinearArgs args = {panels_.data(), bias_.data(), scales_.data(), in_, out_};
    const int64_t stored = round_up(rows_, 16);
    const int64_t stride = round_up(in_ * kernels.quantized_bytes + kernels.tail_bytes, 64);
    const int64_t out_stride = round_up(out_ * kernels.quantized_bytes + kernels.tail_bytes, 64);
    const int64_t inner_stride = round_up(out_, kWeightPanel);
    const AtEnd<uint8_t> bytes(stored * stride), out_bytes(stored * out_stride);
    const AtEnd<float> row_scales(stored), out_scales(stored), inner(rows_ * inner_stride);
    const AtEnd<float> linear(rows_ * out_);
    const NarrowRows x = {bytes.data(), stride, row_scales.data()};
    const NarrowRows gelu = {out_bytes.data(), out_stride, out_scales.data()};
    std::memset(bytes.data(), 0xaa, static_cast<size_t>(stored * stride));
    kernels.quantize(x_.data(), in_, rows_, in_, x);
    kernels.linear(args, x, rows_, Finish::kBias, linear.data(), out_);
    kernels.linear_gelu(args, x, rows_, Finish::kBiasGelu, out_, inner.data(), inner_stride, gelu);
    if (check_sums) check(x, linear.data());
    Int8Result result;
    result.linear.assign(linear.data(), linear.data() + rows_ * out_);
    result.scales.assign(out_scales.data(), out_scales.data() + rows_);
    for (int64_t row = 0; row < rows_; ++row) {
      const uint8_t* const values = out_bytes.data() + row * out_stride;
      result.bytes.insert(result.bytes.end(), values, values + round_up(out_, kInt8Group));
    }
    return result;
  }

 private:
  int64_t steps() const { return (in_ + kInt8Group - 1) / kInt8Group; }

  void check(const NarrowRows& x, const float* found) const {
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t channel = 0; channel < out_; ++channel) {
        int32_t sum = 0;
        for (int64_t i = 0; i < in_; ++i) {
          sum += static_cast<int8_t>(x.bytes[row * x.stride + i]) * weight_[channel * in_ + i];
        }
        const double expected = static_cast<double>(sum) * scales_[channel] * x.scales[row] + bias_[channel];
        const double error = std::abs(found[row * out_ + channel] - expected);
        require(!std::isfinite(expected) || error <= 1e-5 * (1 + std::abs(expected)), "a sum of " + name());
      }
    }
  }

  int64_t in_, out_, rows_;
  std::vector<int8_t> weight_;
  AtEnd<int8_t> panels_;
  AtEnd<float> bias_, scales_;
  std::vector<float> x_;
};

void check_int8(const std::vector<const Int8Kernels*>& tables) {
  for (const int64_t in : Sizes{1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 15, 16, 17, 20, 31, 32, 33, 64, 100, 387}) {
    for (const int64_t out : Sizes{1, 7, 8, 9, 15, 16, 17, 24, 25, 31, 32, 33, 49, 65, 96}) {
      for (const int64_t rows : Sizes{1, 2, 3, 5, 7, 8, 9, 13, 16, 33, 48}) {
        const Int8Case sizes(in, out, rows);
        const Int8Result expected = sizes.run(*tables.front(), true);
        for (const Int8Kernels* kernels : tables) {
          require(sizes.run(*kernels, false) == expected, kernels->capability + (": " + sizes.name()));
        }
      }
    }
  }
}

double gelu(double x) {
  return x * std::erfc(-x / std::sqrt(2.0)) / 2;
}

void check_linear(int64_t in, int64_t out, int64_t rows, Finish finish) {
  const bool gated = finish == Finish::kBiasGeglu;
  const int64_t channels = gated ? round_up(out, kWeightPanel) : out;
  const int64_t columns = gated ? channels / 2 : channels;
  const AtEnd<float> panels(round_up(channels, kWeightPanel) * in), bias(channels), x(rows * in);
  const AtEnd<float> found(rows * columns);
  for (int64_t i = 0; i < round_up(channels, kWeightPanel) * in; ++i) {
    const bool filling = i / (in * kWeightPanel) * kWeightPanel + i % kWeightPanel >= channels;
    panels[i] = filling ? 0.0f : normal();
  }
  fill(bias.data(), channels);
  fill(x.data(), rows * in);
  DEFAULT::table.linear({panels.data(), bias.data(), in, channels}, x.data(), in, rows, finish, found.data(),
                        columns);
  const auto product = [&](int64_t row, int64_t channel) {
    const float* const panel = panels.data() + channel / kWeightPanel * in * kWeightPanel;
    double sum = bias[channel];
    for (int64_t i = 0; i < in; ++i) {
      sum += static_cast<double>(x[row * in + i]) * panel[i * kWeightPanel + channel % kWeightPanel];
    }
    return sum;
  };
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t gate = column / kGatedUnits * kWeightPanel + column % kGatedUnits;
      const double expected = gated ? gelu(product(row, gate)) * product(row, gate + kGatedUnits)
                              : finish == Finish::kBias ? product(row, column)
                                                        : gelu(product(row, column));
      const double error = std::abs(found[row * columns + column] - expected);
      require(error <= 2e-5 * (1 + std::abs(expected)) * std::sqrt(static_cast<double>(in)),
              "linear of " + std::to_string(rows) + " rows, " + std::to_string(in) + " to " +
                  std::to_string(out));
    }
  }
}

void check_attention(const Sizes& lengths, int64_t heads, int64_t head_dim, int64_t window) {
  std::vector<int32_t> bounds = {0};
  for (const int64_t length : lengths) bounds.push_back(bounds.back() + static_cast<int32_t>(length));
  const int64_t tokens = bounds.back(), width = heads * head_dim;
  const AtEnd<float> qkv(tokens * 3 * width), context(tokens * width);
  fill(qkv.data(), tokens * 3 * width);
  AttentionArgs args = {qkv.data(),
                        3 * width,
                        bounds.data(),
                        static_cast<int64_t>(lengths.size()),
                        heads,
                        head_dim,
                        *std::max_element(lengths.begin(), lengths.end()),
                        context.data()};
  args.window = window;
  int64_t cost = 0;
  for (const int64_t length : lengths) cost += heads * length * row_cost(args, length);
  const int64_t scratch = round_up(DEFAULT::table.attention.scratch(args) * 4, 64);
  float* const memory = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(scratch)));
  DEFAULT::table.attention.run(args, 0, cost, memory);
  std::free(memory);
  for (size_t i = 0; i < lengths.size(); ++i) {
    for (int64_t query = 0; query < lengths[i]; ++query) {
      for (int64_t head = 0; head < heads; ++head) {
        const auto part = [&](int64_t number, int64_t token) {
          return qkv.data() + (bounds[i] + token) * 3 * width + number * width + head * head_dim;
        };
        std::vector<double> expected(static_cast<size_t>(head_dim), 0.0);
        double total = 0;
        for (int64_t key = 0; key < lengths[i]; ++key) {
          if (window >= 0 && std::abs(key - query) > window) continue;
          double score = 0;
          for (int64_t c = 0; c < head_dim; ++c)
            score += static_cast<double>(part(0, query)[c]) * part(1, key)[c];
          const double weight = std::exp(score / std::sqrt(static_cast<double>(head_dim)));
          total += weight;
          for (int64_t c = 0; c < head_dim; ++c) expected[static_cast<size_t>(c)] += weight * part(2, key)[c];
        }
        for (int64_t c = 0; c < head_dim; ++c) {
          const float found = context[(bounds[i] + query) * width + head * head_dim + c];
          require(std::abs(found - expected[static_cast<size_t>(c)] / total) <= 1e-5,
                  "attention with heads of " + std::to_string(head_dim));
        }
      }
    }
  }
}

void check_layer_norm(int64_t hidden, float mean) {
  const AtEnd<float> first(hidden), second(hidden), third(hidden), weight(hidden), bias(hidden), out(hidden);
  for (const AtEnd<float>* each : {&first, &second, &third, &weight, &bias}) fill(each->data(), hidden);
  for (int64_t i = 0; i < hidden; ++i) first[i] = std::round(first[i] * 64) / 64 + mean;
  DEFAULT::table.layer_norm_row({weight.data(), bias.data(), hidden, 1e-5f}, first.data(), second.data(),
                                third.data(), out.data());
  const auto value = [&](int64_t i) { return static_cast<double>(first[i]) + second[i] + third[i]; };
  double average = 0, variance = 0;
  for (int64_t i = 0; i < hidden; ++i) average += value(i) / static_cast<double>(hidden);
  for (int64_t i = 0; i < hidden; ++i)
    variance += std::pow(value(i) - average, 2) / static_cast<double>(hidden);
  for (int64_t i = 0; i < hidden; ++i) {
    const double expected = (value(i) - average) / std::sqrt(variance + 1e-5) * weight[i] + bias[i];
    require(std::abs(out[i] - expected) <= 2e-5 + 1e-5 * std::abs(mean),
            "LayerNorm of " + std::to_string(hidden));
  }
}

void check_rotation(int64_t heads, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  const AtEnd<float> row(heads * head_dim), turns(head_dim);
  fill(row.data(), heads * head_dim);
  fill(turns.data(), head_dim);
  const std::vector<float> before(row.data(), row.data() + heads * head_dim);
  DEFAULT::table.rotate_row(row.data(), heads, head_dim, turns.data());
  for (int64_t i = 0; i < heads * head_dim; ++i) {
    const int64_t channel = i % head_dim, angle = channel % half;
    const double sign = channel < half ? -1.0 : 1.0;
    const double other = before[static_cast<size_t>(channel < half ? i + half : i - half)];
    const double expected = static_cast<double>(before[static_cast<size_t>(i)]) * turns[angle] +
                            sign * other * turns[half + angle];
    require(std::abs(row[i] - expected) <= 1e-5, "a rotation of " + std::to_string(head_dim));
  }
}

void check_fp32() {
  for (const Finish finish : {Finish::kBias, Finish::kBiasGelu, Finish::kBiasGeglu}) {
    for (const int64_t in : Sizes{1, 3, 4, 17, 100}) {
      for (const int64_t out : Sizes{1, 4, 7, 8, 9, 31, 32, 65}) {
        for (const int64_t rows : Sizes{1, 3, 7, 8, 9, 16, 33}) check_linear(in, out, rows, finish);
      }
    }
  }
  for (const int64_t head_dim : Sizes{1, 4, 7, 8, 20, 32, 64}) {
    check_attention({1, 5, 0, 17, 63}, 2, head_dim, -1);
    check_attention({130, 3}, 1, head_dim, 9);
    if (head_dim > 1) check_rotation(3, head_dim / 2 * 2);
  }
  check_attention({530}, 1, 16, -1);  // more keys than a block
  for (const int64_t hidden : Sizes{1, 2, 3, 4, 5, 16, 90, 387}) {
    for (const float mean : {0.0f, 3.0f}) check_layer_norm(hidden, mean);
  }
}

}  // namespace
}  // namespace pruned_ops

int main() {
  using namespace pruned_ops;
  const ArmFeatures features = usable_arm_features();
  std::vector<const Int8Kernels*> tables = {&DEFAULT::int8_table};
  if (features.dotprod) tables.push_back(&NEON_DOTPROD::int8_table);
  if (features.i8mm) tables.push_back(&NEON_I8MM::int8_table);
  check_fp32();
  check_int8(tables);
  for (const Int8Kernels* kernels : tables) std::printf("%s\n", kernels->capability);
}
