// The first pass of backward: the sums over (g, x), where g = dy·act'.
//
// Compiled once for each element type, as ELEMENT.

#include <cmath>

#include "columns.h"
#include "gradient.h"

using namespace gradient;

namespace {

// The sums of a channel or a lane: Σ(g − shift), Σd and their product.
struct Sums {
  alignas(64) double of[3][short_run];

  INLINE void clear(int64_t lanes) {
    for (auto& sum : of) std::fill_n(sum, lanes, 0.0);
  }
};

// Adds one lane, in double, one element after the other: where there are few lanes, or one was too much for P.
template <class T, Act A, From F>
void add_lane(const Job<T>& job, int64_t e, int64_t stride, int64_t rows, int64_t j, double* const (&sums)[3]) {
  const Wide<T>* k = job.coefficients.at(j);
  for (int64_t r = 0; r < rows; ++r, e += stride) {
    const auto one = element<Wide<T>, A, F>(job, e, [&](int number) { return k[number * tile]; });
    const double g = static_cast<double>(one.g) - k[shift * tile], d = static_cast<double>(one.d) * k[unit * tile];
    *sums[0] += g;
    *sums[1] += d;
    *sums[2] += g * d;
  }
}

// Adds rows × lanes, some rows in P before they become double; there, d is counted in units of about a standard deviation, a
// power of two, so that no product is lost. `Same`: one channel, with coefficients 0.
template <class L, bool Same, Act A, From F, class T>
INLINE void add(const Job<T>& job, int64_t e, int64_t stride, int64_t rows, int64_t lanes, int64_t j, Sums& sums) {
  using P = Partial<T>;
  const Wide<T>* const coefficients = job.coefficients.at(j);
  Ahead<T> ahead(stride, lanes, job.far);
  const auto add_packs = [&](auto packed, int64_t start, int64_t n, int64_t l, int64_t skip) INLINE_LAMBDA {
    constexpr int packs = decltype(packed)::packs;
    constexpr int64_t each = decltype(packed)::lanes;
    using V = Pack<Wide<T>, each>;
    using PV = Like<V, P>;
    V k[packs][bias + 1];
    PV s[packs], u[packs], a[packs] = {}, b[packs] = {}, ab[packs] = {};
    for (int g = 0; g < packs; ++g) {
      const Wide<T>* const at = coefficients + (Same ? 0 : l + g * each);
      for (int number = 0; number <= bias; ++number) k[g][number] = coefficient<V, Same>(at + number * tile);
      s[g] = converted<V, P>(coefficient<V, Same>(at + shift * tile));
      u[g] = converted<V, P>(coefficient<V, Same>(at + unit * tile));
    }
    if (l == 0) ahead.start(start);
    int64_t row = e + start * stride + l;
    for (int64_t r = 0; r < n; ++r, row += stride) {
      if constexpr (F == From::residual) ahead.template step<packs * each>(job.x + e, job.dy + e, job.residual + e);
      else ahead.template step<packs * each>(job.x + e, job.dy + e);
      for (int g = 0; g < packs; ++g) {
        const auto one = element<V, A, F>(job, row + g * each, [&](int number) INLINE_LAMBDA { return k[g][number]; });
        PV d = converted<V, P>(one.d);
        if constexpr (std::is_same_v<P, float>) d *= u[g];
        const PV dg = converted<V, P>(one.g) - s[g];
        a[g] += dg;
        b[g] += d;
        ab[g] += dg * d;
      }
    }
    for (int g = 0; g < packs; ++g) {
      add_to(sums.of[0] + l + g * each, a[g], skip);
      add_to(sums.of[1] + l + g * each, b[g], skip);
      add_to(sums.of[2] + l + g * each, ab[g], skip);
    }
  };
  for_columns<pack_lanes<L, P>, T>(rows, lanes, add_packs, [&](int64_t l) {
    add_lane<T, A, F>(job, e + l, stride, rows, Same ? j : j + l, {sums.of[0] + l, sums.of[1] + l, sums.of[2] + l});
  });
}

// Adds g and g·x of floats, in the first and the last of the sums.
template <class L, bool Same, Act A, From F>
INLINE void add_plain(const Job<float>& job, int64_t e, int64_t stride, int64_t rows, int64_t lanes, int64_t j, Sums& sums) {
  const float* const coefficients = job.coefficients.at(j);
  Ahead<float> ahead(stride, lanes, job.far);
  const auto add_packs = [&](auto packed, int64_t start, int64_t n, int64_t l, int64_t skip) INLINE_LAMBDA {
    constexpr int packs = decltype(packed)::packs;
    constexpr int64_t each = decltype(packed)::lanes;
    using V = Pack<float, each>;
    using D = Pack<double, each>;
    V k[packs][bias + 1];
    D a[packs] = {}, ab[packs] = {};
    for (int g = 0; g < packs; ++g)
      for (int number = 0; number <= bias; ++number)
        k[g][number] = coefficient<V, Same>(coefficients + (Same ? 0 : l + g * each) + number * tile);
    if (l == 0) ahead.start(start);
    int64_t row = e + start * stride + l;
    for (int64_t r = 0; r < n; ++r, row += stride) {
      if constexpr (F == From::residual) ahead.template step<packs * each>(job.x + e, job.dy + e, job.residual + e);
      else ahead.template step<packs * each>(job.x + e, job.dy + e);
      for (int g = 0; g < packs; ++g) {
        const auto one = element<V, A, F>(job, row + g * each, [&](int number) INLINE_LAMBDA { return k[g][number]; });
        const D wide = converted<V, double>(one.g);
        a[g] += wide;
        ab[g] = add_exact(ab[g], wide, converted<V, double>(load<V>(job.x + row + g * each)));
      }
    }
    for (int g = 0; g < packs; ++g) {
      add_to(sums.of[0] + l + g * each, a[g], skip);
      add_to(sums.of[2] + l + g * each, ab[g], skip);
    }
  };
  for_columns<L::narrow, float>(rows, lanes, add_packs, [&](int64_t l) {
    const float* const k = coefficients + (Same ? 0 : l);
    for (int64_t r = 0, at = e + l; r < rows; ++r, at += stride) {
      const double g = element<float, A, F>(job, at, [&](int number) { return k[number * tile]; }).g;
      sums.of[0][l] += g;
      sums.of[2][l] += g * static_cast<double>(job.x[at]);
    }
  });
}

// Of `rows` rows of `lanes` lanes.
template <class L, bool Plain, class T, Act A, From F>
INLINE void lanes_sums(const Job<T>& given, int64_t e, int64_t rows, int64_t lanes, int64_t j, double* const* out) {
  const Job<T> job = given;
  Sums sums;
  sums.clear(lanes);
  if constexpr (Plain) {
    for (int k = 0; k < 3; ++k) std::fill_n(out[k], lanes, 0.0);
    for (int64_t start = 0; start < rows; start += plain_rows) {
      add_plain<L, false, A, F>(job, e + start * job.v.width, job.v.width, std::min(plain_rows, rows - start), lanes, j, sums);
      for (int k = 0; k < 3; k += 2)
        for (int64_t l = 0; l < lanes; ++l) out[k][l] += sums.of[k][l];
      sums.clear(lanes);
    }
  } else {
    add<L, false, A, F>(job, e, job.v.width, rows, lanes, j, sums);
    for (int k = 0; k < 3; ++k) std::copy_n(sums.of[k], lanes, out[k]);
  }
}

// Of one channel's runs in a strip.
template <class L, bool Plain, class T, Act A, From F>
INLINE void run_sums(const Job<T>& given, int64_t strip, int64_t c, double* const* out) {
  const Job<T> job = given;
  Sums sums;
  const int64_t lanes = sums_along(job.v);
  sums.clear(lanes);
  for_runs(job.v, strip, c, [&](int64_t e, int64_t stride, int64_t rows, int64_t width) INLINE_LAMBDA {
    if constexpr (Plain) add_plain<L, true, A, F>(job, e, stride, rows, width, c, sums);
    else add<L, true, A, F>(job, e, stride, rows, width, c, sums);
  });
  for (int k = 0; k < 3; ++k) *out[k] = fold(sums.of[k], lanes);
}

// Of one channel in a strip of planes, or of `rows` rows of `lanes` lanes from element e on. A channel with NaN changes
// no other.
template <bool Plain, class T, Act A, From F>
void block_sums(const Job<T>& job, int64_t strip, int64_t e, int64_t rows, int64_t lanes, int64_t j,
                double* const (&out)[3]) {
  const View& v = job.v;
  at_level([&](auto level) INLINE_LAMBDA {
    using L = decltype(level);
    v.planes ? run_sums<L, Plain, T, A, F>(job, strip, j, out) : lanes_sums<L, Plain, T, A, F>(job, e, rows, lanes, j, out);
  });
  if constexpr (Plain) {
    // About the center at once: sums of many blocks would lose what they then cancel.
    const Wide<T>* const centers = job.coefficients.at(j) + center * tile;
    for (int64_t l = 0; l < lanes; ++l) out[2][l] -= static_cast<double>(centers[l]) * out[0][l];
  }
  if constexpr (std::is_same_v<Partial<T>, double>) return;
  for (int64_t l = 0; l < lanes; ++l) {
    if (std::isfinite(out[0][l]) && std::isfinite(out[1][l]) && std::isfinite(out[2][l])) continue;
    double* const sums[] = {out[0] + l, out[1] + l, out[2] + l};
    for (double* sum : sums) *sum = 0;
    if (!v.planes) add_lane<T, A, F>(job, e + l, v.width, rows, j + l, sums);
    if (v.planes)
      for_runs(v, strip, j, [&](int64_t first, int64_t stride, int64_t count, int64_t width) {
        for (int64_t i = 0; i < width; ++i) add_lane<T, A, F>(job, first + i, stride, count, j, sums);
      });
  }
}

// A value near a channel's g, so that an offset of the gradient reaches the product with d cancelled. Any one of n
// values will do for float, being within σ·√n of their mean. In float64, where sums have no digits to spare, the mean of
// 16. Where some rows are added up in float, the smallest of a few from everywhere: beside a value that is much larger
// than all others, they would lose their digits.
template <class T, Act A, From F>
double near_gradient(const Job<T>& job, int64_t c) {
  const View& v = job.v;
  constexpr bool smallest = sizeof(T) == 2;
  const int64_t first = v.first(c), j = v.planes ? c : first;
  const Wide<T>* k = job.coefficients.at(j);
  const int64_t step = std::max<int64_t>(1, v.channels * v.inner);
  const int64_t most = v.planes ? v.count() : v.elements / step;
  const int64_t count = std::min<int64_t>(most, std::is_same_v<T, double> ? 16 : smallest ? 4 : 1);
  const int64_t apart = smallest ? most / count : 1;
  double start = 0, rest = 0, least = INFINITY;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = i * apart, e = first + (v.planes ? at / v.inner * v.step + at % v.inner : at * step);
    const auto one = element<Wide<T>, A, F>(job, e, [&](int number) { return k[number * tile]; });
    const double g = one.g;
    if (i == 0) start = g;
    if (std::fabs(g) < std::fabs(least)) least = g;
    rest += g - start;
  }
  const double g = smallest ? least : start + rest / static_cast<double>(count);
  return std::isfinite(g) ? g : 0;
}

INLINE void add_all(int64_t channels, int64_t stride, const double* RESTRICT from, double* RESTRICT to) {
  if (stride == 1)
    for (int64_t c = 0; c < channels; ++c) to[c] += from[c];
  else
    for (int64_t c = 0; c < channels; ++c) to[c] += from[c * stride];
}

CLONES void add_channels(const View& v, int64_t first, int64_t last, int64_t size, const double* partial,
                         GradientSums out) {
  for (int64_t c = first; c < last; ++c) out.g[c] = out.d[c] = out.gd[c] = 0;
  for_partials(v, first, [&](int64_t, int64_t at, int64_t stride) INLINE_LAMBDA {
    add_all(last - first, stride, partial + at, out.g + first);
    add_all(last - first, stride, partial + size + at, out.d + first);
    add_all(last - first, stride, partial + 2 * size + at, out.gd + first);
  });
}

// Whether g·x of floats may be added up in double as they are. Their products are exact there, and Σg·x − mean·Σg loses
// 2^-53 of both: nothing to speak of, unless the mean is very many standard deviations. (1.6 MB channels-last, one thread:
// 28 GB/s about the mean and a value of g, 49 so.)
template <class T>
bool is_plain(const View& v, const Affine& a) {
  if constexpr (!std::is_same_v<T, float>) return false;
  for (int64_t c = 0; c < v.channels; ++c) {
    const double ratio = std::fabs(a.mean[c]) * a.rstd[c];
    if (std::isfinite(ratio) && ratio > 0x1p12) return false;  // NaN and infinite ones change no other channel
  }
  return true;
}

// The power of two nearest below 1/σ, within what a float can hold.
double unit_of(double rstd) {
  if (!(rstd > 0)) return 1;
  return std::ldexp(1.0, std::clamp(std::isinf(rstd) ? 126 : std::ilogb(rstd), -126, 126));
}

template <class T, Act A, From F>
void sums(const Job<T>& job, const Affine& affine, GradientSums out) {
  const View& v = job.v;
  const int64_t lanes = v.coefficients(), strips = v.strips(), size = (strips + 1) * lanes, count = v.channels;
  Scratch<double> partial(3 * size), units(count);
  double* const all = partial.get();
  const bool plain = is_plain<T>(v, affine);
  for (int64_t c = 0; c < count; ++c) {
    out.shift[c] = plain ? 0 : near_gradient<T, A, F>(job, c);
    units[c] = std::is_same_v<Partial<T>, double> ? 1 : unit_of(affine.rstd[c]);
  }
  job.coefficients.set(shift, [&](int64_t c) { return out.shift[c]; });
  job.coefficients.set(unit, [&](int64_t c) { return units[c]; });
  const auto block_at = [&](int64_t strip, int64_t e, int64_t rows, int64_t lane, int64_t length) {
    double* const to = all + strip * lanes + lane;
    double* const to_sums[] = {to, to + size, to + 2 * size};
    if constexpr (std::is_same_v<T, float>)
      if (plain) return block_sums<true, T, A, F>(job, strip, e, rows, length, lane, to_sums);
    block_sums<false, T, A, F>(job, strip, e, rows, length, lane, to_sums);
  };
  const int64_t tiles = v.tiles();
  for_blocks(v.blocks(), v.elements, false, [&](int64_t b) {
    const int64_t strip = b / tiles, t = b % tiles, lane = t * tile;
    if (v.planes) return block_at(strip, 0, 0, t, 1);
    block_at(strip, strip * v.block_rows() * v.width + lane, v.strip_count(strip), lane, std::min(tile, v.width - lane));
  });
  if (!v.planes)
    for (int64_t lane = 0; lane < v.tail; lane += tile)
      block_at(strips, v.rows * v.width + lane, 1, lane, std::min(tile, v.tail - lane));
  const int64_t channel_tiles = (count + tile - 1) / tile;
  for_blocks(channel_tiles, size, false, [&](int64_t t) {
    add_channels(v, t * tile, std::min(count, (t + 1) * tile), size, all, out);
  });
  for (int64_t c = 0; c < count; ++c) {
    // About the mean, and not the center any more.
    const double low = job.coefficients.low(affine, c);
    out.d[c] = plain ? 0 : out.d[c] / units[c] - low * static_cast<double>(v.count());
    out.gd[c] = out.gd[c] / units[c] - low * out.g[c];
  }
}

}  // namespace

template <class T>
void gradient_sums_of(const Input& input, const Gradient& call, GradientSums out) {
  Coefficients<Wide<T>, numbers> k(input.view, call.affine);
  const Job<T> job = job_of<T>(input, call, k);
  if (call.bits) return sums<T, Act::relu, From::bits>(job, call.affine, out);
  switch (call.act) {
    case Act::relu:
      return sums<T, Act::relu, From::input>(job, call.affine, out);
    case Act::relu6:
      return sums<T, Act::relu6, From::input>(job, call.affine, out);
    case Act::leaky_relu:
      return sums<T, Act::leaky_relu, From::input>(job, call.affine, out);
    case Act::hardswish:
      return call.residual ? sums<T, Act::hardswish, From::residual>(job, call.affine, out)
                           : sums<T, Act::hardswish, From::input>(job, call.affine, out);
    default:
      return sums<T, Act::none, From::input>(job, call.affine, out);
  }
}

template void gradient_sums_of<ELEMENT>(const Input&, const Gradient&, GradientSums);
