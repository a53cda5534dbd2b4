/* Products of rows with panels, in the way that WAY says: compiled for each by itself, by several processes at once. */

#include "panels.h"

#define NAMED(way) product_##way
#define NAME(way) NAMED(way)

PRODUCT(NAME(WAY)) {
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
