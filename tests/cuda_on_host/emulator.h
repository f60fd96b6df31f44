// Runs CUDA kernels on the host, a thread of the GPU as a fiber: what launch.h and ptx.cuh need where there
// is no nvcc. Made to find faults, not to be fast: every access is checked, and threads run in chosen orders.
//
// Blocks run one after another. In a block the first runnable fiber of the order runs until it waits, so a
// warp is as far ahead of the others as barriers let it, and a missing barrier shows as a wrong or changing
// result. One launch at a time in a process.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace pruned_ops::cuda::emulator {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxShared = 163 * 1024;  // sm_80's, the least of the GPUs the kernels are compiled for

// What a kernel did wrong; says which kernel, block and thread.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Memory that a kernel may use.
struct Buffer {
  std::string name;
  uintptr_t begin = 0;
  size_t bytes = 0;
  bool writable = false;
};

enum class Order { ascending, descending, random };

// Of one launch. A bank conflict is a pass over shared memory that an ldmatrix needs beyond one for each
// matrix.
struct Statistics {
  Grid grid;
  int threads = 0, shared_bytes = 0;
  int64_t barriers = 0;  // sync_threads of a whole block
  int64_t shuffles = 0, multiplications = 0, matrix_loads = 0, bank_conflicts = 0;  // of a whole warp
  int64_t async_copies = 0;                                                         // of a thread
};

// What the launches that follow run under. `name` is what errors call the kernel. multiprocessors: of the
// GPU, for kernels that choose by how many there are.
struct Settings {
  std::string name;
  std::vector<Buffer> buffers;
  Order order = Order::ascending;
  uint64_t seed = 0;
  int multiprocessors = 1;
};
void set(Settings settings);
const Settings& settings();
// Of the launches since set().
const std::vector<Statistics>& statistics();

inline int multiprocessors() {
  return settings().multiprocessors;
}

// Runs the kernel in each thread of each block. Throws Error.
void run(Grid grid, int threads, int shared_bytes, const std::function<void()>& kernel);

// The thread that runs; -1 where the host does.
extern int current_thread;
extern Grid current_block;
extern Buffer shared;
extern Statistics counted;

// Which of the faults that a test wrote into a copy of the kernels is there; 0: none.
extern int fault;

inline int thread_index() {
  return current_thread;
}
inline Grid block_index() {
  return current_block;
}

// Throws Error with where it happened.
[[noreturn]] void fail(const std::string& what);
// What is done where a number lies; `either`: a reference is taken, to read it or to write it.
enum class Access { read, write, either };
[[noreturn]] void fail_access(const Buffer* buffer, uintptr_t address, size_t item, size_t bytes,
                              size_t alignment, Access access);
// The buffer that holds the address, one that may be written where it is asked for and there is one.
const Buffer* find_buffer(uintptr_t address, bool writes);

// Of its own, so that a call with pointers does not find this namespace's functions by itself.
namespace pointers {

// A pointer that knows its buffer: outside it may point, but not read or write.
template <class T>
class Pointer {
  static constexpr bool kWrites = !std::is_const_v<T>;
  static constexpr Access kAccess = kWrites ? Access::either : Access::read;

 public:
  Pointer() = default;
  Pointer(std::nullptr_t) {}
  Pointer(T* raw)
      : address_(reinterpret_cast<uintptr_t>(raw)), buffer_(raw ? find_buffer(address_, kWrites) : nullptr) {}
  Pointer(uintptr_t address, const Buffer* buffer) : address_(address), buffer_(buffer) {}

  operator Pointer<const T>() const { return {address_, buffer_}; }
  explicit operator bool() const { return address_ != 0; }
  friend bool operator==(Pointer pointer, std::nullptr_t) { return pointer.address_ == 0; }
  friend bool operator!=(Pointer pointer, std::nullptr_t) { return pointer.address_ != 0; }

  Pointer operator+(int64_t count) const { return {address_ + count * sizeof(T), buffer_}; }
  Pointer operator-(int64_t count) const { return {address_ - count * sizeof(T), buffer_}; }
  Pointer& operator+=(int64_t count) { return *this = *this + count; }
  Pointer& operator-=(int64_t count) { return *this = *this - count; }
  int64_t operator-(Pointer other) const {
    return static_cast<int64_t>(address_ - other.address_) / static_cast<int64_t>(sizeof(T));
  }

  T& operator*() const { return *reinterpret_cast<T*>(checked(sizeof(T), alignof(T), kAccess)); }
  T& operator[](int64_t index) const { return *(*this + index); }

  // Several numbers at once, as V.
  template <class V>
  V load() const {
    V value;
    std::memcpy(&value, reinterpret_cast<const void*>(checked(sizeof(V), alignof(V), Access::read)),
                sizeof(V));
    return value;
  }
  template <class V>
  void store(const V& value) const {
    static_assert(kWrites);
    std::memcpy(reinterpret_cast<void*>(checked(sizeof(V), alignof(V), Access::write)), &value, sizeof(V));
  }

  // The address, once these bytes there may be read, or written.
  uintptr_t checked(size_t bytes, size_t alignment, Access access) const {
    if (!buffer_ || address_ - buffer_->begin > buffer_->bytes ||
        buffer_->begin + buffer_->bytes - address_ < bytes || address_ % alignment != 0 ||
        (access != Access::read && !buffer_->writable))
      fail_access(buffer_, address_, sizeof(T), bytes, alignment, access);
    return address_;
  }
  bool is_shared() const { return buffer_ == &shared; }

 private:
  uintptr_t address_ = 0;
  const Buffer* buffer_ = nullptr;
};

}  // namespace pointers
using pointers::Pointer;

// Every block finds it full of NaN.
template <class T>
Pointer<T> shared_memory() {
  return {shared.begin, &shared};
}

// Where threads wait for each other. What a lane brings to an operation of its warp lies on its stack; the
// last lane to come does the operation for all.
enum class Operation {
  none,
  sync_threads,
  sync_warp,
  shuffle_xor,
  ldmatrix_x4,
  ldmatrix_x4_transposed,
  mma_m16n8k16
};
struct Warp {
  void* lanes[kLanes];
  uint32_t arrived = 0;
  Operation operation = Operation::none;
  int line = 0;
};
// The warp, for the last of its lanes; nullptr for the others.
Warp* arrive(Operation operation, int line, void* lane);
// Lanes may go on. Called by the last, after the operation.
void release(Warp& warp);
// Until this thread may go on.
void wait();

void sync_threads(int line);
void sync_warp(int line);
float shuffle_xor(float x, int bits, int line);

// `from` is nullptr for zeros.
void copy_async(uintptr_t to, const void* from);
void cp_async_commit();
void cp_async_wait(int pending);
// At a block's beginning.
void forget_copies(int threads);

template <class T>
void cp_async_128(Pointer<T> to, Pointer<const T> from, bool inside) {
  if (!to.is_shared()) fail("cp.async copies to shared memory only");
  if (inside && from.is_shared()) fail("cp.async copies from global memory only");
  copy_async(to.checked(16, 16, Access::write),
             inside ? reinterpret_cast<const void*>(from.checked(16, 16, Access::read)) : nullptr);
}

struct MatrixLane {
  const uint16_t* row;
  uint32_t* registers;
};
void load_matrices(const Warp& warp, bool transposed);

template <class T>
void ldmatrix_x4(uint32_t (&registers)[4], Pointer<const T> row, bool transposed, int line) {
  if (!row.is_shared()) fail("ldmatrix reads shared memory only");
  MatrixLane lane{reinterpret_cast<const uint16_t*>(row.checked(16, 16, Access::read)), registers};
  const Operation operation = transposed ? Operation::ldmatrix_x4_transposed : Operation::ldmatrix_x4;
  if (Warp* warp = arrive(operation, line, &lane)) {
    load_matrices(*warp, transposed);
    release(*warp);
  }
  wait();
}

struct MultiplyLane {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
// The lanes' registers as matrices of 16-bit numbers, and d += a b of them as floats.
void gather_factors(const Warp& warp, uint16_t (&a)[16][16], uint16_t (&b)[16][8]);
void multiply(const Warp& warp, const float (&a)[16][16], const float (&b)[16][8]);

template <class ToFloat>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, ToFloat to_float,
                  int line) {
  MultiplyLane lane{d, a, {b0, b1}};
  if (Warp* warp = arrive(Operation::mma_m16n8k16, line, &lane)) {
    uint16_t a_bits[16][16], b_bits[16][8];
    float a_floats[16][16], b_floats[16][8];
    gather_factors(*warp, a_bits, b_bits);
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k) a_floats[i][k] = to_float(a_bits[i][k]);
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) b_floats[k][j] = to_float(b_bits[k][j]);
    multiply(*warp, a_floats, b_floats);
    release(*warp);
  }
  wait();
}

inline float float_of(uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
inline uint32_t bits_of(float x) {
  uint32_t result;
  std::memcpy(&result, &x, sizeof(result));
  return result;
}

// Plain arithmetic, which the compiler turns into vectors.
inline float half_to_float(uint16_t bits) {
  const uint32_t magnitude = (bits & 0x7fffu) << 13;
  // The exponents' biases differ by 112; a subnormal number becomes a normal one.
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t result = magnitude < 0x7c00u << 13 ? finite : magnitude | 0x7f800000u;
  return float_of(result | (bits & 0x8000u) << 16);
}

// To nearest even; NaN stays NaN.
inline uint16_t float_to_half(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7fffu;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the sum's last bit is 2^-24
    result = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    result = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  }
  return static_cast<uint16_t>(result | (bits >> 16 & 0x8000u));
}

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace pruned_ops::cuda::emulator
