// The element types, and the words that make gcc vectorise.
//
// Kernels see a tensor as elements of type T in memory order. Arithmetic on elements is in Wide<T>: float for
// float, bfloat16 and float16, double for double. Sums are double for all of them.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(_MSC_VER) && !defined(__clang__)
#define INLINE __forceinline
#define RESTRICT __restrict
#define INLINE_LAMBDA
#define INDEPENDENT __pragma(loop(ivdep))
#elif defined(__clang__)
#define INLINE inline __attribute__((always_inline))
#define RESTRICT __restrict__
#define INLINE_LAMBDA __attribute__((always_inline))
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INLINE inline __attribute__((always_inline))
#define RESTRICT __restrict__
#define INLINE_LAMBDA __attribute__((always_inline))
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

// One copy of a function for each level of x86-64; the loader picks one (ifunc, hence glibc). What the function
// calls must be INLINE, or it stays at the lowest level. Multiplications and additions are never contracted
// (-ffp-contract=off), so all levels give the same bits.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(BATCHNORM_ONE_TARGET)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

// Asks for the lines of `count` elements `ahead` of x. The reductions read some rows side by side, an order that the
// hardware does not foresee: without this they read at 6 to 10 GB/s where the data are not in a cache, with it at 40.
template <class T>
INLINE void prefetch(const T* x, int64_t ahead, int64_t count) {
#if defined(__GNUC__)
  const char* at = reinterpret_cast<const char*>(x + ahead);
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
#else
  (void)x, (void)ahead, (void)count;
#endif
}

// How many rows of `stride` elements ahead that is to be done: one step of `rows`, and 4 KB at least.
template <class T>
INLINE int64_t rows_ahead(int64_t rows, int64_t stride) {
  const int64_t wanted = 4096 / (stride * static_cast<int64_t>(sizeof(T)));
  return wanted > rows ? wanted : rows;
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

// What a few elements are added up in. Two bytes hold so few digits that some rows may be added in float before they
// become double; a sum of floats would show it in the seventh digit.
template <class T>
using Partial = std::conditional_t<sizeof(T) == 2, float, double>;

INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// on ? a : b by masks. Written as a choice, gcc turns it into a jump as soon as b makes what follows simpler, and a
// loop with a jump does not vectorise.
INLINE float blend(bool on, float a, float b) {
  const uint32_t mask = 0u - static_cast<uint32_t>(on);
  return float_of((bits_of(a) & mask) | (bits_of(b) & ~mask));
}

INLINE double blend(bool on, double a, double b) {
  const uint64_t mask = uint64_t{0} - static_cast<uint64_t>(on);
  uint64_t x, y;
  std::memcpy(&x, &a, 8);
  std::memcpy(&y, &b, 8);
  x = (x & mask) | (y & ~mask);
  std::memcpy(&a, &x, 8);
  return a;
}

INLINE double widen(double x) { return x; }
INLINE float widen(float x) { return x; }
INLINE float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

// By integers, because gcc 12 converts _Float16 one element at a time. Moved into the exponent field of a float,
// a float16 is 2^-112 of its value, subnormal or not; infinity and NaN have all exponent bits set in both.
INLINE float widen(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  return float_of((magnitude >= 0x0f800000u ? special : finite) | sign);
}

INLINE void narrow(double x, double& out) { out = x; }
INLINE void narrow(float x, float& out) { out = x; }

// Rounding is to nearest, ties to even.
INLINE void narrow(float x, BFloat16& out) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? ((u >> 16) | 0x40u) : rounded);
}

INLINE void narrow(float x, Float16& out) {
  const uint32_t u = bits_of(x);
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 puts the float16 subnormal into the last bits of the sum, rounded.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;  // 65520 and above rounds to infinity
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  out.bits = static_cast<uint16_t>(h | ((u >> 16) & 0x8000u));
}

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
