// Products of bfloat16 by tile registers (AMX): 16 input rows against 16 neurons over 32 elements of the depth, in one
// instruction of eight times the multiply-adds of float32 vectors.
//
// A panel as panel.hpp packs it is a tile's second operand as it lies. The first wants its rows at one distance, and those
// that selected a group have none: they are copied, 32 elements of each at a time and a few steps ahead of the products,
// into a ring that stays in the nearest cache.
#pragma once

#include <type_traits>
#include <utility>

#include "panel.hpp"

namespace {

constexpr int kTileRegisterRows = 16;
constexpr int kTileDepth = 32;

// Where in its row each step of the depth begins, or null where it goes on without a gap; elements of the last one. Rows that
// lie `distance` bytes apart are read in place, 0 says that they don't.
struct TileSteps {
  const std::int64_t* starts;
  std::int64_t count, last, distance = 0;
};

#ifdef MIDL_TILES
static_assert(L == 16);
#ifdef __AMX_BF16__

template <int T>
MIDL_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
MIDL_INLINE void tile_load(const void* from, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
MIDL_INLINE void tile_store(void* to, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// Tile C += rows A . neurons B
template <int C, int A, int B>
MIDL_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Whoever multiplies by tiles holds one, thread by thread.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {};
      std::uint8_t rows[16] = {};
    } layout;
    for (int t = 0; t < 8; ++t) layout.row_bytes[t] = 64, layout.rows[t] = kTileRegisterRows;
    asm volatile("ldtilecfg %0" ::"m"(layout));
  }
  ~TileRegisters() { asm volatile("tilerelease" ::); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

#else  // The same in memory, so that other processors can test what is built upon it.

struct alignas(64) EmulatedTile {
  char bytes[kTileRegisterRows][64];
};
inline EmulatedTile* emulated_tiles() {
  static thread_local EmulatedTile tiles[8];
  return tiles;
}
template <int T>
MIDL_INLINE void tile_zero() {
  __builtin_memset(&emulated_tiles()[T], 0, sizeof(EmulatedTile));
}
template <int T>
MIDL_INLINE void tile_load(const void* from, std::int64_t stride) {
  for (int r = 0; r < kTileRegisterRows; ++r)
    __builtin_memcpy(emulated_tiles()[T].bytes[r], static_cast<const char*>(from) + r * stride, 64);
}
template <int T>
MIDL_INLINE void tile_store(void* to, std::int64_t stride) {
  for (int r = 0; r < kTileRegisterRows; ++r)
    __builtin_memcpy(static_cast<char*>(to) + r * stride, emulated_tiles()[T].bytes[r], 64);
}
template <int C, int A, int B>
MIDL_INLINE void tile_multiply() {
  EmulatedTile* tiles = emulated_tiles();
  for (int r = 0; r < kTileRegisterRows; ++r) {
    float* sums = reinterpret_cast<float*>(tiles[C].bytes[r]);
    Vec sum = load(sums);
    for (int word = 0; word < kTileRegisterRows; ++word)
      sum = add_dot_pairs(sum, splat(pair_at(reinterpret_cast<const bf16*>(tiles[A].bytes[r]) + 2 * word)),
                          load_pairs(reinterpret_cast<const bf16*>(tiles[B].bytes[word])));
    store(sums, sum);
  }
}
class TileRegisters {};

#endif

// Steps of the depth in one pass over the rows: a panel's slice stays in the nearest cache.
constexpr std::int64_t kTilePassSteps = 16;
// Steps that rows are copied ahead of the products, and the ring's length.
constexpr std::int64_t kTileAhead = 3, kTileRing = 4;
// Bytes that few rows fetch ahead of where they are.
constexpr std::int64_t kTileBytesAhead = 8192;
// Rows that go with N tiles of neurons: four tiles of sums.
constexpr int tile_rows(int n) { return 64 / n; }

MIDL_INLINE void copy_step(const bf16* from, std::int64_t length, char* to) {
  if (length == kTileDepth) {
    *reinterpret_cast<UnalignedIVec*>(to) = *reinterpret_cast<const UnalignedIVec*>(from);
  } else {
    __builtin_memset(to, 0, 64);
    for (std::int64_t i = 0; i < length; ++i) __builtin_memcpy(to + 2 * i, from + i, 2);
  }
}

// out[r][0 .. 16 N) (+)= rows[r] . a panel of N tiles' neurons over steps [first, end), the panel's slice beginning with
// `first`; without `accumulate` it starts from `bias` (or 0). 16 (M - 1) < m <= 16 M.
template <int M, int N>
[[gnu::noinline]] void tile_block(const bf16* const* rows, std::int64_t m, TileSteps steps, std::int64_t first,
                                  std::int64_t end, const bf16* panel, char* ring, const float* bias, float* out,
                                  std::int64_t ldo, bool accumulate, Ahead ahead) {
  constexpr std::int64_t kRingStep = M * kTileRegisterRows * 64, kSums = 16 * L;
  constexpr std::int64_t kStride = N * 64;  // of the panel, bytes per word
  // Sums of the last tile of rows, where not all of them are there.
  const std::int64_t partial = m - (M - 1) * kTileRegisterRows;
  alignas(64) float sums[N * kSums];
  if (accumulate && partial < kTileRegisterRows)
    for (std::int64_t r = 0; r < partial; ++r)
      for (int n = 0; n < N; ++n)
        store(sums + n * kSums + r * L, load(out + ((M - 1) * kTileRegisterRows + r) * ldo + n * L));
  const auto each = [](auto body) {
    [&]<int... I>(std::integer_sequence<int, I...>) { (body.template operator()<I>(), ...); }(
        std::make_integer_sequence<int, M * N>());
  };
  each([&]<int I>() {
    constexpr int row = I / N, n = I % N;
    if (accumulate) {
      if (row == M - 1 && partial < kTileRegisterRows)
        tile_load<I>(sums + n * kSums, 4 * L);
      else
        tile_load<I>(out + row * kTileRegisterRows * ldo + n * L, 4 * ldo);
    } else if (bias) {
      tile_load<I>(bias + n * L, 0);
    } else {
      tile_zero<I>();
    }
  });
  const auto copy = [&](std::int64_t s) {
    char* to = ring + s % kTileRing * kRingStep;
    const std::int64_t start = steps.starts ? steps.starts[s] : s * kTileDepth;
    if (s + 1 == steps.count && steps.last < kTileDepth) {
      for (std::int64_t r = 0; r < m; ++r) copy_step(rows[r] + start, steps.last, to + r * 64);
    } else if (m == M * kTileRegisterRows) {
#pragma GCC unroll 8
      for (int r = 0; r < M * kTileRegisterRows; ++r) copy_step(rows[r] + start, kTileDepth, to + r * 64);
    } else {
      for (std::int64_t r = 0; r < m; ++r) copy_step(rows[r] + start, kTileDepth, to + r * 64);
    }
  };
  const bool in_place = steps.distance != 0 && partial == kTileRegisterRows;
  const auto is_copied = [&](std::int64_t s) { return !in_place || (s + 1 == steps.count && steps.last < kTileDepth); };
  for (std::int64_t s = first; s < lesser(first + kTileAhead, end); ++s)
    if (is_copied(s)) copy(s);
  const char* column = reinterpret_cast<const char*>(panel);
  for (std::int64_t s = first; s < end; ++s, column += kTileRegisterRows * kStride) {
    if (ahead.from)
      for (const char* stop = ahead.from + ahead.step; ahead.from < stop; ahead.from += 64) __builtin_prefetch(ahead.from, 0, 2);
    const bool copied = is_copied(s);
    const char* step = copied ? ring + s % kTileRing * kRingStep : reinterpret_cast<const char*>(rows[0] + s * kTileDepth);
    const std::int64_t distance = copied ? 64 : steps.distance;
    tile_load<4>(column, kStride);
    if constexpr (N == 2) tile_load<5>(column + 64, kStride);
    [&]<int... R>(std::integer_sequence<int, R...>) {
      (
          [&] {
            tile_load<6 + R % 2>(step + R * kTileRegisterRows * distance, distance);
            tile_multiply<R * N, 6 + R % 2, 4>();
            if constexpr (N == 2) tile_multiply<R * N + 1, 6 + R % 2, 5>();
          }(),
          ...);
    }(std::make_integer_sequence<int, M>());
    if (s + kTileAhead < end && is_copied(s + kTileAhead)) copy(s + kTileAhead);
  }
  each([&]<int I>() {
    constexpr int row = I / N, n = I % N;
    if (row == M - 1 && partial < kTileRegisterRows)
      tile_store<I>(sums + n * kSums, 4 * L);
    else
      tile_store<I>(out + row * kTileRegisterRows * ldo + n * L, 4 * ldo);
  });
  if (partial < kTileRegisterRows)
    for (std::int64_t r = 0; r < partial; ++r)
      for (int n = 0; n < N; ++n)
        store(out + ((M - 1) * kTileRegisterRows + r) * ldo + n * L, load(sums + n * kSums + r * L));
}

template <int N, int M = 4 / N, class... Args>
MIDL_INLINE void tile_block_of(std::int64_t m, const bf16* const* rows, Args... args) {
  if (m > (M - 1) * kTileRegisterRows) return tile_block<M, N>(rows, m, args...);
  if constexpr (M > 1) tile_block_of<N, M - 1>(m, rows, args...);
}

// out (m x 16 N) (+)= rows . the slice of a panel that holds steps [first, end); `ahead` is what all of it fetches, by the step.
template <int N>
void multiply_slice(const bf16* const* rows, std::int64_t m, TileSteps steps, std::int64_t first, std::int64_t end,
                    const bf16* panel, char* ring, const float* bias, float* out, std::int64_t ldo, bool accumulate, Ahead ahead) {
  constexpr std::int64_t kRows = tile_rows(N);
  for (std::int64_t r = 0; r < m; r += kRows) {
    tile_block_of<N>(lesser(kRows, m - r), rows + r, steps, first, end, panel, ring, bias, out + r * ldo, ldo, accumulate, ahead);
    if (ahead.from) ahead.from += (end - first) * ahead.step;
  }
}

// Steps and bytes of a slice of N tiles' neurons that one pass goes over.
template <int N>
constexpr std::int64_t kSliceSteps = kTilePassSteps * 2 / N;
constexpr std::int64_t kSliceBytes = kTilePassSteps * kTileDepth * 2 * L * 2;

template <int N>
void multiply_by_tiles(const bf16* const* rows, std::int64_t m, const Neurons<bf16>& neurons, std::int64_t depth, TileSteps steps,
                       const float* bias, char* slice, float* out, std::int64_t ldo) {
  constexpr std::int64_t kStep = kTileDepth * N * L;  // elements of a panel
  bf16* packed = reinterpret_cast<bf16*>(slice);
  const std::int64_t blocks = divide_up(m, tile_rows(N));
  // Rows that one block takes go over the whole panel at once.
  const std::int64_t most = neurons.panel && blocks == 1 ? steps.count : kSliceSteps<N>;
  const std::int64_t pass = divide_up(steps.count, divide_up(steps.count, most));
  for (std::int64_t first = 0, end; first < steps.count; first = end) {
    end = lesser(first + pass, steps.count);
    const bf16* panel = packed;
    Ahead ahead;
    if (neurons.panel) {
      panel = neurons.panel + first * kStep;
      const bf16* next = end < steps.count ? neurons.panel + end * kStep : neurons.next;
      // One block waits for memory: what comes later in the same panel, and behind it.
      if (blocks == 1)
        ahead = {reinterpret_cast<const char*>(panel) + kTileBytesAhead, kStep * 2};
      else if (next)
        ahead = {reinterpret_cast<const char*>(next), round_up(divide_up(kStep * 2, blocks), 64)};
    } else {
      const std::int64_t start = first * kTileDepth;
      pack_panel(neurons.plain + start, neurons.stride, neurons.count, lesser(depth - start, pass * kTileDepth), packed);
    }
    multiply_slice<N>(rows, m, steps, first, end, panel, slice + kSliceBytes, bias, out, ldo, first > 0, ahead);
  }
}

// As multiply_neurons, for rows and neurons of bfloat16.
inline void multiply_tiles(const bf16* const* rows, std::int64_t m, const Neurons<bf16>& neurons, std::int64_t depth, TileSteps steps,
                           const float* bias, float* slice, float* out, std::int64_t ldo) {
  if (m == 0) return;
  if (neurons.count > L)
    multiply_by_tiles<2>(rows, m, neurons, depth, steps, bias, reinterpret_cast<char*>(slice), out, ldo);
  else
    multiply_by_tiles<1>(rows, m, neurons, depth, steps, bias, reinterpret_cast<char*>(slice), out, ldo);
}
static_assert(kSliceBytes + kTileRing * 4 * kTileRegisterRows * 64 <= slice_floats() * 4);

#else
class TileRegisters {};
inline void multiply_tiles(const bf16* const*, std::int64_t, const Neurons<bf16>&, std::int64_t, TileSteps, const float*, float*,
                           float*, std::int64_t) {}
template <int N>
void multiply_slice(const bf16* const*, std::int64_t, TileSteps, std::int64_t, std::int64_t, const bf16*, char*, const float*,
                    float*, std::int64_t, bool, Ahead) {}
#endif

// Held by every thread of a call that may multiply elements of type E by tiles.
struct NoTileRegisters {};
template <class E>
using TilesFor = std::conditional_t<kTiles && sizeof(E) == 2, TileRegisters, NoTileRegisters>;

// The steps of rows without a gap.
MIDL_INLINE TileSteps whole_steps(std::int64_t depth, std::int64_t distance = 0) {
  return {nullptr, divide_up(depth, kTileDepth), depth - (divide_up(depth, kTileDepth) - 1) * kTileDepth, distance};
}

}  // namespace
