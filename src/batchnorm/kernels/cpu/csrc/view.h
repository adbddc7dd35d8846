// How the kernels see a tensor.
//
// Lanes: rows of `width` elements, each lane of a row belonging to one channel. This serves channels-last and 2-D
// input, several rows side by side where there are few channels (a loop of 3 elements does not vectorise), and
// contiguous input with few positions, whose rows are samples.
// Planes: contiguous input with many positions, in runs of S elements of one channel.

#pragma once

#include <algorithm>
#include <cstdint>

#include "parallel.h"
#include "types.h"

constexpr int64_t tile = 512;        // lanes whose sums stay in the first-level cache
constexpr int64_t unrolled = 8;      // rows added to the sums at a time: one load and store of a sum for 8 elements
constexpr int64_t block = 16384;     // elements of a block of the elementwise passes
constexpr int64_t mini_block = 1024; // elements whose results and bits are buffered

struct View {
  int64_t channels, elements;
  bool planes;
  // Lanes: lane j belongs to channel (j / inner) % channels. `rows` full rows, then one of `tail` lanes.
  int64_t inner, width, rows, tail;
  // Planes: `samples` of `channels` runs of `inner` elements.
  int64_t samples;

  // Input (n, c, s) in memory order, or (n, s, c) where `last` says that the channel is the fastest axis.
  View(int64_t n, int64_t c, int64_t s, bool last) : channels(c), elements(n * c * s), samples(n) {
    // Below 32 positions a run is too short to vectorise.
    planes = !last && s >= 32;
    inner = last ? 1 : s;
    const int64_t period = std::max<int64_t>(1, c * inner);
    width = period >= 256 ? period : period * ((255 + period) / period);
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
  int64_t first(int64_t c) const { return c * inner; }

  // The reductions' blocks. Lanes: `block_rows` rows of `tile` lanes. Planes: one channel of some samples, or of
  // a part of one sample.
  static constexpr int64_t piece = 16384;
  int64_t block_rows() const { return std::max<int64_t>(128, (rows + 63) / 64); }
  int64_t parts() const { return (inner + piece - 1) / piece; }
  int64_t samples_per_piece() const { return parts() > 1 ? 1 : std::max<int64_t>(1, piece / std::max<int64_t>(1, inner)); }
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

// Calls run(element, length) for the runs of channel c in a strip of planes.
template <class Run>
INLINE void for_runs(const View& v, int64_t strip, int64_t c, const Run& run) {
  if (v.parts() > 1) {
    const int64_t sample = strip / v.parts(), start = strip % v.parts() * View::piece;
    run((sample * v.channels + c) * v.inner + start, std::min(View::piece, v.inner - start));
    return;
  }
  const int64_t first = strip * v.samples_per_piece();
  const int64_t last = std::min(v.samples, first + v.samples_per_piece());
  for (int64_t sample = first; sample < last; ++sample) run((sample * v.channels + c) * v.inner, v.inner);
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
