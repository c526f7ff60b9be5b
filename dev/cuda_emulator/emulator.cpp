// Runs CUDA kernels on one CPU thread, and checks them more strictly than a GPU does.
//
// Each thread of a block is a fiber, which runs until it waits for others or ends. Blocks run one
// after the other. The order of blocks and threads changes from launch to launch. Errors are:
// - threads that wait for others which have ended, wait elsewhere or with another mask;
// - reading a lane that is not in the mask;
// - access outside of tensors and shared variables, or misaligned;
// - races: two threads use the same memory without a barrier in between, and one writes another
//   value (reads and atomics alone are no race). Shuffles are no barriers. Words are compared with
//   words, smaller units with smaller units;
// - launches that exceed a limit of the hardware.
// Fresh tensors and shared variables hold bytes 0xff: NaN, or -1.
//
// The compiler reports every access to memory: -fsanitize=thread makes it call the functions
// __tsan_*, which are defined here in place of GCC's library. Tensors are allocated here too.
//
// Not emulated: the order in which memory becomes visible, lanes that diverge within a warp and
// meet again, blocks that wait for each other, streams.
//
// EMULATOR_SEED: another sequence of orders.
#include "emulator.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#error "switch_stack is written for x86-64"
#endif

// Saves the registers that a function must keep, and continues on another stack.
extern "C" void emulator_switch_stack(void** save, void* load);
asm(R"(
.text
.globl emulator_switch_stack
.hidden emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace emulator {

void* allocate(size_t size);
void give_back(void* pointer);

dim3 indices[4];

namespace {

constexpr size_t PAGE = 4096, STACK = 64 * 1024, MOST_THREADS = 1024;
constexpr size_t MOST_STATIC_SHARED = 48 * 1024, MOST_SHARED = 227 * 1024;
constexpr size_t ARENA = size_t{1} << 36; // addresses, of which few are used

// Who used memory last. Time passes at barriers only.
struct Use {
  uint32_t time;
  uint16_t thread;
  bool is_atomic, is_shared; // shared: also by other threads since the last barrier
};
struct Cell {
  Use write, read;
};

template <typename T>
T* reserve(size_t count) {
  void* got = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) {
    throw std::runtime_error("emulator: no address space");
  }
  return static_cast<T*>(got);
}

char* const arena = reserve<char>(ARENA);
char* const stacks = reserve<char>(MOST_THREADS * STACK);
Cell* const words = reserve<Cell>(ARENA / 4); // of accesses of 4 bytes and more
Cell* const bytes = reserve<Cell>(ARENA); // of smaller ones
uint16_t* const valid_bytes = reserve<uint16_t>(ARENA / PAGE); // of each page

std::map<size_t, size_t> blocks; // allocations: first byte, size
std::map<size_t, std::deque<size_t>> freed; // by number of pages
size_t arena_end = PAGE, freed_pages = 0;
std::mutex memory_lock;

enum State { READY, WARP_WAITS, BLOCK_WAITS, ENDED };
struct Thread {
  void* stack_pointer;
  State state;
  Meeting kind;
  unsigned mask;
  int source;
  uint64_t value, result;
  Place place;
  uint32_t warp_time; // of its last __syncwarp, and with whom
  unsigned warp_mask;
};

struct Warp {
  unsigned waiting, ended; // lanes; ended: also those that the block does not have
};

std::vector<Thread> threads;
std::vector<Warp> warps;
Thread* current = nullptr;
bool is_checked = false; // while a thread runs code of its kernel

// In functions that kernels call: code of the standard library may be shared with checked code.
struct Unchecked {
  Unchecked() { is_checked = false; }
  ~Unchecked() { is_checked = true; }
};

void* scheduler;
Call call;
unsigned launches, seed = std::getenv("EMULATOR_SEED") ? atoi(std::getenv("EMULATOR_SEED")) : 0;
uint32_t now, launch_time, block_time, barrier_time;
size_t alive, arrived, static_shared, dynamic_shared;
uint64_t sum;
Thread* first_at_barrier;
std::map<std::string, size_t> shared_variables; // name and place: position in the arena
std::string error;

// A write to memory that another thread has written: an error if it changes the value.
struct {
  size_t size = 0;
  const char* address;
  char before[16];
  unsigned other;
  const void* caller;
} repeated;

unsigned rank_of(const Thread& t) { return &t - threads.data(); }

void switch_to_scheduler() { emulator_switch_stack(&current->stack_pointer, scheduler); }

// Where the compiled code came from, by the tools of the compiler.
std::string source_of(const void* caller) {
  Dl_info info;
  if (caller == nullptr || dladdr(caller, &info) == 0) {
    return "";
  }
  char command[600], text[400] = "";
  const auto offset = static_cast<const char*>(caller) - static_cast<char*>(info.dli_fbase) - 1;
  snprintf(command, sizeof(command), "addr2line -i -s -e '%s' 0x%zx | tr '\\n' ' '",
           info.dli_fname, static_cast<size_t>(offset));
  if (FILE* pipe = popen(command, "r")) {
    text[fread(text, 1, sizeof(text) - 1, pipe)] = 0;
    pclose(pipe);
  }
  return std::string(" at ") + text;
}

std::string describe(const void* address) {
  const size_t at = static_cast<const char*>(address) - arena;
  auto next = blocks.upper_bound(at);
  if (at >= ARENA || next == blocks.begin()) {
    return "no tensor or shared variable (made before the emulator was loaded?)";
  }
  const auto [first, size] = *--next;
  return "byte " + std::to_string(at - first) + " of " + std::to_string(size);
}

// Whether the use may be at the same time as what the running thread does now.
bool is_unordered(const Use& use) {
  if (use.time < launch_time) {
    return false;
  }
  if (use.time < block_time) {
    return true; // another block
  }
  const unsigned own = rank_of(*current);
  if (use.time < barrier_time || (use.thread == own && !use.is_shared)) {
    return false;
  }
  return use.is_shared || use.thread / 32 != own / 32 || use.time >= current->warp_time ||
      !(current->warp_mask >> use.thread % 32 & 1);
}

[[noreturn]] void fail_race(const void* address, size_t size, unsigned other, const void* caller) {
  fail("race with thread %u about %zu bytes at %s%s", other, size, describe(address).c_str(),
       source_of(caller).c_str());
}

void check_repeated() {
  const size_t size = repeated.size;
  repeated.size = 0;
  if (size > 0 && std::memcmp(repeated.address, repeated.before, size) != 0) {
    fail_race(repeated.address, size, repeated.other, repeated.caller);
  }
}

void release(Thread& t, uint64_t result) {
  t.result = result;
  t.state = READY;
}

void wait(State state, Meeting kind, unsigned mask, uint64_t value, int source, Place place) {
  check_repeated();
  Thread& me = *current;
  me.state = state, me.kind = kind, me.mask = mask;
  me.value = value, me.source = source, me.place = place;
}

bool is_same(const Thread& a, const Thread& b) {
  return a.kind == b.kind && a.mask == b.mask && a.place.line == b.place.line &&
      (a.place.file == b.place.file || std::strcmp(a.place.file, b.place.file) == 0);
}

std::string describe(const Thread& t) {
  const char* states[] = {"runs", "waits for its warp", "waits for its block", "has ended"};
  std::string text = "thread " + std::to_string(rank_of(t)) + " " + states[t.state];
  if (t.state == WARP_WAITS || t.state == BLOCK_WAITS) {
    char mask[20];
    snprintf(mask, sizeof(mask), " (mask %08x)", t.mask);
    text += std::string(" at ") + t.place.file + ":" + std::to_string(t.place.line) + mask;
  }
  return text;
}

// Starts a fiber.
void enter() {
  call.function(call.data);
  const Unchecked code;
  check_repeated();
  const unsigned own = rank_of(*current), first = own / 32 * 32;
  Warp& warp = warps[own / 32];
  for (unsigned left = warp.waiting; left != 0; left &= left - 1) {
    const Thread& other = threads[first + __builtin_ctz(left)];
    if (other.mask >> own % 32 & 1) {
      fail("lane %u of a mask has ended: %s", own % 32, describe(other).c_str());
    }
  }
  warp.ended |= 1u << own % 32;
  if (arrived > 0) {
    fail("threads do not meet at one barrier: %s, %zu have ended",
         describe(*first_at_barrier).c_str(), threads.size() - alive + 1);
  }
  current->state = ENDED;
  --alive;
  switch_to_scheduler();
}

void prepare(Thread& t) {
  t = {};
  void** top = reinterpret_cast<void**>(stacks + (rank_of(t) + 1) * STACK) - 1;
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) {
    *--top = nullptr;
  }
  t.stack_pointer = top;
}

// Runs the threads of a block in some order until all have ended. Greedy: each warp runs as far as
// it can before the next one does; else each thread does, in turn.
void run_block(const std::vector<unsigned>& order, bool is_greedy) {
  for (Thread& t : threads) {
    prepare(t);
  }
  std::fill(warps.begin(), warps.end(), Warp{0, 0});
  if (threads.size() % 32 != 0) {
    warps.back().ended = ~0u << threads.size() % 32;
  }
  alive = threads.size();
  arrived = 0;
  block_time = barrier_time = ++now;
  for (const auto& [name, at] : shared_variables) { // of other blocks no more
    const size_t size = blocks.at(at);
    std::memset(arena + at, 0xff, size);
    std::fill(words + at / 4, words + (at + size + 3) / 4, Cell{});
    std::fill(bytes + at, bytes + at + size, Cell{});
  }
  const size_t part = is_greedy ? 32 : threads.size();
  while (alive > 0 && error.empty()) {
    bool any = false;
    for (size_t first = 0; first < order.size(); first += part) {
      bool again = true;
      while (again && error.empty()) {
        again = false;
        for (size_t i = first; i < std::min(first + part, order.size()); ++i) {
          Thread& t = threads[order[i]];
          if (t.state == READY && error.empty()) {
            current = &t;
            threadIdx = dim3(order[i]);
            is_checked = true;
            emulator_switch_stack(&scheduler, t.stack_pointer);
            is_checked = false;
            again = any = true;
          }
        }
      }
    }
    if (!any && alive > 0 && error.empty()) {
      const Thread *one = nullptr, *other = nullptr;
      for (const Thread& t : threads) {
        one = one == nullptr && t.state != ENDED ? &t : one;
        other = one != nullptr && (t.state != one->state || !is_same(t, *one)) ? &t : other;
      }
      error = "no thread can go on: " + describe(*one) + ", " + describe(other ? *other : *one);
    }
  }
}

} // namespace

void fail(const char* format, ...) {
  is_checked = false;
  char text[1500];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof(text), format, list);
  va_end(list);
  error = text;
  error += ", thread " + std::to_string(rank_of(*current));
  repeated.size = 0;
  switch_to_scheduler(); // for good
  std::abort();
}

void run(dim3 grid, dim3 block, size_t shared, Call new_call) {
  static std::mutex lock; // launches of several threads of the host
  const std::lock_guard<std::mutex> guard(lock);
  const auto fits = [](unsigned x, unsigned most) { return x >= 1 && x <= most; };
  const size_t count = size_t{block.x} * block.y * block.z;
  if (!fits(grid.x, 2147483647u) || !fits(grid.y, 65535) || !fits(grid.z, 65535) ||
      block.y != 1 || block.z != 1 || !fits(block.x, MOST_THREADS) || shared > MOST_SHARED) {
    throw std::runtime_error(
        "emulator: cannot launch a grid of " + std::to_string(grid.x) + " x " +
        std::to_string(grid.y) + " x " + std::to_string(grid.z) + " blocks of " +
        std::to_string(block.x) + " x " + std::to_string(block.y) + " x " +
        std::to_string(block.z) + " threads and " + std::to_string(shared) + " bytes");
  }
  call = new_call;
  gridDim = grid;
  blockDim = block;
  static_shared = 0;
  dynamic_shared = shared;
  threads.resize(count);
  warps.resize((count + 31) / 32);
  launch_time = ++now;
  const unsigned launch = launches++;
  std::minstd_rand random(seed * 7919 + launch);
  std::vector<unsigned> warp_order(warps.size()), order;
  std::iota(warp_order.begin(), warp_order.end(), 0);
  const unsigned kind = (launch + seed) % 4; // ascending, descending, by warps, by threads
  if (kind >= 2) {
    std::shuffle(warp_order.begin(), warp_order.end(), random);
  }
  for (const unsigned warp : warp_order) {
    for (unsigned t = warp * 32; t < std::min<size_t>(warp * 32 + 32, count); ++t) {
      order.push_back(t);
    }
  }
  const uint64_t all = uint64_t{grid.x} * grid.y * grid.z, first = random() % all;
  for (uint64_t i = 0; i < all && error.empty(); ++i) {
    const uint64_t at = kind == 0 ? i : kind == 1 ? all - 1 - i : (first + i) % all;
    if (kind == 1 && i == 0) {
      std::reverse(order.begin(), order.end());
    } else if (kind == 3) {
      std::shuffle(order.begin(), order.end(), random);
    }
    blockIdx = dim3(at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y);
    run_block(order, kind == 2);
  }
  for (const auto& [name, position] : shared_variables) {
    give_back(arena + position);
  }
  shared_variables.clear();
  if (!error.empty()) {
    const auto text = "emulator: " + error + " of block " + std::to_string(blockIdx.x) + " " +
        std::to_string(blockIdx.y) + " " + std::to_string(blockIdx.z) + ", launch " +
        std::to_string(launch) + ", EMULATOR_SEED " + std::to_string(seed);
    error.clear();
    throw std::runtime_error(text);
  }
}

void check_launch_bounds(unsigned most_threads) {
  const Unchecked code;
  if (blockDim.x > most_threads) {
    fail("launched with %u threads, compiled for %u", blockDim.x, most_threads);
  }
}

void* shared_memory(size_t size, size_t alignment, const char* name, bool is_dynamic) {
  const Unchecked code;
  if (shared_variables.count(name) == 0) {
    size = is_dynamic ? dynamic_shared : size;
    static_shared += is_dynamic ? 0 : (size + alignment - 1) / alignment * alignment;
    if (static_shared > MOST_STATIC_SHARED || static_shared + dynamic_shared > MOST_SHARED) {
      fail("%zu bytes of shared variables, %zu of them dynamic", static_shared + dynamic_shared,
           dynamic_shared);
    }
    shared_variables[name] = static_cast<char*>(allocate(size)) - arena;
  }
  return arena + shared_variables[name];
}

uint64_t meet_warp(Meeting kind, unsigned mask, uint64_t value, int source, Place place) {
  const Unchecked code;
  Thread& me = *current;
  const unsigned own = rank_of(me), first = own / 32 * 32;
  wait(WARP_WAITS, kind, mask, value, source, place);
  if (!(mask >> own % 32 & 1) || !(mask >> source & 1)) {
    fail("lane %d of a shuffle or vote is not in its mask: %s", mask >> source & 1 ? own % 32 : source,
         describe(me).c_str());
  }
  Warp& warp = warps[own / 32];
  if (const unsigned gone = warp.ended & mask) {
    fail("lane %d of a mask has ended or does not exist: %s", __builtin_ctz(gone),
         describe(me).c_str());
  }
  if (const unsigned others = warp.waiting & mask) { // which are the same among themselves
    const Thread& other = threads[first + __builtin_ctz(others)];
    if (!is_same(me, other)) {
      fail("lanes of a warp wait with different masks or at different places: %s, %s",
           describe(me).c_str(), describe(other).c_str());
    }
  }
  warp.waiting |= 1u << own % 32;
  if ((warp.waiting & mask) != mask) {
    switch_to_scheduler();
    return me.result;
  }
  warp.waiting &= ~mask;
  now += kind == SYNC_WARP;
  uint64_t votes = 0;
  for (unsigned left = kind == VOTE ? mask : 0; left != 0; left &= left - 1) {
    votes |= threads[first + __builtin_ctz(left)].value << __builtin_ctz(left);
  }
  for (unsigned left = mask; left != 0; left &= left - 1) {
    Thread& other = threads[first + __builtin_ctz(left)];
    if (kind == SYNC_WARP) {
      other.warp_time = now, other.warp_mask = mask;
    }
    release(other, kind == VOTE ? votes : threads[first + other.source].value);
  }
  return me.result;
}

int meet_block(Meeting kind, int value, Place place) {
  const Unchecked code;
  Thread& me = *current;
  wait(BLOCK_WAITS, kind, 0, value, 0, place);
  first_at_barrier = arrived == 0 ? &me : first_at_barrier;
  if (!is_same(me, *first_at_barrier) || alive < threads.size()) {
    fail("threads do not meet at one barrier: %s, %s, %zu have ended", describe(me).c_str(),
         describe(*first_at_barrier).c_str(), threads.size() - alive);
  }
  sum = arrived == 0 ? value : sum + value;
  ++arrived;
  if (arrived < threads.size()) {
    switch_to_scheduler();
  } else {
    arrived = 0;
    barrier_time = ++now;
    for (Thread& t : threads) {
      release(t, sum);
    }
  }
  return static_cast<int>(me.result);
}

void access(const void* address, size_t size, Kind kind, const void* caller) {
  if (!is_checked) {
    return;
  }
  const Unchecked code;
  const auto is_within = [&](const void* start, size_t length) {
    return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(start) < length;
  };
  if (is_within(stacks, MOST_THREADS * STACK) || is_within(call.data, call.size) ||
      is_within(indices, sizeof(indices))) {
    return;
  }
  check_repeated();
  const size_t at = static_cast<const char*>(address) - arena;
  const char* what = kind == READ ? "read" : kind == WRITE ? "write" : "atomic";
  if (at >= ARENA || at % PAGE + size > valid_bytes[at / PAGE]) {
    fail("out of bounds: %s of %zu bytes at %s%s", what, size, describe(address).c_str(),
         source_of(caller).c_str());
  }
  if (at % size != 0) {
    fail("misaligned: %s of %zu bytes at %s%s", what, size, describe(address).c_str(),
         source_of(caller).c_str());
  }
  const size_t unit = size < 4 ? size : 4;
  Cell* cell = size < 4 ? bytes + at : words + at / 4;
  const uint16_t own = rank_of(*current);
  for (size_t i = 0; i < size; i += unit, ++cell) {
    Use &write = cell->write, &read = cell->read;
    if (is_unordered(write) && !(kind == ATOMIC && write.is_atomic)) {
      if (kind != WRITE || write.is_atomic) {
        fail_race(address, size, write.thread, caller);
      }
      repeated = {size, static_cast<const char*>(address), {}, write.thread, caller};
      std::memcpy(repeated.before, address, size);
    }
    if (kind == READ) {
      read = {now, own, false, read.time >= barrier_time && (read.thread != own || read.is_shared)};
    } else {
      if (is_unordered(read)) {
        fail_race(address, size, read.thread, caller);
      }
      write = {now, own, kind == ATOMIC, false};
    }
  }
}

// ----------------------------------------------------------------------------------- memory

// Every allocation starts on a page and is followed by one that may not be used.
void* allocate(size_t size) {
  const std::lock_guard<std::mutex> guard(memory_lock);
  const size_t pages = (size + PAGE - 1) / PAGE + 1;
  auto& unused = freed[pages];
  size_t first = arena_end;
  if (!unused.empty() && freed_pages * PAGE > ARENA / 8) { // late, to notice use after free
    first = unused.front();
    unused.pop_front();
    freed_pages -= pages;
  } else {
    arena_end += pages * PAGE;
  }
  if (arena_end > ARENA) {
    throw std::bad_alloc();
  }
  blocks[first] = size;
  for (size_t i = 0; i < size; i += PAGE) {
    valid_bytes[(first + i) / PAGE] = std::min(size - i, PAGE);
  }
  std::memset(arena + first, 0xff, size);
  return arena + first;
}

void give_back(void* pointer) {
  const std::lock_guard<std::mutex> guard(memory_lock);
  const size_t first = static_cast<char*>(pointer) - arena, size = blocks.at(first);
  const size_t room = (size + PAGE - 1) / PAGE * PAGE;
  blocks.erase(first);
  std::memset(valid_bytes + first / PAGE, 0, room / PAGE * sizeof(*valid_bytes));
  for (auto [start, length] : {std::pair<void*, size_t>{arena + first, room},
                               {words + first / 4, room / 4 * sizeof(Cell)},
                               {bytes + first, room * sizeof(Cell)}}) {
    madvise(start, length, MADV_DONTNEED);
  }
  freed[room / PAGE + 1].push_back(first);
  freed_pages += room / PAGE + 1;
}

} // namespace emulator

// ----------------------------------------------------------- what the compiler makes code call

namespace {

// An access that the compiler does not know to be aligned, in the largest aligned parts.
void access_parts(const char* from, size_t size, emulator::Kind kind, const void* caller) {
  for (size_t step = 0; size > 0; from += step, size -= step) {
    step = 8;
    while (step > size || reinterpret_cast<uintptr_t>(from) % step != 0) {
      step /= 2;
    }
    emulator::access(from, step, kind, caller);
  }
}

} // namespace

extern "C" {

#define HOOK(name, function, size, kind)                                                         \
  void __tsan_##name(const char* p) {                                                            \
    function(p, size, emulator::kind, __builtin_return_address(0));                              \
  }
#define HOOKS(size)                                                                              \
  HOOK(read##size, emulator::access, size, READ)                                                 \
  HOOK(write##size, emulator::access, size, WRITE)                                               \
  HOOK(unaligned_read##size, access_parts, size, READ)                                           \
  HOOK(unaligned_write##size, access_parts, size, WRITE)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)

void __tsan_read_range(const char* p, size_t size) {
  access_parts(p, size, emulator::READ, __builtin_return_address(0));
}
void __tsan_write_range(const char* p, size_t size) {
  access_parts(p, size, emulator::WRITE, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Atomics of the host's code, such as reference counts.
#define ATOMICS(bits, T)                                                                         \
  T __tsan_atomic##bits##_load(const T* p, int) { return __atomic_load_n(p, 5); }                \
  void __tsan_atomic##bits##_store(T* p, T x, int) { __atomic_store_n(p, x, 5); }                \
  T __tsan_atomic##bits##_fetch_add(T* p, T x, int) { return __atomic_fetch_add(p, x, 5); }      \
  T __tsan_atomic##bits##_fetch_sub(T* p, T x, int) { return __atomic_fetch_sub(p, x, 5); }      \
  bool __tsan_atomic##bits##_compare_exchange_weak(T* p, T* expected, T x, int, int) {           \
    return __atomic_compare_exchange_n(p, expected, x, false, 5, 5);                             \
  }
ATOMICS(8, uint8_t) ATOMICS(32, uint32_t) ATOMICS(64, uint64_t) // 5: sequentially consistent

} // extern "C"

#ifdef EMULATOR_WITH_TORCH
#include <c10/core/CPUAllocator.h>

namespace {

// Of all tensors on the CPU that are made after the library is loaded.
struct TensorMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = size > 0 ? emulator::allocate(size) : nullptr;
    return {data, data, &free_tensor, c10::Device(c10::DeviceType::CPU)};
  }
  static void free_tensor(void* data) {
    if (data != nullptr) {
      emulator::give_back(data);
    }
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_tensor; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
} tensor_memory;

const bool is_installed = (c10::SetCPUAllocator(&tensor_memory, 255), true);

} // namespace
#endif
