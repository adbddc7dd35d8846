// Threads, memory, and the walk over fixed blocks.
//
// Work is cut into blocks by the shape alone, never by the number of threads, and what blocks find is merged in
// their order: the same bits for any number of threads.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

// Fewer elements than this a thread are not worth waking it (it costs some 5 µs; PyTorch uses the same number).
constexpr int64_t grain = 32768;

// How many threads a call with that many blocks and elements may use; 1 after a fork and inside another team.
int threads_for(int64_t blocks, int64_t elements);

// Asks for huge pages for a fresh output: the faults of 4 KB pages cost more than the writing.
void advise_huge_pages(void* data, int64_t bytes);

// Whether an output of that size should go past the caches.
bool wants_streaming(int64_t bytes);

// Runs body(block) for every block; each thread has one range of them, walked backwards on demand.
template <class Body>
void for_blocks(int64_t blocks, int64_t elements, bool backwards, const Body& body) {
  const int threads = threads_for(blocks, elements);
  const auto share = [&](int64_t thread, int64_t of) {
    const int64_t first = blocks * thread / of, last = blocks * (thread + 1) / of;
    for (int64_t i = first; i < last; ++i) body(backwards ? last - 1 - (i - first) : i);
  };
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    share(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  (void)threads;
  share(0, 1);
}

struct Free {
  void operator()(void* data) const { std::free(data); }
};

// Uninitialised numbers that live as long as a call.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(std::malloc(sizeof(T) * (count > 0 ? count : 1)))) {
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  std::unique_ptr<T, Free> data_;
};
