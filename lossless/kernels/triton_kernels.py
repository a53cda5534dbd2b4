"""Kernels for a GPU, in Triton (kernels/gpu.py calls them; nobody else may import this module, for Triton may not be there).

Knows: attention of the rows of a draft tree, RMS norms, and how accepted rows of a cache move up. Of the first two, a program computes one
row, so that a row has the same bits beside any number of others. No argument is specialized: what is compiled for a pass over a tree is what
is compiled for a token alone. Does not know: tensors, or when what is called.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads what stands here; arguments are pointers and numbers

from __future__ import annotations

import triton
import triton.language as tl

_INTS = ["layer", "heads_per", "window", "query_head", "query_row", "new_head", "new_row", "value_head", "value_row", "deepest"]


@triton.jit
def _see(queries, key, value, seen, scale, best, total, sums, EXACT: tl.constexpr):
    """Softmax attention so far -> over a block of keys more."""
    scores = tl.dot(queries, tl.trans(key), input_precision=EXACT) * scale
    scores = tl.where(seen[None, :], scores, -float("inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    shrink, weights = tl.exp(best - higher), tl.exp(scores - higher[:, None])
    total = total * shrink + tl.sum(weights, 1)
    return higher, total, tl.dot(weights.to(value.dtype), value, sums * shrink[:, None], input_precision=EXACT)


@triton.jit(do_not_specialize=_INTS)
def attend(
    query, new_keys, new_values, out, told, lengths, paths, scale, layer, heads_per, window,
    query_head, query_row, new_head, new_row, value_head, value_row, deepest,
    DIM: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, EXACT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Program (row, kv head): softmax attention of the heads of a group over the past and over the rows on the path of this one, in blocks from
    the first place that it sees; then its own key and value are written behind the past, if they are to be kept. Strides are in units of so many
    numbers, which are read at once.

    Blocks that lie in the past are read ahead while others are multiplied; those at its end are put together of both. The arithmetic is the same,
    so that a row's bits do not tell where its past ends.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    past, stride = tl.load(told), tl.load(told + 1)
    length = past + tl.load(lengths + row)
    kind: tl.constexpr = query.dtype.element_ty
    aligned: tl.constexpr = UNIT * kind.primitive_bitwidth // 8
    keys = tl.load(told + FIRST + 2 * layer).to(tl.pointer_type(kind)) + head * stride
    values = tl.load(told + FIRST + 2 * layer + 1).to(tl.pointer_type(kind)) + head * stride
    keys, values = tl.multiple_of(keys, aligned), tl.multiple_of(values, aligned)
    query_head, query_row, new_head, new_row = query_head * UNIT, query_row * UNIT, new_head * UNIT, new_row * UNIT
    value_head, value_row = value_head * UNIT, value_row * UNIT
    group, dims, places = tl.arange(0, GROUP), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    inside = (dims < DIM)[None, :]
    real = (group < heads_per)[:, None] & inside
    at = row.to(tl.int64) * query_row + (head * heads_per + group)[:, None] * query_head + dims[None, :]
    queries = tl.load(query + at, mask=real, other=0.0)
    best = tl.full([GROUP], -float("inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    sums = tl.zeros([GROUP, WIDTH], tl.float32)
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    mixed = first + tl.maximum(past - first, 0) // BLOCK * BLOCK
    for start in tl.range(first, mixed, BLOCK, num_stages=2):
        where = (start + places)[:, None] * DIM + dims[None, :]
        key, value = tl.load(keys + where, mask=inside, other=0.0), tl.load(values + where, mask=inside, other=0.0)
        best, total, sums = _see(queries, key, value, start + places < length, scale, best, total, sums, EXACT)
    for start in tl.range(mixed, length, BLOCK, num_stages=1):
        place = start + places
        seen, old = place < length, place < past
        node = tl.load(paths + row * deepest + (place - past), mask=seen & (place >= past), other=0)
        kept, new = (seen & old)[:, None] & inside, (seen & (place >= past))[:, None] & inside
        where = place[:, None] * DIM + dims[None, :]
        key = tl.load(keys + where, mask=kept, other=0.0)
        fresh = tl.load(new_keys + head * new_head + node[:, None] * new_row + dims[None, :], mask=new, other=0.0)
        key = tl.where(old[:, None], key, fresh)
        value = tl.load(values + where, mask=kept, other=0.0)
        fresh = tl.load(new_values + head * value_head + node[:, None] * value_row + dims[None, :], mask=new, other=0.0)
        value = tl.where(old[:, None], value, fresh)
        best, total, sums = _see(queries, key, value, seen, scale, best, total, sums, EXACT)
    heads = heads_per * tl.num_programs(1)
    to = (row * heads + head * heads_per + group)[:, None] * DIM + dims[None, :]
    tl.store(out + to, (sums / total[:, None]).to(query.dtype.element_ty), mask=real)
    keep = (dims < DIM) & (tl.load(told + 2) > 0)
    own = (past + row) * DIM + dims
    tl.store(keys + own, tl.load(new_keys + head * new_head + row * new_row + dims, mask=keep, other=0.0), mask=keep)
    tl.store(values + own, tl.load(new_values + head * value_head + row * value_row + dims, mask=keep, other=0.0), mask=keep)


@triton.jit
def _normed(x, weight, eps, offset, dims, DIM: tl.constexpr):
    """x / sqrt(mean(x^2) + eps) * (weight + offset), in float32."""
    w = tl.load(weight + dims, mask=dims < DIM, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 0) / DIM + eps) * (w + offset)


@triton.jit
def norm(rows, weight, out, eps, offset, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Program (row): its norm, rounded once."""
    dims = tl.arange(0, WIDTH)
    at = tl.program_id(0).to(tl.int64) * DIM + dims
    x = tl.load(rows + at, mask=dims < DIM, other=0.0).to(tl.float32)
    tl.store(out + at, _normed(x, weight, eps, offset, dims, DIM).to(rows.dtype.element_ty), mask=dims < DIM)


@triton.jit
def add_and_norm(rows, others, weight, sums, out, eps, offset, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Program (row): the sum of two rows, rounded, and the norm of that."""
    dims = tl.arange(0, WIDTH)
    at = tl.program_id(0).to(tl.int64) * DIM + dims
    one, other = tl.load(rows + at, mask=dims < DIM, other=0.0), tl.load(others + at, mask=dims < DIM, other=0.0)
    whole = (one.to(tl.float32) + other.to(tl.float32)).to(rows.dtype.element_ty)
    tl.store(sums + at, whole, mask=dims < DIM)
    tl.store(out + at, _normed(whole.to(tl.float32), weight, eps, offset, dims, DIM).to(rows.dtype.element_ty), mask=dims < DIM)


@triton.jit
def _turned(one, other, cos, sin):
    """one * cos + other * sin, rounded as three operations of torch round it."""
    kind = one.dtype
    left, right = one.to(tl.float32) * cos.to(tl.float32), other.to(tl.float32) * sin.to(tl.float32)
    return (left.to(kind).to(tl.float32) + right.to(kind).to(tl.float32)).to(kind)


@triton.jit
def _turn_head(source, target, cos, sin, HALF: tl.constexpr, WIDTH: tl.constexpr):
    dims = tl.arange(0, WIDTH)
    real = dims < HALF
    low, high = tl.load(source + dims, mask=real, other=0.0), tl.load(source + dims + HALF, mask=real, other=0.0)
    first = _turned(low, -high, tl.load(cos + dims, mask=real, other=0.0), tl.load(sin + dims, mask=real, other=0.0))
    second = _turned(high, low, tl.load(cos + dims + HALF, mask=real, other=0.0), tl.load(sin + dims + HALF, mask=real, other=0.0))
    tl.store(target + dims, first, mask=real)
    tl.store(target + dims + HALF, second, mask=real)


@triton.jit(do_not_specialize=["heads"])
def turn(queries, keys, cos, sin, new_queries, new_keys, heads, HALF: tl.constexpr, WIDTH: tl.constexpr):
    """Program (row, head of queries or of keys): rotary embedding, the first half of a head's numbers turned with the second."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kv_heads, place = tl.num_programs(1) - heads, row * 2 * HALF
    if head < heads:
        at = (row * heads + head) * 2 * HALF
        _turn_head(queries + at, new_queries + at, cos + place, sin + place, HALF, WIDTH)
    else:
        at = (row * kv_heads + head - heads) * 2 * HALF
        _turn_head(keys + at, new_keys + at, cos + place, sin + place, HALF, WIDTH)


@triton.jit(do_not_specialize=["count", "past", "stride"])
def move(addresses, sources, like, count, past, stride, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Program (keys or values of a layer, kv head): the rows at these places behind the past move up to its end, one after the other, for a
    row may stand where one before it came from."""
    dims = tl.arange(0, WIDTH)
    head = tl.program_id(1).to(tl.int64)
    rows = tl.load(addresses + tl.program_id(0)).to(tl.pointer_type(like.dtype.element_ty)) + head * stride
    for i in range(0, count):
        row = tl.load(rows + (past + tl.load(sources + i)) * DIM + dims, mask=dims < DIM, other=0.0)
        tl.store(rows + (past + i) * DIM + dims, row, mask=dims < DIM)
