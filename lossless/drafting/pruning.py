"""The pruning layer: which nodes of a draft tree are worth streams, told before the streams are inserted.

Knows: how likely a path is by an early exit at layer N - N_s. Pure: no model, no state. Does not know: where the exit's
logits come from, or what becomes of a node without streams (it is verified like any other; if the walk ends on it,
its streams run after the walk).

    p(c | its parent at t) = softmax(head(norm(M[t] + B A M[t])))[c],  a node's score is the product along its path
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .tree import DraftTree


def worth_streams(logits: torch.Tensor, trees: Sequence[DraftTree], numbers: torch.Tensor | None, floor: float) -> list[int]:
    """The rows whose path is at least as likely as `floor` in any of the trees; roots always are.

    Args:
        logits: `[batch, rows, draft vocabulary]` of the early exit after every node.
        numbers: `[vocab]`, the place of each token in the draft vocabulary, -1 for none; None if it is the whole
            vocabulary. A token that cannot be scored (the text recalled it) is as likely as its parent.
    """
    scores = logits.float().log_softmax(-1)
    least, kept = math.log(floor) if floor else -math.inf, set()
    for tree, own in zip(trees, scores, strict=True):
        tokens = torch.tensor(tree.tokens[1:], dtype=torch.long, device=own.device)
        columns = tokens if numbers is None else numbers[tokens]
        parents = torch.tensor(tree.parents[1:], dtype=torch.long, device=own.device)
        steps = own[parents, columns.clamp_min(0)].masked_fill(columns < 0, 0.0).tolist()
        paths = [0.0]
        for parent, step in zip(tree.parents[1:], steps, strict=True):
            paths.append(paths[parent] + step)
        kept |= {node for node, path in enumerate(paths) if node == 0 or path >= least}
    return sorted(kept)
