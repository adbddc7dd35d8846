// The activations, their gradients, and one bit an element where the gradient takes two values.
//
// At the kinks and for NaN they do as PyTorch does.

#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "types.h"

// silu and gelu have no kernel: gcc has no vector form of exp and erf, and the Python side puts PyTorch's operator behind
// the kernel instead.
enum class Act : int { none = 0, relu = 1, relu6 = 2, leaky_relu = 3, hardswish = 4, silu = 5, gelu = 6 };

constexpr bool has_bits(Act act) { return act == Act::relu || act == Act::relu6 || act == Act::leaky_relu; }

template <Act A, class V>
INLINE V activate(V z, Item<V> slope) {
  const V zero = filled<V>(0), three = filled<V>(3), six = filled<V>(6);
  if constexpr (A == Act::relu) return blend<V>(z <= zero, zero, z);
  if constexpr (A == Act::relu6) return blend<V>(z <= zero, zero, blend<V>(z >= six, six, z));
  if constexpr (A == Act::leaky_relu) return blend<V>(z > zero, z, z * slope);
  if constexpr (A == Act::hardswish) {
    const V up = z + three;
    return z * blend<V>(up <= zero, zero, blend<V>(up >= six, six, up)) / six;
  }
  return z;
}

// Whether act'(z) is 1 and not the slope.
template <Act A, class V>
INLINE Mask<V> is_on(V z) {
  const V zero = filled<V>(0), six = filled<V>(6);
  if constexpr (A == Act::relu) return is_not<V>(z <= zero);
  if constexpr (A == Act::relu6) return is_not<V>((z <= zero) | (z >= six));
  return z > zero;
}

// g = dy·act'(z)
template <Act A, class V>
INLINE V gate(V dy, V z, Item<V> slope) {
  const V zero = filled<V>(0), three = filled<V>(3);
  if constexpr (A == Act::relu || A == Act::relu6) return blend<V>(is_on<A>(z), dy, zero);
  if constexpr (A == Act::leaky_relu) return blend<V>(is_on<A>(z), dy, dy * slope);
  if constexpr (A == Act::hardswish) {
    const V inner = dy * (z / three + filled<V>(0.5));
    return blend<V>(z <= -three, zero, blend<V>(z < three, inner, dy));
  }
  return dy;
}

// Bytes of 0 or 1 to bits, the first to the lowest bit of its byte. Memory order is little-endian on every machine
// that PyTorch runs on but one, where the bits of a byte are in the opposite order, in both directions.
INLINE void pack_bits(const uint8_t* RESTRICT on, int64_t count, uint8_t* RESTRICT bits) {
  int64_t i = 0;
#if defined(__SSE2__)
  for (; i + 16 <= count; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(on + i));
    const auto sixteen = static_cast<uint16_t>(_mm_movemask_epi8(_mm_slli_epi16(bytes, 7)));
    std::memcpy(bits + i / 8, &sixteen, 2);
  }
#endif
  for (; i + 8 <= count; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, on + i, 8);
    bits[i / 8] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
  }
  if (i < count) {
    uint8_t last = 0;
    for (int64_t k = i; k < count; ++k) last |= static_cast<uint8_t>(on[k] << (k % 8));
    bits[i / 8] = last;
  }
}

// The bits of `count` elements from element `first` on, as bytes of 0 or 1 to be read at the returned address.
// `on` needs room for count + 14.
INLINE const uint8_t* unpack_bits(const uint8_t* RESTRICT bits, int64_t first, int64_t count, uint8_t* RESTRICT on) {
  const int64_t begin = first / 8, end = (first + count + 7) / 8;
  int64_t i = begin;
#if defined(__SSE2__)
  const __m128i own = _mm_set1_epi64x(static_cast<long long>(0x8040201008040201u));
  for (; i + 2 <= end; i += 2) {
    // Two bytes, each eight times.
    const __m128i two = _mm_cvtsi32_si128(bits[i] | bits[i + 1] << 8);
    const __m128i twice = _mm_unpacklo_epi8(two, two);
    const __m128i each = _mm_shuffle_epi32(_mm_unpacklo_epi16(twice, twice), 0x50);
    const __m128i set = _mm_cmpeq_epi8(_mm_and_si128(each, own), own);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(on + 8 * (i - begin)), _mm_and_si128(set, _mm_set1_epi8(1)));
  }
#endif
  for (; i < end; ++i) {
    const uint64_t spread = (bits[i] * 0x0101010101010101u) & 0x8040201008040201u;
    const uint64_t eight = ((spread + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
    std::memcpy(on + 8 * (i - begin), &eight, 8);
  }
  return on + first % 8;
}
