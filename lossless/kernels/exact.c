/* Attention in 16 bits with the bits of torch's own for a row by itself (flash attention on CPUs with AVX2 or AVX-512), for the rows of a draft
   tree: each over the keys of the past and of its own path, as if they stood side by side.

   Its order: a score is four sums, of every fourth dimension, s0 + s2 + (s1 + s3). Keys come in blocks of 512; what earlier blocks gave is
   scaled to the largest score so far. Of a block, exponentials of as many keys as a vector has lanes are those of `power`, added up in
   two vectors in turn, the rest are rounded from double; what values are weighted with is rounded to 16 bits, and values are added four keys at a time,
   v0 + v2 + (v1 + v3). On Intel's processors MKL has other products of bfloat16: they stand below under SUMS_APART and PAIRED. In float16 the products are those of
   MKL, in the order that it has on AMD's processors: what they do otherwise stands below under IN_FLOAT16. */

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

/* MKL on Intel's processors, of bfloat16. Those that do not multiply pairs: values of every fourth key, with AVX-512 of every second one, are added up
   by themselves, and then these sums. */
#define SUMS_APART (SIXTEEN == BFLOAT16 && __builtin_cpu_is("intel"))

/* Those that multiply pairs: a score is sixteen sums of pairs of dimensions, of each pair the second first; those that are half of all apart meet,
   and then neighbours in turn. Values are weighted in pairs of keys, and added eight keys at a time. */
#if defined(__AVX512BF16__) && !defined(IN_FLOAT16)
#define PAIRED __builtin_cpu_is("intel")

INLINE void score_paired(const float *asked, ptrdiff_t dim, const uint16_t *keys, ptrdiff_t stride, ptrdiff_t count, float *laid, float *scores,
                         ptrdiff_t width) {
    const uint16_t *queries = (const uint16_t *)laid;
    narrow(BFLOAT16, asked, SIDE * dim, laid);
    for (ptrdiff_t k = 0; k < count; k++, keys += stride) {
        __m512 sum[SIDE] = {};
        for (ptrdiff_t i = 0; i < dim; i += 2 * LANES) {
            __m512bh key = (__m512bh)_mm512_loadu_si512(keys + i);
            UNROLL for (int r = 0; r < SIDE; r++) sum[r] = _mm512_dpbf16_ps(sum[r], key, (__m512bh)_mm512_loadu_si512(queries + r * dim + i));
        }
        __m256 half[SIDE];
        UNROLL for (int r = 0; r < SIDE; r++) half[r] = _mm256_add_ps(_mm512_castps512_ps256(sum[r]), _mm512_extractf32x8_ps(sum[r], 1));
        __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
        f32x4 found = (f32x4)_mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
        for (int r = 0; r < SIDE; r++) scores[r * width + k] = found[r];
    }
}
#endif

/* scores[r * width + k] of four queries [SIDE, dim] with `count` keys; laid: room for SIDE * dim numbers. */
static void score(const float *asked, ptrdiff_t dim, const uint16_t *keys, ptrdiff_t stride, ptrdiff_t count, float *laid, float *scores,
                  ptrdiff_t width) {
#if defined(PAIRED)
    if (PAIRED) {
        score_paired(asked, dim, keys, stride, count, laid, scores, width);
        return;
    }
#endif
    for (ptrdiff_t i = 0; i < dim; i += 4)
        for (int r = 0; r < SIDE; r++) memcpy(laid + i * SIDE + 4 * r, asked + r * dim + i, 4 * sizeof(float));
    for (ptrdiff_t k = 0; k < count; k++) {
        float key[dim];
        f32s sum = {};
        for (ptrdiff_t i = 0; i < dim; i += LANES) store(key + i, load_kind(SIXTEEN, keys, k * stride + i));
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

#define VALUE(key, i) load_kind(SIXTEEN, at(a, 1, kv, r, first + (key)), i) * weights[key]

#if defined(PAIRED)
/* Weights [count] become bfloat16, in their own place; a 0 stands behind an odd one. */
static void pack(float *weights, ptrdiff_t count) {
    for (ptrdiff_t k = 0; k < count; k += LANES) {
        ptrdiff_t some = count - k < LANES ? count - k : LANES;
        float wide[LANES] = {};
        uint16_t halves[LANES];
        memcpy(wide, weights + k, some * sizeof *wide);
        store_bfloat16(halves, load(wide));
        memcpy((char *)weights + k * sizeof *halves, halves, (some + some % 2) * sizeof *halves);
    }
}

/* found[n] [dim] += the values of 8 keys at a time, at most, weighted with those of each of `queries`, which are packed. */
INLINE void weigh_paired(const struct attention *a, ptrdiff_t kv, ptrdiff_t r, ptrdiff_t first, ptrdiff_t count, const float *weights, ptrdiff_t width,
                         int queries, float *found) {
    for (ptrdiff_t i = 0; i < a->dim; i += LANES) {
        f32s all[SIDE];
        UNROLL for (int n = 0; n < queries; n++) all[n] = load(found + n * a->dim + i);
        for (ptrdiff_t k = 0; k < count;) {
            __m512 sum[SIDE] = {};
            for (ptrdiff_t end = k + 8 < count ? k + 8 : count; k < end; k += 2) {
                u32s both = (u32s)load_kind(BFLOAT16, at(a, 1, kv, r, first + k), i) >> 16;
                if (k + 1 < count) both |= (u32s)load_kind(BFLOAT16, at(a, 1, kv, r, first + k + 1), i);
                UNROLL for (int n = 0; n < queries; n++) {
                    int32_t pair;
                    memcpy(&pair, (const char *)(weights + n * width) + k * 2, sizeof pair);
                    sum[n] = _mm512_dpbf16_ps(sum[n], (__m512bh)both, (__m512bh)_mm512_set1_epi32(pair));
                }
            }
            UNROLL for (int n = 0; n < queries; n++) all[n] += (f32s)sum[n];
        }
        UNROLL for (int n = 0; n < queries; n++) store(found + n * a->dim + i, all[n]);
    }
}
#endif

/* found [dim] += the weighted values of keys first to first + count: in bfloat16 four keys at a time, in float16 one after the other. */
static void weigh(const struct attention *a, ptrdiff_t kv, ptrdiff_t r, ptrdiff_t first, ptrdiff_t count, const float *weights, float *found) {
    for (ptrdiff_t i = 0; i < a->dim; i += 2 * LANES) {
        f32s sum[2] = {load(found + i), load(found + i + LANES)};
        ptrdiff_t k = 0;
        if (SUMS_APART) {
            const int apart = LANES == 16 ? 2 : 4;
            f32s four[4][2] = {};
            for (; k + apart <= count; k += apart)
                UNROLL for (int j = 0; j < 2 * apart; j++) four[j / 2][j % 2] += VALUE(k + j / 2, i + j % 2 * LANES);
            UNROLL for (int half = 0; half < 2; half++) sum[half] += (four[0][half] + four[2][half]) + (four[1][half] + four[3][half]);
            for (; k < count; k++)
                UNROLL for (int half = 0; half < 2; half++) sum[half] += VALUE(k, i + half * LANES);
        }
        if (SIXTEEN == FLOAT16)
            for (; k < count; k++)
                UNROLL for (int half = 0; half < 2; half++) sum[half] += VALUE(k, i + half * LANES);
        for (; k + 4 <= count; k += 4)
            UNROLL for (int half = 0; half < 2; half++)
                sum[half] += (VALUE(k, i + half * LANES) + VALUE(k + 2, i + half * LANES)) + (VALUE(k + 1, i + half * LANES) + VALUE(k + 3, i + half * LANES));
        for (ptrdiff_t j = count - 1; j >= k; j--) /* what is left, the last one first */
            UNROLL for (int half = 0; half < 2; half++) sum[half] += VALUE(j, i + half * LANES);
        store(found + i, sum[0]);
        store(found + i + LANES, sum[1]);
    }
}

#if defined(IN_FLOAT16)
/* The same of the first `dims` dimensions, with which torch's memory begins that is not aligned to four numbers: eight keys at a time there, as
   two sums of four. */
static void weigh_first(const struct attention *a, ptrdiff_t kv, ptrdiff_t r, ptrdiff_t first, ptrdiff_t count, const float *weights, ptrdiff_t dims, float *found) {
#define ONE(key) number_at(FLOAT16, at(a, 1, kv, r, first + (key)), i) * weights[key]
    for (ptrdiff_t i = 0; i < dims; i++) {
        ptrdiff_t k = 0;
        for (; k + 8 <= count; k += 8)
            found[i] = (((found[i] + ONE(k)) + ONE(k + 1)) + ONE(k + 2)) + ONE(k + 3) + (((ONE(k + 4) + ONE(k + 5)) + ONE(k + 6)) + ONE(k + 7));
        for (; k < count; k++) found[i] += ONE(k);
    }
}

/* The score of a query [dim] with one of the last keys of a block, those behind every four: eight sums of every eighth dimension there. */
static float score_last(const float *asked, const uint16_t *key, ptrdiff_t dim) {
    f32x8 sum = {};
    for (ptrdiff_t i = 0; i < dim; i += 8) {
        f32x8 query;
        memcpy(&query, asked + i, sizeof query);
        sum += query * (f32x8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(key + i)));
    }
    f32x4 four = __builtin_shufflevector(sum, sum, 0, 1, 2, 3) + __builtin_shufflevector(sum, sum, 4, 5, 6, 7);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/* With how many dimensions of a head its memory begins that is not aligned: torch gives each thread as many heads, and room for scores, two numbers
   and what is found, one thread behind the other. */
static ptrdiff_t not_aligned(ptrdiff_t head, ptrdiff_t heads, ptrdiff_t keys, int threads) {
    ptrdiff_t thread = head / ((heads + threads - 1) / threads);
    return -(thread + 1) * ((keys < KEYS ? keys : KEYS) + 2) & 3;
}
#endif

/* scores [count] -> weights, in place; returns their sum. */
static float exponentials(float *scores, ptrdiff_t count, float most) {
    f32s lanes[2] = {}, none = {};
    ptrdiff_t whole = count - count % LANES;
    for (ptrdiff_t k = 0; k < whole; k += LANES) {
        f32s found = power(load(scores + k) - most);
        lanes[k / LANES % 2] += found;
        store(scores + k, rounded_to(SIXTEEN, found));
    }
    float sum = sums(lanes[0] + lanes[1], none, none, none)[0];
    for (ptrdiff_t k = whole; k < count; k++) {
        uint16_t half;
        float found = rounded_exponential(scores[k] - most);
        sum += found;
        put_number(SIXTEEN, &half, 0, found);
        scores[k] = number_at(SIXTEEN, &half, 0);
    }
    return sum;
}

/* scores [count] *= scale; returns the largest of them and `most`, and adds to `nothing` what is not 0 if one is no finite number. */
static float scaled(float *scores, ptrdiff_t count, float scale, float most, float *nothing) {
    f32s odd = {}, none = {};
    ptrdiff_t whole = count - count % LANES;
    for (ptrdiff_t k = 0; k < whole; k += LANES) {
        f32s found = load(scores + k) * scale;
        odd += found * 0;
        store(scores + k, found);
    }
    *nothing += sums(odd, none, none, none)[0];
    for (ptrdiff_t k = whole; k < count; k++) *nothing += (scores[k] *= scale) * 0;
    return largest_of(scores, count, most);
}

void EXACTLY(attend)(const struct attention *a, const uint16_t *query, ptrdiff_t head_stride, ptrdiff_t row_stride, float *scratch, int threads,
                     uint16_t *out, int *odd) {
    ptrdiff_t heads = a->heads, kv_heads = a->kv_heads, rows = a->rows, dim = a->dim, past = a->past;
    ptrdiff_t group = heads / kv_heads, each = group * rows, parts = (each + SIDE - 1) / SIDE, width = past + a->depth;
#pragma omp for collapse(2) schedule(static) nowait
    for (ptrdiff_t kv = 0; kv < kv_heads; kv++)
        for (ptrdiff_t p = 0; p < parts; p++) {
            float *asked = scratch + omp_get_thread_num() * SIDE * (2 * dim + width), *laid = asked + SIDE * dim, *scores = laid + SIDE * dim;
            float most[SIDE], total[SIDE] = {}, nothing = 0; /* as long as all numbers are finite */
            ptrdiff_t count = each - p * SIDE < SIDE ? each - p * SIDE : SIDE, starts[SIDE], ends[SIDE], longest = 0;
            memset(asked, 0, SIDE * dim * sizeof(float));
            for (ptrdiff_t n = 0; n < count; n++) {
                ptrdiff_t r = (p * SIDE + n) / group, head = kv * group + (p * SIDE + n) % group;
                widen(SIXTEEN, query + head * head_stride + r * row_stride, dim, asked + n * dim);
            }
            score(asked, dim, key_at(a, kv, 0), a->key_strides[1], past, laid, scores, width);
            for (ptrdiff_t n = 0; n < count; n++) {
                ptrdiff_t r = (p * SIDE + n) / group;
                starts[n] = a->starts ? a->starts[r] : 0, ends[n] = past + a->lengths[r];
                longest = ends[n] - starts[n] > longest ? ends[n] - starts[n] : longest;
                for (ptrdiff_t k = past; k < ends[n]; k++) {
                    float some[SIDE];
                    score(asked, dim, at(a, 0, kv, r, k), 0, 1, laid, some, 1);
                    scores[n * width + k] = some[n];
                }
#if defined(IN_FLOAT16)
                for (ptrdiff_t k = ends[n] - (ends[n] - starts[n]) % KEYS % 4; k < ends[n]; k++) scores[n * width + k] = score_last(asked + n * dim, at(a, 0, kv, r, k), dim);
#endif
                most[n] = -INFINITY;
            }
            float *found = laid; /* [SIDE, dim] */
            memset(found, 0, SIDE * dim * sizeof(float));
            for (ptrdiff_t block = 0; block < longest; block += KEYS) {
                ptrdiff_t shared = 0; /* keys of it that are weighted for all queries at once */
                for (ptrdiff_t n = 0; n < count; n++) {
                    ptrdiff_t first = starts[n] + block, keys = ends[n] - first < KEYS ? ends[n] - first : KEYS;
                    if (keys <= 0) continue;
                    float *own = scores + n * width + first, largest = scaled(own, keys, a->scale, most[n], &nothing);
                    float sum = exponentials(own, keys, largest), faded = rounded_exponential(most[n] - largest);
                    total[n] = sum + faded * total[n];
                    most[n] = largest;
                    if (block)
                        for (ptrdiff_t i = 0; i < dim; i++) found[n * dim + i] *= faded;
#if defined(PAIRED)
                    if (PAIRED) pack(own, keys);
#endif
                }
#if defined(PAIRED)
                if (PAIRED && !a->starts && count == SIDE && block < past) {
                    shared = (past - block < KEYS ? past - block : KEYS) & ~7;
                    weigh_paired(a, kv, 0, block, shared, scores + block, width, SIDE, found);
                }
#endif
                for (ptrdiff_t n = 0; n < count; n++) {
                    ptrdiff_t r = (p * SIDE + n) / group, first = starts[n] + block, keys = ends[n] - first < KEYS ? ends[n] - first : KEYS;
                    float *own = scores + n * width + first, *to = found + n * dim;
                    if (keys <= 0) continue;
#if defined(PAIRED)
                    if (PAIRED) {
                        weigh_paired(a, kv, r, first + shared, keys - shared, own + shared / 2, 0, 1, to);
                        continue;
                    }
#endif
#if defined(IN_FLOAT16)
                    ptrdiff_t apart = not_aligned(kv * group + (p * SIDE + n) % group, heads, ends[n] - starts[n], threads);
                    float unaligned[3] = {to[0], to[1], to[2]};
                    weigh_first(a, kv, r, first, keys, own, apart, unaligned);
                    weigh(a, kv, r, first, keys, own, to);
                    memcpy(to, unaligned, apart * sizeof *to);
#else
                    weigh(a, kv, r, first, keys, own, to);
#endif
                }
            }
            for (ptrdiff_t n = 0; n < count; n++) {
                ptrdiff_t r = (p * SIDE + n) / group, head = kv * group + (p * SIDE + n) % group;
                float share = 1 / total[n];
                uint16_t *to = out + (r * heads + head) * dim;
                for (ptrdiff_t i = 0; i < dim; i++) {
                    nothing += found[n * dim + i] * 0;
                    put_number(SIXTEEN, to, i, found[n * dim + i] * share);
                }
            }
            if (nothing != 0) __atomic_store_n(odd, 1, __ATOMIC_RELAXED);
        }
}

/* As lossless_attend (kernels.c), of 16 bits only; returns whether a score or what is found is no finite number: then torch may say another one,
   for it goes about those in ways that are not known here, and `out` is of no use. scratch: as above. */
int EXACTLY(lossless_attend)(int kind, const void *query, const void *keys, const void *values, void *out, float *scratch,
                             const int32_t *starts, const int32_t *lengths, const int32_t *paths, float scale, ptrdiff_t heads, ptrdiff_t kv_heads, ptrdiff_t rows,
                             ptrdiff_t dim, ptrdiff_t past, ptrdiff_t depth, const ptrdiff_t *strides, int threads) {
    struct attention a = {kind, heads, kv_heads, rows, dim, past, depth, scale, keys, values, {strides[2], strides[3]}, {strides[4], strides[5]},
                          starts, lengths, paths};
    struct team team = {0};
    int odd = 0;
#pragma omp parallel num_threads(threads)
    {
        EXACTLY(attend)(&a, query, strides[0], strides[1], scratch, threads, out, &odd);
        wait_for_all(&team);
    }
    return odd;
}

#endif
