/* Products of rows with panels, in the way that WAY says: compiled for each by itself, by several processes at once. */

#include "panels.h"

#define NAMED(way) product_##way
#define NAME(way) NAMED(way)

#if defined(TILES)
/* The same by tiles, for pairs. */
INLINE void by_tiles(const uint32_t *panel, ptrdiff_t words, const uint16_t *rows, ptrdiff_t count, ptrdiff_t ins, const float *bias, int kind, void *out,
                     ptrdiff_t first, ptrdiff_t end, ptrdiff_t outs) {
    ptrdiff_t shaped = 0;
    for (; first < end; first += PANEL, panel += words, bias = bias ? bias + PANEL : NULL)
        for (ptrdiff_t r = 0, some; r < count; r += some) {
            float sums[2 * TALL][PANEL];
            some = count - r < 2 * TALL ? count - r : 2 * TALL;
            if (some != shaped) shape_tiles(shaped = some);
            multiply_tiles(panel, rows + r * ins, ins, some, sums);
            for (ptrdiff_t n = 0; n < some; n++) {
                f32s both[2] = {load(sums[n]), load(sums[n] + LANES)};
                finish(both, bias, kind, out, (r + n) * outs + first, end - first < PANEL ? end - first : PANEL);
            }
        }
    _tile_release();
}
#endif

PRODUCT(NAME(WAY)) {
#if defined(TILES)
    if (WAY == PAIRS && chunk == TILE && ins % TILE == 0 && lossless_tiles()) {
        by_tiles(panel, words, (const uint16_t *)rows, count, ins, bias, kind, out, first, end, outs);
        return;
    }
#endif
    const ptrdiff_t size = WAY == BYTES ? 1 : WAY == PAIRS || WAY == PAIRED_CODES ? 2 : 4;
    for (; first < end; first += PANEL, panel += words, scales += scaled, bias = bias ? bias + PANEL : NULL)
        for (ptrdiff_t r = 0, some, parts = (count + ROWS - 1) / ROWS; parts > 0; r += some, parts--) { /* about equal parts */
            const void *from = rows + r * ins * size;
            f32s sums[ROWS][2];
            some = (count - r + parts - 1) / parts;
#define CASE(n) case n: part(WAY, panel, scales, table, from, row_scales + r, ins, chunk, n, sums); break;
            switch (some) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if ROWS > 6
                CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
            }
            for (ptrdiff_t n = 0; n < some; n++) finish(sums[n], bias, kind, out, (r + n) * outs + first, end - first < PANEL ? end - first : PANEL);
        }
}
