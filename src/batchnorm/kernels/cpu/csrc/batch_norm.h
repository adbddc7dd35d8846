// Batch norm from the kernels: what stands between two passes over a tensor.

#pragma once

#include "kernels.h"

// The buffers that training moves, and the rule. A `mean` of null: there are none.
struct Running {
  Vector mean, var;
  int64_t* tracked;   // may be null
  bool cumulative;    // momentum None: the plain average
  double momentum;
  bool skip_nonfinite;
};

// (6) of docs/math.md. `tracked` was counted by the caller.
void update_running(const Running& running, int64_t channels, const double* mean, const double* var, double count);

// Training: mean and var (double) are results.
void forward(const Input& input, Normalize call, double eps, double* mean, double* var);

struct Parameters {
  Vector weight, bias;  // the gradients, in the parameters' dtypes; may be null
};

// Training, given the batch's mean and var.
void backward(const Input& input, Gradient call, const double* var, double eps, void* dx, void* g,
              const Parameters& grads);

// Given statistics: Σg and Σg·x̂.
void grad_sums(const Input& input, const Gradient& call, double* sum_g, double* sum_g_xhat);

// Given statistics and sums: dx, and g if `g` is not null.
void grad_input(const Input& input, const Gradient& call, const double* sum_g, const double* sum_g_xhat, double count,
                void* dx, void* g);
