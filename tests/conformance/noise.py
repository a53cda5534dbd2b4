"""Whether a probe's bound holds: how far logits move at thousands of positions, against what it promised after a few.

`python -m tests.conformance.noise` tries the required families over many texts and prints a line for each; `--texts 100` for more,
family names for fewer.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass

import torch
import transformers
from transformers.cache_utils import DynamicCache

from lossless.adapter.compat import new_adapter
from lossless.base.layers import CACHE, as_decoding, as_generating
from lossless.generation.exactness import moved
from lossless.generation.model import AcceleratedModel, accelerate
from lossless.streams.cache import RowCache

from .families import REQUIRED, VOCAB, build
from .judge import CONFIG

PROMPT, LENGTH = 24, 200  # tokens: read as a prompt, and in all
SHAPES = (1, 2, 5, 12)  # rows of a pass
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Observed:
    """Positions that were read in passes of several rows, and in logits: what a probe promised, and how far they moved at most."""

    positions: int
    bound: float
    worst: float

    def __str__(self) -> str:
        return f"{self.positions:>7,} positions, moved by at most {self.worst:.2g}, promised {self.bound:.2g}: {self.worst / self.bound:.0%} of it"


@torch.no_grad()
def observe(fast: AcceleratedModel, texts: int) -> Observed:
    """Random texts: the prompt read as the base reads it, all that follows in passes of one shape, each position against itself
    read alone behind the base's own rows."""
    worst, positions = 0.0, 0
    for seed in range(texts):
        ids = torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1000 + seed))
        alone = _read_alone(fast, ids)
        for rows in SHAPES[fast.runner is fast.reader :]:  # one row in the base's own weights is what it is compared with
            worst = max(worst, moved(_read_together(fast, ids, rows), alone))
            positions += len(alone)
    return Observed(positions, fast.guarantee.noise, worst)


def _read_alone(fast: AcceleratedModel, ids: torch.Tensor) -> torch.Tensor:
    """`[positions, vocab]`: the base's own passes of one row."""
    cache = DynamicCache(config=fast.base.config)
    fast.base(**as_generating(fast.base, ids[:, :PROMPT]), **{CACHE: cache}, use_cache=True)
    with as_decoding(fast.base):
        told = [as_generating(fast.base, ids[:, i : i + 1], i) for i in range(PROMPT, LENGTH)]
        found = [fast.base(**one, **{CACHE: cache}, use_cache=True).logits[0, -1] for one in told]
    return torch.stack(found).float()


def _read_together(fast: AcceleratedModel, ids: torch.Tensor, rows: int) -> torch.Tensor:
    """The same, so many rows a pass, as drafts are read that are all accepted."""
    places, cache = torch.arange(LENGTH)[None], RowCache(len(fast.runner.layers))
    fast.reader.verify(ids[:, :PROMPT], places[:, :PROMPT], None, cache, None, last_only=True)
    cache.keep(range(PROMPT))
    found = []
    with as_decoding(fast.runner.model):
        for start in range(PROMPT, LENGTH, rows):
            some = slice(start, min(start + rows, LENGTH))
            width = some.stop - start
            mask = torch.ones(1, width, width, dtype=torch.bool).tril() if width > 1 else None
            found.append(fast.runner.verify(ids[:, some], places[:, some], mask, cache, None).logits[0].float())
            cache.keep(range(width))
    return torch.cat(found)


def attach(family: str, dtype: torch.dtype) -> AcceleratedModel:
    """A tiny model of the family whose rows are guarded, not kept to the bit."""
    model = build(family).to(dtype)
    return accelerate(model, new_adapter(model, CONFIG).randomize(2), exact="near-tie")


def main() -> int:
    """Returns 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=REQUIRED)
    parser.add_argument("--texts", type=int, default=20)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    narrow = 0
    for family in arguments.families:
        for name, dtype in DTYPES.items():
            found = observe(attach(family, dtype), arguments.texts)
            narrow += found.worst > found.bound
            print(f"{family:<18} {name:<9} {found}", flush=True)
    return int(narrow > 0)


if __name__ == "__main__":
    sys.exit(main())
