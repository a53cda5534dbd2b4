"""Questions to a base at attach: can it be served, and how much of its arithmetic does a pass of several rows keep?

Knows: how to compare a pass over a draft tree with the base's own passes, how many rows at a time a projection
takes without rounding otherwise, and what level of exactness follows. Does not know: adapters' worth, or generation.

    bitwise   every row has the very bits of a pass of its own
    near-tie  rows may be rounded otherwise; where that could change a choice, the text is read again row by row
    off       rows may be rounded otherwise, and a choice with them
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .anatomy import as_decoding, decoder, device_of, features, input_device, is_projection
from .base.packed import product_dtype
from .cache import RowCache
from .errors import UsageError, require_one_of
from .passes import keeping_bits
from .streams import StreamRunner
from .tree import DraftTree

EXACTNESS = ("bitwise", "near-tie", "off")

# logits further off than this part of their spread are another computation, not another rounding
_FAR_FLOAT32, _FAR_COARSER = 0.01, 0.25


@torch.no_grad()
def check_served(runner: StreamRunner) -> None:
    """A trial: a prompt, then a tree of two branches with streams, against the base's own forward.

    Raises:
        UsageError: the base's layers cannot carry the rows of a tree, or give other logits with them.
    """
    model, name = runner.base, type(runner.base).__name__
    tokens = [1 + i % (runner.text_config.vocab_size - 1) for i in range(7)]
    tree, branches = DraftTree((*tokens[3:5], tokens[6], tokens[5]), (-1, 0, 0, 1)), ((0, 1, 3), (0, 2))
    fine = model.get_input_embeddings().weight.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    far = _FAR_FLOAT32 if fine else _FAR_COARSER
    try:
        cache, device = RowCache(len(runner.layers)), input_device(model)
        runner.verify(torch.tensor([tokens[:3]], device=device), torch.arange(3, device=device)[None], None, cache, None)
        cache.keep(range(3))
        places = torch.tensor([tree.depths], device=device) + 3
        nodes = torch.arange(len(tree))
        out = runner.verify(torch.tensor([tree.tokens], device=device), places, tree.mask()[None].to(device), cache, nodes)
        cache.keep([0])
        context = torch.ones(1, 1, 4, dtype=torch.bool, device=device)
        there = out.entry.device
        runner.speculate(out.entry[:, :1], places[:, :1].to(there), context.to(there), cache)
        for branch in branches:
            text = torch.tensor([[*tokens[:3], *(tree.tokens[node] for node in branch)]], device=device)
            plain = model(input_ids=text, use_cache=False).logits[0, 3:].float()
            apart = (out.logits[0, list(branch)].float() - plain).abs().max()
            off = float(apart / plain.std()) if apart else 0.0
            if not off < far:
                raise UsageError(
                    f"{name} cannot be accelerated: over a draft tree it gives other logits than in a pass of its "
                    f"own (off by {off:.2g} of their spread, allowed is {far})"
                )
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError) as error:
        if isinstance(error, UsageError):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{name} cannot be accelerated: its layers cannot carry a draft tree ({reason[0]})") from error


def logit_scale(runner: StreamRunner) -> float:
    """What the base multiplies its LM head's logits with (a soft cap counts as its best straight line); 1 for most."""
    with torch.no_grad():
        plan, logits = runner.observe_anything()
        bare = runner.lm_head(plan.final[:, -1:]).float().to(logits.device)
    found = float((bare * logits.float()).sum() / (bare * bare).sum())
    return found if abs(found - 1) >= 0.02 else 1.0  # also if there is nothing to scale


_PIECES = range(2, 33)  # rows at a time that are tried: a pass of any of them may come
_OUTPUTS = 150_000  # numbers to compare for each of them: one in ten thousand may be all that differs
_RIVALS = 8  # the noise is that of differences between a position's best tokens
_QUIET = 0.01  # noise, in logits, that a choice is hardly ever within
_SAFETY = 4.0  # a short probe does not see the worst


@dataclass(frozen=True)
class Guarantee:
    """What holds for this base on this device, in this dtype.

    Attributes:
        level: one of `EXACTNESS`.
        limits: rows at a time that keep their bits, for each projection; None if the level is not bitwise.
        operations: the same by kind of projection, to be read: `in x out` -> rows.
        noise: how far differences between logits move with the shape of a pass, in logits.
        twin: passes over trees run through packed copies of the weights.
    """

    level: str
    limits: dict[nn.Module, int] | None = field(default=None, repr=False)
    operations: dict[str, int] = field(default_factory=dict)
    noise: float = 0.0
    twin: bool = False

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {"exact": self.level, "rows_that_keep_bits": self.operations, "noise": self.noise}


@torch.no_grad()
def find_guarantee(runner: StreamRunner, wanted: str | None, twin: StreamRunner | None = None) -> Guarantee:
    """Probe the base, in a second or two.

    Args:
        runner: passes in the base's own weights and kernels; twin: passes through packed copies, where there are any.
        wanted: a level; None for the strongest that pays: bitwise where it is to be had, unless most weights would
            take one row at a time for it and the noise is so small that a choice is hardly ever within it (float32).

    Raises:
        UsageError: there is no such level, or the device does not give it.
    """
    check_level(wanted)
    if wanted == "off":
        return Guarantee("off")
    if twin is not None and wanted in (None, "near-tie") and (noise := _compare(twin, None)[1]) < _QUIET:
        return Guarantee("near-tie", noise=noise, twin=True)
    limits, operations, together = find_limits(runner.model)
    # attention that is not called through transformers' interface takes the rows of a pass together
    apart = wanted != "near-tie" and not runner.own_attention
    bits, noise = _compare(runner, limits if apart else None)
    enough = wanted is None and together < 0.5 and noise < _QUIET
    if bits and not enough:
        return Guarantee("bitwise", limits, operations, noise)
    if wanted == "bitwise":
        raise UsageError(
            f"exact='bitwise' is not to be had for {type(runner.base).__name__} in {runner.base.dtype} on "
            f"{input_device(runner.base)}: something besides its projections and attention depends on the rows of a pass"
        )
    return Guarantee("near-tie", None, operations, noise)


def check_level(wanted: str | None) -> None:
    """Raises UsageError if there is no such level."""
    if wanted is not None:
        require_one_of(EXACTNESS, "exact", wanted)


def find_limits(model: Any) -> tuple[dict[nn.Module, int], dict[str, int], float]:
    """How many rows at a time each projection takes so that each has the bits that it has alone.

    Returns:
        The rows for each module; by kind; and the part of all weights that take more than one.
    """
    modules = [module for module in decoder(model).modules() if is_projection(module)]
    head = model.get_output_embeddings()
    limits: dict[nn.Module, int] = {}
    kinds: dict[tuple[Any, ...], int] = {}
    weights = several = 0
    for module in [*modules, *([] if head in modules else [head])]:
        kind = (type(module).__name__, *features(module), product_dtype(module))
        if kind not in kinds:
            kinds[kind] = _limit(module, model.get_input_embeddings().weight.dtype, device_of(module))
        limits[module] = kinds[kind]
        size = features(module)[0] * features(module)[1]
        weights += size
        several += size * (kinds[kind] > 1)
    operations = {f"{name} {ins}x{outs}": rows for (name, ins, outs, _), rows in kinds.items()}
    return limits, operations, several / weights


def _limit(projection: nn.Module, dtype: torch.dtype, device: torch.device) -> int:
    """The most rows of `_PIECES` up to which no number differs."""
    ins, outs = features(projection)
    count = min(256, max(16, _OUTPUTS // outs))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, ins, generator=generator)
    rows *= 2.0 ** (torch.arange(count)[:, None] % 6 - 2)  # rows of all sizes: 8-bit projections treat outliers apart
    rows = rows.to(device, dtype)
    alone = [projection(row[None, None])[0] for row in rows[4:6]]
    if not torch.equal(projection(rows[4:6]), torch.cat(alone)):
        return 1
    expected = torch.cat([projection(row[None, None])[0] for row in rows])
    most = 1
    for size in _PIECES:
        if size > count or not torch.equal(torch.cat([projection(piece) for piece in rows.split(size)]), expected):
            break
        most = size
    return most


def _compare(runner: StreamRunner, limits: dict[nn.Module, int] | None) -> tuple[bool, float]:
    """Over one tree: whether rows have the bits of one-row passes under `limits`, and the noise without."""
    model = runner.base
    vocab = runner.text_config.vocab_size
    prompt = torch.randint(0, vocab, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    parents = (-1, 0, 0, 1, 1, 2, 3, 3, 5, 6, 6, 9)
    tree = DraftTree(tuple(i % vocab for i in range(len(parents))), parents)
    read = _behind(runner, prompt)
    with as_decoding(runner.model):
        native = read(tree)
        with _limited(runner, limits):
            apart = native if limits is None else read(tree)
    bits, noise = limits is not None, _rounding(model, native)
    for leaf in (4, 8, 11):
        path = [node for node, seen in enumerate(tree.mask()[leaf].tolist()) if seen]
        cache = DynamicCache(config=model.config)
        _plain(model, prompt, cache)
        for node in path:
            with as_decoding(model):
                one = _plain(model, [tree.tokens[node]], cache)
            bits = bits and torch.equal(one, apart[node])
            rivals = one.topk(min(_RIVALS, len(one))).indices
            moved = (native[node] - one)[rivals]
            noise = max(noise, float((moved - moved[0]).abs().max()))
    return bits, _SAFETY * noise


def _rounding(model: Any, logits: torch.Tensor) -> float:
    """The last bit of the largest logit: rows that kept it here will not keep it everywhere."""
    return torch.finfo(model.get_input_embeddings().weight.dtype).eps * float(logits.abs().max())


def _plain(model: Any, ids: list[int], cache: DynamicCache) -> torch.Tensor:
    """`[vocab]`: the base's own logits after these tokens, in one pass behind its cache."""
    given = torch.tensor([ids], device=input_device(model))
    return model(input_ids=given, past_key_values=cache, use_cache=True).logits[0, -1].float()


def _behind(runner: StreamRunner, prompt: list[int]) -> Callable[[DraftTree], torch.Tensor]:
    """Read a prompt once; returns: tree -> `[nodes, vocab]`, the logits of a pass over it behind the prompt."""
    device, cache, length = input_device(runner.model), RowCache(len(runner.layers)), len(prompt)
    runner.verify(torch.tensor([prompt], device=device), torch.arange(length, device=device)[None], None, cache, None)
    cache.keep(range(length))

    def read(tree: DraftTree) -> torch.Tensor:
        places = torch.tensor([tree.depths], device=device) + length
        mask = tree.mask()[None].to(device) if len(tree) > 1 else None
        return runner.verify(torch.tensor([tree.tokens], device=device), places, mask, cache, None).logits[0].float()

    return read


@contextlib.contextmanager
def _limited(runner: StreamRunner, limits: dict[nn.Module, int] | None) -> Iterator[None]:
    before, runner.limits = runner.limits, limits
    try:
        with keeping_bits(limits or {}):
            yield
    finally:
        runner.limits = before
