/* Attention in bfloat16 with the bits of torch's own for a row by itself (flash attention on CPUs with AVX2 or AVX-512), for the rows of a draft
   tree: each over the keys of the past and of its own path, as if they stood side by side.

   Its order: a score is four sums, of every fourth dimension, s0 + s2 + (s1 + s3). Keys come in blocks of 512; what earlier blocks gave is
   scaled to the largest score so far. Of a block, exponentials of as many keys as a vector has lanes are those of `power`, added up in
   two vectors in turn, the rest are rounded from double; what values are weighted with is rounded to bfloat16, and values are added four keys at a time,
   v0 + v2 + (v1 + v3). */

#include "attention.h"

#if defined(EXACT)

#define KEYS 512          /* of a block */
#define SIDE (LANES / 4)  /* queries whose scores are summed side by side, four lanes each */

#if LANES == 16
#define FLOOR(a) ((f32s)_mm512_floor_ps((__m512)(a)))
#define FMA(a, b, c) ((f32s)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define WHOLE(a) ((i32s)_mm512_cvttps_epi32((__m512)(a)))
#define FOUR_TIMES(at) ((f32s)_mm512_broadcast_f32x4(_mm_loadu_ps(at)))
#define SWAP(a, how) ((f32s)_mm512_permute_ps((__m512)(a), how)) /* within each four lanes */
#else
#define FLOOR(a) ((f32s)_mm256_floor_ps((__m256)(a)))
#define FMA(a, b, c) ((f32s)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define WHOLE(a) ((i32s)_mm256_cvttps_epi32((__m256)(a)))
#define FOUR_TIMES(at) ((f32s)_mm256_broadcast_ps((const __m128 *)(at)))
#define SWAP(a, how) ((f32s)_mm256_permute_ps((__m256)(a), how))
#endif

/* e^x, to some twenty units in the last place: 2^(x log2 e), the fraction by a polynomial, both written into the bits of a number at once
   (Malossi and others, Fast exponential computation on SIMD architectures, 2015). */
INLINE f32s power(f32s x) {
    f32s turns = x * 1.44269502162933349609375f;
    f32s part = turns - FLOOR(turns);
    f32s zero = {};
    f32s rest = FMA(part, zero - 0.079204240219773236f, zero - 0.22433836478672356f);
    rest = FMA(part, rest, zero + 0.30354260500649682f);
    rest = FMA(part, rest, zero + 0.00010703434948458272f);
    f32s bits = FMA(zero + 8388608.0f, turns - rest, zero + 1065353216.0f);
    return (f32s)(WHOLE(bits) & ~(x < -87.3365478515625f));
}

/* e^x to the nearest number: of two thousand that expf gives one is not, and torch's are. */
INLINE float rounded_exponential(float x) { return (float)exp((double)x); }

/* scores[r * width + k] of four queries [SIDE, dim] with `count` keys; laid: room for SIDE * dim numbers. */
static void score(const float *asked, ptrdiff_t dim, const uint16_t *keys, ptrdiff_t stride, ptrdiff_t count, float *laid, float *scores,
                  ptrdiff_t width) {
    for (ptrdiff_t i = 0; i < dim; i += 4)
        for (int r = 0; r < SIDE; r++) memcpy(laid + i * SIDE + 4 * r, asked + r * dim + i, 4 * sizeof(float));
    for (ptrdiff_t k = 0; k < count; k++) {
        float key[dim];
        f32s sum = {};
        for (ptrdiff_t i = 0; i < dim; i += LANES) store(key + i, load_bfloat16(keys + k * stride + i));
        for (ptrdiff_t i = 0; i < dim; i += 4) sum += load(laid + i * SIDE) * FOUR_TIMES(key + i);
        sum += SWAP(sum, 0x4e);
        sum += SWAP(sum, 0xb1);
        for (int r = 0; r < SIDE; r++) scores[r * width + k] = sum[4 * r];
    }
}

/* Where a row's key or value of number k stands: in the past, or on the row's path. */
INLINE const uint16_t *at(const struct attention *a, int values, ptrdiff_t kv, ptrdiff_t r, ptrdiff_t k) {
    ptrdiff_t row = k < a->past ? k : a->past + a->paths[r * a->depth + k - a->past];
    return values ? value_at(a, kv, row) : key_at(a, kv, row);
}

/* found [dim] += the weighted values of keys first to first + count, four keys at a time. */
static void weigh(const struct attention *a, ptrdiff_t kv, ptrdiff_t r, ptrdiff_t first, ptrdiff_t count, const float *weights, float *found) {
    for (ptrdiff_t i = 0; i < a->dim; i += 2 * LANES) {
        f32s sum[2] = {load(found + i), load(found + i + LANES)};
        ptrdiff_t k = 0;
#define VALUE(j, half) (load_bfloat16(at(a, 1, kv, r, first + k + (j)) + i + (half) * LANES) * weights[k + (j)])
        for (; k + 4 <= count; k += 4)
            UNROLL for (int half = 0; half < 2; half++)
                sum[half] += (VALUE(0, half) + VALUE(2, half)) + (VALUE(1, half) + VALUE(3, half));
        for (ptrdiff_t j = count - k - 1; j >= 0; j--) /* what is left, the last one first */
            UNROLL for (int half = 0; half < 2; half++) sum[half] += VALUE(j, half);
        store(found + i, sum[0]);
        store(found + i + LANES, sum[1]);
    }
}

/* scores [count] -> weights, in place; returns their sum. */
static float exponentials(float *scores, ptrdiff_t count, float most) {
    f32s lanes[2] = {}, none = {};
    ptrdiff_t whole = count - count % LANES;
    for (ptrdiff_t k = 0; k < whole; k += LANES) {
        f32s found = power(load(scores + k) - most);
        lanes[k / LANES % 2] += found;
        store(scores + k, found);
    }
    float sum = sums(lanes[0] + lanes[1], none, none, none)[0];
    for (ptrdiff_t k = whole; k < count; k++) sum += scores[k] = rounded_exponential(scores[k] - most);
    for (ptrdiff_t k = 0; k < count; k++) scores[k] = as_float(as_bfloat16(scores[k]));
    return sum;
}

/* As lossless_attend (kernels.c), of bfloat16 only. scratch: for each thread SIDE * (2 * dim + past + depth) + dim numbers. */
void lossless_attend_exactly(int kind, const void *query, const void *keys, const void *values, void *out, float *scratch,
                             const int32_t *starts, const int32_t *lengths, const int32_t *paths, float scale, ptrdiff_t heads, ptrdiff_t kv_heads, ptrdiff_t rows,
                             ptrdiff_t dim, ptrdiff_t past, ptrdiff_t depth, const ptrdiff_t *strides, int threads) {
    struct attention a = {kind, heads, kv_heads, rows, dim, past, depth, scale, keys, values, {strides[2], strides[3]}, {strides[4], strides[5]},
                          starts, lengths, paths};
    ptrdiff_t group = heads / kv_heads, each = group * rows, parts = (each + SIDE - 1) / SIDE, width = past + depth;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (ptrdiff_t kv = 0; kv < kv_heads; kv++)
        for (ptrdiff_t p = 0; p < parts; p++) {
            float *asked = scratch + omp_get_thread_num() * (SIDE * (2 * dim + width) + dim), *laid = asked + SIDE * dim;
            float *scores = laid + SIDE * dim, *found = scores + SIDE * width;
            ptrdiff_t count = each - p * SIDE < SIDE ? each - p * SIDE : SIDE;
            memset(asked, 0, SIDE * dim * sizeof(float));
            for (ptrdiff_t n = 0; n < count; n++) {
                ptrdiff_t r = (p * SIDE + n) / group, head = kv * group + (p * SIDE + n) % group;
                widen(1, (const uint16_t *)query + head * strides[0] + r * strides[1], dim, asked + n * dim);
            }
            score(asked, dim, key_at(&a, kv, 0), a.key_strides[1], past, laid, scores, width);
            for (ptrdiff_t n = 0; n < count; n++) {
                ptrdiff_t r = (p * SIDE + n) / group, head = kv * group + (p * SIDE + n) % group;
                ptrdiff_t start = starts ? starts[r] : 0, end = past + lengths[r];
                for (ptrdiff_t k = past; k < end; k++) {
                    float some[SIDE];
                    score(asked, dim, at(&a, 0, kv, r, k), 0, 1, laid, some, 1);
                    scores[n * width + k] = some[n];
                }
                float most = -INFINITY, total = 0;
                memset(found, 0, dim * sizeof(float));
                for (ptrdiff_t first = start; first < end; first += KEYS) {
                    ptrdiff_t block = end - first < KEYS ? end - first : KEYS;
                    float *own = scores + n * width + first, largest = most;
                    for (ptrdiff_t k = 0; k < block; k++) {
                        own[k] *= scale;
                        largest = own[k] > largest ? own[k] : largest;
                    }
                    float sum = exponentials(own, block, largest), faded = rounded_exponential(most - largest);
                    total = sum + faded * total;
                    most = largest;
                    if (first > start)
                        for (ptrdiff_t i = 0; i < dim; i++) found[i] *= faded;
                    weigh(&a, kv, r, first, block, own, found);
                }
                float share = 1 / total;
                uint16_t *to = (uint16_t *)out + (r * heads + head) * dim;
                for (ptrdiff_t i = 0; i < dim; i++) to[i] = as_bfloat16(found[i] * share);
            }
        }
}

#endif
