// Op attention: softmax attention within each sequence of a packed batch.
//
// A block owns one head of 64 query rows of one sequence, a warp 16 of them. It keeps the queries, the
// running maximum and sum, and the context in registers while 64 keys and values at a time pass through
// shared memory, the next ones on their way meanwhile (flash attention's online softmax, in powers of 2), and
// writes the rows' context.
#include <cfloat>

#include "kernels.h"
#include "tile.cuh"

namespace pruned_ops::cuda {
namespace {

constexpr int kQueries = 64;
constexpr int kKeys = 64;
constexpr int kWarpQueries = 16;
constexpr int kThreads = kQueries / kWarpQueries * 32;

// Shared memory: the queries (their context, at the end), and two of each, keys and values.
template <class T, int HEAD_DIM>
struct Memory {
  using Queries = Tile<T, kQueries, HEAD_DIM>;
  using Keys = Tile<T, kKeys, HEAD_DIM>;
  static constexpr int kBytes = Queries::kBytes + 4 * Keys::kBytes;
  // Blocks of a multiprocessor: what registers allow (128, 168, 255 a thread), and 163 KiB of memory.
  static constexpr int kBlocks = HEAD_DIM == 32 ? 4 : HEAD_DIM == 64 ? 3 : 2;
  static_assert(kBlocks * (kBytes + 1024) <= 164 * 1024);

  Shared<T> base = shared_memory<T>();

  PRUNED_OPS_DEVICE Queries queries() const { return {base}; }
  PRUNED_OPS_DEVICE Keys keys(int buffer) const {
    return {base + (Queries::kNumbers + buffer * Keys::kNumbers)};
  }
  PRUNED_OPS_DEVICE Keys values(int buffer) const { return keys(2 + buffer); }
};

// One warp's 16 query rows. Of scores and context a lane holds rows g and g + 8 (g = lane / 4), of both a
// maximum and its part of the sum.
template <class T, int HEAD_DIM>
struct Rows {
  using Queries = typename Memory<T, HEAD_DIM>::Queries;
  using Keys = typename Memory<T, HEAD_DIM>::Keys;
  uint32_t query[HEAD_DIM / 16][4];
  float context[HEAD_DIM / 8][4];
  float maximum[2] = {-FLT_MAX, -FLT_MAX};  // of scores; finite, so that differences are numbers
  float total[2] = {0.0f, 0.0f};

  PRUNED_OPS_DEVICE Rows(Queries queries, int first) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; ++i) queries.read_a(query[i], first, 2 * i);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) context[i][j] = 0.0f;
    }
  }

  // The first `count` keys of a tile. WHOLE: all of them; otherwise those after are left out, 16 at a time.
  template <bool WHOLE>
  PRUNED_OPS_DEVICE void absorb(Keys keys, Keys values, int count, float scale) {
    float scores[kKeys / 8][4];
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[i][j] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      if (!WHOLE && 16 * i >= count) break;
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 16; ++j) {
        uint32_t key[4];
        keys.read_b(key, 16 * i, 2 * j);
        mma_m16n8k16<T>(scores[2 * i], query[j], key[0], key[1]);
        mma_m16n8k16<T>(scores[2 * i + 1], query[j], key[2], key[3]);
      }
    }
    if (!WHOLE) mask(scores, count);
    weigh(scores, scale);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      if (!WHOLE && 16 * i >= count) break;
      // Where a lane holds numbers of d is where it holds those of a.
      const uint32_t weight[4] = {pack<T>(scores[2 * i][0], scores[2 * i][1]),
                                  pack<T>(scores[2 * i][2], scores[2 * i][3]),
                                  pack<T>(scores[2 * i + 1][0], scores[2 * i + 1][1]),
                                  pack<T>(scores[2 * i + 1][2], scores[2 * i + 1][3])};
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 16; ++j) {
        uint32_t value[4];
        values.read_b_by_rows(value, 16 * i, 2 * j);
        mma_m16n8k16<T>(context[2 * j], weight, value[0], value[1]);
        mma_m16n8k16<T>(context[2 * j + 1], weight, value[2], value[3]);
      }
    }
  }

  // Keys from `count` on weigh nothing.
  static PRUNED_OPS_DEVICE void mask(float (&scores)[kKeys / 8][4], int count) {
    const int column = thread_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (8 * i + column + j % 2 >= count) scores[i][j] = -INFINITY;
      }
    }
  }

  // Scores to weights against the maximum so far; what was summed against an earlier one shrinks. The maximum
  // is subtracted first, which is exact where it matters: a product with the scale is rounded, of large
  // scores by more than an exponent can hold.
  PRUNED_OPS_DEVICE void weigh(float (&scores)[kKeys / 8][4], float scale) {
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      float highest = scores[0][2 * half_row];
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        highest = fmaxf(highest, fmaxf(scores[i][2 * half_row], scores[i][2 * half_row + 1]));
      }
      // The four lanes that share a row.
      highest = fmaxf(highest, shuffle_xor(highest, 1));
      highest = fmaxf(highest, shuffle_xor(highest, 2));
      highest = fmaxf(maximum[half_row], highest);
      const float shrink = exp2_approx((maximum[half_row] - highest) * scale);
      maximum[half_row] = highest;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
        for (int j = 2 * half_row; j < 2 * half_row + 2; ++j) {
          scores[i][j] = exp2_approx((scores[i][j] - highest) * scale);
          sum += scores[i][j];
        }
      }
      total[half_row] = total[half_row] * shrink + sum;
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 8; ++i) {
        context[i][2 * half_row] *= shrink;
        context[i][2 * half_row + 1] *= shrink;
      }
    }
  }

  // The context of these rows to `out` by way of the queries' place, to write 16 bytes a lane.
  PRUNED_OPS_DEVICE void write(Queries place, int first, Global<T> out, int64_t stride, int rows) {
    const int lane = thread_index() % 32;
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      float sum = total[half_row];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      const float share = 1.0f / sum;
      const int row = first + lane / 4 + 8 * half_row;
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 8; ++i) {
        store_32<T>(place.at(row, i) + lane % 4 * 2,
                    pack<T>(context[i][2 * half_row] * share, context[i][2 * half_row + 1] * share));
      }
    }
    sync_warp();
#pragma unroll
    for (int i = 0; i < kWarpQueries * HEAD_DIM / kChunk / 32; ++i) {
      const int row = first + (i * 32 + lane) / (HEAD_DIM / kChunk);
      const int chunk = (i * 32 + lane) % (HEAD_DIM / kChunk);
      if (row < rows) store_128<T>(out + (row * stride + chunk * kChunk), load_128<T>(place.at(row, chunk)));
    }
  }
};

// tiles: of the longest sequence's queries; those beyond a sequence's end have nothing to do.
template <class T, int HEAD_DIM>
__global__ void __launch_bounds__(kThreads, Memory<T, HEAD_DIM>::kBlocks)
    attention_kernel(Global<const T> qkv, Global<const int32_t> cu_seqlens, Global<T> out, int tokens,
                     int tiles, int num_heads, int64_t stride, float scale) {
  const int sequence = static_cast<int>(block_index().x) / tiles;
  const int first = static_cast<int>(block_index().x) % tiles * kQueries;
  // Clamped: a wrong cu_seqlens must never lead outside the tensors.
  const int begin = min(max(cu_seqlens[sequence], 0), tokens);
  const int length = min(max(cu_seqlens[sequence + 1], begin), tokens) - begin;
  if (first >= length) return;

  const int width = num_heads * HEAD_DIM;
  const int column = static_cast<int>(block_index().y) * HEAD_DIM;
  const Global<const T> own = qkv + (begin * stride + column);
  const Memory<T, HEAD_DIM> memory;
  const auto copy_keys = [&](int key) {
    const int buffer = key / kKeys % 2;
    const Global<const T> from = own + key * stride;
    memory.keys(buffer).template copy_async<kThreads>(from + width, stride, length - key, HEAD_DIM);
    memory.values(buffer).template copy_async<kThreads>(from + 2 * width, stride, length - key, HEAD_DIM);
    cp_async_commit();
  };
  memory.queries().template copy_async<kThreads>(own + first * stride, stride, length - first, HEAD_DIM);
  copy_keys(0);
  cp_async_wait<0>();
  sync_threads();

  const int warp_first = thread_index() / 32 * kWarpQueries;
  const bool works = first + warp_first < length;  // a warp beyond the end only copies
  Rows<T, HEAD_DIM> rows(memory.queries(), warp_first);
  int key = 0;
  for (; key + kKeys < length; key += kKeys) {
    copy_keys(key + kKeys);
    const int buffer = key / kKeys % 2;
    if (works) rows.template absorb<true>(memory.keys(buffer), memory.values(buffer), kKeys, scale);
    cp_async_wait<0>();
    sync_threads();
  }
  if (works) {
    const int buffer = key / kKeys % 2;
    rows.template absorb<false>(memory.keys(buffer), memory.values(buffer), length - key, scale);
    const Global<T> to = out + (static_cast<int64_t>(begin + first) * width + column);
    rows.write(memory.queries(), warp_first, to, width, length - first);
  }
}

template <class T, int HEAD_DIM>
const char* start(const Attention& a, void* stream) {
  const int tiles = static_cast<int>((int64_t{a.max_seqlen} + kQueries - 1) / kQueries);
  const int64_t blocks = int64_t{tiles} * a.batch;
  if (blocks > kMostBlocks) {
    return "a launch has not so many blocks: give the longest sequence's length as max_seqlen, or fewer "
           "sequences at once";
  }
  const Grid grid = {static_cast<unsigned>(blocks), static_cast<unsigned>(a.num_heads)};
  const float scale =
      1.4426950408889634f / std::sqrt(static_cast<float>(HEAD_DIM));  // log2(e) / sqrt(head_dim)
  return launch(attention_kernel<T, HEAD_DIM>, grid, kThreads, Memory<T, HEAD_DIM>::kBytes, stream,
                static_cast<const T*>(a.qkv), a.cu_seqlens, static_cast<T*>(a.out), a.tokens, tiles,
                a.num_heads, a.stride_qkv, scale);
}

template <class T>
const char* start(const Attention& a, void* stream) {
  switch (a.head_dim) {
    case 32:
      return start<T, 32>(a, stream);
    case 64:
      return start<T, 64>(a, stream);
    case 128:
      return start<T, 128>(a, stream);
    default:
      return "head_dim is none of 32, 64 and 128";
  }
}

}  // namespace

const char* attention(const Attention& arguments, void* stream) {
  return visit_half(arguments.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return start<T>(arguments, stream);
  });
}

}  // namespace pruned_ops::cuda
