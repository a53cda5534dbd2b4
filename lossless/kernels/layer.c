/* A decoder layer of a few rows in two calls, before and behind the cache (fused.py): norm, projections and rotary embedding; attention,
   residual, norm and MLP. And layers one behind the other in one call.

   Rows are float32 inside. What comes in and goes out, and keys and values, are float32, bfloat16 or float16. Like everything here, a row has the
   bits that it has by itself. */

#include "attention.h"
#include "layer.h"

/* Threads wait for each other as seldom as can be: on a busy machine each time may cost a time slice. So what is little is done by one. */

/* A head's part of a row: normalized if there is a norm, and turned by the position; in place. */
static void turn(const struct norm *norm, const float *cos, const float *sin, ptrdiff_t dim, float *head) {
    if (norm->weight) normalize(norm->weight, norm->eps, head, dim, head);
    ptrdiff_t half = dim / 2;
    for (ptrdiff_t i = 0; i < half; i++) {
        float first = head[i], second = head[i + half];
        head[i] = first * cos[i] - second * sin[i];
        head[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

/* gate / (1 + e^-gate) * up, in place of gate */
static void gated(float *gate, const float *up, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += LANES) store(gate + i, silu(load(gate + i)) * load(up + i));
}

/* hidden [rows, dim]; cos, sin [rows, head_dim] -> query [rows, heads, head_dim] in float32; key, value [rows, kv_heads, head_dim].
   scratch: [rows, 3 * dim + 2 * head_dim + 2 * kv_heads * head_dim]. */
void lossless_before(const struct layer *layer, const void *hidden, const void *cos, const void *sin, float *query, void *key, void *value,
                     float *scratch, ptrdiff_t rows, int threads) {
    ptrdiff_t dim = layer->dim, heads = layer->heads, kv_heads = layer->kv_heads, size = layer->head_dim;
    float *wide = scratch, *normal = wide + rows * dim, *cosines = normal + rows * dim, *sines = cosines + rows * size;
    float *keys = sines + rows * size, *values = keys + rows * kv_heads * size;
    widen(layer->kind, hidden, rows * dim, wide);
    widen(layer->kind, cos, rows * size, cosines);
    widen(layer->kind, sin, rows * size, sines);
    for (ptrdiff_t r = 0; r < rows; r++) normalize(layer->first.weight, layer->first.eps, wide + r * dim, dim, normal + r * dim);
    struct rows given = ready(layer->kind, &layer->q, normal, rows, values + rows * kv_heads * size);
#pragma omp parallel num_threads(threads)
    {
        project(&layer->q, &given, rows, FLOAT32, query);
        project(&layer->k, &given, rows, FLOAT32, keys);
        project(&layer->v, &given, rows, FLOAT32, values);
    }
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t head = 0; head < heads + kv_heads; head++) {
            float *part = head < heads ? query + (r * heads + head) * size : keys + (r * kv_heads + head - heads) * size;
            turn(head < heads ? &layer->of_queries : &layer->of_keys, cosines + r * size, sines + r * size, size, part);
        }
    narrow(layer->kind, keys, rows * kv_heads * size, key);
    narrow(layer->kind, values, rows * kv_heads * size, value);
}

/* query as above, and what attention is to know; hidden [rows, dim] -> out [rows, dim].
   scratch: [rows, 2 * heads * head_dim + 3 * dim + 2 * inner + longest], `longest` the widest rows of a projection, and what
   `attention_scratch` says behind it. */
void lossless_behind(const struct layer *layer, const void *hidden, const float *query, const void *keys, const void *values,
                     const ptrdiff_t *strides, const int32_t *lengths, const int32_t *paths, ptrdiff_t depth, ptrdiff_t past, void *out,
                     float *scratch, ptrdiff_t longest, ptrdiff_t rows, int threads) {
    ptrdiff_t dim = layer->dim, heads = layer->heads, size = layer->head_dim, inner = layer->gate.outs, group = heads / layer->kv_heads;
    float *asked = scratch, *found = asked + rows * heads * size, *added = found + rows * heads * size, *middle = added + rows * dim;
    float *normal = middle + rows * dim, *gate = normal + rows * dim, *up = gate + rows * inner, *rest = up + rows * inner + rows * longest;
    float *shorter = up + rows * inner;
    struct rows given;
    struct attention a = {layer->kind, heads, layer->kv_heads, rows, size, past, depth, (float)layer->scale, keys, values,
                          {strides[0], strides[1]}, {strides[2], strides[3]}, NULL, lengths, paths};
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t head = 0; head < heads; head++)
            memcpy(asked + (((head / group) * rows + r) * group + head % group) * size, query + (r * heads + head) * size, size * sizeof(float));
    widen(layer->kind, hidden, rows * dim, middle);
#pragma omp parallel num_threads(threads)
    {
        attend(&a, asked, rest, found);
#pragma omp single
        given = ready(layer->kind, &layer->o, found, rows, shorter);
        project(&layer->o, &given, rows, FLOAT32, added);
#pragma omp barrier
#pragma omp single
        {
            for (ptrdiff_t i = 0; i < rows * dim; i++) middle[i] += added[i];
            for (ptrdiff_t r = 0; r < rows; r++) normalize(layer->second.weight, layer->second.eps, middle + r * dim, dim, normal + r * dim);
            given = ready(layer->kind, &layer->gate, normal, rows, shorter);
        }
#pragma omp for schedule(static)
        for (ptrdiff_t p = 0; p < (inner + PANEL - 1) / PANEL; p++) {
            ptrdiff_t first = p * PANEL, valid = inner - first < PANEL ? inner - first : PANEL;
            project_panel(&layer->gate, &given, rows, FLOAT32, gate, p);
            project_panel(&layer->up, &given, rows, FLOAT32, up, p);
            for (ptrdiff_t r = 0; r < rows; r++) gated(gate + r * inner + first, up + r * inner + first, valid);
        }
#pragma omp single
        given = ready(layer->kind, &layer->down, gate, rows, shorter);
        project(&layer->down, &given, rows, FLOAT32, added);
    }
    for (ptrdiff_t i = 0; i < rows * dim; i++) middle[i] += added[i];
    narrow(layer->kind, middle, rows * dim, out);
}

/* `count` layers of the same sizes, each of which is given what the one before it gave: hidden [rows, dim] -> out [rows, dim]. Keys and
   values of the rows are written behind `past` others. scratch:
   [rows, heads * head_dim + 2 * kv_heads * head_dim], and behind it what either call takes. */
void lossless_layers(const struct layer *const *layers, const struct kept *kept, ptrdiff_t count, const void *hidden, const void *cos,
                     const void *sin, const int32_t *lengths, const int32_t *paths, ptrdiff_t depth, ptrdiff_t past, void *out,
                     float *scratch, ptrdiff_t longest, ptrdiff_t rows, int threads) {
    ptrdiff_t heads = layers[0]->heads, kv_heads = layers[0]->kv_heads, size = layers[0]->head_dim, bytes = size * bytes_of(layers[0]->kind);
    float *query = scratch, *rest = query + rows * heads * size + rows * kv_heads * size * 2;
    char *key = (char *)(query + rows * heads * size), *value = key + rows * kv_heads * bytes;
    for (ptrdiff_t i = 0; i < count; i++, hidden = out) {
        char *keys = kept[i].keys, *values = kept[i].values;
        ptrdiff_t strides[4] = {kept[i].capacity * size, size, kept[i].capacity * size, size};
        lossless_before(layers[i], hidden, cos, sin, query, key, value, rest, rows, threads);
        for (ptrdiff_t r = 0; r < rows; r++)
            for (ptrdiff_t head = 0; head < kv_heads; head++) {
                ptrdiff_t to = (head * kept[i].capacity + past + r) * bytes, from = (r * kv_heads + head) * bytes;
                memcpy(keys + to, key + from, bytes);
                memcpy(values + to, value + from, bytes);
            }
        lossless_behind(layers[i], hidden, query, keys, values, strides, lengths, paths, depth, past, out, rest, longest, rows, threads);
    }
}
