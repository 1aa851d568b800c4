// Exact Top-k of a row by threshold search, fused with the sigmoid of the gate.
//
// Scores become integer keys of the same order (-0 as +0, NaN as -inf). The search narrows [low, high) with
// count(key >= low) >= k > count(key >= high), by interpolation and, whenever that is slow, by halving; most rows end
// early, at a threshold that exactly k keys reach. Ties at the threshold go to the lowest index. A call may set a least
// score of its own: the keys that reach it are counted first, and where they are fewer than k they are the selection.
#pragma once

#include "simd.hpp"

namespace {

MIDL_INLINE IVec lane_numbers() {
  IVec lane;
  for (int i = 0; i < L; ++i) lane[i] = i;
  return lane;
}

constexpr std::int32_t kLowestKey = INT32_MIN;
constexpr std::int32_t kMinusInfinityKey = std::int32_t(0xff800000u ^ 0x7fffffffu);

MIDL_INLINE IVec to_keys(Vec score) {
  score = score + 0.0f;  // -0 becomes +0
  const IVec bits = (IVec)score;
  const IVec keys = bits ^ ((bits >> 31) & 0x7fffffff);
  const IVec is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return is_nan ? splat(kMinusInfinityKey) : keys;
}

// Inverse of to_keys for finite scores.
MIDL_INLINE float to_score(std::int32_t key) { return __builtin_bit_cast(float, key ^ ((key >> 31) & 0x7fffffff)); }
MIDL_INLINE std::int32_t to_key(float score) {
  const std::int32_t bits = __builtin_bit_cast(std::int32_t, score + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

MIDL_INLINE std::int64_t sum(IVec v) {
  std::int64_t total = 0;
  for (int i = 0; i < L; ++i) total += v[i];
  return total;
}

// Keys that reach `threshold`; `keys` is padded with kLowestKey to a multiple of L.
inline std::int64_t count_reaching(const std::int32_t* keys, std::int64_t padded, std::int32_t threshold) {
  const IVec t = splat(threshold);
  IVec a = {}, b = {};
  std::int64_t i = 0;
  for (; i + 2 * L <= padded; i += 2 * L) {
    a -= (IVec)(load(keys + i) >= t);
    b -= (IVec)(load(keys + i + L) >= t);
  }
  if (i < padded) a -= (IVec)(load(keys + i) >= t);
  return sum(a + b);
}

struct Threshold {
  std::int32_t key;
  std::int64_t ties;  // how many keys equal to `key` are selected, lowest index first; < 0: all of them
};

inline Threshold find_threshold(const std::int32_t* keys, std::int64_t n, std::int64_t padded, std::int64_t k) {
  IVec least = splat(INT32_MAX), most = splat(kLowestKey);
  std::int64_t i = 0;
  for (; i + L <= n; i += L) {
    const IVec key = load(keys + i);
    least = key < least ? key : least;
    most = key > most ? key : most;
  }
  std::int32_t minimum = INT32_MAX, maximum = kLowestKey;
  for (int j = 0; j < L; ++j) {
    if (least[j] < minimum) minimum = least[j];
    if (most[j] > maximum) maximum = most[j];
  }
  for (; i < n; ++i) {
    if (keys[i] < minimum) minimum = keys[i];
    if (keys[i] > maximum) maximum = keys[i];
  }
  if (k == n) return {minimum, -1};
  std::int64_t low = minimum, high = std::int64_t(maximum) + 1;
  std::int64_t reach_low = n, reach_high = 0;
  bool halve = false;
  while (high - low > 1) {
    std::int64_t middle = low + (high - low) / 2;
    const std::int64_t width = high - low;
    if (!halve) {
      const float from = to_score(std::int32_t(low)), to = to_score(std::int32_t(high - 1));
      const float share = (float(reach_low - k) + 0.5f) / float(reach_low - reach_high + 1);
      const float guess = from + (to - from) * share;
      if (guess > from && guess < to) middle = to_key(guess);  // false for infinities and NaN
      if (middle <= low) middle = low + 1;
      if (middle >= high) middle = high - 1;
    }
    const std::int64_t reach = count_reaching(keys, padded, std::int32_t(middle));
    if (reach == k) return {std::int32_t(middle), -1};
    if (reach > k) {
      low = middle, reach_low = reach;
    } else {
      high = middle, reach_high = reach;
    }
    halve = !halve && (high - low) > width / 2;
  }
  return {std::int32_t(low), reach_low == k ? -1 : k - reach_high};
}

// Where to cut off the k largest keys that reach `least`, or the largest alone where none does; k becomes how many.
inline Threshold find_cut(const std::int32_t* keys, std::int64_t n, std::int64_t padded, std::int32_t least,
                          std::int64_t& k) {
  const std::int64_t reach = least > kMinusInfinityKey ? count_reaching(keys, padded, least) : n;
  if (reach < k) k = reach > 0 ? reach : 1;
  return k == reach ? Threshold{least, -1} : find_threshold(keys, n, padded, k);
}

MIDL_INLINE Vec exponential(Vec x) {
  const Vec upper = splat(88.7f), lower = splat(-103.9f);
  x = x > upper ? upper : x;  // NaN passes both comparisons
  x = x < lower ? lower : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504088896341f + magic;
  const Vec whole = shifted - magic;
  Vec r = x - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^whole in two steps, so that results below the normal range come out right.
  const IVec exponent = (IVec)shifted - (IVec)splat(magic);
  const IVec half = exponent >> 1;
  return p * (Vec)((half + 127) << 23) * (Vec)((exponent - half + 127) << 23);
}

MIDL_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

// Marks a group that is not selected among the weights of those that are, which lie in [0, 1] or are NaN.
constexpr float kUnselected = -1.0f;

MIDL_INLINE bool is_selected(float weight) { return !(weight < 0.0f); }

// Which of 32 weights are selected, a bit for each.
MIDL_INLINE std::uint32_t selected_bits(const float* weights) {
  std::uint32_t mask = 0;
#ifdef __AVX512F__
  for (int v = 0; v < 32; v += L)
    mask |= std::uint32_t(_mm512_cmp_ps_mask((__m512)load(weights + v), _mm512_setzero_ps(), _CMP_NLT_UQ)) << v;
#else
  IVec bits = {};
  for (int v = 0; v < 32; v += L)
    bits |= (IVec)(load(weights + v) < 0.0f) ? IVec{} : splat(std::int32_t(1)) << (lane_numbers() + v);
  for (int lane = 0; lane < L; ++lane) mask |= std::uint32_t(bits[lane]);
#endif
  return mask;
}

// What one row selects.
struct Rule {
  std::int64_t k;      // groups at most; at least one
  float least;         // score that all but the first must reach
  bool hard;           // interpolation weight 1 instead of sigmoid
};

inline void write_selected(const std::int32_t* picks, std::int64_t picked, std::int64_t k, std::int32_t* selected) {
  __builtin_memcpy(selected, picks, sizeof(std::int32_t) * std::size_t(picked));
  for (std::int64_t i = picked; i < k; ++i) selected[i] = -1;
}

// Of one vector of keys: a key is selected if fewer than k keys come before it.
inline void select_few(const float* logits, std::int64_t n, const Rule& rule, const std::int32_t* keys,
                       std::int32_t* picks, std::int32_t* selected, float* weights) {
  const IVec key = load(keys);
  const IVec lane = lane_numbers();
  IVec before = {};
  for (std::int64_t i = 0; i < n; ++i) {
    const IVec other = splat(keys[i]);
    before -= (IVec)((other > key) | ((other == key) & (lane > splat(std::int32_t(i)))));
  }
  const IVec reaches = (IVec)(key >= splat(to_key(rule.least)));
  const IVec chosen = (IVec)(before < splat(std::int32_t(rule.k))) & (reaches | (IVec)(before == splat(0)));
  if (selected) {
    std::int32_t mask[L];
    store(mask, chosen);
    std::int64_t picked = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      picks[picked] = std::int32_t(i);
      picked -= mask[i];
    }
    write_selected(picks, picked, rule.k, selected);
  }
  if (!weights) return;
  const Vec weight = rule.hard ? splat(1.0f) : sigmoid(load(logits));
  store(weights, chosen ? weight : splat(kUnselected));
}

// Select up to k of n groups of one row: indices into `selected` (unless null), ascending, -1 behind them; logits are
// replaced by the interpolation weights (kUnselected elsewhere) unless `weights` is null. `keys` and `picks` hold
// padded + 1 entries; logits and weights are padded to a multiple of L.
inline void select_row(const float* logits, const float* noise, std::int64_t n, const Rule& rule, std::int32_t* keys,
                       std::int32_t* picks, std::int32_t* selected, float* weights) {
  const std::int64_t padded = (n + L - 1) / L * L;
  std::int64_t whole = 0;
  for (; whole + L <= n; whole += L)
    store(keys + whole, to_keys(noise ? load(logits + whole) + load(noise + whole) : load(logits + whole)));
  if (whole < n) {
    // A whole vector where there is padding: gathering single lanes would take longer than all the rest of a short row.
    const std::int64_t count = n - whole;
    Vec score = weights ? load(logits + whole) : load_first(logits + whole, count);
    if (noise) score += load_first(noise + whole, count);
    store(keys + whole, (IVec)(lane_numbers() < splat(std::int32_t(count))) ? to_keys(score) : splat(kLowestKey));
  }

  if (padded == L) return select_few(logits, n, rule, keys, picks, selected, weights);

  std::int64_t count = rule.k;
  const Threshold threshold = find_cut(keys, n, padded, to_key(rule.least), count);
  if (threshold.ties >= 0) {
    // Lift the ties that are selected above the threshold and lower the others below it.
    std::int64_t left = threshold.ties;
    for (std::int64_t i = 0; i < n; ++i)
      if (keys[i] == threshold.key && left-- <= 0) keys[i] = kLowestKey;
  }
  if (selected) {
    std::int64_t picked = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      picks[picked] = std::int32_t(i);
      picked += keys[i] >= threshold.key;
    }
    write_selected(picks, count, rule.k, selected);
  }
  if (!weights) return;
  const IVec t = splat(threshold.key);
  for (std::int64_t i = 0; i < padded; i += L) {
    const Vec weight = rule.hard ? splat(1.0f) : sigmoid(load(logits + i));
    store(weights + i, (IVec)(load(keys + i) >= t) ? weight : splat(kUnselected));
  }
}

}  // namespace
