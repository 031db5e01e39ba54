// Finds races. The kernels are compiled with -fsanitize=thread and these are its hooks, so every access to memory
// comes by here. Two threads, one of which writes, must not meet at a byte: of shared memory between two barriers, of global
// memory in different blocks, or between two barriers. __syncwarp parts the accesses of a warp's lanes, as barriers do.
#include <memory>
#include <unordered_map>
#include <vector>

#include "emulator.h"

namespace emulator {
namespace {

struct Access {
  uint32_t thread;  // counted over the launch from 1 on; 0: nobody
  uint16_t barriers;
  uint8_t warp_barriers;
};

struct Cell {
  Access write, read;
  bool several;  // other threads have read since, too
};

constexpr uintptr_t kPage = 4096;
std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> pages;
uintptr_t last_page = 0;
Cell* last_cells = nullptr;
uint16_t barriers = 0;
uint8_t warp_barriers[32];

Cell& cell_at(uintptr_t at) {
  const uintptr_t page = at / kPage;
  if (page != last_page || last_cells == nullptr) {
    auto& cells = pages[page];
    if (!cells) cells = std::make_unique<Cell[]>(kPage);
    last_page = page, last_cells = cells.get();
  }
  return last_cells[at % kPage];
}

uint32_t block_of(const Access& a) { return (a.thread - 1) / 1024; }
uint32_t warp_of(const Access& a) { return (a.thread - 1) / kWarp; }

bool parted(const Access& before, const Access& now, bool is_shared) {
  if (before.thread == 0 || before.thread == now.thread) return true;
  if (block_of(before) != block_of(now)) return is_shared;  // another block's shared memory is another's
  return before.barriers != now.barriers ||
         (warp_of(before) == warp_of(now) && before.warp_barriers != now.warp_barriers);
}

void say(const char* what, const Access& before, bool is_shared) {
  fail(std::string("a race: ") + what + " in " + (is_shared ? "shared" : "global") + " memory, of block " +
       std::to_string(current_block()) + " thread " + std::to_string(current_thread()) + " and block " +
       std::to_string(block_of(before)) + " thread " + std::to_string((before.thread - 1) % 1024));
}

}  // namespace

void watch_launch() { pages.clear(), last_cells = nullptr; }
void watch_barrier() { ++barriers; }
void watch_warp(int warp) { ++warp_barriers[warp]; }

void watch(const void* at, size_t bytes, bool write) {
  const int thread = current_thread();
  if (thread < 0 || on_a_stack(at)) return;
  if (beyond_dynamic(at, bytes)) return fail("an access beyond the dynamic shared memory");
  const bool is_shared = all_shared().holds(at);
  const Access now{current_block() * 1024 + static_cast<uint32_t>(thread) + 1, barriers, warp_barriers[thread / kWarp]};
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = cell_at(reinterpret_cast<uintptr_t>(at) + i);
    if (!parted(cell.write, now, is_shared)) return say(write ? "two writes" : "a read after a write", cell.write, is_shared);
    if (write) {
      if (!parted(cell.read, now, is_shared) || (cell.several && cell.read.barriers == now.barriers)) {
        return say("a write after a read", cell.read, is_shared);
      }
      cell.write = now;
    } else {
      cell.several = !parted(cell.read, now, is_shared) || (cell.several && cell.read.barriers == now.barriers);
      cell.read = now;
    }
  }
}

}  // namespace emulator

extern "C" {
#define HOOKS(bytes)                                                                       \
  void __tsan_read##bytes(void* at) { emulator::watch(at, bytes, false); }                 \
  void __tsan_write##bytes(void* at) { emulator::watch(at, bytes, true); }                 \
  void __tsan_unaligned_read##bytes(void* at) { emulator::watch(at, bytes, false); }       \
  void __tsan_unaligned_write##bytes(void* at) { emulator::watch(at, bytes, true); }       \
  void __tsan_volatile_read##bytes(void* at) { emulator::watch(at, bytes, false); }        \
  void __tsan_volatile_write##bytes(void* at) { emulator::watch(at, bytes, true); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* at, size_t bytes) { emulator::watch(at, bytes, false); }
void __tsan_write_range(void* at, size_t bytes) { emulator::watch(at, bytes, true); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
