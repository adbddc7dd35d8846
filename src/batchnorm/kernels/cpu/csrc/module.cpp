// The Python module `batchnorm.kernels.cpu._cpu`. It knows nothing of torch: pointers, sizes and
// OpenMP only, so that one binary serves every version of PyTorch.

#include <nanobind/nanobind.h>

#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace nb = nanobind;

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

}  // namespace

NB_MODULE(_cpu, m) {
  m.def("build_info", &build_info);
  m.def("team_size", &team_size, nb::call_guard<nb::gil_scoped_release>());
}
