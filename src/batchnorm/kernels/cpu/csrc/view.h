// How the kernels see a tensor.
//
// Lanes: rows of `width` elements, each lane of a row belonging to one channel. This serves channels-last and 2-D
// input, several rows side by side where there are few channels (a loop of 3 elements does not vectorise), and
// contiguous input with few positions, whose rows are samples.
// Planes: contiguous input with many positions, in runs of S elements of one channel.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "parallel.h"
#include "types.h"

constexpr int64_t tile = 512;        // lanes whose sums stay in the first-level cache
constexpr int64_t block = 16384;     // elements of a block of the elementwise passes
constexpr int64_t mini_block = 1024; // elements whose bits are buffered
constexpr int64_t streamed = 512;    // elements whose results are, where they go past the caches
constexpr int64_t run_lanes = 64;    // independent sums along a run
constexpr int64_t short_run = tile;  // up to here the runs of a channel are summed side by side

struct View {
  int64_t channels, elements;
  bool planes;
  // Lanes: lane j belongs to channel (j / inner) % channels. `rows` full rows, then one of `tail` lanes.
  int64_t inner, width, rows, tail;
  // Planes: `samples` of `channels` runs of `inner` elements, a sample beginning `step` elements after the one before
  // it. The first is element `offset`: where these are some channels of a tensor only, not 0.
  int64_t samples, step, offset;

  // Input (n, c, s) in memory order, or (n, s, c) where `last` says that the channel is the fastest axis.
  View(int64_t n, int64_t c, int64_t s, bool last) : channels(c), elements(n * c * s), samples(n), step(c * s), offset(0) {
    // Below 32 positions a run is too short to vectorise.
    planes = !last && s >= 32;
    inner = last ? 1 : s;
    const int64_t period = std::max<int64_t>(1, c * inner);
    // A multiple of 16 where rows are put side by side, so that they begin where vectors do.
    const int64_t even = 16 / std::gcd<int64_t>(16, period);
    const int64_t least = elements < 2 * grain ? 32 : 256;  // few elements: as few coefficients to prepare
    const int64_t together = std::min(((least - 1) / period / even + 1) * even, elements / period);
    width = period >= least ? period : period * std::max<int64_t>(1, together);
    rows = elements / width;
    tail = elements % width;
  }

  // Per-channel values for every lane, without a division for each.
  template <class W>
  void spread(const double* values, W* lanes) const {
    const int64_t distinct = std::min(width, channels * inner);
    for (int64_t c = 0, lane = 0; lane < distinct; ++c)
      for (int64_t i = 0; i < inner; ++i) lanes[lane++] = static_cast<W>(values[c]);
    for (int64_t lane = distinct; lane < width; ++lane) lanes[lane] = lanes[lane - distinct];
  }

  int64_t count() const { return channels ? elements / channels : 0; }  // a channel's elements
  int64_t coefficients() const { return planes ? channels : width; }
  // The first element of a channel.
  int64_t first(int64_t c) const { return offset + c * inner; }

  // The channels [first, last) of planes.
  View panel(int64_t first, int64_t last) const {
    View part = *this;
    part.channels = last - first;
    part.elements = samples * part.channels * inner;
    part.offset += first * inner;
    return part;
  }

  // The reductions' blocks. Lanes: `block_rows` rows of `tile` lanes. Planes: one channel of some samples, or of
  // a part of one sample.
  static constexpr int64_t piece = 16384;
  int64_t block_rows() const { return std::max<int64_t>(128, (rows + 63) / 64); }
  int64_t parts() const { return (inner + piece - 1) / piece; }
  int64_t samples_per_piece() const { return parts() > 1 ? 1 : std::max<int64_t>(1, piece / std::max<int64_t>(1, inner)); }
  // Whether a strip's runs are summed side by side, position by position, and not one after another.
  bool side_by_side() const { return parts() == 1 && inner <= short_run && samples >= 4; }
  int64_t strips() const {
    if (!planes) return (rows + block_rows() - 1) / block_rows();
    return parts() > 1 ? samples * parts() : (samples + samples_per_piece() - 1) / samples_per_piece();
  }
  int64_t tiles() const { return planes ? channels : (width + tile - 1) / tile; }
  int64_t blocks() const { return strips() * tiles(); }
  // Elements a channel (planes) or a lane (lanes) has in a strip.
  int64_t strip_count(int64_t strip) const {
    if (!planes) return std::min(block_rows(), rows - strip * block_rows());
    if (parts() > 1) return std::min(piece, inner - strip % parts() * piece);
    return inner * std::min(samples_per_piece(), samples - strip * samples_per_piece());
  }
};

// Calls rows(element, stride, count, lanes) until every element of channel c in a strip of planes was in a row.
template <class Rows>
INLINE void for_runs(const View& v, int64_t strip, int64_t c, const Rows& rows) {
  const auto run = [&](int64_t e, int64_t length) INLINE_LAMBDA {
    if (length >= run_lanes) rows(e, run_lanes, length / run_lanes, run_lanes);
    if (length % run_lanes) rows(e + length / run_lanes * run_lanes, run_lanes, 1, length % run_lanes);
  };
  if (v.parts() > 1) {
    const int64_t sample = strip / v.parts(), start = strip % v.parts() * View::piece;
    run(v.first(c) + sample * v.step + start, std::min(View::piece, v.inner - start));
    return;
  }
  const int64_t first = strip * v.samples_per_piece();
  const int64_t last = std::min(v.samples, first + v.samples_per_piece());
  if (v.side_by_side()) return rows(v.first(c) + first * v.step, v.step, last - first, v.inner);
  for (int64_t sample = first; sample < last; ++sample) run(v.first(c) + sample * v.step, v.inner);
}

// How many sums for_runs needs.
INLINE int64_t sums_along(const View& v) { return v.side_by_side() ? v.inner : run_lanes; }

// The sum of x, by adding the halves; x is spent.
INLINE double fold(double* x, int64_t count) {
  while (count > 1) {
    const int64_t half = count / 2, rest = count - half;
    double* RESTRICT low = x;
    const double* RESTRICT high = x + rest;
    for (int64_t i = 0; i < half; ++i) low[i] += high[i];
    count = rest;
  }
  return x[0];
}

// Calls step(count, at, stride) in fixed order for everything that was found about the channels [first, last): the
// partial result of channel c lies at `at` + (c − first)·stride among the partials of `v.strips()` strips of
// `v.coefficients()` each (and one strip more for the tail), and stands for `count` elements.
template <class Step>
INLINE void for_partials(const View& v, int64_t first, const Step& step) {
  const int64_t lanes = v.coefficients();
  if (v.planes) {
    for (int64_t strip = 0; strip < v.strips(); ++strip) step(v.strip_count(strip), strip * lanes + first, int64_t{1});
    return;
  }
  const int64_t period = std::max<int64_t>(1, v.channels * v.inner);
  const auto row = [&](int64_t at, int64_t length, int64_t count) INLINE_LAMBDA {
    for (int64_t repeat = 0; repeat < length / period; ++repeat)
      for (int64_t i = 0; i < v.inner; ++i) step(count, at + repeat * period + first * v.inner + i, v.inner);
  };
  for (int64_t strip = 0; strip < v.strips(); ++strip) row(strip * lanes, v.width, v.strip_count(strip));
  row(v.strips() * lanes, v.tail, 1);
}

// Cuts the channels into panels whose part of the `tensors` tensors that a reduction reads is still in the
// second-level cache when the next pass reads it again, and calls body(view, first channel) for each, on all threads.
// Where there are no planes, or too few channels, all channels are one panel, and body itself finds work for the
// threads. The numbers are the same.
template <class Body>
void for_panels(const View& v, int64_t tensors, int64_t element_size, const Body& body) {
  constexpr int64_t wanted = int64_t{384} << 10, most = int64_t{4} << 20;
  const int64_t bytes = v.samples * v.inner * tensors * element_size;
  // Every panel's part of a sample must begin where a vector does.
  const int64_t even = 16 / std::gcd<int64_t>(16, v.inner);
  const int64_t threads = threads_for(v.channels, v.elements);
  const int64_t units = v.channels / even;  // that a panel may have
  const int64_t fitting = std::max<int64_t>(1, wanted / std::max<int64_t>(1, bytes * even));
  const int64_t rounds = (units + fitting * threads - 1) / (fitting * threads);
  if (!v.planes || v.channels % even || bytes * v.channels < 4 * threads * wanted || bytes * even > most ||
      units < 2 * threads)
    return body(v, int64_t{0});
  const int64_t panels = std::min(units, rounds * threads);
  for_blocks(panels, v.elements, false, [&](int64_t b) {
    const int64_t first = units * b / panels * even, last = units * (b + 1) / panels * even;
    body(v.panel(first, last), first);
  });
}
