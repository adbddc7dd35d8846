// y = act(((x − mean)·rstd·weight + bias) + residual)

#include "elementwise.h"

namespace {

enum class Added { none, plain, bits };  // no residual; one; one, and the bits of act' are kept

template <class T>
struct Job {
  const View& v;
  const T *x, *residual;
  T* y;
  uint8_t* bits;
  const Coefficients<Wide<T>, 3>& coefficients;
  Wide<T> slope;
  bool streaming, far, again;
};

template <class L, class T, Act A, Added R>
struct Op {
  using W = Wide<T>;
  const Job<T> job;  // a copy: what is stored may lie anywhere, for all the compiler knows
  alignas(64) T buffer[streamed];
  alignas(64) uint8_t on[R == Added::bits ? mini_block : 1];
  T* out = nullptr;

  INLINE explicit Op(const Job<T>& job) : job(job) {}
  INLINE bool streaming() const { return job.streaming; }
  INLINE void begin(int64_t e, int64_t) { out = job.streaming ? buffer : job.y + e; }

  // Of `Rows` rows of lanes, each one's width behind the one before it.
  template <bool Same, int Rows>
  INLINE void run(int64_t e, int64_t length, int64_t j, int64_t at) {
    const T* x = job.x + e;  // may be y
    const T* residual = R == Added::none ? nullptr : job.residual + e;
    T* y = out + at;
    uint8_t* o = R == Added::bits ? on + at : nullptr;
    const Coefficient<L, W, 3, Same> k(job.coefficients.at(j));
    const W slope = job.slope;
    const bool far = job.far;
    const int64_t apart = job.v.width;
    for_packs<L, W>(
        length,
        [&](int64_t i, auto lanes) INLINE_LAMBDA {
          using V = decltype(lanes);
          Several<V, Rows> z;
          for (int64_t row = 0, at = i; row < Rows; ++row, at += apart) {
            if (far) {
              prefetch(x + at + ahead<T>);
              if constexpr (R != Added::none) prefetch(residual + at + ahead<T>);
            }
            z.of[row] = (load<V>(x + at) - k.template at<V>(0, i)) * k.template at<V>(1, i) + k.template at<V>(2, i);
            if constexpr (R != Added::none) z.of[row] += load<V>(residual + at);
          }
          return z;
        },
        [&](int64_t i, const auto& z) INLINE_LAMBDA {
          using V = std::decay_t<decltype(z.of[0])>;
          for (int64_t row = 0, at = i; row < Rows; ++row, at += apart) {
            store(activate<A>(z.of[row], slope), y + at);
            if constexpr (R == Added::bits) store_on<V>(is_on<A>(z.of[row]), o + at);
          }
        });
  }

  INLINE void end(int64_t e, int64_t n) {
    if constexpr (R == Added::bits) pack_bits(on, n, job.bits + e / 8);
    if (job.streaming) stream(buffer, job.y + e, n * static_cast<int64_t>(sizeof(T)));
  }
};

template <class L, class T, Act A, Added R>
INLINE void run_block(const Job<T>& job, int64_t origin, int64_t first, int64_t last) {
  Op<L, T, A, R> op(job);
  const View& v = job.v;
  if (v.planes) walk<true>(op, v, origin, first, last);
  else if (R == Added::bits || job.streaming) walk<false>(op, v, origin, first, last);
  else walk_rows(op, v, origin, first, last);
  if (job.streaming) stream_fence();
}

template <class T, Act A, Added R>
void run(const Job<T>& job) {
  for_elements(job.v, job.again, [&](int64_t origin, int64_t first, int64_t last) {
    at_level([&](auto level) INLINE_LAMBDA { run_block<decltype(level), T, A, R>(job, origin, first, last); });
  });
}

template <class T, Act A>
void run_added(const Job<T>& job) {
  if (!job.residual) return run<T, A, Added::none>(job);
  if constexpr (has_bits(A)) return run<T, A, Added::bits>(job);
  run<T, A, Added::plain>(job);
}

}  // namespace

template <class T>
void normalize_of(const Input& input, const Normalize& call) {
  const View& v = input.view;
  const Coefficients<Wide<T>, 3> k(v, call.affine);
  const Job<T> job{v,     static_cast<const T*>(input.x), static_cast<const T*>(call.residual), static_cast<T*>(call.y),
                   call.bits, k, static_cast<Wide<T>>(call.slope),
                   call.streaming, input.far, call.again};
  switch (call.act) {
    case Act::relu:
      return run_added<T, Act::relu>(job);
    case Act::relu6:
      return run_added<T, Act::relu6>(job);
    case Act::leaky_relu:
      return run_added<T, Act::leaky_relu>(job);
    case Act::hardswish:
      return run_added<T, Act::hardswish>(job);
    default:
      return run_added<T, Act::none>(job);
  }
}

template void normalize_of<ELEMENT>(const Input&, const Normalize&);
