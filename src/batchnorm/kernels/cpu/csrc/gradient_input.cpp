// The second pass of backward: dx from the sums, and g where it is asked for.
//
// Compiled once for each element type, as ELEMENT.

#include "gradient.h"

using namespace gradient;

namespace {

template <class T>
struct InputJob {
  Job<T> job;
  T *dx, *g;
  bool streaming;
};

template <class V>
struct Pair {
  V dx, g;
};

template <class L, class T, Act A, From F, bool Keeps>
struct Op {
  using W = Wide<T>;
  const InputJob<T> all;  // a copy: what is stored may lie anywhere, for all the compiler knows
  alignas(64) T buffer[streamed];
  alignas(64) T g_buffer[Keeps ? streamed : 1];
  T *dx = nullptr, *g = nullptr;

  INLINE explicit Op(const InputJob<T>& all) : all(all) {}
  INLINE bool streaming() const { return all.streaming; }

  INLINE void begin(int64_t e, int64_t) {
    dx = all.streaming ? buffer : all.dx + e;
    if constexpr (Keeps) g = all.streaming ? g_buffer : all.g + e;
  }

  // Of `Rows` rows of lanes, each one's width behind the one before it.
  template <bool Same, int Rows>
  INLINE void run(int64_t e, int64_t length, int64_t j, int64_t at) {
    const Job<T> job = all.job;
    const int64_t apart = job.v.width;
    T* RESTRICT dxs = dx + at;
    T* RESTRICT gs = Keeps ? g + at : nullptr;
    const Coefficient<L, W, numbers, Same> k(job.coefficients.at(j));
    for_packs<L, W>(
        length,
        [&](int64_t i, auto lanes) INLINE_LAMBDA {
          using V = decltype(lanes);
          Several<Pair<V>, Rows> found;
          for (int64_t row = 0, at = e + i; row < Rows; ++row, at += apart) {
            if (job.far) {
              prefetch(job.x + at + ahead<T>);
              prefetch(job.dy + at + ahead<T>);
              if constexpr (F == From::residual) prefetch(job.residual + at + ahead<T>);
            }
            const auto one =
                element<V, A, F>(job, at, [&](int number) INLINE_LAMBDA { return k.template at<V>(number, i); });
            // (9), with the gradient's offset gone before anything is multiplied
            const V rest = (one.g - k.template at<V>(mean_g, i)) - k.template at<V>(low_g, i);
            found.of[row] = {(rest - one.d * k.template at<V>(slope_x, i)) * k.template at<V>(scale, i), one.g};
          }
          return found;
        },
        [&](int64_t i, const auto& found) INLINE_LAMBDA {
          for (int64_t row = 0, at = i; row < Rows; ++row, at += apart) {
            store(found.of[row].dx, dxs + at);
            if constexpr (Keeps) store(found.of[row].g, gs + at);
          }
        });
  }

  INLINE void end(int64_t e, int64_t n) {
    if (!all.streaming) return;
    stream(buffer, all.dx + e, n * static_cast<int64_t>(sizeof(T)));
    if constexpr (Keeps) stream(g_buffer, all.g + e, n * static_cast<int64_t>(sizeof(T)));
  }
};

template <class L, class T, Act A, From F, bool Keeps>
INLINE void run_block(const InputJob<T>& all, int64_t origin, int64_t first, int64_t last) {
  Op<L, T, A, F, Keeps> op(all);
  const View& v = all.job.v;
  if (v.planes) walk<true>(op, v, origin, first, last);
  else if (all.streaming) walk<false>(op, v, origin, first, last);
  else walk_rows(op, v, origin, first, last);
  if (all.streaming) stream_fence();
}

template <class T, Act A, From F, bool Keeps>
void input(const InputJob<T>& all) {
  for_elements(all.job.v, true, [&](int64_t origin, int64_t first, int64_t last) {
    at_level([&](auto level) INLINE_LAMBDA { run_block<decltype(level), T, A, F, Keeps>(all, origin, first, last); });
  });
}

}  // namespace

template <class T>
void gradient_input_of(const Input& in, const Gradient& call, const GradientInput& out) {
  const View& v = in.view;
  Coefficients<Wide<T>, numbers> k(v, call.affine);
  k.set(mean_g, [&](int64_t c) { return out.mean_g[c]; });
  // What W leaves of it, what comes on top of it, and what the center leaves of x's mean.
  k.set(low_g, [&](int64_t c) {
    return k.rest(out.mean_g[c]) + out.low_g[c] - k.low(call.affine, c) * out.slope_x[c];
  });
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

template void gradient_input_of<ELEMENT>(const Input&, const Gradient&, const GradientInput&);
