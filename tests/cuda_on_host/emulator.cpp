#include "launch.h"  // declares Grid and includes emulator.h

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>

#ifdef __x86_64__
// What a call must keep goes on the stack of the one that stops, and comes from the stack of the one that
// goes on. swapcontext does as much in fifty times the time: it makes a system call.
extern "C" void pruned_ops_change_stacks(void** from, void* to);
asm(R"(
  .text
  .type pruned_ops_change_stacks, @function
pruned_ops_change_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

namespace pruned_ops::cuda::emulator {

int current_thread = -1;
Grid current_block;
Buffer shared;
Statistics counted;
int fault = 0;

namespace {

constexpr int kWarps = kMaxThreads / kLanes;
constexpr size_t kPage = 4096;
// The kernels' frames are small; an exception needs some pages more. An odd number of pages, so that the
// stacks do not all fall into the same sets of the caches.
constexpr size_t kStack = 32 * kPage, kGuard = 5 * kPage;

const char* const kNames[] = {"nothing",     "sync_threads",           "sync_warp",   "shuffle_xor",
                              "ldmatrix_x4", "ldmatrix_x4_transposed", "mma_m16n8k16"};

// Where a fiber, or the host, goes on.
class Context {
 public:
#ifdef __x86_64__
  void begin(void (*entry)(), unsigned char* stack, size_t bytes) {
    // As if it had been called: the address it would return to lies at a multiple of 16, less 8.
    void** top = reinterpret_cast<void**>(stack + bytes) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    top_ = top - 6;
  }
  void change_to(Context& other) { pruned_ops_change_stacks(&top_, other.top_); }

 private:
  void* top_ = nullptr;
#else
  void begin(void (*entry)(), unsigned char* stack, size_t bytes) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void change_to(Context& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
#endif
};

struct Copy {
  uintptr_t to;
  unsigned char bytes[16];
};

struct Fiber {
  Context context;
  bool left = false;
  Operation waits_at = Operation::none;
  int line = 0;
  // Copies under way: all, and how many of them were issued before the end of each group.
  std::vector<Copy> copies;
  std::vector<size_t> groups;
};

struct Machine {
  Settings settings;
  std::vector<Statistics> launches;
  unsigned char* stacks = nullptr;
  std::unique_ptr<Fiber[]> fibers;
  const std::function<void()>* kernel = nullptr;
  Context host;
  std::string error;
  int threads = 0;
  Warp warps[kWarps];
  // A bit for each thread that may run, and one for each warp that has any.
  uint32_t runnable[kWarps];
  uint32_t runnable_warps = 0;
  int at_barrier = 0;
  // In random order: the threads from here on come first, for so many turns.
  int first = 0;
  int turns = 0;
  uint64_t random = 0;
  std::vector<unsigned char> shared_bytes;
} machine;

uint64_t draw() {  // splitmix64
  uint64_t z = machine.random += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

int lowest(uint32_t bits) {
  return __builtin_ctz(bits);
}
int highest(uint32_t bits) {
  return 31 - __builtin_clz(bits);
}

void set_runnable(int warp, uint32_t lanes) {
  machine.runnable[warp] = lanes;
  const uint32_t bit = 1u << warp;
  machine.runnable_warps = lanes ? machine.runnable_warps | bit : machine.runnable_warps & ~bit;
}

void stop_running() {
  const int warp = current_thread / kLanes;
  set_runnable(warp, machine.runnable[warp] & ~(1u << current_thread % kLanes));
}

// The first runnable thread at `first` or after, cyclically.
int runnable_from(int first) {
  const int warp = first / kLanes;
  if (const uint32_t lanes = machine.runnable[warp] & ~0u << first % kLanes)
    return warp * kLanes + lowest(lanes);
  const uint64_t after = machine.runnable_warps & ~1ull << warp;
  const int next = lowest(after ? static_cast<uint32_t>(after) : machine.runnable_warps);
  return next * kLanes + lowest(machine.runnable[next]);
}

// The thread whose turn it is; -1 if none may run.
int next_thread() {
  const uint32_t warps = machine.runnable_warps;
  if (!warps) return -1;
  switch (machine.settings.order) {
    case Order::ascending:
      return lowest(warps) * kLanes + lowest(machine.runnable[lowest(warps)]);
    case Order::descending:
      return highest(warps) * kLanes + highest(machine.runnable[highest(warps)]);
    default:
      break;
  }
  // Turns of all lengths: some warps go far ahead of others, some go side by side.
  if (machine.turns-- == 0) {
    const uint64_t drawn = draw();
    machine.turns = 1 << drawn % 12;
    machine.first = static_cast<int>((drawn >> 8) % machine.threads);
  }
  return runnable_from(machine.first);
}

void to_host() {
  machine.fibers[current_thread].context.change_to(machine.host);
}

void deliver(Fiber& fiber, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const Copy& copy = fiber.copies[i];
    std::memcpy(reinterpret_cast<void*>(copy.to), copy.bytes, sizeof(copy.bytes));
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + count);
}

// A fiber's whole life: the kernel once in every block.
void live() {
  for (;;) {
    try {
      (*machine.kernel)();
    } catch (const std::exception& error) {
      machine.error = error.what();
    }
    if (!machine.error.empty()) to_host();
    machine.fibers[current_thread].left = true;
    stop_running();
    wait();
  }
}

void make_stacks() {
  constexpr size_t bytes = kMaxThreads * (kGuard + kStack);
  void* memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw Error("no memory for the threads' stacks");
  machine.stacks = static_cast<unsigned char*>(memory);
  for (int i = 0; i < kMaxThreads; ++i)
    mprotect(machine.stacks + i * (kGuard + kStack) + kGuard, kStack, PROT_READ | PROT_WRITE);
  machine.fibers = std::make_unique<Fiber[]>(kMaxThreads);
}

void prepare(int thread) {
  unsigned char* stack = machine.stacks + thread * (kGuard + kStack) + kGuard;
  // Tops at different places of their pages, for the caches' sake.
  machine.fibers[thread].context.begin(live, stack, kStack - thread % 59 * 64);
}

struct sigaction previous_action;

// A fault in the guard below a stack is that thread's error; any other is what it was.
void on_fault(int, siginfo_t* info, void*) {
  const size_t offset = static_cast<unsigned char*>(info->si_addr) - machine.stacks;
  if (current_thread >= 0 && offset < kMaxThreads * (kGuard + kStack) &&
      offset % (kGuard + kStack) < kGuard) {
    machine.error = "stack overflow";
    to_host();
  }
  sigaction(SIGSEGV, &previous_action, nullptr);
}

// While it lives, faults come to on_fault, on a stack of their own.
class FaultsCaught {
 public:
  FaultsCaught() : stack_(64 * 1024) {
    stack_t stack{};
    stack.ss_sp = stack_.data();
    stack.ss_size = stack_.size();
    sigaltstack(&stack, &previous_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_action);
  }
  ~FaultsCaught() {
    sigaction(SIGSEGV, &previous_action, nullptr);
    sigaltstack(&previous_stack_, nullptr);
  }

 private:
  std::vector<unsigned char> stack_;
  stack_t previous_stack_;
};

std::string place(const Grid& grid) {
  return "(" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) + ")";
}

std::string where() {
  std::string text = machine.settings.name;
  if (machine.launches.size() > 1) text += " (launch " + std::to_string(machine.launches.size()) + ")";
  if (current_thread < 0) return text + ": ";
  return text + ", block " + place(current_block) + ", thread " + std::to_string(current_thread) + ": ";
}

std::string at(Operation operation, int line) {
  return std::string(kNames[static_cast<int>(operation)]) + " at line " + std::to_string(line);
}

// "threads 0 to 31 wait for sync_threads at line 7; thread 32 left", of threads that are no longer runnable.
std::string waiting(int first, int count) {
  std::string text;
  for (int begin = first, end; begin < first + count; begin = end) {
    const Fiber& fiber = machine.fibers[begin];
    const auto same = [&](const Fiber& other) {
      return fiber.left ? other.left
                        : !other.left && other.waits_at == fiber.waits_at && other.line == fiber.line;
    };
    for (end = begin + 1; end < first + count && same(machine.fibers[end]);) ++end;
    const bool one = end == begin + 1;
    text += (text.empty() ? "thread" : "; thread") + std::string(one ? " " : "s ") + std::to_string(begin);
    if (!one) text += " to " + std::to_string(end - 1);
    text += fiber.left ? " left" : (one ? " waits for " : " wait for ") + at(fiber.waits_at, fiber.line);
  }
  return text;
}

void run_block() {
  const int warps = machine.threads / kLanes;
  std::fill_n(reinterpret_cast<unsigned char*>(shared.begin), shared.bytes, 0xff);
  machine.at_barrier = machine.turns = 0;
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.left = false;
    fiber.copies.clear();
    fiber.groups.clear();
  }
  for (int i = 0; i < warps; ++i) {
    machine.warps[i].arrived = 0;
    set_runnable(i, ~0u);
  }
  current_thread = next_thread();
  machine.host.change_to(machine.fibers[current_thread].context);
  if (machine.error == "stack overflow") machine.error = where() + machine.error;
  current_thread = -1;
  const auto left = [](const Fiber& fiber) { return fiber.left; };
  if (machine.error.empty() && !std::all_of(&machine.fibers[0], &machine.fibers[machine.threads], left))
    machine.error =
        where() + "block " + place(current_block) + " waits for ever: " + waiting(0, machine.threads);
  if (machine.error.empty()) return;
  // The stacks are left as they are: kernels own nothing.
  for (int i = 0; i < machine.threads; ++i) prepare(i);
  throw Error(std::exchange(machine.error, {}));
}

void check_launch(const Grid& grid, int threads, int shared_bytes) {
  if (threads < kLanes || threads > kMaxThreads || threads % kLanes != 0)
    fail(std::to_string(threads) + " threads in a block; a multiple of 32 up to 1024 is needed");
  if (shared_bytes < 0 || shared_bytes > kMaxShared)
    fail(std::to_string(shared_bytes) + " bytes of shared memory; an sm_80 has " +
         std::to_string(kMaxShared));
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535u || grid.z > 65535u)
    fail("a grid of " + place(grid) + " blocks; 1 to (2147483647, 65535, 65535) are needed");
}

}  // namespace

void set(Settings settings) {
  machine.settings = std::move(settings);
  machine.random = machine.settings.seed;
  machine.launches.clear();
}

int multiprocessors() {
  return machine.settings.multiprocessors;
}

const std::vector<Statistics>& statistics() {
  return machine.launches;
}

void run(Grid grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  counted = {};
  counted.grid = grid;
  counted.threads = threads;
  counted.shared_bytes = shared_bytes;
  machine.launches.push_back(counted);
  check_launch(grid, threads, shared_bytes);
  if (!machine.stacks) {
    make_stacks();
    for (int i = 0; i < kMaxThreads; ++i) prepare(i);
  }
  machine.kernel = &kernel;
  machine.threads = threads;
  machine.shared_bytes.resize(shared_bytes + 128);
  const uintptr_t raw = reinterpret_cast<uintptr_t>(machine.shared_bytes.data());
  shared = {"shared memory", (raw + 127) / 128 * 128, static_cast<size_t>(shared_bytes), true};

  const FaultsCaught caught;
  std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (machine.settings.order == Order::descending) std::reverse(blocks.begin(), blocks.end());
  if (machine.settings.order == Order::random)
    for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[draw() % i]);
  for (const uint64_t block : blocks) {
    current_block = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                     static_cast<unsigned>(block / grid.x / grid.y)};
    run_block();
  }
  machine.launches.back() = counted;
}

void fail(const std::string& what) {
  throw Error(where() + what);
}

void fail_access(const Buffer* buffer, uintptr_t address, size_t item, size_t bytes, size_t alignment,
                 Access kind) {
  const char* const verbs[] = {"reads ", "writes ", "reads or writes "};
  const std::string access = verbs[static_cast<int>(kind)] + std::to_string(bytes) + " bytes ";
  if (!buffer) fail(access + "through a null pointer");
  const int64_t offset = static_cast<int64_t>(address - buffer->begin);
  const std::string index =
      "index " + std::to_string(offset / static_cast<int64_t>(item)) + " of " + buffer->name;
  if (offset < 0 || offset + bytes > buffer->bytes)
    fail(access + "at " + index + ", which has " + std::to_string(buffer->bytes / item));
  if (address % alignment != 0)
    fail(access + "at " + index + ", which is not aligned to " + std::to_string(alignment) + " bytes");
  fail(access + "at " + index + ", which is read-only");
}

const Buffer* find_buffer(uintptr_t address, bool writes) {
  const Buffer* found = nullptr;
  int best = 0;
  for (const Buffer& buffer : machine.settings.buffers) {
    if (address < buffer.begin || address > buffer.begin + buffer.bytes) continue;
    const bool inside = address < buffer.begin + buffer.bytes;
    const int rank = 1 + (address == buffer.begin) + 2 * inside + 4 * (writes && buffer.writable);
    if (rank > best) {
      best = rank;
      found = &buffer;
    }
  }
  if (!found) fail("a pointer to memory that is none of the kernel's buffers");
  return found;
}

Warp* arrive(Operation operation, int line, void* lane) {
  const int index = current_thread % kLanes;
  Warp& warp = machine.warps[current_thread / kLanes];
  if (warp.arrived && (warp.operation != operation || warp.line != line))
    fail("comes to " + at(operation, line) + ", others of its warp wait for " +
         at(warp.operation, warp.line));
  Fiber& fiber = machine.fibers[current_thread];
  fiber.waits_at = warp.operation = operation;
  fiber.line = warp.line = line;
  warp.lanes[index] = lane;
  warp.arrived |= 1u << index;
  stop_running();
  return warp.arrived == ~0u ? &warp : nullptr;
}

void release(Warp& warp) {
  warp.arrived = 0;
  set_runnable(static_cast<int>(&warp - machine.warps), ~0u);
}

void wait() {
  const int next = next_thread();
  if (next == current_thread) return;
  if (next < 0) return to_host();
  Context& own = machine.fibers[current_thread].context;
  current_thread = next;
  own.change_to(machine.fibers[next].context);
}

void sync_threads(int line) {
  Fiber& fiber = machine.fibers[current_thread];
  fiber.waits_at = Operation::sync_threads;
  fiber.line = line;
  stop_running();
  if (++machine.at_barrier == machine.threads) {
    // Every thread waits here, so each of them says at which barrier.
    for (int i = 0; i < machine.threads; ++i)
      if (machine.fibers[i].line != line) fail("a barrier of two places: " + waiting(0, machine.threads));
    machine.at_barrier = 0;
    ++counted.barriers;
    for (int i = 0; i < machine.threads / kLanes; ++i) set_runnable(i, ~0u);
  }
  wait();
}

void sync_warp(int line) {
  if (Warp* warp = arrive(Operation::sync_warp, line, nullptr)) release(*warp);
  wait();
}

float shuffle_xor(float x, int bits, int line) {
  struct Lane {
    float x;
    int bits;
    float result;
  } lane{x, bits, 0.0f};
  if (bits < 0 || bits >= kLanes)
    fail("shuffle_xor by " + std::to_string(bits) + " at line " + std::to_string(line));
  if (Warp* warp = arrive(Operation::shuffle_xor, line, &lane)) {
    Lane* lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<Lane*>(warp->lanes[i]);
    for (int i = 0; i < kLanes; ++i) lanes[i]->result = lanes[i ^ lanes[i]->bits]->x;
    ++counted.shuffles;
    release(*warp);
  }
  wait();
  return lane.result;
}

void copy_async(uintptr_t to, const void* from) {
  Copy copy{to, {}};
  if (from) std::memcpy(copy.bytes, from, sizeof(copy.bytes));
  machine.fibers[current_thread].copies.push_back(copy);
  // From now on until it is waited for, what is there may be the old or the new.
  std::memset(reinterpret_cast<void*>(to), 0xff, sizeof(copy.bytes));
  ++counted.async_copies;
}

void cp_async_commit() {
  Fiber& fiber = machine.fibers[current_thread];
  fiber.groups.push_back(fiber.copies.size());
}

void cp_async_wait(int pending) {
  Fiber& fiber = machine.fibers[current_thread];
  if (static_cast<int>(fiber.groups.size()) <= pending) return;
  const auto end = fiber.groups.end() - pending;
  const size_t count = *(end - 1);
  deliver(fiber, count);
  fiber.groups.erase(fiber.groups.begin(), end);
  for (size_t& group : fiber.groups) group -= count;
}

void load_matrices(const Warp& warp, bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint16_t* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = static_cast<MatrixLane*>(warp.lanes[8 * matrix + i])->row;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t low = transposed ? rows[column][row] : rows[row][column];
      const uint32_t high = transposed ? rows[column + 1][row] : rows[row][column + 1];
      static_cast<MatrixLane*>(warp.lanes[lane])->registers[matrix] = low | high << 16;
    }
    // 128 bytes come in one pass: different rows at the same place of them need one each.
    int rows_at[8] = {};
    for (int i = 0; i < 8; ++i)
      if (std::find(rows, rows + i, rows[i]) == rows + i)
        ++rows_at[reinterpret_cast<uintptr_t>(rows[i]) / 16 % 8];
    const int passes = *std::max_element(rows_at, rows_at + 8);
    counted.bank_conflicts += passes - 1;
  }
  ++counted.matrix_loads;
}

void gather_factors(const Warp& warp, uint16_t (&a)[16][16], uint16_t (&b)[16][8]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto* registers = static_cast<const MultiplyLane*>(warp.lanes[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i)
      std::memcpy(&a[group + 8 * (i % 2)][pair + 8 * (i / 2)], &registers->a[i], sizeof(uint32_t));
    for (int i = 0; i < 2; ++i)
      for (int half = 0; half < 2; ++half)
        b[pair + 8 * i + half][group] = static_cast<uint16_t>(registers->b[i] >> 16 * half);
  }
}

void multiply(const Warp& warp, const float (&a)[16][16], const float (&b)[16][8]) {
  float sums[16][8] = {};
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) sums[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < kLanes; ++lane) {
    float* d = static_cast<MultiplyLane*>(warp.lanes[lane])->d;
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) d[i] += sums[group + 8 * (i / 2)][pair + i % 2];
  }
  ++counted.multiplications;
}

}  // namespace pruned_ops::cuda::emulator
