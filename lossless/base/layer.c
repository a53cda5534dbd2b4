/* A decoder layer of a few rows in two calls, before and behind the cache (layer.py): norm, projections and rotary embedding; attention,
   residual, norm and MLP.

   Rows are float32 inside. Like everything here, a row has the bits that it has by itself. */

#include "attention.h"

struct weight { /* of a projection, in panels */
    int64_t kind, ins, outs;
    const void *numbers;
    const float *scales, *code, *bias;
};

struct norm {
    const float *weight; /* NULL: there is none */
    double eps;
};

struct layer {
    struct weight q, k, v, o, gate, up, down;
    struct norm first, second, of_queries, of_keys;
    int64_t dim, heads, kv_heads, head_dim;
    double scale;
};

/* Orphaned: what follows is called by all threads of a parallel region. */

static void project(const struct weight *w, const float *rows, ptrdiff_t count, float *out) {
    ptrdiff_t panels = (w->outs + PANEL - 1) / PANEL, ins = w->ins;
#pragma omp for schedule(static) nowait
    for (ptrdiff_t p = 0; p < panels; p++) {
        ptrdiff_t first = p * PANEL, valid = w->outs - first < PANEL ? w->outs - first : PANEL;
        const float *bias = w->bias ? w->bias + first : NULL;
        const char *from = (const char *)rows;
        const uint32_t *numbers = w->numbers;
        switch (w->kind) {
        case FLOAT32: product(NUMBERS, numbers + p * ins * PANEL, NULL, NULL, from, count, ins, bias, 0, out, first, w->outs, valid); break;
        case BFLOAT16: product(HALVES, numbers + p * ins / 2 * PANEL, NULL, NULL, from, count, ins, bias, 0, out, first, w->outs, valid); break;
        case EIGHT_BITS:
            product(BYTES, numbers + p * ins / 4 * PANEL, w->scales + p * PANEL, NULL, from, count, ins, bias, 0, out, first, w->outs, valid);
            break;
        default:
            product(CODES, numbers + p * ins / 4 * LANES, w->scales + p * (ins / BLOCK) * PANEL, w->code, from, count, ins, bias, 0, out, first,
                    w->outs, valid);
        }
    }
}

/* out = row / sqrt(mean of squares + eps) * weight */
static void normalize(const struct norm *norm, const float *row, ptrdiff_t dim, float *out) {
    f32s squares = {}, none = {};
    ptrdiff_t whole = dim - dim % LANES;
    for (ptrdiff_t i = 0; i < whole; i += LANES) squares += load(row + i) * load(row + i);
    float sum = sums(squares, none, none, none)[0];
    for (ptrdiff_t i = whole; i < dim; i++) sum += row[i] * row[i];
    float scale = 1 / sqrtf(sum / dim + (float)norm->eps);
    for (ptrdiff_t i = 0; i < whole; i += LANES) store(out + i, load(row + i) * scale * load(norm->weight + i));
    for (ptrdiff_t i = whole; i < dim; i++) out[i] = row[i] * scale * norm->weight[i];
}

/* A head's part of a row: normalized if there is a norm, and turned by the position; in place. */
static void turn(const struct norm *norm, const float *cos, const float *sin, ptrdiff_t dim, float *head) {
    if (norm->weight) normalize(norm, head, dim, head);
    ptrdiff_t half = dim / 2;
    for (ptrdiff_t i = 0; i < half; i++) {
        float first = head[i], second = head[i + half];
        head[i] = first * cos[i] - second * sin[i];
        head[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

/* hidden [rows, dim]; cos, sin [rows, head_dim] -> query [rows, heads, head_dim], key, value [rows, kv_heads, head_dim].
   scratch: [rows, dim]. */
void lossless_before(const struct layer *layer, const float *hidden, const float *cos, const float *sin, float *query, float *key, float *value,
                     float *scratch, ptrdiff_t rows, int threads) {
    ptrdiff_t dim = layer->dim, heads = layer->heads, kv_heads = layer->kv_heads, size = layer->head_dim;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (ptrdiff_t r = 0; r < rows; r++) normalize(&layer->first, hidden + r * dim, dim, scratch + r * dim);
        project(&layer->q, scratch, rows, query);
        project(&layer->k, scratch, rows, key);
        project(&layer->v, scratch, rows, value);
#pragma omp barrier
#pragma omp for collapse(2) schedule(static)
        for (ptrdiff_t r = 0; r < rows; r++)
            for (ptrdiff_t head = 0; head < heads + kv_heads; head++) {
                float *part = head < heads ? query + (r * heads + head) * size : key + (r * kv_heads + head - heads) * size;
                turn(head < heads ? &layer->of_queries : &layer->of_keys, cos + r * size, sin + r * size, size, part);
            }
    }
}

INLINE f32s absolute(f32s x) { return (f32s)((u32s)x & 0x7fffffffu); }

/* gate / (1 + e^-gate) * up, in place of gate */
static void gated(float *gate, const float *up, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += LANES) {
        f32s x = load(gate + i), small = exponential(-absolute(x));
        f32s top = (f32s)(((u32s)(x < 0) & (u32s)small) | (~(u32s)(x < 0) & (u32s)(small - small + 1)));
        store(gate + i, x * (top / (1 + small)) * load(up + i));
    }
}

/* query as above, and what attention is to know; hidden [rows, dim] -> out [rows, dim].
   scratch: [rows, 2 * heads * head_dim + 3 * dim + 2 * inner], and what `attention_scratch` says behind it. */
void lossless_behind(const struct layer *layer, const float *hidden, const float *query, const float *keys, const float *values,
                     const ptrdiff_t *strides, const int32_t *lengths, const int32_t *paths, ptrdiff_t depth, ptrdiff_t past, float *out,
                     float *scratch, ptrdiff_t rows, int threads) {
    ptrdiff_t dim = layer->dim, heads = layer->heads, size = layer->head_dim, inner = layer->gate.outs, group = heads / layer->kv_heads;
    float *asked = scratch, *found = asked + rows * heads * size, *added = found + rows * heads * size, *middle = added + rows * dim;
    float *normal = middle + rows * dim, *gate = normal + rows * dim, *up = gate + rows * inner, *rest = up + rows * inner;
    struct attention a = {FLOAT32, heads, layer->kv_heads, rows, size, past, depth, (float)layer->scale, keys, values,
                          {strides[0], strides[1]}, {strides[2], strides[3]}, NULL, lengths, paths};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (ptrdiff_t r = 0; r < rows; r++)
            for (ptrdiff_t head = 0; head < heads; head++)
                memcpy(asked + (((head / group) * rows + r) * group + head % group) * size, query + (r * heads + head) * size, size * sizeof(float));
        attend(&a, asked, rest, found);
        project(&layer->o, found, rows, added);
#pragma omp barrier
#pragma omp for schedule(static)
        for (ptrdiff_t r = 0; r < rows; r++) {
            for (ptrdiff_t i = 0; i < dim; i++) middle[r * dim + i] = hidden[r * dim + i] + added[r * dim + i];
            normalize(&layer->second, middle + r * dim, dim, normal + r * dim);
        }
        project(&layer->gate, normal, rows, gate);
        project(&layer->up, normal, rows, up);
#pragma omp barrier
#pragma omp for schedule(static)
        for (ptrdiff_t r = 0; r < rows; r++) gated(gate + r * inner, up + r * inner, inner);
        project(&layer->down, gate, rows, added);
#pragma omp barrier
#pragma omp for schedule(static)
        for (ptrdiff_t i = 0; i < rows * dim; i++) out[i] = middle[i] + added[i];
    }
}
