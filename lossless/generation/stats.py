"""What a call of `generate` did, counted while it was done.

Knows: counts, seconds, and what each step emitted. Does not know: how any of it came about.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..drafting.tree import DraftTree
from .acceptance import Accepted


@dataclass(frozen=True)
class Step:
    """What one step of the decode loop gave one text.

    Attributes:
        text: which sequence of the batch.
        tokens: the ids that were emitted.
        sources: where the draft of each token came from: j for stream j, -1 for the text itself (n-gram), 0 for a token that was
            not drafted and is the model's own.
        drafted: nodes proposed, the root not counted.
        at_s: seconds from the start of the call to the end of the step.
    """

    text: int
    tokens: tuple[int, ...]
    sources: tuple[int, ...]
    drafted: int
    at_s: float


@dataclass
class Stats:
    """What the last `generate` did. The prefill and the token it yields are counted apart.

    Attributes:
        texts: sequences of the batch.
        tokens: emitted tokens of all of them.
        target_passes: passes of the base after the prefill; one over a batch counts for each text in it.
        drafted: nodes proposed, roots not counted.
        speculated: nodes that carried streams through a verification pass (parallel schedule).
        pruned_wrongly: of those that the pruning layer left out, the ones that the walk ended on: their streams ran after it.
        accepted: how many passes emitted 1, 2, 3, ... tokens.
        prefill_s, decode_s: wall-clock seconds; of decoding, draft_s went into streams and trees, pass_s into passes over trees. On
            a GPU, which works on its own, only their sum with the rest says something.
        exact: what held: `bitwise`, `near-tie` or `off` (see `accelerate`); in a batch of several texts always `off`.
        reread: rows that were read once more, each by itself, for choices that were too close to call.
        exceeded: choices made again whose logits had moved further than the probe's bound: tokens before them were guarded by too
            narrow a bound. From then on it is wider, in later processes, too.
        served: False if the call was handed to the base's own generate; `why` tells the reason.
        steps: one for each text and step, in order; the first of a text is its prefill. Grows while the call is under way.
    """

    texts: int = 0
    tokens: int = 0
    target_passes: int = 0
    drafted: int = 0
    speculated: int = 0
    pruned_wrongly: int = 0
    accepted: dict[int, int] = field(default_factory=dict)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    draft_s: float = 0.0
    pass_s: float = 0.0
    exact: str = "off"
    reread: int = 0
    exceeded: int = 0
    served: bool = True
    why: str = ""
    steps: list[Step] = field(default_factory=list)
    _started: float = field(default_factory=time.perf_counter)

    @property
    def acceptance_length(self) -> float:
        """Emitted tokens per target pass."""
        return (self.tokens - self.texts) / self.target_passes if self.target_passes else 1.0

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed, the prefill not counted."""
        return (self.tokens - self.texts) / self.decode_s if self.decode_s else 0.0

    def __str__(self) -> str:
        if not self.served:
            return "not accelerated: handed to the base's own generate"
        beyond = f", {self.exceeded} times logits moved further than was promised" if self.exceeded else ""
        return (
            f"{self.tokens} tokens, {self.target_passes} target passes, acceptance length "
            f"{self.acceptance_length:.2f}, {self.tokens_per_s:.1f} tokens/s{beyond}"
        )

    @contextlib.contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add what the context takes to one of the seconds."""
        started = time.perf_counter()
        yield
        setattr(self, part, getattr(self, part) + time.perf_counter() - started)

    def count(self, text: int, tree: DraftTree, accepted: Accepted) -> None:
        """One pass over a tree."""
        emitted = len(accepted.tokens)
        self.target_passes += 1
        self.drafted += len(tree) - 1
        self.accepted[emitted] = self.accepted.get(emitted, 0) + 1
        sources = (*(tree.sources[node] for node in accepted.path[1:]), 0)[:emitted]
        self.emit(text, accepted.tokens, sources, len(tree) - 1)

    def count_alone(self, text: int, token: int, rows: int, passes: int) -> None:
        """So many rows read once more, in so many passes, for a choice that was too close to call."""
        self.target_passes += passes
        self.reread += rows
        self.emit(text, (token,), (0,), 0)

    def emit(self, text: int, tokens: tuple[int, ...], sources: tuple[int, ...], drafted: int) -> None:
        """Tokens that a step gave."""
        self.steps.append(Step(text, tokens, sources, drafted, time.perf_counter() - self._started))
