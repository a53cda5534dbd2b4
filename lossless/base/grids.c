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
static int lay_block(const float *weights, ptrdiff_t block, int64_t most, uint8_t *numbers, float *step, float *least) {
    int64_t whole[block], lowest = INT64_MAX, step_of = 0, highest = INT64_MIN;
    for (ptrdiff_t i = 0; i < block; i++) {
        float fine = weights[i] * FINEST;
        if (!(fabsf(fine) < 2147483648.0f) || fine != (float)(int64_t)fine) return 0;
        whole[i] = (int64_t)fine;
        lowest = whole[i] < lowest ? whole[i] : lowest;
        highest = whole[i] > highest ? whole[i] : highest;
    }
    for (ptrdiff_t i = 0; i < block; i++) {
        int64_t above = whole[i] - lowest;
        if (step_of == 0 || above % step_of) step_of = divisor(above, step_of);
        if (step_of && (highest - lowest) / step_of > most) return 0;
    }
    for (ptrdiff_t i = 0; i < block; i++) numbers[i] = step_of ? (uint8_t)((whole[i] - lowest) / step_of) : 0;
    *step = (float)step_of / FINEST, *least = (float)lowest / FINEST;
    return (int64_t)(float)step_of == step_of; /* the least one is a weight, and so a float */
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
