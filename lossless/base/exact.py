"""A twin of a base in bfloat16 whose products have the bits of the base's own.

Knows: in which order torch adds up a row of such a product on processors that multiply pairs of bfloat16 (AVX-512): input after input,
in chunks whose sums are added up in turn. In panels (panels.h) that order is kept beside any number of rows, and torch, which lays out
the weight anew at each call, takes five times as long for one. Does not know: what passes do with it. Whether all bits are the same has to
be tried with the base's own weights (generation/limits.py).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from . import panels
from .layers import features
from .linears import PackedLinear
from .packed import TWIN_SHARE, put, stand_in
from .processes import free_memory
from .structure import structure_of

_STEP, _LARGEST = 32, 4096  # chunks that are looked for: multiples, up to so many inputs
_SWALLOWS = 2.0**40  # beside it a 1 is lost


def exact_twin(model: Any) -> Any | None:
    """A model of the same structure with packed copies of the weights that are in bfloat16; None where products of such have other bits
    than torch's, or there is no memory for them."""
    modules = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and _exact(module)}
    needed = sum(module.weight.nbytes for module in modules.values())
    if not modules or needed > TWIN_SHARE * free_memory(torch.device("cpu")) * 2**30:
        return None
    twin = structure_of(model)
    for name, module in modules.items():
        put(twin, name, PackedLinear(module.weight, module.bias, layout=in_torchs_order).train(module.training))
    return twin


def _exact(module: Any) -> bool:
    ins, outs = features(module)
    return module.weight.dtype == torch.bfloat16 and stand_in(module) is PackedLinear and panels.multiplies_pairs(ins) and _some_bits(ins, min(outs, 64))


def in_torchs_order(weight: torch.Tensor) -> panels.Panels:
    """`[out, in]` in panels that are multiplied in the order of torch's own product."""
    return panels.Panels.of(weight, chunk_of(weight.shape[1]))


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
    weight = torch.zeros(len(places), ins)
    weight[:, 0] = _SWALLOWS
    weight[torch.arange(len(places)), places] = -_SWALLOWS
    weight[torch.arange(len(places)), places + 2] = 1.0
    lost = F.linear(torch.ones(1, 1, ins, dtype=torch.bfloat16), weight.bfloat16())[0, 0] == 0
    return int(places[lost][0]) if lost.any() else None


@functools.cache
def _some_bits(ins: int, outs: int) -> bool:
    """Whether some numbers here have torch's bits: where they have not, there is no use in packing anything."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(count, ins, generator=generator).bfloat16() for count in (outs, 16))
    packed = in_torchs_order(weight)
    return all(torch.equal(packed.multiply(row[None, None], None), F.linear(row[None, None], weight)) for row in rows)
