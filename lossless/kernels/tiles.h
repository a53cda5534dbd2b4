/* Products of rows in bfloat16 with panels by tiles (AMX), where the processor has them and the system lets this process use them.

   A tile of rows times a tile of weights are TILE inputs at once, so that up to TALL rows take as long as one. Of the inputs of a tile those in even
   places are added up by themselves, and those in odd ones; then both, and that to the sum so far. So does oneDNN where it multiplies by tiles. Each row
   has a row of every tile to itself, and the bits that it has alone. */

#pragma once
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TILES
#endif
#define TILE 32 /* inputs */
#define TALL 16 /* rows */

/* Whether the system lets it, asked when the library is loaded. */
int lossless_tiles(void);

#if defined(TILES)
struct shape { /* of all tiles, as the processor takes it */
    uint8_t palette, start, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

/* Tiles 0 to 3: sums of the first and the second half of a panel, of up to TALL rows, and of those behind; 4, 5: weights; 6, 7: rows. */
INLINE void shape_tiles(int count) {
    uint8_t first = count < TALL ? count : TALL, second = count > TALL ? count - TALL : 1;
    struct shape shape = {.palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {first, first, second, second, 16, 16, first, second}};
    _tile_loadconfig(&shape);
}

/* The sums of `count` rows, at most 2 * TALL, for which the tiles have their shape, with one panel. */
INLINE void multiply_tiles(const uint32_t *panel, const uint16_t *rows, ptrdiff_t ins, int count, float (*sums)[PANEL]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (ptrdiff_t i = 0; i < ins; i += TILE, panel += TILE / 2 * PANEL) {
        for (int line = 0; line < TILE / 2 * PANEL; line += 16) __builtin_prefetch(panel + 2 * AHEAD + line);
        _tile_loadd(4, panel, PANEL * sizeof *panel);
        _tile_loadd(5, panel + LANES, PANEL * sizeof *panel);
        _tile_loadd(6, rows + i, ins * sizeof *rows);
        _tile_dpbf16ps(0, 6, 4);
        _tile_dpbf16ps(1, 6, 5);
        if (count > TALL) {
            _tile_loadd(7, rows + TALL * ins + i, ins * sizeof *rows);
            _tile_dpbf16ps(2, 7, 4);
            _tile_dpbf16ps(3, 7, 5);
        }
    }
    _tile_stored(0, sums[0], sizeof *sums);
    _tile_stored(1, sums[0] + LANES, sizeof *sums);
    if (count > TALL) {
        _tile_stored(2, sums[TALL], sizeof *sums);
        _tile_stored(3, sums[TALL] + LANES, sizeof *sums);
    }
}
#endif
