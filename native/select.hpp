// Exact Top-k of a row by threshold search, fused with the sigmoid of the gate.
//
// Scores become integer keys of the same order (-0 as +0, NaN as -inf). The search narrows [low, high) with
// count(key >= low) >= k > count(key >= high): the first guess is where the k-th key of a normal distribution would lie,
// the next ones interpolate and, whenever that is slow, halve. Most rows end early, at a threshold that exactly k keys
// reach. Ties at the threshold go to the lowest index. A call may set a least score of its own: the keys that reach it
// are counted first, and where they are fewer than k they are the selection.
#pragma once

#include <utility>

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

MIDL_INLINE IVec lesser_of(IVec a, IVec b) { return a < b ? a : b; }
MIDL_INLINE IVec greater_of(IVec a, IVec b) { return a > b ? a : b; }

// All lanes combined by `join`, which must not care for their order.
template <int N, class V, class Join, std::size_t... I>
MIDL_INLINE V join_rotated(V v, Join join, std::index_sequence<I...>) {
  return join(v, __builtin_shufflevector(v, v, (int(I) + N) % L...));
}
template <int N = L / 2, class V, class Join>
MIDL_INLINE auto join_lanes(V v, Join join) {
  if constexpr (N == 0) return v[0];
  else return join_lanes<N / 2>(join_rotated<N>(v, join, std::make_index_sequence<L>{}), join);
}
template <class V>
MIDL_INLINE auto sum(V v) {
  return join_lanes(v, [](V a, V b) { return a + b; });
}

// total + 1 in lanes where key >= threshold
MIDL_INLINE IVec count_lanes(IVec total, IVec key, IVec threshold) {
#ifdef __AVX512F__
  return (IVec)_mm512_mask_sub_epi32((__m512i)total, _mm512_cmpge_epi32_mask((__m512i)key, (__m512i)threshold), (__m512i)total,
                                     _mm512_set1_epi32(-1));
#else
  return total - (IVec)(key >= threshold);
#endif
}

// Keys that reach `threshold`; `keys` is padded with kLowestKey to a multiple of L.
inline std::int64_t count_reaching(const std::int32_t* keys, std::int64_t padded, std::int32_t threshold) {
  const IVec t = splat(threshold);
  IVec a = {}, b = {};
  std::int64_t i = 0;
  for (; i + 2 * L <= padded; i += 2 * L) {
    a = count_lanes(a, load(keys + i), t);
    b = count_lanes(b, load(keys + i + L), t);
  }
  if (i < padded) a = count_lanes(a, load(keys + i), t);
  return sum(a + b);
}

struct Threshold {
  std::int32_t key;
  std::int64_t ties;  // how many keys equal to `key` are selected, lowest index first; < 0: all of them
};

// Where a row's scores lie.
struct Spread {
  IVec least = splat(INT32_MAX), most = splat(kLowestKey);  // keys
  Vec total = {}, squares = {};                             // scores
  MIDL_INLINE void add(IVec key, Vec score) { add(key, key, score); }
  // Of the first lanes, which `inside` names.
  MIDL_INLINE void add_inside(IVec key, Vec score, IVec inside) {
    add(inside ? key : splat(INT32_MAX), inside ? key : splat(kLowestKey), inside ? score : Vec{});
  }
  // The score that lies so many standard deviations above their mean; anything where some are not finite.
  MIDL_INLINE float above_mean(std::int64_t n, float deviations) const {
    const float mean = sum(total) / float(n), variance = sum(squares) / float(n) - mean * mean;
    return mean + deviations * __builtin_sqrtf(variance > 0.0f ? variance : 0.0f);
  }

 private:
  MIDL_INLINE void add(IVec low, IVec high, Vec score) {
    least = lesser_of(least, low), most = greater_of(most, high);
    total += score, squares += score * score;
  }
};

inline Threshold find_threshold(const std::int32_t* keys, std::int64_t n, std::int64_t padded, std::int64_t k,
                                const Spread& spread, float deviations) {
  const std::int32_t minimum = join_lanes(spread.least, lesser_of), maximum = join_lanes(spread.most, greater_of);
  if (k == n) return {minimum, -1};
  std::int64_t low = minimum, high = std::int64_t(maximum) + 1;
  std::int64_t reach_low = n, reach_high = 0;
  float guess = spread.above_mean(n, deviations);
  // An end that stays weighs half as much each time, or the other would creep up to what is sought.
  float weight_low = 1, weight_high = 1;
  for (int slow = 0, last = 0; high - low > 1;) {
    std::int64_t middle = low + (high - low) / 2;
    const std::int64_t width = high - low;
    if (slow < 2) {
      const float from = to_score(std::int32_t(low)), to = to_score(std::int32_t(high - 1));
      if (last != 0) {
        const float above = float(reach_low - k) * weight_low + 0.5f, below = float(k - reach_high) * weight_high + 0.5f;
        guess = from + (to - from) * above / (above + below);
      }
      if (guess > from && guess < to) middle = to_key(guess);  // false for infinities and NaN
      if (middle <= low) middle = low + 1;
      if (middle >= high) middle = high - 1;
    } else {
      slow = 0;
    }
    const std::int64_t reach = count_reaching(keys, padded, std::int32_t(middle));
    if (reach == k) return {std::int32_t(middle), -1};
    if (reach > k) {
      weight_high = last > 0 ? weight_high / 2 : 1;
      low = middle, reach_low = reach, weight_low = 1, last = 1;
    } else {
      weight_low = last < 0 ? weight_low / 2 : 1;
      high = middle, reach_high = reach, weight_high = 1, last = -1;
    }
    slow = high - low > width / 2 ? slow + 1 : 0;
  }
  return {std::int32_t(low), reach_low == k ? -1 : k - reach_high};
}

// Where to cut off the k largest keys that reach `least`, or the largest alone where none does; k becomes how many.
inline Threshold find_cut(const std::int32_t* keys, std::int64_t n, std::int64_t padded, std::int32_t least,
                          std::int64_t& k, const Spread& spread, float deviations) {
  const std::int64_t reach = least > kMinusInfinityKey ? count_reaching(keys, padded, least) : n;
  if (reach < k) k = reach > 0 ? reach : 1;
  return k == reach ? Threshold{least, -1} : find_threshold(keys, n, padded, k, spread, deviations);
}

#ifdef __AVX512F__
// A mask for the sake of compilers, which else warn of lanes that nobody set.
constexpr __mmask16 kAllLanes = 0xffff;
#endif

MIDL_INLINE Vec exponential(Vec x) {
  const Vec upper = splat(88.7f), lower = splat(-103.9f);
  // NaN passes both comparisons.
#ifdef __AVX512F__
  x = (Vec)_mm512_maskz_max_ps(kAllLanes, (__m512)lower, _mm512_maskz_min_ps(kAllLanes, (__m512)upper, (__m512)x));
#else
  x = x > upper ? upper : x;
  x = x < lower ? lower : x;
#endif
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
#ifdef __AVX512F__
  return (Vec)_mm512_maskz_scalef_ps(kAllLanes, (__m512)p, (__m512)whole);
#else
  // 2^whole in two steps, so that results below the normal range come out right.
  const IVec exponent = (IVec)shifted - (IVec)splat(magic);
  const IVec half = exponent >> 1;
  return p * (Vec)((half + 127) << 23) * (Vec)((exponent - half + 127) << 23);
#endif
}

MIDL_INLINE Vec sigmoid(Vec x) {
  const Vec divisor = 1.0f + exponential(-x);
#ifdef __AVX512F__
  // A division would take as long as all the rest. Good to a unit in the last place.
  const Vec quotient = (Vec)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)divisor);
  return quotient + quotient * (1.0f - divisor * quotient);
#else
  return 1.0f / divisor;
#endif
}

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
  float deviations;    // how many standard deviations above the mean k of the groups lie if they are normally distributed

  Rule(std::int64_t k_, std::int64_t groups, float least_, bool hard_) : k(k_), least(least_), hard(hard_) {
    // Abramowitz and Stegun 26.2.22, good to 0.003.
    const double share = (double(k) - 0.5) / double(groups), tail = share < 0.5 ? share : 1 - share;
    const double t = __builtin_sqrt(-2 * __builtin_log(tail));
    const double above = t - (2.30753 + 0.27061 * t) / (1 + t * (0.99229 + 0.04481 * t));
    deviations = float(share < 0.5 ? above : -above);
  }
};

inline void write_selected(const std::int32_t* picks, std::int64_t picked, std::int64_t k, std::int32_t* selected) {
  __builtin_memcpy(selected, picks, sizeof(std::int32_t) * std::size_t(picked));
  for (std::int64_t i = picked; i < k; ++i) selected[i] = -1;
}

// Write the numbers, from `first` on, of the lanes that are chosen, up to L of them and something behind; return how many.
MIDL_INLINE std::int64_t write_lanes(IVec chosen, std::int64_t first, std::int32_t* picks) {
  const IVec number = lane_numbers() + std::int32_t(first);
#ifdef __AVX512F__
  const __mmask16 mask = _mm512_cmplt_epi32_mask((__m512i)chosen, _mm512_setzero_si512());
  store(picks, (IVec)_mm512_maskz_compress_epi32(mask, (__m512i)number));
  return __builtin_popcount(mask);
#else
  std::int64_t picked = 0;
  for (int lane = 0; lane < L; ++lane) {
    picks[picked] = number[lane];
    picked -= chosen[lane];
  }
  return picked;
#endif
}

// Of so many vectors of keys it is faster to count what comes before each.
constexpr int kFewVectors = 3;

// Of V vectors of keys: one is selected if fewer than k keys come before it.
template <int V>
inline void select_few(const float* logits, std::int64_t n, const Rule& rule, const std::int32_t* keys,
                       std::int32_t* picks, std::int32_t* selected, float* weights) {
  const IVec lane = lane_numbers();
  IVec key[V], above[V], before[V];  // `above`: the next higher key
  for (int v = 0; v < V; ++v) key[v] = load(keys + v * L), above[v] = key[v] + 1, before[v] = IVec{};
#pragma GCC unroll 3
  for (int w = 0; w < V; ++w) {
    const std::int64_t lanes = n - w * L < L ? n - w * L : L;
    for (std::int64_t i = 0; i < lanes; ++i) {
      // An equal key comes before those of higher number.
      const IVec other = splat(keys[w * L + i]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v)
        before[v] = count_lanes(before[v], other, v < w ? above[v] : v > w ? key[v] : lane > splat(std::int32_t(i)) ? key[v] : above[v]);
    }
  }
  const IVec least = splat(to_key(rule.least)), k = splat(std::int32_t(rule.k));
  std::int64_t picked = 0;
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) {
    const IVec chosen = (IVec)(before[v] < k) & ((IVec)(key[v] >= least) | (IVec)(before[v] == splat(0)));
    if (selected) picked += write_lanes(chosen, v * L, picks + picked);
    if (!weights) continue;
    const Vec weight = rule.hard ? splat(1.0f) : sigmoid(load(logits + v * L));
    store(weights + v * L, chosen ? weight : splat(kUnselected));
  }
  if (selected) write_selected(picks, picked, rule.k, selected);
}

template <int V = kFewVectors, class... Args>
MIDL_INLINE void select_vectors(std::int64_t vectors, Args... args) {
  if (vectors == V) return select_few<V>(args...);
  if constexpr (V > 1) select_vectors<V - 1>(vectors, args...);
}

// Select up to k of n groups of one row: indices into `selected` (unless null), ascending, -1 behind them; logits are
// replaced by the interpolation weights (kUnselected elsewhere) unless `weights` is null. `keys` and `picks` hold as many
// entries, padded to a multiple of L like logits and weights.
inline void select_row(const float* logits, const float* noise, std::int64_t n, const Rule& rule, std::int32_t* keys,
                       std::int32_t* picks, std::int32_t* selected, float* weights) {
  const std::int64_t padded = (n + L - 1) / L * L;
  Spread spread;
  std::int64_t whole = 0;
  for (; whole + L <= n; whole += L) {
    const Vec score = noise ? load(logits + whole) + load(noise + whole) : load(logits + whole);
    const IVec key = to_keys(score);
    store(keys + whole, key);
    spread.add(key, score);
  }
  if (whole < n) {
    // A whole vector where there is padding: gathering single lanes would take longer than all the rest of a short row.
    const std::int64_t count = n - whole;
    Vec score = weights ? load(logits + whole) : load_first(logits + whole, count);
    if (noise) score += load_first(noise + whole, count);
    const IVec inside = (IVec)(lane_numbers() < splat(std::int32_t(count))), key = to_keys(score);
    store(keys + whole, inside ? key : splat(kLowestKey));
    spread.add_inside(key, score, inside);
  }

  if (padded <= kFewVectors * L) return select_vectors(padded / L, logits, n, rule, keys, picks, selected, weights);

  std::int64_t count = rule.k;
  const Threshold threshold = find_cut(keys, n, padded, to_key(rule.least), count, spread, rule.deviations);
  if (threshold.ties >= 0) {
    // Lift the ties that are selected above the threshold and lower the others below it.
    std::int64_t left = threshold.ties;
    for (std::int64_t i = 0; i < n; ++i)
      if (keys[i] == threshold.key && left-- <= 0) keys[i] = kLowestKey;
  }
  const IVec t = splat(threshold.key);
  std::int64_t picked = 0;
  for (std::int64_t i = 0; i < padded; i += L) {
    const IVec chosen = (IVec)(load(keys + i) >= t);
    if (selected) picked += write_lanes(chosen, i, picks + picked);
    if (!weights) continue;
    const Vec weight = rule.hard ? splat(1.0f) : sigmoid(load(logits + i));
    store(weights + i, chosen ? weight : splat(kUnselected));
  }
  if (selected) write_selected(picks, picked, rule.k, selected);
}

}  // namespace
