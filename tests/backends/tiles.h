// The tile instructions (AMX) in plain C++, for CPUs without them: `-include` it before the kernel.
//
// Tiles are as the thread's configuration says; without one, an instruction ends the process, as on the CPU.
// EMULATED_REFUSAL: the system lets no process use them.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Config {
  uint8_t palette, start_row, unused[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "");

struct Unit {
  Config config;
  alignas(64) unsigned char tiles[8][16][64];
};

#ifdef EMULATED_REFUSAL
inline long ask() { return -1; }
#else
inline bool allowed = false;
inline long ask() {
  allowed = true;
  return 0;
}
#endif

inline Unit& unit() {
  static thread_local Unit here{};
  return here;
}

inline void check(bool fits) {
  if (!fits) std::abort();
}

// The unit, if the tile is configured.
inline Unit& with(int tile) {
  check(unit().config.palette == 1 && unit().config.rows[tile] > 0);
  return unit();
}

inline void load_config(const void* from) {
#ifndef EMULATED_REFUSAL
  check(allowed);
#endif
  std::memset(&unit(), 0, sizeof(Unit));
  Config config;
  std::memcpy(&config, from, sizeof config);
  check(config.palette <= 1);
  if (config.palette) unit().config = config;
}

inline void store_config(void* to) { std::memcpy(to, &unit().config, sizeof(Config)); }

inline void zero(int tile) { std::memset(with(tile).tiles[tile], 0, sizeof unit().tiles[tile]); }

inline void load(int tile, const void* from, long stride) {
  Unit& u = with(tile);
  zero(tile);
  for (int row = 0; row < u.config.rows[tile]; ++row) {
    std::memcpy(u.tiles[tile][row], static_cast<const char*>(from) + row * stride, u.config.row_bytes[tile]);
  }
}

inline void store(int tile, void* to, long stride) {
  Unit& u = with(tile);
  for (int row = 0; row < u.config.rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, u.tiles[tile][row], u.config.row_bytes[tile]);
  }
}

inline float number(const unsigned char* code) {
  uint16_t half;
  std::memcpy(&half, code, 2);
  const uint32_t word = uint32_t(half) << 16;
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}

// sums[m][n] += a[m][2 k] b[k][2 n] + a[m][2 k + 1] b[k][2 n + 1]
inline void multiply(int sums, int a, int b) {
  with(sums);
  with(a);
  Unit& u = with(b);
  const Config& c = u.config;
  check(c.rows[sums] == c.rows[a] && c.row_bytes[sums] == c.row_bytes[b] && c.row_bytes[a] == 4 * c.rows[b]);
  for (int m = 0; m < c.rows[a]; ++m) {
    for (int k = 0; k < c.rows[b]; ++k) {
      for (int n = 0; n < c.row_bytes[b] / 4; ++n) {
        float x;
        std::memcpy(&x, u.tiles[sums][m] + 4 * n, 4);
        x += number(u.tiles[a][m] + 4 * k) * number(u.tiles[b][k] + 4 * n);
        x += number(u.tiles[a][m] + 4 * k + 2) * number(u.tiles[b][k] + 4 * n + 2);
        std::memcpy(u.tiles[sums][m] + 4 * n, &x, 4);
      }
    }
  }
}

}  // namespace emulated

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::load_config
#define _tile_storeconfig emulated::store_config
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply
#define syscall(...) emulated::ask()

// What a test does beside the kernel, on a thread of its own.
extern "C" void write_tile_config(const void* from) { _tile_loadconfig(from); }
extern "C" void read_tile_config(void* to) { _tile_storeconfig(to); }
