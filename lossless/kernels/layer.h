/* A decoder layer as Python describes it (fused.py): projections, norms, sizes; and where its keys and values are kept. */

#pragma once
#include "projections.h"

struct norm {
    const float *weight; /* NULL: there is none */
    double eps;
    int64_t twice; /* in 16 bits: rounded before the weight, too */
};

struct layer {
    struct weight q, k, v, o, gate, up, down;
    struct norm first, second, of_queries, of_keys;
    int64_t kind; /* of numbers that come in and go out, and of keys and values */
    int64_t dim, heads, kv_heads, head_dim;
    double scale;
    const uint16_t *activation; /* of every number of 16 bits what the gate makes of it; only for exact_layer.c */
};

/* Where a layer's keys and values are kept: [kv_heads, capacity, head_dim] each. */
struct kept {
    void *keys, *values;
    int64_t capacity;
};
