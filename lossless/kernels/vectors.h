/* Vectors of numbers, as gcc has them for any processor, numbers of 16 bits, and what is computed of them everywhere. */

#pragma once
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
/* Whether it is known in which order torch adds up numbers of 16 bits on this processor (exact.c, base/exact.py). Those of float16 are converted by
   the same processors. */
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define EXACT
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float f32s __attribute__((vector_size(LANES * 4)));
typedef float f32s_at __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t u32s __attribute__((vector_size(LANES * 4)));
typedef uint32_t u32s_at __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t i32s __attribute__((vector_size(LANES * 4)));
typedef uint16_t u16s __attribute__((vector_size(LANES * 2)));

enum kind { FLOAT32, BFLOAT16, FOUR_BITS, EIGHT_BITS, PAIRED_FOUR_BITS, FOUR_BIT_GRID, EIGHT_BIT_GRID, INTERLEAVED, FLOAT16, INTERLEAVED_FLOAT16 };

INLINE f32s load(const float *at) { return (f32s) * (const f32s_at *)at; }

INLINE void store(float *at, f32s numbers) { *(f32s_at *)at = numbers; }

INLINE f32s load_bfloat16(const uint16_t *at) {
    u16s halves;
    memcpy(&halves, at, sizeof halves);
    return (f32s)(__builtin_convertvector(halves, u32s) << 16);
}

INLINE float as_float(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

INLINE uint16_t as_bfloat16(float number) { /* to the nearest, of two the even one */
    uint32_t bits;
    memcpy(&bits, &number, 4);
    if (number != number) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* To the nearest numbers of bfloat16. */
INLINE f32s rounded(f32s numbers) {
    u32s bits = (u32s)numbers, none = (u32s)(numbers != numbers);
    return (f32s)((((bits + 0x7fff + (bits >> 16 & 1)) & ~none) | ((bits | 0x400000) & none)) & 0xffff0000u);
}

INLINE void store_bfloat16(uint16_t *at, f32s numbers) {
    u16s halves = __builtin_convertvector((u32s)rounded(numbers) >> 16, u16s);
    memcpy(at, &halves, sizeof halves);
}

#if defined(EXACT)
#if LANES == 16
INLINE f32s load_float16(const uint16_t *at) { return (f32s)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at)); }

INLINE void store_float16(uint16_t *at, f32s numbers) { _mm256_storeu_si256((__m256i *)at, _mm512_cvtps_ph((__m512)numbers, _MM_FROUND_TO_NEAREST_INT)); }
#else
INLINE f32s load_float16(const uint16_t *at) { return (f32s)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at)); }

INLINE void store_float16(uint16_t *at, f32s numbers) { _mm_storeu_si128((__m128i *)at, _mm256_cvtps_ph((__m256)numbers, _MM_FROUND_TO_NEAREST_INT)); }
#endif
#endif

/* What exact.c and exact_layer.c are compiled for: twice, the second time with IN_FLOAT16. */
#if defined(IN_FLOAT16)
#define SIXTEEN FLOAT16
#define EXACTLY(name) name##_exactly_in_float16
#else
#define SIXTEEN BFLOAT16
#define EXACTLY(name) name##_exactly_in_bfloat16
#endif

/* Numbers of float32, bfloat16 or float16: `kind` says which. */
INLINE ptrdiff_t bytes_of(int kind) { return kind == FLOAT32 ? 4 : 2; }

INLINE f32s load_kind(int kind, const void *at, ptrdiff_t i) {
#if defined(EXACT)
    if (kind == FLOAT16) return load_float16((const uint16_t *)at + i);
#endif
    return kind == BFLOAT16 ? load_bfloat16((const uint16_t *)at + i) : load((const float *)at + i);
}

INLINE void store_kind(int kind, void *at, ptrdiff_t i, f32s numbers) {
#if defined(EXACT)
    if (kind == FLOAT16) {
        store_float16((uint16_t *)at + i, numbers);
        return;
    }
#endif
    if (kind == BFLOAT16) store_bfloat16((uint16_t *)at + i, numbers);
    else store((float *)at + i, numbers);
}

/* To the nearest numbers of this kind. */
INLINE f32s rounded_to(int kind, f32s numbers) {
#if defined(EXACT)
    if (kind == FLOAT16) {
        uint16_t halves[LANES];
        store_float16(halves, numbers);
        return load_float16(halves);
    }
#endif
    return kind == BFLOAT16 ? rounded(numbers) : numbers;
}

INLINE float number_at(int kind, const void *at, ptrdiff_t i) {
#if defined(EXACT)
    if (kind == FLOAT16) return _cvtsh_ss(((const uint16_t *)at)[i]);
#endif
    return kind == BFLOAT16 ? as_float(((const uint16_t *)at)[i]) : ((const float *)at)[i];
}

INLINE void put_number(int kind, void *at, ptrdiff_t i, float number) {
#if defined(EXACT)
    if (kind == FLOAT16) {
        ((uint16_t *)at)[i] = _cvtss_sh(number, _MM_FROUND_TO_NEAREST_INT);
        return;
    }
#endif
    if (kind == BFLOAT16) ((uint16_t *)at)[i] = as_bfloat16(number);
    else ((float *)at)[i] = number;
}

/* Of each lane the larger number; b where one is none. */
INLINE f32s larger(f32s a, f32s b) {
    u32s more = (u32s)(a > b);
    return (f32s)(((u32s)a & more) | ((u32s)b & ~more));
}

/* The largest of `count` numbers and `most`. */
INLINE float largest_of(const float *numbers, ptrdiff_t count, float most) {
    f32s lanes = most - (f32s){};
    ptrdiff_t whole = count - count % LANES;
    for (ptrdiff_t i = 0; i < whole; i += LANES) lanes = larger(load(numbers + i), lanes);
    for (int lane = 0; lane < LANES; lane++) most = lanes[lane] > most ? lanes[lane] : most;
    for (ptrdiff_t i = whole; i < count; i++) most = numbers[i] > most ? numbers[i] : most;
    return most;
}

typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));

/* The lanes of a vector added up to four. */
INLINE f32x4 fold(f32s a) {
#if LANES == 16
    f32x8 x = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    f32x8 x = a;
#endif
    return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
}

/* The sums of four vectors, each in the same order. */
INLINE f32x4 sums(f32s first, f32s second, f32s third, f32s fourth) {
    f32x4 a = fold(first), b = fold(second), c = fold(third), d = fold(fourth);
    f32x4 s = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    f32x4 t = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(s, t, 0, 1, 4, 5) + __builtin_shufflevector(s, t, 2, 3, 6, 7);
}

/* e^x for x <= 0, to about one part in ten million. */
INLINE f32s exponential(f32s x) {
    const float magic = 12582912.0f; /* what is added to it is rounded to a whole number */
    x = larger(x, (f32s){} - 87.0f);
    f32s turns = (x * 1.44269504f + magic) - magic;
    f32s rest = x - turns * 0.693145752f;
    rest = rest - turns * 1.42860677e-6f;
    f32s found = rest * 1.98756915e-4f + 1.39819995e-3f;
    found = found * rest + 8.33345205e-3f;
    found = found * rest + 4.16657962e-2f;
    found = found * rest + 1.66666655e-1f;
    found = found * rest + 5.0e-1f;
    found = found * rest * rest + rest + 1.0f;
    return found * (f32s)((__builtin_convertvector(turns, i32s) + 127) << 23);
}

/* x / (1 + e^-x) */
INLINE f32s silu(f32s x) {
    u32s below = (u32s)(x < 0);
    f32s small = exponential(-(f32s)((u32s)x & 0x7fffffffu)), one = small - small + 1;
    return x * ((f32s)((below & (u32s)small) | (~below & (u32s)one)) / (1 + small));
}

/* Numbers of any kind -> float32. */
INLINE void widen(int kind, const void *from, ptrdiff_t count, float *to) {
    ptrdiff_t whole = count - count % LANES;
    for (ptrdiff_t i = 0; i < whole; i += LANES) store(to + i, load_kind(kind, from, i));
    for (ptrdiff_t i = whole; i < count; i++) to[i] = number_at(kind, from, i);
}

/* float32 -> numbers of any kind. */
INLINE void narrow(int kind, const float *from, ptrdiff_t count, void *to) {
    ptrdiff_t whole = count - count % LANES;
    for (ptrdiff_t i = 0; i < whole; i += LANES) store_kind(kind, to, i, load(from + i));
    for (ptrdiff_t i = whole; i < count; i++) put_number(kind, to, i, from[i]);
}

/* out = row / sqrt(mean of squares + eps) * weight, which may be NULL */
INLINE void normalize(const float *weight, float eps, const float *row, ptrdiff_t dim, float *out) {
    f32s squares = {}, none = {};
    ptrdiff_t whole = dim - dim % LANES;
    for (ptrdiff_t i = 0; i < whole; i += LANES) squares += load(row + i) * load(row + i);
    float sum = sums(squares, none, none, none)[0];
    for (ptrdiff_t i = whole; i < dim; i++) sum += row[i] * row[i];
    float scale = 1 / sqrtf(sum / dim + eps);
    for (ptrdiff_t i = 0; i < whole; i += LANES) store(out + i, weight ? load(row + i) * scale * load(weight + i) : load(row + i) * scale);
    for (ptrdiff_t i = whole; i < dim; i++) out[i] = weight ? row[i] * scale * weight[i] : row[i] * scale;
}
