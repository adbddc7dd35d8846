// What the kernels are given and what they do. Every pointer is to contiguous memory; per-channel numbers are
// double unless they are parameters of a layer.

#pragma once

#include "activations.h"
#include "view.h"

struct Input {
  DType dtype;
  View view;
  const void* x;
  bool far;  // of the whole tensor, with another of its size

  Input(DType dtype, const View& view, const void* x)
      : dtype(dtype), view(view), x(x), far(is_far(2 * view.elements * size_of(dtype))) {}

  // Some channels of it.
  Input panel(const View& part) const {
    Input some = *this;
    some.view = part;
    return some;
  }

  int64_t element_size() const { return size_of(dtype); }
  int64_t bytes() const { return view.elements * element_size(); }
};

// The mean as an unevaluated sum, hi + lo, and var = m2 / count.
struct Statistics {
  double* mean;
  double* low;  // may be null: then 0
  double* m2;
};

// (1), (2) of docs/math.md
void moments(const Input& input, Statistics out);

// What an element of channel c needs: ((x − mean)·rstd·weight + bias.
struct Affine {
  const double* mean;
  const double* low;  // may be null
  const double* rstd;
  Vector weight, bias;

  // Of the channels from c on.
  Affine from(int64_t c) const {
    return {mean + c, low ? low + c : nullptr, rstd ? rstd + c : nullptr, weight.from(c), bias.from(c)};
  }
};

// (3) to (5): y = act(((x − mean)·rstd·weight + bias) + residual), and the bits of act' if there is room for them.
struct Normalize {
  Affine affine;
  const void* residual;
  void* y;
  uint8_t* bits;
  Act act;
  double slope;
  bool streaming = false;
  bool again = false;  // x has just been read
};
void normalize(const Input& input, const Normalize& call);

// What g = dy·act' is made from: dy; where z is not had from x alone, the bits of act' or the residual.
struct Gradient {
  Affine affine;
  const void* dy;
  const uint8_t* bits;
  const void* residual;
  Act act;
  double slope;
};

// Σ(g − shift), Σ(x − mean) and Σ(g − shift)(x − mean) for each channel; shift is one of the channel's g.
struct GradientSums {
  double* shift;
  double* g;
  double* d;
  double* gd;
};
void gradient_sums(const Input& input, const Gradient& call, GradientSums out);

// dx = weight·rstd·((g − mean_g) − low_g − (x − mean)·slope_x) and, where asked for, g itself.
struct GradientInput {
  const double* mean_g;
  const double* low_g;
  const double* slope_x;
  void* dx;
  void* g;  // may be null
  bool streaming = false;
};
void gradient_input(const Input& input, const Gradient& call, const GradientInput& out);

// a + b as hi + lo without rounding.
INLINE void two_sum(double a, double b, double& hi, double& lo) {
  hi = a + b;
  const double c = hi - a;
  lo = (a - (hi - c)) + (b - c);
}
