"""Questions to a base before it is trusted: can it be served at all?

Knows: how to compare a pass over a small draft tree, streams included, with the base's own forward.
Does not know: adapters' worth, generation, or speed.
"""

from __future__ import annotations

import torch

from .cache import RowCache
from .errors import UsageError
from .streams import StreamRunner
from .tree import DraftTree

_FAR = 0.25  # logits further off than this part of their spread are another computation, not another rounding


@torch.no_grad()
def check_served(runner: StreamRunner) -> None:
    """A trial: a prompt, then a tree of two branches with streams, against the base's own forward.

    Raises:
        UsageError: the base's layers cannot carry the rows of a tree, or give other logits with them.
    """
    model, name = runner.model, type(runner.model).__name__
    top = min(runner.text_config.vocab_size, 1000) - 1
    tokens = [top - 3 * i % top for i in range(7)]
    tree, branches = DraftTree((*tokens[3:5], tokens[6], tokens[5]), (-1, 0, 0, 1)), ((0, 1, 3), (0, 2))
    try:
        with runner.installed():
            cache, device = RowCache(len(runner.layers)), model.device
            runner.verify(torch.tensor([tokens[:3]], device=device), torch.arange(3, device=device)[None], None, cache, None)
            cache.keep(range(3))
            places = torch.tensor([tree.depths], device=device) + 3
            nodes = torch.arange(len(tree), device=device)
            out = runner.verify(torch.tensor([tree.tokens], device=device), places, tree.mask()[None].to(device), cache, nodes)
            cache.keep([0])
            context = torch.ones(1, 1, 4, dtype=torch.bool, device=device)
            runner.speculate(out.entry[:, :1], places[:, :1], context, cache)
        for branch in branches:
            text = torch.tensor([[*tokens[:3], *(tree.tokens[node] for node in branch)]], device=device)
            plain = model(input_ids=text, use_cache=False).logits[0, 3:].float()
            off = float((out.logits[0, list(branch)].float() - plain).abs().max() / plain.std())
            if not off < _FAR:
                raise UsageError(
                    f"{name} cannot be accelerated: over a draft tree it gives other logits than in a pass of its "
                    f"own (off by {off:.2g} of their spread, allowed is {_FAR})"
                )
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{name} cannot be accelerated: its layers cannot carry a draft tree ({reason[0]})") from error
