// The walk of the reductions: rows × lanes of a tensor, added up for each lane.

#pragma once

#include "view.h"

// Rows that are added up in registers, for two packs of lanes, before they reach the sums in memory. With more of them the
// rows, often a power of two apart, drive each other out of the first-level cache.
template <class T>
constexpr int64_t rows_together = sizeof(T) == 2 ? 16 : 8;

constexpr int64_t lanes_together = 2 * narrow_pack;

// Where the loads of rows to come are asked for: in the order in which they lie in memory, one step for each two packs
// that are read, and into the second-level cache, where a stride of a power of two does no harm. (25 MB channels-last, one
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

  template <class... X>
  INLINE void step(const X*... x) {
    if (!far_) return;
    for (int64_t i = 0; i < lanes_together; i += line) (prefetch(x + at_ + i), ...);
    at_ += lanes_together;
    lane_ += lanes_together;
    if (lane_ < lanes_) return;
    at_ += stride_ - lane_;
    lane_ = 0;
  }

 private:
  int64_t stride_, lanes_, rows_, at_ = 0, lane_ = 0;
  bool far_;
};

// Calls add(first row, rows, lane, skip) until every row of every lane was in a call: two packs of lanes from `lane` on, of
// which the first `skip` were in another one. Where there are fewer lanes, calls one(lane) for each and all rows.
template <class T, class Add, class One>
INLINE void for_columns(int64_t rows, int64_t lanes, const Add& add, const One& one) {
  if (lanes < lanes_together) {
    for (int64_t l = 0; l < lanes; ++l) one(l);
    return;
  }
  for (int64_t r = 0; r < rows; r += rows_together<T>) {
    const int64_t n = std::min(rows_together<T>, rows - r);
    for (int64_t l = 0; l < lanes; l += lanes_together) {
      const int64_t start = std::min(l, lanes - lanes_together);
      add(r, n, start, l - start);
    }
  }
}

// sum[i] += what the two packs have in lane i, from lane `skip` on.
template <class V>
INLINE void add_to(double* sum, const V (&parts)[2], int64_t skip) {
  using D = Like<V, double>;
  D all[2];
  for (int g = 0; g < 2; ++g) all[g] = load<D>(sum + g * narrow_pack) + converted<V, double>(parts[g]);
  if (skip == 0) {
    for (int g = 0; g < 2; ++g) store(all[g], sum + g * narrow_pack);
    return;
  }
  double each[lanes_together];
  for (int g = 0; g < 2; ++g) store(all[g], each + g * narrow_pack);
  for (int64_t i = skip; i < lanes_together; ++i) sum[i] = each[i];
}

// A coefficient of the lanes from k on, or of that lane for all.
template <class V, bool Same>
INLINE V coefficient(const Item<V>* k) {
  if constexpr (Same) return filled<V>(*k);
  else return load<V>(k);
}
