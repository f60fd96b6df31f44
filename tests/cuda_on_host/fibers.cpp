#include "fibers.h"

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <stdexcept>

#ifdef __x86_64__
// What a call must keep goes on the stack of the one that stops, and comes from the stack of the one that
// goes on. swapcontext makes a system call beside that, and takes over twenty times as long.
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
namespace {

constexpr size_t kPage = 4096;
// The kernels' frames are small; an exception needs some pages more. An odd number of pages in all, so that
// the stacks do not fall into the same sets of the caches.
constexpr size_t kStack = 32 * kPage, kGuard = 5 * kPage, kSlot = kGuard + kStack;

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

unsigned char* stacks = nullptr;
size_t stacks_bytes = 0;
std::unique_ptr<Context[]> contexts;
Context host;
void (*life_of_all)() = nullptr;

Context& context(int fiber) {
  return fiber == kHost ? host : contexts[fiber];
}

constexpr size_t kHandlerStack = 64 * 1024;
void (*handle_overflow)() = nullptr;
struct sigaction previous_action;
stack_t previous_stack;

void on_fault(int, siginfo_t* info, void*) {
  const size_t offset = static_cast<unsigned char*>(info->si_addr) - stacks;
  if (offset < stacks_bytes && offset % kSlot < kGuard) handle_overflow();
  // Any other fault happens again, and is what it was before.
  sigaction(SIGSEGV, &previous_action, nullptr);
}

}  // namespace

void make_fibers(int count, void (*life)()) {
  stacks_bytes = count * kSlot;
  void* memory = mmap(nullptr, stacks_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("there is no memory for the threads' stacks");
  stacks = static_cast<unsigned char*>(memory);
  life_of_all = life;
  contexts = std::make_unique<Context[]>(count);
  for (int i = 0; i < count; ++i) {
    mprotect(stacks + i * kSlot + kGuard, kStack, PROT_READ | PROT_WRITE);
    begin_anew(i);
  }
}

void begin_anew(int fiber) {
  // Tops at different places of their pages, for the caches' sake.
  contexts[fiber].begin(life_of_all, stacks + fiber * kSlot + kGuard, kStack - fiber % 59 * 64);
}

void change(int from, int to) {
  context(from).change_to(context(to));
}

OverflowWatch::OverflowWatch(void (*handle)()) {
  static unsigned char memory[kHandlerStack];
  handle_overflow = handle;
  stack_t stack = {};
  stack.ss_sp = memory;
  stack.ss_size = sizeof(memory);
  sigaltstack(&stack, &previous_stack);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  // NODEFER: the handler does not return when it changes stacks, and the next fault must come too.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &previous_action);
}

OverflowWatch::~OverflowWatch() {
  sigaction(SIGSEGV, &previous_action, nullptr);
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace pruned_ops::cuda::emulator
