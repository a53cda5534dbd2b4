/* Weights that stand on a grid, laid out in panels (panels.h): found by whole numbers, so that nothing is lost.

   A block of weights was quantized if each is a small whole number of steps above the least of them. Scales of such formats are numbers of
   16 bits, whose last bit is never below 2^-24: so every weight is a whole number of those, and the step is the greatest common divisor
   of the distances. */

#include "panels.h"
#include <stdlib.h>

#define FINEST 16777216.0f     /* 2^24 */
#define FURTHEST 0x42800000    /* the bits of 64.0, of 2^30 of those: distances have 31 bits */

static int32_t divisor(int32_t a, int32_t b) {
    while (b) {
        int32_t rest = a % b;
        a = b, b = rest;
    }
    return a;
}

/* The whole numbers of a block, its step and its least weight; 0 if it stands on no grid of numbers up to `most`. */
INLINE int lay_block(const float *weights, const int block, int most, uint8_t *numbers, float *step_of, float *least_of) {
    int32_t above[block], least = INT32_MAX, highest = INT32_MIN, fine = 1;
    for (int i = 0; i < block; i++) {
        memcpy(&above[i], &weights[i], sizeof(int32_t));
        fine &= (above[i] & INT32_MAX) < FURTHEST;
    }
    if (!fine) return 0;
    for (int i = 0; i < block; i++) {
        float whole = weights[i] * FINEST;
        above[i] = (int32_t)whole;
        fine &= above[i] == whole;
        least = above[i] < least ? above[i] : least;
        highest = above[i] > highest ? above[i] : highest;
    }
    if (!fine) return 0;
    int32_t range = highest - least;
    uint32_t nearest = (uint32_t)range - 1; /* the step divides all distances: the least of those between neighbours is the first guess */
    for (int i = 1; i < block; i++) {
        uint32_t apart = (uint32_t)abs(above[i] - above[i - 1]) - 1; /* none at all is far */
        nearest = apart < nearest ? apart : nearest;
    }
    int32_t step = (int32_t)(nearest + 1);
    for (int i = 0; i < block; i++) above[i] -= least;
    for (int i = 0, right = step == 0; !right;) {
        float each = 1.0f / step;
        if (range * each > most + 0.5f) return 0;
        right = 1;
        for (int j = 0; j < block; j++) right &= (int32_t)rintf(above[j] * each) * step == above[j];
        while (!right && above[i] % step == 0) i++;
        if (!right) step = divisor(above[i], step);
    }
    float each = step ? 1.0f / step : 0;
    for (int i = 0; i < block; i++) numbers[i] = (uint8_t)(int32_t)rintf(above[i] * each);
    *step_of = step / FINEST, *least_of = least / FINEST;
    return (int32_t)(float)step == step; /* the least one is a weight, and so a float */
}

/* weights [outs, ins] -> numbers [panels, ins / 4, LANES or PANEL, 4] bytes, all of them 0 before, and scales [panels, ins / block, 2, PANEL];
   0 if they stand on no grid, and what was written then is of no use. bits: 4 or 8; block: 32 or 16, of
   which ins is a multiple. */
int lossless_lay_grid(const float *weights, ptrdiff_t outs, ptrdiff_t ins, ptrdiff_t block, int bits, uint8_t *numbers, float *scales, int threads) {
    int fits = 1;
    ptrdiff_t panels = (outs + PANEL - 1) / PANEL, wide = bits == 4 ? LANES : PANEL;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (ptrdiff_t p = 0; p < panels; p++)
        for (ptrdiff_t n = 0; n < PANEL && p * PANEL + n < outs; n++)
            for (ptrdiff_t b = 0; b < ins / block; b++) {
                uint32_t words[8];
                const float *own = weights + (p * PANEL + n) * ins + b * block;
                float *scale = scales + ((p * (ins / block) + b) * 2) * PANEL + n;
                uint32_t *to = (uint32_t *)numbers + (p * (ins / 4) + b * block / 4) * wide + n % wide;
                int go_on, most = (1 << bits) - 1;
#pragma omp atomic read
                go_on = fits;
                if (!go_on) continue;
                if (!(block == 32 ? lay_block(own, 32, most, (uint8_t *)words, scale, scale + PANEL)
                                  : lay_block(own, 16, most, (uint8_t *)words, scale, scale + PANEL))) {
#pragma omp atomic write
                    fits = 0;
                    continue;
                }
                for (ptrdiff_t i = 0; i < block / 4; i++) to[i * wide] |= words[i] << (n < wide ? 0 : 4);
            }
    return fits;
}
