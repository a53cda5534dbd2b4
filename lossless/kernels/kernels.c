/* What is called from Python (kernels.py): products of rows with weights in panels, and with weights as torch stores them; norms; and
   attention of a few rows over kept keys.

   Every number that comes out is summed in an order that depends on its own row alone, never on how many rows stand beside it. So a row
   of a draft tree has the bits that it has by itself. All sums are float32. */

#include "attention.h"

#if LANES == 16
#define MOST 6 /* rows whose sums with four outputs fit the registers */
#else
#define MOST 2
#endif
#define WIDE 4 /* outputs that are summed side by side */

int lossless_lanes(void) { return LANES; }

int lossless_exact(void) {
#if defined(EXACT)
    return 1;
#else
    return 0;
#endif
}

int lossless_pairs(void) {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

/* out[r][0..3] = rows[r] . weights[0..3], for `count` rows, which is known where this is compiled. */
INLINE void tile(const float *weights, const float *rows, ptrdiff_t ins, int count, float *out, ptrdiff_t outs, int valid) {
    f32s added[WIDE][MOST] = {};
    for (ptrdiff_t i = 0; i < ins; i += LANES) {
        f32s row[MOST];
        UNROLL for (int r = 0; r < count; r++) row[r] = load(rows + r * ins + i);
        UNROLL for (int n = 0; n < WIDE; n++) {
            f32s weight = load(weights + n * ins + i);
            UNROLL for (int r = 0; r < count; r++) added[n][r] += weight * row[r];
        }
    }
    UNROLL for (int r = 0; r < count; r++) {
        f32x4 found = sums(added[0][r], added[1][r], added[2][r], added[3][r]);
        memcpy(out + r * outs, &found, valid * sizeof(float));
    }
}

/* The same for any number of rows. The weights of `valid` outputs are asked for; the memory behind `weights` holds four. */
INLINE void stored_product(const float *weights, const float *rows, ptrdiff_t count, ptrdiff_t ins, float *out, ptrdiff_t outs, int valid) {
    ptrdiff_t parts = (count + MOST - 1) / MOST; /* about equal ones */
    for (ptrdiff_t r = 0, some; parts > 0; r += some, parts--) {
        const float *from = rows + r * ins;
        float *to = out + r * outs;
        some = (count - r + parts - 1) / parts;
        switch (some) {
        case 1: tile(weights, from, ins, 1, to, outs, valid); break;
#if MOST > 2
        case 2: tile(weights, from, ins, 2, to, outs, valid); break;
        case 3: tile(weights, from, ins, 3, to, outs, valid); break;
        case 4: tile(weights, from, ins, 4, to, outs, valid); break;
        case 5: tile(weights, from, ins, 5, to, outs, valid); break;
#endif
        default: tile(weights, from, ins, MOST, to, outs, valid);
        }
    }
}

/* A tile of one row, whose weights are decoded where they are multiplied. */
INLINE void tile_of_halves(int kind, const uint16_t *weights, const float *row, ptrdiff_t ins, float *out) {
    f32s added[WIDE] = {};
    for (ptrdiff_t i = 0; i < ins; i += LANES)
        UNROLL for (int n = 0; n < WIDE; n++) added[n] += load_kind(kind, weights, n * ins + i) * load(row + i);
    f32x4 found = sums(added[0], added[1], added[2], added[3]);
    memcpy(out, &found, sizeof found);
}

/* rows [count, ins] times weight [outs, ins] -> out [count, outs]; outs at least 4, ins a multiple of LANES. */
void lossless_stored(int kind, const void *weight, const float *rows, float *out, ptrdiff_t count, ptrdiff_t ins, ptrdiff_t outs, int threads) {
    ptrdiff_t tiles = (outs + WIDE - 1) / WIDE;
    struct team team = {0};
#pragma omp parallel num_threads(threads)
    {
        float decoded[kind == FLOAT32 ? 1 : WIDE * ins];
#pragma omp for schedule(static) nowait
        for (ptrdiff_t t = 0; t < tiles; t++) {
            /* the last tile may begin before the one ahead of it ends: the same numbers are written twice */
            ptrdiff_t n = t * WIDE + WIDE <= outs ? t * WIDE : outs - WIDE;
            const float *weights = (const float *)weight + n * ins;
            if (kind != FLOAT32) {
                const uint16_t *halves = (const uint16_t *)weight + n * ins;
                if (count == 1) {
                    if (kind == BFLOAT16) tile_of_halves(BFLOAT16, halves, rows, ins, out + n);
                    else tile_of_halves(FLOAT16, halves, rows, ins, out + n);
                    continue;
                }
                widen(kind, halves, WIDE * ins, decoded);
                weights = decoded;
            }
            stored_product(weights, rows, count, ins, out + n, outs, WIDE);
        }
        wait_for_all(&team);
    }
}

/* out[r] = rows[r] / sqrt(mean(rows[r]^2) + eps) * (weight + offset), for rows [count, dim] and a weight [dim] of one kind. */
void lossless_norm(int kind, const void *rows, const void *weight, float offset, float eps, void *out, ptrdiff_t count, ptrdiff_t dim) {
    float row[dim], factors[dim];
    ptrdiff_t size = bytes_of(kind);
    widen(kind, weight, dim, factors);
    for (ptrdiff_t i = 0; i < dim; i++) factors[i] += offset;
    for (ptrdiff_t r = 0; r < count; r++) {
        widen(kind, (const char *)rows + r * dim * size, dim, row);
        normalize(factors, eps, row, dim, row);
        narrow(kind, row, dim, (char *)out + r * dim * size);
    }
}

/* Attention (attention.h). query [heads, rows, dim] by strides, the first two of `strides`; then those of keys and of values.
   out [rows, heads, dim]. scratch: [2 * heads * rows * dim], and what `attention_scratch` says behind it. */
void lossless_attend(int kind, const void *query, const void *keys, const void *values, void *out, float *scratch,
                     const int32_t *starts, const int32_t *lengths, const int32_t *paths, float scale, ptrdiff_t heads,
                     ptrdiff_t kv_heads, ptrdiff_t rows, ptrdiff_t dim, ptrdiff_t past, ptrdiff_t depth, const ptrdiff_t *strides,
                     int threads) {
    struct attention a = {kind, heads, kv_heads, rows, dim, past, depth, scale, keys, values, {strides[2], strides[3]}, {strides[4], strides[5]},
                          starts, lengths, paths};
    ptrdiff_t size = bytes_of(kind), group = heads / kv_heads, numbers = heads * rows * dim;
    float *asked = scratch, *found = kind == FLOAT32 ? out : asked + numbers;
    struct team team = {0};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) nowait
        for (ptrdiff_t head = 0; head < heads; head++)
            for (ptrdiff_t r = 0; r < rows; r++) {
                const void *from = (const char *)query + (head * strides[0] + r * strides[1]) * size;
                float *to = asked + (((head / group) * rows + r) * group + head % group) * dim;
                for (ptrdiff_t i = 0; i < dim; i += LANES) store(to + i, load_kind(kind, from, i));
            }
        wait_for_all(&team);
        attend(&team, &a, asked, asked + 2 * numbers, found);
        wait_for_all(&team);
        if (kind != FLOAT32)
#pragma omp for schedule(static) nowait
            for (ptrdiff_t i = 0; i < numbers; i += LANES) store_kind(kind, out, i, load(found + i));
        wait_for_all(&team);
    }
}

/* Of `count` stores [heads, capacity, bytes of a row] the rows at these places behind `past` others move up to their end, in this order: places
   rise, so that none is overwritten before it has moved. */
void lossless_move(char *const *stores, ptrdiff_t count, ptrdiff_t heads, ptrdiff_t capacity, ptrdiff_t bytes, ptrdiff_t past, const int64_t *places,
                   ptrdiff_t moving) {
    for (ptrdiff_t i = 0; i < count; i++)
        for (ptrdiff_t head = 0; head < heads; head++) {
            char *own = stores[i] + (head * capacity + past) * bytes;
            for (ptrdiff_t n = 0; n < moving; n++)
                if (places[n] != n) memcpy(own + n * bytes, own + places[n] * bytes, bytes);
        }
}
