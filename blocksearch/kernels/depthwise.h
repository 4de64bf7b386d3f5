/* Depthwise convolutions of an image with a border of zeros, and their gradients.
 *
 * Bound by loads: a number that is loaded serves all taps that read it, and the weights of a row of
 * taps stay in registers. C is a multiple of LANES; weights are (k k, C); `row` is the distance
 * between two rows of the image.
 */
#ifndef DEPTHWISE_H
#define DEPTHWISE_H
#include "vectors.h"

#define MAX_KERNEL 7

/* sum[q] += sum_j w[j] in[q stride + j dilation], for P pixels and one row of k taps. */
INLINE void row_of_taps(const REAL *in, const REAL *w, vec *sum, long C, const int P, const int stride,
                        const int k, const int d) {
    vec t[MAX_KERNEL];
    UNROLL for (int j = 0; j < k; j++) t[j] = load(w + j * C);
    if (stride == 1)
        UNROLL for (int s = 0; s < P + (k - 1) * d; s++) {
            vec v = load(in + s * C);
            UNROLL for (int j = 0; j < k; j++)
                if (s - j * d >= 0 && s - j * d < P) sum[s - j * d] += v * t[j];
        }
    else
        UNROLL for (int j = 0; j < k; j++)
            UNROLL for (int q = 0; q < P; q++) sum[q] += load(in + (q * stride + j * d) * C) * t[j];
}

INLINE void block_of_taps(const REAL *in, long row, const REAL *w, REAL *out, long C, const int P,
                          const int stride, const int k, const int d, const int add) {
    vec sum[8];
    UNROLL for (int q = 0; q < P; q++) sum[q] = add ? load(out + q * C) : (vec){0};
    for (int i = 0; i < k; i++) row_of_taps(in + i * d * row, w + i * k * C, sum, C, P, stride, k, d);
    UNROLL for (int q = 0; q < P; q++) store(out + q * C, sum[q]);
}

/* out (+)= the convolution, for n pixels of one row. */
INLINE void row_of_pixels(const REAL *in, long row, const REAL *w, REAL *out, int n, long C, const int stride,
                          const int k, const int d, const int add) {
#define BLOCK(P) \
    for (; x + P <= n; x += P) \
        block_of_taps(in + x * stride * C + c, row, w + c, out + x * C + c, C, P, stride, k, d, add)
    for (long c = 0; c < C; c += LANES) {
        int x = 0;
        if (stride == 1) BLOCK(8);
        BLOCK(4);
        BLOCK(1);
    }
#undef BLOCK
}

/* out += the transposed convolution of stride 2 of a gradient with a border: row i of it, W pixels wide.
 * A pixel reads the taps of its parity alone. */
static void add_strided_taps(const REAL *g, long row, int Ho, const REAL *w, REAL *out, int i, int W, long C, int k,
                             int d) {
    int border = d * (k - 1) / 2;
    for (int parity = 0; parity < 2; parity++) {
        const REAL *from[MAX_KERNEL * MAX_KERNEL], *weight[MAX_KERNEL * MAX_KERNEL];
        int n = 0;
        for (int u = 0; u < k; u++) {
            int y = i + border - u * d;
            if (y & 1 || y < 0 || y / 2 >= Ho) continue;
            for (int v = 0; v < k; v++) {
                int x = parity + border - v * d; /* halved, it may be below 0: the border has zeros there */
                if (x & 1) continue;
                from[n] = g + y / 2 * row + x / 2 * C;
                weight[n++] = w + (u * k + v) * C;
            }
        }
        int pixels = (W - parity + 1) / 2;
        REAL *to = out + parity * C;
#define BLOCK(P)                                                                                              \
    for (; x + P <= pixels; x += P) {                                                                         \
        vec sum[P];                                                                                           \
        UNROLL for (int q = 0; q < P; q++) sum[q] = load(to + 2 * (x + q) * C + c);                           \
        for (int t = 0; t < n; t++) {                                                                         \
            vec v = load(weight[t] + c);                                                                      \
            UNROLL for (int q = 0; q < P; q++) sum[q] += load(from[t] + (x + q) * C + c) * v;                 \
        }                                                                                                     \
        UNROLL for (int q = 0; q < P; q++) store(to + 2 * (x + q) * C + c, sum[q]);                           \
    }
        for (long c = 0; c < C && n; c += LANES) {
            int x = 0;
            BLOCK(8)
            BLOCK(4)
            BLOCK(1)
        }
#undef BLOCK
    }
}

/* gw[i, j] += sum_x g[x] in[x stride + tap], for I rows of taps from row i, over all pixels. */
INLINE void rows_of_gradients(const REAL *in, long row, const REAL *g, long row_g, REAL *gw, int rows, int n,
                              int stride, int C, const int I, const int k, const int d) {
    vec a[12];
    UNROLL for (int t = 0; t < I * k; t++) a[t] = load(gw + t * C);
    for (int y = 0; y < rows; y++)
        for (int x = 0; x < n; x++) {
            const REAL *p = in + y * stride * row + x * stride * (long)C;
            vec t = load(g + y * row_g + x * (long)C);
            UNROLL for (int i = 0; i < I; i++)
                UNROLL for (int j = 0; j < k; j++) a[i * k + j] += load(p + i * d * row + j * d * (long)C) * t;
        }
    UNROLL for (int t = 0; t < I * k; t++) store(gw + t * C, a[t]);
}

/* gw += the gradient of the weights, over `rows` rows of n pixels. */
INLINE void gradients(const REAL *in, long row, const REAL *g, long row_g, REAL *gw, int rows, int n,
                      int stride, int C, const int k, const int d) {
    for (int c = 0; c < C; c += LANES) {
        int i = 0;
        for (; k == 3 && i + 3 <= k; i += 3)
            rows_of_gradients(in + c, row, g + c, row_g, gw + c, rows, n, stride, C, 3, 3, d);
        for (; k == 5 && i + 2 <= k; i += 2)
            rows_of_gradients(in + i * d * row + c, row, g + c, row_g, gw + i * k * C + c, rows, n, stride, C, 2, 5, d);
        for (; i < k; i++)
            rows_of_gradients(in + i * d * row + c, row, g + c, row_g, gw + i * k * C + c, rows, n, stride, C, 1, k, d);
    }
}

/* Calls `f` with a kernel size and dilation that the compiler knows, where it is a usual one. */
#define FOR_KERNEL(k, d, f)                          \
    do {                                             \
        if (k == 3 && d == 1) f(3, 1);               \
        else if (k == 5 && d == 1) f(5, 1);          \
        else if (k == 3 && d == 2) f(3, 2);          \
        else if (k == 5 && d == 2) f(5, 2);          \
        else f(k, d);                                \
    } while (0)

static void taps(const REAL *in, long row, const REAL *w, REAL *out, int n, int stride, int C, int k, int d) {
#define RUN(K, D)                                                        \
    if (stride == 1) row_of_pixels(in, row, w, out, n, C, 1, K, D, 0);   \
    else row_of_pixels(in, row, w, out, n, C, 2, K, D, 0)
    FOR_KERNEL(k, d, RUN);
#undef RUN
}

static void add_taps(const REAL *in, long row, const REAL *w, REAL *out, int n, int C, int k, int d) {
#define RUN(K, D) row_of_pixels(in, row, w, out, n, C, 1, K, D, 1)
    FOR_KERNEL(k, d, RUN);
#undef RUN
}

static void tap_gradients(const REAL *in, long row, const REAL *g, long row_g, REAL *gw, int rows, int n,
                          int stride, int C, int k, int d) {
#define RUN(K, D) gradients(in, row, g, row_g, gw, rows, n, stride, C, K, D)
    FOR_KERNEL(k, d, RUN);
#undef RUN
}
#endif
