// What the two passes of backward share: their coefficients, and g and d of an element or a pack.

#pragma once

#include "elementwise.h"

namespace gradient {

// Where act' comes from: the pre-activation, computed again from x (and a residual), or its bits.
enum class From { input, residual, bits };

// The coefficients: x̂'s three, then some for each pass.
enum Number { center, scale, bias, shift, unit, mean_g = shift, low_g, slope_x, numbers };

template <class T>
struct Job {
  const View& v;
  const T *x, *dy, *residual;
  const uint8_t* bits;
  Coefficients<Wide<T>, numbers>& coefficients;
  Wide<T> slope;
  bool leaks, far;
};

// One element or a pack: d = x − center and g. k(number) is a coefficient, `on` the bit of act' where there is one.
template <Act A, From F, class V>
struct Element {
  V d, g;

  template <class K, class R>
  INLINE Element(V x, V dy, const R& residual, Mask<V> on, const K& k, Item<V> slope, bool leaks) {
    d = x - k(center);
    g = dy;
    if constexpr (F == From::bits) {
      g = blend<V>(on, g, blend<V>(everywhere<V>(leaks), g * slope, filled<V>(0)));
    } else if constexpr (A != Act::none) {
      V z = d * k(scale) + k(bias);
      if constexpr (F == From::residual) z += residual();
      g = gate<A>(g, z, slope);
    }
  }
};

// Those from element e on.
template <class V, Act A, From F, class T, class K>
INLINE Element<A, F, V> element(const Job<T>& job, int64_t e, const K& k) {
  Mask<V> on{};
  if constexpr (F == From::bits) on = on_of<V>(job.bits, e);
  return {load<V>(job.x + e), load<V>(job.dy + e), [&]() INLINE_LAMBDA { return load<V>(job.residual + e); }, on, k, job.slope, job.leaks};
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

}  // namespace gradient
