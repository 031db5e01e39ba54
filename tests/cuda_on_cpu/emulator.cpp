// Runs a launch's blocks one after the other, a block's threads as fibers. Between two barriers the warps run one after
// the other in random order, each as far as it gets, so that one that needs no other runs far ahead of it; the lanes of
// a warp run in random order up to their next exchange. Shared memory is not a number until somebody writes it.
//
// Refused, with a line that says why: launches beyond what every architecture from sm_80 to sm_120 takes, barriers that
// some threads miss or meet elsewhere, exchanges that some lanes miss, writes beyond the dynamic shared memory.
#include "emulator.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the registers that a call keeps, goes on with another stack.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch,@function
emulator_switch:
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

namespace {

constexpr size_t kMostShared = 99 * 1024;  // of a block on sm_86, sm_89 and sm_120, static and dynamic
constexpr size_t kUnasked = 48 * 1024;     // without cudaFuncSetAttribute
constexpr size_t kGuard = 4 * 1024;        // beyond: nobody may write there
constexpr int kMostThreads = 1024;
constexpr size_t kStack = 128 * 1024;
constexpr char kPoison = '\xff';           // NaN in every type

}  // namespace

namespace l2p {
alignas(128) thread_local uint4 dynamic_memory[(kMostShared + kGuard) / sizeof(uint4)];
}

namespace emulator {
namespace {

enum class State { fresh, ready, at_block, at_warp, done };

struct Copy {
  char* to;
  const char* from;
  int count;
};

struct Fiber {
  State state;
  uint3 index;
  void* sp;
  char* stack;
  Place place;       // of the barrier it waits at
  const char* what;  // the exchange it waits in
  unsigned mask;
  char posted[64];
  std::vector<std::vector<Copy>> groups;  // committed, the oldest first
  std::vector<Copy> copies;               // not yet committed
  void* fake_stack;                       // AddressSanitizer's
};

char views[kMostThreads / kWarp][kWarp][64];  // what the lanes of a warp posted in its last exchange
std::vector<Fiber> fibers;
std::vector<int> warps;
std::vector<char*> free_stacks;
char* stacks = nullptr;
int current = -1;
unsigned block_number = 0;
void* scheduler_sp;
void (*body)(void*);
void* context;
std::string error, told;
std::mutex one_launch_at_a_time;
std::unordered_map<const void*, size_t> allowed;
std::minstd_rand dice(1);
Range dynamic{}, shared{};

#if defined(__SANITIZE_ADDRESS__)
const void* main_stack;
size_t main_bytes;
#endif

int count() { return static_cast<int>(fibers.size()); }

void to_scheduler() {
  Fiber& f = fibers[current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(f.state == State::done ? nullptr : &f.fake_stack, main_stack, main_bytes);
#endif
  emulator_switch(&f.sp, scheduler_sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_bytes);
#endif
  body(context);
  fibers[current].state = State::done;
  to_scheduler();
  std::abort();
}

void start(Fiber& f) {
  f.stack = free_stacks.back();
  free_stacks.pop_back();
  void** top = reinterpret_cast<void**>(f.stack + kStack);
  *--top = nullptr;  // at its entry a function's stack is 8 modulo 16
  *--top = reinterpret_cast<void*>(&entry);
  f.sp = top - 6;
}

void resume(int i) {
  Fiber& f = fibers[i];
  if (f.state == State::fresh) start(f);
  f.state = State::ready;
  current = i;
  threadIdx = f.index;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, f.stack, kStack);
#endif
  emulator_switch(&scheduler_sp, f.sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  current = -1;
  if (f.state == State::done) free_stacks.push_back(f.stack);
}

// Lets those lanes go on whose exchange is complete. False: nobody.
bool release(int first, int end) {
  bool any = false;
  for (int i = first; i < end; ++i) {
    if (fibers[i].state != State::at_warp) continue;
    const unsigned mask = fibers[i].mask;
    const char* what = fibers[i].what;
    bool complete = true;
    for (int lane = 0; lane < kWarp && complete; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const int other = first + lane;
      complete = other < end && fibers[other].state == State::at_warp && fibers[other].mask == mask &&
                 std::strcmp(fibers[other].what, what) == 0;
    }
    if (!complete) continue;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      std::memcpy(views[first / kWarp][lane], fibers[first + lane].posted, sizeof fibers[0].posted);
      fibers[first + lane].state = State::ready;
    }
    if (std::strcmp(what, "__syncwarp") == 0) watch_warp(first / kWarp);
    any = true;
  }
  return any;
}

void run_warp(int warp) {
  const int first = warp * kWarp, end = std::min(first + kWarp, count());
  do {
    const unsigned at = dice(), step = dice() | 1;
    for (unsigned i = 0; i < kWarp && error.empty(); ++i) {
      const int lane = first + static_cast<int>((at + i * step) % kWarp);
      if (lane < end && fibers[lane].state <= State::ready) resume(lane);
    }
  } while (error.empty() && release(first, end));
  for (int i = first; i < end; ++i) {
    if (fibers[i].state == State::at_warp) {
      return fail("thread " + std::to_string(i) + " waits in " + fibers[i].what + " for lanes that never come to it");
    }
  }
}

// All threads wait at one barrier. False: all are done, or something is wrong.
bool at_one_barrier() {
  const auto done = std::count_if(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::done; });
  if (done == count()) return false;
  const auto first = std::find_if(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state != State::done; });
  const std::string place = first->place.file_name() + (":" + std::to_string(first->place.line()));
  if (done > 0) return fail(std::to_string(done) + " threads have ended, others wait at " + place), false;
  for (const Fiber& f : fibers) {
    if (f.place.line() != first->place.line() || std::strcmp(f.place.file_name(), first->place.file_name()) != 0) {
      return fail("some threads wait at " + place + ", others at " + f.place.file_name() + ":" +
                  std::to_string(f.place.line())), false;
    }
  }
  return true;
}

void run_block() {
  for (Fiber& f : fibers) f.state = State::fresh, f.groups.clear(), f.copies.clear();
  while (error.empty()) {
    std::shuffle(warps.begin(), warps.end(), dice);
    for (int warp : warps) {
      if (error.empty()) run_warp(warp);
    }
    if (!error.empty() || !at_one_barrier()) break;
    for (Fiber& f : fibers) f.state = State::ready;
    watch_barrier();
  }
  watch_barrier();
}

// The thread-local segment of this library, of the thread that launches: all that is declared __shared__.
Range find_shared() {
  l2p::dynamic_memory[0].x = 0;  // from here on the segment is there
  struct Found {
    Range range;
    Dl_info library;
  } found{};
  dladdr(reinterpret_cast<const void*>(&emulator_switch), &found.library);
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* given) {
        Found& found = *static_cast<Found*>(given);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const auto at = reinterpret_cast<char*>(info->dlpi_addr + header.p_vaddr);
          if (header.p_type == PT_LOAD && found.library.dli_fbase >= at && found.library.dli_fbase < at + header.p_memsz) {
            for (int k = 0; k < info->dlpi_phnum; ++k) {
              if (info->dlpi_phdr[k].p_type == PT_TLS) {
                found.range = {static_cast<char*>(info->dlpi_tls_data), info->dlpi_phdr[k].p_memsz};
              }
            }
            return 1;
          }
        }
        return 0;
      },
      &found);
  return found.range;
}

// Calls body(part) with the shared memory that is static: what lies around the dynamic.
template <typename Body>
void each_static(const Body& body) {
  const Range all = shared;
  char* const begin = reinterpret_cast<char*>(l2p::dynamic_memory);
  char* const end = begin + sizeof l2p::dynamic_memory;
  body(Range{all.begin, static_cast<size_t>(begin - all.begin)});
  body(Range{end, static_cast<size_t>(all.begin + all.bytes - end)});
}

void poison_shared() {
  each_static([](Range part) { std::memset(part.begin, kPoison, part.bytes); });
  std::memset(dynamic.begin, kPoison, dynamic.bytes + kGuard);
}

bool is_poison(const char* begin, size_t bytes) {
  return std::all_of(begin, begin + bytes, [](char c) { return c == kPoison; });
}

// Bytes of static shared memory that the last block wrote.
size_t static_bytes() {
  size_t bytes = 0;
  each_static([&](Range part) {
    bytes += part.bytes - static_cast<size_t>(std::count(part.begin, part.begin + part.bytes, kPoison));
  });
  return bytes;
}

std::string wrong_with(const cudaLaunchConfig_t& c, size_t threads, size_t most_shared, size_t parameter_bytes) {
  const auto said = [](const char* what, size_t got, size_t most) {
    return got > most ? std::string(what) + ": " + std::to_string(got) + ", at most " + std::to_string(most) : "";
  };
  if (threads == 0 || c.gridDim.x == 0 || c.gridDim.y == 0 || c.gridDim.z == 0) return "a launch of no threads";
  for (const std::string& problem :
       {said("threads of a block", threads, kMostThreads), said("threads of a block along z", c.blockDim.z, 64),
        said("blocks along x", c.gridDim.x, 0x7fffffff), said("blocks along y", c.gridDim.y, 65535),
        said("blocks along z", c.gridDim.z, 65535), said("bytes of parameters", parameter_bytes, 4096),
        said("bytes of dynamic shared memory", c.dynamicSmemBytes, most_shared)}) {
    if (!problem.empty()) return problem;
  }
  return "";
}

void arrive(const Copy& copy) {
  watch(copy.to, 16, true);
  watch(copy.from, copy.count, false);
  std::memset(copy.to, 0, 16);
  std::memcpy(copy.to, copy.from, copy.count);
}

}  // namespace

void fail(const std::string& what) {
  if (error.empty()) error = what;
  if (current < 0) return;
  fibers[current].state = State::done;  // what it was about to do may crash
  to_scheduler();
}

int current_thread() { return current; }
unsigned current_block() { return block_number; }
bool on_a_stack(const void* at) { return at >= stacks && at < stacks + kMostThreads * kStack; }
Range dynamic_shared() { return dynamic; }
Range all_shared() { return shared; }
bool beyond_dynamic(const void* at, size_t bytes) {
  return Range{dynamic.begin, sizeof l2p::dynamic_memory}.holds(at) &&
         static_cast<const char*>(at) + bytes > dynamic.begin + dynamic.bytes;
}

void sync_block(const Place& place) {
  fibers[current].state = State::at_block;
  fibers[current].place = place;
  to_scheduler();
}

const char* exchange(const char* what, unsigned mask, const void* mine, size_t bytes) {
  if (!(mask >> lane() & 1)) fail(std::string(what) + " with a mask that leaves out the lane itself");
  Fiber& f = fibers[current];
  if (bytes > 0) std::memcpy(f.posted, mine, bytes);
  f.state = State::at_warp;
  f.what = what;
  f.mask = mask;
  to_scheduler();
  return views[current / kWarp][0];
}

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kMostShared) {
    return fail("more shared memory than sm_86, sm_89 and sm_120 have: " + std::to_string(bytes)), cudaErrorInvalidValue;
  }
  allowed[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t run(const void* kernel, const cudaLaunchConfig_t& c, size_t parameter_bytes, void (*given_body)(void*),
                void* given_context) {
  const std::scoped_lock lock(one_launch_at_a_time);
  const size_t threads = size_t{c.blockDim.x} * c.blockDim.y * c.blockDim.z;
  const size_t most_shared = allowed.contains(kernel) ? allowed[kernel] : kUnasked;
  if (error.empty()) error = wrong_with(c, threads, most_shared, parameter_bytes);
  if (!error.empty()) return cudaErrorInvalidConfiguration;
  if (stacks == nullptr) {
    stacks = static_cast<char*>(mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  free_stacks.clear();
  for (int i = kMostThreads - 1; i >= 0; --i) free_stacks.push_back(stacks + i * kStack);
  shared = find_shared();
  dynamic = {reinterpret_cast<char*>(l2p::dynamic_memory), c.dynamicSmemBytes};
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks, kMostThreads * kStack);  // where a thread was ended in the middle
#endif
  body = given_body;
  context = given_context;
  blockDim = c.blockDim;
  gridDim = c.gridDim;
  fibers.assign(threads, Fiber{});
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }
  warps.resize((threads + kWarp - 1) / kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  watch_launch();
  block_number = 0;
  for (unsigned z = 0; z < gridDim.z; ++z) {
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x && error.empty(); ++x, ++block_number) {
        blockIdx = {x, y, z};
        poison_shared();
#if defined(__SANITIZE_ADDRESS__)
        __asan_poison_memory_region(dynamic.begin + dynamic.bytes, sizeof l2p::dynamic_memory - dynamic.bytes);
#endif
        run_block();
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(dynamic.begin, sizeof l2p::dynamic_memory);
#endif
        if (!is_poison(dynamic.begin + dynamic.bytes, kGuard)) fail("a write beyond the dynamic shared memory");
        if (block_number == 0 && dynamic.bytes + static_bytes() > std::max(most_shared, kUnasked)) {
          fail("more shared memory, static and dynamic, than asked for: " +
               std::to_string(dynamic.bytes + static_bytes()));
        }
      }
    }
  }
  return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulator

cudaError_t cudaGetLastError() { return emulator::error.empty() ? cudaSuccess : cudaErrorLaunchFailure; }
const char* cudaGetErrorString(cudaError_t) {
  emulator::told = std::exchange(emulator::error, "");
  return emulator::told.c_str();
}

// What csrc/checks.h wants of a PyTorch with CUDA.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

namespace l2p {
namespace {

float bf16_of(uint32_t word, int half) {
  const uint32_t bits = half ? word & 0xffff0000u : word << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

// PTX, "Matrix Fragments for mma.m16n8k16 with floating point type": with group = lane / 4 and k = lane % 4
// A: row group (registers 0, 2) or group + 8 (1, 3), columns 2 k and 2 k + 1, plus 8 (2, 3)
// B: rows 2 k and 2 k + 1, plus 8 (1), column group
// C: row group (0, 1) or group + 8 (2, 3), column 2 k + register % 2
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const char* given = emulator::exchange("mma", 0xffffffffu, mine, sizeof mine);
  const auto word = [&](int lane, int reg) {
    uint32_t value;
    std::memcpy(&value, given + 64 * lane + 4 * reg, sizeof value);
    return value;
  };
  const int lane = static_cast<int>(emulator::lane());
  float left[2][16], right[2][16];  // the two rows and the two columns that this lane's sums are of
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 2; ++i) {
      left[i][k] = bf16_of(word(lane / 4 * 4 + k % 8 / 2, i + k / 8 * 2), k % 2);
      right[i][k] = bf16_of(word((lane % 4 * 2 + i) * 4 + k % 8 / 2, 4 + k / 8), k % 2);
    }
  }
  for (int reg = 0; reg < 4; ++reg) {
    double sum = c[reg];
    for (int k = 0; k < 16; ++k) sum += static_cast<double>(left[reg / 2][k]) * right[reg % 2][k];
    c[reg] = static_cast<float>(sum);
  }
}

// PTX, "ldmatrix": lane l gets of every matrix the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
void load_matrices(uint32_t (&to)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fail("ldmatrix from an address that is no multiple of 16");
  if (!emulator::all_shared().holds(row)) emulator::fail("ldmatrix from what is not shared memory");
  emulator::watch(row, 16, false);
  const char* given = emulator::exchange("ldmatrix", 0xffffffffu, row, 16);
  const unsigned lane = emulator::lane();
  for (unsigned m = 0; m < 4; ++m) std::memcpy(&to[m], given + 64 * (m * 8 + lane / 4) + 4 * (lane % 4), 4);
}

void copy_async(void* to, const void* from, int count) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    emulator::fail("cp.async between addresses that are no multiples of 16");
  }
  if (!emulator::all_shared().holds(to) || emulator::beyond_dynamic(to, 16)) {
    emulator::fail("cp.async to what is not this block's shared memory");
  }
  emulator::watch(to, 16, true);
  emulator::fibers[emulator::current].copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), count});
}

void commit_copies() {
  emulator::Fiber& f = emulator::fibers[emulator::current];
  f.groups.push_back(std::move(f.copies));
  f.copies.clear();
}

void wait_copies(int groups_left) {
  auto& groups = emulator::fibers[emulator::current].groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    for (const emulator::Copy& copy : groups.front()) emulator::arrive(copy);
    groups.erase(groups.begin());
  }
}

}  // namespace l2p
