// The passes over the elements with a mask.
//
// All arithmetic is in double and goes by short arrays that stay in the first-level cache: first the deviations, then
// what is made of them, one simple loop a step. Compiled once for each element type, as ELEMENT.

#include "masked.h"

namespace {

constexpr int64_t piece = 512;         // elements taken through the steps at a time
constexpr int64_t strip_size = 16384;  // elements of a block

// Planes: runs of `size` elements of one channel. Lanes: rows of `size` elements, each with a channel of its own; few
// channels are repeated, because short loops do not vectorise. A single channel is one run in either order.
struct Shape {
  bool planes;
  int64_t channels, elements, samples, size, rows;

  explicit Shape(const Masked& in) : planes(!in.last || in.c == 1), channels(in.c), elements(in.elements()) {
    samples = in.c == 1 ? 1 : in.n;
    size = in.c == 1 ? in.positions() : in.s;
    if (!planes) size = channels * ((63 + channels) / channels);
    rows = (elements + size - 1) / size;
  }

  // The blocks of the reductions: `strips` × `tiles`.
  int64_t parts() const { return (size + strip_size - 1) / strip_size; }
  int64_t strip_samples() const { return parts() > 1 ? 1 : strip_size / size; }
  int64_t strip_rows() const { return std::max<int64_t>(128, (rows + 1023) / 1024); }
  int64_t strips() const {
    if (!planes) return (rows + strip_rows() - 1) / strip_rows();
    return parts() > 1 ? samples * parts() : (samples + strip_samples() - 1) / strip_samples();
  }
  int64_t tiles() const { return planes ? channels : (size + piece - 1) / piece; }
  int64_t coefficients() const { return planes ? channels : size; }
};

// The weights of the elements from e on, one an element; null where all are 0.
struct Weights {
  const double* all;
  const Shape& shape;
  alignas(64) double buffer[piece];

  INLINE Weights(const Masked& in, const Shape& shape) : all(in.weights), shape(shape) {}

  INLINE const double* of(int64_t e, int64_t length) {
    const int64_t channels = shape.channels;
    if (shape.planes) {
      const int64_t run = e / shape.size;
      return all + run / channels * shape.size + e % shape.size;
    }
    int64_t position = e / channels, left = channels - e % channels;
    if (length <= left) {
      if (!(all[position] > 0)) return nullptr;
      for (int64_t i = 0; i < length; ++i) buffer[i] = all[position];
      return buffer;
    }
    for (int64_t i = 0; i < length; left = channels, ++position)
      for (const int64_t end = std::min(length, i + left); i < end; ++i) buffer[i] = all[position];
    return buffer;
  }
};

// A per-channel number for every channel of planes, or every lane.
struct Coefficients {
  Scratch<double> memory;
  int64_t count;

  Coefficients(const Shape& shape, int64_t arrays) : memory(arrays * shape.coefficients()), count(shape.coefficients()) {}

  const double* operator[](int64_t index) const { return memory.get() + index * count; }

  template <class Value>
  const double* set(int64_t index, int64_t channels, const Value& value) const {
    double* array = memory.get() + index * count;
    for (int64_t c = 0; c < channels; ++c) array[c] = value(c);
    for (int64_t lane = channels; lane < count; ++lane) array[lane] = array[lane - channels];
    return array;
  }
};

struct Rule {
  const double *mean, *low, *scale, *bias;
  Act act;
  double slope;
};

Rule rule_of(const Shape& shape, const Affine& affine, Act act, double slope, const Coefficients& k) {
  const int64_t c = shape.channels;
  return {k.set(0, c, [&](int64_t i) { return affine.mean[i]; }),
          k.set(1, c, [&](int64_t i) { return affine.low ? affine.low[i] : 0.0; }),
          k.set(2, c, [&](int64_t i) { return affine.weight ? affine.weight.get(i) * affine.rstd[i] : affine.rstd[i]; }),
          k.set(3, c, [&](int64_t i) { return affine.bias ? affine.bias.get(i) : 0.0; }), act, slope};
}

// The steps. `P`: all elements have coefficient 0; else one each.

template <bool P, class T>
INLINE void deviations(const T* RESTRICT x, const double* RESTRICT w, int64_t n, const double* RESTRICT mean,
                       const double* RESTRICT low, double* RESTRICT d) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t k = P ? 0 : i;
    d[i] = blend(w[i] > 0, (static_cast<double>(widen(x[i])) - mean[k]) - low[k], 0.0);
  }
}

template <bool P>
INLINE void affine(const double* RESTRICT d, int64_t n, const double* RESTRICT scale, const double* RESTRICT bias,
                   double* RESTRICT z) {
  for (int64_t i = 0; i < n; ++i) z[i] = d[i] * scale[P ? 0 : i] + bias[P ? 0 : i];
}

template <class T>
INLINE void add_residual(const T* RESTRICT r, int64_t n, double* RESTRICT z) {
  for (int64_t i = 0; i < n; ++i) z[i] += static_cast<double>(widen(r[i]));
}

template <Act A>
INLINE void activate_each(int64_t n, double slope, double* RESTRICT z) {
  for (int64_t i = 0; i < n; ++i) z[i] = activate<A>(z[i], slope);
}

INLINE void activate_all(Act act, int64_t n, double slope, double* z) {
  if (act == Act::relu) activate_each<Act::relu>(n, slope, z);
  if (act == Act::relu6) activate_each<Act::relu6>(n, slope, z);
  if (act == Act::leaky_relu) activate_each<Act::leaky_relu>(n, slope, z);
  if (act == Act::hardswish) activate_each<Act::hardswish>(n, slope, z);
}

template <Act A>
INLINE void on_each(const double* RESTRICT z, int64_t n, uint8_t* RESTRICT on) {
  for (int64_t i = 0; i < n; ++i) on[i] = is_on<A>(z[i]);
}

INLINE void on_all(Act act, const double* z, int64_t n, uint8_t* on) {
  if (act == Act::relu) on_each<Act::relu>(z, n, on);
  if (act == Act::relu6) on_each<Act::relu6>(z, n, on);
  if (act == Act::leaky_relu) on_each<Act::leaky_relu>(z, n, on);
}

template <Act A>
INLINE void gate_each(const double* RESTRICT z, int64_t n, double slope, double* RESTRICT g) {
  for (int64_t i = 0; i < n; ++i) g[i] = gate<A>(g[i], z[i], slope);
}

INLINE void gate_all(Act act, const double* z, int64_t n, double slope, double* g) {
  if (act == Act::relu) gate_each<Act::relu>(z, n, slope, g);
  if (act == Act::relu6) gate_each<Act::relu6>(z, n, slope, g);
  if (act == Act::leaky_relu) gate_each<Act::leaky_relu>(z, n, slope, g);
  if (act == Act::hardswish) gate_each<Act::hardswish>(z, n, slope, g);
}

INLINE void gate_by_bits(const uint8_t* RESTRICT on, int64_t n, bool leaks, double slope, double* RESTRICT g) {
  for (int64_t i = 0; i < n; ++i) g[i] = blend(on[i], g[i], blend(leaks, g[i] * slope, 0.0));
}

INLINE void clear(const double* RESTRICT w, int64_t n, double* RESTRICT values) {
  for (int64_t i = 0; i < n; ++i) values[i] = blend(w[i] > 0, values[i], 0.0);
}

template <class T>
INLINE void write(const double* RESTRICT values, int64_t n, T* RESTRICT out) {
  for (int64_t i = 0; i < n; ++i) narrow(static_cast<Wide<T>>(values[i]), out[i]);
}

// d and g = dy·act'(z) of some elements, both 0 under a weight of 0.
template <bool P, class T>
struct Gradients {
  alignas(64) double d[piece], g[piece], z[piece];
  alignas(64) uint8_t bytes[piece + 16];

  INLINE void make(const T* x, const Gradient& call, const Rule& rule, const double* w, int64_t e, int64_t n, int64_t k) {
    deviations<P>(x + e, w, n, rule.mean + k, rule.low + k, d);
    const T* RESTRICT dy = static_cast<const T*>(call.dy) + e;
    for (int64_t i = 0; i < n; ++i) g[i] = static_cast<double>(widen(dy[i]));
    if (call.bits) {
      gate_by_bits(unpack_bits(call.bits, e, n, bytes), n, rule.act == Act::leaky_relu, rule.slope, g);
    } else if (rule.act != Act::none) {
      affine<P>(d, n, rule.scale + k, rule.bias + k, z);
      if (call.residual) add_residual(static_cast<const T*>(call.residual) + e, n, z);
      gate_all(rule.act, z, n, rule.slope, g);
    }
    clear(w, n, g);
  }
};

// Calls step(element, length, coefficient, lane of the accumulators) over a block of a reduction.
template <class Step>
INLINE void for_pieces(const Shape& shape, int64_t strip, int64_t tile_, const Step& step) {
  if (!shape.planes) {
    const int64_t lane = tile_ * piece, last = std::min(shape.rows, (strip + 1) * shape.strip_rows());
    for (int64_t row = strip * shape.strip_rows(); row < last; ++row) {
      const int64_t e = row * shape.size + lane, length = std::min({piece, shape.size - lane, shape.elements - e});
      if (length > 0) step(e, length, lane);
    }
    return;
  }
  const int64_t per = shape.strip_samples(), parts = shape.parts();
  const int64_t first = parts > 1 ? strip / parts : strip * per;
  const int64_t last = parts > 1 ? first + 1 : std::min(shape.samples, first + per);
  const int64_t from = parts > 1 ? strip % parts * strip_size : 0, to = std::min(shape.size, from + strip_size);
  for (int64_t sample = first; sample < last; ++sample)
    for (int64_t at = from; at < to; at += piece)
      step((sample * shape.channels + tile_) * shape.size + at, std::min(piece, to - at), tile_);
}

// The sum of an accumulator's lanes, by adding halves.
INLINE double folded(double* lanes) {
  for (int64_t half = piece / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Runs body(strip, tile, accumulators) for every block and merges what it found, in the blocks' order, per channel.
template <int Count, class Body>
void reduce(const Shape& shape, double* const (&out)[Count], const Body& body) {
  const int64_t lanes = shape.coefficients(), size = shape.strips() * lanes, tiles = shape.tiles();
  Scratch<double> partial(Count * size);
  for_blocks(shape.strips() * tiles, shape.elements, false, [&](int64_t b) {
    alignas(64) double sums[Count][piece];
    for (auto& sum : sums)
      for (double& lane : sum) lane = 0;
    const int64_t strip = b / tiles, t = b % tiles;
    body(strip, t, sums);
    for (int i = 0; i < Count; ++i) {
      double* found = &partial[i * size + strip * lanes];
      if (shape.planes)
        found[t] = folded(sums[i]);
      else
        for (int64_t l = 0; l < std::min(piece, lanes - t * piece); ++l) found[t * piece + l] = sums[i][l];
    }
  });
  for (int i = 0; i < Count; ++i) {
    for (int64_t c = 0; c < shape.channels; ++c) out[i][c] = 0;
    const double* found = &partial[i * size];
    for (int64_t strip = 0; strip < shape.strips(); ++strip)
      for (int64_t lane = 0; lane < lanes; lane += shape.channels, found += shape.channels)
        for (int64_t c = 0; c < shape.channels; ++c) out[i][c] += found[c];
  }
}

template <bool P, class T>
CLONES void sums_block(const T* x, const Masked& in, const Shape& shape, int64_t strip, int64_t t, const double* center,
                       const double* zero, double* RESTRICT sum, double* RESTRICT square) {
  Weights weights(in, shape);
  alignas(64) double d[piece];
  for_pieces(shape, strip, t, [&](int64_t e, int64_t n, int64_t k) INLINE_LAMBDA {
    const double* RESTRICT w = weights.of(e, n);
    if (!w) return;
    deviations<P>(x + e, w, n, center + k, zero + k, d);
    for (int64_t i = 0; i < n; ++i) {
      const double wd = w[i] * d[i];
      sum[i] += wd;
      square[i] += wd * d[i];
    }
  });
}

template <bool P, class T>
CLONES void gradient_sums_block(const T* x, const Masked& in, const Shape& shape, const Gradient& call,
                                const Rule& rule, const double* shift, int64_t strip, int64_t t, double* RESTRICT sum_g,
                                double* RESTRICT sum_d, double* RESTRICT sum_gd) {
  Weights weights(in, shape);
  Gradients<P, T> gradients;
  const double *RESTRICT d = gradients.d, *RESTRICT g = gradients.g;
  for_pieces(shape, strip, t, [&](int64_t e, int64_t n, int64_t k) INLINE_LAMBDA {
    const double* RESTRICT w = weights.of(e, n);
    if (!w) return;
    gradients.make(x, call, rule, w, e, n, k);
    for (int64_t i = 0; i < n; ++i) {
      const double rest = g[i] - w[i] * shift[P ? k : k + i];
      sum_g[i] += rest;
      sum_d[i] += w[i] * d[i];
      sum_gd[i] += rest * d[i];
    }
  });
}

// Calls step(element, length, coefficient) over the elements [first, last), both multiples of 8 or the end.
template <class Step>
INLINE void walk(const Shape& shape, int64_t first, int64_t last, const Step& step) {
  for (int64_t e = first; e < last;) {
    const int64_t at = e % shape.size, n = std::min({piece, shape.size - at, last - e});
    step(e, n, shape.planes ? e / shape.size % shape.channels : at);
    e += n;
  }
}

template <bool P, class T>
CLONES void normalize_block(const T* x, const Masked& in, const Shape& shape, const Normalize& call, const Rule& rule,
                            int64_t first, int64_t last) {
  Weights weights(in, shape);
  alignas(64) double z[piece];
  alignas(64) uint8_t on[strip_size];
  T* y = static_cast<T*>(call.y);
  const bool keeps = call.residual && has_bits(call.act);
  walk(shape, first, last, [&](int64_t e, int64_t n, int64_t k) INLINE_LAMBDA {
    const double* w = weights.of(e, n);
    if (!w) {
      std::memset(static_cast<void*>(y + e), 0, n * sizeof(T));
      if (keeps) std::memset(on + (e - first), 0, n);
      return;
    }
    alignas(64) double d[piece];
    deviations<P>(x + e, w, n, rule.mean + k, rule.low + k, d);
    affine<P>(d, n, rule.scale + k, rule.bias + k, z);
    if (call.residual) add_residual(static_cast<const T*>(call.residual) + e, n, z);
    if (keeps) on_all(rule.act, z, n, on + (e - first));
    activate_all(rule.act, n, rule.slope, z);
    clear(w, n, z);
    write(z, n, y + e);
  });
  if (keeps) pack_bits(on, last - first, call.bits + first / 8);
}

struct Slopes {
  const double *mean_g, *low_g, *slope_x;
};

template <bool P, class T>
CLONES void gradient_input_block(const T* x, const Masked& in, const Shape& shape, const Gradient& call,
                                 const Rule& rule, const Slopes& slopes, T* dx, T* dresidual, int64_t first,
                                 int64_t last) {
  Weights weights(in, shape);
  Gradients<P, T> gradients;
  alignas(64) double out[piece];
  const double *RESTRICT d = gradients.d, *RESTRICT g = gradients.g;
  walk(shape, first, last, [&](int64_t e, int64_t n, int64_t k) INLINE_LAMBDA {
    const double* RESTRICT w = weights.of(e, n);
    if (!w) {
      std::memset(static_cast<void*>(dx + e), 0, n * sizeof(T));
      if (dresidual) std::memset(static_cast<void*>(dresidual + e), 0, n * sizeof(T));
      return;
    }
    gradients.make(x, call, rule, w, e, n, k);
    if (dresidual) write(gradients.g, n, dresidual + e);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = P ? k : k + i;
      // (9), with the gradient's offset gone before anything is multiplied
      const double rest = (g[i] - w[i] * slopes.mean_g[c]) - w[i] * slopes.low_g[c];
      out[i] = (rest - w[i] * (d[i] * slopes.slope_x[c])) * rule.scale[c];
    }
    clear(w, n, out);
    write(out, n, dx + e);
  });
}

template <class Run>
void for_elements(const Shape& shape, const Run& run) {
  for_blocks((shape.elements + strip_size - 1) / strip_size, shape.elements, true, [&](int64_t b) {
    run(b * strip_size, std::min(shape.elements, (b + 1) * strip_size));
  });
}

}  // namespace

template <class T>
void masked_sums_of(const Masked& in, const double* center, double* sum, double* square) {
  const Shape shape(in);
  const Coefficients k(shape, 2);
  const T* x = static_cast<const T*>(in.x);
  const double* centers = k.set(0, in.c, [&](int64_t c) { return center[c]; });
  const double* zero = k.set(1, in.c, [](int64_t) { return 0.0; });
  reduce<2>(shape, {sum, square}, [&](int64_t strip, int64_t t, double (&sums)[2][piece]) {
    const auto run = shape.planes ? sums_block<true, T> : sums_block<false, T>;
    run(x, in, shape, strip, t, centers, zero, sums[0], sums[1]);
  });
}

template <class T>
void masked_normalize_of(const Masked& in, const Normalize& call) {
  const Shape shape(in);
  const Coefficients k(shape, 4);
  const Rule rule = rule_of(shape, call.affine, call.act, call.slope, k);
  const T* x = static_cast<const T*>(in.x);
  (void)prepare(shape.elements * static_cast<int64_t>(sizeof(T)), call.y);
  for_elements(shape, [&](int64_t first, int64_t last) {
    const auto run = shape.planes ? normalize_block<true, T> : normalize_block<false, T>;
    run(x, in, shape, call, rule, first, last);
  });
}

template <class T>
void masked_gradient_sums_of(const Masked& in, const Gradient& call, GradientSums out) {
  const Shape shape(in);
  const Coefficients k(shape, 5);
  const Rule rule = rule_of(shape, call.affine, call.act, call.slope, k);
  const double* shift = k.set(4, in.c, [&](int64_t c) { return out.shift[c]; });
  const T* x = static_cast<const T*>(in.x);
  reduce<3>(shape, {out.g, out.d, out.gd}, [&](int64_t strip, int64_t t, double (&sums)[3][piece]) {
    const auto run = shape.planes ? gradient_sums_block<true, T> : gradient_sums_block<false, T>;
    run(x, in, shape, call, rule, shift, strip, t, sums[0], sums[1], sums[2]);
  });
}

template <class T>
void masked_gradient_input_of(const Masked& in, const Gradient& call, const GradientInput& out) {
  const Shape shape(in);
  const Coefficients k(shape, 7);
  const Rule rule = rule_of(shape, call.affine, call.act, call.slope, k);
  const Slopes slopes{k.set(4, in.c, [&](int64_t c) { return out.mean_g[c]; }),
                      k.set(5, in.c, [&](int64_t c) { return out.low_g[c]; }),
                      k.set(6, in.c, [&](int64_t c) { return out.slope_x[c]; })};
  const T* x = static_cast<const T*>(in.x);
  const int64_t bytes = shape.elements * static_cast<int64_t>(sizeof(T));
  (void)prepare(bytes, out.dx, out.g);
  for_elements(shape, [&](int64_t first, int64_t last) {
    const auto run = shape.planes ? gradient_input_block<true, T> : gradient_input_block<false, T>;
    run(x, in, shape, call, rule, slopes, static_cast<T*>(out.dx), static_cast<T*>(out.g), first, last);
  });
}

template <class T>
void masked_at(const Masked& in, const Gradient* call, int64_t position, double* values) {
  const T* x = static_cast<const T*>(in.x);
  const double one = 1, zero = 0;
  for (int64_t c = 0; c < in.c; ++c) {
    const int64_t e = in.last ? position * in.c + c : (position / in.s * in.c + c) * in.s + position % in.s;
    if (!call) {
      values[c] = static_cast<double>(widen(x[e]));
      continue;
    }
    const Affine& a = call->affine;
    const double scale = a.weight ? a.weight.get(c) * a.rstd[c] : a.rstd[c], bias = a.bias ? a.bias.get(c) : 0;
    Gradients<true, T> gradients;
    gradients.make(x, *call, {a.mean + c, a.low ? a.low + c : &zero, &scale, &bias, call->act, call->slope}, &one, e, 1, 0);
    values[c] = gradients.g[0];
  }
}

template void masked_sums_of<ELEMENT>(const Masked&, const double*, double*, double*);
template void masked_normalize_of<ELEMENT>(const Masked&, const Normalize&);
template void masked_gradient_sums_of<ELEMENT>(const Masked&, const Gradient&, GradientSums);
template void masked_gradient_input_of<ELEMENT>(const Masked&, const Gradient&, const GradientInput&);
template void masked_at<ELEMENT>(const Masked&, const Gradient*, int64_t, double*);
