// The walk of the reductions: rows × lanes of a tensor, added up for each lane.

#pragma once

#include "view.h"

// Rows that are added up in registers, for two packs of lanes, before they reach the sums in memory. With more of them the
// rows, often a power of two apart, drive each other out of the first-level cache.
template <class T>
constexpr int64_t rows_together = std::is_same_v<T, double> ? 8 : 16;

// Lanes of a pack that is added up in P: a vector of them, for double as of float.
template <class L, class P>
constexpr int64_t pack_lanes = std::is_same_v<P, float> ? L::template wide<float> : L::narrow;

// Where the loads of rows to come are asked for: in the order in which they lie in memory, one step for what is read at a
// time, and into the second-level cache, where a stride of a power of two does no harm. (25 MB channels-last, one
// thread: backward's sums read 8 GB/s with whole rows asked for at once into the first-level cache, 23 with this.)
template <class T>
class Ahead {
  static constexpr int64_t line = 64 / sizeof(T), least = 16384 / sizeof(T);

 public:
  Ahead(int64_t stride, int64_t lanes, bool far) : stride_(stride), lanes_(lanes), far_(far) {
    rows_ = std::max(rows_together<T>, least / std::max<int64_t>(1, stride));
  }

  // Row r is next.
  INLINE void start(int64_t r) {
    at_ = (r + rows_) * stride_;
    lane_ = 0;
  }

  template <int64_t Count, class... X>
  INLINE void step(const X*... x) {
    if (!far_) return;
    if (Count >= line || lane_ % line == 0)
      for (int64_t i = 0; i < Count; i += line) (prefetch(x + at_ + i), ...);
    at_ += Count;
    lane_ += Count;
    if (lane_ < lanes_) return;
    at_ += stride_ - lane_;
    lane_ = 0;
  }

 private:
  int64_t stride_, lanes_, rows_, at_ = 0, lane_ = 0;
  bool far_;
};

// Some packs of some lanes each.
template <int Packs, int64_t Lanes>
struct Packed {
  static constexpr int packs = Packs;
  static constexpr int64_t lanes = Lanes;
};

// Fewer lanes than this are added up one after another, and that at every level: in packs they would give other bits,
// because rows are then added to one another before they are added to the sums.
constexpr int64_t few_lanes = 8;

// Calls add(Packed, first row, rows, lane, skip) until every row of every lane was in a call: some packs of lanes from
// `lane` on, of which the first `skip` were in another one. Where there are few lanes, calls one(lane) for all rows.
template <int64_t Lanes, class T, class Add, class One>
INLINE void for_columns(int64_t rows, int64_t lanes, const Add& add, const One& one) {
  constexpr int64_t last = std::min(Lanes, few_lanes);
  if (lanes < few_lanes) {
    for (int64_t l = 0; l < lanes; ++l) one(l);
    return;
  }
  for (int64_t r = 0; r < rows; r += rows_together<T>) {
    const int64_t n = std::min(rows_together<T>, rows - r);
    int64_t l = 0;
    for (; l + 2 * Lanes <= lanes; l += 2 * Lanes) add(Packed<2, Lanes>{}, r, n, l, int64_t{0});
    if constexpr (Lanes > last)
      for (; l + Lanes <= lanes; l += Lanes) add(Packed<1, Lanes>{}, r, n, l, int64_t{0});
    for (; l < lanes; l += last) {
      const int64_t start = std::min(l, lanes - last);
      add(Packed<1, last>{}, r, n, start, l - start);
    }
  }
}

// Rows of values that are added up as they are before others follow: a sum of millions loses more digits.
constexpr int64_t plain_rows = 4096;

// sum[i] += part for the lanes of V from `skip` on.
template <class V>
INLINE void add_to(double* sum, V part, int64_t skip) {
  using D = Like<V, double>;
  const D all = load<D>(sum) + converted<V, double>(part);
  if (skip == 0) return store(all, sum);
  double each[lanes_in<V>];
  store(all, each);
  for (int64_t i = skip; i < lanes_in<V>; ++i) sum[i] = each[i];
}

// A coefficient of the lanes from k on, or of that lane for all.
template <class V, bool Same>
INLINE V coefficient(const Item<V>* k) {
  if constexpr (Same) return filled<V>(*k);
  else return load<V>(k);
}
