/* BatchNorm without a pass of its own: moments of what is written, and its gradient as an affine map.
 *
 * Bound by memory. Of z with mean m and 1 / std r over n pixels, the norm is b r (z - m) + beta. With
 * gradient g on it, s1 = sum g and s2 = sum g z, that on z is coef[0] g + coef[1] z + coef[2].
 */
#ifndef NORM_H
#define NORM_H
#include "vectors.h"

#define SUM_PIXELS 256 /* pixels between two additions in double precision */

/* Adds sum (z - pivot) and sum (z - pivot)^2 of n pixels, `ld` apart, to sum (2, C). */
static void add_moments(const REAL *z, long ld, const REAL *pivot, REAL *sum, int n, int C) {
    for (int c = 0; c < C; c += LANES) {
        int left = C - c;
        vec p = load_some(pivot + c, left), m = load_some(sum + c, left), q = load_some(sum + C + c, left);
        for (int x = 0; x < n; x++) {
            vec v = load_some(z + x * ld + c, left) - p;
            m += v;
            q += v * v;
        }
        store_some(sum + c, m, left);
        store_some(sum + C + c, q, left);
    }
}

/* Mean and 1 / std over a batch of z (dense), whose images have the sums (2, C) that stand `step` apart,
 * each about its own first pixel: a sum of squares about 0 would cancel where the mean is large. */
static void moments(const REAL *z, const REAL *sums, size_t step, int batch, long pixels, double eps, int C,
                    REAL *mean, REAL *rstd) {
    for (int c = 0; c < C; c++) {
        double m = 0, q = 0;
        for (int b = 0; b < batch; b++) m += z[b * pixels * C + c] + sums[b * step + c] / (double)pixels;
        m /= batch;
        for (int b = 0; b < batch; b++) {
            double s = sums[b * step + c], off = z[b * pixels * C + c] + s / pixels - m;
            q += sums[b * step + C + c] - s * s / pixels + pixels * off * off;
        }
        q /= (double)batch * pixels;
        mean[c] = (REAL)m;
        rstd[c] = (REAL)(1.0 / sqrt((q > 0 ? q : q != q ? q : 0) + eps));
    }
}

/* coef (3, C) from s1 = sum g and s2 = sum g z over `count` pixels; b (C) may be NULL for 1. */
static void norm_gradient(const REAL *mean, const REAL *rstd, const REAL *b, const double *s1,
                          const double *s2, double count, int C, REAL *coef) {
    for (int c = 0; c < C; c++) {
        double r = rstd[c], w = b ? b[c] : 1.0, dot = r * (s2[c] - mean[c] * s1[c]);
        double beta = -w * r * r * dot / count;
        coef[c] = (REAL)(w * r);
        coef[C + c] = (REAL)beta;
        coef[2 * C + c] = (REAL)(-w * r * s1[c] / count - beta * mean[c]);
    }
}

/* gz = coef[0] g + coef[1] z + coef[2] for n pixels (rows of ldo, zeros behind the channels). */
static void norm_rows(const REAL *coef, const REAL *g, long ldg, const REAL *z, long ldz, REAL *gz, long ldo,
                      int n, int C) {
    for (int c = 0; c < C; c += LANES) {
        int left = C - c;
        vec a = load_some(coef + c, left), b = load_some(coef + C + c, left), k = load_some(coef + 2 * C + c, left);
        for (int x = 0; x < n; x++)
            store(gz + x * ldo + c, a * load_some(g + x * ldg + c, left) + b * load_some(z + x * ldz + c, left) + k);
    }
}
#endif
