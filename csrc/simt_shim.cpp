// SPDX-License-Identifier: Apache-2.0
//
// The scheduler of simt_shim.h: a block's threads as fibers. For the tests only; no part of what is installed.
//
// Every thread of a block is resumed in turn and runs until it waits or exits. When none can go on, `release` looks at
// who waits where: warps that are complete at an intrinsic go on, else the block if it is complete at a barrier; anything
// else is an error of the kernel.
#include "simt_shim.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <map>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && !defined(FLA_SIMT_UCONTEXT)
#define FLA_SIMT_ASSEMBLY 1
#else
#define FLA_SIMT_ASSEMBLY 0
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fla_ops::simt {
namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kMaxDynamic = 99 * 1024;  // the least that sm_80 and later have
constexpr size_t kPage = 4096, kStack = 64 * 1024;
constexpr size_t kFence = 256;  // bytes behind dynamic shared memory that must stay as they are
constexpr unsigned char kFenceByte = 0xa5;

// ------------------------------------------------------------------------------------------ contexts

void thread_main();

#if FLA_SIMT_ASSEMBLY

// The registers a function must preserve are on the stack that `place` points to. The floating-point modes stay: no
// kernel changes them. (swapcontext saves the signal mask too, by two system calls a switch.)
extern "C" void fla_ops_simt_switch(void** save, void* place);
asm(R"(
.text
.type fla_ops_simt_switch, @function
fla_ops_simt_switch:
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
.size fla_ops_simt_switch, .-fla_ops_simt_switch
)");

struct Context {
  void* place = nullptr;

  // The first switch pops six registers, and returns into thread_main with the stack aligned as after a call.
  void start(char* stack, size_t bytes) {
    void** top = reinterpret_cast<void**>(stack + bytes) - 8;
    std::fill(top, top + 8, nullptr);
    top[6] = reinterpret_cast<void*>(&thread_main);
    place = top;
  }
};

void switch_context(Context& from, Context& to) { fla_ops_simt_switch(&from.place, to.place); }

#else

struct Context {
  ucontext_t context;

  void start(char* stack, size_t bytes) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, thread_main, 0);
  }
};

void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

#endif

// ------------------------------------------------------------------------------------------- threads

enum class State { runnable, at_barrier, at_intrinsic, exited };

struct Thread {
  State state;
  Context context;
  uint3 index;
  // Where it waits, and at an intrinsic: what it gives, what it asks for, what it gets.
  const char* intrinsic;
  Where where;
  unsigned mask;
  uint64_t given;
  int source;
  FromWarp got;
  char* stack = nullptr;  // kept from block to block

  bool waits_with(const Thread& other) const {
    return state == other.state && intrinsic == other.intrinsic && where.line() == other.where.line() &&
           where.column() == other.where.column() && !strcmp(where.file_name(), other.where.file_name());
  }
};

std::mutex one_launch;  // all of what follows belongs to the launch that runs
bool reversed = false;
const char* kernel_name;
void (*run_thread)(const void*);
const void* kernel_call;
Thread threads[kMaxThreads];
int thread_count, current;
Context scheduler;
uint64_t block_counter = 0;
std::vector<char> dynamic_memory;

// The threads that stand at one place, as ranges: "0-30, 32".
std::string ranges(const std::vector<int>& sorted) {
  std::string result;
  for (size_t i = 0; i < sorted.size();) {
    size_t end = i + 1;
    while (end < sorted.size() && sorted[end] == sorted[end - 1] + 1) end++;
    result += (i ? ", " : "") + std::to_string(sorted[i]);
    if (end - i > 1) result += "-" + std::to_string(sorted[end - 1]);
    i = end;
  }
  return result;
}

[[noreturn]] void fail(const std::string& what, bool who = true) {
  fprintf(stderr, "fla_ops simt: kernel %s, block (%u, %u, %u) of %u threads: %s\n", kernel_name, blockIdx.x,
          blockIdx.y, blockIdx.z, blockDim.x * blockDim.y * blockDim.z, what.c_str());
  std::map<std::string, std::vector<int>> standing;
  for (int i = 0; i < thread_count; i++) {
    const Thread& t = threads[i];
    const std::string place = std::string(t.where.file_name()) + ":" + std::to_string(t.where.line());
    standing[t.state == State::exited         ? "exited"
             : t.state == State::at_barrier   ? "at __syncthreads, " + place
             : t.state == State::at_intrinsic ? std::string("at ") + t.intrinsic + ", " + place
                                              : "running"]
        .push_back(i);
  }
  if (who)
    for (const auto& [place, who] : standing) fprintf(stderr, "  threads %s: %s\n", ranges(who).c_str(), place.c_str());
  fflush(stderr);
  abort();
}

void thread_main() {
  run_thread(kernel_call);
  threads[current].state = State::exited;
  switch_context(threads[current].context, scheduler);
  abort();  // an exited thread is never resumed
}

void resume(int i) {
  current = i;
  threadIdx = threads[i].index;
  switch_context(scheduler, threads[i].context);
}

void wait_as(State state, const Where& where) {
  Thread& t = threads[current];
  t.state = state;
  t.where = where;
  switch_context(t.context, scheduler);
}

// Complete the intrinsic that the lanes [first, end) of a warp wait at. False if none of them waits at one.
bool release_warp(int first, int end) {
  unsigned live = 0, ballot = 0;
  const Thread* waiting = nullptr;
  for (int i = first; i < end; i++) {
    if (threads[i].state != State::exited) live |= 1u << (i - first);
    if (threads[i].state == State::at_intrinsic) waiting = &threads[i];
  }
  if (!waiting) return false;
  for (int i = first; i < end; i++) {
    const Thread& t = threads[i];
    if (t.state == State::exited) continue;
    if (!t.waits_with(*waiting)) fail("the lanes of a warp wait at different places");
    if ((t.mask & live) != live) fail(std::string("the mask of ") + t.intrinsic + " leaves out live lanes");
    if (t.given) ballot |= 1u << (i - first);
  }
  for (int i = first; i < end; i++) {
    Thread& t = threads[i];
    if (t.state == State::exited) continue;
    if (!(live >> t.source & 1)) {
      fail("thread " + std::to_string(i) + " reads from lane " + std::to_string(t.source) + ", which has exited or never was");
    }
    t.got = {threads[first + t.source].given, ballot};
  }
  for (int i = first; i < end; i++)
    if (threads[i].state == State::at_intrinsic) threads[i].state = State::runnable;
  return true;
}

// No thread can run. Let those go on that are complete; false if all have exited.
bool release() {
  bool moved = false;
  for (int first = 0; first < thread_count; first += warpSize)
    moved |= release_warp(first, std::min(first + warpSize, thread_count));
  if (moved) return true;
  int exited = 0, together = 0;
  for (int i = 0; i < thread_count; i++) {
    exited += threads[i].state == State::exited;
    together += threads[i].waits_with(threads[0]);
  }
  if (exited == thread_count) return false;
  if (exited) fail("some threads wait at __syncthreads, others have exited");
  if (together < thread_count) fail("the threads of a block wait at different __syncthreads");
  for (int i = 0; i < thread_count; i++) threads[i].state = State::runnable;
  return true;
}

void run_block(size_t dynamic_bytes) {
  block_counter++;
  memset(dynamic_memory.data(), 0xff, dynamic_bytes);
  memset(dynamic_memory.data() + dynamic_bytes, kFenceByte, kFence);
  for (int i = 0; i < thread_count; i++) {
    Thread& t = threads[i];
    t.state = State::runnable;
    t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    t.context.start(t.stack, kStack);
  }
  do {
    for (int i = 0; i < thread_count; i++) {
      const int next = reversed ? thread_count - 1 - i : i;
      if (threads[next].state == State::runnable) resume(next);
    }
  } while (release());
  for (size_t i = 0; i < kFence; i++)
    if (static_cast<unsigned char>(dynamic_memory[dynamic_bytes + i]) != kFenceByte)
      fail("wrote behind the " + std::to_string(dynamic_bytes) + " bytes of dynamic shared memory", false);
}

// Each stack lies behind a page that cannot be touched.
char* new_stack() {
  void* memory = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE)) fail("no memory for the stack of a thread", false);
  return static_cast<char*>(memory) + kPage;
}

}  // namespace

void run_grid(const char* kernel, dim3 grid, dim3 block, size_t dynamic_bytes, void (*run)(const void*),
              const void* call) {
  const std::lock_guard lock(one_launch);
  kernel_name = kernel;
  run_thread = run;
  kernel_call = call;
  gridDim = grid;
  blockDim = block;
  blockIdx = {0, 0, 0};
  const uint64_t size = uint64_t(block.x) * block.y * block.z;
  thread_count = 0;
  if (size < 1 || size > kMaxThreads || block.z > 64) fail("a block has 1 to 1024 threads", false);
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) fail("the grid is limited to 2^31-1, 65535, 65535", false);
  if (dynamic_bytes > kMaxDynamic)
    fail(std::to_string(dynamic_bytes) + " bytes of dynamic shared memory; every GPU has only 99 KB", false);
  thread_count = int(size);
  for (int i = 0; i < thread_count; i++)
    if (!threads[i].stack) threads[i].stack = new_stack();
  dynamic_memory.resize(std::max(dynamic_memory.size(), dynamic_bytes + kFence));

  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; i++) {
    const uint64_t b = reversed ? blocks - 1 - i : i;
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    run_block(dynamic_bytes);
  }
}

void set_reversed(bool value) {
  const std::lock_guard lock(one_launch);
  reversed = value;
}

void wait_for_block(const Where& where) {
  threads[current].intrinsic = nullptr;
  wait_as(State::at_barrier, where);
}

FromWarp exchange(const char* intrinsic, unsigned mask, uint64_t value, int source, const Where& where) {
  Thread& t = threads[current];
  t.intrinsic = intrinsic;
  t.mask = mask;
  t.given = value;
  t.source = source;
  wait_as(State::at_intrinsic, where);
  return t.got;
}

int lane() { return current % warpSize; }
uint64_t block_number() { return block_counter; }
void* dynamic_shared() { return dynamic_memory.data(); }

}  // namespace fla_ops::simt
