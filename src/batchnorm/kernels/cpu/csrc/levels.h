// The levels of a processor: the words that make a function INLINE, and what compiles it once for each level.

#pragma once

#include <cstdint>

#if defined(_MSC_VER) && !defined(__clang__)
#define INLINE __forceinline
#define RESTRICT __restrict
#define INLINE_LAMBDA
#else
#define INLINE inline __attribute__((always_inline))
#define RESTRICT __restrict__
#define INLINE_LAMBDA __attribute__((always_inline))
#endif

// One copy of a function for each level of x86-64; the loader picks one (ifunc, hence glibc). What the function
// calls must be INLINE, or it stays at the lowest level. Multiplications and additions are never contracted
// (-ffp-contract=off), so all levels give the same bits.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(BATCHNORM_ONE_TARGET)
#define LEVELS 1
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LEVELS 0
#define CLONES
#endif

// A level by the bytes of its vectors; 0 where the compiler has no vectors of its own.
template <int64_t Bytes>
struct Level {
  template <class E>
  static constexpr int64_t wide = Bytes ? Bytes / static_cast<int64_t>(sizeof(E)) : 1;  // elements of a vector
  static constexpr int64_t narrow = Bytes ? Bytes / 8 : 1;                              // doubles of a vector
};

#if defined(__GNUC__)
using LowestLevel = Level<16>;
#else
using LowestLevel = Level<0>;
#endif

// The bytes of the vectors that this processor has, or `most` if that is less. use_vectors sets it and returns what it
// comes to: tests compare the levels.
int64_t vector_bytes();
int64_t use_vectors(int64_t most);

// Calls f(Level), compiled for that level. f must be INLINE_LAMBDA, and what it calls INLINE.
#if LEVELS
template <class F>
__attribute__((target("arch=x86-64-v4"), noinline)) void at_v4(const F& f) {
  f(Level<64>{});
}
template <class F>
__attribute__((target("arch=x86-64-v3"), noinline)) void at_v3(const F& f) {
  f(Level<32>{});
}
template <class F>
void at_level(const F& f) {
  const int64_t bytes = vector_bytes();
  bytes == 64 ? at_v4(f) : bytes == 32 ? at_v3(f) : f(LowestLevel{});
}
#else
template <class F>
void at_level(const F& f) {
  f(LowestLevel{});
}
#endif

// Asks for the line of x, into the second-level cache.
INLINE void prefetch(const void* x) {
#if defined(__GNUC__)
  __builtin_prefetch(x, 0, 2);
#else
  (void)x;
#endif
}
