#include "parallel.h"

#include "levels.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

// GNU's OpenMP hangs in the child of a process that has used threads: there everything runs on one.
std::atomic<bool> forked{false};

#ifdef __linux__
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

int threads_for(int64_t blocks, int64_t elements) {
#ifdef _OPENMP
  if (elements < 2 * grain || forked || omp_in_parallel()) return 1;
  return static_cast<int>(std::min({int64_t{omp_get_max_threads()}, blocks, elements / grain}));
#else
  (void)blocks, (void)elements;
  return 1;
#endif
}

namespace {

// Asks for huge pages for a large output whose memory is not there yet: the faults of 4 KB pages cost more than the
// writing. False: it will come as 4 KB pages. They are worth asking for where they come quickly. In a virtual machine
// that hands its free memory back to the host one may take milliseconds (measured: 51 MB in 60 ms, and in 17 by pages of
// 4 KB): where some of them are slow, the rest, and the next calls, do without.
bool advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  constexpr std::chrono::microseconds slow{500};
  constexpr int probes = 4, pause = 100;
  static std::atomic<int> without{0};
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(page - 1);
  if (bytes < static_cast<int64_t>(2 * page) || last <= first) return true;
  char* const start = reinterpret_cast<char*>(first);
  unsigned char present = 0;
  if (mincore(start + (last - first) / page / 2 * page, 1, &present) != 0 || (present & 1)) return true;
  if (without > 0) {
    --without;
    return false;
  }
  if (madvise(start, last - first, MADV_HUGEPAGE) != 0) return false;
  for (int i = 0; i < probes; ++i) {
    char* const probe = start + (last - first) / page * i / probes * page;
    const auto before = std::chrono::steady_clock::now();
    __atomic_fetch_or(probe, 0, __ATOMIC_RELAXED);  // changes nothing: the result may lie in the input
    if (std::chrono::steady_clock::now() - before <= slow) continue;
    without = pause;
    (void)madvise(start, last - first, MADV_NOHUGEPAGE);
    return false;
  }
#else
  (void)data, (void)bytes;
#endif
  return true;
}

}  // namespace

namespace {

// The size of the last-level cache. sysconf adds up all caches of a socket on some machines (402 MB where a core has
// 32), so the kernel's own description comes first.
int64_t cache_size() {
  int64_t bytes = 0;
#ifdef __linux__
  if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    long long size = 0;
    char unit = 'K';
    if (std::fscanf(file, "%lld%c", &size, &unit) >= 1) bytes = size << (unit == 'M' ? 20 : unit == 'K' ? 10 : 0);
    std::fclose(file);
  }
#ifdef _SC_LEVEL3_CACHE_SIZE
  if (bytes <= 0) bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
#endif
  return std::max<int64_t>(bytes, int64_t{8} << 20);
}

bool is_beyond_half(int64_t bytes) {
  static const int64_t cache = cache_size();
  return bytes > cache / 2;
}

}  // namespace

bool is_far(int64_t bytes) { return is_beyond_half(bytes); }

bool prepare(int64_t bytes, void* output, void* second) {
  // A fresh page of 4 KB is in a cache when it is written, because it was just cleared: nothing should go past it.
  bool lasting = advise_huge_pages(output, bytes);
  if (second && !advise_huge_pages(second, bytes)) lasting = false;
#if defined(__SSE2__)
  return lasting && is_beyond_half(bytes);
#else
  (void)lasting;
  return false;
#endif
}

namespace {

int64_t vectors_here() {
#if LEVELS
  return __builtin_cpu_supports("x86-64-v4") ? 64 : __builtin_cpu_supports("x86-64-v3") ? 32 : 16;
#else
  return 16;
#endif
}

std::atomic<int64_t> vectors{vectors_here()};

}  // namespace

int64_t vector_bytes() { return vectors.load(std::memory_order_relaxed); }

int64_t use_vectors(int64_t most) {
  int64_t bytes = vectors_here();
  while (bytes > 16 && bytes > most) bytes /= 2;
  return vectors = bytes;
}
