/* Products of a few rows with weights in panels, of every kind, for whoever projects. */

#include "projections.h"
#include "team.h"

struct rows ready_exactly(const struct weight *w, const uint16_t *halves, ptrdiff_t count, float *scratch) {
    struct rows rows = {.halves = halves};
    if (interleaved(w)) {
        if (w->kind == INTERLEAVED) interleave(BFLOAT16, halves, count, w->ins, w->order, w->places, scratch);
        else interleave(FLOAT16, halves, count, w->ins, w->order, w->places, scratch);
        rows.numbers = scratch;
    }
    return rows;
}

void project_panels(const struct weight *w, const struct rows *rows, ptrdiff_t count, int kind, void *out, ptrdiff_t from, ptrdiff_t to) {
    ptrdiff_t ins = interleaved(w) ? w->places : w->ins, first = from * PANEL, end = to * PANEL < w->outs ? to * PANEL : w->outs;
    const float *bias = w->bias ? w->bias + first : NULL;
    const uint32_t *numbers = w->numbers;
#define PROJECT(way, words_, scaled_, bias_, rows_)                                                                                           \
    product_##way(numbers + from * (words_), words_, w->scales + from * (scaled_), scaled_, w->code, (const char *)(rows_), rows->scales, count, ins, \
                  w->chunk, bias_, kind, out, first, end, w->outs)
    switch (w->kind) {
    case FLOAT32: PROJECT(NUMBERS, ins * PANEL, 0, bias, rows->numbers); break;
    case BFLOAT16:
        if (takes_pairs(rows->halves ? BFLOAT16 : FLOAT32, w)) PROJECT(PAIRS, ins / 2 * PANEL, 0, bias, rows->halves);
        else PROJECT(HALVES, ins / 2 * PANEL, 0, bias, rows->numbers);
        break;
    case FLOAT16: PROJECT(FLOAT16S, ins * PANEL / 2, 0, bias, rows->numbers); break;
    case INTERLEAVED: PROJECT(IN_ORDER, ins / 2 * PANEL, 0, bias, rows->numbers); break;
    case INTERLEAVED_FLOAT16: PROJECT(IN_ORDER_FLOAT16, ins * PANEL / 2, 0, bias, rows->numbers); break;
    case FOUR_BIT_GRID: PROJECT(STEPS, ins / 4 * LANES, ins / w->chunk * 2 * PANEL, bias, rows->on_grids); break;
    case EIGHT_BIT_GRID: PROJECT(FINE_STEPS, ins / 4 * PANEL, ins / w->chunk * 2 * PANEL, bias, rows->on_grids); break;
    case EIGHT_BITS: PROJECT(BYTES, ins / 4 * PANEL, 2 * PANEL, bias, rows->bytes); break;
#if defined(__AVX512BF16__)
    case PAIRED_FOUR_BITS: /* into bfloat16, and the bias is added behind that */
        PROJECT(PAIRED_CODES, ins / 4 * LANES, ins / BLOCK * PANEL, NULL, rows->halves);
        for (ptrdiff_t r = 0; r < (bias ? count : 0); r++)
            for (ptrdiff_t n = first; n < end; n++) {
                uint16_t *to = (uint16_t *)out + r * w->outs + n;
                *to = as_bfloat16(as_float(*to) + w->bias[n]);
            }
        break;
#endif
    default: PROJECT(CODES, ins / 4 * LANES, ins / BLOCK * PANEL, bias, rows->numbers);
    }
}

void project(const struct weight *w, const struct rows *rows, ptrdiff_t count, int kind, void *out) {
    ptrdiff_t panels = (w->outs + PANEL - 1) / PANEL, threads = omp_get_num_threads(), each = (panels + threads - 1) / threads;
    ptrdiff_t from = each * omp_get_thread_num(), to = from + each < panels ? from + each : panels;
    project_panels(w, rows, count, kind, out, from, to);
}

/* rows [count, ins] times a weight of `outs` outputs in panels -> out [count, outs].

   number: the kind of rows and out. scratch: [count, ins], for rows of 16 bits, [count, 1 + ins / 4] for EIGHT_BITS, and [count, ins] for weights on a grid;
   [count, places] for INTERLEAVED, whose rows are of the weight's kind.
   bias: [outs] or NULL. ins is even for BFLOAT16, and so is `chunk` (panels.h); ins is a multiple of BLOCK for FOUR_BITS, of 4 for
   EIGHT_BITS, of `chunk` on a grid. */
void lossless_panels(int kind, int number, const uint32_t *weight, const float *scales, const float *code, const int32_t *order, const void *rows,
                     float *scratch, const float *bias, void *out, ptrdiff_t count, ptrdiff_t ins, ptrdiff_t outs, ptrdiff_t chunk, ptrdiff_t places,
                     int threads) {
    struct weight w = {kind, ins, outs, chunk, places, weight, scales, code, bias, order};
    struct rows given = ready_exactly(&w, rows, count, scratch);
    if (!interleaved(&w) && !takes_pairs(number, &w) && kind != PAIRED_FOUR_BITS) {
        const float *numbers = rows;
        if (number != FLOAT32) {
            widen(number, rows, count * ins, scratch);
            numbers = scratch, scratch += count * ins;
        }
        given = ready(0, &w, 1, numbers, count, scratch);
    }
    struct team team = {0};
#pragma omp parallel num_threads(threads)
    {
        project(&w, &given, count, number, out);
        wait_for_all(&team);
    }
}

/* weights [outs, words], of 32 bits each, into panels [panels, words, PANEL], all of it 0 before: FLOAT32, or BFLOAT16 of two inputs a word. */
void lossless_lay(const uint32_t *weights, ptrdiff_t outs, ptrdiff_t words, uint32_t *panels, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (ptrdiff_t p = 0; p < (outs + PANEL - 1) / PANEL; p++)
        for (ptrdiff_t first = 0; first < words; first += LANES) /* a tile at a time, which stays in the nearest cache */
            for (ptrdiff_t n = 0; n < PANEL && p * PANEL + n < outs; n++)
                for (ptrdiff_t w = first; w < words && w < first + LANES; w++) panels[(p * words + w) * PANEL + n] = weights[(p * PANEL + n) * words + w];
}
