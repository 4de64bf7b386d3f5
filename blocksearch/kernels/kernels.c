/* The supernet's hot loops on a CPU; fused.py compiles and calls them, and says what each computes.
 *
 * Images are (B, H, W, C) in memory (channels_last); `ld` is the distance between two pixels, so
 * that a state may be a slice of a wider tensor. C is a multiple of LANES. A "unit" is ReLU,
 * depthwise and pointwise convolution; its BatchNorm is never run by itself: whoever reads the
 * unit's output z applies it as an affine map, and its gradient arrives as alpha g + beta z + gamma.
 * Work is divided statically over images, so a fixed number of threads gives fixed bits.
 *
 * A function that takes memory returns whether there was none; what it computed is then of no use.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifndef REAL
#define REAL float
#define INT int
#define LANES 8
#endif
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define MAX_KERNEL 7
#define TILE_PIXELS 64 /* rows are taken together up to this many pixels */
#define SUM_PIXELS 256 /* pixels between two additions in double precision */

typedef REAL vec __attribute__((vector_size(LANES * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));
typedef INT mask __attribute__((vector_size(LANES * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));

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

INLINE vec load(const REAL *p) { return *(const vec *)p; }
INLINE void store(REAL *p, vec v) { *(vec *)p = v; }
INLINE vec pick(mask m, vec a, vec b) { return (vec)(((mask)a & m) | ((mask)b & ~m)); }
INLINE vec relu(vec v) { return (vec)((mask)v & ~(v <= (REAL)0)); } /* NaN stays NaN */

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

/* out[x] (+)= sum_taps w[tap] in[x stride + tap], for n pixels of one row; w is (k k, C). */
INLINE void depthwise_taps(const REAL *in, long row, const REAL *w, REAL *out, int n, int stride,
                           int C, int k, int dilation, int accumulate) {
    for (int c = 0; c < C; c += LANES) {
        int x = 0;
        for (; x + 4 <= n; x += 4) {
            vec a[4];
            for (int q = 0; q < 4; q++) a[q] = accumulate ? load(out + (x + q) * C + c) : (vec){0};
            for (int i = 0; i < k; i++)
                for (int j = 0; j < k; j++) {
                    const REAL *p = in + i * dilation * row + (x * stride + j * dilation) * (long)C + c;
                    vec t = load(w + (i * k + j) * C + c);
                    for (int q = 0; q < 4; q++) a[q] += load(p + q * stride * C) * t;
                }
            for (int q = 0; q < 4; q++) store(out + (x + q) * C + c, a[q]);
        }
        for (; x < n; x++) {
            vec a = accumulate ? load(out + x * C + c) : (vec){0};
            for (int i = 0; i < k; i++)
                for (int j = 0; j < k; j++)
                    a += load(in + i * dilation * row + (x * stride + j * dilation) * (long)C + c) *
                         load(w + (i * k + j) * C + c);
            store(out + x * C + c, a);
        }
    }
}

/* gw[tap] += sum_x g[x] in[x stride + tap], for n pixels of one row. */
INLINE void depthwise_weights(const REAL *in, long row, const REAL *g, REAL *gw, int n, int stride,
                              int C, int k, int dilation) {
    for (int c = 0; c < C; c += LANES)
        for (int i = 0; i < k; i++) {
            vec a[MAX_KERNEL];
            for (int j = 0; j < k; j++) a[j] = load(gw + (i * k + j) * C + c);
            for (int x = 0; x < n; x++) {
                const REAL *p = in + i * dilation * row + x * stride * (long)C + c;
                vec t = load(g + x * C + c);
                for (int j = 0; j < k; j++) a[j] += load(p + j * dilation * C) * t;
            }
            for (int j = 0; j < k; j++) store(gw + (i * k + j) * C + c, a[j]);
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

static void taps(const REAL *in, long row, const REAL *w, REAL *out, int n, int stride, int C, int k,
                 int d, int accumulate) {
#define RUN(K, D)                                                              \
    if (stride == 1 && !accumulate) depthwise_taps(in, row, w, out, n, 1, C, K, D, 0); \
    else if (stride == 1) depthwise_taps(in, row, w, out, n, 1, C, K, D, 1);   \
    else depthwise_taps(in, row, w, out, n, stride, C, K, D, accumulate)
    FOR_KERNEL(k, d, RUN);
#undef RUN
}

static void tap_weights(const REAL *in, long row, const REAL *g, REAL *gw, int n, int stride, int C,
                        int k, int d) {
#define RUN(K, D) depthwise_weights(in, row, g, gw, n, stride, C, K, D)
    FOR_KERNEL(k, d, RUN);
#undef RUN
}

INLINE void matmul_block(const REAL *a, const REAL *w, REAL *out, int K, int N, int c, const int n) {
    vec s[8];
    for (int q = 0; q < n; q++) s[q] = (vec){0};
    for (int i = 0; i < K; i++) {
        vec t = load(w + i * N + c);
        for (int q = 0; q < n; q++) s[q] += a[q * K + i] * t;
    }
    for (int q = 0; q < n; q++) store(out + q * N + c, s[q]);
}

/* out (n, N) = a (n, K) w (K, N). */
static void matmul(const REAL *a, const REAL *w, REAL *out, int n, int K, int N) {
    int x = 0;
    for (; x + 8 <= n; x += 8)
        for (int c = 0; c < N; c += LANES) matmul_block(a + x * K, w, out + x * N, K, N, c, 8);
    for (; x + 4 <= n; x += 4)
        for (int c = 0; c < N; c += LANES) matmul_block(a + x * K, w, out + x * N, K, N, c, 4);
    for (; x < n; x++)
        for (int c = 0; c < N; c += LANES) matmul_block(a + x * K, w, out + x * N, K, N, c, 1);
}

/* gw (M, N) += g (n, M)^T d (n, N); M is a multiple of 4. */
static void matmul_weights(const REAL *g, const REAL *d, REAL *gw, int n, int M, int N) {
    int o = 0;
    for (; o + 8 <= M; o += 8)
        for (int c = 0; c < N; c += LANES) {
            vec a[8];
            for (int q = 0; q < 8; q++) a[q] = load(gw + (o + q) * N + c);
            for (int x = 0; x < n; x++) {
                vec t = load(d + x * N + c);
                for (int q = 0; q < 8; q++) a[q] += g[x * M + o + q] * t;
            }
            for (int q = 0; q < 8; q++) store(gw + (o + q) * N + c, a[q]);
        }
    for (; o < M; o += 4)
        for (int c = 0; c < N; c += LANES) {
            vec a[4];
            for (int q = 0; q < 4; q++) a[q] = load(gw + (o + q) * N + c);
            for (int x = 0; x < n; x++) {
                vec t = load(d + x * N + c);
                for (int q = 0; q < 4; q++) a[q] += g[x * M + o + q] * t;
            }
            for (int q = 0; q < 4; q++) store(gw + (o + q) * N + c, a[q]);
        }
}

/* Adds sum (z - pivot) and sum (z - pivot)^2 of n pixels (n, C) to sum (2, C). */
static void add_moments(const REAL *z, const REAL *pivot, REAL *sum, int n, int C) {
    for (int c = 0; c < C; c += LANES) {
        vec p = load(pivot + c), m = load(sum + c), q = load(sum + C + c);
        for (int x = 0; x < n; x++) {
            vec v = load(z + x * (long)C + c) - p;
            m += v;
            q += v * v;
        }
        store(sum + c, m);
        store(sum + C + c, q);
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

/* gz = coef[0] g + coef[1] z + coef[2] for n pixels, with coef (3, C). */
static void norm_rows(const REAL *coef, const REAL *g, long ldg, const REAL *z, REAL *gz, int n, int C) {
    for (int c = 0; c < C; c += LANES) {
        vec a = load(coef + c), b = load(coef + C + c), k = load(coef + 2 * C + c);
        for (int x = 0; x < n; x++) store(gz + x * C + c, a * load(g + x * ldg + c) + b * load(z + x * C + c) + k);
    }
}

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

INLINE int rows_of(int width) { return width >= TILE_PIXELS ? 1 : TILE_PIXELS / width; }
INLINE int halved(int side, int stride) { return (side + stride - 1) / stride; }
INLINE int border(const Unit *u) { return u->dilation * (u->kernel - 1) / 2; }

/* d = the unit's depthwise convolution, for output rows y to y + rows. */
static void depthwise_rows(const Unit *u, const Shape *s, const REAL *in, const REAL *w, REAL *d, int y,
                           int rows) {
    int C = s->channels, W = s->width + 2 * s->pad, Wo = halved(s->width, s->stride);
    int lead = s->pad - border(u);
    for (int r = 0; r < rows; r++)
        taps(in + (((y + r) * s->stride + lead) * (long)W + lead) * C, (long)W * C, w,
             d + r * (long)Wo * C, Wo, s->stride, C, u->kernel, u->dilation, 0);
}

/* z, and its mean and 1 / std over the batch, for n units. */
EXPORT int forward_units(const Unit *units, int n, Shape s, double eps) {
    int C = s.channels, Ho = halved(s.height, s.stride), Wo = halved(s.width, s.stride);
    size_t padded = (size_t)(s.height + 2 * s.pad) * (s.width + 2 * s.pad) * C;
    int rows = rows_of(Wo);
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
                matmul(d, pw, z, pixels, C, C);
                add_moments(z, u->z + (size_t)b * Ho * Wo * C, sum, pixels, C);
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

/* What turns the gradient g on b (z - mean) rstd into that on z: coef (3, C); see fused.py.
 * s1 = sum g, s2 = sum g z over `count` pixels. */
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

/* The gradients of n units: of their weights where asked for, and of their inputs.
 *
 * Units without `scale` read a state: gx of the last of those that share an input receives the sum
 * of all their gradients, through the ReLU, on top of what is there. Units with `scale` read the
 * normalised output of another unit, whose gradient is left in gx and gx_coef. */
EXPORT int backward_units(const Unit *units, int n, Shape s) {
    int C = s.channels, Ho = halved(s.height, s.stride), Wo = halved(s.width, s.stride);
    int W = s.width + 2 * s.pad, rows = rows_of(Wo);
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
                    norm_rows(u->coef, u->g + at * u->ldg, u->ldg, u->z + at * C, gz, pixels, C);
                    matmul(gz, u->pw, gd, pixels, C, C);
                    for (int r = 0; r < count; r++) {
                        REAL *to = up + (((y + r) * s.stride + s.pad) * (long)W + s.pad) * C;
                        for (int x = 0; x < Wo; x++)
                            for (int c = 0; c < C; c += LANES)
                                store(to + x * s.stride * (long)C + c, load(gd + (r * Wo + x) * (long)C + c));
                    }
                    if (!u->gdw) continue;
                    depthwise_rows(u, &s, in, dw, d, y, count);
                    matmul_weights(gz, d, gpw, pixels, C, C);
                    for (int r = 0; r < count; r++)
                        tap_weights(in + (((y + r) * s.stride + lead) * (long)W + lead) * C, (long)W * C,
                                    gd + r * (long)Wo * C, gdw, Wo, s.stride, C, u->kernel, u->dilation);
                }
                for (int y = 0; y < s.height; y++)
                    taps(up + ((y + lead) * (long)W + lead) * C, (long)W * C, mirror,
                         gx + y * (long)s.width * C, s.width, 1, C, u->kernel, u->dilation, 1);
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

/* ReLU and a 1x1 convolution from K to C channels: z, its mean and 1 / std. x and z are dense. */
EXPORT int forward_pointwise(const REAL *x, const REAL *w, REAL *z, REAL *mean, REAL *rstd, int batch,
                             long pixels, int K, int C, int threads, double eps) {
    REAL *sums = calloc((size_t)batch * 2 * C, sizeof(REAL)), *packed = malloc(sizeof(REAL) * K * C);
    int failed = !sums || !packed, images = failed ? 0 : batch;
    for (int o = 0; o < C && !failed; o++)
        for (int i = 0; i < K; i++) packed[i * C + o] = w[o * K + i];
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : failed)
    for (int b = 0; b < images; b++) {
        REAL *a = scratch((size_t)TILE_PIXELS * K);
        if (!a) {
            failed = 1;
            continue;
        }
        for (long first = 0; first < pixels; first += TILE_PIXELS) {
            int n = first + TILE_PIXELS <= pixels ? TILE_PIXELS : (int)(pixels - first);
            const REAL *from = x + (b * pixels + first) * K;
            for (int i = 0; i < n * K; i += LANES) store(a + i, relu(load(from + i)));
            matmul(a, packed, z + (b * pixels + first) * C, n, K, C);
            add_moments(z + (b * pixels + first) * C, z + b * pixels * C, sums + (size_t)b * 2 * C, n, C);
        }
    }
    if (!failed) moments(z, sums, (size_t)2 * C, batch, pixels, eps, C, mean, rstd);
    free(sums);
    free(packed);
    return failed;
}

/* The gradients of that: gx is written, gw added to where it is not NULL. */
EXPORT int backward_pointwise(const REAL *x, const REAL *w, const REAL *z, const REAL *g, const REAL *coef,
                              REAL *gx, REAL *gw, int batch, long pixels, int K, int C, int threads) {
    REAL *partial = calloc((size_t)threads * K * C, sizeof(REAL));
    int failed = !partial, parts = failed ? 0 : threads;
#pragma omp parallel for schedule(static, 1) num_threads(threads) reduction(| : failed)
    for (int t = 0; t < parts; t++) {
        REAL *a = scratch((size_t)TILE_PIXELS * (K + C));
        if (!a) {
            failed = 1;
            continue;
        }
        REAL *gz = a + TILE_PIXELS * K;
        long start = (long)batch * t / threads * pixels, end = (long)batch * (t + 1) / threads * pixels;
        for (long first = start; first < end; first += TILE_PIXELS) {
            int n = first + TILE_PIXELS <= end ? TILE_PIXELS : (int)(end - first);
            const REAL *from = x + first * K;
            REAL *to = gx + first * K;
            norm_rows(coef, g + first * C, C, z + first * C, gz, n, C);
            matmul(gz, w, to, n, C, K);
            for (int i = 0; i < n * K; i += LANES) {
                vec v = load(from + i);
                store(to + i, (vec)((mask)load(to + i) & ~(v <= (REAL)0)));
                if (gw) store(a + i, relu(v));
            }
            if (gw) matmul_weights(gz, a, partial + (size_t)t * K * C, n, C, K);
        }
    }
    if (gw && !failed)
        for (int t = 0; t < threads; t++)
            for (int i = 0; i < K * C; i++) gw[i] += partial[(size_t)t * K * C + i];
    free(partial);
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
