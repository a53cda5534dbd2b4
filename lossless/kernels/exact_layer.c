/* Decoder layers in 16 bits with the bits of torch's eager operations for a row by itself (fused.py): norms, projections, rotary
   embedding, attention (exact.c), residuals and a gated MLP. What torch writes to memory is rounded to 16 bits here, too, and nothing
   else is.

   Sums of projections are in the order of base/exact.py. The mean of squares is that of torch's `mean`: eight lanes, four vectors side by
   side, and sums of 16, 256 and 4096 of those apart. */

#include "attention.h"
#include "layer.h"

#if defined(EXACT)

#define ABREAST 4
#define LEVELS 4
#define MORE 64  /* places of INTERLEAVED weights beyond their inputs, at most */
#define EVERY 16 /* sums of one level are added to those of the next */

INLINE f32x8 eight(const uint16_t *at) {
    __m128i halves = _mm_loadu_si128((const __m128i *)at);
    return SIXTEEN == FLOAT16 ? (f32x8)_mm256_cvtph_ps(halves) : (f32x8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
}

static float mean_of_squares(const uint16_t *row, ptrdiff_t dim) {
    f32x8 sums[LEVELS][ABREAST] = {};
    ptrdiff_t vectors = dim / 8, turns = vectors / ABREAST;
#define SQUARES(v) (eight(row + 8 * (v)) * eight(row + 8 * (v))) /* of numbers of 8 or 11 bits: nothing is lost */
    for (ptrdiff_t i = 0; i < turns;) {
        UNROLL for (int k = 0; k < ABREAST; k++) sums[0][k] += SQUARES(i * ABREAST + k);
        i++;
        ptrdiff_t every = EVERY;
        for (int level = 1; level < LEVELS && i % every == 0; level++, every *= EVERY)
            UNROLL for (int k = 0; k < ABREAST; k++) sums[level][k] += sums[level - 1][k], sums[level - 1][k] = (f32x8){};
    }
    for (int level = 1; level < LEVELS; level++)
        UNROLL for (int k = 0; k < ABREAST; k++) sums[0][k] += sums[level][k];
    for (ptrdiff_t v = turns * ABREAST; v < vectors; v++) sums[0][0] += SQUARES(v);
    f32x8 all = sums[0][0] + sums[0][1] + sums[0][2] + sums[0][3];
    float sum = 0;
    for (ptrdiff_t i = vectors * 8; i < dim; i++) sum += number_at(SIXTEEN, row, i) * number_at(SIXTEEN, row, i);
    for (int lane = 0; lane < 8; lane++) sum += all[lane];
    return sum / dim;
}

/* May be done in place; dim is a multiple of LANES. */
static void normalize_exactly(const struct norm *norm, const uint16_t *row, ptrdiff_t dim, uint16_t *out) {
    float scale = 1 / sqrtf(mean_of_squares(row, dim) + (float)norm->eps);
    for (ptrdiff_t i = 0; i < dim; i += LANES) {
        f32s scaled = load_kind(SIXTEEN, row, i) * scale;
        store_kind(SIXTEEN, out, i, (norm->twice ? rounded_to(SIXTEEN, scaled) : scaled) * load(norm->weight + i));
    }
}

void EXACTLY(lossless_norm)(const struct norm *norm, const uint16_t *rows, uint16_t *out, ptrdiff_t count, ptrdiff_t dim) {
    for (ptrdiff_t r = 0; r < count; r++) normalize_exactly(norm, rows + r * dim, dim, out + r * dim);
}

/* A head's part of a row, in place. */
static void turn(const struct norm *norm, const uint16_t *cos, const uint16_t *sin, ptrdiff_t dim, uint16_t *head) {
    if (norm->weight) normalize_exactly(norm, head, dim, head);
    for (ptrdiff_t i = 0, half = dim / 2; i < half; i += LANES) {
        f32s first = load_kind(SIXTEEN, head, i), second = load_kind(SIXTEEN, head, half + i);
        store_kind(SIXTEEN, head, i, rounded_to(SIXTEEN, first * load_kind(SIXTEEN, cos, i)) - rounded_to(SIXTEEN, second * load_kind(SIXTEEN, sin, i)));
        store_kind(SIXTEEN, head, half + i, rounded_to(SIXTEEN, second * load_kind(SIXTEEN, cos, half + i)) + rounded_to(SIXTEEN, first * load_kind(SIXTEEN, sin, half + i)));
    }
}

/* to += added */
static void add_to(uint16_t *to, const uint16_t *added, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += LANES) store_kind(SIXTEEN, to, i, load_kind(SIXTEEN, to, i) + load_kind(SIXTEEN, added, i));
}

/* gate = activation(gate) * up */
static void gated(const uint16_t *activation, uint16_t *gate, const uint16_t *up, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += LANES) {
        uint16_t active[LANES];
        for (int lane = 0; lane < LANES; lane++) active[lane] = activation[gate[i + lane]];
        store_kind(SIXTEEN, gate, i, load_kind(SIXTEEN, active, 0) * load_kind(SIXTEEN, up, i));
    }
}

/* Queries [rows, heads, head_dim] and keys are turned, in place, and keys and values [rows, kv_heads, head_dim] kept behind `past` others. */
static void turn_and_keep(const struct layer *layer, const struct kept *kept, const uint16_t *cos, const uint16_t *sin, ptrdiff_t rows, ptrdiff_t past,
                          uint16_t *query, uint16_t *key, const uint16_t *value) {
    ptrdiff_t heads = layer->heads, kv_heads = layer->kv_heads, size = layer->head_dim;
    for (ptrdiff_t r = 0; r < rows; r++) {
        for (ptrdiff_t head = 0; head < heads; head++) turn(&layer->of_queries, cos + r * size, sin + r * size, size, query + (r * heads + head) * size);
        for (ptrdiff_t head = 0; head < kv_heads; head++) {
            ptrdiff_t from = (r * kv_heads + head) * size, to = (head * kept->capacity + past + r) * size;
            turn(&layer->of_keys, cos + r * size, sin + r * size, size, key + from);
            memcpy((uint16_t *)kept->keys + to, key + from, size * sizeof *key);
            memcpy((uint16_t *)kept->values + to, value + from, size * sizeof *key);
        }
    }
}

/* As lossless_layers (layer.c); returns whether attention found what is no finite number: then `out` is of no use. scratch: as FusedLayer.scratch in fused.py says. */
int EXACTLY(lossless_layers)(const struct layer *const *layers, const struct kept *kept, ptrdiff_t count, const uint16_t *hidden,
                             const uint16_t *cos, const uint16_t *sin, const int32_t *lengths, const int32_t *paths, ptrdiff_t depth, ptrdiff_t past,
                             uint16_t *out, float *scratch, ptrdiff_t longest, ptrdiff_t rows, int threads) {
    ptrdiff_t dim = layers[0]->dim, heads = layers[0]->heads, kv_heads = layers[0]->kv_heads, size = layers[0]->head_dim;
    ptrdiff_t inner = layers[0]->gate.outs, wide = heads * size, slim = kv_heads * size;
    uint16_t *normal = (uint16_t *)scratch, *query = normal + rows * longest, *key = query + rows * longest, *value = key + rows * slim;
    uint16_t *gate = value + rows * slim, *up = gate + rows * longest, *added = up + rows * longest;
    float *numbers = (float *)(added + rows * longest), *rest = numbers + rows * (longest + MORE);
    struct team team = {0};
    struct rows given;
    int odd = 0;
    memcpy(out, hidden, rows * dim * sizeof *out);
    EXACTLY(lossless_norm)(&layers[0]->first, out, normal, rows, dim);
    given = ready_exactly(&layers[0]->q, normal, rows, numbers);
#pragma omp parallel num_threads(threads)
    for (ptrdiff_t i = 0; i < count && !odd; i++) {
        const struct layer *l = layers[i];
        ptrdiff_t apart = kept[i].capacity * size;
        struct attention a = {SIXTEEN, heads, kv_heads, rows, size, past, depth, (float)l->scale, kept[i].keys, kept[i].values,
                              {apart, size}, {apart, size}, NULL, lengths, paths};
        project(&l->q, &given, rows, SIXTEEN, query);
        project(&l->k, &given, rows, SIXTEEN, key);
        project(&l->v, &given, rows, SIXTEEN, value);
        BY_ONE(&team) turn_and_keep(l, kept + i, cos, sin, rows, past, query, key, value);
        EXACTLY(attend)(&a, query, size, wide, rest, threads, added, &odd);
        BY_ONE(&team) given = ready_exactly(&l->o, added, rows, numbers);
        project(&l->o, &given, rows, SIXTEEN, query);
        BY_ONE(&team) {
            add_to(out, query, rows * dim);
            EXACTLY(lossless_norm)(&l->second, out, normal, rows, dim);
            given = ready_exactly(&l->gate, normal, rows, numbers);
        }
#pragma omp for schedule(static) nowait
        for (ptrdiff_t p = 0; p < (inner + PANEL - 1) / PANEL; p++) {
            ptrdiff_t first = p * PANEL, valid = inner - first < PANEL ? inner - first : PANEL;
            project_panels(&l->gate, &given, rows, SIXTEEN, gate, p, p + 1);
            project_panels(&l->up, &given, rows, SIXTEEN, up, p, p + 1);
            for (ptrdiff_t r = 0; r < rows; r++) gated(l->activation, gate + r * inner + first, up + r * inner + first, valid);
        }
        BY_ONE(&team) given = ready_exactly(&l->down, gate, rows, numbers);
        project(&l->down, &given, rows, SIXTEEN, added);
        BY_ONE(&team) {
            add_to(out, added, rows * dim);
            if (i + 1 < count) {
                EXACTLY(lossless_norm)(&layers[i + 1]->first, out, normal, rows, dim);
                given = ready_exactly(&layers[i + 1]->q, normal, rows, numbers);
            }
        }
    }
    return odd;
}

#endif
