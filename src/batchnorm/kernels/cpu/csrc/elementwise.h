// The walk of the elementwise passes, and the per-channel coefficients they read.

#pragma once

#include <cmath>

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

// `Count` coefficients of type W for every lane, or for every channel of planes, `tile` of one after `tile` of the other:
// so they lie at constant distances, and a loop needs one register for all. What is absent is 0, or 1 for a factor.
template <class W, int Count>
class Coefficients {
 public:
  // (x − mean)·rstd·weight + bias as (x − center)·scale + bias, in the first three. The center is what W holds of the mean;
  // what it leaves, half a last digit at most, is taken off the bias: no digit of x is lost to it.
  Coefficients(const View& v, const Affine& a)
      : lanes_(v.coefficients()),
        distinct_(v.planes ? lanes_ : std::min(lanes_, v.channels * v.inner)),
        repeat_(v.planes ? 1 : v.inner),
        memory_((lanes_ + tile - 1) / tile * tile * Count) {
    set(0, [&](int64_t c) { return static_cast<W>(a.mean[c]); });
    set(1, a.weight, [&](double weight, int64_t c) { return weight * a.rstd[c]; }, 1);
    set(2, a.bias, [&](double bias, int64_t c) {
      const double left = low(a, c) * static_cast<double>(at(c * repeat_)[tile]);
      return std::isfinite(left) ? bias - left : bias;
    }, 0);
  }

  // What the center leaves of the mean.
  static double low(const Affine& a, int64_t c) { return rest(a.mean[c]) + (a.low ? a.low[c] : 0.0); }

  // What W leaves of a double; nothing of what W holds as infinite, where it would be NaN or infinite, too.
  static double rest(double value) {
    const double left = value - static_cast<double>(static_cast<W>(value));
    return std::isfinite(left) ? left : 0;
  }

  template <class Value>
  void set(int64_t number, const Value& value) {
    if (repeat_ == 1) {
      for (int64_t start = 0; start < distinct_; start += tile) {
        W* RESTRICT to = at(start) + number * tile;
        const int64_t n = std::min(tile, distinct_ - start);
        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<W>(value(start + i));
      }
    } else {
      for (int64_t c = 0, lane = 0; lane < distinct_; ++c) {
        const W w = static_cast<W>(value(c));
        for (int64_t i = 0; i < repeat_; ++i, ++lane) at(lane)[number * tile] = w;
      }
    }
    for (int64_t lane = distinct_; lane < lanes_; ++lane) at(lane)[number * tile] = at(lane - distinct_)[number * tile];
  }

  // Those of lane j and of the rest of its tile: number k of lane j + i at [k·tile + i].
  INLINE W* at(int64_t j) const { return memory_.get() + j / tile * tile * Count + j % tile; }

 private:
  // From a parameter of the layer, or what stands for it where there is none.
  template <class Value>
  void set(int64_t number, const Vector& parameter, const Value& value, double otherwise) {
    if (!parameter) return set(number, [&](int64_t c) { return value(otherwise, c); });
    by_dtype(parameter.dtype, [&](auto* type) {
      const auto* values = static_cast<decltype(type)>(parameter.data);
      set(number, [&](int64_t c) { return value(static_cast<double>(widen(values[c])), c); });
    });
  }

  int64_t lanes_, distinct_, repeat_;
  Scratch<W> memory_;
};

// Coefficients of a run, from those of its first lane: each lane its own, or the first lane's for all (`Same`).
template <class L, class W, int Count, bool Same>
class Coefficient {
  using V = Pack<W, L::template wide<W>>;

 public:
  INLINE explicit Coefficient(const W* k) : k_(k) {
    if constexpr (Same)
      for (int number = 0; number < Count; ++number) all_[number] = filled<V>(k[number * tile]);
  }

  // Number `number` of the lanes from i on.
  template <class X>
  INLINE X at(int number, int64_t i) const {
    if constexpr (!Same) return load<X>(k_ + number * tile + i);
    else if constexpr (single<X>) return k_[number * tile];
    else return all_[number];
  }

 private:
  const W* k_;
  V all_[Same ? Count : 1];
};

// How far ahead the elementwise passes ask for what they read, where that is in no cache: stores past the caches fill the
// queues, and the loads behind them would wait. (Backward's second pass over 25 MB, one thread: 15 GB/s without, 18 with
// mini-blocks asked for as a whole, 33 with this.)
template <class T>
constexpr int64_t ahead = 4096 / sizeof(T);

// Rows of lanes that share the loading of their coefficients, of which there are more than elements. (Backward's second pass
// over 1.6 MB with ReLU, one thread: 58 GB/s one row at a time, 67 with two.)
constexpr int rows_at_once = 2;

// Hands `op` the contiguous elements [first, last) in mini-blocks, with op.begin and op.end around each, and each in runs
// that have the coefficients from number j on, or number j for all (`Planes`): op.run<Planes, 1>(element, length, j, offset).
// `origin` is where a run of coefficient 0 begins.
template <bool Planes, class Op>
INLINE void walk(Op& op, const View& v, int64_t origin, int64_t first, int64_t last) {
  const int64_t size = Planes ? v.inner : v.width;
  const int64_t most = op.streaming() ? streamed : mini_block;
  for (int64_t e = first; e < last; e += most) {
    const int64_t n = std::min(most, last - e);
    op.begin(e, n);
    int64_t run = (e - origin) / size, start = (e - origin) % size;
    int64_t c = Planes ? run % v.channels : 0;
    for (int64_t at = 0; at < n;) {
      int64_t length = std::min(size - start, n - at);
      if (!Planes) length = std::min(length, tile - start % tile);
      op.template run<Planes, 1>(e + at, length, Planes ? c : start, at);
      at += length;
      start = Planes || start + length == size ? 0 : start + length;
      if (Planes && ++c == v.channels) c = 0;
    }
    op.end(e, n);
  }
}

// The same for lanes, with no mini-blocks, where `op` writes to its place at once: rows_at_once rows at a time, and one where
// there are fewer.
template <class Op>
INLINE void walk_rows(Op& op, const View& v, int64_t origin, int64_t first, int64_t last) {
  const int64_t together = rows_at_once * v.width;
  op.begin(0, 0);
  for (int64_t e = first; e < last;) {
    const int64_t start = (e - origin) % v.width;
    if (start == 0 && last - e >= together) {
      for (int64_t lane = 0; lane < v.width; lane += tile)
        op.template run<false, rows_at_once>(e + lane, std::min(tile, v.width - lane), lane, e + lane);
      e += together;
    } else {
      const int64_t length = std::min({v.width - start, tile - start % tile, last - e});
      op.template run<false, 1>(e, length, start, e);
      e += length;
    }
  }
}

// Calls run(origin, first, last) for every block. Backwards behind a reduction, because what that read last is still in
// the cache; otherwise forwards, which memory does 10 to 20 % faster.
template <class RunBlock>
void for_elements(const View& v, bool backwards, const RunBlock& run) {
  // Of some channels of planes, every sample's part is contiguous.
  const bool whole = !v.planes || v.step == v.channels * v.inner;
  const int64_t size = whole ? v.elements : v.channels * v.inner, chunks = (size + block - 1) / block;
  for_blocks(whole ? chunks : v.samples * chunks, v.elements, backwards, [&](int64_t b) {
    const int64_t origin = v.offset + b / chunks * v.step, first = b % chunks * block;
    run(origin, origin + first, origin + std::min(size, first + block));
  });
}
