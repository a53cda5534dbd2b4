/* Softmax attention of the rows of a draft tree, each over the keys of the past and of the rows on its own path.

   A score is summed from the first dimension to the last in a lane of its own, and values are added key after key: a row has the bits
   that it has by itself, wherever its keys stand. */

#pragma once
#include "panels.h"
#include "team.h"

struct attention {
    int kind; /* of keys and values */
    ptrdiff_t heads, kv_heads, rows, dim, past, depth;
    float scale;
    const void *keys, *values;       /* [kv_heads, past + rows, dim], by strides in numbers; dim a multiple of 2 * LANES */
    ptrdiff_t key_strides[2], value_strides[2];
    const int32_t *starts, *lengths; /* [rows]: the first key that a row sees (NULL: all are seen), and how many rows its path has */
    const int32_t *paths;            /* [rows, depth] */
};

/* Numbers of scratch that so many threads need: scores, what values have added up to, and a panel of keys for each. */
INLINE ptrdiff_t attention_scratch(const struct attention *a, int threads) {
    return a->heads * a->rows * (a->past + a->depth + a->dim) + threads * PANEL * a->dim;
}

INLINE const void *key_at(const struct attention *a, ptrdiff_t head, ptrdiff_t row) {
    return (const char *)a->keys + (head * a->key_strides[0] + row * a->key_strides[1]) * bytes_of(a->kind);
}

INLINE const void *value_at(const struct attention *a, ptrdiff_t head, ptrdiff_t row) {
    return (const char *)a->values + (head * a->value_strides[0] + row * a->value_strides[1]) * bytes_of(a->kind);
}

/* One key among those of a panel, which are to be multiplied as weights are. */
INLINE void lay_key(const struct attention *a, const void *key, float *panel, ptrdiff_t place) {
    for (ptrdiff_t i = 0; i < a->dim; i++) panel[i * PANEL + place] = number_at(a->kind, key, i);
}

/* out[r] = the sum of weights[r] * values, from the first key to the last, for `count` rows, which is known where this is compiled. */
INLINE void add_values(int kind, const void *values, ptrdiff_t stride, ptrdiff_t keys, const float *weights, ptrdiff_t width, int count,
                       float *out, ptrdiff_t dim) {
    f32s added[ROWS][2] = {};
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

/* By all threads of a parallel region; what is found is not waited for. asked: queries [kv_heads, rows, group, dim]; out [rows, heads, dim]. */
static void attend(struct team *team, const struct attention *a, const float *asked, float *scratch, float *out) {
    ptrdiff_t rows = a->rows, dim = a->dim, past = a->past, width = past + a->depth, group = a->heads / a->kv_heads, each = group * rows;
    ptrdiff_t blocks = (past + PANEL - 1) / PANEL, chunks = dim / (2 * LANES), parts = (each + ROWS - 1) / ROWS;
    float *scores = scratch, *added = scores + a->heads * rows * width, *own = added + a->heads * rows * dim + omp_get_thread_num() * PANEL * dim;
    /* 1. scores: of all rows with a panel of the past's keys at a time, and of each row with its own path */
#pragma omp for collapse(2) schedule(static) nowait
    for (ptrdiff_t kv = 0; kv < a->kv_heads; kv++)
        for (ptrdiff_t b = 0; b < blocks; b++) {
            ptrdiff_t first = b * PANEL, count = past - first < PANEL ? past - first : PANEL;
            if (count < PANEL) memset(own, 0, PANEL * dim * sizeof(float));
            for (ptrdiff_t j = 0; j < count; j++) lay_key(a, key_at(a, kv, first + j), own, j);
            product_NUMBERS((const uint32_t *)own, 0, NULL, 0, NULL, (const char *)(asked + kv * each * dim), NULL, each, dim, dim, NULL, 0,
                            scores + kv * each * width, first, first + count, width);
        }
#pragma omp for collapse(2) schedule(static) nowait
    for (ptrdiff_t kv = 0; kv < a->kv_heads; kv++)
        for (ptrdiff_t r = 0; r < rows; r++)
            for (ptrdiff_t first = 0; first < a->lengths[r]; first += PANEL) {
                ptrdiff_t count = a->lengths[r] - first < PANEL ? a->lengths[r] - first : PANEL;
                memset(own, 0, PANEL * dim * sizeof(float));
                for (ptrdiff_t j = 0; j < count; j++) lay_key(a, key_at(a, kv, past + a->paths[r * a->depth + first + j]), own, j);
                product_NUMBERS((const uint32_t *)own, 0, NULL, 0, NULL, (const char *)(asked + (kv * rows + r) * group * dim), NULL, group, dim, dim, NULL, 0,
                                scores + (kv * rows + r) * group * width, past + first, past + first + count, width);
            }
    wait_for_all(team);
    /* 2. softmax, lane by lane from the first key that is seen */
#pragma omp for schedule(static) nowait
    for (ptrdiff_t h = 0; h < a->heads * rows; h++) {
        ptrdiff_t r = h / group % rows, start = a->starts ? a->starts[r] : 0, count = past + a->lengths[r] - start;
        float *score = scores + h * width + start, most = largest_of(score, count, -INFINITY);
        f32s total = {};
        for (ptrdiff_t j = 0; j < count; j += LANES) {
            float some[LANES];
            ptrdiff_t n = count - j < LANES ? count - j : LANES;
            memset(some, 0, sizeof some);
            memcpy(some, score + j, n * sizeof(float));
            store(some, exponential((load(some) - most) * a->scale));
            memset(some + n, 0, (LANES - n) * sizeof(float));
            total += load(some);
            memcpy(score + j, some, n * sizeof(float));
        }
        f32s none = {};
        float sum = sums(total, none, none, none)[0];
        for (ptrdiff_t j = 0; j < count; j++) score[j] /= sum;
        memset(scores + h * width, 0, start * sizeof(float)); /* keys before the first are multiplied with nothing */
    }
    wait_for_all(team);
    /* 3. values: of the past for all rows, key after key, and of each row's path behind them */
#pragma omp for collapse(3) schedule(static) nowait
    for (ptrdiff_t kv = 0; kv < a->kv_heads; kv++)
        for (ptrdiff_t p = 0; p < parts; p++)
            for (ptrdiff_t c = 0; c < chunks; c++) {
                ptrdiff_t h = kv * each + p * ROWS, i = c * 2 * LANES, count = each - p * ROWS < ROWS ? each - p * ROWS : ROWS;
                const char *from = (const char *)value_at(a, kv, 0) + i * bytes_of(a->kind);
                float *to = added + h * dim + i, *weights = scores + h * width;
#define ADD(n) case n: add_values(a->kind, from, a->value_strides[1], past, weights, width, n, to, dim); break;
                switch (count) {
                    ADD(1) ADD(2) ADD(3) ADD(4) ADD(5) ADD(6)
#if ROWS > 6
                    ADD(7) ADD(8) ADD(9) ADD(10) ADD(11) ADD(12)
#endif
                }
                for (ptrdiff_t n = 0; n < count; n++) {
                    ptrdiff_t r = (h + n) / group % rows, head = kv * group + (h + n) % group;
                    f32s sum[2] = {load(to + n * dim), load(to + n * dim + LANES)};
                    for (ptrdiff_t d = 0; d < a->lengths[r]; d++) {
                        const void *value = value_at(a, kv, past + a->paths[r * a->depth + d]);
                        float weight = weights[n * width + past + d];
                        sum[0] += load_kind(a->kind, value, i) * weight;
                        sum[1] += load_kind(a->kind, value, i + LANES) * weight;
                    }
                    store(out + (r * a->heads + head) * dim + i, sum[0]);
                    store(out + (r * a->heads + head) * dim + i + LANES, sum[1]);
                }
            }
}

#if defined(EXACT)
/* The same in torch's order (exact.c), of numbers of 16 bits as they are; `odd` is set if a score or what is found is no finite number. scratch: of each
   of `threads` threads, as many as torch would take, SIDE * (2 * dim + past + depth) numbers. */
void EXACTLY(attend)(const struct attention *a, const uint16_t *query, ptrdiff_t head_stride, ptrdiff_t row_stride, float *scratch, int threads,
                     uint16_t *out, int *odd);
#endif
