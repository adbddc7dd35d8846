// Batch norm with a mask from its passes: what batch_norm.cpp is without one.

#include <cmath>

#include "masked.h"

namespace {

// Σw, the first position with a weight, and the mean of the weights that are not 0.
struct Weighed {
  double count = 0, mean = 0;
  int64_t first = -1;

  explicit Weighed(const Masked& in) {
    constexpr int64_t lanes = 64, rows = 64;
    const int64_t all = in.positions();
    int64_t valid = 0;
    for (int64_t start = 0; start < all; start += lanes * rows) {
      const int64_t end = std::min(all, start + lanes * rows);
      double sum[lanes] = {};
      for (int64_t i = start; i < end; ++i) sum[(i - start) % lanes] += in.weights[i];
      for (int64_t i = start; i < end; ++i) {
        if (!(in.weights[i] > 0)) continue;
        if (first < 0) first = i;
        ++valid;
      }
      double part = 0;
      for (const double lane : sum) part += lane;
      count += part;
    }
    if (valid) mean = count / static_cast<double>(valid);
  }
};

template <class F>
void by_element(const Masked& in, F&& f) {
  by_dtype(in.dtype, [&](auto* type) { f(type); });
}

#define TYPE(type) std::remove_pointer_t<decltype(type)>

void clear(int64_t channels, double* values) {
  if (values)
    for (int64_t c = 0; c < channels; ++c) values[c] = 0;
}

// (1), (2). The first pass gives a mean, the second m2 about it and what rounding left of it.
void moments(const Masked& in, const Weighed& w, Statistics out) {
  if (in.elements() == 0 || w.first < 0) {
    for (double* values : {out.mean, out.low, out.m2}) clear(in.c, values);
    return;
  }
  Scratch<double> memory(3 * in.c);
  double *center = memory.get(), *sum = center + in.c, *square = sum + in.c;
  by_element(in, [&](auto* type) {
    masked_at<TYPE(type)>(in, nullptr, w.first, center);
    masked_sums_of<TYPE(type)>(in, center, sum, square);
    for (int64_t c = 0; c < in.c; ++c) center[c] += sum[c] / w.count;
    masked_sums_of<TYPE(type)>(in, center, sum, square);
  });
  for (int64_t c = 0; c < in.c; ++c) {
    const double rest = sum[c] / w.count, m2 = square[c] - sum[c] * rest;
    double low;
    two_sum(center[c], rest, out.mean[c], low);
    if (out.low) out.low[c] = low == low ? low : 0;
    out.m2[c] = m2 < 0 ? 0 : m2;  // NaN stays
  }
}

// As `gradient_sums`. The shift makes an offset of g cancel before anything is multiplied by it; it is small enough
// for every weight, because no weight counts as less than their mean.
void sums(const Masked& in, const Weighed& w, const Gradient& call, GradientSums out) {
  for (double* values : {out.shift, out.g, out.d, out.gd}) clear(in.c, values);
  if (in.elements() == 0 || w.first < 0) return;
  by_element(in, [&](auto* type) {
    masked_at<TYPE(type)>(in, &call, w.first, out.shift);
    for (int64_t c = 0; c < in.c; ++c) {
      const double shift = out.shift[c] / std::max(in.weights[w.first], w.mean);
      out.shift[c] = std::isfinite(shift) ? shift : 0;
    }
    masked_gradient_sums_of<TYPE(type)>(in, call, out);
  });
}

}  // namespace

double masked_moments(const Masked& in, Statistics out) {
  const Weighed w(in);
  moments(in, w, out);
  return w.count;
}

void masked_normalize(const Masked& in, const Normalize& call) {
  if (in.elements() == 0) return;
  by_element(in, [&](auto* type) { masked_normalize_of<TYPE(type)>(in, call); });
}

double masked_forward(const Masked& in, Normalize call, double eps, double* mean, double* var) {
  const Weighed w(in);
  Scratch<double> memory(2 * in.c);
  double *low = memory.get(), *rstd = low + in.c;
  moments(in, w, {mean, low, var});
  for (int64_t c = 0; c < in.c; ++c) {
    var[c] = w.count > 0 ? var[c] / w.count : 0;
    rstd[c] = 1 / std::sqrt(var[c] + eps);
  }
  call.affine.mean = mean;
  call.affine.low = low;
  call.affine.rstd = rstd;
  masked_normalize(in, call);
  return w.count;
}

void masked_backward(const Masked& in, Gradient call, const double* var, double eps, void* dx, void* g,
                     const Parameters& grads) {
  const Weighed w(in);
  const double n = w.count > 0 ? w.count : 1;
  Scratch<double> memory(8 * in.c), again(3 * in.c);
  double* at = memory.get();
  const auto next = [&] { return at += in.c, at - in.c; };
  double *rstd = next(), *mean_g = next(), *low_g = next(), *slope_x = next();
  const GradientSums found{next(), next(), next(), next()};
  for (int64_t c = 0; c < in.c; ++c) rstd[c] = 1 / std::sqrt(var[c] + eps);
  call.affine.rstd = rstd;
  if (in.dtype == DType::f64) {  // as without a mask: the rest of the mean, which forward had
    moments(in, w, {again.get(), again.get() + in.c, again.get() + 2 * in.c});
    call.affine.mean = again.get();
    call.affine.low = again.get() + in.c;
  }
  sums(in, w, call, found);
  for (int64_t c = 0; c < in.c; ++c) {
    // What rounding left of the mean, d̄ = Σwd/W, comes off: Σ(g − wḡ)(d − d̄) = Σ(g − wk)d − Σ(g − wk)·d̄.
    const double rest = found.d[c] / n;
    const double sum_g_xhat = (found.gd[c] - found.g[c] * rest) * rstd[c];
    if (grads.weight) grads.weight.set(c, sum_g_xhat);
    if (grads.bias) grads.bias.set(c, found.g[c] + w.count * found.shift[c]);
    slope_x[c] = rstd[c] * (sum_g_xhat / n);
    two_sum(found.shift[c], found.g[c] / n, mean_g[c], low_g[c]);
    low_g[c] -= rest * slope_x[c];
  }
  if (in.elements() == 0) return;
  by_element(in, [&](auto* type) { masked_gradient_input_of<TYPE(type)>(in, call, {mean_g, low_g, slope_x, dx, g}); });
}

void masked_grad_sums(const Masked& in, const Gradient& call, double* sum_g, double* sum_g_xhat) {
  const Weighed w(in);
  Scratch<double> memory(4 * in.c);
  double* at = memory.get();
  const GradientSums found{at, at + in.c, at + 2 * in.c, at + 3 * in.c};
  sums(in, w, call, found);
  for (int64_t c = 0; c < in.c; ++c) {
    sum_g[c] = found.g[c] + w.count * found.shift[c];
    sum_g_xhat[c] = (found.gd[c] + found.shift[c] * found.d[c]) * call.affine.rstd[c];
  }
}

void masked_grad_input(const Masked& in, const Gradient& call, const double* sum_g, const double* sum_g_xhat,
                       double count, void* dx, void* g) {
  if (in.elements() == 0) return;
  const double n = count > 0 ? count : 1;
  Scratch<double> memory(3 * in.c);
  double *mean_g = memory.get(), *low_g = mean_g + in.c, *slope_x = low_g + in.c;
  for (int64_t c = 0; c < in.c; ++c) {
    mean_g[c] = sum_g[c] / n;
    low_g[c] = 0;
    slope_x[c] = call.affine.rstd[c] * (sum_g_xhat[c] / n);
  }
  by_element(in, [&](auto* type) { masked_gradient_input_of<TYPE(type)>(in, call, {mean_g, low_g, slope_x, dx, g}); });
}
