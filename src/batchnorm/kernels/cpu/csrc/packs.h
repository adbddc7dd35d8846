// Elements, and packs of them: vectors of the compiler's own, so that a loop is one whatever gcc makes of others.
//
// Kernels see a tensor as elements of type T in memory order. Arithmetic on elements is in Wide<T>: float for
// float, bfloat16 and float16, double for double. Sums are double for all of them.

#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "levels.h"

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

// N elements, in a vector of the compiler's own; one is no vector.
template <class E, int64_t N>
struct PackOf {
#if defined(__GNUC__)
  typedef E type __attribute__((vector_size(N * sizeof(E))));
#endif
};
template <class E>
struct PackOf<E, 1> {
  using type = E;
};
template <class E, int64_t N>
using Pack = typename PackOf<E, N>::type;

// Functions of elements are written once, for V an element or a pack of them.
template <class V>
constexpr bool single = std::is_arithmetic_v<V>;

template <class V, bool = single<V>>
struct ItemOf {
  using type = V;
};
template <class V>
struct ItemOf<V, false> {
  using type = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V>()[0])>>;
};
template <class V>
using Item = typename ItemOf<V>::type;

// As V, with elements of type E.
template <class V>
constexpr int64_t lanes_in = sizeof(V) / sizeof(Item<V>);
template <class V, class E>
using Like = std::conditional_t<single<V>, E, Pack<E, lanes_in<V>>>;
template <class V>
using Mask = decltype(std::declval<V>() < std::declval<V>());

template <class To, class From>
INLINE To as_bits(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof(To));
  return bits;
}

template <class V>
INLINE V filled(Item<V> value) {
  Item<V> each[lanes_in<V>];  // gcc 12 makes one broadcast of this, and of V{} + value one for each lane
  for (auto& item : each) item = value;
  return as_bits<V>(each);
}

template <class V, class E>
INLINE Like<V, E> converted(V x) {
  if constexpr (single<V>) {
    return static_cast<E>(x);
  } else if constexpr (std::is_same_v<Item<V>, E>) {
    return x;
  } else {
    Item<V> from[lanes_in<V>];  // gcc 12 makes one conversion of this, and several of __builtin_convertvector
    std::memcpy(from, &x, sizeof(x));
    E to[lanes_in<V>];
    for (int64_t i = 0; i < lanes_in<V>; ++i) to[i] = static_cast<E>(from[i]);
    return as_bits<Like<V, E>>(to);
  }
}

// sum + a·b, where the product of two doubles is exact, and so rounded once with and without a fused multiply-add: every
// level gives the same bits.
template <class V>
INLINE V add_exact(V sum, V a, V b) {
#if LEVELS
  if constexpr (std::is_same_v<Item<V>, double> && sizeof(V) >= 32) {
    asm("vfmadd231pd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
#endif
  return sum + a * b;
}

// on ? a : b by masks. Written as a choice of single elements, gcc turns it into a jump as soon as b makes what follows
// simpler, and a loop with a jump does not vectorise.
template <class V>
INLINE V blend(Mask<V> on, V a, V b) {
  if constexpr (single<V>) {
    using U = std::conditional_t<sizeof(V) == 8, uint64_t, uint32_t>;
    const U mask = U{0} - static_cast<U>(on);
    return as_bits<V>((as_bits<U>(a) & mask) | (as_bits<U>(b) & ~mask));
  } else {
    return as_bits<V>((as_bits<Mask<V>>(a) & on) | (as_bits<Mask<V>>(b) & ~on));
  }
}

template <class V>
INLINE Mask<V> is_not(Mask<V> mask) {
  if constexpr (single<V>) return !mask;
  else return ~mask;
}

template <class V>
INLINE Mask<V> everywhere(bool on) {
  if constexpr (single<V>) return on;
  else return filled<Mask<V>>(-static_cast<Item<Mask<V>>>(on));
}

// The bits of the elements from number e on, the first of a byte the lowest.
template <class V>
INLINE Mask<V> on_of(const uint8_t* bits, int64_t e) {
  const int64_t at = e / 8, shift = e % 8;
  if constexpr (single<V>) {
    return bits[at] >> shift & 1;
  } else {
    using I = Item<Mask<V>>;
    alignas(64) static constexpr I own[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    uint32_t window = bits[at];
    for (int64_t byte = 1; byte < (shift + lanes_in<V> + 7) / 8; ++byte)
      window |= static_cast<uint32_t>(bits[at + byte]) << 8 * byte;
    Mask<V> each;
    std::memcpy(&each, own, sizeof(each));
    return (each & filled<Mask<V>>(static_cast<I>(window >> shift))) != 0;
  }
}

// One byte a lane, 0 or 1.
template <class V>
INLINE void store_on(Mask<V> on, uint8_t* bytes) {
  if constexpr (single<V>) {
    *bytes = on;
  } else {
    const auto each = converted<Mask<V>, uint8_t>(on & 1);
    std::memcpy(bytes, &each, sizeof(each));
  }
}

// Half types as unsigned numbers of 32 bits, U one or a pack of them.
template <class U>
INLINE Like<U, float> widen_bfloat16(U bits) {
  return as_bits<Like<U, float>>(bits << 16);
}

// By integers, because gcc 12 converts _Float16 one element at a time. Moved into the exponent field of a float,
// a float16 is 2^-112 of its value, subnormal or not; infinity and NaN have all exponent bits set in both.
template <class U>
INLINE Like<U, float> widen_float16(U bits) {
  const U magnitude = (bits & 0x7fffu) << 13;
  const U finite = as_bits<U>(as_bits<Like<U, float>>(magnitude) * 0x1p112f);
  const U number = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
  return as_bits<Like<U, float>>(number | (bits & 0x8000u) << 16);
}

// Rounding is to nearest, ties to even.
template <class U>
INLINE U narrow_bfloat16(U u) {
  const U rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  return (u & 0x7fffffffu) > 0x7f800000u ? u >> 16 | 0x40u : rounded;
}

template <class U>
INLINE U narrow_float16(U u) {
  const U magnitude = u & 0x7fffffffu;
  const U normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Below 2^-14: adding 0.5 puts the float16 subnormal into the last bits of the sum, rounded.
  const U subnormal = as_bits<U>(as_bits<Like<U, float>>(magnitude) + 0.5f) - 0x3f000000u;
  U h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? filled<U>(0x7c00u) : h;  // 65520 and above rounds to infinity
  h = magnitude > 0x7f800000u ? filled<U>(0x7e00u) : h;
  return h | (u >> 16 & 0x8000u);
}

// The elements at x as V, and back.
template <class V, class T>
INLINE V load(const T* x) {
  if constexpr (sizeof(T) == 2) {
    Like<V, uint16_t> bits;
    std::memcpy(&bits, x, sizeof(bits));
    const auto wide = converted<Like<V, uint16_t>, uint32_t>(bits);
    if constexpr (std::is_same_v<T, BFloat16>) return widen_bfloat16(wide);
    else return widen_float16(wide);
  } else {
    V value;
    std::memcpy(&value, x, sizeof(V));
    return value;
  }
}

template <class V, class T>
INLINE void store(V value, T* out) {
  if constexpr (sizeof(T) == 2) {
    using U = Like<V, uint32_t>;
    U bits = as_bits<U>(value);
    if constexpr (std::is_same_v<T, BFloat16>) bits = narrow_bfloat16(bits);
    else bits = narrow_float16(bits);
    const auto half = converted<U, uint16_t>(bits);
    std::memcpy(out, &half, sizeof(half));
  } else {
    std::memcpy(out, &value, sizeof(V));
  }
}

template <class T>
INLINE Wide<T> widen(T x) {
  return load<Wide<T>>(&x);
}

template <class T>
INLINE void narrow(Wide<T> x, T& out) {
  store(x, &out);
}

// What for_packs hands on of several rows.
template <class V, int Rows>
struct Several {
  V of[Rows];
};

// Calls store(i, compute(i, V{})) for `length` elements, V a pack where there are as many. The last pack may overlap the
// one before it; it is computed first, because the output may lie in the input.
template <class L, class W, class Compute, class Store>
INLINE void for_packs(int64_t length, const Compute& compute, const Store& store) {
  constexpr int64_t step = L::template wide<W>;
  if (length < step) {
    for (int64_t i = 0; i < length; ++i) store(i, compute(i, W{}));
    return;
  }
  const auto last = compute(length - step, Pack<W, step>{});
  for (int64_t i = 0; i + step < length; i += step) store(i, compute(i, Pack<W, step>{}));
  store(length - step, last);
}
