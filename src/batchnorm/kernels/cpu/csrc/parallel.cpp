#include "parallel.h"

#include <algorithm>
#include <atomic>

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

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  if (bytes < static_cast<int64_t>(2 * page)) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(page - 1);
  if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

bool wants_streaming(int64_t bytes) {
#if defined(__x86_64__) && defined(__linux__)
  static const int64_t cache = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), int64_t{8} << 20);
  return bytes > cache / 2;
#else
  (void)bytes;
  return false;
#endif
}
