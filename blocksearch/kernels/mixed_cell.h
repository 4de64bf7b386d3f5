/* The supernet's mixed cell; fused.py calls these loops, and says what a cell computes with them.
 *
 * Images are (B, H, W, C) in memory (channels_last); `ld` is the distance between two pixels, so
 * that a state may be a slice of a wider tensor. C is a multiple of LANES. A "unit" is ReLU,
 * depthwise and pointwise convolution; its BatchNorm is never run by itself: whoever reads the
 * unit's output z applies it as an affine map, and its gradient arrives as alpha g + beta z + gamma.
 * Work is divided statically over images, so a fixed number of threads gives fixed bits.
 *
 * A function that takes memory returns whether there was none; what it computed is then of no use.
 */
#ifndef MIXED_CELL_H
#define MIXED_CELL_H
#include "depthwise.h"
#include "norm.h"
#include "pointwise.h"

typedef struct {
    const REAL *x;             /* input image; units that share it stand side by side */
    const REAL *scale, *shift; /* (C): read scale x + shift; NULL reads x */
    const REAL *dw, *pw;       /* weights (C, k, k) and (C out, C in) */
    REAL *z;                   /* output of the pointwise convolution */
    REAL *mean, *rstd;         /* (C): of z over the batch */
    const REAL *g, *coef;      /* gradient on z is coef[0] g + coef[1] z + coef[2], each (C) */
    REAL *gdw, *gpw;           /* gradients of the weights, or NULL */
    REAL *gx, *gx_coef;        /* gradient after the ReLU of scale x + shift, and its coef (3, C) */
    long ldx, ldg;
    int kernel, dilation;
} Unit;

typedef struct {
    int batch, height, width, channels, stride, pad, threads;
} Shape;

/* The input of a unit, activated and with a border of zeros, as depthwise convolutions read it. */
static void activate(const Unit *u, const Shape *s, int b, REAL *out) {
    int C = s->channels, p = s->pad, W = s->width + 2 * p;
    const REAL *x = u->x + b * (long)s->height * s->width * u->ldx;
    memset(out, 0, sizeof(REAL) * (size_t)(s->height + 2 * p) * W * C);
    for (int y = 0; y < s->height; y++)
        for (int i = 0; i < s->width; i++) {
            const REAL *from = x + (y * (long)s->width + i) * u->ldx;
            REAL *to = out + ((y + p) * (long)W + i + p) * C;
            for (int c = 0; c < C; c += LANES) {
                vec v = load(from + c);
                if (u->scale) v = v * load(u->scale + c) + load(u->shift + c);
                store(to + c, relu(v));
            }
        }
}

/* Weights as the loops read them: dw (k k, C), its mirror image, and pw (C in, C out). */
static size_t packed_size(const Unit *u, int C) { return (size_t)C * (2 * u->kernel * u->kernel + C); }

static void pack(const Unit *u, int C, REAL *out) {
    int kk = u->kernel * u->kernel;
    REAL *mirror = out + kk * C, *pw = mirror + kk * C;
    for (int t = 0; t < kk; t++)
        for (int c = 0; c < C; c++) {
            out[t * C + c] = u->dw[c * kk + t];
            mirror[(kk - 1 - t) * C + c] = u->dw[c * kk + t];
        }
    for (int o = 0; o < C; o++)
        for (int i = 0; i < C; i++) pw[i * C + o] = u->pw[o * C + i];
}

static size_t packed_sizes(const Unit *units, int n, int C) {
    size_t total = 0;
    for (int k = 0; k < n; k++) total += packed_size(units + k, C);
    return total;
}

/* The weights of each unit, one after the other in `memory`; NULL where there is none. */
static REAL **pack_all(const Unit *units, int n, int C, REAL **memory) {
    REAL **packed = malloc(n * sizeof(REAL *));
    *memory = malloc(packed_sizes(units, n, C) * sizeof(REAL));
    if (!packed || !*memory) {
        free(packed);
        return NULL;
    }
    REAL *at = *memory;
    for (int k = 0; k < n; k++) {
        packed[k] = at;
        pack(units + k, C, at);
        at += packed_size(units + k, C);
    }
    return packed;
}

INLINE int border(const Unit *u) { return u->dilation * (u->kernel - 1) / 2; }

/* d = the unit's depthwise convolution, for output rows y to y + rows. */
static void depthwise_rows(const Unit *u, const Shape *s, const REAL *in, const REAL *w, REAL *d, int y,
                           int rows) {
    int C = s->channels, W = s->width + 2 * s->pad, Wo = halved(s->width, s->stride);
    int lead = s->pad - border(u);
    for (int r = 0; r < rows; r++)
        taps(in + (((y + r) * s->stride + lead) * (long)W + lead) * C, (long)W * C, w,
             d + r * (long)Wo * C, Wo, s->stride, C, u->kernel, u->dilation);
}

/* z, and its mean and 1 / std over the batch, for n units. */
EXPORT int forward_units(const Unit *units, int n, Shape s, double eps) {
    int C = s.channels, Ho = halved(s.height, s.stride), Wo = halved(s.width, s.stride);
    size_t padded = (size_t)(s.height + 2 * s.pad) * (s.width + 2 * s.pad) * C;
    int rows = tile_rows(Wo);
    REAL *memory, **packed = pack_all(units, n, C, &memory);
    REAL *sums = calloc((size_t)s.batch * n * 2 * C, sizeof(REAL));
    int failed = !packed || !sums, images = failed ? 0 : s.batch;
#pragma omp parallel for schedule(static) num_threads(s.threads) reduction(| : failed)
    for (int b = 0; b < images; b++) {
        REAL *in = scratch(padded + (size_t)rows * Wo * C);
        if (!in) {
            failed = 1;
            continue;
        }
        REAL *d = in + padded;
        for (int k = 0; k < n; k++) {
            const Unit *u = units + k;
            const REAL *dw = packed[k], *pw = dw + 2 * u->kernel * u->kernel * C;
            REAL *sum = sums + ((size_t)b * n + k) * 2 * C;
            if (k == 0 || u->x != units[k - 1].x) activate(u, &s, b, in);
            for (int y = 0; y < Ho; y += rows) {
                int count = y + rows <= Ho ? rows : Ho - y, pixels = count * Wo;
                REAL *z = u->z + ((size_t)b * Ho + y) * Wo * C;
                depthwise_rows(u, &s, in, dw, d, y, count);
                product(d, C, pw, z, C, pixels, C, C);
                add_moments(z, C, u->z + (size_t)b * Ho * Wo * C, sum, pixels, C);
            }
        }
    }
    for (int k = 0; k < n && !failed; k++)
        moments(units[k].z, sums + (size_t)k * 2 * C, (size_t)n * 2 * C, s.batch, (long)Ho * Wo, eps, C,
                units[k].mean, units[k].rstd);
    free(sums);
    free(packed);
    free(memory);
    return failed;
}

/* The gradients of n units: of their weights where asked for, and of their inputs.
 *
 * Units without `scale` read a state: gx of the last of those that share an input receives the sum
 * of all their gradients, through the ReLU, on top of what is there. Units with `scale` read the
 * normalised output of another unit, whose gradient is left in gx and gx_coef. */
EXPORT int backward_units(const Unit *units, int n, Shape s) {
    int C = s.channels, Ho = halved(s.height, s.stride), Wo = halved(s.width, s.stride);
    int W = s.width + 2 * s.pad, rows = tile_rows(Wo);
    size_t padded = (size_t)(s.height + 2 * s.pad) * W * C, image = (size_t)s.height * s.width * C;
    size_t tile = (size_t)rows * Wo * C, weights = packed_sizes(units, n, C);
    REAL *memory, **packed = pack_all(units, n, C, &memory);
    REAL *partial = calloc((size_t)s.threads * weights, sizeof(REAL));
    REAL *sums = calloc((size_t)s.batch * n * 2 * C, sizeof(REAL));
    double *total = malloc(2 * C * sizeof(double) + C * sizeof(REAL));
    int failed = !packed || !partial || !sums || !total, threads = failed ? 0 : s.threads;
#pragma omp parallel for schedule(static, 1) num_threads(s.threads) reduction(| : failed)
    for (int t = 0; t < threads; t++) {
        REAL *in = scratch(2 * padded + image + 3 * tile);
        if (!in) {
            failed = 1;
            continue;
        }
        REAL *up = in + padded, *gx = up + padded, *gz = gx + image, *d = gz + tile, *gd = d + tile;
        int first = (int)((long)s.batch * t / s.threads), last = (int)((long)s.batch * (t + 1) / s.threads);
        for (int b = first; b < last; b++)
            for (int k = 0; k < n; k++) {
                const Unit *u = units + k;
                int kk = u->kernel * u->kernel, lead = s.pad - border(u);
                const REAL *dw = packed[k], *mirror = dw + kk * C;
                REAL *gdw = partial + t * weights + (dw - memory), *gpw = gdw + kk * C;
                if (k == 0 || u->x != units[k - 1].x) {
                    activate(u, &s, b, in);
                    memset(gx, 0, image * sizeof(REAL));
                }
                memset(up, 0, padded * sizeof(REAL));
                for (int y = 0; y < Ho; y += rows) {
                    int count = y + rows <= Ho ? rows : Ho - y, pixels = count * Wo;
                    size_t at = ((size_t)b * Ho + y) * Wo;
                    norm_rows(u->coef, u->g + at * u->ldg, u->ldg, u->z + at * C, C, gz, C, pixels, C);
                    product(gz, C, u->pw, gd, C, pixels, C, C);
                    for (int r = 0; r < count; r++) {
                        REAL *to = up + (((y + r) * s.stride + s.pad) * (long)W + s.pad) * C;
                        for (int x = 0; x < Wo; x++)
                            for (int c = 0; c < C; c += LANES)
                                store(to + x * s.stride * (long)C + c, load(gd + (r * Wo + x) * (long)C + c));
                    }
                    if (!u->gdw) continue;
                    depthwise_rows(u, &s, in, dw, d, y, count);
                    add_outer(gz, C, d, C, gpw, pixels, C, C);
                    tap_gradients(in + ((y * s.stride + lead) * (long)W + lead) * C, (long)W * C, gd, (long)Wo * C, gdw,
                                  count, Wo, s.stride, C, u->kernel, u->dilation);
                }
                for (int y = 0; y < s.height; y++)
                    add_taps(up + ((y + lead) * (long)W + lead) * C, (long)W * C, mirror,
                             gx + y * (long)s.width * C, s.width, C, u->kernel, u->dilation);
                if (!u->gx) continue;
                REAL *out = u->gx + b * image, *sum = sums + ((size_t)b * n + k) * 2 * C;
                const REAL *x = u->x + b * (long)s.height * s.width * u->ldx;
                for (int p = 0; p < s.height * s.width; p++) {
                    const REAL *active = in + ((p / s.width + s.pad) * (long)W + p % s.width + s.pad) * C;
                    for (int c = 0; c < C; c += LANES) {
                        vec v = (vec)((mask)load(gx + p * (long)C + c) & ~(load(active + c) <= (REAL)0));
                        if (u->scale) {
                            store(sum + c, load(sum + c) + v);
                            store(sum + C + c, load(sum + C + c) + v * load(x + p * u->ldx + c));
                        } else
                            v += load(out + p * (long)C + c);
                        store(out + p * (long)C + c, v);
                    }
                }
            }
    }
    for (int k = 0; k < n && !failed; k++) {
        const Unit *u = units + k;
        int kk = u->kernel * u->kernel;
        if (u->gdw)
            for (int t = 0; t < s.threads; t++) {
                const REAL *gdw = partial + t * weights + (packed[k] - memory), *gpw = gdw + kk * C;
                for (int i = 0; i < kk * C; i++) u->gdw[(i % C) * kk + i / C] += gdw[i];
                for (int i = 0; i < C * C; i++) u->gpw[i] += gpw[i];
            }
        if (!u->gx_coef) continue;
        memset(total, 0, 2 * C * sizeof(double));
        for (int b = 0; b < s.batch; b++)
            for (int c = 0; c < 2 * C; c++) total[c] += sums[((size_t)b * n + k) * 2 * C + c];
        /* scale = rstd and shift = -mean rstd of the other unit */
        REAL *mean = (REAL *)(total + 2 * C);
        for (int c = 0; c < C; c++) mean[c] = -u->shift[c] / u->scale[c];
        norm_gradient(mean, u->scale, NULL, total, total + C, (double)s.batch * s.height * s.width, C,
                      u->gx_coef);
    }
    free(total);
    free(sums);
    free(partial);
    free(packed);
    free(memory);
    return failed;
}

/* 3x3 pooling, z and its mean and 1 / std; the average counts no border. */
EXPORT int forward_pool(const REAL *x, long ldx, int is_max, REAL *z, REAL *mean, REAL *rstd, Shape s,
                        double eps) {
    int C = s.channels, Ho = halved(s.height, s.stride), Wo = halved(s.width, s.stride);
    REAL *sums = calloc((size_t)s.batch * 2 * C, sizeof(REAL));
    if (!sums) return 1;
#pragma omp parallel for schedule(static) num_threads(s.threads)
    for (int b = 0; b < s.batch; b++)
        for (int p = 0; p < Ho * Wo; p++) {
            int y = p / Wo * s.stride, i = p % Wo * s.stride;
            int top = y > 0 ? y - 1 : 0, bottom = y + 2 < s.height ? y + 2 : s.height;
            int left = i > 0 ? i - 1 : 0, right = i + 2 < s.width ? i + 2 : s.width;
            REAL *sum = sums + (size_t)b * 2 * C;
            for (int c = 0; c < C; c += LANES) {
                vec a = (vec){0} - (is_max ? (REAL)INFINITY : (REAL)0);
                for (int u = top; u < bottom; u++)
                    for (int v = left; v < right; v++) {
                        vec t = load(x + (((long)b * s.height + u) * s.width + v) * ldx + c);
                        if (is_max) a = pick((t > a) | (t != t), t, a);
                        else a += t;
                    }
                if (!is_max) a /= (REAL)((bottom - top) * (right - left));
                store(z + ((size_t)b * Ho * Wo + p) * C + c, a);
                a -= load(z + (size_t)b * Ho * Wo * C + c);
                store(sum + c, load(sum + c) + a);
                store(sum + C + c, load(sum + C + c) + a * a);
            }
        }
    moments(z, sums, (size_t)2 * C, s.batch, (long)Ho * Wo, eps, C, mean, rstd);
    free(sums);
    return 0;
}

/* gx += the gradient through a pool of gz (C per pixel, dense); the first largest pixel gets it. */
EXPORT void backward_pool(const REAL *x, long ldx, int is_max, const REAL *gz, REAL *gx, Shape s) {
    int C = s.channels, Ho = halved(s.height, s.stride), Wo = halved(s.width, s.stride);
#pragma omp parallel for schedule(static) num_threads(s.threads)
    for (int b = 0; b < s.batch; b++)
        for (int p = 0; p < Ho * Wo; p++) {
            int y = p / Wo * s.stride, i = p % Wo * s.stride;
            int top = y > 0 ? y - 1 : 0, bottom = y + 2 < s.height ? y + 2 : s.height;
            int left = i > 0 ? i - 1 : 0, right = i + 2 < s.width ? i + 2 : s.width;
            const REAL *from = x + (long)b * s.height * s.width * ldx;
            REAL *to = gx + (size_t)b * s.height * s.width * C;
            for (int c = 0; c < C; c += LANES) {
                vec g = load(gz + ((size_t)b * Ho * Wo + p) * C + c);
                if (!is_max) {
                    g /= (REAL)((bottom - top) * (right - left));
                    for (int u = top; u < bottom; u++)
                        for (int v = left; v < right; v++) {
                            REAL *q = to + (u * (long)s.width + v) * C + c;
                            store(q, load(q) + g);
                        }
                    continue;
                }
                vec best = (vec){0} - (REAL)INFINITY;
                mask place = (mask){0} + (top * s.width + left);
                for (int u = top; u < bottom; u++)
                    for (int v = left; v < right; v++) {
                        vec t = load(from + (u * (long)s.width + v) * ldx + c);
                        mask larger = (t > best) | (t != t);
                        best = pick(larger, t, best);
                        place = (place & ~larger) | (((mask){0} + (u * s.width + v)) & larger);
                    }
                for (int u = top; u < bottom; u++)
                    for (int v = left; v < right; v++) {
                        REAL *q = to + (u * (long)s.width + v) * C + c;
                        store(q, load(q) + (vec)((mask)g & (place == u * s.width + v)));
                    }
            }
        }
}

/* out (+)= bias + sum_k coef[k] z[k]: per channel, z[k] with its own distance between pixels. */
EXPORT void weighted_sum(const REAL *const *z, const long *ld, const REAL *coef, const REAL *bias, int n,
                         REAL *out, long ldo, int accumulate, long pixels, int C, int threads) {
    long chunks = (pixels + TILE_PIXELS - 1) / TILE_PIXELS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long chunk = 0; chunk < chunks; chunk++) {
        long first = chunk * TILE_PIXELS;
        int count = first + TILE_PIXELS <= pixels ? TILE_PIXELS : (int)(pixels - first);
        REAL *to = out + first * ldo;
        for (int x = 0; x < count; x++)
            for (int c = 0; c < C; c += LANES) {
                vec v = accumulate ? load(to + x * ldo + c) : (vec){0};
                if (bias) v += load(bias + c);
                store(to + x * ldo + c, v);
            }
        int k = 0;
        for (; k + 4 <= n; k += 4)
            for (int c = 0; c < C; c += LANES) {
                vec w0 = load(coef + k * C + c), w1 = load(coef + (k + 1) * C + c);
                vec w2 = load(coef + (k + 2) * C + c), w3 = load(coef + (k + 3) * C + c);
                for (int x = 0; x < count; x++)
                    store(to + x * ldo + c, load(to + x * ldo + c) + w0 * load(z[k] + (first + x) * ld[k] + c) +
                                                w1 * load(z[k + 1] + (first + x) * ld[k + 1] + c) +
                                                w2 * load(z[k + 2] + (first + x) * ld[k + 2] + c) +
                                                w3 * load(z[k + 3] + (first + x) * ld[k + 3] + c));
            }
        for (; k < n; k++)
            for (int c = 0; c < C; c += LANES) {
                vec w = load(coef + k * C + c);
                for (int x = 0; x < count; x++)
                    store(to + x * ldo + c, load(to + x * ldo + c) + w * load(z[k] + (first + x) * ld[k] + c));
            }
    }
}

/* For a node with gradient g (dense) that is the gated sum of n normalised z:
 * slope[k] = the gradient on the multiplier of term k, coef[k] (3, C) that on z[k].
 * mean[k] is NULL for a term without BatchNorm; b[k] (C) is what its gradient is scaled by. */
EXPORT int node_gradient(const REAL *const *z, const long *ld, const REAL *const *mean,
                         const REAL *const *rstd, const REAL *b, int n, const REAL *g, REAL *slope,
                         REAL *coef, int batch, long pixels, int C, int threads) {
    double *sums = calloc((size_t)batch * (n + 1) * C, sizeof(double));
    if (!sums) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int i = 0; i < batch; i++)
        for (long first = 0; first < pixels; first += SUM_PIXELS) {
            int count = first + SUM_PIXELS <= pixels ? SUM_PIXELS : (int)(pixels - first);
            const REAL *from = g + (i * pixels + first) * C;
            for (int k = 0; k <= n; k++)
                for (int c = 0; c < C; c += LANES) {
                    vec a = {0};
                    if (k == n)
                        for (int x = 0; x < count; x++) a += load(from + x * C + c);
                    else
                        for (int x = 0; x < count; x++)
                            a += load(from + x * C + c) * load(z[k] + (i * pixels + first + x) * ld[k] + c);
                    for (int l = 0; l < LANES; l++) sums[((size_t)i * (n + 1) + k) * C + c + l] += a[l];
                }
        }
    for (int i = 1; i < batch; i++)
        for (int j = 0; j < (n + 1) * C; j++) sums[j] += sums[(size_t)i * (n + 1) * C + j];
    for (int k = 0; k < n; k++) {
        const double *s1 = sums + n * C, *s2 = sums + k * C;
        for (int c = 0; c < C; c++)
            slope[k * C + c] = (REAL)(mean[k] ? rstd[k][c] * (s2[c] - mean[k][c] * s1[c]) : s2[c]);
        if (mean[k])
            norm_gradient(mean[k], rstd[k], b + k * C, s1, s2, (double)batch * pixels, C, coef + 3 * k * C);
        else {
            memset(coef + 3 * k * C, 0, 3 * C * sizeof(REAL));
            memcpy(coef + 3 * k * C, b + k * C, C * sizeof(REAL));
        }
    }
    free(sums);
    return 0;
}
#endif
