#include "planted.h"

#include "gelu.cuh"

namespace pruned_ops::cuda::planted {
namespace {

template <class T>
T* at(void* const* pointers, int i) {
  return static_cast<T*>(pointers[i]);
}
int number(const int64_t* numbers, int i) {
  return static_cast<int>(numbers[i]);
}

// to[i + shift] = from[i + shift] for the `count` first threads.
__global__ void copy(Global<float> to, Global<const float> from, int count, int shift) {
  const int i = static_cast<int>(block_index().x) * 32 + thread_index();
  if (i < count) to[i + shift] = from[i + shift];
}
const char* run_copy(void* const* pointers, const int64_t* numbers) {
  const int count = number(numbers, 0);
  return launch(copy, {static_cast<unsigned>(count + 31) / 32}, 32, 0, nullptr, at<float>(pointers, 0),
                at<const float>(pointers, 1), count, number(numbers, 1));
}

// 16 bytes from `from` on to `to` on.
__global__ void copy_128(Global<half> to, Global<const half> from, int shift_to, int shift_from) {
  if (thread_index() == 5) store_128<half>(to + shift_to, load_128<half>(from + shift_from));
}
const char* run_copy_128(void* const* pointers, const int64_t* numbers) {
  return launch(copy_128, {}, 32, 0, nullptr, at<half>(pointers, 0), at<const half>(pointers, 1),
                number(numbers, 0), number(numbers, 1));
}

// Every 16-bit number, from the block's and the thread's number: as float, and back.
template <class T>
__global__ void convert(Global<float> floats, Global<uint16_t> back) {
  const int i = static_cast<int>(block_index().x) * 1024 + thread_index();
  const float x = to_float(T{static_cast<uint16_t>(i)});
  floats[i] = x;
  back[i] = from_float<T>(x).bits;
}
const char* run_convert(void* const* pointers, const int64_t* numbers) {
  return launch(number(numbers, 0) ? convert<bfloat16> : convert<half>, {64}, 1024, 0, nullptr,
                at<float>(pointers, 0), at<uint16_t>(pointers, 1));
}

// Pairs of floats rounded to one register each.
template <class T>
__global__ void round_pairs(Global<uint32_t> to, Global<const float> from, int count) {
  const int i = static_cast<int>(block_index().x) * 1024 + thread_index();
  if (i < count) to[i] = pack<T>(from[2 * i], from[2 * i + 1]);
}
const char* run_round_pairs(void* const* pointers, const int64_t* numbers) {
  const int count = number(numbers, 1);
  return launch(number(numbers, 0) ? round_pairs<bfloat16> : round_pairs<half>,
                {static_cast<unsigned>(count + 1023) / 1024}, 1024, 0, nullptr, at<uint32_t>(pointers, 0),
                at<const float>(pointers, 1), count);
}

__global__ void gelus(Global<float> to, Global<const float> from) {
  const int i = static_cast<int>(block_index().x) * 1024 + thread_index();
  to[i] = gelu(from[i]);
}
const char* run_gelus(void* const* pointers, const int64_t* numbers) {
  return launch(gelus, {static_cast<unsigned>(numbers[0]) / 1024}, 1024, 0, nullptr, at<float>(pointers, 0),
                at<const float>(pointers, 1));
}

__global__ void shuffle(Global<float> to, Global<const float> from, int bits) {
  to[thread_index()] = shuffle_xor(from[thread_index()], bits);
}
const char* run_shuffle(void* const* pointers, const int64_t* numbers) {
  return launch(shuffle, {}, 64, 0, nullptr, at<float>(pointers, 0), at<const float>(pointers, 1),
                number(numbers, 0));
}

// Lane l points at row l of 32, `stride` numbers apart; four registers a lane.
__global__ void matrices(Global<uint32_t> to, Global<const half> from, int stride, bool transposed) {
  const Shared<half> memory = shared_memory<half>();
  const int lane = thread_index();
  store_128<half>(memory + lane * stride, load_128<half>(from + lane * 8));
  sync_threads();
  uint32_t registers[4];
  if (transposed) {
    ldmatrix_x4_transposed<half>(registers, memory + lane * stride);
  } else {
    ldmatrix_x4<half>(registers, memory + lane * stride);
  }
  for (int i = 0; i < 4; ++i) to[lane * 4 + i] = registers[i];
}
const char* run_matrices(void* const* pointers, const int64_t* numbers) {
  const int stride = number(numbers, 0);
  return launch(matrices, {}, 32, 32 * stride * 2, nullptr, at<uint32_t>(pointers, 0),
                at<const half>(pointers, 1), stride, number(numbers, 1) != 0);
}

// Registers of a lane: four of a, two of b, four of d.
template <class T>
__global__ void multiply(Global<float> d, Global<const uint32_t> a, Global<const uint32_t> b) {
  const int lane = thread_index();
  uint32_t own_a[4];
  float own_d[4];
  for (int i = 0; i < 4; ++i) own_a[i] = a[lane * 4 + i];
  for (int i = 0; i < 4; ++i) own_d[i] = d[lane * 4 + i];
  mma_m16n8k16<T>(own_d, own_a, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = own_d[i];
}
const char* run_multiply(void* const* pointers, const int64_t* numbers) {
  return launch(number(numbers, 0) ? multiply<bfloat16> : multiply<half>, {}, 32, 0, nullptr,
                at<float>(pointers, 0), at<const uint32_t>(pointers, 1), at<const uint32_t>(pointers, 2));
}

// What a thread sees of its 8 numbers: as they are unwritten, of two groups of copies before any wait, after
// the wait for the first, after the wait for both; and of zeros. The last copy is in no group.
__global__ void async(Global<uint16_t> to, Global<const half> from) {
  const Shared<half> memory = shared_memory<half>();
  const int thread = thread_index();
  int seen = 0;
  const auto look = [&](int slot) { to[thread * 8 + seen++] = memory[(slot * 32 + thread) * 8 + 7].bits; };
  look(0);
  memory[thread * 8 + 7] = half{1};
  cp_async_128<half>(memory + thread * 8, from + thread * 8, true);
  cp_async_commit();
  cp_async_128<half>(memory + (32 + thread) * 8, from + (32 + thread) * 8, true);
  cp_async_128<half>(memory + (64 + thread) * 8, from + 1000000, false);
  cp_async_commit();
  cp_async_128<half>(memory + (96 + thread) * 8, from + thread * 8, true);
  look(0);
  cp_async_wait<1>();
  look(0);
  look(1);
  cp_async_wait<0>();
  look(1);
  look(2);
  look(3);
  cp_async_commit();
  cp_async_wait<0>();
  look(3);
}
const char* run_async(void* const* pointers, const int64_t*) {
  return launch(async, {}, 32, 4 * 32 * 16, nullptr, at<uint16_t>(pointers, 0), at<const half>(pointers, 1));
}

// A block's numbers in reverse, by way of shared memory; with the barrier that it needs, or without.
__global__ void reverse(Global<float> to, Global<const float> from, int count, bool waits) {
  const Shared<float> memory = shared_memory<float>();
  const int thread = thread_index();
  memory[thread] = from[thread];
  if (waits) sync_threads();
  to[thread] = memory[count - 1 - thread];
}
const char* run_reverse(void* const* pointers, const int64_t* numbers) {
  const int count = number(numbers, 0);
  return launch(reverse, {}, count, count * 4, nullptr, at<float>(pointers, 0), at<const float>(pointers, 1),
                count, numbers[1] != 0);
}

// Threads part from `from` on: to another barrier, to another shuffle, to a shuffle others do not do, or for
// good.
enum Parting { kOtherBarrier, kOtherShuffle, kShuffle, kLeave };
__global__ void part(int from, int how) {
  const bool parts = thread_index() >= from;
  if (how == kOtherBarrier && parts) {
    sync_threads();
  } else if (how == kOtherShuffle && parts) {
    shuffle_xor(1.0f, 1);
  } else if (how == kOtherShuffle) {
    shuffle_xor(1.0f, 1);
  } else if (how == kShuffle && parts) {
    shuffle_xor(1.0f, 1);
  } else if (!parts || how != kLeave) {
    sync_threads();
  }
}
const char* run_part(void* const*, const int64_t* numbers) {
  return launch(part, {2}, 64, 0, nullptr, number(numbers, 0), number(numbers, 1));
}

// A number of shared memory that may not be there.
__global__ void touch(Global<float> to, int index) {
  if (thread_index() == 7) to[0] = shared_memory<float>()[index];
}
const char* run_touch(void* const* pointers, const int64_t* numbers) {
  return launch(touch, {}, 32, 128, nullptr, at<float>(pointers, 0), number(numbers, 0));
}

int descend(int depth) {
  volatile char frame[1000] = {};
  return depth == 0 ? 0 : descend(depth - 1) + frame[0];
}
__global__ void overflow(int depth) {
  if (thread_index() == 3) descend(depth);
}
const char* run_overflow(void* const*, const int64_t* numbers) {
  return launch(overflow, {}, 32, 0, nullptr, number(numbers, 0));
}

__global__ void nothing() {}
const char* run_nothing(void* const*, const int64_t* numbers) {
  return launch(nothing, {static_cast<unsigned>(numbers[0]), static_cast<unsigned>(numbers[1])},
                number(numbers, 2), number(numbers, 3), nullptr);
}

}  // namespace

const std::map<std::string, Host>& kernels() {
  static const std::map<std::string, Host> all = {
      {"copy", run_copy},         {"copy_128", run_copy_128},
      {"convert", run_convert},   {"round_pairs", run_round_pairs},
      {"shuffle", run_shuffle},   {"matrices", run_matrices},
      {"multiply", run_multiply}, {"async", run_async},
      {"reverse", run_reverse},   {"part", run_part},
      {"touch", run_touch},       {"overflow", run_overflow},
      {"nothing", run_nothing},   {"gelus", run_gelus}};
  return all;
}

}  // namespace pruned_ops::cuda::planted
