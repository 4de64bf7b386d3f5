/* 3x3 pools of an image with a border of one, which an average does not count.
 *
 * Bound by loads: a window is taken column by column, so that a number is loaded three times and not
 * nine. Images are dense in whole vectors: C is a multiple of LANES.
 */
#ifndef POOL_H
#define POOL_H
#include "vectors.h"

INLINE vec larger(vec a, vec b) { return pick((b > a) | (b != b), b, a); } /* NaN stays NaN */

/* The rows or columns of a window around place `at` of a side: from `low` up to `high`, not included. */
typedef struct {
    int low, high;
} Range;

INLINE Range range(int at, int side) { return (Range){at > 0 ? at - 1 : 0, at + 2 < side ? at + 2 : side}; }

/* columns (W, C): over the rows of a window, the largest or the sum of each column. */
INLINE void pool_columns(const REAL *in, int is_max, Range rows, int W, long C, REAL *columns) {
    for (long i = 0; i < W * C; i += LANES) {
        vec a = load(in + rows.low * W * C + i);
        for (int y = rows.low + 1; y < rows.high; y++) {
            vec b = load(in + y * W * C + i);
            if (is_max) a = larger(a, b);
            else a += b;
        }
        store(columns + i, a);
    }
}

/* out (n, C): row y of a pool of `in` (H, W, C); `columns` is room for a row of `in`. */
static void pool_row(const REAL *in, int is_max, int y, int stride, int H, int W, long C, REAL *columns, REAL *out) {
    Range rows = range(y * stride, H);
    if (is_max) pool_columns(in, 1, rows, W, C, columns);
    else pool_columns(in, 0, rows, W, C, columns);
    for (int x = 0; x < halved(W, stride); x++) {
        Range chosen = range(x * stride, W);
        vec share = (vec){0} + (REAL)1 / ((rows.high - rows.low) * (chosen.high - chosen.low));
        for (long c = 0; c < C; c += LANES) {
            vec a = load(columns + chosen.low * C + c);
            for (int v = chosen.low + 1; v < chosen.high; v++) {
                vec b = load(columns + v * C + c);
                if (is_max) a = larger(a, b);
                else a += b;
            }
            if (!is_max) a *= share;
            store(out + x * C + c, a);
        }
    }
}

/* g (H, W, C) += the gradient gz through row y of a maximum, which `best` holds: the first that equals it gets all. */
static void add_max_row(const REAL *in, int y, int stride, int H, int W, long C, const REAL *best, const REAL *gz,
                        REAL *g) {
    Range rows = range(y * stride, H);
    for (int x = 0; x < halved(W, stride); x++) {
        Range chosen = range(x * stride, W);
        for (long c = 0; c < C; c += LANES) {
            vec top = load(best + x * C + c);
            mask left = (mask)load(gz + x * C + c);
            for (int u = rows.low; u < rows.high; u++)
                for (int v = chosen.low; v < chosen.high; v++) {
                    long at = (u * (long)W + v) * C + c;
                    vec p = load(in + at);
                    mask here = (p == top) | (p != p);
                    store(g + at, load(g + at) + (vec)(left & here));
                    left &= ~here;
                }
        }
    }
}

/* g (H, W, C) += the gradient gz through row y of an average. */
static void add_average_row(int y, int stride, int H, int W, long C, const REAL *gz, REAL *columns, REAL *g) {
    Range rows = range(y * stride, H);
    memset(columns, 0, W * C * sizeof(REAL));
    for (int x = 0; x < halved(W, stride); x++) {
        Range chosen = range(x * stride, W);
        vec share = (vec){0} + (REAL)1 / ((rows.high - rows.low) * (chosen.high - chosen.low));
        for (long c = 0; c < C; c += LANES) {
            vec t = load(gz + x * C + c) * share;
            for (int v = chosen.low; v < chosen.high; v++) store(columns + v * C + c, load(columns + v * C + c) + t);
        }
    }
    for (int u = rows.low; u < rows.high; u++)
        for (long i = 0; i < W * C; i += LANES) store(g + u * W * C + i, load(g + u * W * C + i) + load(columns + i));
}
#endif
