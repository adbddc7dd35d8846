// The two passes of backward: the sums over (g, x), and dx from them, where g = dy·act'.
//
// Compiled once for each element type, as ELEMENT.

#include <cmath>

#include "elementwise.h"

namespace {

// Where act' comes from: the pre-activation, computed again from x (and a residual), or its bits.
enum class From { input, residual, bits };

// The coefficients: x̂'s four, then two for each pass.
enum Number { high, low, scale, bias, shift, unit, mean_g = shift, low_g, slope_x, numbers };

template <class T>
struct Job {
  const View& v;
  const T *x, *dy, *residual;
  const uint8_t* bits;
  Coefficients<Wide<T>, numbers>& coefficients;
  Wide<T> slope;
  bool leaks, far;
};

// One element: d = x − mean and g, from the coefficients at k. `on` is the bit of act' where there is one.
template <class T, Act A, From F>
struct Element {
  Wide<T> d, g;

  INLINE Element(T x, T dy, const T* residual, uint8_t on, const Wide<T>* k, Wide<T> slope, bool leaks) {
    d = (widen(x) - k[high * tile]) - k[low * tile];
    g = widen(dy);
    if constexpr (F == From::bits) {
      g = blend(on, g, blend(leaks, g * slope, Wide<T>(0)));
    } else if constexpr (A != Act::none) {
      Wide<T> z = d * k[scale * tile] + k[bias * tile];
      if constexpr (F == From::residual) z += widen(*residual);
      g = gate<A>(g, z, slope);
    }
  }
};

constexpr int64_t together = 2;    // rows added to the sums at a time; more have more addresses than registers
constexpr int64_t in_part = 16;    // rows added up in float before they become double
constexpr int64_t on_row = short_run + 16;  // room for the bits of a row, as bytes

// Σ(g − shift), Σd and their product for up to short_run lanes, in P and what has become double. In P, d is counted in
// units of about a standard deviation, a power of two, so that no product is lost.
template <class P>
struct Sums {
  static constexpr bool direct = std::is_same_v<P, double>;
  alignas(64) P part[3][short_run];
  alignas(64) double rest[3][direct ? 1 : short_run];

  INLINE double* sum(int k) {
    if constexpr (direct) return part[k];
    else return rest[k];
  }

  INLINE void clear(int64_t lanes) {
    for (int k = 0; k < 3; ++k)
      for (int64_t l = 0; l < lanes; ++l) part[k][l] = sum(k)[l] = 0;
  }

  INLINE void flush(int64_t lanes) {
    if constexpr (direct) return;
    for (int k = 0; k < 3; ++k) {
      double* RESTRICT sum = rest[k];
      for (int64_t l = 0; l < lanes; ++l) {
        sum[l] += part[k][l];
        part[k][l] = 0;
      }
    }
  }
};

// Adds R rows × lanes. `Same`: one channel, with coefficients 0.
template <int R, bool Same, Act A, From F, class T>
INLINE void add_rows(const Job<T>& job, int64_t e, int64_t stride, int64_t lanes, int64_t j, Sums<Partial<T>>& sums) {
  using P = Partial<T>;
  const T* RESTRICT x = job.x + e;
  const T* RESTRICT dy = job.dy + e;
  const T* RESTRICT residual = F == From::residual ? job.residual + e : nullptr;
  const Wide<T>* RESTRICT coefficients = job.coefficients.at(j);
  P* RESTRICT part = sums.part[0];
  const Wide<T> slope = job.slope;
  const bool leaks = job.leaks;
  uint8_t bytes[F == From::bits ? R * on_row : 1];
  const uint8_t* on[R] = {};
  if constexpr (F == From::bits)
    for (int r = 0; r < R; ++r) on[r] = unpack_bits(job.bits, e + r * stride, lanes, bytes + r * on_row);
  INDEPENDENT
  for (int64_t l = 0; l < lanes; ++l) {
    const Wide<T>* k = coefficients + (Same ? 0 : l);
    const P s = static_cast<P>(k[shift * tile]), u = static_cast<P>(k[unit * tile]);
    P a = part[l], b = part[short_run + l], ab = part[2 * short_run + l];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int64_t i = r * stride + l;
      const Element<T, A, F> one(x[i], dy[i], F == From::residual ? residual + i : nullptr,
                                 F == From::bits ? on[r][l] : uint8_t{0}, k, slope, leaks);
      const P g = static_cast<P>(one.g) - s, d = static_cast<P>(one.d) * u;
      a += g;
      b += d;
      ab += g * d;
    }
    part[l] = a;
    part[short_run + l] = b;
    part[2 * short_run + l] = ab;
  }
}

template <bool Same, Act A, From F, class T>
INLINE void add(const Job<T>& job, int64_t e, int64_t stride, int64_t rows, int64_t lanes, int64_t j,
                Sums<Partial<T>>& sums) {
  const int64_t ahead = rows_ahead<T>(together, stride);
  constexpr int64_t most = std::is_same_v<Partial<T>, float> ? in_part : INT64_MAX;
  for (int64_t start = 0, end; start < rows; start = end) {
    end = start + std::min(rows - start, most);
    int64_t r = start;
    for (; r + together <= end; r += together) {
      for (int64_t i = r; job.far && i < r + together; ++i) {
        prefetch(job.x + e + i * stride, ahead * stride, lanes);
        prefetch(job.dy + e + i * stride, ahead * stride, lanes);
        if constexpr (F == From::residual) prefetch(job.residual + e + i * stride, ahead * stride, lanes);
      }
      add_rows<together, Same, A, F>(job, e + r * stride, stride, lanes, j, sums);
    }
    for (; r < end; ++r) add_rows<1, Same, A, F>(job, e + r * stride, stride, lanes, j, sums);
    sums.flush(lanes);
  }
}

// Of `rows` rows of `lanes` lanes.
template <class T, Act A, From F>
CLONES void lanes_sums(const Job<T>& job, int64_t e, int64_t rows, int64_t lanes, int64_t j, double* const (&out)[3]) {
  Sums<Partial<T>> sums;
  sums.clear(lanes);
  add<false, A, F>(job, e, job.v.width, rows, lanes, j, sums);
  for (int k = 0; k < 3; ++k) std::copy_n(sums.sum(k), lanes, out[k]);
}

// Of one channel's runs in a strip.
template <class T, Act A, From F>
CLONES void run_sums(const Job<T>& job, int64_t strip, int64_t c, double* const (&out)[3]) {
  Sums<Partial<T>> sums;
  const int64_t lanes = sums_along(job.v);
  sums.clear(lanes);
  for_runs(job.v, strip, c, [&](int64_t e, int64_t stride, int64_t rows, int64_t width) INLINE_LAMBDA {
    add<true, A, F>(job, e, stride, rows, width, c, sums);
  });
  for (int k = 0; k < 3; ++k) *out[k] = fold(sums.sum(k), lanes);
}

// One lane of a block once more, in double: it was too much for P. Few are, so that one element after the other will do.
template <class T, Act A, From F>
void lane_again(const Job<T>& job, int64_t e, int64_t stride, int64_t rows, int64_t j, double (&sums)[3]) {
  const Wide<T>* k = job.coefficients.at(j);
  for (int64_t r = 0; r < rows; ++r, e += stride) {
    const bool on = F == From::bits && (job.bits[e / 8] >> (e % 8) & 1);
    const Element<T, A, F> one(job.x[e], job.dy[e], F == From::residual ? job.residual + e : nullptr, on, k, job.slope,
                               job.leaks);
    const double g = static_cast<double>(one.g) - k[shift * tile], d = static_cast<double>(one.d) * k[unit * tile];
    sums[0] += g;
    sums[1] += d;
    sums[2] += g * d;
  }
}

// Of one channel in a strip of planes, or of `rows` rows of `lanes` lanes from element e on. A channel with NaN changes
// no other.
template <class T, Act A, From F>
void block_sums(const Job<T>& job, int64_t strip, int64_t e, int64_t rows, int64_t lanes, int64_t j,
                double* const (&out)[3]) {
  const View& v = job.v;
  v.planes ? run_sums<T, A, F>(job, strip, j, out) : lanes_sums<T, A, F>(job, e, rows, lanes, j, out);
  if constexpr (std::is_same_v<Partial<T>, double>) return;
  for (int64_t l = 0; l < lanes; ++l) {
    if (std::isfinite(out[0][l]) && std::isfinite(out[1][l]) && std::isfinite(out[2][l])) continue;
    double sums[3] = {};
    if (!v.planes) lane_again<T, A, F>(job, e + l, v.width, rows, j + l, sums);
    if (v.planes)
      for_runs(v, strip, j, [&](int64_t first, int64_t stride, int64_t count, int64_t width) {
        for (int64_t i = 0; i < width; ++i) lane_again<T, A, F>(job, first + i, stride, count, j, sums);
      });
    for (int k = 0; k < 3; ++k) out[k][l] = sums[k];
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
    const bool on = F == From::bits && (job.bits[e / 8] >> (e % 8) & 1);
    const Element<T, A, F> one(job.x[e], job.dy[e], F == From::residual ? job.residual + e : nullptr, on, k,
                               job.slope, job.leaks);
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

// The power of two nearest below 1/σ, within what a float can hold.
double unit_of(double rstd) {
  if (!(rstd > 0)) return 1;
  return std::ldexp(1.0, std::clamp(std::isinf(rstd) ? 126 : std::ilogb(rstd), -126, 126));
}

template <class T, Act A, From F>
void sums(const Job<T>& job, const double* rstd, GradientSums out) {
  const View& v = job.v;
  const int64_t lanes = v.coefficients(), strips = v.strips(), size = (strips + 1) * lanes, count = v.channels;
  Scratch<double> partial(3 * size), units(count);
  double* const all = partial.get();
  for (int64_t c = 0; c < count; ++c) {
    out.shift[c] = near_gradient<T, A, F>(job, c);
    units[c] = std::is_same_v<Partial<T>, double> ? 1 : unit_of(rstd[c]);
  }
  job.coefficients.set(shift, [&](int64_t c) { return out.shift[c]; });
  job.coefficients.set(unit, [&](int64_t c) { return units[c]; });
  const auto block_at = [&](int64_t strip, int64_t e, int64_t rows, int64_t lane, int64_t length) {
    double* const to = all + strip * lanes + lane;
    block_sums<T, A, F>(job, strip, e, rows, length, lane, {to, to + size, to + 2 * size});
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
    out.d[c] /= units[c];
    out.gd[c] /= units[c];
  }
}

template <class T>
struct InputJob {
  Job<T> job;
  T *dx, *g;
  bool streaming;
};

template <class T, Act A, From F, bool Keeps>
struct Op {
  using W = Wide<T>;
  const InputJob<T>& all;
  alignas(64) T buffer[streamed];
  alignas(64) T g_buffer[Keeps ? streamed : 1];
  alignas(64) uint8_t bytes[F == From::bits ? mini_block + 16 : 1];
  const uint8_t* on = nullptr;
  T *dx = nullptr, *g = nullptr;

  INLINE explicit Op(const InputJob<T>& all) : all(all) {}
  INLINE bool streaming() const { return all.streaming; }

  INLINE void begin(int64_t e, int64_t n) {
    dx = all.streaming ? buffer : all.dx + e;
    if constexpr (Keeps) g = all.streaming ? g_buffer : all.g + e;
    if constexpr (F == From::bits) on = unpack_bits(all.job.bits, e, n, bytes);
  }

  INLINE void ahead(int64_t e, int64_t n) const {
    const Job<T>& job = all.job;
    if (!job.far) return;
    prefetch(job.x + e, 0, n);
    prefetch(job.dy + e, 0, n);
    if constexpr (F == From::residual) prefetch(job.residual + e, 0, n);
  }

  template <bool Same>
  INLINE void run(int64_t e, int64_t length, int64_t j, int64_t at) {
    const Job<T>& job = all.job;
    const T* RESTRICT x = job.x + e;
    const T* RESTRICT dy = job.dy + e;
    const T* RESTRICT residual = F == From::residual ? job.residual + e : nullptr;
    const uint8_t* RESTRICT o = F == From::bits ? on + at : nullptr;
    T* RESTRICT dxs = dx + at;
    T* RESTRICT gs = Keeps ? g + at : nullptr;
    const W* RESTRICT coefficients = job.coefficients.at(j);
    const W slope = job.slope;
    const bool leaks = job.leaks;
    INDEPENDENT
    for (int64_t i = 0; i < length; ++i) {
      const W* k = coefficients + (Same ? 0 : i);
      const Element<T, A, F> one(x[i], dy[i], F == From::residual ? residual + i : nullptr,
                                 F == From::bits ? o[i] : uint8_t{0}, k, slope, leaks);
      // (9), with the gradient's offset gone before anything is multiplied
      const W rest = (one.g - k[mean_g * tile]) - k[low_g * tile];
      narrow((rest - one.d * k[slope_x * tile]) * k[scale * tile], dxs[i]);
      if constexpr (Keeps) narrow(one.g, gs[i]);
    }
  }

  INLINE void end(int64_t e, int64_t n) {
    if (!all.streaming) return;
    stream(buffer, all.dx + e, n * static_cast<int64_t>(sizeof(T)));
    if constexpr (Keeps) stream(g_buffer, all.g + e, n * static_cast<int64_t>(sizeof(T)));
  }
};

template <class T, Act A, From F, bool Keeps>
CLONES void run_block(const InputJob<T>& all, int64_t origin, int64_t first, int64_t last) {
  Op<T, A, F, Keeps> op(all);
  const View& v = all.job.v;
  v.planes ? walk<true>(op, v, origin, first, last) : walk<false>(op, v, origin, first, last);
  if (all.streaming) stream_fence();
}

template <class T, Act A, From F, bool Keeps>
void input(const InputJob<T>& all) {
  for_elements(all.job.v, [&](int64_t origin, int64_t first, int64_t last) {
    run_block<T, A, F, Keeps>(all, origin, first, last);
  });
}

template <class T>
Job<T> job_of(const Input& input, const Gradient& call, Coefficients<Wide<T>, numbers>& k) {
  return {input.view,
          static_cast<const T*>(input.x),
          static_cast<const T*>(call.dy),
          static_cast<const T*>(call.residual),
          call.bits,
          k,
          static_cast<Wide<T>>(call.slope),
          call.act == Act::leaky_relu,
          input.far};
}

}  // namespace

template <class T>
void gradient_sums_of(const Input& input, const Gradient& call, GradientSums out) {
  Coefficients<Wide<T>, numbers> k(input.view, call.affine);
  const Job<T> job = job_of<T>(input, call, k);
  if (call.bits) return sums<T, Act::relu, From::bits>(job, call.affine.rstd, out);
  switch (call.act) {
    case Act::relu:
      return sums<T, Act::relu, From::input>(job, call.affine.rstd, out);
    case Act::relu6:
      return sums<T, Act::relu6, From::input>(job, call.affine.rstd, out);
    case Act::leaky_relu:
      return sums<T, Act::leaky_relu, From::input>(job, call.affine.rstd, out);
    case Act::hardswish:
      return call.residual ? sums<T, Act::hardswish, From::residual>(job, call.affine.rstd, out)
                           : sums<T, Act::hardswish, From::input>(job, call.affine.rstd, out);
    default:
      return sums<T, Act::none, From::input>(job, call.affine.rstd, out);
  }
}

template <class T>
void gradient_input_of(const Input& in, const Gradient& call, const GradientInput& out) {
  const View& v = in.view;
  Coefficients<Wide<T>, numbers> k(v, call.affine);
  k.set(mean_g, [&](int64_t c) { return out.mean_g[c]; });
  // What W leaves of the mean, and what comes on top of it.
  k.set(low_g, [&](int64_t c) { return k.rest(out.mean_g[c]) + out.low_g[c]; });
  k.set(slope_x, [&](int64_t c) { return out.slope_x[c]; });
  const InputJob<T> all{job_of<T>(in, call, k), static_cast<T*>(out.dx), static_cast<T*>(out.g), out.streaming};
  if (call.bits) return input<T, Act::relu, From::bits, true>(all);
  switch (call.act) {
    case Act::relu:
      return input<T, Act::relu, From::input, false>(all);
    case Act::relu6:
      return input<T, Act::relu6, From::input, false>(all);
    case Act::leaky_relu:
      return input<T, Act::leaky_relu, From::input, false>(all);
    case Act::hardswish:
      return out.g ? input<T, Act::hardswish, From::residual, true>(all)
                   : input<T, Act::hardswish, From::input, false>(all);
    default:
      return out.g ? input<T, Act::none, From::input, true>(all) : input<T, Act::none, From::input, false>(all);
  }
}

template void gradient_sums_of<ELEMENT>(const Input&, const Gradient&, GradientSums);
template void gradient_input_of<ELEMENT>(const Input&, const Gradient&, const GradientInput&);
