// The Python module `batchnorm.kernels.cpu._cpu`. It knows nothing of torch: pointers, sizes and
// OpenMP only, so that one binary serves every version of PyTorch.

#include <nanobind/nanobind.h>

#include <cmath>
#include <string>

#include "masked.h"

namespace nb = nanobind;

// Addresses come as integers, 0 for what is absent; a dtype as in types.h. All functions let go of the GIL.
using Address = uintptr_t;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__) + "." +
         std::to_string(__clang_patchlevel__);
#elif defined(__GNUC__)
  return "gcc " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__) + "." +
         std::to_string(__GNUC_PATCHLEVEL__);
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

long cxx_standard() {
#if defined(_MSVC_LANG)
  return _MSVC_LANG;
#else
  return __cplusplus;
#endif
}

// The size of the team that a parallel region of this module really gets.
int team_size() {
  int size = 1;
#ifdef _OPENMP
#pragma omp parallel
  {
#pragma omp single
    size = omp_get_num_threads();
  }
#endif
  return size;
}

nb::dict build_info() {
  nb::dict info;
  const std::string name = compiler();
  info["compiler"] = nb::str(name.c_str(), name.size());
  info["cxx_standard"] = cxx_standard();
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
  info["max_threads"] = omp_get_max_threads();
#else
  info["openmp"] = 0;
  info["max_threads"] = 1;
#endif
  return info;
}

template <class T>
T* to(Address address) {
  return reinterpret_cast<T*>(address);
}

Vector vector(Address address, int dtype) { return {to<void>(address), static_cast<DType>(dtype)}; }

Input input(int dtype, bool last, int64_t n, int64_t c, int64_t s, Address x) {
  return {static_cast<DType>(dtype), View(n, c, s, last), to<void>(x)};
}

Masked masked(int dtype, bool last, int64_t n, int64_t c, int64_t s, Address x, Address weights) {
  return {static_cast<DType>(dtype), last, n, c, s, to<void>(x), to<double>(weights)};
}

// What every function begins with: dtype, whether the channel is the fastest axis, (N, C, S), the input, and one
// weight (double) a position, or none.
#define INPUT int dtype, bool last, int64_t n, int64_t c, int64_t s, Address x, Address weights
#define UNMASKED input(dtype, last, n, c, s, x)
#define MASKED masked(dtype, last, n, c, s, x, weights)
#define PARAMETERS Address weight, int weight_dtype, Address bias, int bias_dtype
#define WEIGHTS vector(weight, weight_dtype), vector(bias, bias_dtype)

#define OUTPUT Address residual, Address y, Address bits, int act, double slope
#define NORMALIZE(mean, low, rstd) \
  Normalize { {mean, low, rstd, WEIGHTS}, to<void>(residual), to<void>(y), to<uint8_t>(bits), static_cast<Act>(act), slope }

void unmasked_normalize(const Input& input, Normalize call) {
  call.streaming = prepare(input.bytes(), call.y);
  normalize(input, call);
}

// Returns the count. `momentum` NaN: None. The counter moves first, as in PyTorch.
double train_forward(INPUT, PARAMETERS, OUTPUT, double eps, Address mean, Address var, Address running_mean,
                     Address running_var, int running_dtype, Address tracked, double momentum, bool skip_nonfinite) {
  const Normalize call = NORMALIZE(nullptr, nullptr, nullptr);
  const double count = weights ? masked_forward(MASKED, call, eps, to<double>(mean), to<double>(var))
                               : static_cast<double>(n * s);
  if (!weights) forward(UNMASKED, call, eps, to<double>(mean), to<double>(var));
  int64_t* counter = to<int64_t>(tracked);
  if (counter) ++*counter;
  if (running_mean)
    update_running({vector(running_mean, running_dtype), vector(running_var, running_dtype), counter,
                    std::isnan(momentum), momentum, skip_nonfinite},
                   c, to<double>(mean), to<double>(var), count);
  return count;
}

#define GRADIENT Address dy, Address residual, Address bits, int act, double slope
#define GATED(mean, rstd) \
  Gradient { {mean, nullptr, rstd, WEIGHTS}, to<void>(dy), to<uint8_t>(bits), to<void>(residual), static_cast<Act>(act), slope }

void train_backward(INPUT, PARAMETERS, GRADIENT, double eps, Address mean, Address var, Address dx, Address dresidual,
                    Address dweight, Address dbias) {
  const Gradient call = GATED(to<double>(mean), nullptr);
  const Parameters grads{vector(dweight, weight_dtype), vector(dbias, bias_dtype)};
  if (weights) return masked_backward(MASKED, call, to<double>(var), eps, to<void>(dx), to<void>(dresidual), grads);
  backward(UNMASKED, call, to<double>(var), eps, to<void>(dx), to<void>(dresidual), grads);
}

// Returns the count.
double moments_(INPUT, Address mean, Address m2) {
  const Statistics out{to<double>(mean), nullptr, to<double>(m2)};
  if (weights) return masked_moments(MASKED, out);
  moments(UNMASKED, out);
  return static_cast<double>(n * s);
}

void normalize_(INPUT, PARAMETERS, OUTPUT, Address mean, Address invstd) {
  const Normalize call = NORMALIZE(to<double>(mean), nullptr, to<double>(invstd));
  if (weights) return masked_normalize(MASKED, call);
  unmasked_normalize(UNMASKED, call);
}

// Eval: `normalize` by running statistics; mean and invstd (double) are results.
void eval_forward(INPUT, PARAMETERS, OUTPUT, double eps, Address running_mean, int mean_dtype, Address running_var,
                  int var_dtype, Address mean, Address invstd) {
  for (int64_t i = 0; i < c; ++i) {
    to<double>(mean)[i] = vector(running_mean, mean_dtype).get(i);
    to<double>(invstd)[i] = 1 / std::sqrt(vector(running_var, var_dtype).get(i) + eps);
  }
  normalize_(dtype, last, n, c, s, x, weights, weight, weight_dtype, bias, bias_dtype, residual, y, bits, act, slope,
             mean, invstd);
}

// The pre-activation x̂·weight + bias + residual of a training step, from its statistics.
void preactivation(INPUT, PARAMETERS, Address residual, Address y, double eps, Address mean, Address var) {
  const Address bits = 0;
  const int act = 0;
  const double slope = 0;
  Scratch<double> memory(4 * c);
  double *invstd = memory.get(), *low = nullptr;
  const double* center = to<double>(mean);
  for (int64_t i = 0; i < c; ++i) invstd[i] = 1 / std::sqrt(to<double>(var)[i] + eps);
  if (static_cast<DType>(dtype) == DType::f64) {  // as in `backward`
    low = invstd + c;
    const Statistics again{invstd + 2 * c, low, invstd + 3 * c};
    weights ? (void)masked_moments(MASKED, again) : moments(UNMASKED, again);
    center = again.mean;
  }
  const Normalize call = NORMALIZE(center, low, invstd);
  if (weights) return masked_normalize(MASKED, call);
  unmasked_normalize(UNMASKED, call);
}

void grad_sums_(INPUT, PARAMETERS, GRADIENT, Address mean, Address invstd, Address sum_g, Address sum_g_xhat) {
  const Gradient call = GATED(to<double>(mean), to<double>(invstd));
  if (weights) return masked_grad_sums(MASKED, call, to<double>(sum_g), to<double>(sum_g_xhat));
  grad_sums(UNMASKED, call, to<double>(sum_g), to<double>(sum_g_xhat));
}

void grad_input_(INPUT, PARAMETERS, GRADIENT, Address mean, Address invstd, Address sum_g, Address sum_g_xhat,
                 double count, Address dx, Address dresidual) {
  const Gradient call = GATED(to<double>(mean), to<double>(invstd));
  const auto kernel = [&](const auto& run, const auto& in) {
    run(in, call, to<double>(sum_g), to<double>(sum_g_xhat), count, to<void>(dx), to<void>(dresidual));
  };
  weights ? kernel(masked_grad_input, MASKED) : kernel(grad_input, UNMASKED);
}

void update_running_(Address running_mean, int mean_dtype, Address running_var, int var_dtype, Address tracked,
                     int64_t c, Address mean, Address var, double count, double momentum, bool skip_nonfinite) {
  update_running({vector(running_mean, mean_dtype), vector(running_var, var_dtype), to<int64_t>(tracked),
                  std::isnan(momentum), momentum, skip_nonfinite},
                 c, to<double>(mean), to<double>(var), count);
}

}  // namespace

NB_MODULE(_cpu, m) {
  const auto free = nb::call_guard<nb::gil_scoped_release>();
  m.def("build_info", &build_info);
  m.def("team_size", &team_size, free);
  m.def("use_vectors", &use_vectors);
  m.def("train_forward", &train_forward, free);
  m.def("train_backward", &train_backward, free);
  m.def("moments", &moments_, free);
  m.def("normalize", &normalize_, free);
  m.def("eval_forward", &eval_forward, free);
  m.def("preactivation", &preactivation, free);
  m.def("grad_sums", &grad_sums_, free);
  m.def("grad_input", &grad_input_, free);
  m.def("update_running", &update_running_, free);
}
