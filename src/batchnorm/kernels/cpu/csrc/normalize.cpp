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
  const Wide<T> *high, *low, *scale, *bias;
  Wide<T> slope;
  bool streaming;
};

template <class T, Act A, Added R, bool Planes>
struct Op {
  using W = Wide<T>;
  const Job<T>& job;
  alignas(64) T buffer[mini_block];
  alignas(64) uint8_t on[R == Added::bits ? mini_block : 1];
  T* out = nullptr;

  INLINE explicit Op(const Job<T>& job) : job(job) {}

  INLINE void begin(int64_t e, int64_t) { out = job.streaming ? buffer : job.y + e; }

  INLINE void run(int64_t e, int64_t length, int64_t j, int64_t at) {
    const T* RESTRICT x = job.x + e;
    const T* RESTRICT r = R == Added::none ? nullptr : job.residual + e;
    T* RESTRICT y = out + at;
    uint8_t* RESTRICT o = on + at;
    const W* RESTRICT high = job.high + j;
    const W* RESTRICT low = job.low + j;
    const W* RESTRICT scale = job.scale + j;
    const W* RESTRICT bias = job.bias + j;
    const W slope = job.slope;
    for (int64_t i = 0; i < length; ++i) {
      const int64_t k = Planes ? 0 : i;
      W z = ((widen(x[i]) - high[k]) - low[k]) * scale[k] + bias[k];
      if constexpr (R != Added::none) z += widen(r[i]);
      narrow(activate<A>(z, slope), y[i]);
      if constexpr (R == Added::bits) o[i] = is_on<A>(z);
    }
  }

  INLINE void end(int64_t e, int64_t n) {
    if constexpr (R == Added::bits) pack_bits(on, n, job.bits + e / 8);
    if (job.streaming) stream(buffer, job.y + e, n * static_cast<int64_t>(sizeof(T)));
  }
};

template <class T, Act A, Added R, bool Planes>
CLONES void run_block(const Job<T>& job, int64_t first, int64_t last) {
  Op<T, A, R, Planes> op(job);
  walk<Planes>(op, job.v, first, last);
  if (job.streaming) stream_fence();
}

template <class T, Act A, Added R>
void run(const Job<T>& job) {
  if (job.v.planes)
    for_elements(job.v, [&](int64_t first, int64_t last) { run_block<T, A, R, true>(job, first, last); });
  else
    for_elements(job.v, [&](int64_t first, int64_t last) { run_block<T, A, R, false>(job, first, last); });
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
  const int64_t bytes = v.elements * static_cast<int64_t>(sizeof(T));
  advise_huge_pages(call.y, bytes);
  const Coefficients<Wide<T>> k(v, call.affine, 0);
  const Job<T> job{v,     static_cast<const T*>(input.x), static_cast<const T*>(call.residual), static_cast<T*>(call.y),
                   call.bits, k.high, k.low, k.scale, k.bias, static_cast<Wide<T>>(call.slope),
                   wants_streaming(bytes)};
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
