/* What a draft tree is drawn from: a recurrent head over streams, level by level, and the likeliest tokens of rows of logits (drafts.py); and
   weights rounded to bytes, for all that drafts are multiplied with. */

#include "projections.h"
#include "team.h"

/* The `count` largest of each row of logits [rows, vocab], largest first, and their logarithmic probabilities -> numbers, scores
   [rows, count]; vocab a multiple of LANES. What is not a number is never among them: then numbers are 0 and scores -INFINITY. By all threads of a
   parallel region; it is not waited for. */
static void likeliest(const float *logits, ptrdiff_t rows, ptrdiff_t vocab, ptrdiff_t count, int32_t *numbers, float *scores) {
#pragma omp for schedule(static) nowait
    for (ptrdiff_t r = 0; r < rows; r++) {
        const float *row = logits + r * vocab;
        int32_t *best = numbers + r * count;
        float *score = scores + r * count;
        for (ptrdiff_t k = 0; k < count; k++) best[k] = 0, score[k] = -INFINITY;
        for (ptrdiff_t i = 0; i < vocab; i += LANES) {
            i32s above = load(row + i) > score[count - 1];
            int32_t any = 0;
            UNROLL for (int lane = 0; lane < LANES; lane++) any |= above[lane];
            if (!any) continue;
            for (ptrdiff_t j = i; j < i + LANES; j++) {
                if (!(row[j] > score[count - 1])) continue;
                ptrdiff_t k = count - 1;
                for (; k > 0 && row[j] > score[k - 1]; k--) score[k] = score[k - 1], best[k] = best[k - 1];
                score[k] = row[j], best[k] = (int32_t)j;
            }
        }
        f32s total = {}, none = {};
        for (ptrdiff_t i = 0; i < vocab; i += LANES) total += exponential(load(row + i) - score[0]);
        float sum = logf(sums(total, none, none, none)[0]), most = score[0];
        for (ptrdiff_t k = 0; k < count; k++) score[k] -= most + sum;
    }
}

void lossless_likeliest(const float *logits, ptrdiff_t rows, ptrdiff_t vocab, ptrdiff_t count, int32_t *numbers, float *scores, int threads) {
    struct team team = {0};
#pragma omp parallel num_threads(threads)
    {
        likeliest(logits, rows, vocab, count, numbers, scores);
        wait_for_all(&team);
    }
}

struct recurrent {
    struct weight recur, token, out, head, start, stream;
    double scale;       /* of the logits */
    const int64_t *ids; /* [vocab]: the tokens that logits are of; NULL: their own numbers */
    const float *bias;  /* [levels, rank] */
};

static f32s hyperbolic_tangent(f32s x) {
    u32s sign = (u32s)x & 0x80000000u;
    f32s small = exponential((f32s)((u32s)x | 0x80000000u) * 2);
    return (f32s)((u32s)((1 - small) / (1 + small)) | sign);
}

/* r = tanh(start N(first stream)), heard = stream N(streams) + bias; streams [texts, levels, dim], r [texts, rank], heard [texts, levels, rank].
   scratch: [texts * (levels + 1), 2 * dim + 1]. */
void lossless_hear(const struct recurrent *by, const float *streams, ptrdiff_t texts, ptrdiff_t levels, float *r, float *heard, float *scratch,
                   int threads) {
    ptrdiff_t dim = by->stream.ins, rank = by->stream.outs, rows = texts * levels;
    float *normal = scratch, *firsts = normal + rows * dim, *own = firsts + texts * dim, *other = own + rows * (dim + 1);
    for (ptrdiff_t n = 0; n < rows; n++) normalize(NULL, 1e-6f, streams + n * dim, dim, normal + n * dim);
    for (ptrdiff_t t = 0; t < texts; t++) memcpy(firsts + t * dim, normal + t * levels * dim, dim * sizeof *firsts);
    struct rows all = ready(0, &by->stream, 1, normal, rows, own), first = ready(0, &by->start, 1, firsts, texts, other);
    struct team team = {0};
#pragma omp parallel num_threads(threads)
    {
        project(&by->stream, &all, rows, 0, heard);
        project(&by->start, &first, texts, 0, r);
        wait_for_all(&team);
    }
    for (ptrdiff_t i = 0; i < texts * rank; i += LANES) store(r + i, hyperbolic_tangent(load(r + i)));
    for (ptrdiff_t t = 0; t < texts; t++)
        for (ptrdiff_t i = 0, j = t * levels * rank; i < levels * rank; i += LANES) store(heard + j + i, load(heard + j + i) + load(by->bias + i));
}

/* next = silu(recur r + token N(embedding) + heard), logits = scale * head(stream + out next), N the RMS norm without a weight.

   of [3, rows]: of each node its place among the embeddings, that of its parent in r, and its text. r [parents, rank], next [rows, rank];
   embeddings [any, dim], numbers of this kind; heard and streams: rank and dim numbers of a level, levels of texts `apart` from each other;
   logits [rows, vocab]; tokens, scores [rows, count]: the likeliest, if count is above 0.
   scratch: [rows, 3 * dim + 3 * rank + 2]. */
void lossless_level(const struct recurrent *by, const int64_t *of, const float *r, const void *embeddings, int kind, const float *heard,
                    const float *streams, ptrdiff_t apart, float *next, float *logits, int32_t *tokens, float *scores, ptrdiff_t count,
                    float *scratch, ptrdiff_t rows, int threads) {
    ptrdiff_t dim = by->token.ins, rank = by->recur.ins, vocab = by->head.outs;
    const int64_t *parents = of + rows, *texts = parents + rows;
    float *before = scratch, *normal = before + rows * rank, *told = normal + rows * dim, *read = told + rows * rank;
    float *first = read + rows * dim, *second = first + rows * (rank + 1);
    for (ptrdiff_t n = 0; n < rows; n++) {
        memcpy(before + n * rank, r + parents[n] * rank, rank * sizeof *r);
        widen(kind, (const char *)embeddings + of[n] * dim * bytes_of(kind), dim, read);
        normalize(NULL, 1e-6f, read, dim, normal + n * dim);
    }
    struct rows path = ready(0, &by->recur, 1, before, rows, first), token = ready(0, &by->token, 1, normal, rows, second);
    struct team team = {0};
#pragma omp parallel num_threads(threads)
    {
        project(&by->recur, &path, rows, 0, next);
        project(&by->token, &token, rows, 0, told);
        BY_ONE(&team) {
            for (ptrdiff_t n = 0; n < rows; n++)
                for (ptrdiff_t i = 0, j = n * rank; i < rank; i += LANES, j += LANES)
                    store(next + j, silu(load(next + j) + load(told + j) + load(heard + texts[n] * apart * rank + i)));
            path = ready(0, &by->out, 1, next, rows, first);
        }
        project(&by->out, &path, rows, 0, read);
        BY_ONE(&team) {
            for (ptrdiff_t n = 0; n < rows; n++)
                for (ptrdiff_t i = 0, j = n * dim; i < dim; i++, j++) read[j] = (read[j] + streams[texts[n] * apart * dim + i]) * (float)by->scale;
            token = ready(0, &by->head, 1, read, rows, second);
        }
        project(&by->head, &token, rows, 0, logits);
        wait_for_all(&team);
        if (count) {
            likeliest(logits, rows, vocab, count, tokens, scores);
            wait_for_all(&team);
        }
    }
    for (ptrdiff_t k = 0; k < rows * count; k++) tokens[k] = by->ids ? (int32_t)by->ids[tokens[k]] : tokens[k];
}

/* weights [outs, ins] -> EIGHT_BITS: numbers [panels, ins / 4, PANEL, 4], 0 before, and scales [panels, 2, PANEL]. */
void lossless_lay_bytes(const float *weights, ptrdiff_t outs, ptrdiff_t ins, int32_t *numbers, float *scales, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (ptrdiff_t n = 0; n < outs; n++) {
        const float *own = weights + n * ins;
        int8_t rounded[ins];
        int32_t furthest = 0, bits, sum = 0; /* bits of numbers without a sign are in order */
        float *scale = scales + n / PANEL * 2 * PANEL + n % PANEL, largest;
        for (ptrdiff_t i = 0; i < ins; i++) {
            memcpy(&bits, own + i, sizeof bits);
            bits &= INT32_MAX;
            furthest = bits > furthest ? bits : furthest;
        }
        memcpy(&largest, &furthest, sizeof largest);
        scale[0] = fmaxf(largest, 1e-12f) / 127;
        for (ptrdiff_t i = 0; i < ins; i++) {
            int32_t number = (int32_t)rintf(own[i] / scale[0]);
            rounded[i] = (int8_t)number;
            sum += number;
        }
        memcpy(scale + PANEL, &sum, sizeof sum);
        for (ptrdiff_t i = 0; i < ins / 4; i++) memcpy(numbers + (n / PANEL * (ins / 4) + i) * PANEL + n % PANEL, rounded + 4 * i, 4);
    }
}
