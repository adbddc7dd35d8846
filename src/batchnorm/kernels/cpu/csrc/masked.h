// Batch norm with a mask: one weight ≥ 0 a position, taken as a frequency. What stands under a weight of 0, NaN
// included, reaches nothing, and the results there are 0.

#pragma once

#include "batch_norm.h"

// The shape in memory order: (n, c, s), or (n, s, c) where `last` says so. The weights are (n, s).
struct Masked {
  DType dtype;
  bool last;
  int64_t n, c, s;
  const void* x;
  const double* weights;

  int64_t positions() const { return n * s; }
  int64_t elements() const { return n * c * s; }
};

// The two compositions, and the four kernels. What they return is the count, Σw.
double masked_moments(const Masked& input, Statistics out);
double masked_forward(const Masked& input, Normalize call, double eps, double* mean, double* var);
void masked_backward(const Masked& input, Gradient call, const double* var, double eps, void* dx, void* g,
                     const Parameters& grads);
void masked_normalize(const Masked& input, const Normalize& call);
void masked_grad_sums(const Masked& input, const Gradient& call, double* sum_g, double* sum_g_xhat);
void masked_grad_input(const Masked& input, const Gradient& call, const double* sum_g, const double* sum_g_xhat,
                       double count, void* dx, void* g);

// The passes over the elements, compiled for every element type (masked.cpp).

// Σw(x − center) and Σw(x − center)² for each channel.
template <class T>
void masked_sums_of(const Masked& input, const double* center, double* sum, double* square);

template <class T>
void masked_normalize_of(const Masked& input, const Normalize& call);

// As `gradient_sums`, with w·shift taken off g, and Σw(x − mean) for Σ(x − mean).
template <class T>
void masked_gradient_sums_of(const Masked& input, const Gradient& call, GradientSums out);

// dx = weight·rstd·((g − w·mean_g) − w·low_g − w·(x − mean)·slope_x)
template <class T>
void masked_gradient_input_of(const Masked& input, const Gradient& call, const GradientInput& out);

// x and g of every channel at one position, as double.
template <class T>
void masked_at(const Masked& input, const Gradient* call, int64_t position, double* values);
