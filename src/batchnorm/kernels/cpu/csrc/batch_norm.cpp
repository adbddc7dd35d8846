#include "batch_norm.h"

#include <cmath>

void update_running(const Running& running, int64_t channels, const double* mean, const double* var, double count) {
  double factor = running.momentum;
  if (running.cumulative) factor = running.tracked ? 1.0 / static_cast<double>(*running.tracked) : 0.0;
  if (count <= 0) return;
  // The value as the buffer's dtype will hold it.
  const auto overflows = [&](const Vector& vector, double value) {
    const double largest = vector.dtype == DType::f64   ? 1.7976931348623157e308
                           : vector.dtype == DType::f16 ? 65519.0
                                                        : 3.4028235677973362e38;
    return !(std::fabs(value) <= largest);
  };
  for (int64_t c = 0; c < channels; ++c) {
    const double batch_var = count > 1 ? var[c] * count / (count - 1) : 0;
    const double new_mean = running.mean.get(c) * (1 - factor) + mean[c] * factor;
    const double new_var = running.var.get(c) * (1 - factor) + batch_var * factor;
    if (running.skip_nonfinite && (!std::isfinite(mean[c]) || !std::isfinite(batch_var) ||
                                   overflows(running.mean, new_mean) || overflows(running.var, new_var)))
      continue;
    running.mean.set(c, new_mean);
    if (count > 1) running.var.set(c, new_var);
  }
}

void forward(const Input& input, Normalize call, double eps, double* mean, double* var) {
  const double count = static_cast<double>(input.view.count());
  Scratch<double> lows(input.view.channels), rstds(input.view.channels);
  const bool exact = input.dtype == DType::f64;  // elsewhere a float64 mean is more than the elements can show
  const Affine affine{mean, exact ? lows.get() : nullptr, rstds.get(), call.affine.weight, call.affine.bias};
  call.streaming = prepare(input.bytes(), call.y);
  call.again = true;
  for_panels(input.view, 1, input.element_size(), [&](const View& view, int64_t first) {
    const Input part = input.panel(view);
    Normalize here = call;
    here.affine = affine.from(first);
    double *low = lows.get() + first, *rstd = rstds.get() + first, *m2 = var + first;
    moments(part, {mean + first, exact ? low : nullptr, m2});
    for (int64_t c = 0; c < view.channels; ++c) {
      m2[c] = count > 0 ? m2[c] / count : 0;
      rstd[c] = 1 / std::sqrt(m2[c] + eps);
    }
    normalize(part, here);
  });
}

namespace {

// The channels of one panel.
void backward_panel(const Input& input, Gradient call, const double* var, double eps, GradientInput out,
                    const Parameters& grads) {
  const int64_t channels = input.view.channels;
  const double count = static_cast<double>(input.view.count()), n = count > 0 ? count : 1;
  Scratch<double> memory(8 * channels);
  double* at = memory.get();
  const auto next = [&] { return at += channels, at - channels; };
  double *rstd = next(), *mean_g = next(), *low_g = next(), *slope_x = next();
  const GradientSums sums{next(), next(), next(), next()};
  for (int64_t c = 0; c < channels; ++c) rstd[c] = 1 / std::sqrt(var[c] + eps);
  call.affine.rstd = rstd;
  // At an offset of 10^7 standard deviations the rounding of a float64 mean is 1e-9 of one: forward had its rest,
  // which is computed again. Narrower elements cannot show it.
  const bool exact = input.dtype == DType::f64;
  Scratch<double> again(exact ? 3 * channels : 0);
  if (exact) {
    moments(input, {again.get(), again.get() + channels, again.get() + 2 * channels});
    call.affine.mean = again.get();
    call.affine.low = again.get() + channels;
  }
  gradient_sums(input, call, sums);
  for (int64_t c = 0; c < channels; ++c) {
    // What rounding left of the mean, d̄ = Σ(x − mean)/n, comes off here: Σ(g − ḡ)(d − d̄) = Σg'd − Σg'·d̄.
    const double rest = sums.d[c] / n;
    // Of a constant channel x̂ is 0.
    const double sum_g_xhat = var[c] == 0 ? sums.g[c] * 0 : (sums.gd[c] - sums.g[c] * rest) * rstd[c];
    if (grads.weight) grads.weight.set(c, sum_g_xhat);
    if (grads.bias) grads.bias.set(c, sums.g[c] + count * sums.shift[c]);
    slope_x[c] = rstd[c] * (sum_g_xhat / n);
    two_sum(sums.shift[c], sums.g[c] / n, mean_g[c], low_g[c]);
    low_g[c] -= rest * slope_x[c];
  }
  out.mean_g = mean_g;
  out.low_g = low_g;
  out.slope_x = slope_x;
  gradient_input(input, call, out);
}

}  // namespace

void backward(const Input& input, Gradient call, const double* var, double eps, void* dx, void* g,
              const Parameters& grads) {
  const bool streaming = prepare(input.bytes(), dx, g);
  for_panels(input.view, call.residual ? 3 : 2, input.element_size(), [&](const View& view, int64_t first) {
    Gradient here = call;
    here.affine = call.affine.from(first);
    backward_panel(input.panel(view), here, var + first, eps, {nullptr, nullptr, nullptr, dx, g, streaming},
                   {grads.weight.from(first), grads.bias.from(first)});
  });
}

void grad_sums(const Input& input, const Gradient& call, double* sum_g, double* sum_g_xhat) {
  const int64_t channels = input.view.channels;
  const double count = static_cast<double>(input.view.count());
  Scratch<double> memory(4 * channels);
  double* at = memory.get();
  const GradientSums sums{at, at + channels, at + 2 * channels, at + 3 * channels};
  gradient_sums(input, call, sums);
  for (int64_t c = 0; c < channels; ++c) {
    sum_g[c] = sums.g[c] + count * sums.shift[c];
    sum_g_xhat[c] = (sums.gd[c] + sums.shift[c] * sums.d[c]) * call.affine.rstd[c];
  }
}

void grad_input(const Input& input, const Gradient& call, const double* sum_g, const double* sum_g_xhat, double count,
                void* dx, void* g) {
  const int64_t channels = input.view.channels;
  const double n = count > 0 ? count : 1;
  Scratch<double> memory(3 * channels);
  double *mean_g = memory.get(), *low_g = mean_g + channels, *slope_x = low_g + channels;
  for (int64_t c = 0; c < channels; ++c) {
    mean_g[c] = sum_g[c] / n;
    low_g[c] = 0;
    slope_x[c] = call.affine.rstd[c] * (sum_g_xhat[c] / n);
  }
  const bool streaming = prepare(input.bytes(), dx, g);
  gradient_input(input, call, {mean_g, low_g, slope_x, dx, g, streaming});
}
