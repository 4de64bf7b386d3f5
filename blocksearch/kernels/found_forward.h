/* A found cell forward: one pass over a state computes it and all that its ops put out. */
#ifndef FOUND_FORWARD_H
#define FOUND_FORWARD_H
#include "state.h"

/* One tile of an op's output. */
static void put_out(const State *s, const Leaving *op, const Weights *w, int y, int rows, REAL *z, REAL *tile) {
    long n = rows * out_width(s->image, op), N = op->outputs, ldo = padded(N), ld, C = s->C, K = s->image->channels;
    REAL *out = tile + n * padded(op->inputs) + LANES;
    if (is_pool(op)) {
        for (int r = 0; r < rows; r++)
            pool_row(s->raw, op->kind == MAX_POOL, y + r, op->stride, s->image->height, s->image->width, C, out,
                     tile + r * out_width(s->image, op) * C);
        store_rows(tile, C, z, n, N);
        return;
    }
    const REAL *a = columns(s, op, w, y, rows, tile, &ld);
    if (op->kind == UNIT) {
        int whole = N == ldo;
        product(a, ld, w->pw, whole ? z : out, ldo, n, op->inputs, ldo);
        if (!whole) store_rows(out, ldo, z, n, N);
        return;
    }
    for (int r = 0; r < rows; r++) { /* CONCAT, stride 1 */
        long W = s->image->width;
        for (long x = 0; x < W; x++) {
            REAL *to = out + (r * W + x) * ldo;
            for (long c = 0; c < C; c += LANES) store(to + c, load(pixel(s, y + r, x) + c));
            for (long c = 0; c < C; c += LANES) store_some(to + K + c, load(a + (r * W + x) * C + c), K - c);
        }
    }
    store_rows(out, ldo, z, n, N);
}

/* The state from its terms, kept in `out` unless that is NULL, and what every op puts out, with the
 * BatchNorm of that as an affine map. */
EXPORT int forward_state(const Term *terms, int n, const Leaving *ops, int m, REAL *out, long ldo, Image image) {
    long C = padded(image.channels), pixels = image.height * image.width;
    size_t room = 0, tile = 0, *at = calloc(m + 1, sizeof(size_t));
    int activated = 0, pools = 0;
    for (int k = 0; k < m && at; k++) {
        at[k + 1] = at[k] + 2 * ops[k].outputs;
        if (tile_size(&image, ops + k) > tile) tile = tile_size(&image, ops + k);
        activated |= reads_activated(ops + k);
        pools |= is_pool(ops + k);
    }
    room = (pixels + (activated ? bordered(&image) : 0)) * C + 2 * LANES + tile;
    REAL *memory = malloc((all_weights(ops, m, C) + 1) * sizeof(REAL));
    Weights *weights = malloc((m + 1) * sizeof(Weights));
    REAL *sums = at ? calloc(image.batch * at[m] + 1, sizeof(REAL)) : NULL;
    int failed = !at || !memory || !weights || !sums;
    long images = failed ? 0 : image.batch;
    for (size_t k = 0, used = 0; k < (size_t)m && !failed; used += weights_size(ops + k, C), k++)
        weights[k] = pack_weights(ops + k, image.channels, memory + used);
#pragma omp parallel for schedule(static) num_threads(image.threads) reduction(| : failed)
    for (long b = 0; b < images; b++) {
        State s = {&image, C, image.width + 2 * image.pad, pixels, scratch(room), NULL};
        if (!s.raw) {
            failed = 1;
            continue;
        }
        s.in = s.raw + pixels * C;
        assemble(&s, terms, n, b, out, ldo, pools, activated);
        REAL *tiles = s.in + (activated ? bordered(&image) * C + 2 * LANES : 0);
        for (int k = 0; k < m; k++) {
            const Leaving *op = ops + k;
            long Ho = out_height(&image, op), Wo = out_width(&image, op), N = op->outputs;
            REAL *first = op->z + b * Ho * Wo * N;
            int step = tile_rows(Wo);
            for (long y = 0; y < Ho; y += step) {
                int rows = y + step <= Ho ? step : Ho - y;
                REAL *z = first + y * Wo * N;
                put_out(&s, op, weights + k, y, rows, z, tiles);
                if (op->mean) add_moments(z, N, first, sums + b * at[m] + at[k], rows * Wo, N);
            }
        }
    }
    for (int k = 0; k < m && !failed; k++) {
        const Leaving *op = ops + k;
        long count = out_height(&image, op) * out_width(&image, op);
        if (!op->mean) continue;
        moments(op->z, sums + at[k], at[m], image.batch, count, op->eps, op->outputs, op->mean, op->rstd);
        double values = (double)count * image.batch;
        for (long c = 0; c < op->outputs; c++) {
            if (op->running_mean) {
                double var = 1.0 / ((double)op->rstd[c] * op->rstd[c]) - op->eps;
                op->running_mean[c] += (REAL)(op->momentum * (op->mean[c] - op->running_mean[c]));
                op->running_var[c] += (REAL)(op->momentum * (var * values / (values - 1) - op->running_var[c]));
            }
            op->scale[c] = op->rstd[c] * (op->gamma ? op->gamma[c] : 1);
            op->shift[c] = (op->beta ? op->beta[c] : 0) - op->mean[c] * op->scale[c];
        }
    }
    free(at);
    free(sums);
    free(weights);
    free(memory);
    return failed;
}

#endif
