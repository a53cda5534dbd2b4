"""Levels of a draft tree, read off the streams one after the other.

Knows: what the transition head carries from level to level, and how a level becomes likely tokens; where there are kernels in one call of C, on
a GPU as a captured graph for each level of a tree under one text. Does not know: trees, or which of its nodes go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..base.drafts import FusedLevel, likeliest
from ..kernels.graphs import Outputs, Recorded
from .noise import NoiseBias

Likely = list[dict[int, float]]  # for each node of a frontier its likely tokens, with their log probabilities


class Levels:
    """The levels of one draft.

    Args:
        drafter: whose transition head, embeddings and draft vocabulary they are.
        streams: `[texts, num_streams, dim]`.
        noise_bias: of these texts, None if decoding is greedy.
    """

    def __init__(self, drafter: Any, streams: torch.Tensor, noise_bias: NoiseBias | None) -> None:
        self.drafter, self.streams, self.noise_bias = drafter, streams, noise_bias
        transition = drafter.adapter.transition
        self.r, self.heard = transition.begin(streams[:, 0]), transition.hear(streams)  # [frontier, rank], [texts, gamma, rank]
        self.owner = torch.arange(len(streams), device=streams.device)  # whose each row of the frontier is

    def read(self, ahead: int, chosen: Sequence[int], tokens: Sequence[int]) -> Likely:
        """What is likely behind each node of a level.

        Args:
            ahead: number of the stream, from 0.
            chosen: of each node, the row of its parent in the level before; tokens: its token.
        """
        drafter, device = self.drafter, self.streams.device
        transition = drafter.adapter.transition
        if ahead:
            self.r, self.owner = self.r[list(chosen)], self.owner[list(chosen)]
        told = drafter.embed(torch.tensor(tokens, device=device)).to(self.streams.dtype)
        self.r = transition.advance(self.r, told, self.heard[self.owner, ahead])
        logits = drafter.logits(transition.adjust(self.streams[self.owner, ahead], self.r))  # [frontier, draft vocabulary]
        if self.noise_bias is not None:
            logits = self.noise_bias.perturb(logits, self.owner, ahead, drafter.adapter.draft_ids)
        numbers, scores = likeliest(logits, drafter.top_k(logits.shape[1]))
        return as_likely(drafter.token_ids(numbers), scores)


class FusedLevels:
    """The same, each in one call of C.

    Args:
        level: that call; table: the embeddings of all tokens, None: they are asked for.
    """

    def __init__(self, drafter: Any, level: FusedLevel, table: torch.Tensor | None, streams: torch.Tensor, noise_bias: NoiseBias | None) -> None:
        self.drafter, self.level, self.table, self.noise_bias = drafter, level, table, noise_bias
        self.streams = streams.float().contiguous()
        self.r, self.heard = level.begin(self.streams)
        self.owner: Sequence[int] = range(len(streams))

    def read(self, ahead: int, chosen: Sequence[int], tokens: Sequence[int]) -> Likely:
        """As `Levels.read`."""
        drafter, bias, places, table = self.drafter, self.noise_bias, tokens, self.table
        if ahead:
            self.owner = [self.owner[row] for row in chosen]
        if table is None or max(tokens) >= len(table):  # the embeddings say what they make of such a token
            table, places = drafter.embed(torch.tensor(tokens)).float().contiguous(), range(len(tokens))
        count = drafter.top_k(self.level.vocab)
        looked_at = count if bias is None else min(bias.cut, self.level.vocab)
        of = torch.tensor([list(places), list(chosen if ahead else range(len(tokens))), list(self.owner)])
        self.r, logits, likely, scores = self.level(of, self.r, table, self.heard, self.streams, ahead, looked_at)
        if bias is None:
            return as_likely(likely, scores)
        if looked_at:
            return as_likely(*bias.best(likely, scores, of[2], ahead, count))
        numbers, scores = likeliest(bias.perturb(logits, of[2], ahead, drafter.adapter.draft_ids), count)
        return as_likely(drafter.token_ids(numbers), scores)


def as_likely(tokens: torch.Tensor, scores: torch.Tensor) -> Likely:
    """Of token ids and their log probabilities, both `[frontier, count]`."""
    return [dict(zip(*row, strict=True)) for row in zip(tokens.tolist(), scores.tolist(), strict=True)]


class GraphedLevels:
    """The same of one text on a GPU, captured once for each level and used for every draft: up to `most` nodes a level.

    Of sampled texts the graphs end with logits, to which the noise of their positions comes outside of them.
    """

    def __init__(self, drafter: Any, most: int) -> None:
        self.drafter, self.most = drafter, most
        self._graphs: dict[tuple[int, bool], Recorded] = {}
        self._before: torch.Tensor | None = None  # [most, rank], of the level that was read last
        self.streams: torch.Tensor | None = None
        self.noise_bias: NoiseBias | None = None

    def begin(self, streams: torch.Tensor, noise_bias: NoiseBias | None) -> GraphedLevels:
        """The levels of another draft; streams: `[1, num_streams, dim]`."""
        self.streams, self.noise_bias = streams, noise_bias
        return self

    def read(self, ahead: int, chosen: Sequence[int], tokens: Sequence[int]) -> Likely:
        """As `Levels.read`."""
        filling = [0] * (self.most - len(tokens))
        numbers = torch.tensor([*tokens, *filling, *(chosen or [0] * len(tokens)), *filling])
        inputs = (numbers, self.streams, *(() if ahead == 0 else (self._before,)))
        key = (ahead, self.noise_bias is not None)
        if key not in self._graphs:
            self._graphs[key] = Recorded(self._level(*key), numbers.to(self.streams.device), *inputs[1:])  # type: ignore[union-attr]
        self._before, best = self._graphs[key](*inputs)
        if self.noise_bias is not None:
            best = self._perturbed(best, ahead)
        count = best.shape[1] // 2
        rows = best[: len(tokens)].tolist()
        return [dict(zip(map(int, row[:count]), row[count:], strict=True)) for row in rows]

    def _level(self, ahead: int, sampled: bool) -> Callable[..., Outputs]:
        """What is captured of a level: numbers `[2 * most]`, streams, r of the level before -> r and the best tokens with their log
        probabilities `[most, 2 * count]`; of sampled texts, for which it comes to the noise, logits `[most, draft vocabulary]`."""
        drafter, transition = self.drafter, self.drafter.adapter.transition

        def run(numbers: torch.Tensor, streams: torch.Tensor, before: torch.Tensor | None = None) -> Outputs:
            tokens, chosen = numbers.view(2, self.most)
            own, heard = streams[:, ahead], transition.hear(streams)[:, ahead]
            r = transition.begin(streams[:, 0]).expand(self.most, -1) if before is None else before[chosen]
            r = transition.advance(r, drafter.embed(tokens).to(streams.dtype), heard)
            logits = drafter.logits(transition.adjust(own, r))
            return r, logits if sampled else self._best(logits)

        return run

    def _perturbed(self, logits: torch.Tensor, ahead: int) -> torch.Tensor:
        owner = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return self._best(self.noise_bias.perturb(logits, owner, ahead, self.drafter.adapter.draft_ids))  # type: ignore[union-attr]

    def _best(self, logits: torch.Tensor) -> torch.Tensor:
        """`[rows, 2 * count]`, in one tensor, so that they come in one copy: token ids are whole in float64."""
        numbers, scores = likeliest(logits, self.drafter.top_k(logits.shape[1]))
        return torch.cat([self.drafter.token_ids(numbers).double(), scores.double()], dim=1)
