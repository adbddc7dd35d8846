// The dtypes of the Python side, and vectors of any of them.

#pragma once

#include "packs.h"

// The dtypes of the Python side: 0 float32, 1 float64, 2 bfloat16, 3 float16.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

inline int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Calls f with a null pointer of the element type.
template <class F>
auto by_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::bf16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::f16:
      return f(static_cast<Float16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

// A per-channel vector of any dtype, or nothing.
struct Vector {
  void* data = nullptr;
  DType dtype = DType::f32;

  explicit operator bool() const { return data != nullptr; }

  double get(int64_t i) const {
    return by_dtype(dtype, [&](auto* type) {
      return static_cast<double>(widen(static_cast<decltype(type)>(data)[i]));
    });
  }

  Vector from(int64_t i) const {
    return {data ? static_cast<char*>(data) + i * size_of(dtype) : nullptr, dtype};
  }

  void set(int64_t i, double value) const {
    by_dtype(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      narrow(static_cast<Wide<T>>(value), static_cast<T*>(data)[i]);
    });
  }
};
