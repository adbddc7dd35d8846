// The walk of the elementwise passes, and the per-channel coefficients they read.

#pragma once

#include "kernels.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// Writes past the caches; `out` and `count` are multiples of 16 bytes, the last piece of a tensor excepted.
INLINE void stream(const void* from, void* out, int64_t bytes) {
#if defined(__SSE2__)
  const auto* source = static_cast<const __m128i*>(from);
  auto* target = static_cast<__m128i*>(out);
  if (reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    const int64_t whole = bytes / 16;
    for (int64_t i = 0; i < whole; ++i) _mm_stream_si128(target + i, _mm_load_si128(source + i));
    std::memcpy(target + whole, source + whole, bytes % 16);
    return;
  }
#endif
  std::memcpy(out, from, bytes);
}

INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Coefficients of type W for every lane, or for every channel of planes. What is absent is 0, or 1 for a factor.
template <class W>
struct Coefficients {
  Scratch<W> memory;
  W *high, *low, *scale, *bias;
  Vector weight, shift;

  // (x − mean)·rstd·weight + bias as ((x − high) − low)·scale + bias
  Coefficients(const View& v, const Affine& a, int64_t more)
      : memory((4 + more) * v.coefficients()), weight(a.weight), shift(a.bias) {
    const int64_t lanes = v.coefficients();
    high = memory.get();
    low = high + lanes;
    scale = low + lanes;
    bias = scale + lanes;
    const int64_t distinct = v.planes ? lanes : std::min(lanes, v.channels * v.inner);
    int64_t lane = 0;
    const int64_t repeat = v.planes ? 1 : v.inner;
    for (int64_t c = 0; lane < distinct; ++c) {
      const double mean = a.mean[c];
      const W h = static_cast<W>(mean);
      // Infinite means have no rest: infinity − infinity would be NaN, and the channel is lost anyway.
      const W l = static_cast<W>((mean - static_cast<double>(h)) + (a.low ? a.low[c] : 0.0));
      const W s = static_cast<W>(weight ? weight.get(c) * a.rstd[c] : a.rstd[c]);
      const W b = static_cast<W>(shift ? shift.get(c) : 0.0);
      for (int64_t i = 0; i < repeat; ++i, ++lane) {
        high[lane] = h;
        low[lane] = l;
        scale[lane] = s;
        bias[lane] = b;
      }
    }
    for (W* part = high; part < high + 4 * lanes; part += lanes) this->repeat(part, distinct, lanes);
  }

  // A further array from per-channel numbers.
  W* add(int64_t index, const View& v, const double* values, const double* less = nullptr) {
    const int64_t lanes = v.coefficients();
    W* part = high + (4 + index) * lanes;
    const int64_t distinct = v.planes ? lanes : std::min(lanes, v.channels * v.inner);
    int64_t lane = 0;
    const int64_t repeat = v.planes ? 1 : v.inner;
    for (int64_t c = 0; lane < distinct; ++c) {
      const double value = values[c];
      // The rest of the number that the narrower array before this one left, and what comes on top of it.
      const W w = static_cast<W>(less ? (less[c] - static_cast<double>(static_cast<W>(less[c]))) + value : value);
      for (int64_t i = 0; i < repeat; ++i, ++lane) part[lane] = w;
    }
    this->repeat(part, distinct, lanes);
    return part;
  }

  static void repeat(W* part, int64_t distinct, int64_t lanes) {
    for (int64_t l = distinct; l < lanes; ++l) part[l] = part[l - distinct];
  }
};

// Calls op.run(element, length, coefficient index, offset) over the elements [first, last) in mini-blocks, with
// op.begin and op.end around each. `Planes`: all elements of a run have one coefficient; else one each.
template <bool Planes, class Op>
INLINE void walk(Op& op, const View& v, int64_t first, int64_t last) {
  for (int64_t e = first; e < last; e += mini_block) {
    const int64_t n = std::min(mini_block, last - e);
    op.begin(e, n);
    const int64_t size = Planes ? v.inner : v.width;
    int64_t run = e / size, start = e % size;
    int64_t c = Planes ? run % v.channels : 0;
    for (int64_t at = 0; at < n;) {
      const int64_t length = std::min(size - start, n - at);
      op.run(e + at, length, Planes ? c : start, at);
      at += length;
      start = 0;
      if (Planes && ++c == v.channels) c = 0;
    }
    op.end(e, n);
  }
}

// Runs op on every block, from the last to the first: what the reduction read last is still in the cache.
template <class RunBlock>
void for_elements(const View& v, const RunBlock& run) {
  for_blocks((v.elements + block - 1) / block, v.elements, true, [&](int64_t b) {
    run(b * block, std::min(v.elements, (b + 1) * block));
  });
}
