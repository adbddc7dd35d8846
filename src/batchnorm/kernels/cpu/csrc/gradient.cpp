// The two passes of backward: the sums over (g, x), and dx from them, where g = dy·act'.
//
// Compiled once for each element type, as ELEMENT.

#include "elementwise.h"

namespace {

// Where act' comes from: the pre-activation, computed again from x (and a residual), or its bits.
enum class From { input, residual, bits };

template <class T>
struct Job {
  const View& v;
  const T *x, *dy, *residual;
  const uint8_t* bits;
  const Wide<T> *high, *low, *scale, *bias;
  Wide<T> slope;
  bool leaks;
};

// One element: d = x − mean and g. `on` is the bit of act' where there is one.
template <class T, Act A, From F>
struct Element {
  Wide<T> d, g;

  INLINE Element(T x, T dy, const T* residual, uint8_t on, Wide<T> high, Wide<T> low, Wide<T> scale, Wide<T> bias,
                 Wide<T> slope, bool leaks) {
    d = (widen(x) - high) - low;
    g = widen(dy);
    if constexpr (F == From::bits) {
      g = blend(on, g, blend(leaks, g * slope, Wide<T>(0)));
    } else if constexpr (A != Act::none) {
      Wide<T> z = d * scale + bias;
      if constexpr (F == From::residual) z += widen(*residual);
      g = gate<A>(g, z, slope);
    }
  }
};

constexpr int64_t on_row = tile + 16;  // room for the bits of a row of a tile, as bytes

// Adds R rows × lanes to the sums of g − shift, d and their product. `Same`: one channel, with coefficient 0.
template <int R, bool Same, Act A, From F, class T>
INLINE void add_rows(const Job<T>& job, int64_t e, int64_t stride, int64_t lanes, int64_t j,
                     const double* RESTRICT shift, double* RESTRICT sum_g, double* RESTRICT sum_d,
                     double* RESTRICT sum_gd) {
  const T* RESTRICT x = job.x + e;
  const T* RESTRICT dy = job.dy + e;
  const T* RESTRICT residual = F == From::residual ? job.residual + e : nullptr;
  const Wide<T>* RESTRICT high = job.high + j;
  const Wide<T>* RESTRICT low = job.low + j;
  const Wide<T>* RESTRICT scale = job.scale + j;
  const Wide<T>* RESTRICT bias = job.bias + j;
  const Wide<T> slope = job.slope;
  const bool leaks = job.leaks;
  uint8_t bytes[F == From::bits ? R * on_row : 1];
  const uint8_t* on[R] = {};
  if constexpr (F == From::bits)
    for (int r = 0; r < R; ++r) on[r] = unpack_bits(job.bits, e + r * stride, lanes, bytes + r * on_row);
  for (int64_t l = 0; l < lanes; ++l) {
    const int64_t k = Same ? 0 : l;
    const double s = shift[k];
    double a = sum_g[l], b = sum_d[l], ab = sum_gd[l];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int64_t i = r * stride + l;
      const Element<T, A, F> one(x[i], dy[i], F == From::residual ? residual + i : nullptr,
                                 F == From::bits ? on[r][l] : uint8_t{0}, high[k], low[k], scale[k], bias[k], slope,
                                 leaks);
      const double g = one.g - s, d = one.d;
      a += g;
      b += d;
      ab += g * d;
    }
    sum_g[l] = a;
    sum_d[l] = b;
    sum_gd[l] = ab;
  }
}

template <bool Same, Act A, From F, class T>
INLINE void add(const Job<T>& job, int64_t e, int64_t stride, int64_t rows, int64_t lanes, int64_t j,
                const double* shift, double* g, double* d, double* gd) {
  // Fewer rows at a time than in `moments`: two or three streams, and their coefficients.
  constexpr int64_t step = 4;
  int64_t r = 0;
  const int64_t ahead = rows_ahead<T>(step, stride);
  for (; r + step <= rows; r += step) {
    for (int64_t i = r; i < r + step; ++i) {
      prefetch(job.x + e + i * stride, ahead * stride, lanes);
      prefetch(job.dy + e + i * stride, ahead * stride, lanes);
      if constexpr (F == From::residual) prefetch(job.residual + e + i * stride, ahead * stride, lanes);
    }
    add_rows<step, Same, A, F>(job, e + r * stride, stride, lanes, j, shift, g, d, gd);
  }
  for (; r < rows; ++r) add_rows<1, Same, A, F>(job, e + r * stride, stride, lanes, j, shift, g, d, gd);
}

template <class T, Act A, From F>
CLONES void lanes_sums(const Job<T>& job, int64_t e, int64_t rows, int64_t lanes, int64_t j, const double* shift,
                       double* g, double* d, double* gd) {
  for (int64_t l = 0; l < lanes; ++l) g[l] = d[l] = gd[l] = 0;
  add<false, A, F>(job, e, job.v.width, rows, lanes, j, shift + j, g, d, gd);
}

constexpr int64_t run_lanes = 64;

template <class T, Act A, From F>
CLONES void run_sums(const Job<T>& job, int64_t strip, int64_t c, const double* shift, double* sum_g, double* sum_d,
                     double* sum_gd) {
  alignas(64) double g[run_lanes], d[run_lanes], gd[run_lanes];
  for (int64_t l = 0; l < run_lanes; ++l) g[l] = d[l] = gd[l] = 0;
  for_runs(job.v, strip, c, [&](int64_t e, int64_t length) INLINE_LAMBDA {
    const int64_t rows = length / run_lanes;
    add<true, A, F>(job, e, run_lanes, rows, run_lanes, c, shift + c, g, d, gd);
    add<true, A, F>(job, e + rows * run_lanes, run_lanes, 1, length % run_lanes, c, shift + c, g, d, gd);
  });
  *sum_g = *sum_d = *sum_gd = 0;
  for (int64_t l = 0; l < run_lanes; ++l) {
    *sum_g += g[l];
    *sum_d += d[l];
    *sum_gd += gd[l];
  }
}

// A value near a channel's g, so that an offset of the gradient reaches the product with d cancelled. Any one of n
// values will do, being within σ·√n of their mean. In float64, where sums have no digits to spare, the mean of 16.
template <class T, Act A, From F>
double near_gradient(const Job<T>& job, int64_t c) {
  const View& v = job.v;
  const int64_t first = v.first(c), j = v.planes ? c : first;
  const int64_t step = v.planes ? 1 : std::max<int64_t>(1, v.channels * v.inner);
  const int64_t most = v.planes ? v.inner : v.elements / step;
  const int64_t count = std::min<int64_t>(most, std::is_same_v<T, double> ? 16 : 1);
  double start = 0, rest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t e = first + i * step;
    const bool on = F == From::bits && (job.bits[e / 8] >> (e % 8) & 1);
    const Element<T, A, F> one(job.x[e], job.dy[e], F == From::residual ? job.residual + e : nullptr, on, job.high[j],
                               job.low[j], job.scale[j], job.bias[j], job.slope, job.leaks);
    const double g = one.g;
    if (i == 0) start = g;
    rest += g - start;
  }
  const double g = start + rest / static_cast<double>(count);
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

template <class T, Act A, From F>
void sums(const Job<T>& job, GradientSums out) {
  const View& v = job.v;
  const int64_t lanes = v.coefficients(), strips = v.strips(), size = (strips + 1) * lanes;
  Scratch<double> partial(3 * size), lane_shift(v.planes ? 0 : lanes);
  double *g = partial.get(), *d = g + size, *gd = d + size;
  for (int64_t c = 0; c < v.channels; ++c) out.shift[c] = near_gradient<T, A, F>(job, c);
  const double* shift = out.shift;
  if (!v.planes) {
    v.spread(out.shift, lane_shift.get());
    shift = lane_shift.get();
  }
  const int64_t tiles = v.tiles();
  const auto lanes_block = [&](int64_t strip, int64_t rows, int64_t lane, int64_t length) {
    const int64_t at = strip * lanes + lane;
    lanes_sums<T, A, F>(job, strip * v.block_rows() * v.width + lane, rows, length, lane, shift, g + at, d + at, gd + at);
  };
  for_blocks(v.blocks(), v.elements, false, [&](int64_t b) {
    const int64_t strip = b / tiles, t = b % tiles, at = strip * lanes + t;
    if (v.planes) return run_sums<T, A, F>(job, strip, t, shift, g + at, d + at, gd + at);
    lanes_block(strip, v.strip_count(strip), t * tile, std::min(tile, v.width - t * tile));
  });
  if (!v.planes) {
    for (int64_t lane = 0; lane < v.tail; lane += tile) {
      const int64_t at = strips * lanes + lane;
      lanes_sums<T, A, F>(job, v.rows * v.width + lane, 1, std::min(tile, v.tail - lane), lane, shift, g + at, d + at,
                          gd + at);
    }
  }
  const int64_t channel_tiles = (v.channels + tile - 1) / tile;
  for_blocks(channel_tiles, size, false, [&](int64_t t) {
    add_channels(v, t * tile, std::min(v.channels, (t + 1) * tile), size, partial.get(), out);
  });
}

template <class T>
struct InputJob {
  Job<T> job;
  const Wide<T> *mean_g, *low_g, *slope_x;
  T *dx, *g;
  bool streaming;
};

template <class T, Act A, From F, bool Keeps, bool Planes>
struct Op {
  using W = Wide<T>;
  const InputJob<T>& all;
  alignas(64) T buffer[mini_block];
  alignas(64) T g_buffer[Keeps ? mini_block : 1];
  alignas(64) uint8_t bytes[F == From::bits ? mini_block + 16 : 1];
  const uint8_t* on = nullptr;
  T *dx = nullptr, *g = nullptr;

  INLINE explicit Op(const InputJob<T>& all) : all(all) {}

  INLINE void begin(int64_t e, int64_t n) {
    dx = all.streaming ? buffer : all.dx + e;
    if constexpr (Keeps) g = all.streaming ? g_buffer : all.g + e;
    if constexpr (F == From::bits) on = unpack_bits(all.job.bits, e, n, bytes);
  }

  INLINE void run(int64_t e, int64_t length, int64_t j, int64_t at) {
    const Job<T>& job = all.job;
    const T* RESTRICT x = job.x + e;
    const T* RESTRICT dy = job.dy + e;
    const T* RESTRICT residual = F == From::residual ? job.residual + e : nullptr;
    const uint8_t* RESTRICT o = F == From::bits ? on + at : nullptr;
    T* RESTRICT dxs = dx + at;
    T* RESTRICT gs = Keeps ? g + at : nullptr;
    const W* RESTRICT high = job.high + j;
    const W* RESTRICT low = job.low + j;
    const W* RESTRICT scale = job.scale + j;
    const W* RESTRICT bias = job.bias + j;
    const W* RESTRICT mean_g = all.mean_g + j;
    const W* RESTRICT low_g = all.low_g + j;
    const W* RESTRICT slope_x = all.slope_x + j;
    const W slope = job.slope;
    const bool leaks = job.leaks;
    for (int64_t i = 0; i < length; ++i) {
      const int64_t k = Planes ? 0 : i;
      const Element<T, A, F> one(x[i], dy[i], F == From::residual ? residual + i : nullptr,
                                 F == From::bits ? o[i] : uint8_t{0}, high[k], low[k], scale[k], bias[k], slope, leaks);
      // (9), with the gradient's offset gone before anything is multiplied
      narrow((((one.g - mean_g[k]) - low_g[k]) - one.d * slope_x[k]) * scale[k], dxs[i]);
      if constexpr (Keeps) narrow(one.g, gs[i]);
    }
  }

  INLINE void end(int64_t e, int64_t n) {
    if (!all.streaming) return;
    stream(buffer, all.dx + e, n * static_cast<int64_t>(sizeof(T)));
    if constexpr (Keeps) stream(g_buffer, all.g + e, n * static_cast<int64_t>(sizeof(T)));
  }
};

template <class T, Act A, From F, bool Keeps, bool Planes>
CLONES void run_block(const InputJob<T>& all, int64_t first, int64_t last) {
  Op<T, A, F, Keeps, Planes> op(all);
  walk<Planes>(op, all.job.v, first, last);
  if (all.streaming) stream_fence();
}

template <class T, Act A, From F, bool Keeps>
void input(const InputJob<T>& all) {
  if (all.job.v.planes)
    for_elements(all.job.v, [&](int64_t a, int64_t b) { run_block<T, A, F, Keeps, true>(all, a, b); });
  else
    for_elements(all.job.v, [&](int64_t a, int64_t b) { run_block<T, A, F, Keeps, false>(all, a, b); });
}

template <class T>
Job<T> job_of(const Input& input, const Gradient& call, const Coefficients<Wide<T>>& k) {
  return {input.view,
          static_cast<const T*>(input.x),
          static_cast<const T*>(call.dy),
          static_cast<const T*>(call.residual),
          call.bits,
          k.high,
          k.low,
          k.scale,
          k.bias,
          static_cast<Wide<T>>(call.slope),
          call.act == Act::leaky_relu};
}

}  // namespace

template <class T>
void gradient_sums_of(const Input& input, const Gradient& call, GradientSums out) {
  const Coefficients<Wide<T>> k(input.view, call.affine, 0);
  const Job<T> job = job_of<T>(input, call, k);
  if (call.bits) return sums<T, Act::relu, From::bits>(job, out);
  switch (call.act) {
    case Act::relu:
      return sums<T, Act::relu, From::input>(job, out);
    case Act::relu6:
      return sums<T, Act::relu6, From::input>(job, out);
    case Act::leaky_relu:
      return sums<T, Act::leaky_relu, From::input>(job, out);
    case Act::hardswish:
      return call.residual ? sums<T, Act::hardswish, From::residual>(job, out)
                           : sums<T, Act::hardswish, From::input>(job, out);
    default:
      return sums<T, Act::none, From::input>(job, out);
  }
}

template <class T>
void gradient_input_of(const Input& in, const Gradient& call, const GradientInput& out) {
  const View& v = in.view;
  const int64_t bytes = v.elements * static_cast<int64_t>(sizeof(T));
  advise_huge_pages(out.dx, bytes);
  if (out.g) advise_huge_pages(out.g, bytes);
  Coefficients<Wide<T>> k(v, call.affine, 3);
  const Wide<T>* mean_g = k.add(0, v, out.mean_g);
  const Wide<T>* low_g = k.add(1, v, out.low_g, out.mean_g);
  const Wide<T>* slope_x = k.add(2, v, out.slope_x);
  const InputJob<T> all{job_of<T>(in, call, k), mean_g, low_g, slope_x, static_cast<T*>(out.dx),
                        static_cast<T*>(out.g), wants_streaming(bytes)};
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
