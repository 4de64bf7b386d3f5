/* Small matrix products over the channels of pixels: 1x1 convolutions and their gradients.
 *
 * Bound by arithmetic: a block of PIXELS x VECTORS sums stays in registers, so that a number that is
 * loaded is used several times. Rows hold whole vectors, with zeros behind the channels.
 */
#ifndef POINTWISE_H
#define POINTWISE_H
#include "vectors.h"

#define TILE_PIXELS 64 /* rows are taken together up to this many pixels */

INLINE int tile_rows(int width) { return width >= TILE_PIXELS ? 1 : TILE_PIXELS / width; }

/* out (P, V) (+)= a (P, K) w (K, V): P pixels, V vectors of channels. */
INLINE void product_block(const REAL *a, long lda, const REAL *w, long ldw, REAL *out, long ldo, int K,
                          const int P, const int V, const int add) {
    vec s[12];
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int v = 0; v < V; v++) s[p * V + v] = add ? load(out + p * ldo + v * LANES) : (vec){0};
    for (int i = 0; i < K; i++) {
        vec t[2];
        UNROLL for (int v = 0; v < V; v++) t[v] = load(w + i * ldw + v * LANES);
        UNROLL for (int p = 0; p < P; p++)
            UNROLL for (int v = 0; v < V; v++) s[p * V + v] += a[p * lda + i] * t[v];
    }
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int v = 0; v < V; v++) store(out + p * ldo + v * LANES, s[p * V + v]);
}

/* out (n, N) (+)= a (n, K) w (K, N); N is a multiple of LANES. */
INLINE void product_(const REAL *a, long lda, const REAL *w, REAL *out, long ldo, int n, int K, int N,
                     const int add) {
    int x = 0;
#define COLUMNS(P)                                                                                     \
    do {                                                                                               \
        int c = 0;                                                                                     \
        for (; c + 2 * LANES <= N; c += 2 * LANES)                                                     \
            product_block(a + x * lda, lda, w + c, N, out + x * ldo + c, ldo, K, P, 2, add);           \
        if (c < N) product_block(a + x * lda, lda, w + c, N, out + x * ldo + c, ldo, K, P, 1, add);    \
    } while (0)
    for (; x + 6 <= n; x += 6) COLUMNS(6);
    for (; x + 2 <= n; x += 2) COLUMNS(2);
    if (x < n) COLUMNS(1);
#undef COLUMNS
}

static void product(const REAL *a, long lda, const REAL *w, REAL *out, long ldo, int n, int K, int N) {
    product_(a, lda, w, out, ldo, n, K, N, 0);
}

static void add_product(const REAL *a, long lda, const REAL *w, REAL *out, long ldo, int n, int K, int N) {
    product_(a, lda, w, out, ldo, n, K, N, 1);
}

/* gw (P, V) += g (n, P)^T a (n, V). */
INLINE void outer_block(const REAL *g, long ldg, const REAL *a, long lda, REAL *gw, long ldw, int n,
                        const int P, const int V) {
    vec s[12];
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int v = 0; v < V; v++) s[p * V + v] = load(gw + p * ldw + v * LANES);
    for (int x = 0; x < n; x++) {
        vec t[2];
        UNROLL for (int v = 0; v < V; v++) t[v] = load(a + x * lda + v * LANES);
        UNROLL for (int p = 0; p < P; p++)
            UNROLL for (int v = 0; v < V; v++) s[p * V + v] += g[x * ldg + p] * t[v];
    }
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int v = 0; v < V; v++) store(gw + p * ldw + v * LANES, s[p * V + v]);
}

/* gw (M, N) += g (n, M)^T a (n, N); N is a multiple of LANES. */
static void add_outer(const REAL *g, long ldg, const REAL *a, long lda, REAL *gw, int n, int M, int N) {
    int o = 0;
#define COLUMNS(P)                                                                                     \
    do {                                                                                               \
        int c = 0;                                                                                     \
        for (; c + 2 * LANES <= N; c += 2 * LANES)                                                     \
            outer_block(g + o, ldg, a + c, lda, gw + (long)o * N + c, N, n, P, 2);                     \
        if (c < N) outer_block(g + o, ldg, a + c, lda, gw + (long)o * N + c, N, n, P, 1);              \
    } while (0)
    for (; o + 6 <= M; o += 6) COLUMNS(6);
    for (; o + 2 <= M; o += 2) COLUMNS(2);
    if (o < M) COLUMNS(1);
#undef COLUMNS
}
#endif
