/* Products of rows with weights on a grid, where there is an instruction for bytes (panels.h includes it, and has what is used here).

   A row becomes whole numbers, block by block: of 22 bits of the largest of TOGETHER inputs, in three digits of a byte. With the whole numbers that
   a grid has they give whole sums, in which nothing is rounded and no order matters; then these are scaled, block after block, in float32. That is as
   exact as sums in float32 are, takes fewer instructions, and weights need not become numbers first. */

#pragma once
#if defined(__AVX512VNNI__) && LANES == 16
#define WHOLE_ROWS
#define TOGETHER 32
#define HALF (TOGETHER / 2) /* a block of a grid has so many inputs, or TOGETHER */
#define DIGIT 7 /* bits */
#define LARGEST (127 << 2 * DIGIT)

struct whole {
    int8_t digits[3][TOGETHER]; /* the highest first */
    float scale;                /* what the numbers are multiplied with */
    float sums[3];              /* of the first half of the numbers, the second, and both */
    float unused[4];
};

static void to_whole(const float *rows, ptrdiff_t count, struct whole *out) {
    for (ptrdiff_t i = 0; i < count; i += TOGETHER, rows += TOGETHER, out++) {
        __m512 halves[2] = {_mm512_loadu_ps(rows), _mm512_loadu_ps(rows + LANES)};
        float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(halves[0]), _mm512_abs_ps(halves[1])));
        float odd = 0 * _mm512_reduce_add_ps(_mm512_add_ps(halves[0], halves[1])); /* not 0 if a number is none, or endless */
        out->scale = most < 1e-30f ? odd : most / LARGEST + odd;
        for (int half = 0; half < 2; half++) {
            __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(halves[half], _mm512_set1_ps(most < 1e-30f ? 0 : LARGEST / most)));
            out->sums[half] = (float)_mm512_reduce_add_epi32(number) * out->scale;
            for (int digit = 2; digit >= 0; digit--) {
                i32s all = (i32s)number, lowest = digit ? ((all + 64) & 127) - 64 : all;
                _mm_storeu_si128((__m128i *)(out->digits[digit] + half * LANES), _mm512_cvtepi32_epi8((__m512i)lowest));
                number = (__m512i)((all - lowest) >> DIGIT);
            }
        }
        out->sums[2] = out->sums[0] + out->sums[1];
    }
}

/* sum + one digit of each of HALF inputs of a row times the numbers of a grid that each lane has of them, four in a word */
INLINE i32s dot_digits(i32s sum, const u32s *numbers, const int8_t *digits) {
    UNROLL for (int w = 0; w < HALF / 4; w++) {
        int32_t four;
        memcpy(&four, digits + 4 * w, 4);
        sum = dot(sum, numbers[w], (u32s)(four - (i32s){}));
    }
    return sum;
}

/* The sums of rows in whole numbers with one panel of weights on a grid. */
INLINE void multiply_whole(enum way way, const uint32_t *panel, const float *scales, const float *rows, ptrdiff_t ins, ptrdiff_t block, ptrdiff_t stride,
                           int count, f32s (*sums)[2]) {
    const ptrdiff_t width = way == STEPS ? LANES : PANEL;
    for (ptrdiff_t b = 0; b < ins; b += block, scales += 2 * PANEL) {
        i32s low[ROWS][2] = {}, high[ROWS][2] = {}; /* numbers of eight bits make sums of more than 32 */
        for (ptrdiff_t i = b; i < b + block; i += HALF, panel += HALF / 4 * width) {
            u32s numbers[2][HALF / 4];
            UNROLL for (int w = 0; w < HALF / 4; w++) {
                u32s first = words(panel + w * width);
                numbers[0][w] = way == STEPS ? first & 0x0f0f0f0fu : first;
                numbers[1][w] = way == STEPS ? first >> 4 & 0x0f0f0f0fu : words(panel + w * width + LANES);
            }
            UNROLL for (int r = 0; r < count; r++) {
                const int8_t *digits = ((const struct whole *)(rows + r * stride + i / TOGETHER * TOGETHER))->digits[0] + i % TOGETHER;
                UNROLL for (int half = 0; half < 2; half++) {
                    i32s sum = dot_digits((i32s){}, numbers[half], digits) << DIGIT;
                    sum = dot_digits(sum, numbers[half], digits + TOGETHER);
                    if (way == STEPS) sum <<= DIGIT;
                    else high[r][half] += sum, sum = (i32s){};
                    low[r][half] += dot_digits(sum, numbers[half], digits + 2 * TOGETHER);
                }
            }
        }
        UNROLL for (int r = 0; r < count; r++) {
            const struct whole *row = (const struct whole *)(rows + r * stride + b / TOGETHER * TOGETHER);
            __m512 scale = _mm512_set1_ps(row->scale), least = _mm512_set1_ps(row->sums[block == TOGETHER ? 2 : b % TOGETHER / HALF]);
            UNROLL for (int half = 0; half < 2; half++) {
                __m512 sum = _mm512_cvtepi32_ps((__m512i)low[r][half]);
                if (way == FINE_STEPS) sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)high[r][half]), _mm512_set1_ps(1 << DIGIT), sum);
                __m512 more = _mm512_fmadd_ps((__m512)load(scales + PANEL + half * LANES), least, (__m512)sums[r][half]);
                sums[r][half] = (f32s)_mm512_fmadd_ps(_mm512_mul_ps(sum, scale), (__m512)load(scales + half * LANES), more);
            }
        }
    }
}
#endif
