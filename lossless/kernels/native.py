"""Products of rows with a weight, and attention of a few rows, in C of our own.

Knows: how the C files beside it are compiled once for this processor, kept, loaded, tested, and called with tensors. Does not know:
modules, models, or trees. Where there is no gcc, or where what it makes is wrong, `available()` is False and nothing else here may be
called. `$LOSSLESS_CC` names another compiler, with flags if need be; empty, none is used.

    multiply    weights in panels (panels.py): the fastest products that we know of for a few rows
    linear      weights as torch keeps them: no copy of them is made
    norm        RMS norms
    attend      rows of a draft tree over the past and their own paths

Of each, a row has the same bits beside any number of others.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..storage import alone_with, cache_dir

_SOURCES = [Path(__file__).with_name(name) for name in ("vectors.h", "panels.h", "whole.h", "tiles.h", "team.h", "attention.h", "projections.h", "layer.h", "product.c", "tiles.c", "projections.c", "kernels.c", "layer.c", "drafts.c", "exact.c", "exact_layer.c", "grids.c")]
_WAYS = ("NUMBERS", "HALVES", "FLOAT16S", "CODES", "BYTES", "PAIRS", "PAIRED_CODES", "STEPS", "FINE_STEPS", "IN_ORDER", "IN_ORDER_FLOAT16")  # of panels.h
# sources that are compiled several times, each time told something: the way to multiply, or the dtype of 16 bits
_TOLD = {"product.c": [[f"-DWAY={way}"] for way in _WAYS], "exact.c": [[], ["-DIN_FLOAT16"]], "exact_layer.c": [[], ["-DIN_FLOAT16"]]}
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")
_DIGEST = 32  # bytes
_SECONDS = 120  # that compiling may take; it takes some eight on two cores
# as vectors.h has them
FLOAT32, BFLOAT16, FOUR_BITS, EIGHT_BITS, PAIRED_FOUR_BITS, FOUR_BIT_GRID, EIGHT_BIT_GRID, INTERLEAVED, FLOAT16, INTERLEAVED_FLOAT16 = range(10)
SIXTEEN = (torch.bfloat16, torch.float16)
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_WIDEST = 2**16  # inputs: some rows of a weight are decoded on the stack
LANES = 16  # inputs come in multiples of these, dimensions of a head in multiples of twice as many
_SIDE = 4  # queries that attend side by side, as exact.c has it
_AT_ONCE = 512  # rows of a long prompt, for which a product in 16 bits takes three times their memory
_MANY = 128  # rows from which on the products of torch are faster; as many are read of prompts, not of trees


@functools.cache
def available() -> bool:
    """Whether the kernels can be had here, and are right; compiled and tested at the first call."""
    return compiled() is not None and _right()


@functools.cache
def compiled() -> Any:
    """The sources, compiled for this processor; None if they cannot be."""
    command = [*shlex.split(os.environ.get("LOSSLESS_CC", "gcc")), *_FLAGS]
    if shutil.which(command[0]) is None:
        return None
    try:
        version = subprocess.run([command[0], "--version"], capture_output=True, timeout=_SECONDS, check=True).stdout
        made_from = (*(path.read_bytes() for path in _SOURCES), version, *(part.encode() for part in command), _processor().encode())
        return _load(command, hashlib.sha256(b"\0".join(made_from)).hexdigest()[:16])
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None


def name() -> str | None:
    """Of the library that is used here: another compiler, or other flags, make another one. None if none is."""
    return Path(compiled()._name).stem if available() else None


def _load(command: list[str], name: str) -> Any:
    """The library of this name from the cache, or compiled into it; into a folder of this process alone if it cannot be written to."""
    for find in (lambda: cache_dir() / "kernels", lambda: Path(tempfile.mkdtemp(prefix="lossless-"))):
        folder = find()  # one of its own only if it is needed
        path = folder / f"{name}.so"
        try:
            if not _is_whole(path):
                folder.mkdir(parents=True, exist_ok=True)
                with alone_with(folder, wait=True):  # who comes second finds what the first has made
                    if not _is_whole(path):
                        own = folder / f".{name}.{os.getpid()}"
                        _compile(command, own)
                        made = own.read_bytes()
                        own.write_bytes(made + hashlib.sha256(made).digest())
                        own.replace(path)
            return _declared(ctypes.CDLL(str(path)))
        except (OSError, AttributeError):  # a full or read-only disk, or one that nothing may be run from
            continue
    raise OSError("no folder to compile in, or to load from")


def _is_whole(path: Path) -> bool:
    """Whether there is a library whose digest, which stands behind it, is its own: what is loaded of a damaged one takes the process with it."""
    data = path.read_bytes() if path.is_file() else b""
    return hashlib.sha256(data[:-_DIGEST]).digest() == data[-_DIGEST:]


def _compile(command: list[str], library: Path) -> None:
    """All sources at once, each by a process of its own, and then into one library."""

    def run(*rest: str) -> None:
        subprocess.run([*command, *rest], capture_output=True, timeout=_SECONDS, check=True)

    with tempfile.TemporaryDirectory(prefix="lossless-") as scratch:
        told = [(str(source), *more) for source in _SOURCES if source.suffix == ".c" for more in _TOLD.get(source.name, [[]])]
        made = [str(Path(scratch) / f"{number}.o") for number in range(len(told))]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda given, out: run("-c", "-o", out, *given), told, made))
        run("-shared", "-o", str(library), *made, "-lm")


def _declared(library: Any) -> Any:
    pointer, size, number = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int
    library.lossless_stored.argtypes = [number, *[pointer] * 3, *[size] * 3, number]
    library.lossless_panels.argtypes = [number, number, *[pointer] * 8, *[size] * 5, number]
    library.lossless_lay.argtypes = [pointer, size, size, pointer, number]
    library.lossless_lay_grid.argtypes = [pointer, size, size, size, number, pointer, pointer, number]
    library.lossless_lay_bytes.argtypes = [pointer, size, size, pointer, pointer, number]
    library.lossless_attend.argtypes = [number, *[pointer] * 8, ctypes.c_float, *[size] * 6, pointer, number]
    library.lossless_norm.argtypes = [number, pointer, pointer, ctypes.c_float, ctypes.c_float, pointer, size, size]
    library.lossless_before.argtypes = [*[pointer] * 8, size, size, number]
    library.lossless_behind.argtypes = [*[pointer] * 8, size, size, pointer, pointer, size, size, number]
    library.lossless_layers.argtypes = [*[pointer] * 2, size, *[pointer] * 5, size, size, pointer, pointer, size, size, number]
    library.lossless_level.argtypes = [*[pointer] * 4, number, pointer, pointer, size, *[pointer] * 4, size, pointer, size, number]
    library.lossless_hear.argtypes = [pointer, pointer, size, size, *[pointer] * 3, number]
    library.lossless_likeliest.argtypes = [pointer, size, size, size, pointer, pointer, number]
    library.lossless_move.argtypes = [pointer, size, size, size, size, size, pointer, size]
    for dtype in SIXTEEN if library.lossless_exact() else ():
        for name, like in (("attend", library.lossless_attend.argtypes), ("layers", library.lossless_layers.argtypes), ("norm", [*[pointer] * 3, size, size])):
            exact = _exactly(library, name, dtype)
            exact.argtypes, exact.restype = like, None if name == "norm" else number
    for name in ("before", "behind", "layers", "norm", "stored", "panels", "attend", "hear", "level", "likeliest", "lay", "lay_bytes", "move"):
        getattr(library, f"lossless_{name}").restype = None
    return library


def _exactly(library: Any, name: str, dtype: torch.dtype) -> Any:
    return getattr(library, f"lossless_{name}_exactly_in_{str(dtype).removeprefix('torch.')}")


def in_torchs_order(name: str, dtype: torch.dtype) -> Any:
    """What computes attention, norms or layers of this dtype in torch's own order, where it is known (`knows_order`)."""
    return _exactly(compiled(), name, dtype)


def knows_order() -> bool:
    """Whether it is known in which order torch adds up numbers of 16 bits on such a processor; and whether those of float16 have kernels."""
    return available() and bool(compiled().lossless_exact())


def has_kernels(dtype: torch.dtype) -> bool:
    """Whether numbers of this dtype have kernels, where there are any."""
    return dtype in KINDS and (dtype is not torch.float16 or bool(compiled().lossless_exact()))


def _processor() -> str:
    """What code made for this processor depends on: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.machine() + platform.processor()


@functools.cache
def panel() -> int:
    """Outputs whose weights stand in one panel."""
    return 2 * int(compiled().lossless_lanes())


def room(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory that C writes into, whatever dtype and device torch makes tensors of by default."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def multiply(
    kind: int, weight: torch.Tensor, outs: int, rows: torch.Tensor, bias: torch.Tensor | None,
    scales: torch.Tensor | None = None, code: torch.Tensor | None = None, chunk: int | None = None, order: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`[..., in]` times a weight in panels of this kind (panels.h) -> `[..., out]`, in the dtype of the rows. No gradient flows.

    chunk: inputs that are added up by themselves, where rows and weights are multiplied as pairs of bfloat16, None for all of them; of
        weights on a grid the block; of interleaved ones the inputs of a sum.
    order: of interleaved weights.
    """
    *before, ins = rows.shape
    given = (rows if has_kernels(rows.dtype) else rows.float()).contiguous()
    out, places, count = room(*before, outs, dtype=given.dtype), 0 if order is None else len(order), math.prod(before)
    wide = given.dtype is not torch.float32 or kind in (EIGHT_BITS, FOUR_BIT_GRID, EIGHT_BIT_GRID)
    scratch = room(min(count, _AT_ONCE) * max(2 * ins + 64, places) if wide else 0)
    added = None if bias is None else bias.float().contiguous()
    for first in range(0, count, _AT_ONCE):
        compiled().lossless_panels(
            kind, KINDS[given.dtype], weight.data_ptr(), None if scales is None else scales.data_ptr(), None if code is None else code.data_ptr(),
            None if order is None else order.data_ptr(), given.data_ptr() + first * ins * given.element_size(), scratch.data_ptr(),
            None if added is None else added.data_ptr(), out.data_ptr() + first * outs * out.element_size(),
            min(_AT_ONCE, count - first), ins, outs, chunk or ins, places, torch.get_num_threads(),
        )  # fmt: skip
    return out if out.dtype is rows.dtype else out.to(rows.dtype)


def multipliable(outs: int, ins: int, dtype: torch.dtype) -> bool:
    """Whether weights of this shape and dtype have a kernel here as they are stored."""
    return ins % LANES == 0 and ins <= _WIDEST and outs >= 4 and available() and has_kernels(dtype)


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`[..., in]` times `weight` `[out, in]` -> `[..., out]`, in the dtype of the rows; sums are in float32."""
    if rows.numel() >= _MANY * rows.shape[-1] or (rows.requires_grad and torch.is_grad_enabled()):
        return F.linear(rows, weight.to(rows.dtype), bias)
    *before, ins = rows.shape
    plain, weight = rows.float().contiguous(), weight.contiguous()
    out = room(*before, len(weight))
    compiled().lossless_stored(
        KINDS[weight.dtype], weight.data_ptr(), plain.data_ptr(), out.data_ptr(), math.prod(before), ins, len(weight), torch.get_num_threads()
    )
    if bias is not None:
        out += bias
    return out.to(rows.dtype)


def norm(rows: torch.Tensor, weight: torch.Tensor, offset: float, eps: float) -> torch.Tensor:
    """`[..., dim]` / sqrt(mean of squares + eps) * (weight + offset), `weight` `[dim]` of the same dtype, that has kernels."""
    rows, weight = rows.contiguous(), weight.contiguous()
    out, dim = torch.empty_like(rows), rows.shape[-1]
    compiled().lossless_norm(
        KINDS[rows.dtype], rows.data_ptr(), weight.data_ptr(), offset, eps, out.data_ptr(), rows.numel() // dim, dim
    )
    return out


def move(kept: Sequence[tuple[torch.Tensor, torch.Tensor]], past: int, sources: Sequence[int]) -> bool:
    """Of keys and values `[1, kv_heads, capacity, dim]` of all layers the rows at these rising places behind `past` certain ones move up to their
    end, in this order; False, and nothing is done, if they are not alike, or not here."""
    stores = [each for pair in kept for each in pair]
    like = stores[0]
    alike = all(each.shape == like.shape and each.dtype is like.dtype and each.device.type == "cpu" and each.is_contiguous() for each in stores)
    rising = all(place < after for place, after in itertools.pairwise(sources))
    if not alike or not rising or not available():
        return False
    addresses, places = (ctypes.c_void_p * len(stores))(*(each.data_ptr() for each in stores)), (ctypes.c_int64 * len(sources))(*sources)
    _, heads, capacity, dim = like.shape
    compiled().lossless_move(addresses, len(stores), heads, capacity, dim * like.element_size(), past, places, len(sources))
    return True


@dataclass(frozen=True, eq=False)
class Paths:
    """Which rows of a pass each of its rows sees: those on its path from the root, itself the last.

    Attributes:
        lengths: `[rows]` int32; rows: `[rows, depth]` int32.
    """

    lengths: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, paths: Sequence[Sequence[int]]) -> Paths:
        depth = max(map(len, paths))
        filled = [[*path, *[0] * (depth - len(path))] for path in paths]
        return cls(*(torch.tensor(numbers, dtype=torch.int32, device="cpu") for numbers in ([len(path) for path in paths], filled)))


def attendable(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend` has a kernel for these here: not for values that are wider or narrower than keys (DeepSeek's), for example."""
    alike = key.shape == value.shape and key.dtype == query.dtype and query.device.type == "cpu" and not query.requires_grad
    return alike and len(query) == 1 and query.shape[-1] % (2 * LANES) == 0 and available() and has_kernels(query.dtype)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, paths: Paths, starts: Sequence[int] | None = None
) -> torch.Tensor:
    """Softmax attention of each row over the keys of the past and of the rows on its own path.

    Args:
        query: `[1, heads, rows, dim]`; key, value: `[1, kv_heads, past + rows, dim]`.
        scale: of the scores; None for 1 / sqrt(dim).
        starts: of each row the first key that it sees; None: all are seen.

    Returns:
        `[1, rows, heads, dim]`.
    """
    return _attend(query, key, value, scale, paths, starts, False)[0]


def attend_exactly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, paths: Paths, starts: Sequence[int] | None = None
) -> torch.Tensor | None:
    """The same in 16 bits, in torch's own order (exact.c), where that is to be had (base/exact.py); None if a score, or what is found, is no finite
    number: torch's own is to be asked then."""
    out, odd = _attend(query, key, value, scale, paths, starts, True)
    return None if odd else out


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, paths: Paths, starts: Sequence[int] | None, exactly: bool
) -> tuple[torch.Tensor, bool]:
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    _, heads, rows, dim = query.shape
    kv_heads, past, depth, threads = key.shape[1], key.shape[2] - rows, paths.rows.shape[1], torch.get_num_threads()
    out = room(1, rows, heads, dim, dtype=query.dtype)
    if exactly:
        by, numbers = in_torchs_order("attend", query.dtype), scratch_exactly(dim, past + depth, threads)
    else:
        by, numbers = compiled().lossless_attend, heads * rows * (3 * dim + past + depth) + threads * panel() * dim
    scratch, first = room(numbers), None if starts is None else torch.tensor(starts, dtype=torch.int32, device="cpu")
    strides = (ctypes.c_ssize_t * 6)(*(t.stride(i) for t in (query, key, value) for i in (1, 2)))
    odd = by(
        KINDS[query.dtype], query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), scratch.data_ptr(),
        None if first is None else first.data_ptr(),
        paths.lengths.data_ptr(), paths.rows.data_ptr(), dim**-0.5 if scale is None else scale, heads, kv_heads, rows, dim, past, depth,
        strides, threads,
    )  # fmt: skip
    return out, bool(odd)


def scratch_exactly(dim: int, keys: int, threads: int) -> int:
    """Numbers that attention in torch's order needs, if a row sees so many keys at most."""
    return threads * _SIDE * (2 * dim + keys)


def _right() -> bool:
    """Whether the kernels compute what torch computes, and keep the bits of a row beside others."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(7, 64, generator=generator, dtype=torch.float32), torch.randn(70, 64, generator=generator, dtype=torch.float32)
    for stored in (weight, weight.bfloat16()):
        found, alone = (torch.cat([linear(some, stored, None) for some in rows.split(size)]) for size in (7, 1))
        if not torch.equal(found, alone) or not torch.allclose(found, rows @ stored.float().T, rtol=1e-4, atol=1e-3):
            return False
    query, key, value = (torch.randn(1, heads, count, 64, generator=generator, dtype=torch.float32) for heads, count in ((4, 3), (2, 40), (2, 40)))
    paths = Paths.of([[0], [0, 1], [0, 2]])
    seen = torch.ones(3, 40, dtype=torch.bool)
    seen[0, 38:] = seen[1, 39] = seen[2, 38] = False
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    return bool(torch.allclose(attend(query, key, value, None, paths), expected, rtol=1e-4, atol=1e-4))
