// The scheduler of cuda_on_host.h. CUDA_ON_HOST_SEED and CUDA_ON_HOST_PROCESSORS, read at every launch, give the order and how many
// blocks are resident; CUDA_ON_HOST_L2 is the size of the L2 cache in bytes; CUDA_ON_HOST_CAPABILITY the device's compute capability, 8
// or 9.
#include "cuda_on_host.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

// The kernels are built with AddressSanitizer, which is told of the stacks; not this file, whose jumps it would take for ends.
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
}

cuda_on_host::Index threadIdx, blockIdx, gridDim;

namespace cuda_on_host {

void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kLanes = 32;

struct Fiber;

// Lets nobody on before `expected` have arrived.
struct Barrier {
  unsigned expected = 0, arrived = 0;
  std::vector<Fiber*> waiting;
};

struct Warp {
  Barrier barrier;
  unsigned mask = 0;
  // Two turns: who writes the next value may be ahead of who reads this one, but not by more.
  unsigned char values[2][kLanes][16];
};

struct Block {
  unsigned index, running;
  std::unique_ptr<unsigned char[]> shared;
  Barrier barrier;
  // Of some of its threads.
  Barrier meetings[16];
  std::vector<Warp> warps;
};

struct Fiber {
  ucontext_t context;
  void* stack;
  void* fake_stack = nullptr;
  Block* block;
  unsigned thread;
  unsigned turn = 0;
  // One group of copies is always open.
  std::deque<std::vector<Copy>> copies = std::deque<std::vector<Copy>>(1);
  bool started = false, done = false;
  void* resume[5];
};

void* scheduler_resume[5];
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
Barrier grid_barrier;
bool grid_waits = false;
std::vector<Fiber*> ready;
std::map<const void*, std::vector<Fiber*>> waiting;
std::vector<void*> free_stacks;
uint64_t random_state = 0;

uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

unsigned setting(const char* name, unsigned otherwise) {
  const char* const value = std::getenv(name);
  return value == nullptr ? otherwise : static_cast<unsigned>(std::strtoul(value, nullptr, 10));
}

[[gnu::noinline, noreturn]] void jump_to_scheduler() { __builtin_longjmp(scheduler_resume, 1); }
[[gnu::noinline, noreturn]] void jump_to_fiber() {
  if (current->started) __builtin_longjmp(current->resume, 1);
  current->started = true;
  setcontext(&current->context);
  fail("a fiber does not start");
}

// From the fiber back to the scheduler.
[[gnu::noinline]] void leave(bool for_ever) {
  Fiber* const fiber = current;
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fiber->fake_stack, scheduler_stack, scheduler_stack_size);
  // Without swapcontext's calls of the system; it serves for the first time alone.
  if (__builtin_setjmp(fiber->resume) == 0) jump_to_scheduler();
  __sanitizer_finish_switch_fiber(current->fake_stack, &scheduler_stack, &scheduler_stack_size);
}

void start() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  (*body)();
  current->done = true;
  leave(true);
}

[[gnu::noinline]] void enter(Fiber* fiber) {
  current = fiber;
  threadIdx = {fiber->thread};
  blockIdx = {fiber->block->index};
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber->stack, kStack);
  if (__builtin_setjmp(scheduler_resume) == 0) jump_to_fiber();
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
    // Who came last is not to be the first to go on.
    ready.push_back(current);
  } else {
    barrier.waiting.push_back(current);
  }
  leave(false);
}

}  // namespace

void* shared_bytes() { return current->block->shared.get(); }

void wait_for_block() { wait(current->block->barrier); }

void wait_for_warp(unsigned mask) {
  Warp& warp = current->block->warps[current->thread / kLanes];
  if (warp.barrier.arrived > 0 && warp.mask != mask) fail("the lanes of a warp wait with different masks");
  if ((mask >> current->thread % kLanes & 1) == 0) fail("a lane waits that is not in its mask");
  warp.mask = mask;
  warp.barrier.expected = static_cast<unsigned>(__builtin_popcount(mask));
  wait(warp.barrier);
}

void wait_for_all_blocks() {
  if (!grid_waits) fail("a block waits for the grid in a launch that is not cooperative");
  wait(grid_barrier);
}

void wait_for_meeting(int meeting, unsigned count) {
  Barrier& barrier = current->block->meetings[meeting];
  if (barrier.arrived > 0 && barrier.expected != count) fail("threads meet in different numbers");
  barrier.expected = count;
  wait(barrier);
}

void yield() {
  ready.push_back(current);
  leave(false);
}

void wait_for_change(const void* what) {
  waiting[what].push_back(current);
  leave(false);
}

void changed(const void* what) {
  const auto found = waiting.find(what);
  if (found == waiting.end()) return;
  ready.insert(ready.end(), found->second.begin(), found->second.end());
  waiting.erase(found);
}

void exchange(unsigned mask, const void* mine, void* theirs, size_t size, int from) {
  auto& values = current->block->warps[current->thread / kLanes].values[++current->turn % 2];
  std::memcpy(values[current->thread % kLanes], mine, size);
  wait_for_warp(mask);
  if ((mask >> from & 1) == 0) fail("a lane reads from one that is not in the mask");
  std::memcpy(theirs, values[from], size);
}

const unsigned char* gather(const void* mine, size_t size) {
  auto& values = current->block->warps[current->thread / kLanes].values[++current->turn % 2];
  std::memcpy(values[current->thread % kLanes], mine, size);
  wait_for_warp(0xffffffff);
  return values[0];
}

std::deque<std::vector<Copy>>& copies() { return current->copies; }

void others_go_first(bool adds) {
  // Whoever waits for a count asks again and again; as long as somebody adds, it may come.
  static uint64_t asked;
  asked = adds ? 0 : asked + 1;
  if (asked > 10'000'000) fail("every thread waits: a count that nobody adds to");
  yield();
}

void run(unsigned blocks, unsigned threads, size_t shared, bool cooperative, const std::function<void()>& thread) {
  random_state = 0x9e3779b97f4a7c15ull * (setting("CUDA_ON_HOST_SEED", 0) + 1);
  const unsigned resident = cooperative ? blocks : setting("CUDA_ON_HOST_PROCESSORS", 2);
  body = &thread;
  gridDim = {blocks};
  grid_waits = cooperative;
  grid_barrier = {};
  grid_barrier.expected = blocks * threads;
  unsigned started = 0, alive = 0;
  const auto start_block = [&] {
    auto* const block = new Block{};
    block->index = started++;
    block->running = threads;
    block->shared.reset(new unsigned char[shared]);
    std::memset(block->shared.get(), 0xff, shared);
    block->barrier.expected = threads;
    block->warps.resize((threads + kLanes - 1) / kLanes);
    ++alive;
    for (unsigned i = 0; i < threads; ++i) {
      auto* const fiber = new Fiber{};
      fiber->block = block;
      fiber->thread = i;
      if (free_stacks.empty()) {
        fiber->stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (fiber->stack == MAP_FAILED) fail("no memory for a stack");
      } else {
        fiber->stack = free_stacks.back();
        free_stacks.pop_back();
      }
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = fiber->stack;
      fiber->context.uc_stack.ss_size = kStack;
      fiber->context.uc_link = nullptr;
      makecontext(&fiber->context, start, 0);
      ready.push_back(fiber);
    }
  };
  while (started < blocks && alive < resident) start_block();
  while (alive > 0) {
    if (ready.empty()) fail("every thread waits: a barrier that not all reach");
    std::swap(ready[random_number() % ready.size()], ready.back());
    Fiber* const fiber = ready.back();
    ready.pop_back();
    enter(fiber);
    if (!fiber->done) continue;
    Block* const block = fiber->block;
    free_stacks.push_back(fiber->stack);
    delete fiber;
    if (--block->running == 0) {
      delete block;
      --alive;
      if (started < blocks) start_block();
    }
  }
}

}  // namespace cuda_on_host

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const unsigned capability = cuda_on_host::setting("CUDA_ON_HOST_CAPABILITY", 8);
  const unsigned values[] = {cuda_on_host::setting("CUDA_ON_HOST_PROCESSORS", 2), cuda_on_host::setting("CUDA_ON_HOST_L2", 1 << 20),
                             capability, (capability == 9 ? 227u : 99u) * 1024};
  *value = static_cast<int>(values[attribute]);
  return cudaSuccess;
}
