/* Products of a few rows with weights as torch stores them, and attention of a few rows over kept keys.

   Every number that comes out is summed in an order that depends on its own row alone, never on how many rows stand beside it:
   lanes run along the inputs, and are added up in one fixed way. So a row of a draft tree has the bits that it has by itself.
   A weight is read, and decoded if it has 16 bits, once for all rows. All sums are float32. */

#include "vectors.h"

#if LANES == 16
#define MOST 6 /* rows whose sums fit the registers */
#else
#define MOST 2
#endif
#define WIDE 4 /* outputs that are summed side by side */

typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));

/* The lanes of a vector added up to four. */
INLINE f32x4 fold(f32s a) {
#if LANES == 16
    f32x8 x = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    f32x8 x = a;
#endif
    return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
}

/* The sums of four vectors, each in the same order. */
INLINE f32x4 sums(f32s first, f32s second, f32s third, f32s fourth) {
    f32x4 a = fold(first), b = fold(second), c = fold(third), d = fold(fourth);
    f32x4 s = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    f32x4 t = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(s, t, 0, 1, 4, 5) + __builtin_shufflevector(s, t, 2, 3, 6, 7);
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
INLINE void product(const float *weights, const float *rows, ptrdiff_t count, ptrdiff_t ins, float *out, ptrdiff_t outs, int valid) {
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

INLINE void decode_bfloat16(const uint16_t *from, float *to, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += LANES) store(to + i, load_bfloat16(from + i));
}

/* A tile of one row, whose weights are decoded where they are multiplied. */
INLINE void tile_of_bfloat16(const uint16_t *weights, const float *row, ptrdiff_t ins, float *out) {
    f32s added[WIDE] = {};
    for (ptrdiff_t i = 0; i < ins; i += LANES)
        UNROLL for (int n = 0; n < WIDE; n++) added[n] += load_bfloat16(weights + n * ins + i) * load(row + i);
    f32x4 found = sums(added[0], added[1], added[2], added[3]);
    memcpy(out, &found, sizeof found);
}

/* rows [count, ins] times weight [outs, ins] -> out [count, outs]; outs at least 4, ins a multiple of LANES. */
void lossless_stored(int kind, const void *weight, const float *rows, float *out, ptrdiff_t count, ptrdiff_t ins, ptrdiff_t outs, int threads) {
    ptrdiff_t tiles = (outs + WIDE - 1) / WIDE;
#pragma omp parallel num_threads(threads)
    {
        float decoded[kind == FLOAT32 ? 1 : WIDE * ins];
#pragma omp for schedule(static)
        for (ptrdiff_t t = 0; t < tiles; t++) {
            /* the last tile may begin before the one ahead of it ends: the same numbers are written twice */
            ptrdiff_t n = t * WIDE + WIDE <= outs ? t * WIDE : outs - WIDE;
            const float *weights = (const float *)weight + n * ins;
            if (kind == BFLOAT16 && count == 1) {
                tile_of_bfloat16((const uint16_t *)weight + n * ins, rows, ins, out + n);
                continue;
            }
            if (kind == BFLOAT16) {
                decode_bfloat16((const uint16_t *)weight + n * ins, decoded, WIDE * ins);
                weights = decoded;
            }
            product(weights, rows, count, ins, out + n, outs, WIDE);
        }
    }
}

/* out[r] = rows[r] / sqrt(mean(rows[r]^2) + eps) * (weight + offset), for rows [count, dim] and a weight [dim] of one kind. */
void lossless_norm(int kind, const void *rows, const void *weight, float offset, float eps, void *out, ptrdiff_t count, ptrdiff_t dim) {
    ptrdiff_t whole = dim - dim % LANES;
    for (ptrdiff_t r = 0; r < count; r++) {
        const float *row = (const float *)rows + r * dim;
        const uint16_t *halves = (const uint16_t *)rows + r * dim;
        f32s squares = {}, none = {};
        for (ptrdiff_t i = 0; i < whole; i += LANES) {
            f32s x = kind == BFLOAT16 ? load_bfloat16(halves + i) : load(row + i);
            squares += x * x;
        }
        float sum = sums(squares, none, none, none)[0];
        for (ptrdiff_t i = whole; i < dim; i++) {
            float x = kind == BFLOAT16 ? as_float(halves[i]) : row[i];
            sum += x * x;
        }
        float scale = 1 / sqrtf(sum / dim + eps);
        for (ptrdiff_t i = 0; i < whole; i += LANES) {
            if (kind == BFLOAT16)
                store_bfloat16((uint16_t *)out + r * dim + i, load_bfloat16(halves + i) * scale * (load_bfloat16((const uint16_t *)weight + i) + offset));
            else store((float *)out + r * dim + i, load(row + i) * scale * (load((const float *)weight + i) + offset));
        }
        for (ptrdiff_t i = whole; i < dim; i++) {
            if (kind == BFLOAT16)
                ((uint16_t *)out)[r * dim + i] = as_bfloat16(as_float(halves[i]) * scale * (as_float(((const uint16_t *)weight)[i]) + offset));
            else ((float *)out)[r * dim + i] = row[i] * scale * (((const float *)weight)[i] + offset);
        }
    }
}

/* e^x for x <= 0, to about one part in ten million. */
INLINE f32s exponential(f32s x) {
    const float magic = 12582912.0f; /* what is added to it is rounded to a whole number */
    f32s least = x - x - 87.0f;
    i32s more = x > least;
    x = (f32s)(((i32s)x & more) | ((i32s)least & ~more));
    f32s turns = (x * 1.44269504f + magic) - magic;
    f32s rest = x - turns * 0.693145752f;
    rest = rest - turns * 1.42860677e-6f;
    f32s found = rest * 1.98756915e-4f + 1.39819995e-3f;
    found = found * rest + 8.33345205e-3f;
    found = found * rest + 4.16657962e-2f;
    found = found * rest + 1.66666655e-1f;
    found = found * rest + 5.0e-1f;
    found = found * rest * rest + rest + 1.0f;
    return found * (f32s)((__builtin_convertvector(turns, i32s) + 127) << 23);
}

/* What a row sees: keys `start` to `total`, of which those from `past` on are the rows on its path. */
struct reach {
    ptrdiff_t start, total;
    const int32_t *path;
};

INLINE f32s load_kind(int kind, const void *at, ptrdiff_t i) {
    return kind == BFLOAT16 ? load_bfloat16((const uint16_t *)at + i) : load((const float *)at + i);
}

INLINE void add_values(int kind, const void *values, ptrdiff_t stride, ptrdiff_t keys, const float *weights, ptrdiff_t width, int count,
                       float *out, ptrdiff_t dim) {
    f32s added[MOST][2] = {};
    for (ptrdiff_t j = 0; j < keys; j++) {
        f32s first = load_kind(kind, values, j * stride), second = load_kind(kind, values, j * stride + LANES);
        UNROLL for (int r = 0; r < count; r++) {
            float weight = weights[r * width + j];
            added[r][0] += first * weight;
            added[r][1] += second * weight;
        }
    }
    UNROLL for (int r = 0; r < count; r++) {
        store(out + r * dim, added[r][0]);
        store(out + r * dim + LANES, added[r][1]);
    }
}

/* Softmax attention of the rows of a draft tree, each over the keys of the past and of the rows on its own path.

   query [heads, rows, dim], keys and values [kv_heads, past + rows, dim], by strides in numbers; dim a multiple of 2 * LANES.
   starts, lengths [rows]: the first key that a row sees (NULL: all are seen), and how many rows its path has; paths [rows, depth].
   out [rows, heads, dim]. scratch: [kv_heads * group * rows * (2 * dim + past + depth)] and [threads, 32 * dim] behind it. */
void lossless_attend(int kind, const void *query, const void *keys, const void *values, void *out, float *scratch,
                     const int32_t *starts, const int32_t *lengths, const int32_t *paths, float scale, ptrdiff_t heads,
                     ptrdiff_t kv_heads, ptrdiff_t rows, ptrdiff_t dim, ptrdiff_t past, ptrdiff_t depth, const ptrdiff_t *strides,
                     int threads) {
    ptrdiff_t size = kind == BFLOAT16 ? 2 : 4, group = heads / kv_heads, width = past + depth, each = group * rows;
    ptrdiff_t blocks = (past + 31) / 32, chunks = dim / (2 * LANES), parts = (each + MOST - 1) / MOST;
    float *asked = scratch, *scores = asked + heads * rows * dim, *added = scores + heads * rows * width;
    float *buffers = added + heads * rows * dim;
#define AT(base, head, row, which) ((const char *)(base) + ((head) * strides[which] + (row) * strides[(which) + 1]) * size)
#pragma omp parallel num_threads(threads)
    {
        float *own = buffers + omp_get_thread_num() * 32 * dim;
        /* 1. queries in float32, those that share keys side by side: [kv_heads, rows, group, dim] */
#pragma omp for schedule(static)
        for (ptrdiff_t head = 0; head < heads; head++)
            for (ptrdiff_t r = 0; r < rows; r++) {
                float *to = asked + (((head / group) * rows + r) * group + head % group) * dim;
                for (ptrdiff_t i = 0; i < dim; i += LANES) store(to + i, load_kind(kind, AT(query, head, r, 0), i));
            }
        /* 2. scores: of all rows with 32 keys of the past at a time, and of each row with its own path */
#pragma omp for collapse(2) schedule(static) nowait
        for (ptrdiff_t kv = 0; kv < kv_heads; kv++)
            for (ptrdiff_t b = 0; b < blocks; b++) {
                ptrdiff_t first = b * 32, count = past - first < 32 ? past - first : 32;
                for (ptrdiff_t j = 0; j < count; j++)
                    for (ptrdiff_t i = 0; i < dim; i += LANES) store(own + j * dim + i, load_kind(kind, AT(keys, kv, first + j, 2), i));
                for (ptrdiff_t j = 0; j < count; j += WIDE)
                    product(own + j * dim, asked + kv * each * dim, each, dim, scores + kv * each * width + first + j, width,
                            count - j < WIDE ? (int)(count - j) : WIDE);
            }
#pragma omp for collapse(2) schedule(static)
        for (ptrdiff_t kv = 0; kv < kv_heads; kv++)
            for (ptrdiff_t r = 0; r < rows; r++)
                for (ptrdiff_t d = 0; d < lengths[r]; d++) {
                    for (ptrdiff_t i = 0; i < dim; i += LANES)
                        store(own + i, load_kind(kind, AT(keys, kv, past + paths[r * depth + d], 2), i));
                    product(own, asked + (kv * rows + r) * group * dim, group, dim,
                            scores + (kv * rows + r) * group * width + past + d, width, 1);
                }
        /* 3. softmax, lane by lane from the first key that is seen */
#pragma omp for schedule(static)
        for (ptrdiff_t h = 0; h < heads * rows; h++) {
            ptrdiff_t r = h / group % rows, start = starts ? starts[r] : 0, count = past + lengths[r] - start;
            float *score = scores + h * width + start, most = -INFINITY;
            for (ptrdiff_t j = 0; j < count; j++) most = score[j] > most ? score[j] : most;
            f32s total = {};
            for (ptrdiff_t j = 0; j < count; j += LANES) {
                float some[LANES];
                ptrdiff_t n = count - j < LANES ? count - j : LANES;
                memset(some, 0, sizeof some);
                memcpy(some, score + j, n * sizeof(float));
                store(some, exponential((load(some) - most) * scale));
                memset(some + n, 0, (LANES - n) * sizeof(float));
                total += load(some);
                memcpy(score + j, some, n * sizeof(float));
            }
            f32s none = {};
            float sum = sums(total, none, none, none)[0];
            for (ptrdiff_t j = 0; j < count; j++) score[j] /= sum;
            memset(scores + h * width, 0, start * sizeof(float)); /* keys before the first are multiplied with nothing */
        }
        /* 4. values: of the past for all rows, key after key, and of each row's path behind them */
#pragma omp for collapse(3) schedule(static)
        for (ptrdiff_t kv = 0; kv < kv_heads; kv++)
            for (ptrdiff_t p = 0; p < parts; p++)
                for (ptrdiff_t c = 0; c < chunks; c++) {
                    ptrdiff_t h = kv * each + p * MOST, i = c * 2 * LANES, count = each - p * MOST < MOST ? each - p * MOST : MOST;
                    const void *from = AT(values, kv, 0, 4) + i * size;
                    float *to = added + h * dim + i, *weights = scores + h * width;
#define ADD(rows_) add_values(kind, from, strides[5], past, weights, width, rows_, to, dim)
                    switch (count) {
                    case 1: ADD(1); break;
#if MOST > 2
                    case 2: ADD(2); break;
                    case 3: ADD(3); break;
                    case 4: ADD(4); break;
                    case 5: ADD(5); break;
#endif
                    default: ADD(MOST);
                    }
                    for (ptrdiff_t n = 0; n < count; n++) {
                        ptrdiff_t r = (h + n) / group % rows, head = kv * group + (h + n) % group;
                        f32s sum[2] = {load(to + n * dim), load(to + n * dim + LANES)};
                        for (ptrdiff_t d = 0; d < lengths[r]; d++) {
                            const void *value = AT(values, kv, past + paths[r * depth + d], 4);
                            float weight = weights[n * width + past + d];
                            sum[0] += load_kind(kind, value, i) * weight;
                            sum[1] += load_kind(kind, value, i + LANES) * weight;
                        }
                        store(to + n * dim, sum[0]);
                        store(to + n * dim + LANES, sum[1]);
                        for (ptrdiff_t l = 0; l < 2 * LANES; l++) {
                            ptrdiff_t where = (r * heads + head) * dim + i + l;
                            if (kind == BFLOAT16) ((uint16_t *)out)[where] = as_bfloat16(to[n * dim + l]);
                            else ((float *)out)[where] = to[n * dim + l];
                        }
                    }
                }
    }
}
