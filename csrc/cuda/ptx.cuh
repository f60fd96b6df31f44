// The instructions that the kernels use beside plain C++, a function each: on a GPU the instruction, on the
// host the same done to the registers of an emulated warp. Layouts as in the PTX manual, "Matrix
// multiply-accumulate instructions" (mma.m16n8k16, ldmatrix).
//
// `line` is the caller's: a host thread that waits for others for ever says where.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dtype.cuh"
#include "launch.h"

namespace pruned_ops::cuda {

// 16 bytes: what a thread moves at once.
struct alignas(16) Bits128 {
  uint32_t words[4];
};

PRUNED_OPS_DEVICE float to_float(float x) {
  return x;
}

PRUNED_OPS_DEVICE float to_float(half x) {
#ifdef __CUDACC__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  return emulator::half_to_float(x.bits);
#endif
}

PRUNED_OPS_DEVICE float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
#endif
}

// Two numbers rounded to nearest even in one register, the first in its low half.
template <class T>
PRUNED_OPS_DEVICE uint32_t pack(float low, float high);

template <>
PRUNED_OPS_DEVICE uint32_t pack<half>(float low, float high) {
#ifdef __CUDACC__
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#else
  return static_cast<uint32_t>(emulator::float_to_half(high)) << 16 | emulator::float_to_half(low);
#endif
}

template <>
PRUNED_OPS_DEVICE uint32_t pack<bfloat16>(float low, float high) {
#ifdef __CUDACC__
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#else
  return static_cast<uint32_t>(emulator::float_to_bfloat16(high)) << 16 | emulator::float_to_bfloat16(low);
#endif
}

template <class T>
PRUNED_OPS_DEVICE T from_float(float x) {
  return T{static_cast<uint16_t>(pack<T>(x, 0.0f))};
}

template <>
PRUNED_OPS_DEVICE float from_float<float>(float x) {
  return x;
}

// 2^x, to about 2 ulp.
PRUNED_OPS_DEVICE float exp2_approx(float x) {
#ifdef __CUDACC__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

// 1 / x, to about 1 ulp.
PRUNED_OPS_DEVICE float reciprocal_approx(float x) {
#ifdef __CUDACC__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

// The smaller one; NaN if either is.
PRUNED_OPS_DEVICE float min_or_nan(float x, float y) {
#ifdef __CUDACC__
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
#else
  return std::isnan(x) || x < y ? x : y;
#endif
}

// 16 bytes at once from device memory, or to it; the address is a multiple of 16.
template <class T>
PRUNED_OPS_DEVICE Bits128 load_128(Global<const T> from) {
#ifdef __CUDACC__
  return *reinterpret_cast<const Bits128*>(from);
#else
  return from.template load<Bits128>();
#endif
}

template <class T>
PRUNED_OPS_DEVICE void store_128(Global<T> to, Bits128 value) {
#ifdef __CUDACC__
  *reinterpret_cast<Bits128*>(to) = value;
#else
  to.store(value);
#endif
}

// Two 16-bit numbers at once to shared or device memory; the address is a multiple of 4.
template <class T>
PRUNED_OPS_DEVICE void store_32(Shared<T> to, uint32_t value) {
#ifdef __CUDACC__
  *reinterpret_cast<uint32_t*>(to) = value;
#else
  to.store(value);
#endif
}

// All threads of the block have come here, and see what the others wrote.
PRUNED_OPS_DEVICE void sync_threads([[maybe_unused]] int line = __builtin_LINE()) {
#ifdef __CUDACC__
  __syncthreads();
#else
  emulator::sync_threads(line);
#endif
}

// The same for the 32 lanes of a warp.
PRUNED_OPS_DEVICE void sync_warp([[maybe_unused]] int line = __builtin_LINE()) {
#ifdef __CUDACC__
  __syncwarp();
#else
  emulator::sync_warp(line);
#endif
}

// The value that the lane has whose number differs in these bits.
PRUNED_OPS_DEVICE float shuffle_xor(float x, int bits, [[maybe_unused]] int line = __builtin_LINE()) {
#ifdef __CUDACC__
  return __shfl_xor_sync(0xffffffffu, x, bits);
#else
  return emulator::shuffle_xor(x, bits, line);
#endif
}

// Start copying 16 bytes to shared memory (zeros where not `inside`, and nothing is read); they are there
// after the wait for their group, for this thread, and for others after a barrier beside that.
template <class T>
PRUNED_OPS_DEVICE void cp_async_128(Shared<T> to, Global<const T> from, bool inside) {
#ifdef __CUDACC__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
#else
  emulator::cp_async_128(to, from, inside);
#endif
}

// End a group of copies.
PRUNED_OPS_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::cp_async_commit();
#endif
}

// Until at most PENDING of this thread's groups, the latest, are under way.
template <int PENDING>
PRUNED_OPS_DEVICE void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
  emulator::cp_async_wait(PENDING);
#endif
}

// Four 8 x 8 matrices of 16-bit numbers: lanes 8 i to 8 i + 7 point at the rows (16 bytes each) of matrix i,
// which comes to register i: lane l gets the numbers 2 (l % 4) and the next of row l / 4.
template <class T>
PRUNED_OPS_DEVICE void ldmatrix_x4(uint32_t (&registers)[4], Shared<const T> row,
                                   [[maybe_unused]] int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 2);
#ifdef __CUDACC__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
#else
  emulator::ldmatrix_x4(registers, row, false, line);
#endif
}

// The same, each matrix transposed: lane l gets number l / 4 of the rows 2 (l % 4) and the next.
template <class T>
PRUNED_OPS_DEVICE void ldmatrix_x4_transposed(uint32_t (&registers)[4], Shared<const T> row,
                                              [[maybe_unused]] int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 2);
#ifdef __CUDACC__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
#else
  emulator::ldmatrix_x4(registers, row, true, line);
#endif
}

// d (16 x 8, float) += a (16 x 16) times b (16 x 8), of T. With g = lane / 4 and t = lane % 4 a lane holds,
// two numbers of neighbouring columns (rows in b) in each register: of a, rows g, g + 8, g, g + 8 and columns
// 2 t, 2 t, 2 t + 8, 2 t + 8; of b, column g and rows 2 t, 2 t + 8; of d, rows g, g, g + 8, g + 8 and columns
// 2 t, 2 t + 1, 2 t, 2 t + 1.
template <class T>
PRUNED_OPS_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    [[maybe_unused]] int line = __builtin_LINE());

template <>
PRUNED_OPS_DEVICE void mma_m16n8k16<half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                          [[maybe_unused]] int line) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  emulator::mma_m16n8k16(d, a, b0, b1, [](uint16_t bits) { return to_float(half{bits}); }, line);
#endif
}

template <>
PRUNED_OPS_DEVICE void mma_m16n8k16<bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                              [[maybe_unused]] int line) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  emulator::mma_m16n8k16(d, a, b0, b1, [](uint16_t bits) { return to_float(bfloat16{bits}); }, line);
#endif
}

}  // namespace pruned_ops::cuda
