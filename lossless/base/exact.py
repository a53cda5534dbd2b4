"""A twin of a base whose products have the bits of the base's own, beside any number of rows, and attention that has torch's.

Knows: in which order a row of such a product is added up. In bfloat16, on processors that multiply pairs of its numbers: input after input, in
chunks whose sums are added up in turn; with AVX-512 alone: every 16th pair of inputs by itself, and these sums in pairs (both are oneDNN's); with
AVX2 alone, and in float16 everywhere: every 64th input by itself, and these sums in pairs. 4-bit weights bitsandbytes adds up block after block on
processors that multiply pairs; on others it decodes them, and has torch multiply. In panels (panels.h) that order is kept, in exact.c that of
torch's attention in 16 bits, and in exact_layer.c that of its other operations. Where pairs are multiplied torch lays out a weight anew at each
call, and takes five times as long for one row; elsewhere it takes as long for each further row as for the first, as bitsandbytes and torch's
attention do. Does not know: what passes do with it. Whether all bits are the same has to be tried with the base's own weights
(generation/limits.py).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels import native, panels
from ..kernels.pages import together
from . import norms
from .layers import features
from .linears import FourBitLinear, PackedLinear
from .packed import dense, has_memory_for, product_dtype, put, stand_in
from .structure import structure_of

_SEVERAL = 256  # outputs of a product that is tried; of fewer, torch has other ways with some
_STEP, _LARGEST = 32, 4096  # chunks that are looked for: multiples, up to so many inputs
_LENGTHS = (*range(2, 24), 34, 51, 127, 300, 511, 512, 513, 514, 515, 1026, 1539)  # of texts that attention is tried with
_HEADS = 16  # with so many heads
_SWALLOWS = 2.0**40  # beside it a 1 is lost


@torch.no_grad()
def exact_twin(model: Any) -> Any | None:
    """A model of the same structure with packed copies of the weights that are in 16 or 4 bits; None where products of such have
    other bits than the base's own, or there is no memory for them.

    Weights in float32 beside such in 4 bits (an LM head) are packed, too, and round otherwise.
    """
    modules: dict[str, Any] = {name: module for name, module in model.named_modules() if stand_in(module) in (FourBitLinear, PackedLinear)}
    if not has_memory_for(sum(map(_bytes, modules.values()))):
        return None
    tried = {name: module for name, module in modules.items() if _worth_trying(module)}  # what that takes must not lie among what stays
    with together():
        found = {name: made for name, module in tried.items() if (made := _exact(module)) is not None}
    if not found:
        return None
    if any(isinstance(made, FourBitLinear) for made in found.values()):
        beside = {name: module for name, module in modules.items() if type(module) is nn.Linear and module.weight.dtype == torch.float32}
        found |= {name: PackedLinear(module.weight, module.bias) for name, module in beside.items()}
    twin = structure_of(model)
    for name, made in found.items():
        put(twin, name, made.train(model.get_submodule(name).training))
    for name, module in list(twin.named_modules()):
        if (norm := norms.exact(module)) is not None:
            put(twin, name, norm.train(module.training))
    return twin


def row_by_row(twin: Any) -> bool:
    """Whether in the base of this exact twin torch multiplies each row of a prompt as if it were alone, which takes long."""
    made = [module for module in twin.modules() if isinstance(module, FourBitLinear | PackedLinear)]
    return all(isinstance(module, PackedLinear) and isinstance(module.packed, panels.Interleaved) for module in made)


def _bytes(module: Any) -> int:
    """What a copy of a weight takes."""
    decoded = stand_in(module) is FourBitLinear and not _in_pairs(module)
    return math.prod(features(module)) * 2 if decoded else module.weight.nbytes


def _in_pairs(module: Any) -> bool:
    """Whether it is multiplied as bitsandbytes does it, by weights of 4 bits."""
    return stand_in(module) is FourBitLinear and panels.multiplies_pairs(module.in_features)


def _worth_trying(module: Any) -> bool:
    """Whether something may have a module's bits: in pairs it is tried once it is made, for others with products of this size."""
    if _in_pairs(module):
        return True
    dtype, (ins, outs) = product_dtype(module), features(module)
    known = stand_in(module) is FourBitLinear or type(module) is nn.Linear
    return known and dtype in native.SIXTEEN and _some_bits(dtype, ins, min(outs, _SEVERAL))


def _exact(module: Any) -> PackedLinear | FourBitLinear | None:
    """What has a module's bits, packed; None if it has other ones after all."""
    if _in_pairs(module):
        made = FourBitLinear(module, in_pairs=True)
        rows = torch.randn(2, 1, 1, module.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(module.compute_dtype or torch.float32)
        return made if all(torch.equal(made(row), module(row)) for row in rows) else None
    weight, bias = dense(module)  # type: ignore[misc]
    return PackedLinear(weight, bias, layout=in_torchs_order)


def in_torchs_order(weight: torch.Tensor) -> panels.Panels | panels.Interleaved:
    """`[out, in]` of 16 bits in panels that are multiplied in the order of torch's own product."""
    if weight.dtype is torch.bfloat16 and panels.multiplies_pairs(weight.shape[1]):
        return panels.Panels.of(weight, chunk_of(weight.shape[1]))
    return panels.Interleaved.of(weight)


@functools.cache
def chunk_of(ins: int) -> int | None:
    """How many inputs torch adds up by themselves in a product of one row in bfloat16; None for all of them.

    Of each output two weights cancel, the first one and that of a place b, and the one behind b is 1. It is lost if b begins a chunk, or
    stands in a later one, since what it is added to there has only the second of the two: so the first place with 0 is the length of a
    chunk. (Revealing the order of a summation by numbers that swallow others: FPRev, arXiv 2411.00442.)
    """
    places = torch.tensor(range(_STEP, min(ins - 2, _LARGEST + 1), _STEP), dtype=torch.long)
    if not len(places):
        return None
    weight = torch.zeros(len(places), ins, dtype=torch.float32)
    weight[:, 0] = _SWALLOWS
    weight[torch.arange(len(places)), places] = -_SWALLOWS
    weight[torch.arange(len(places)), places + 2] = 1.0
    enough = weight.bfloat16().repeat(-(-_SEVERAL // len(places)), 1)  # oneDNN has another way with few outputs
    lost = F.linear(torch.ones(1, 1, ins, dtype=torch.bfloat16), enough)[0, 0, : len(places)] == 0
    return int(places[lost][0]) if lost.any() else None


@functools.cache
def _some_bits(dtype: torch.dtype, ins: int, outs: int) -> bool:
    """Whether some numbers here have torch's bits: where they have not, there is no use in packing anything."""
    if not ((dtype is torch.bfloat16 and panels.multiplies_pairs(ins)) or panels.interleaves(dtype, ins)):
        return False
    generator = torch.Generator().manual_seed(0)
    for _ in range(16):
        row, weight = (torch.randn(count, ins, generator=generator, dtype=torch.float32).to(dtype) for count in (1, outs))
        place = row.abs().argmax()
        others = weight.double() @ row[0].double() - (weight[:, place] * row[0, place]).double()
        weight[:, place] = (-others / row[0, place].double()).to(dtype)  # a sum of nearly 0 shows the order in which it was added up
        if not torch.equal(in_torchs_order(weight).multiply(row[None], None), F.linear(row[None], weight)):
            return False
    return True


def attendable(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend` has the bits of torch's attention for such rows here."""
    return query.dtype in native.SIXTEEN and native.attendable(query, key, value) and native.knows_order() and attends(query.dtype, query.shape[-1])


attend = native.attend_exactly  # each row with the bits of `F.scaled_dot_product_attention` of it alone


@functools.cache
def attends(dtype: torch.dtype, dim: int) -> bool:
    """Whether attention over texts of some lengths has torch's bits; tried at the first call."""
    generator, path = torch.Generator().manual_seed(0), native.Paths.of([[0]])
    for length in _LENGTHS:
        query, key, value = (torch.randn(1, _HEADS, count, dim, generator=generator, dtype=torch.float32).to(dtype) for count in (1, length, length))
        value = cancelling(2 * query, key, value)
        own = F.scaled_dot_product_attention(2 * query, key, value).transpose(1, 2)
        found = attend(2 * query, key, value, None, path)
        if found is None or not torch.equal(found, own):
            return False
    return True


def cancelling(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`[1, heads, keys, dim]`: these values, one of them such that what a query `[1, heads, 1, dim]` finds is nearly 0.

    Such a sum shows the order in which it was added up: in others the last rounding, to 16 bits, hides it but for one number of a million.
    """
    weights = torch.softmax(query.double() @ key.double().transpose(2, 3) * query.shape[-1] ** -0.5, -1)  # [1, heads, 1, keys]
    one = weights.argmax(-1, keepdim=True)  # [1, heads, 1, 1]
    share = weights.gather(-1, one)
    place = one.expand(-1, -1, -1, value.shape[-1])
    others = weights @ value.double() - share * value.double().gather(2, place)
    return value.scatter(2, place, (-others / share).to(value.dtype))
