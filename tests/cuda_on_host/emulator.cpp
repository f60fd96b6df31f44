#include <algorithm>
#include <numeric>
#include <utility>

#include "fibers.h"
#include "launch.h"  // declares Grid and includes emulator.h

namespace pruned_ops::cuda::emulator {

int current_thread = -1;
Grid current_block;
Buffer shared;
Statistics counted;
int fault = 0;

namespace {

constexpr int kWarps = kMaxThreads / kLanes;

const char* const kNames[] = {"nothing",     "sync_threads",           "sync_warp",   "shuffle_xor",
                              "ldmatrix_x4", "ldmatrix_x4_transposed", "mma_m16n8k16"};

struct Thread {
  bool left = false;
  Operation waits_at = Operation::none;
  int line = 0;
};

struct Machine {
  Settings settings;
  std::vector<Statistics> launches;
  const std::function<void()>* kernel = nullptr;
  std::string error;
  bool overflow = false;  // of the running thread's stack
  int threads = 0;
  Thread states[kMaxThreads];
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

// A fiber's whole life: the kernel once in every block.
void live() {
  for (;;) {
    try {
      (*machine.kernel)();
    } catch (const std::exception& error) {
      machine.error = error.what();
    }
    if (!machine.error.empty()) change(current_thread, kHost);
    machine.states[current_thread].left = true;
    stop_running();
    wait();
  }
}

void on_overflow() {
  machine.overflow = true;
  change(current_thread, kHost);
}

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
    const Thread& thread = machine.states[begin];
    const auto same = [&](const Thread& other) {
      if (thread.left || other.left) return thread.left && other.left;
      return other.waits_at == thread.waits_at && other.line == thread.line;
    };
    for (end = begin + 1; end < first + count && same(machine.states[end]);) ++end;
    const bool one = end == begin + 1;
    text += (text.empty() ? "thread" : "; thread") + std::string(one ? " " : "s ") + std::to_string(begin);
    if (!one) text += " to " + std::to_string(end - 1);
    text += thread.left ? " left" : (one ? " waits for " : " wait for ") + at(thread.waits_at, thread.line);
  }
  return text;
}

void run_block() {
  const int warps = machine.threads / kLanes;
  std::fill_n(reinterpret_cast<unsigned char*>(shared.begin), shared.bytes, 0xff);
  machine.at_barrier = machine.turns = 0;
  machine.overflow = false;
  forget_copies(machine.threads);
  for (int i = 0; i < machine.threads; ++i) machine.states[i].left = false;
  for (int i = 0; i < warps; ++i) {
    machine.warps[i].arrived = 0;
    set_runnable(i, ~0u);
  }
  current_thread = next_thread();
  change(kHost, current_thread);
  if (machine.overflow) machine.error = where() + "stack overflow";
  current_thread = -1;
  const auto left = [](const Thread& thread) { return thread.left; };
  if (machine.error.empty() && !std::all_of(machine.states, machine.states + machine.threads, left))
    machine.error =
        where() + "block " + place(current_block) + " waits for ever: " + waiting(0, machine.threads);
  if (machine.error.empty()) return;
  // The stacks are left as they are: kernels own nothing.
  for (int i = 0; i < machine.threads; ++i) begin_anew(i);
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

const Settings& settings() {
  return machine.settings;
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
  static const bool made = (make_fibers(kMaxThreads, live), true);
  static_cast<void>(made);
  machine.kernel = &kernel;
  machine.threads = threads;
  machine.shared_bytes.resize(shared_bytes + 128);
  const uintptr_t raw = reinterpret_cast<uintptr_t>(machine.shared_bytes.data());
  shared = {"shared memory", (raw + 127) / 128 * 128, static_cast<size_t>(shared_bytes), true};

  const OverflowWatch watch(on_overflow);
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

Warp* arrive(Operation operation, int line, void* lane) {
  const int index = current_thread % kLanes;
  Warp& warp = machine.warps[current_thread / kLanes];
  if (warp.arrived && (warp.operation != operation || warp.line != line))
    fail("comes to " + at(operation, line) + ", others of its warp wait for " +
         at(warp.operation, warp.line));
  Thread& thread = machine.states[current_thread];
  thread.waits_at = warp.operation = operation;
  thread.line = warp.line = line;
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
  const int own = current_thread;
  if (next >= 0) current_thread = next;
  change(own, next >= 0 ? next : kHost);
}

void sync_threads(int line) {
  Thread& thread = machine.states[current_thread];
  thread.waits_at = Operation::sync_threads;
  thread.line = line;
  stop_running();
  if (++machine.at_barrier == machine.threads) {
    // Every thread waits here, so each of them says at which barrier.
    for (int i = 0; i < machine.threads; ++i)
      if (machine.states[i].line != line) fail("a barrier of two places: " + waiting(0, machine.threads));
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

}  // namespace pruned_ops::cuda::emulator
