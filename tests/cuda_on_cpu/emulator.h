// What the parts of the emulator know of each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "include/cuda_runtime.h"

namespace emulator {

struct Range {
  char* begin;
  size_t bytes;
  bool holds(const void* at) const { return at >= begin && at < begin + bytes; }
};

void fail(const std::string& what);  // ends the thread that runs, and with it the launch
int current_thread();                // within its block; -1: none
unsigned current_block();            // counted over the launch
bool on_a_stack(const void*);
Range all_shared();                  // the library's thread-local segment, static shared memory and dynamic
bool beyond_dynamic(const void* at, size_t bytes);  // in shared memory that the launch did not ask for

// The race detector, race.cpp, where it is built in.
#if defined(EMULATOR_RACE)
void watch_launch();
void watch_barrier();
void watch_warp(int warp);  // __syncwarp
void watch(const void* at, size_t bytes, bool write);
#else
inline void watch_launch() {}
inline void watch_barrier() {}
inline void watch_warp(int) {}
inline void watch(const void*, size_t, bool) {}
#endif

}  // namespace emulator
