/* Vectors of numbers, as gcc has them for any processor, and numbers of 16 bits. Shared by kernels.c and panels.c. */

#pragma once
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float f32s __attribute__((vector_size(LANES * 4)));
typedef float f32s_at __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t u32s __attribute__((vector_size(LANES * 4)));
typedef uint32_t u32s_at __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t i32s __attribute__((vector_size(LANES * 4)));
typedef uint16_t u16s __attribute__((vector_size(LANES * 2)));

enum kind { FLOAT32, BFLOAT16, FOUR_BITS };

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

INLINE void store_bfloat16(uint16_t *at, f32s numbers) {
    u32s bits = (u32s)numbers, none = (u32s)(numbers != numbers);
    bits = (((bits + 0x7fff + (bits >> 16 & 1)) & ~none) | ((bits | 0x400000) & none)) >> 16;
    u16s halves = __builtin_convertvector(bits, u16s);
    memcpy(at, &halves, sizeof halves);
}
