// Threads, memory, and the walk over fixed blocks.
//
// Work is cut into blocks by the shape alone, never by the number of threads, and what blocks find is merged in
// their order: the same bits for any number of threads.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

// Fewer elements than this a thread are not worth waking it (it costs some 5 µs; PyTorch uses the same number).
constexpr int64_t grain = 32768;

// How many threads a call with that many blocks and elements may use; 1 after a fork and inside another team.
int threads_for(int64_t blocks, int64_t elements);

// Whether tensors of that size together are beyond what a cache holds from one call to the next: then a pass asks for
// what it reads next. (Within a cache that costs a tenth.)
bool is_far(int64_t bytes);

// Before results of that size are written. Asks for huge pages for `output` and, where there is one, `second`; returns
// whether they should go past the caches.
bool prepare(int64_t bytes, void* output, void* second = nullptr);

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
    std::exception_ptr failure;  // must not leave its thread; body may run out of memory
#pragma omp parallel num_threads(threads)
    {
      try {
        share(omp_get_thread_num(), omp_get_num_threads());
      } catch (...) {
#pragma omp critical
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#endif
  (void)threads;
  share(0, 1);
}

// Uninitialised numbers that live as long as a call, on a cache line of their own: a vector that straddles two lines
// costs two reads.
template <class T>
class Scratch {
  static constexpr uintptr_t line = 64;
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };

 public:
  explicit Scratch(int64_t count) {
    if (count <= 0) return;
    memory_.reset(std::malloc(sizeof(T) * count + line));  // aligned_alloc takes several times as long
    if (!memory_) throw std::bad_alloc();
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + line - 1) & ~(line - 1));
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  std::unique_ptr<void, Free> memory_;
  T* data_ = nullptr;
};
