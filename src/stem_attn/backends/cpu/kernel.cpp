// Exact attention over kept key blocks. Compiled for the CPU at hand when it is first used (build.py).
//
// The queries of a row of blocks are cut into panels of two vectors: numbers of different queries lie side by side,
// so no softmax adds up the parts of a vector. All that belongs to a panel is [dim or key][query]. Both products then
// are the same: a number of the keys or values, broadcast, times the panel's vectors, summed up in registers. Or, for
// bfloat16 on a CPU with matrix units (AMX), a tile of the keys or values times a tile of the panel.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <system_error>
#include <thread>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define STEM_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct Tensor {
  void* data;
  int64_t stride[4];  // in numbers

  template <class T>
  T* at(int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) const {
    return static_cast<T*>(data) + i * stride[0] + j * stride[1] + k * stride[2] + l * stride[3];
  }
};

struct Call {
  Tensor q, k, v, out;     // [B, Hq, Tq, D], [B, Hkv, Tk, D], [B, Hkv, Tk, Dv], [B, Hq, Tq, Dv]
  Tensor lse;              // float32 [B, Hq, Tq]; no data: not wanted
  Tensor indices, counts;  // int32 [B, Hq, Qb, S], [B, Hq, Qb]
  Tensor sinks;            // float32 [Hq], one more logit a head; no data: none
  int64_t batch, heads, kv_heads, q_len, k_len, dim, v_dim;
  int64_t block_size;
  int64_t window;  // tokens; 0: none
  int64_t threads;
  float scale;
  float softcap;  // 0: none
  int32_t dtype;  // 0: float32, 1: bfloat16, 2: float16
};

#if defined(__AVX512F__)
constexpr int kLanes = 16, kSums = 8;
#elif defined(__AVX__)
constexpr int kLanes = 8, kSums = 6;
#else
constexpr int kLanes = 4, kSums = 8;
#endif
constexpr int kVecs = 2;                // of a panel; kSums * kVecs sums stay in registers
constexpr int kPanel = kVecs * kLanes;  // queries
constexpr int kQueries = 128;           // of a task: its panels share packed keys and values
constexpr int kPanels = (kQueries + kPanel - 1) / kPanel;
constexpr int kKeys = 128;  // packed at a time: with them a panel stays in the nearest cache
constexpr int kStrip = 16;  // words of a key that lie together; a row of a tile
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kInf = std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes), may_alias));

template <class To, class From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

struct Bfloat16 {
  uint16_t code;
};
struct Float16 {
  uint16_t code;
};

inline float to_float(float x) { return x; }
[[maybe_unused]] inline float to_float(Bfloat16 x) { return bits<float>(uint32_t(x.code) << 16); }
inline float to_float(Float16 x) {
  const uint32_t rest = x.code & 0x7fff, sign = x.code ^ rest;
  const uint32_t finite = bits<uint32_t>(bits<float>(rest << 13) * 0x1p112f);
  return bits<float>((rest >= 0x7c00 ? finite | 0x7f800000 : finite) | sign << 16);
}

inline void from_float(float x, float& y) { y = x; }
inline void from_float(float x, Bfloat16& y) {
  const uint32_t u = bits<uint32_t>(x);
  y.code = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void from_float(float x, Float16& y) {
  const uint32_t rest = bits<uint32_t>(x) & 0x7fffffff, sign = bits<uint32_t>(x) >> 16 & 0x8000;
  uint32_t code;
  if (rest > 0x7f800000) {
    code = 0x7e00;
  } else if (rest >= 0x477ff000) {  // rounds to infinity
    code = 0x7c00;
  } else if (rest < 0x38800000) {  // below the normal numbers; the sum is rounded to their steps
    code = bits<uint32_t>(bits<float>(rest) + 0.5f) - bits<uint32_t>(0.5f);
  } else {
    code = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  }
  y.code = uint16_t(sign | code);
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// 2^x for x up to 0, rounded to 8e-8 of it (a minimax polynomial); 0 below the normal numbers.
inline Vec exp2(Vec x) {
  const float shift = 12582912.0f + 127;  // the sum's low bits are those of the nearest integer and of the exponent
  const Vec sum = x + shift;
  const Vec f = x - (sum - shift);
  Vec y = f * 1.534581200e-4f + 1.339993122e-3f;
  y = y * f + 9.618488957e-3f;
  y = y * f + 5.550328777e-2f;
  y = y * f + 2.402264689e-1f;
  y = y * f + 6.931472057e-1f;
  y = y * f + 1.0f;
  return x < -126.0f ? Vec{} : y * (Vec)((IntVec)sum << 23);
}

// To 2e-7 of it: near 0 by a polynomial (Cephes), else by a power that does not overflow.
inline Vec tanh(Vec x) {
  const Vec size = x < 0.0f ? -x : x, square = x * x;
  Vec near = square * -5.70498872745e-3f + 2.06390887954e-2f;
  near = near * square - 5.37397155531e-2f;
  near = near * square + 1.33314422036e-1f;
  near = near * square - 3.33332819422e-1f;
  near = near * square * x + x;
  const Vec power = exp2(size * (-2 * kLog2E));
  const Vec far = (1.0f - power) / (1.0f + power);
  return size < 0.625f ? near : x < 0.0f ? -far : far;
}

// What products are made of: words of 32 bits, each a float ...
template <class T>
struct Floats {
  static constexpr int kNumbers = 1;  // of a word
  static inline Vec add_product(Vec sum, float word, Vec b) { return sum + word * b; }
  static inline float word(const T* first, const T*) { return to_float(*first); }
  static inline Vec words(Vec first, Vec) { return first; }
};

// ... or a pair of bfloat16, which are multiplied and added at once.
#ifdef __AVX512BF16__
struct Pairs {
  static constexpr int kNumbers = 2;
  static inline Vec add_product(Vec sum, float word, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, bits<__m512bh>(b), bits<__m512bh>(Vec{} + word));
  }
  static inline float word(const Bfloat16* first, const Bfloat16* second) {
    return bits<float>(first->code | (second ? uint32_t(second->code) << 16 : 0));
  }
  static inline Vec words(Vec first, Vec second) {
    return alternate(bits<__m512i>(_mm512_cvtne2ps_pbh((__m512)second, (__m512)first)));
  }
  static inline Vec words(const Bfloat16* first, const Bfloat16* second) {
    const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)first));
    return alternate(_mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i*)second), 1));
  }
  static inline Vec alternate(__m512i halves) {
    const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (Vec)_mm512_permutexvar_epi16((__m512i)(lane | (lane + kLanes) << 16), halves);
  }
};
#endif

// How products are made: of two vectors of queries and kRows rows, which are keys, or dims of values. A row's words
// lie in strips of kStrip. Here in vector registers ...
template <class Words>
struct Vectors : Words {
  static constexpr int kRows = kSums;
  static constexpr int kSteps = 1;  // words are added up in steps of so many
  static constexpr bool kTiles = false;
  struct Unit {};  // what a thread holds while it multiplies

  // sums[m][n] = a row's words times b[word][n]; the row's strips are `apart` floats from one another
  static inline void multiply(const float* a, int64_t apart, const Vec* b, int64_t words, Vec (&sums)[kRows][kVecs]) {
    clear(sums);
    for (; words > 0; words -= kStrip, a += apart, b += kStrip * kVecs) {
      if (words >= kStrip) add<kStrip, 1>(a, b, kStrip, sums);
      else add<kStrip, 1>(a, b, words, sums);
    }
  }

  // The same of rows that lie as [word][row].
  static inline void multiply_columns(const float* a, const Vec* b, int64_t words, Vec (&sums)[kRows][kVecs]) {
    clear(sums);
    add<1, kRows>(a, b, words, sums);
  }

 private:
  static inline void clear(Vec (&sums)[kRows][kVecs]) {
    for (auto& row : sums) std::fill(row, row + kVecs, Vec{});
  }

  // sums[m][n] += a[m * Row + step * Step] * b[step][n], over all steps
  template <int Row, int Step>
  static inline void add(const float* a, const Vec* b, int64_t steps, Vec (&sums)[kRows][kVecs]) {
    for (int64_t step = 0; step < steps; ++step, a += Step, b += kVecs) {
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
        for (int n = 0; n < kVecs; ++n) sums[m][n] = Words::add_product(sums[m][n], a[m * Row], b[n]);
      }
    }
  }
};

// ... and here in tiles of 16 rows of 16 words.
#ifdef STEM_TILES
struct Tiles : Pairs {
  static constexpr int kRows = 2 * kStrip;
  static constexpr int kSteps = kStrip;
  static constexpr bool kTiles = true;

  // Sets up the thread's tiles. Others use them too (oneDNN): it leaves them as they were.
  class Unit {
   public:
    Unit() {
      static constexpr Config kSquares;
      _tile_storeconfig(before_);
      _tile_loadconfig(&kSquares);
    }
    ~Unit() { _tile_loadconfig(before_); }
    Unit(const Unit&) = delete;
    Unit& operator=(const Unit&) = delete;

   private:
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, unused[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    alignas(64) unsigned char before_[sizeof(Config)];  // not initialised: compilers might do that late
  };

  // Ask the system, once for the process, to let it use the tiles.
  static bool allowed() {
    static const bool is = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
    return is;
  }

  static inline void multiply(const float* a, int64_t apart, const Vec* b, int64_t words, Vec (&sums)[kRows][kVecs]) {
    constexpr int kRow = 4 * kStrip, kWord = 4 * kPanel;  // bytes
    std::atomic_signal_fence(std::memory_order_seq_cst);  // compilers do not know that loads of tiles read memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (; words > 0; words -= kStrip, a += apart, b += kStrip * kVecs) {
      _tile_loadd(4, b, kWord);
      _tile_loadd(5, b + 1, kWord);
      _tile_loadd(6, a, kRow);
      _tile_loadd(7, a + kStrip * kStrip, kRow);
      _tile_dpbf16ps(0, 6, 4);
      _tile_dpbf16ps(1, 6, 5);
      _tile_dpbf16ps(2, 7, 4);
      _tile_dpbf16ps(3, 7, 5);
    }
    _tile_stored(0, sums[0], kWord);
    _tile_stored(1, sums[0] + 1, kWord);
    _tile_stored(2, sums[kStrip], kWord);
    _tile_stored(3, sums[kStrip] + 1, kWord);
  }

  // Swap rows and columns of a tile.
  static inline void transpose(Vec (&tile)[kStrip]) {
    const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
    for (int s = 1; s < kStrip; s *= 2) {  // of every square of 2 s, swap two quarters
      const IntVec upper = (lane & s) == 0 ? lane : lane + (kStrip - s), lower = upper + s;
#pragma GCC unroll 16
      for (int i = 0; i < kStrip; ++i) {
        if (i & s) continue;
        const __m512 a = (__m512)tile[i], b = (__m512)tile[i + s];
        tile[i] = (Vec)_mm512_permutex2var_ps(a, (__m512i)upper, b);
        tile[i + s] = (Vec)_mm512_permutex2var_ps(a, (__m512i)lower, b);
      }
    }
  }
};
#endif

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
constexpr int64_t round_up(int64_t x, int64_t unit) { return ceil_div(x, unit) * unit; }

// Zeroed memory that begins where a vector may.
class Room {
 public:
  explicit Room(int64_t floats) : at_(new Vec[ceil_div(floats, kLanes)]()) {}
  ~Room() { delete[] at_; }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  float* floats() const { return (float*)at_; }
  Vec* vecs() const { return at_; }

 private:
  Vec* at_;
};

struct Task {
  int32_t sample, head, row;  // of blocks
  int32_t start, stop;        // query tokens
  int64_t cost;
};

// Where a panel's softmax has come to.
struct Panel {
  Vec peak[kVecs], total[kVecs];
  int32_t first;  // absolute position of its first query
  int32_t queries;
};

// Runs tasks, one at a time, in memory of its own. W: how it multiplies.
template <class T, class W>
class Worker {
 public:
  explicit Worker(const Call& call)
      : c_(call),
        words_(ceil_div(call.dim, W::kNumbers)),
        q_rows_(round_up(words_, W::kSteps)),
        v_rows_(round_up(call.v_dim, W::kRows)),
        q_(kPanels * q_rows_ * kPanel),
        out_(kPanels * v_rows_ * kPanel),
        k_(kMostKeys * round_up(words_, kStrip)),
        v_(kMostKeys * v_rows_),
        logits_(kMostKeys * kPanel) {}

  void run(const Task& task) {
    const int panels = int(ceil_div(task.stop - task.start, kPanel));
    for (int p = 0; p < panels; ++p) begin(task, p);
    const int64_t offset = c_.k_len - c_.q_len, seen = offset + task.stop;  // keys before it are seen by some query
    const int64_t kept = *c_.counts.at<int32_t>(task.sample, task.head, task.row);
    for (int64_t slot = 0; slot < kept; ++slot) {
      const int64_t block = *c_.indices.at<int32_t>(task.sample, task.head, task.row, slot) * c_.block_size;
      const int64_t end = std::min(block + c_.block_size, seen);
      for (int64_t key = block; key < end; key += kKeys) {
        const int64_t stop = std::min(key + kKeys, end);
        if (c_.window && offset + task.start - (stop - 1) >= c_.window) continue;  // all have left it
        const int64_t kv_head = task.head / (c_.heads / c_.kv_heads);
        pack_keys(c_.k.at<T>(task.sample, kv_head, key), stop - key);
        pack_values(c_.v.at<T>(task.sample, kv_head, key), stop - key);
        for (int p = 0; p < panels; ++p) attend(p, key, stop);
      }
    }
    for (int p = 0; p < panels; ++p) finish(task, p);
  }

 private:
  static constexpr int64_t kMostKeys = round_up(kKeys, W::kRows);

  // Write n words; word i is of first[i * step] and, if it has two numbers, second[i * step].
  static inline void pack(const T* first, const T* second, int64_t step, int64_t n, float* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = W::word(first + i * step, second ? second + i * step : nullptr);
  }

  // Write the words of one query or key, by strips that lie `apart` floats from one another.
  void pack_row(const T* from, int64_t stride, float* to, int64_t apart) const {
    const int64_t whole = c_.dim / W::kNumbers;
    for (int64_t w = 0; w < whole; w += kStrip, to += apart) {
      const T* first = from + w * W::kNumbers * stride;
      if (W::kTiles && stride == 1 && whole - w >= kStrip) std::memcpy(to, first, 4 * kStrip);
      else if (stride == 1 && whole - w >= kStrip) pack(first, first + 1, W::kNumbers, kStrip, to);
      else pack(first, first + stride, W::kNumbers * stride, std::min<int64_t>(kStrip, whole - w), to);
    }
    if (whole < words_) {
      const int64_t used = whole % kStrip;
      pack(from + whole * W::kNumbers * stride, nullptr, 0, 1, used ? to - apart + used : to);
    }
  }

  // Keys as [strip][key][word]. What is beyond the last ones keeps old words, whose logits are not read; what is beyond
  // the last words stays zero.
  void pack_keys(const T* from, int64_t keys) {
    for (int64_t j = 0; j < keys; ++j) {
      pack_row(from + j * c_.k.stride[2], c_.k.stride[3], k_.floats() + j * kStrip, kMostKeys * kStrip);
    }
  }

  // Values as [dim / kRows][key or pair of keys][kRows], or for tiles as [strip of pairs][dim][pair].
  void pack_values(const T* from, int64_t keys) {
    const int64_t steps = ceil_div(keys, W::kNumbers);
    if constexpr (W::kTiles) {
      for (int64_t step = 0; step < steps; step += kStrip) {
        for (int64_t d = 0; d < c_.v_dim; d += kStrip) {
          Vec tile[kStrip];
          if (c_.v.stride[3] == 1 && (step + kStrip) * W::kNumbers <= keys && d + kStrip <= c_.v_dim) {
            const T* first = from + step * W::kNumbers * c_.v.stride[2] + d;
            for (Vec& row : tile) {
              row = W::words(first, first + c_.v.stride[2]);
              first += 2 * c_.v.stride[2];
            }
          } else {
            for (int i = 0; i < kStrip; ++i) pack_step<kStrip>(from, keys, step + i, d, (float*)&tile[i]);
          }
          W::transpose(tile);
          std::copy(tile, tile + kStrip, v_.vecs() + step / kStrip * v_rows_ + d);
        }
      }
    } else {
      for (int64_t step = 0; step < steps; ++step) {
        for (int64_t d = 0; d < c_.v_dim; d += W::kRows) {
          pack_step<W::kRows>(from, keys, step, d, v_.floats() + d * steps + step * W::kRows);
        }
      }
    }
  }

  // Write the word that N dims from d on have of a key, or a pair of keys; zeros beyond the last dim and key.
  template <int N>
  void pack_step(const T* from, int64_t keys, int64_t step, int64_t d, float* to) const {
    const int64_t j = step * W::kNumbers, stride = c_.v.stride[3];
    const int64_t n = j < keys ? std::min<int64_t>(N, c_.v_dim - d) : 0;
    const T* first = from + j * c_.v.stride[2] + d * stride;
    const T* second = j + 1 < keys ? first + c_.v.stride[2] : nullptr;
    if (n == N && stride == 1 && second) pack(first, second, 1, N, to);
    else pack(first, second, stride, n, to);
    std::fill(to + n, to + N, 0.0f);
  }

  void begin(const Task& task, int p) {
    const int64_t start = task.start + p * kPanel;
    Panel& panel = panels_[p];
    panel.first = int32_t(c_.k_len - c_.q_len + start);
    panel.queries = int32_t(std::min<int64_t>(kPanel, task.stop - start));
    std::fill(panel.peak, panel.peak + kVecs, Vec{} - kInf);
    std::fill(panel.total, panel.total + kVecs, Vec{});
    float* q = q_.floats() + p * q_rows_ * kPanel;
    std::fill(q, q + q_rows_ * kPanel, 0.0f);
    for (int i = 0; i < panel.queries; ++i) {
      float* row = k_.floats();  // free now
      pack_row(c_.q.at<T>(task.sample, task.head, start + i), c_.q.stride[3], row, kStrip);
      for (int64_t w = 0; w < words_; ++w) q[w * kPanel + i] = row[w];
    }
    float* out = out_.floats() + p * v_rows_ * kPanel;
    std::fill(out, out + v_rows_ * kPanel, 0.0f);
  }

  // Add packed keys [key, stop) to a panel.
  void attend(int p, int64_t key, int64_t stop) {
    Panel& panel = panels_[p];
    const int64_t last = panel.first + panel.queries - 1;  // query
    const int64_t keys = std::min(stop, last + 1) - key;
    if (keys <= 0 || (c_.window && panel.first - (key + keys - 1) >= c_.window)) return;
    Vec peak[kVecs], total[kVecs] = {}, decay[kVecs];
    std::copy(panel.peak, panel.peak + kVecs, peak);
    const bool all_seen = key + keys - 1 <= panel.first && !(c_.window && last - key >= c_.window);
    if (all_seen) find_logits<false>(p, key, keys, peak);
    else find_logits<true>(p, key, keys, peak);

    Vec* weights = logits_.vecs();
    const int64_t weighed = round_up(keys, W::kSteps * W::kNumbers);
    std::fill(weights + keys * kVecs, weights + weighed * kVecs, Vec{} - kInf);
    for (int n = 0; n < kVecs; ++n) {
      std::swap(panel.peak[n], peak[n]);
      const Vec safe = panel.peak[n] == -kInf ? Vec{} : panel.peak[n];  // none seen yet
      decay[n] = exp2(peak[n] - safe);
      peak[n] = safe;
    }
    for (int64_t j = 0; j < weighed; j += W::kNumbers) {
      for (int n = 0; n < kVecs; ++n) {
        const Vec first = exp2(weights[j * kVecs + n] - peak[n]);
        total[n] += first;
        Vec second = {};
        if (W::kNumbers == 2) {
          second = exp2(weights[(j + 1) * kVecs + n] - peak[n]);
          total[n] += second;
        }
        weights[j / W::kNumbers * kVecs + n] = W::words(first, second);
      }
    }
    for (int n = 0; n < kVecs; ++n) panel.total[n] = panel.total[n] * decay[n] + total[n];

    [[maybe_unused]] const int64_t packed = ceil_div(stop - key, W::kNumbers);
    const int64_t steps = ceil_div(keys, W::kNumbers);
    Vec* out = out_.vecs() + p * v_rows_ * kVecs;
    for (int64_t d = 0; d < v_rows_; d += W::kRows) {
      Vec sums[W::kRows][kVecs];
      if constexpr (W::kTiles) W::multiply(v_.floats() + d * kStrip, v_rows_ * kStrip, weights, steps, sums);
      else W::multiply_columns(v_.floats() + d * packed, weights, steps, sums);
      for (int m = 0; m < W::kRows; ++m) {
        for (int n = 0; n < kVecs; ++n, ++out) *out = *out * decay[n] + sums[m][n];
      }
    }
  }

  // Write the logits of a panel's queries and the first `keys` packed ones, in powers of two, [key][query], and raise
  // `peak` to them. Edge: some queries do not see some of the keys.
  template <bool Edge>
  void find_logits(int p, int64_t key, int64_t keys, Vec (&peak)[kVecs]) {
    const float cap = c_.softcap, factor = cap ? c_.scale / cap : c_.scale * kLog2E;
    const Vec* q = q_.vecs() + p * q_rows_ * kVecs;
    Vec* to = logits_.vecs();
    IntVec query[kVecs] = {};
    for (int i = 0; i < kPanel; ++i) query[i / kLanes][i % kLanes] = panels_[p].first + i;
    for (int64_t j = 0; j < keys; j += W::kRows) {
      Vec sums[W::kRows][kVecs];
      W::multiply(k_.floats() + j * kStrip, kMostKeys * kStrip, q, words_, sums);
      for (int m = 0; m < W::kRows; ++m) {
        for (int n = 0; n < kVecs; ++n, ++to) {
          Vec x = sums[m][n] * factor;
          if (cap) x = tanh(x) * (cap * kLog2E);
          if (Edge) {
            const IntVec age = query[n] - int32_t(key + j + m);
            x = age < 0 ? Vec{} - kInf : x;
            if (c_.window) x = age >= int32_t(c_.window) ? Vec{} - kInf : x;
          }
          *to = x;
          if (j + m < keys) peak[n] = larger(x, peak[n]);
        }
      }
    }
  }

  void finish(const Task& task, int p) {
    Panel& panel = panels_[p];
    const int64_t start = task.start + p * kPanel;
    const float sink = c_.sinks.data ? *c_.sinks.at<float>(task.head) * kLog2E : -kInf;
    Vec decay[kVecs];
    std::fill(decay, decay + kVecs, Vec{} + 1.0f);
    for (int i = 0; i < panel.queries; ++i) {
      float peak = panel.peak[i / kLanes][i % kLanes], total = panel.total[i / kLanes][i % kLanes];
      if (sink != -kInf) {
        const float higher = std::max(peak, sink), left = std::exp2(peak - higher);
        decay[i / kLanes][i % kLanes] = left;
        total = total * left + std::exp2(sink - higher);
        panel.total[i / kLanes][i % kLanes] = total;
        peak = higher;
      }
      if (c_.lse.data) *c_.lse.at<float>(task.sample, task.head, start + i) = (peak + std::log2(total)) / kLog2E;
    }
    Vec* out = out_.vecs() + p * v_rows_ * kVecs;
    for (int64_t d = 0; d < c_.v_dim; ++d) {
      for (int n = 0; n < kVecs; ++n) out[d * kVecs + n] = out[d * kVecs + n] * decay[n] / panel.total[n];
    }
    if constexpr (W::kTiles) {
      if (c_.out.stride[3] == 1) return write_tiles(task, start, panel.queries, out);
    }
    for (int i = 0; i < panel.queries; ++i) {
      T* to = c_.out.at<T>(task.sample, task.head, start + i);
      for (int64_t d = 0; d < c_.v_dim; ++d) from_float(((float*)out)[d * kPanel + i], to[d * c_.out.stride[3]]);
    }
  }

  // Write the outputs of queries, which are [dim][query], as [query][dim].
  void write_tiles(const Task& task, int64_t start, int queries, const Vec* out) const {
    for (int i = 0; i < queries; i += kLanes) {
      for (int64_t d = 0; d < c_.v_dim; d += 2 * kStrip) {
        Vec tile[kStrip];
        for (int w = 0; w < kStrip; ++w) {
          const Vec* pair = out + (d + 2 * w) * kVecs + i / kLanes;
          tile[w] = W::words(pair[0], pair[kVecs]);
        }
        W::transpose(tile);
        const size_t bytes = sizeof(T) * std::min<int64_t>(2 * kStrip, c_.v_dim - d);
        for (int j = 0; j < std::min(queries - i, kLanes); ++j) {
          std::memcpy(c_.out.at<T>(task.sample, task.head, start + i + j, d), &tile[j], bytes);
        }
      }
    }
  }

  const typename W::Unit unit_{};
  const Call& c_;
  const int64_t words_;   // of a key
  const int64_t q_rows_;  // a query's words and the zeros that fill up its last kSteps
  const int64_t v_rows_;  // a value's dims and the zeros that fill up its last kRows
  const Room q_, out_, k_, v_;
  const Room logits_;  // and then the weights that they become
  Panel panels_[kPanels];
};

std::vector<Task> tasks_of(const Call& c) {
  std::vector<Task> tasks;
  const int64_t offset = c.k_len - c.q_len, first = offset / c.block_size;
  const int64_t rows = ceil_div(c.k_len, c.block_size) - first;
  for (int64_t sample = 0; sample < c.batch; ++sample) {
    for (int64_t head = 0; head < c.heads; ++head) {
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t begin = (first + row) * c.block_size - offset, end = std::min(begin + c.block_size, c.q_len);
        const int64_t kept = *c.counts.at<int32_t>(sample, head, row);
        for (int64_t start = std::max<int64_t>(begin, 0); start < end; start += kQueries) {
          const int64_t stop = std::min(start + kQueries, end);
          const int64_t cost = kept * (stop - start);
          tasks.push_back({int32_t(sample), int32_t(head), int32_t(row), int32_t(start), int32_t(stop), cost});
        }
      }
    }
  }
  // The largest first, so that nobody begins a long one at the end.
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) { return x.cost > y.cost; });
  return tasks;
}

template <class T, class W = Vectors<Floats<T>>>
void attend(const Call& call) {
  const std::vector<Task> tasks = tasks_of(call);
  std::atomic<size_t> next{0};
  const auto work = [&] {
    Worker<T, W> worker(call);
    for (size_t i; (i = next++) < tasks.size();) worker.run(tasks[i]);
  };
  const auto help = [&] {
    try {
      work();
    } catch (const std::bad_alloc&) {  // the others do its share
    }
  };
  // New threads: none is left behind to be missing after a fork, and they run where the calling one may.
  std::vector<std::thread> helpers;
  const size_t wanted = std::min(size_t(call.threads), tasks.size());
  helpers.reserve(wanted);
  std::exception_ptr failed;
  try {
    while (helpers.size() + 1 < wanted) helpers.emplace_back(help);
  } catch (const std::exception&) {  // no more threads to be had, or no memory for one
  }
  try {
    work();
  } catch (...) {
    failed = std::current_exception();
  }
  for (std::thread& helper : helpers) helper.join();
  if (failed) std::rethrow_exception(failed);
}

void attend_bfloat16(const Call& call) {
#ifdef STEM_TILES
  if (Tiles::allowed()) return attend<Bfloat16, Tiles>(call);
#endif
#ifdef __AVX512BF16__
  attend<Bfloat16, Vectors<Pairs>>(call);
#else
  attend<Bfloat16>(call);
#endif
}

}  // namespace

// Returns 0, or 1 if there is no memory.
extern "C" int stem_attend(const Call* call) {
  try {
    if (call->dtype == 0) attend<float>(*call);
    if (call->dtype == 1) attend_bfloat16(*call);
    if (call->dtype == 2) attend<Float16>(*call);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
