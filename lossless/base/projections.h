/* Products of a few rows with the weights of modules, from within a parallel region. */

#pragma once
#include "panels.h"

struct weight { /* of a projection, in panels */
    int64_t kind, ins, outs, chunk; /* chunk: as panels.h has it */
    const void *numbers;
    const float *scales, *code, *bias;
};

/* A few rows, in the ways that weights are multiplied with them; bfloat16 and bytes only if they are asked for. */
struct rows {
    const float *numbers;
    const uint16_t *halves;
    const uint8_t *bytes;
    const float *scales; /* of each row in bytes */
};

/* Whether a weight is multiplied with rows of bfloat16. */
INLINE int takes_pairs(int64_t halves, const struct weight *w) {
#if defined(__AVX512BF16__)
    return halves && w->kind == BFLOAT16;
#else
    (void)halves, (void)w;
    return 0;
#endif
}

/* Rows [count, ins] for this weight, and for others if all or none of them are EIGHT_BITS. halves: the rows are of a model in bfloat16.
   scratch: as many numbers as the rows are. */
INLINE struct rows ready(int64_t halves, const struct weight *w, const float *numbers, ptrdiff_t count, float *scratch) {
    struct rows rows = {numbers, NULL, NULL, NULL};
    if (takes_pairs(halves, w)) {
        narrow(1, numbers, count * w->ins, scratch);
        rows.halves = (const uint16_t *)scratch;
    }
    if (w->kind == EIGHT_BITS) {
        to_bytes(numbers, count, w->ins, (uint8_t *)(scratch + count), scratch);
        rows.bytes = (const uint8_t *)(scratch + count), rows.scales = scratch;
    }
    return rows;
}

/* rows times one panel of a weight -> out [count, outs], bfloat16 if `halves`, else float32. */
static void project_panel(const struct weight *w, const struct rows *rows, ptrdiff_t count, int halves, void *out, ptrdiff_t p) {
    ptrdiff_t ins = w->ins, first = p * PANEL, valid = w->outs - first < PANEL ? w->outs - first : PANEL;
    const float *bias = w->bias ? w->bias + first : NULL;
    const uint32_t *numbers = w->numbers;
#define PROJECT(way, words_, scales_, bias_, rows_)                                                                                           \
    product(way, numbers + p * (words_), scales_, w->code, (const char *)(rows_), rows->scales, count, ins, w->chunk, bias_, halves, out, first, w->outs, valid)
    switch (w->kind) {
    case FLOAT32: PROJECT(NUMBERS, ins * PANEL, NULL, bias, rows->numbers); break;
    case BFLOAT16:
        if (takes_pairs(rows->halves != NULL, w)) PROJECT(PAIRS, ins / 2 * PANEL, NULL, bias, rows->halves);
        else PROJECT(HALVES, ins / 2 * PANEL, NULL, bias, rows->numbers);
        break;
    case FOUR_BIT_GRID: PROJECT(STEPS, ins / 4 * LANES, w->scales + p * (ins / w->chunk) * 2 * PANEL, bias, rows->numbers); break;
    case EIGHT_BIT_GRID: PROJECT(FINE_STEPS, ins / 4 * PANEL, w->scales + p * (ins / w->chunk) * 2 * PANEL, bias, rows->numbers); break;
    case EIGHT_BITS: PROJECT(BYTES, ins / 4 * PANEL, w->scales + p * 2 * PANEL, bias, rows->bytes); break;
#if defined(__AVX512BF16__)
    case PAIRED_FOUR_BITS: /* into bfloat16, and the bias is added behind that */
        PROJECT(PAIRED_CODES, ins / 4 * LANES, w->scales + p * (ins / BLOCK) * PANEL, NULL, rows->halves);
        for (ptrdiff_t r = 0; r < (bias ? count : 0); r++)
            for (ptrdiff_t n = 0; n < valid; n++) {
                uint16_t *to = (uint16_t *)out + r * w->outs + first + n;
                *to = as_bfloat16(as_float(*to) + bias[n]);
            }
        break;
#endif
    default: PROJECT(CODES, ins / 4 * LANES, w->scales + p * (ins / BLOCK) * PANEL, bias, rows->numbers);
    }
}

/* The whole product, by all threads of a parallel region; it is not waited for. */
static void project(const struct weight *w, const struct rows *rows, ptrdiff_t count, int halves, void *out) {
    ptrdiff_t panels = (w->outs + PANEL - 1) / PANEL;
#pragma omp for schedule(static) nowait
    for (ptrdiff_t p = 0; p < panels; p++) project_panel(w, rows, count, halves, out, p);
}
