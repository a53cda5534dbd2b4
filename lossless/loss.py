"""What the streams are taught: the base's own next-token distributions at the positions ahead.

Knows: the loss of a block, and how to compute it in bounded memory. Does not know: optimizers, data, checkpoints.

For a position t of an answer, stream j is to say what the base says after x_{t+j}:

    loss = sum_j 0.8^(j-1) KL( p_base(. | x_<=t+j) || q_j(. | S[t, <=j], x_t+1 .. x_t+j) ) / sum_j 0.8^(j-1)

plus, with a pruning layer, KL( p_base(. | x_<=t) || its early exit at t ), which reaches that layer alone;
over the draft vocabulary, the targets being the base's probabilities at temperature 1 from its own hidden states.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .draft import Drafter
from .features import Block
from .streams import StreamRunner

_DECAY = 0.8
_COPIES = 4  # of all logits that are alive at once: they, their logarithms, and the gradients of both


class StreamLoss(nn.Module):
    """The loss of a block; its parameters are the adapter's.

    Args:
        logits_gb: memory for logits. A vocabulary is wide and the streams are many: what does not fit at once is
            computed in pieces, and again for the gradient.
        hard_labels: learn the base's likeliest tokens only, not their probabilities.
    """

    def __init__(self, runner: StreamRunner, drafter: Drafter, logits_gb: float, hard_labels: bool = False) -> None:
        super().__init__()
        self.adapter = runner.adapter
        self._base = (runner, drafter)  # in a tuple: not to be registered as submodules
        self._bytes, self._hard = int(logits_gb * 2**30), hard_labels

    def forward(self, block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the loss, and for each stream its KL and how often its best token is the base's."""
        runner, drafter = self._base
        transition, gamma = self.adapter.transition, self.adapter.config.num_streams
        told = drafter.embed(block.tokens[:, :, 0])
        streams = runner.speculate(block.entry, block.positions, block.context, block.rows, told)  # [b, p, gamma, dim]
        r, drafting = transition.begin(streams[:, :, 0]), []
        for j in range(1, gamma + 1):
            stream = streams[:, :, j - 1]
            r = transition.advance(r, drafter.embed(block.tokens[:, :, j - 1]), stream, j)
            drafting.append(transition.adjust(stream, r))
        sums = self._compare_all(torch.stack(drafting, dim=2), block.final, block.valid)  # [2, gamma]
        # none, if every answer of the block ends before
        each, agreement = sums / block.valid.sum(dim=(0, 1)).clamp_min(1)
        weights = torch.tensor([_DECAY**j for j in range(gamma)], device=each.device)
        loss = (each * weights).sum() / weights.sum()
        if self.adapter.pruning is not None:
            loss = loss + self._pruning_loss(block)
        return loss, each.detach(), agreement.detach()

    def _pruning_loss(self, block: Block) -> torch.Tensor:
        """KL of the early exit to the base's own distribution at the same position."""
        exits = self._base[0].finish(self.adapter.exit_early(block.entry[:, 1:]))  # [b, p - 1, dim]
        valid = block.valid[:, :-1, :1]
        divergence, _ = self._compare_all(exits[:, :, None], block.final[:, : exits.shape[1]], valid)[:, 0]
        return divergence / valid.sum().clamp_min(1)

    def _compare_all(self, drafting: torch.Tensor, final: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """drafting: `[b, p, gamma, dim]`, what the LM head reads of each stream; the rest as in `_compare`."""
        batch, count, gamma, _ = drafting.shape
        ids = self.adapter.draft_ids
        vocabulary = self._base[0].text_config.vocab_size if ids is None else len(ids)
        # of one position of each answer: the streams' logits and, nearly all shared between positions, one target's
        each = batch * (gamma + 1) * vocabulary * 4 * _COPIES
        piece = max(1, self._bytes // each)
        if piece >= count:
            return self._compare(drafting, final, valid)
        parts = [
            checkpoint(
                self._compare, drafting[:, i : i + piece], final[:, i : i + piece + gamma - 1],
                valid[:, i : i + piece], use_reentrant=False,
            )
            for i in range(0, count, piece)
        ]  # fmt: skip
        return torch.stack(parts).sum(0)

    def _compare(self, drafting: torch.Tensor, final: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """`[2, gamma]`: over these positions, each stream's summed KL, and how often its best token is the base's.

        final: `[b, p + gamma - 1, dim]`; valid: `[b, p, gamma]`.
        """
        drafter, count = self._base[1], drafting.shape[1]
        with torch.no_grad():  # a target serves every stream that foretells it
            targets = F.log_softmax(drafter.logits(final), dim=-1)  # [b, p + gamma - 1, draft vocabulary]
        sums = []
        for j in range(drafting.shape[2]):
            drafted = F.log_softmax(drafter.logits(drafting[:, :, j][valid[:, :, j]]), dim=-1)  # [n, draft vocabulary]
            target = targets[:, j : j + count][valid[:, :, j]]
            if self._hard:
                divergence = F.nll_loss(drafted, target.argmax(-1), reduction="sum")
            else:
                divergence = F.kl_div(drafted, target, reduction="sum", log_target=True)
            sums.append(torch.stack([divergence, (drafted.argmax(-1) == target.argmax(-1)).float().sum()]))
        return torch.stack(sums, dim=1)
