"""A question to a base at attach: how much of its arithmetic does a pass of several rows keep?

Knows: how to compare passes over draft trees of every size with the base's own passes, and what level of exactness follows. Does not
know: adapters' worth, or generation.

    bitwise   every row has the very bits of a pass of its own
    near-tie  rows may be rounded otherwise; where that could change a choice, the text is read again row by row
    off       rows may be rounded otherwise, and a choice with them
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..base.exact import row_by_row
from ..base.layers import (
    as_decoding,
    context_limit,
    input_device,
    rotary_turns,
)
from ..drafting.tree import DraftTree
from ..errors import RowsUnknown, UsageError, require_at_least, require_one_of
from ..streams.cache import RowCache
from ..streams.hooks import keeping_bits
from ..streams.runner import StreamRunner
from .limits import MOST, crowded_norms, each_alone, find_limits, projections
from .trial import is_fine, number_or_infinity, plain_pass, too_far

EXACTNESS = ("bitwise", "near-tie", "off")


_AGAIN = (16, 4)  # rows of a pass in which a text is read again, each row as if alone
_SHORT, _LONG = 24, 500  # tokens behind which passes are tried, as far as the base has places for them
_RIVALS = 8  # the noise is that of differences between a position's best tokens
_QUIET = 0.01  # noise, in logits, that a choice is hardly ever within
# A short probe does not see the worst. Over 21,000 positions of a random model in float32 the worst was 12 times the probe's worst; in
# 16 bits, where every position is rounded much, they are closer together.
_SAFETY_FLOAT32, _SAFETY_COARSER = 16.0, 4.0


@dataclass(frozen=True)
class Passes:
    """The passes over trees that a session may make.

    Attributes:
        rows: of up to so many rows, at least 1.
        streams: some of them with the streams of every row beside it.
    """

    rows: int
    streams: bool = False

    def __post_init__(self) -> None:
        require_at_least(1, self, "rows")

    def covers(self, other: Passes) -> bool:
        """Whether the other's are all among them."""
        return other.rows <= self.rows and other.streams <= self.streams

    def each(self) -> Iterator[tuple[int, bool]]:
        """Rows, and whether streams stand beside them."""
        for rows in range(1, self.rows + 1):
            yield from ((rows, streams) for streams in (False, True)[: 1 + self.streams])


@dataclass(frozen=True)
class Guarantee:
    """What holds for this base on this device, in this dtype.

    Attributes:
        level: one of `EXACTNESS`.
        limits: rows at a time that keep their bits, for each projection that passes over trees run through; None if the level is not bitwise.
        operations: the same by kind of projection, to be read: `in x out` -> rows.
        noise: how far differences between logits move with the shape of a pass, in logits.
        twin: passes over trees run through packed copies of the weights.
        attends_exactly: their rows attend by base/exact.py; fused: and the layers of such a pass are one call.
        prompts: prompts are read through these copies, too: with the bits of the base's own pass over them.
        again: numbers of rows, falling, of which a pass that takes each row by itself, in the base's own weights, gives each the bits
            of a pass of its own: so a text is read again, under near-tie, where these are left; the rest in passes of one row.
    """

    level: str
    limits: dict[nn.Module, int] | None = field(default=None, repr=False)
    operations: dict[str, int] = field(default_factory=dict)
    noise: float = 0.0
    twin: bool = False
    again: tuple[int, ...] = ()
    attends_exactly: bool = False
    fused: bool = False
    prompts: bool = False

    def __post_init__(self) -> None:
        require_one_of(EXACTNESS, "exact", self.level)
        if not 0 <= self.noise < math.inf:
            raise UsageError(f"noise must be a number from 0 on, got {self.noise}")
        if (self.level == "bitwise") != (self.limits is not None):
            raise UsageError(f"limits belong to bitwise and to no other level, got {'some' if self.limits else 'none'} for {self.level}")
        if any(rows < 1 for rows in (self.limits or {}).values()):
            raise UsageError(f"limits must be at least 1, got {min((self.limits or {}).values())}")

    def at_least(self, noise: float) -> Guarantee:
        """With a bound that is no smaller."""
        return replace(self, noise=max(self.noise, noise))

    @property
    def of_batches(self) -> float:
        """What is taken for the noise of texts of a batch, whose passes were not probed: in float32 what was measured for one text."""
        return self.noise / _SAFETY_FLOAT32 if self.level != "off" else 0.0

    def after(self, moved: float) -> Guarantee:
        """What holds once differences between logits have been seen to move so far."""
        # logits of a pass may overflow: then no choice of such passes is sure, and that is no error
        return self.at_least(min(_SAFETY_COARSER * moved, 1e30)) if moved > self.noise else self

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {"exact": self.level, "rows_that_keep_bits": self.operations, "noise": self.noise}


@torch.no_grad()
def find_guarantee(
    runner: StreamRunner, wanted: str | None, passes: Passes, twin: StreamRunner | None = None, same_bits: bool = False
) -> Guarantee:
    """Probe the base, in some seconds.

    Args:
        runner: passes in the base's own weights and kernels; twin: passes through packed copies, where there are any.
        wanted: a level; None for the strongest that pays: bitwise where it is to be had, unless most weights would
            take one row at a time for it and the noise is so small that a choice is hardly ever within it (float32).
        passes: what is to be promised for.
        same_bits: the twin has the bits of the base's own (base/exact.py), or its LM head alone is rounded otherwise.

    Raises:
        UsageError: there is no such level, or the device does not give it.
    """
    check_level(wanted)
    if wanted == "off":
        return Guarantee("off")
    known = [_Known(runner.base, prompt, passes.rows) for prompt in _prompts(runner, passes.rows)]
    if twin is not None and same_bits:
        found = _same_bits(runner, twin, wanted, known, passes)
        if found is not None:
            return found
    elif twin is not None and wanted in (None, "near-tie"):
        noise = _compare(runner, twin, None, known, passes, _QUIET)[1]
        if noise < _QUIET:
            return Guarantee("near-tie", noise=noise, twin=True, again=_again(runner, known))
    limits, operations, together = find_limits(runner.model)
    # attention that is not called through transformers' interface takes the rows of a pass together
    apart = wanted != "near-tie" and not runner.own_attention
    norms = dict.fromkeys(crowded_norms(runner.model), 1)
    operations |= {type(norm).__name__: 1 for norm in norms}
    bits, noise, off = _compare(runner, runner, limits | norms if apart else None, known, passes)
    # behind a long text roundings have added up; in 16 bits those of prompts and of tokens may be of two kinds (base/fused.py)
    allowed = (4 if is_fine(runner.base) else 8) * too_far(runner.base)
    if not bits and not off < allowed:  # its own cache, for example, may forget what its attention would see
        raise UsageError(
            f"{type(runner.base).__name__} cannot be accelerated: behind a text of {len(known[-1].prompt)} tokens a draft tree gives other logits "
            f"than the model's own loop (off by {off:.2g} of their spread, allowed is {allowed})"
        )
    enough = wanted is None and together < 0.5 and noise < _QUIET
    if bits and not enough:
        return Guarantee("bitwise", limits, operations, noise)
    if wanted == "bitwise":
        raise UsageError(
            f"exact='bitwise' is not to be had for {type(runner.base).__name__} in {runner.base.dtype} on "
            f"{input_device(runner.base)}: something besides its projections and attention depends on the rows of a pass"
        )
    return Guarantee("near-tie", None, operations, noise, again=_again(runner, known))


def _same_bits(runner: StreamRunner, twin: StreamRunner, wanted: str | None, known: list[_Known], passes: Passes) -> Guarantee | None:
    """What holds with a twin whose projections have the bits of the base's own, all of them or all but the LM head; None if they have not."""
    limits, operations, _ = find_limits(twin.model, runner.model)
    head = limits.pop(twin.model.get_output_embeddings())
    if not limits or not min(limits.values()):
        return None
    if head:
        limits[twin.model.get_output_embeddings()] = head
        ways = [(True, True)] * twin.fused + [(True, False), (False, False)]
        for twin.attends_exactly, twin.fused in ways:
            bits, noise, _ = _compare(runner, twin, limits | dict.fromkeys(crowded_norms(twin.model), 1), known, passes)
            if bits:
                prompts = row_by_row(twin.model) and all(_reads(runner, twin, text.prompt) for text in known)
                return Guarantee("bitwise", limits, operations, noise, twin=True, attends_exactly=twin.attends_exactly, fused=twin.fused, prompts=prompts)
    elif wanted is None:
        with _limited(twin, at_a_time(twin.model, passes.rows)):
            noise = _compare(runner, twin, None, known, passes, _QUIET, whole=True)[1]
        if noise < _QUIET and min(limits.values()) >= min(passes.rows, MOST):
            return Guarantee("near-tie", noise=noise, twin=True, again=_again(runner, known))
    return None


def _reads(reader: StreamRunner, twin: StreamRunner, prompt: list[int]) -> bool:
    """Whether a twin reads a prompt with the bits of the base's own pass over it: its last logits, and all keys and values."""
    found, kept = [], []
    for by in (reader, twin):
        cache, device = RowCache(len(by.layers), len(prompt)), input_device(by.model)
        places = torch.arange(len(prompt), device=device)[None]
        found.append(by.verify(torch.tensor([prompt], device=device), places, None, cache, None, last_only=True).logits)
        kept.append([each[:, :, : len(prompt)] for layer in cache.rows if layer.is_initialized for each in (layer.keys, layer.values)])
    return torch.equal(*found) and all(map(torch.equal, *kept))


def at_a_time(model: Any, rows: int) -> dict[nn.Module, int]:
    """Limits of an exact twin whose LM head alone is rounded otherwise, for passes of so many rows."""
    return dict.fromkeys(projections(model), min(rows, MOST))


def check_level(wanted: str | None) -> None:
    """Raises UsageError if there is no such level."""
    if wanted is not None:
        require_one_of(EXACTNESS, "exact", wanted)


def _prompts(runner: StreamRunner, rows: int) -> list[list[int]]:
    """A short and a long one, no longer than that a tree and its streams still have places that the base turns as before."""
    ends = (runner.places, context_limit(runner.base) or _LONG + rows, *(turn for turn, _ in rotary_turns(runner.base)))
    most = max(1, min(ends) - rows - runner.adapter.config.num_streams - 1)
    ids = torch.randint(0, runner.text_config.vocab_size, (_LONG,), generator=torch.Generator().manual_seed(0)).tolist()
    return [ids[:length] for length in sorted({min(_SHORT, most), min(_LONG, most)})]


class _Known:
    """A prompt, a tree behind it, and what the base itself says after each node.

    The first nodes of the tree are trees, too: a spine, with a leaf beside it at every third node. `alone` is
    `[nodes, vocab]`, from passes of one row.
    """

    def __init__(self, model: Any, prompt: list[int], rows: int) -> None:
        vocab = model.config.get_text_config().vocab_size
        parents = (-1, *(i - 2 if i % 3 == 1 and i > 1 else i - 1 for i in range(1, rows)))
        self.prompt, self.tree = prompt, DraftTree(tuple(i % vocab for i in range(rows)), parents)
        cache = DynamicCache(config=model.config)
        plain_pass(model, prompt, cache)
        found, caches = [], {-1: cache}
        with as_decoding(model):
            for node, parent in enumerate(parents):
                again = parent in parents[node + 1 :]
                caches[node] = copy.deepcopy(caches[parent]) if again else caches.pop(parent)
                found.append(plain_pass(model, [self.tree.tokens[node]], caches[node]))
                if node not in parents[node + 1 :]:
                    del caches[node]
        self.alone = torch.stack(found)


def moved(logits: torch.Tensor, alone: torch.Tensor) -> float:
    """How far differences between the best tokens of a row have moved at most: `[rows, vocab]` logits, and those of the same rows
    read alone."""
    rivals = alone.topk(min(_RIVALS, alone.shape[1])).indices
    by = (logits.to(alone) - alone).gather(1, rivals)
    return number_or_infinity((by - by[:, :1]).abs().max())


def _compare(
    reader: StreamRunner, runner: StreamRunner, limits: dict[nn.Module, int] | None, known: list[_Known], passes: Passes, most: float = math.inf,
    whole: bool = False,
) -> tuple[bool, float, float]:  # fmt: skip
    """Over all passes of a runner: whether rows have the bits of one-row passes under `limits`, the noise without, and how far logits are off at most, as
    a part of their spread; no further once the noise is `most`.

    whole: keys that a row looks back at have no noise, so that prompts are read at once.
    """
    bits, noise, off = limits is not None, 0.0, 0.0
    safety = _SAFETY_FLOAT32 if is_fine(runner.base) else _SAFETY_COARSER
    for text in known:
        # what drafts have brought was read in such passes, too, so that the keys that a row looks back at have noise
        read = _behind(reader, runner, text.prompt, len(text.prompt) if whole else passes.rows)
        exact = _behind(reader, runner, text.prompt, len(text.prompt)) if bits else read
        with as_decoding(runner.model):
            for rows, streams in passes.each():
                if streams and runner.fused:  # its layers carry none
                    continue
                native = read(text.tree, rows, streams)
                off = max(off, number_or_infinity((native - text.alone[:rows]).abs().max() / text.alone.std()))
                noise = max(noise, safety * max(_rounding(runner.base, native), moved(native, text.alone[:rows])))
                if noise >= most:
                    return False, noise, off
                if bits:
                    with _limited(runner, limits):
                        bits = _equal(exact, text, rows, streams)
    return bits, noise, off


def _again(runner: StreamRunner, known: list[_Known]) -> tuple[int, ...]:
    """Of `_AGAIN`, the numbers of rows whose passes keep every row's bits when each projection takes one row at a time."""
    if runner.own_attention:  # takes the rows of a pass together
        return ()
    limits, kept = each_alone(runner.model), list(_AGAIN)
    for text in known:
        read = _behind(runner, runner, text.prompt, len(text.prompt))
        with as_decoding(runner.model), _limited(runner, limits):
            kept = [rows for rows in kept if rows <= len(text.alone) and _equal(read, text, rows, False)]
    return tuple(kept)


def _equal(read: Callable[[DraftTree, int, bool], torch.Tensor], text: _Known, rows: int, streams: bool) -> bool:
    """Whether rows of a pass have the bits of their own."""
    try:
        return torch.equal(read(text.tree, rows, streams), text.alone[:rows])
    except RowsUnknown:
        return False


def _rounding(model: Any, logits: torch.Tensor) -> float:
    """The last bit of the largest logit: rows that kept it here will not keep it everywhere."""
    return torch.finfo(model.get_input_embeddings().weight.dtype).eps * float(logits.abs().max())


def _behind(reader: StreamRunner, runner: StreamRunner, prompt: list[int], rows: int) -> Callable[[DraftTree, int, bool], torch.Tensor]:
    """Read a prompt once, its beginning as a prompt, by the reader, and what follows so many rows a pass; returns: tree, its first nodes, whether
    they speculate -> `[nodes, vocab]`, the logits of a pass over them behind the prompt."""
    device, cache = input_device(runner.model), RowCache(len(runner.layers), len(prompt) + rows)
    first = len(prompt) if rows >= len(prompt) else min(_SHORT, len(prompt))
    for start, end in itertools.pairwise((0, *range(first, len(prompt), rows), len(prompt))):
        places = torch.arange(start, end, device=device)[None]
        with as_decoding(runner.model) if start else contextlib.nullcontext():
            by = runner if start else reader
            by.verify(torch.tensor([prompt[start:end]], device=device), places, None, cache, None, last_only=start == 0)
        cache.keep(range(end - start))

    def read(tree: DraftTree, rows: int, streams: bool) -> torch.Tensor:
        places = torch.tensor([tree.depths[:rows]], device=device) + len(prompt)
        mask = tree.mask()[None, :rows, :rows].to(device) if rows > 1 else None
        ids = torch.tensor([tree.tokens[:rows]], device=device)
        return runner.verify(ids, places, mask, cache, torch.arange(rows) if streams else None).logits[0].float()

    return read


@contextlib.contextmanager
def _limited(runner: StreamRunner, limits: dict[nn.Module, int] | None) -> Iterator[None]:
    before, runner.limits = runner.limits, limits
    try:
        with keeping_bits(limits or {}):
            yield
    finally:
        runner.limits = before
