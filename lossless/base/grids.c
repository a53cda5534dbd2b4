/* Weights that stand on a grid, laid out in panels (panels.h): found by whole numbers, so that nothing is lost.

   A block of weights was quantized if each is a small whole number of steps above the least of them. Scales of such formats are numbers of
   16 bits, whose last bit is never below 2^-24: so every weight is a whole number of those, and the step is the greatest common divisor
   of the distances. */

#include "panels.h"

#define FINEST 16777216.0f /* 2^24 */

static int64_t divisor(int64_t a, int64_t b) {
    while (b) {
        int64_t rest = a % b;
        a = b, b = rest;
    }
    return a;
}

/* The whole numbers of a block, its step and its least weight; 0 if it stands on no grid of numbers up to `most`. */
static int lay_block(const float *weights, ptrdiff_t block, int most, uint8_t *numbers, float *step_of, float *least_of) {
    double above[block], least = INFINITY, highest = -INFINITY;
    int fine = 1;
    for (ptrdiff_t i = 0; i < block; i++) {
        float whole = weights[i] * FINEST;
        fine &= fabsf(whole) < 2147483648.0f && rintf(whole) == whole;
        above[i] = whole;
        least = above[i] < least ? above[i] : least;
        highest = above[i] > highest ? above[i] : highest;
    }
    if (!fine) return 0;
    for (ptrdiff_t i = 0; i < block; i++) above[i] -= least;
    int64_t step = (int64_t)(highest - least);
    for (ptrdiff_t i = 0; i < block && step;) { /* the first guess is that all stand at either end */
        double each = 1.0 / step;
        if ((highest - least) * each > most + 0.5) return 0;
        ptrdiff_t right = 0;
        for (ptrdiff_t j = 0; j < block; j++) right += rint(above[j] * each) * step == above[j];
        if (right == block) break;
        while (fmod(above[i], step) == 0) i++;
        step = divisor((int64_t)above[i], step);
    }
    for (ptrdiff_t i = 0; i < block; i++) numbers[i] = step ? (uint8_t)rint(above[i] / step) : 0;
    *step_of = (float)step / FINEST, *least_of = (float)least / FINEST;
    return (int64_t)(float)step == step; /* the least one is a weight, and so a float */
}

/* weights [outs, ins] -> numbers [panels, ins / 4, LANES or PANEL, 4] bytes, all of them 0 before, and scales [panels, ins / block, 2, PANEL];
   0 if they stand on no grid, and what was written then is of no use. bits: 4 or 8. ins is a multiple of block, that one of 4. */
int lossless_lay_grid(const float *weights, ptrdiff_t outs, ptrdiff_t ins, ptrdiff_t block, int bits, uint8_t *numbers, float *scales, int threads) {
    int fits = 1;
    ptrdiff_t panels = (outs + PANEL - 1) / PANEL, wide = bits == 4 ? LANES : PANEL;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (ptrdiff_t p = 0; p < panels; p++)
        for (ptrdiff_t n = 0; n < PANEL && p * PANEL + n < outs; n++)
            for (ptrdiff_t b = 0; b < ins / block; b++) {
                uint8_t own[block];
                float *scale = scales + ((p * (ins / block) + b) * 2) * PANEL + n;
                int go_on;
#pragma omp atomic read
                go_on = fits;
                if (go_on && !lay_block(weights + (p * PANEL + n) * ins + b * block, block, (1 << bits) - 1, own, scale, scale + PANEL)) {
#pragma omp atomic write
                    fits = 0;
                    go_on = 0;
                }
                for (ptrdiff_t i = b * block; go_on && i < (b + 1) * block; i++) {
                    uint8_t *to = numbers + ((p * (ins / 4) + i / 4) * wide + n % wide) * 4 + i % 4;
                    *to |= own[i - b * block] << (n < wide ? 0 : 4);
                }
            }
    return fits;
}
