// Mean and m2 = Σ(x − mean)² in one reading of x.
//
// Floats are added up in double as they are: their squares are exact there, and Σx² − (Σx)²/n loses 2^-33 of m2 where the
// mean is 2^10 standard deviations. A block that would lose more is known by its m2, and added up again about a pilot, as
// other types always are. (1.6 MB channels-last, one thread: 25 GB/s about a pilot, 40 without.)
//
// Chunks about a pilot are merged by Chan's formula. The pilot of the first is the mean of its first elements: of p out of
// n values within σ·√(n/p) of their mean, whatever the values, so that what m2 loses is bounded: n/p is 32 for lanes and 64
// for planes, 3 bits at the very worst, and nothing on usual data. It is the first value plus the mean of differences to
// it: exact for a constant channel. The pilot of a later chunk is the mean so far: what its squares lose by the distance
// is part of the distance's own term in m2. Floats have bits to spare, and the first value will do.

#include <algorithm>
#include <cmath>

#include "columns.h"
#include "kernels.h"

namespace {

constexpr int64_t chunk = 128;  // rows about one pilot
constexpr int64_t run_pilot = 256, row_pilot = 4;

// One lane of them.
template <class T>
void add_lane(const T* x, int64_t stride, int64_t rows, double shift, double& sum, double& square) {
  for (int64_t r = 0; r < rows; ++r, x += stride) {
    const double d = static_cast<double>(widen(*x)) - shift;
    sum += d;
    square += d * d;
  }
}

// Adds rows × lanes of x − shift and its square, some rows in P before they become double. With `Same` all lanes have
// shift[0].
template <class L, class P, bool Same, class T>
INLINE void add(const T* x, int64_t stride, int64_t rows, int64_t lanes, bool far, const double* shift, double* sum,
                double* square) {
  Ahead<T> ahead(stride, lanes, far);
  const auto add_packs = [&](auto packed, int64_t start, int64_t n, int64_t l, int64_t skip) INLINE_LAMBDA {
    constexpr int packs = decltype(packed)::packs;
    constexpr int64_t each = decltype(packed)::lanes;
    using V = Pack<Wide<T>, each>;
    using D = Like<V, double>;
    Like<V, P> s[packs], a[packs] = {}, b[packs] = {};
    for (int g = 0; g < packs; ++g) s[g] = converted<D, P>(coefficient<D, Same>(shift + (Same ? 0 : l + g * each)));
    if (l == 0) ahead.start(start);
    const T* row = x + start * stride + l;
    for (int64_t r = 0; r < n; ++r, row += stride) {
      ahead.template step<packs * each>(x);
      for (int g = 0; g < packs; ++g) {
        const Like<V, P> d = converted<V, P>(load<V>(row + g * each)) - s[g];
        a[g] += d;
        b[g] += d * d;
      }
    }
    for (int g = 0; g < packs; ++g) {
      add_to(sum + l + g * each, a[g], skip);
      add_to(square + l + g * each, b[g], skip);
    }
  };
  for_columns<pack_lanes<L, P>, T>(rows, lanes, add_packs,
                    [&](int64_t l) { add_lane(x + l, stride, rows, shift[Same ? 0 : l], sum[l], square[l]); });
}

// Adds x and its square, of floats.
template <class L>
INLINE void add_plain(const float* x, int64_t stride, int64_t rows, int64_t lanes, bool far, double* sum, double* square) {
  Ahead<float> ahead(stride, lanes, far);
  const auto add_packs = [&](auto packed, int64_t start, int64_t n, int64_t l, int64_t skip) INLINE_LAMBDA {
    constexpr int packs = decltype(packed)::packs;
    constexpr int64_t each = decltype(packed)::lanes;
    using D = Pack<double, each>;
    D a[packs] = {}, b[packs] = {};
    if (l == 0) ahead.start(start);
    const float* row = x + start * stride + l;
    for (int64_t r = 0; r < n; ++r, row += stride) {
      ahead.template step<packs * each>(x);
      for (int g = 0; g < packs; ++g) {
        const D d = converted<Pack<float, each>, double>(load<Pack<float, each>>(row + g * each));
        a[g] += d;
        b[g] = add_exact(b[g], d, d);
      }
    }
    for (int g = 0; g < packs; ++g) {
      add_to(sum + l + g * each, a[g], skip);
      add_to(square + l + g * each, b[g], skip);
    }
  };
  for_columns<L::narrow, float>(rows, lanes, add_packs,
                                [&](int64_t l) { add_lane(x + l, stride, rows, 0, sum[l], square[l]); });
}

// Chan, Golub and LeVeque: (12) of docs/math.md, with share = n_b/n and between = n_a·n_b/n.
INLINE void merge(double share, double between, double mean_b, double m2_b, double& mean, double& m2) {
  const double delta = mean_b - mean;
  mean += delta * share;
  m2 += m2_b + delta * delta * between;
}

INLINE double about_mean(double square, double sum, double per_n) {
  const double m2 = square - sum * (sum * per_n);
  return m2 < 0 ? 0 : m2;  // NaN stays
}

// Whether P has digits to spare for the squares about any value of T.
template <class T, class P>
constexpr bool spare = std::is_same_v<P, double> && !std::is_same_v<T, double>;

// Whether a sum of squares in float is of no use: infinite, or its terms lost below 2^-149. (Float16 has no such values.)
template <class T, class P>
INLINE bool lost(double square, double count) {
  if constexpr (!std::is_same_v<T, BFloat16> || !std::is_same_v<P, float>) return false;
  return !(square >= count * 0x1p-120 && square <= 0x1p127);
}

// `rows` rows of `lanes` lanes: the mean, less `base`, and m2 of each lane; NaN where P cannot hold the squares.
template <class L, class T, class P>
INLINE void lanes_block(const T* RESTRICT x, int64_t stride, int64_t rows, int64_t lanes, bool far,
                        const double* RESTRICT base, double* RESTRICT mean, double* RESTRICT m2) {
  alignas(64) double shift[tile], sum[tile], square[tile];
  for (int64_t l = 0; l < lanes; ++l) mean[l] = m2[l] = 0;
  for (int64_t start = 0; start < rows; start += chunk) {
    const int64_t n = std::min(chunk, rows - start), pilot = std::min(row_pilot, n);
    const T* RESTRICT first = x + start * stride;
    for (int64_t l = 0; l < lanes; ++l) {
      shift[l] = start ? static_cast<double>(static_cast<P>(base[l] + mean[l])) : static_cast<double>(widen(first[l]));
      sum[l] = square[l] = 0;
    }
    if (!spare<T, P> && start == 0) {
      add<L, P, false>(first, stride, pilot, lanes, false, shift, sum, square);
      const double per_pilot = 1.0 / static_cast<double>(pilot);
      for (int64_t l = 0; l < lanes; ++l) {
        shift[l] = static_cast<P>(shift[l] + sum[l] * per_pilot);
        sum[l] = square[l] = 0;
      }
    }
    add<L, P, false>(first, stride, n, lanes, far, shift, sum, square);
    const double na = static_cast<double>(start), nb = static_cast<double>(n), per_n = 1.0 / nb;
    const double share = nb / (na + nb), between = na * share;
    for (int64_t l = 0; l < lanes; ++l) {
      const double m2_b = about_mean(square[l], sum[l], per_n);
      merge(share, between, (shift[l] - base[l]) + sum[l] * per_n, lost<T, P>(square[l], nb) ? NAN : m2_b, mean[l], m2[l]);
    }
  }
}

// One channel's runs in a strip.
template <class L, class T, class P>
INLINE void run_block(const T* RESTRICT x, View v, int64_t strip, int64_t c, bool far, double base,
                      double* mean, double* m2) {
  alignas(64) double sum[short_run], square[short_run];
  const int64_t sums = sums_along(v);
  for (int64_t l = 0; l < sums; ++l) sum[l] = square[l] = 0;
  double shift = 0;
  bool started = false;
  for_runs(v, strip, c, [&](int64_t e, int64_t stride, int64_t rows, int64_t lanes) INLINE_LAMBDA {
    const T* RESTRICT first = x + e;
    if (!started) {
      started = true;
      shift = widen(first[0]);
      if constexpr (!spare<T, P>) {
        const int64_t pilot = std::min(rows, std::max<int64_t>(1, run_pilot / lanes));
        add<L, P, true>(first, stride, pilot, lanes, false, &shift, sum, square);
        shift = static_cast<P>(shift + fold(sum, lanes) / static_cast<double>(pilot * lanes));
        for (int64_t l = 0; l < lanes; ++l) sum[l] = square[l] = 0;
      }
    }
    add<L, P, true>(first, stride, rows, lanes, far, &shift, sum, square);
  });
  const double a = fold(sum, sums), b = fold(square, sums);
  const double n = static_cast<double>(v.strip_count(strip));
  *mean = (shift - base) + a / n;
  *m2 = lost<T, P>(b, n) ? NAN : about_mean(b, a, 1 / n);
}

// Of Σx and Σx² of n elements: the mean, less `base`, and m2, which is NaN where it lost too much.
INLINE void finish_plain(double sum, double square, double n, double base, double& mean, double& m2) {
  const double average = sum / n;
  mean = average - base;
  m2 = square - sum * average;
  if (m2 < square * 0x1p-20) m2 = NAN;
}

// The same as lanes_block and run_block, of floats as they are.
template <class L>
INLINE void lanes_plain(const float* RESTRICT x, int64_t stride, int64_t rows, int64_t lanes, bool far,
                        const double* RESTRICT base, double* RESTRICT mean, double* RESTRICT m2) {
  alignas(64) double sum[tile], square[tile];
  for (int64_t l = 0; l < lanes; ++l) mean[l] = m2[l] = 0;
  for (int64_t start = 0; start < rows; start += plain_rows) {
    const int64_t n = std::min(plain_rows, rows - start);
    for (int64_t l = 0; l < lanes; ++l) sum[l] = square[l] = 0;
    add_plain<L>(x + start * stride, stride, n, lanes, far, sum, square);
    const double na = static_cast<double>(start), nb = static_cast<double>(n), share = nb / (na + nb), between = na * share;
    for (int64_t l = 0; l < lanes; ++l) {
      double mean_b, m2_b;
      finish_plain(sum[l], square[l], nb, base[l], mean_b, m2_b);
      merge(share, between, mean_b, m2_b, mean[l], m2[l]);
    }
  }
}

template <class L>
INLINE void run_plain(const float* RESTRICT x, View v, int64_t strip, int64_t c, bool far, double base, double* mean,
                      double* m2) {
  alignas(64) double sum[short_run], square[short_run];
  const int64_t sums = sums_along(v);
  for (int64_t l = 0; l < sums; ++l) sum[l] = square[l] = 0;
  for_runs(v, strip, c, [&](int64_t e, int64_t stride, int64_t rows, int64_t lanes) INLINE_LAMBDA {
    add_plain<L>(x + e, stride, rows, lanes, far, sum, square);
  });
  const double a = fold(sum, sums), b = fold(square, sums);
  finish_plain(a, b, static_cast<double>(v.strip_count(strip)), base, *mean, *m2);
}

INLINE void merge_all(int64_t channels, double share, double between, int64_t stride, const double* RESTRICT mean_b,
                      const double* RESTRICT m2_b, double* RESTRICT mean, double* RESTRICT m2) {
  if (stride == 1)
    for (int64_t c = 0; c < channels; ++c) merge(share, between, mean_b[c], m2_b[c], mean[c], m2[c]);
  else
    for (int64_t c = 0; c < channels; ++c)
      merge(share, between, mean_b[c * stride], m2_b[c * stride], mean[c], m2[c]);
}

// Merges the partials of the channels [first, last); means are relative to the channel's base.
CLONES void merge_channels(const View& v, int64_t first, int64_t last, const double* means, const double* m2s,
                           double* mean, double* m2) {
  for (int64_t c = first; c < last; ++c) mean[c] = m2[c] = 0;
  double seen = 0;
  for_partials(v, first, [&](int64_t count, int64_t at, int64_t stride) INLINE_LAMBDA {
    const double n = static_cast<double>(count), share = n / (seen + n);
    merge_all(last - first, share, seen * share, stride, means + at, m2s + at, mean + first, m2 + first);
    seen += n;
  });
}

// The means and m2s of every strip and one strip more, the tail.
struct Partials {
  double *means, *m2s;
  const double* bases;  // of each coefficient
  bool far;
};

template <class T, class P>
void block_in(const T* x, const View& v, int64_t strip, int64_t lane, int64_t lanes, bool far, const double* base,
              double* mean, double* m2) {
  at_level([&](auto level) INLINE_LAMBDA {
    using L = decltype(level);
    if (v.planes) return run_block<L, T, P>(x, v, strip, lane, far, *base, mean, m2);
    const T* const first = x + strip * v.block_rows() * v.width + lane;
    lanes_block<L, T, P>(first, v.width, v.strip_count(strip), lanes, far, base, mean, m2);
  });
}

void plain_block_in(const float* x, const View& v, int64_t strip, int64_t lane, int64_t lanes, bool far, const double* base,
                    double* mean, double* m2) {
  at_level([&](auto level) INLINE_LAMBDA {
    using L = decltype(level);
    if (v.planes) return run_plain<L>(x, v, strip, lane, far, *base, mean, m2);
    lanes_plain<L>(x + strip * v.block_rows() * v.width + lane, v.width, v.strip_count(strip), lanes, far, base, mean, m2);
  });
}

// What was lost is computed again, for the lanes concerned alone: a channel with NaN changes no other.
template <class T>
void block_of(const T* x, const View& v, int64_t strip, int64_t t, const Partials& out) {
  const int64_t lane = v.planes ? t : t * tile, at = strip * v.coefficients() + lane;
  const int64_t lanes = v.planes ? 1 : std::min(tile, v.width - lane);
  double *mean = out.means + at, *m2 = out.m2s + at;
  if constexpr (std::is_same_v<T, float>) plain_block_in(x, v, strip, lane, lanes, out.far, out.bases + lane, mean, m2);
  else block_in<T, Partial<T>>(x, v, strip, lane, lanes, out.far, out.bases + lane, mean, m2);
  if constexpr (std::is_same_v<T, double> || std::is_same_v<T, Float16>) return;
  if (std::none_of(m2, m2 + lanes, [](double value) { return std::isnan(value); })) return;
  double means[tile], m2s[tile];
  block_in<T, double>(x, v, strip, lane, lanes, out.far, out.bases + lane, means, m2s);
  for (int64_t l = 0; l < lanes; ++l) {
    if (!std::isnan(m2[l])) continue;
    mean[l] = means[l];
    m2[l] = m2s[l];
  }
}

template <class T>
void moments_of(const T* x, const View& v, bool far, Statistics out) {
  const int64_t lanes = v.coefficients(), strips = v.strips();
  Scratch<double> base(v.channels), lane_base(v.planes ? 0 : lanes), relative(v.channels);
  Scratch<double> means((strips + 1) * lanes), m2s((strips + 1) * lanes);
  for (int64_t c = 0; c < v.channels; ++c) base[c] = widen(x[v.first(c)]);
  if (!v.planes) {
    v.spread(base.get(), lane_base.get());
    // The tail: one value a lane.
    for (int64_t l = 0; l < v.tail; ++l) {
      means[strips * lanes + l] = widen(x[v.rows * v.width + l]) - lane_base[l];
      m2s[strips * lanes + l] = 0;
    }
  }
  const int64_t tiles = v.tiles();
  const Partials partials{means.get(), m2s.get(), v.planes ? base.get() : lane_base.get(), far};
  for_blocks(v.blocks(), v.elements, false, [&](int64_t b) {
    block_of<T>(x, v, b / tiles, b % tiles, partials);
  });
  const int64_t channel_tiles = (v.channels + tile - 1) / tile;
  for_blocks(channel_tiles, (strips + 1) * lanes, false, [&](int64_t t) {
    merge_channels(v, t * tile, std::min(v.channels, (t + 1) * tile), means.get(), m2s.get(), relative.get(), out.m2);
  });
  for (int64_t c = 0; c < v.channels; ++c) {
    double low;
    two_sum(base[c], relative[c], out.mean[c], low);
    if (out.low) out.low[c] = low == low ? low : 0;
  }
}

}  // namespace

void moments(const Input& input, Statistics out) {
  if (input.view.elements == 0) {
    for (int64_t c = 0; c < input.view.channels; ++c) {
      out.mean[c] = out.m2[c] = 0;
      if (out.low) out.low[c] = 0;
    }
    return;
  }
  by_dtype(input.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    moments_of(static_cast<const T*>(input.x), input.view, input.far, out);
  });
}
