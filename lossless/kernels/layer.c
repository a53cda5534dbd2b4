/* Decoder layers of a few rows (fused.py): norm, projections and rotary embedding, what is kept in a cache; then attention, residual, norm and MLP.
   One layer in two calls, before and behind its cache, or layers one behind the other in one.

   Rows are float32 inside. What comes in and goes out, and keys and values, are float32, bfloat16 or float16. Like everything here, a row has the
   bits that it has by itself. */

#include "attention.h"
#include "layer.h"

/* Threads wait for each other as seldom as can be. So what is little is done by the last of them to come (team.h). */

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

/* What a pass of some rows is computed in: places in scratch. */
struct room {
    float *cos, *sin, *wide, *normal, *query, *key, *value, *asked, *found, *added, *gate, *up, *shorter, *rest;
    struct rows given; /* to the next projection */
};

/* scratch: [rows, 3 * dim + 2 * head_dim + (3 * heads + 2 * kv_heads) * head_dim + 2 * inner + longest], `longest` the widest rows of a projection,
   and what `attention_scratch` says behind it. */
static struct room laid_out(const struct layer *layer, float *scratch, ptrdiff_t longest, ptrdiff_t rows) {
    ptrdiff_t dim = layer->dim, size = layer->head_dim, inner = layer->gate.outs, wide = layer->heads * size, slim = layer->kv_heads * size;
    struct room room;
    float **parts[] = {&room.cos, &room.sin, &room.wide, &room.normal, &room.query, &room.key, &room.value, &room.asked, &room.found, &room.added,
                       &room.gate, &room.up, &room.shorter, &room.rest};
    ptrdiff_t widths[] = {size, size, dim, dim, wide, slim, slim, wide, wide, dim, inner, inner, longest, 0};
    for (ptrdiff_t i = 0; i < (ptrdiff_t)(sizeof widths / sizeof *widths); scratch += rows * widths[i++]) *parts[i] = scratch;
    return room;
}

/* What comes in, in float32, and normalized for q, k and v. */
static void enter(const struct layer *layer, const void *hidden, ptrdiff_t rows, struct room *room) {
    ptrdiff_t dim = layer->dim;
    widen(layer->kind, hidden, rows * dim, room->wide);
    for (ptrdiff_t r = 0; r < rows; r++) normalize(layer->first.weight, layer->first.eps, room->wide + r * dim, dim, room->normal + r * dim);
    room->given = ready(layer->kind, &layer->q, 3, room->normal, rows, room->shorter);
}

/* By all threads; it is not waited for. */
static void project_queries_and_keys(const struct layer *layer, ptrdiff_t rows, struct room *room) {
    project(&layer->q, &room->given, rows, FLOAT32, room->query);
    project(&layer->k, &room->given, rows, FLOAT32, room->key);
    project(&layer->v, &room->given, rows, FLOAT32, room->value);
}

/* Queries and keys are turned, in place; keys and values go where they are kept, heads and rows so many numbers apart. */
static void turn_and_keep(const struct layer *layer, ptrdiff_t rows, struct room *room, char *keys, char *values, ptrdiff_t head_apart, ptrdiff_t row_apart) {
    ptrdiff_t heads = layer->heads, kv_heads = layer->kv_heads, size = layer->head_dim, bytes = bytes_of(layer->kind);
    for (ptrdiff_t r = 0; r < rows; r++) {
        const float *cos = room->cos + r * size, *sin = room->sin + r * size;
        for (ptrdiff_t head = 0; head < heads; head++) turn(&layer->of_queries, cos, sin, size, room->query + (r * heads + head) * size);
        for (ptrdiff_t head = 0; head < kv_heads; head++) {
            float *key = room->key + (r * kv_heads + head) * size, *value = room->value + (r * kv_heads + head) * size;
            ptrdiff_t to = (head * head_apart + r * row_apart) * bytes;
            turn(&layer->of_keys, cos, sin, size, key);
            narrow(layer->kind, key, size, keys + to);
            narrow(layer->kind, value, size, values + to);
        }
    }
}

/* Queries [rows, heads, head_dim] as attention takes them. */
static void ask(const struct layer *layer, const float *query, ptrdiff_t rows, struct room *room) {
    ptrdiff_t heads = layer->heads, size = layer->head_dim, group = heads / layer->kv_heads;
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t head = 0; head < heads; head++)
            memcpy(room->asked + (((head / group) * rows + r) * group + head % group) * size, query + (r * heads + head) * size, size * sizeof(float));
}

/* By all threads: attention, residual, norm and MLP but for its residual, which is left to add; it is not waited for. */
static void attend_and_go_through_mlp(struct team *team, const struct layer *layer, const struct attention *a, ptrdiff_t rows, struct room *room) {
    ptrdiff_t dim = layer->dim, inner = layer->gate.outs;
    attend(team, a, room->asked, room->rest, room->found);
    BY_ONE(team) room->given = ready(layer->kind, &layer->o, 1, room->found, rows, room->shorter);
    project(&layer->o, &room->given, rows, FLOAT32, room->added);
    BY_ONE(team) {
        for (ptrdiff_t i = 0; i < rows * dim; i++) room->wide[i] += room->added[i];
        for (ptrdiff_t r = 0; r < rows; r++) normalize(layer->second.weight, layer->second.eps, room->wide + r * dim, dim, room->normal + r * dim);
        room->given = ready(layer->kind, &layer->gate, 2, room->normal, rows, room->shorter);
    }
#pragma omp for schedule(static) nowait
    for (ptrdiff_t p = 0; p < (inner + PANEL - 1) / PANEL; p++) {
        ptrdiff_t first = p * PANEL, valid = inner - first < PANEL ? inner - first : PANEL;
        project_panels(&layer->gate, &room->given, rows, FLOAT32, room->gate, p, p + 1);
        project_panels(&layer->up, &room->given, rows, FLOAT32, room->up, p, p + 1);
        for (ptrdiff_t r = 0; r < rows; r++) gated(room->gate + r * inner + first, room->up + r * inner + first, valid);
    }
    BY_ONE(team) room->given = ready(layer->kind, &layer->down, 1, room->gate, rows, room->shorter);
    project(&layer->down, &room->given, rows, FLOAT32, room->added);
}

static void leave(const struct layer *layer, ptrdiff_t rows, struct room *room, void *out) {
    for (ptrdiff_t i = 0; i < rows * layer->dim; i++) room->wide[i] += room->added[i];
    narrow(layer->kind, room->wide, rows * layer->dim, out);
}

/* hidden [rows, dim]; cos, sin [rows, head_dim] -> query [rows, heads, head_dim] in float32; key, value [rows, kv_heads, head_dim]. */
void lossless_before(const struct layer *layer, const void *hidden, const void *cos, const void *sin, float *query, void *key, void *value,
                     float *scratch, ptrdiff_t longest, ptrdiff_t rows, int threads) {
    ptrdiff_t size = layer->head_dim;
    struct room room = laid_out(layer, scratch, longest, rows);
    struct team team = {0};
    room.query = query;
    widen(layer->kind, cos, rows * size, room.cos);
    widen(layer->kind, sin, rows * size, room.sin);
    enter(layer, hidden, rows, &room);
#pragma omp parallel num_threads(threads)
    {
        project_queries_and_keys(layer, rows, &room);
        wait_for_all(&team);
    }
    turn_and_keep(layer, rows, &room, key, value, size, layer->kv_heads * size);
}

/* query as above, and what attention is to know; hidden [rows, dim] -> out [rows, dim]. */
void lossless_behind(const struct layer *layer, const void *hidden, const float *query, const void *keys, const void *values,
                     const ptrdiff_t *strides, const int32_t *lengths, const int32_t *paths, ptrdiff_t depth, ptrdiff_t past, void *out,
                     float *scratch, ptrdiff_t longest, ptrdiff_t rows, int threads) {
    struct room room = laid_out(layer, scratch, longest, rows);
    struct team team = {0};
    struct attention a = {layer->kind, layer->heads, layer->kv_heads, rows, layer->head_dim, past, depth, (float)layer->scale, keys, values,
                          {strides[0], strides[1]}, {strides[2], strides[3]}, NULL, lengths, paths};
    widen(layer->kind, hidden, rows * layer->dim, room.wide);
    ask(layer, query, rows, &room);
#pragma omp parallel num_threads(threads)
    {
        attend_and_go_through_mlp(&team, layer, &a, rows, &room);
        wait_for_all(&team);
    }
    leave(layer, rows, &room, out);
}

/* `count` layers of the same sizes, each of which is given what the one before it gave: hidden [rows, dim] -> out [rows, dim]. Keys and
   values of the rows are written behind `past` others. */
void lossless_layers(const struct layer *const *layers, const struct kept *kept, ptrdiff_t count, const void *hidden, const void *cos,
                     const void *sin, const int32_t *lengths, const int32_t *paths, ptrdiff_t depth, ptrdiff_t past, void *out,
                     float *scratch, ptrdiff_t longest, ptrdiff_t rows, int threads) {
    ptrdiff_t heads = layers[0]->heads, kv_heads = layers[0]->kv_heads, size = layers[0]->head_dim, bytes = size * bytes_of(layers[0]->kind);
    struct room room = laid_out(layers[0], scratch, longest, rows);
    struct team team = {0};
    widen(layers[0]->kind, cos, rows * size, room.cos);
    widen(layers[0]->kind, sin, rows * size, room.sin);
    enter(layers[0], hidden, rows, &room);
#pragma omp parallel num_threads(threads)
    for (ptrdiff_t i = 0; i < count; i++) {
        const struct layer *layer = layers[i];
        ptrdiff_t apart = kept[i].capacity * size;
        struct attention a = {layer->kind, heads, kv_heads, rows, size, past, depth, (float)layer->scale, kept[i].keys, kept[i].values,
                              {apart, size}, {apart, size}, NULL, lengths, paths};
        project_queries_and_keys(layer, rows, &room);
        BY_ONE(&team) {
            turn_and_keep(layer, rows, &room, (char *)kept[i].keys + past * bytes, (char *)kept[i].values + past * bytes, apart, size);
            ask(layer, room.query, rows, &room);
        }
        attend_and_go_through_mlp(&team, layer, &a, rows, &room);
        BY_ONE(&team) {
            leave(layer, rows, &room, out);
            if (i + 1 < count) enter(layers[i + 1], out, rows, &room);
        }
    }
}
