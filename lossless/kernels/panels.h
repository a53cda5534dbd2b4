/* Products of rows with weights that were laid out for them once, in panels.

   A panel holds the weights of PANEL neighbouring outputs, input after input, so that lanes run along the outputs: each output is
   summed from the first input to the last, in a lane of its own, whatever rows stand beside it. So a row of a draft tree has the
   bits that it has by itself. A panel is read from memory once for all rows; sums are float32.

   Layouts, in words of 32 bits; an output and the one LANES behind it are a pair:
       FLOAT32    [panels, ins, PANEL]                 numbers
       BFLOAT16   [panels, ins / 2, PANEL]             two inputs in a word, the first in its low half
       FLOAT16    [panels, ins, PANEL / 2]             two outputs in a word
       FOUR_BITS  [panels, ins / 4, LANES]             four inputs in a word, a byte each, of it the first of a pair in the low half;
                  scales [panels, ins / 64, PANEL]     and `code`, 16 numbers that the four bits stand for
       PAIRED_FOUR_BITS  the same, multiplied with rows of bfloat16 in pairs
       EIGHT_BITS [panels, ins / 4, PANEL]             four inputs in a word, a byte each; scales [panels, 2, PANEL]: of each output what
                                                       its sum is multiplied with, and the sum of its weights, a whole number
       FOUR_BIT_GRID, EIGHT_BIT_GRID                   numbers as in FOUR_BITS, EIGHT_BITS; scales [panels, blocks, 2, PANEL]: of each block of
                                                       an output's weights the step between two numbers, and what 0 stands for

       INTERLEAVED [panels, places / 2, PANEL]         BFLOAT16 whose inputs are added up in several sums of `each`, one input after the other, and then
                                                       these sums in pairs, until one is left. Inputs of a sum stand side by side, and so do sums
                                                       that meet; some places are empty. Which input stands where is what `order` says
       INTERLEAVED_FLOAT16 [panels, places, PANEL / 2] the same of FLOAT16

   Rows for EIGHT_BITS are rounded to bytes, too: such products are for drafts. */

#pragma once
#include "vectors.h"

#define PANEL (2 * LANES)
#define BLOCK 64      /* 4-bit numbers with one scale */
#define HALVINGS 6    /* of the sums of INTERLEAVED, at most 2^6 */
#define AHEAD 1024    /* words that are fetched before they are needed */
#if LANES == 16
#define ROWS 12 /* rows whose sums fit the registers */
#else
#define ROWS 6
#endif

/* How rows are multiplied with a panel. PAIRS, PAIRED_CODES: rows of bfloat16, two inputs at a time, where the processor
   can; then `code` is of bfloat16, too, and a block is added up before it is scaled. */
enum way { NUMBERS, HALVES, FLOAT16S, CODES, BYTES, PAIRS, PAIRED_CODES, STEPS, FINE_STEPS, IN_ORDER, IN_ORDER_FLOAT16 };

/* Bytes of a row lie between 0 and 2 * MIDDLE - 1, MIDDLE stands for 0. Without the instruction for it, two products are added in 16
   bits, for which eight bits would be too many. */
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define MIDDLE 128
#else
#define MIDDLE 64
#endif

INLINE u32s words(const uint32_t *at) {
    __builtin_prefetch(at + AHEAD);
    return (u32s) * (const u32s_at *)at;
}

/* sums[r] += weights * rows[r][i], for both halves of a panel */
INLINE void add(f32s (*sums)[2], f32s first, f32s second, const float *rows, ptrdiff_t stride, int count) {
    UNROLL for (int r = 0; r < count; r++) {
        float row = rows[r * stride];
        sums[r][0] += first * row;
        sums[r][1] += second * row;
    }
}

/* What four bits stand for. */
struct code {
#if LANES == 16
    f32s all;
#else
    f32s low, high;
#endif
};

INLINE f32s decoded(struct code code, u32s numbers) {
#if LANES == 16
    return __builtin_shuffle(code.all, numbers);
#else
    return __builtin_shuffle(code.low, code.high, numbers);
#endif
}

#if defined(__AVX512BF16__)
/* What the low four bits of the two lowest bytes stand for: a pair of bfloat16 in each lane. */
INLINE __m512bh paired(struct code code, u32s two) {
    return (__m512bh)((u32s)decoded(code, two & 15) >> 16 | (u32s)decoded(code, two >> 8 & 15));
}
#endif

/* sum + four bytes of a row, in every lane, times four weights of each lane */
INLINE i32s dot(i32s sum, u32s bytes, u32s weights) {
#if defined(__AVX512VNNI__) && LANES == 16
    return (i32s)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, (__m512i)weights);
#elif defined(__AVX512BW__) && LANES == 16
    return sum + (i32s)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)bytes, (__m512i)weights), _mm512_set1_epi16(1));
#elif defined(__AVXVNNI__)
    return (i32s)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)bytes, (__m256i)weights);
#elif defined(__AVX2__) && LANES == 8
    return sum + (i32s)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)bytes, (__m256i)weights), _mm256_set1_epi16(1));
#else
    UNROLL for (int j = 0; j < 4; j++) sum += ((i32s)weights << (24 - 8 * j) >> 24) * (i32s)(bytes >> (8 * j) & 255);
    return sum;
#endif
}

/* Rows [count, ins] for EIGHT_BITS: bytes, and of each row what they are to be multiplied with. */
static void to_bytes(const float *rows, ptrdiff_t count, ptrdiff_t ins, uint8_t *bytes, float *scales) {
    for (ptrdiff_t r = 0; r < count; r++, rows += ins, bytes += ins) {
        f32s lanes = {};
        ptrdiff_t whole = ins - ins % LANES;
        for (ptrdiff_t i = 0; i < whole; i += LANES) lanes = larger((f32s)((u32s)load(rows + i) & 0x7fffffffu), lanes);
        float most = 1e-30f;
        for (int lane = 0; lane < LANES; lane++) most = lanes[lane] > most ? lanes[lane] : most;
        for (ptrdiff_t i = whole; i < ins; i++) most = fabsf(rows[i]) > most ? fabsf(rows[i]) : most;
        float scale = (MIDDLE - 1) / most;
        scales[r] = 1 / scale;
        for (ptrdiff_t i = 0; i < ins; i++) bytes[i] = (uint8_t)(rows[i] * scale + (MIDDLE + 0.5f));
    }
}

#include "whole.h"

INLINE f32s number(u32s whole) { return __builtin_convertvector((i32s)whole, f32s); }

/* Sums to another place: gcc would copy them as bytes, which takes longer than to add them up. */
INLINE void hand_on(f32s (*to)[2], f32s (*from)[2], int count) {
    UNROLL for (int r = 0; r < count; r++) to[r][0] = from[r][0], to[r][1] = from[r][1];
}

/* The sums of `count` rows, which is known where this is compiled, with one panel. row_scales: of rows in bytes. block: of weights on a
   grid. Rows stand `stride` numbers apart. */
INLINE void multiply(enum way way, const uint32_t *panel, const float *scales, const float *table, const void *rows_, const float *row_scales,
                     ptrdiff_t ins, ptrdiff_t block, ptrdiff_t stride, int count, f32s (*out)[2]) {
    const float *rows = rows_;
    f32s sums[ROWS][2] = {}; /* of its own, so that they stay in registers */
    if (way == NUMBERS)
        for (ptrdiff_t i = 0; i < ins; i++, panel += PANEL)
            add(sums, (f32s)words(panel), (f32s)words(panel + LANES), rows + i, stride, count);
    if (way == HALVES)
        for (ptrdiff_t i = 0; i < ins; i += 2, panel += PANEL) {
            u32s first = words(panel), second = words(panel + LANES);
            add(sums, (f32s)(first << 16), (f32s)(second << 16), rows + i, stride, count);
            add(sums, (f32s)(first & 0xffff0000u), (f32s)(second & 0xffff0000u), rows + i + 1, stride, count);
        }
#if defined(EXACT)
    if (way == FLOAT16S)
        for (ptrdiff_t i = 0; i < ins; i++, panel += PANEL / 2) {
            __builtin_prefetch(panel + AHEAD);
            const uint16_t *weights = (const uint16_t *)panel;
            add(sums, load_float16(weights), load_float16(weights + LANES), rows + i, stride, count);
        }
#endif
    if (way == CODES) {
        struct code code;
        memcpy(&code, table, sizeof code);
        for (ptrdiff_t b = 0; b < ins; b += BLOCK, scales += PANEL) {
            f32s first = load(scales), second = load(scales + LANES);
            for (ptrdiff_t i = b; i < b + BLOCK; i += 4, panel += LANES) {
                u32s four = words(panel);
                UNROLL for (int j = 0; j < 4; j++)
                    add(sums, decoded(code, four >> (8 * j) & 15) * first, decoded(code, four >> (8 * j + 4) & 15) * second, rows + i + j, stride, count);
            }
        }
    }
#if defined(WHOLE_ROWS)
    if (way == STEPS || way == FINE_STEPS) multiply_whole(way, panel, scales, rows, ins, block, stride, count, sums);
#else
    if (way == STEPS || way == FINE_STEPS)
        for (ptrdiff_t b = 0; b < ins; b += block, scales += 2 * PANEL) {
            f32s step[2] = {load(scales), load(scales + LANES)}, least[2] = {load(scales + PANEL), load(scales + PANEL + LANES)};
            for (ptrdiff_t i = b; i < b + block; i += 4, panel += way == STEPS ? LANES : PANEL) {
                u32s first = words(panel), second = way == STEPS ? first >> 4 : words(panel + LANES);
                const uint32_t mask = way == STEPS ? 15 : 255;
                UNROLL for (int j = 0; j < 4; j++)
                    add(sums, number(first >> (8 * j) & mask) * step[0] + least[0], number(second >> (8 * j) & mask) * step[1] + least[1],
                        rows + i + j, stride, count);
            }
        }
#endif
    if (way == BYTES) {
        const uint8_t *bytes = rows_;
        i32s dots[ROWS][2] = {};
        for (ptrdiff_t i = 0; i < ins; i += 4, panel += PANEL) {
            u32s first = words(panel), second = words(panel + LANES);
            UNROLL for (int r = 0; r < count; r++) {
                uint32_t four;
                memcpy(&four, bytes + r * stride + i, 4);
                u32s row = four - (u32s){};
                dots[r][0] = dot(dots[r][0], row, first);
                dots[r][1] = dot(dots[r][1], row, second);
            }
        }
        i32s first = (i32s)load(scales + PANEL) * MIDDLE, second = (i32s)load(scales + PANEL + LANES) * MIDDLE;
        UNROLL for (int r = 0; r < count; r++) {
            sums[r][0] = __builtin_convertvector(dots[r][0] - first, f32s) * load(scales) * row_scales[r];
            sums[r][1] = __builtin_convertvector(dots[r][1] - second, f32s) * load(scales + LANES) * row_scales[r];
        }
    }
#if defined(__AVX512BF16__)
    if (way == PAIRS) {
        const uint16_t *halves = rows_;
        for (ptrdiff_t i = 0; i < ins; i += 2, panel += PANEL) {
            __m512bh first = (__m512bh)words(panel), second = (__m512bh)words(panel + LANES);
            UNROLL for (int r = 0; r < count; r++) {
                int32_t pair;
                memcpy(&pair, halves + r * stride + i, 4);
                __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
                sums[r][0] = (f32s)_mm512_dpbf16_ps((__m512)sums[r][0], first, row);
                sums[r][1] = (f32s)_mm512_dpbf16_ps((__m512)sums[r][1], second, row);
            }
        }
    }
    if (way == PAIRED_CODES) {
        const uint16_t *halves = rows_;
        struct code code;
        memcpy(&code, table, sizeof code);
        for (ptrdiff_t b = 0; b < ins; b += BLOCK, scales += PANEL) {
            f32s added[ROWS][2] = {};
            for (ptrdiff_t i = b; i < b + BLOCK; i += 4, panel += LANES) {
                u32s four = words(panel);
                UNROLL for (int j = 0; j < 4; j += 2) {
                    __m512bh first = paired(code, four >> (8 * j)), second = paired(code, four >> (8 * j + 4));
                    UNROLL for (int r = 0; r < count; r++) {
                        int32_t pair;
                        memcpy(&pair, halves + r * stride + i + j, 4);
                        __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
                        added[r][0] = (f32s)_mm512_dpbf16_ps((__m512)added[r][0], first, row);
                        added[r][1] = (f32s)_mm512_dpbf16_ps((__m512)added[r][1], second, row);
                    }
                }
            }
            f32s first = load(scales), second = load(scales + LANES);
            UNROLL for (int r = 0; r < count; r++) {
                sums[r][0] = (f32s)_mm512_fmadd_ps((__m512)added[r][0], (__m512)first, (__m512)sums[r][0]);
                sums[r][1] = (f32s)_mm512_fmadd_ps((__m512)added[r][1], (__m512)second, (__m512)sums[r][1]);
            }
        }
    }
#endif
    hand_on(out, sums, count);
}

#include "tiles.h"

/* The sums of a row, with a bias, to where they belong: `valid` outputs of them are asked for. */
INLINE void finish(const f32s *sums, const float *bias, int kind, void *out, ptrdiff_t at, ptrdiff_t valid) {
    if (valid == PANEL) {
        for (int half = 0; half < 2; half++, at += LANES) {
            f32s sum = bias ? sums[half] + load(bias + half * LANES) : sums[half];
            store_kind(kind, out, at, sum);
        }
        return;
    }
    float some[PANEL];
    store(some, sums[0]);
    store(some + LANES, sums[1]);
    for (ptrdiff_t n = 0; n < valid; n++) {
        put_number(kind, out, at + n, bias ? some[n] + bias[n] : some[n]);
    }
}

/* Rows [count, ins] of 16 bits as INTERLEAVED weights are multiplied with them: [count, places]. order: the input that stands at each, -1 for none. */
INLINE void interleave(int kind, const uint16_t *rows, ptrdiff_t count, ptrdiff_t ins, const int32_t *order, ptrdiff_t places, float *out) {
    for (ptrdiff_t r = 0; r < count; r++, rows += ins, out += places)
        for (ptrdiff_t n = 0; n < places; n++) out[n] = order[n] < 0 ? 0 : number_at(kind, rows, order[n]);
}

/* The rows of one part with one panel of INTERLEAVED weights. */
INLINE void in_order(enum way way, const uint32_t *panel, const float *rows, ptrdiff_t places, ptrdiff_t each, int count, f32s (*out)[2]) {
    f32s waiting[HALVINGS][ROWS][2], sums[ROWS][2];
    for (ptrdiff_t n = 0; n < places / each; n++, panel += each * PANEL / 2, rows += each) {
        multiply(way, panel, NULL, NULL, rows, NULL, each, each, places, count, sums);
        int level = 0;
        for (; n >> level & 1; level++)
            UNROLL for (int r = 0; r < count; r++) sums[r][0] += waiting[level][r][0], sums[r][1] += waiting[level][r][1];
        if (level < HALVINGS) hand_on(waiting[level], sums, count);
    }
    hand_on(out, sums, count);
}

/* The rows of one part with one panel; in chunks of inputs, whose sums are added up one after the other. */
INLINE void part(enum way way, const uint32_t *panel, const float *scales, const float *table, const void *rows, const float *row_scales,
                 ptrdiff_t ins, ptrdiff_t chunk, int count, f32s (*sums)[2]) {
    if (way == IN_ORDER || way == IN_ORDER_FLOAT16) {
        in_order(way == IN_ORDER ? HALVES : FLOAT16S, panel, rows, ins, chunk, count, sums);
        return;
    }
    if (way != PAIRS || chunk >= ins) {
        multiply(way, panel, scales, table, rows, row_scales, ins, chunk, ins, count, sums);
        return;
    }
    memset(sums, 0, count * sizeof *sums);
    for (ptrdiff_t i = 0; i < ins; i += chunk) {
        f32s some[ROWS][2];
        multiply(way, panel + i / 2 * PANEL, scales, table, (const uint16_t *)rows + i, row_scales, ins - i < chunk ? ins - i : chunk, chunk, ins, count, some);
        UNROLL for (int r = 0; r < count; r++) sums[r][0] += some[r][0], sums[r][1] += some[r][1];
    }
}

/* All rows with the panels of outputs `first` to `end`, in a way that is known where this is compiled: product.c is, for each of them. Panels stand
   `words` apart, their scales `scaled` numbers; bias is of `first`, or NULL. chunk: of inputs that are added up by themselves, if both are bfloat16, at
   least `ins` for none; of weights on a grid the block; of INTERLEAVED ones `each`, and `ins` are the places. kind: of what comes out. */
#define PRODUCT(name)                                                                                                                          \
    void name(const uint32_t *panel, ptrdiff_t words, const float *scales, ptrdiff_t scaled, const float *table, const char *rows,             \
              const float *row_scales, ptrdiff_t count, ptrdiff_t ins, ptrdiff_t chunk, const float *bias, int kind, void *out,                \
              ptrdiff_t first, ptrdiff_t end, ptrdiff_t outs)

PRODUCT(product_NUMBERS);
PRODUCT(product_HALVES);
PRODUCT(product_FLOAT16S);
PRODUCT(product_CODES);
PRODUCT(product_BYTES);
PRODUCT(product_PAIRS);
PRODUCT(product_PAIRED_CODES);
PRODUCT(product_STEPS);
PRODUCT(product_FINE_STEPS);
PRODUCT(product_IN_ORDER);
PRODUCT(product_IN_ORDER_FLOAT16);
