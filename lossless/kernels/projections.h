/* Products of a few rows with the weights of modules, from within a parallel region. */

#pragma once
#include "panels.h"

struct weight { /* of a projection, in panels */
    int64_t kind, ins, outs, chunk, places; /* chunk: as panels.h has it; places: of INTERLEAVED weights */
    const void *numbers;
    const float *scales, *code, *bias;
    const int32_t *order; /* of INTERLEAVED weights */
};

/* A few rows, in the ways that weights are multiplied with them; bfloat16 and bytes only if they are asked for. */
struct rows {
    const float *numbers;
    const uint16_t *halves;
    const uint8_t *bytes;
    const float *scales; /* of each row in bytes */
    const void *on_grids; /* rows for weights on a grid: the numbers, or the same in whole numbers (panels.h) */
};

/* Whether a weight is multiplied with rows of bfloat16. */
INLINE int takes_pairs(int64_t kind, const struct weight *w) {
#if defined(__AVX512BF16__)
    return kind == BFLOAT16 && w->kind == BFLOAT16;
#else
    (void)kind, (void)w;
    return 0;
#endif
}

INLINE int on_a_grid(const struct weight *w) { return w->kind == FOUR_BIT_GRID || w->kind == EIGHT_BIT_GRID; }

/* Rows [count, ins] for the first of these weights, and for the others if all or none of them are EIGHT_BITS. kind: of numbers in the model that
   the rows are of. scratch: as many numbers as the rows are. */
INLINE struct rows ready(int64_t kind, const struct weight *w, int weights, const float *numbers, ptrdiff_t count, float *scratch) {
    struct rows rows = {.numbers = numbers, .on_grids = numbers};
    if (takes_pairs(kind, w)) {
        narrow(BFLOAT16, numbers, count * w->ins, scratch);
        rows.halves = (const uint16_t *)scratch;
    }
    if (w->kind == EIGHT_BITS) {
        to_bytes(numbers, count, w->ins, (uint8_t *)(scratch + count), scratch);
        rows.bytes = (const uint8_t *)(scratch + count), rows.scales = scratch;
    }
#if defined(WHOLE_ROWS)
    int any = 0;
    for (int i = 0; i < weights; i++) any |= on_a_grid(w + i);
    if (any) {
        to_whole(numbers, count * w->ins, (struct whole *)scratch);
        rows.on_grids = scratch;
    }
#else
    (void)weights;
#endif
    return rows;
}

/* Rows [count, ins] of 16 bits for weights that are multiplied in torch's order. scratch: [count, places] for INTERLEAVED ones. */
INLINE int interleaved(const struct weight *w) { return w->kind == INTERLEAVED || w->kind == INTERLEAVED_FLOAT16; }

struct rows ready_exactly(const struct weight *w, const uint16_t *halves, ptrdiff_t count, float *scratch);

/* rows times some panels of a weight -> these outputs of out [count, outs], of this kind. */
void project_panels(const struct weight *w, const struct rows *rows, ptrdiff_t count, int kind, void *out, ptrdiff_t from, ptrdiff_t to);

/* The whole product, by all threads of a parallel region; it is not waited for. */
void project(const struct weight *w, const struct rows *rows, ptrdiff_t count, int kind, void *out);
