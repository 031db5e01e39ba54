// Why: runs the CUDA kernel's tiles on the host, lane by lane, so that tests on a CPU check all of it but the instruction.
#include <vector>

#include "head_tile.h"

namespace l2p {
namespace {

struct HostWarp {
  struct A {
    uint32_t lanes[32][4];
  };
  struct B {
    uint32_t lanes[32][2];
  };
  struct C {
    float lanes[32][4];
  };

  template <typename Fragment>
  static auto* of(Fragment& fragment, int lane) {
    return fragment.lanes[lane];
  }
  template <typename Body>
  static void lanes(const Body& body) {
    for (int lane = 0; lane < 32; ++lane) body(lane);
  }
  static uint32_t read(const uint32_t* word) { return *word; }
  static void clear(C& c) { c = {}; }

  // mma.m16n8k16: c += a b.
  static void multiply(C& c, const A& a, const B& b) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int reg = 0; reg < 4; ++reg) {
        left[a_column(lane, reg)][2 * a_pair(lane, reg)] = low_value(a.lanes[lane][reg]);
        left[a_column(lane, reg)][2 * a_pair(lane, reg) + 1] = high_value(a.lanes[lane][reg]);
      }
      for (int reg = 0; reg < 2; ++reg) {
        right[2 * b_pair(lane, reg)][b_output(lane)] = low_value(b.lanes[lane][reg]);
        right[2 * b_pair(lane, reg) + 1][b_output(lane)] = high_value(b.lanes[lane][reg]);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int reg = 0; reg < 4; ++reg) {
        for (int k = 0; k < 16; ++k) {
          c.lanes[lane][reg] += left[c_column(lane, reg)][k] * right[k][c_output(lane, reg)];
        }
      }
    }
  }
};

}  // namespace

const char* head_level_tiles(const HeadLevel& level) {
  const int rows = tile_rows(level);
  if (rows == 0) return "the level has more channels than shared memory holds";
  const TileLayout layout = tile_layout(level, rows);
  std::vector<uint32_t> shared(layout.words, 0x7fc07fc0u);  // what nobody writes is not a number
  for (int64_t index = 0; index < tile_count(level, rows); ++index) {
    const Tile tile = tile_at(level, rows, index);
    load_tile(level, layout, tile, shared.data(), 0, 1);
    for (int warp = 0; warp < rows; ++warp) compute_rows<HostWarp>(level, layout, tile, shared.data(), warp);
    store_tile(level, layout, tile, shared.data(), 0, 1);
  }
  return nullptr;
}

}  // namespace l2p
