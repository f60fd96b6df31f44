// Op embed_layer_norm: LayerNorm(word[id] + token_type[type] + position[place]).
//
// A warp owns a token of up to 1024 numbers, a block a wider one; it gathers the three rows into registers,
// and writes their sum normalised. An id outside its table is taken as the nearest inside: nothing else is
// read.
#include "kernels.h"
#include "row_norm.cuh"

namespace pruned_ops::cuda {
namespace {

// An embedding table and a token's ids into it.
template <class T>
struct Table {
  Global<const int32_t> ids;
  Global<const int64_t> wide_ids;  // these where ids is null
  Global<const T> rows;
  int count;
  int64_t stride;

  PRUNED_OPS_DEVICE Global<const T> row(int token) const {
    const int64_t id = ids != nullptr ? ids[token] : wide_ids[token];
    const int64_t last = count - 1;
    return rows + (id < 0 ? 0 : id > last ? last : id) * stride;
  }
};

template <class T, int THREADS, bool ALIGNED>
__global__ void __launch_bounds__(row_block_threads<THREADS>(), row_blocks<THREADS>())
    embed_layer_norm_kernel(Table<T> word, Table<T> position, Table<T> token_type,
                            Global<const T> norm_weight, Global<const T> norm_bias, Global<T> out, int tokens,
                            int hidden, float eps) {
  const int token = row_index<THREADS>();
  if (token >= tokens) return;
  Row<T, THREADS, ALIGNED> row;
  row.load(word.row(token), hidden);
  row.add(token_type.row(token), hidden);  // the order of the sum is BERT's
  row.add(position.row(token), hidden);
  row.normalise(norm_weight, norm_bias, hidden, eps);
  row.store(out + static_cast<int64_t>(token) * hidden, hidden);
}

template <class T>
Table<T> table(const EmbedLayerNorm& a, int i) {
  return {a.wide_ids[i] ? nullptr : static_cast<const int32_t*>(a.ids[i]),
          a.wide_ids[i] ? static_cast<const int64_t*>(a.ids[i]) : nullptr, static_cast<const T*>(a.tables[i]),
          a.rows[i], a.strides[i]};
}

template <class T, int THREADS, bool ALIGNED>
const char* start(const EmbedLayerNorm& a, void* stream) {
  return launch(embed_layer_norm_kernel<T, THREADS, ALIGNED>, row_grid<THREADS>(a.tokens),
                row_block_threads<THREADS>(), row_shared_bytes<THREADS>(), stream, table<T>(a, 0),
                table<T>(a, 1), table<T>(a, 2), static_cast<const T*>(a.norm_weight),
                static_cast<const T*>(a.norm_bias), static_cast<T*>(a.out), a.tokens, a.hidden, a.eps);
}

template <class T>
const char* start(const EmbedLayerNorm& a, void* stream) {
  const int bytes = sizeof(T);
  bool aligned = is_aligned(a.norm_weight, 0, bytes) && is_aligned(a.norm_bias, 0, bytes) &&
                 is_aligned(a.out, a.hidden, bytes);
  for (int i = 0; i < 3; ++i) aligned = aligned && is_aligned(a.tables[i], a.strides[i], bytes);
  if (!aligned) return start<T, kBlockRow, false>(a, stream);
  return a.hidden <= kMaxWarpRow ? start<T, kWarpRow, true>(a, stream) : start<T, kBlockRow, true>(a, stream);
}

}  // namespace

const char* embed_layer_norm(const EmbedLayerNorm& arguments, void* stream) {
  return visit(arguments.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return start<T>(arguments, stream);
  });
}

}  // namespace pruned_ops::cuda
