/* Vectors of LANES numbers, parts of them, and the memory that a thread keeps. */
#ifndef VECTORS_H
#define VECTORS_H
#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#ifndef REAL
#define REAL float
#define INT int
#define SINGLE 1
#define LANES 8
#endif
#define EXPORT __attribute__((visibility("default")))
#define UNROLL _Pragma("GCC unroll 32") /* whole, so that an array of vectors lives in registers */
#define INLINE static inline __attribute__((always_inline))

typedef REAL vec __attribute__((vector_size(LANES * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));
typedef INT mask __attribute__((vector_size(LANES * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));

INLINE vec load(const REAL *p) { return *(const vec *)p; }
INLINE void store(REAL *p, vec v) { *(vec *)p = v; }
INLINE vec pick(mask m, vec a, vec b) { return (vec)(((mask)a & m) | ((mask)b & ~m)); }
INLINE vec relu(vec v) { return (vec)((mask)v & ~(v <= (REAL)0)); } /* NaN stays NaN */

/* The channels of a pixel fill whole vectors and a part of one, of n < LANES numbers. */
#if SINGLE && defined(__AVX__) && LANES == 8
static const int PART[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
INLINE vec load_part(const REAL *p, int n) {
    return (vec)_mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i *)(PART + 8 - n)));
}
INLINE void store_part(REAL *p, vec v, int n) { /* a masked store is slow on some processors */
    int l = n >= 4 ? 4 : 0;
    if (l) _mm_storeu_ps(p, _mm256_castps256_ps128((__m256)v));
    for (; l < n; l++) p[l] = v[l];
}
#elif SINGLE && defined(__AVX512F__) && LANES == 16
INLINE vec load_part(const REAL *p, int n) { return (vec)_mm512_maskz_loadu_ps((__mmask16)((1 << n) - 1), p); }
INLINE void store_part(REAL *p, vec v, int n) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1 << n) - 1), (__m512)v);
}
#else
INLINE vec load_part(const REAL *p, int n) {
    vec v = {0};
    for (int l = 0; l < n; l++) v[l] = p[l];
    return v;
}
INLINE void store_part(REAL *p, vec v, int n) {
    for (int l = 0; l < n; l++) p[l] = v[l];
}
#endif
INLINE vec load_some(const REAL *p, int n) { return n >= LANES ? load(p) : load_part(p, n); }
INLINE void store_some(REAL *p, vec v, int n) {
    if (n >= LANES) store(p, v);
    else store_part(p, v, n);
}

INLINE int padded(int channels) { return (channels + LANES - 1) / LANES * LANES; }
INLINE int halved(int side, int stride) { return (side + stride - 1) / stride; }

/* n pixels of C channels from rows of whole vectors (ldi) to dense ones. */
static void store_rows(const REAL *from, long ldi, REAL *to, int n, int C) {
    /* What is written past a pixel is overwritten by the next one, if it reaches no further. */
    int safe = padded(C) <= 2 * C ? n - 1 : 0, x = 0;
    for (; x < safe; x++)
        for (int c = 0; c < C; c += LANES) store(to + x * (long)C + c, load(from + x * ldi + c));
    for (; x < n; x++)
        for (int c = 0; c < C; c += LANES) store_some(to + x * (long)C + c, load(from + x * ldi + c), C - c);
}

/* Scratch memory that a thread keeps, so that no call touches fresh pages; NULL where there is none. */
static __thread char *scratch_memory;
static __thread size_t scratch_size;

static REAL *scratch(size_t count) {
    size_t wanted = count * sizeof(REAL) + 64;
    if (wanted > scratch_size) {
        free(scratch_memory);
        scratch_memory = malloc(wanted);
        scratch_size = scratch_memory ? wanted : 0;
        if (!scratch_memory) return NULL;
    }
    return (REAL *)(((size_t)scratch_memory + 63) & ~(size_t)63);
}
#endif
