"""What the streams are taught: the base's own next-token distributions at the positions ahead.

Knows: the loss of a block, and how to compute it in bounded memory. Does not know: optimizers, data, checkpoints.

For a position t of an answer, stream j is to say what the base says after x_{t+j}:

    loss = sum_j 0.8^(j-1) KL( p_base(. | x_<=t+j) || q_j(. | S[t, <=j], x_t+1 .. x_t+j) ) / sum_j 0.8^(j-1)

plus, with a pruning layer, KL( p_base(. | x_<=t) || its early exit at t ), which reaches that layer alone;
over the draft vocabulary, the targets being the base's probabilities at temperature 1 from its own hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..drafting.drafter import Drafter
from ..streams.runner import StreamRunner
from .features import TrainBatch

_DECAY = 0.8
_COPIES = 5  # of a stream's logits that are alive at once: they, the targets twice, the gradient and what makes it


class StreamLoss(nn.Module):
    """The loss of a block; its parameters are the adapter's.

    Args:
        logits_gb: memory for logits. A vocabulary is wide and the streams are many: what does not fit at once is
            computed a piece of the batch at a time.
        hard_labels: learn the base's likeliest tokens only, not their probabilities.
    """

    def __init__(self, runner: StreamRunner, drafter: Drafter, logits_gb: float, hard_labels: bool = False) -> None:
        super().__init__()
        self.adapter = runner.adapter
        self._base = (runner, drafter)  # in a tuple: not to be registered as submodules
        self._bytes, self._hard = int(logits_gb * 2**30), hard_labels

    def forward(self, block: TrainBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the loss, and for each stream its KL and how often its best token is the base's."""
        runner, drafter = self._base
        transition, gamma = self.adapter.transition, self.adapter.config.num_streams
        told = drafter.embed(block.tokens[:, :, 0])
        streams = runner.speculate(block.entry, block.positions, block.context, block.rows, told)  # [b, p, gamma, dim]
        r, heard, drafting = transition.begin(streams[:, :, 0]), transition.hear(streams), []
        for j in range(gamma):
            r = transition.advance(r, drafter.embed(block.tokens[:, :, j]), heard[:, :, j])
            drafting.append(transition.adjust(streams[:, :, j], r))
        sums = self._compare(torch.stack(drafting, dim=2), block.final, block.valid)  # [2, gamma]
        # none, if every answer of the block ends before
        each, agreement = sums / block.valid.sum(dim=(0, 1)).clamp_min(1)
        weights = torch.tensor([_DECAY**j for j in range(gamma)], device=each.device)
        loss = (each * weights).sum() / weights.sum()
        if self.adapter.pruning is not None:
            loss = loss + self._pruning_loss(block)
        return loss, each.detach(), agreement.detach()

    def _pruning_loss(self, block: TrainBatch) -> torch.Tensor:
        """KL of the early exit to the base's own distribution at the same position."""
        exits = self._base[0].finish(self.adapter.exit_early(block.entry[:, 1:]))  # [b, p - 1, dim]
        if not exits.shape[1]:  # the only position of this block has no successor in it
            return exits.sum()
        valid = block.valid[:, :-1, :1]
        divergence, _ = self._compare(exits[:, :, None], block.final[:, : exits.shape[1]], valid)[:, 0]
        return divergence / valid.sum().clamp_min(1)

    def _compare(self, drafting: torch.Tensor, final: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """`[2, gamma]`: each stream's summed divergence, and how often its best token is the base's.

        drafting: `[b, p, gamma, dim]`, what the LM head reads of each stream; final: `[b, p + gamma - 1, dim]`, what it
        reads of the base; valid: `[b, p, gamma]`.
        """
        ids = self.adapter.draft_ids
        vocabulary = self._base[0].text_config.vocab_size if ids is None else len(ids)
        piece = max(1, self._bytes // (drafting.shape[1] * vocabulary * 4 * _COPIES))
        found: torch.Tensor = _Divergence.apply(drafting, final, valid, self._base[1].logits, piece, self._hard)
        return found


class _Divergence(torch.autograd.Function):
    """How far each stream is from the base: a piece of the batch at a time.

    A vocabulary is wide and the streams are many. The gradient with respect to what the LM head reads, softmax(l) - p
    through the head, is taken as soon as a piece's logits are there, so that none is kept and none computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, drafting: torch.Tensor, final: torch.Tensor, valid: torch.Tensor, logits: Any, piece: int, hard: bool
    ) -> torch.Tensor:
        learning = ctx.needs_input_grad[0]
        count, gamma = drafting.shape[1:3]
        gradient = torch.zeros_like(drafting) if learning else None
        sums = torch.zeros(2, gamma, device=drafting.device)
        for begin in range(0, len(drafting), piece):
            part = slice(begin, begin + piece)
            targets = F.softmax(logits(final[part]), dim=-1)  # [piece, p + gamma - 1, draft vocabulary]
            best = targets.argmax(-1)
            if hard:
                targets = F.one_hot(best, targets.shape[-1]).to(targets.dtype)
            entropy = -torch.special.xlogy(targets, targets).sum(-1)  # [piece, p + gamma - 1]
            for j in range(gamma):  # a target serves every stream that predicts it
                of, ahead = valid[part, :, j], slice(j, j + count)
                hidden = drafting[part, :, j][of].requires_grad_(learning)
                with torch.set_grad_enabled(learning):
                    drafted = logits(hidden)  # [n, draft vocabulary]
                told, target = drafted.detach(), targets[:, ahead][of]
                normalizer = told.logsumexp(-1, keepdim=True)
                sums[0, j] += normalizer.sum() - torch.linalg.vecdot(target, told).sum() - entropy[:, ahead][of].sum()
                sums[1, j] += (told.argmax(-1) == best[:, ahead][of]).sum()
                if gradient is not None:
                    error = (told - normalizer).exp_().sub_(target)
                    gradient[part, :, j][of] = torch.autograd.grad(drafted, hidden, error)[0]
        ctx.gradient = gradient
        return sums

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        """upstream: `[2, gamma]`, of which the second row (of counts) has no gradient to give."""
        gradient, ctx.gradient = ctx.gradient, None
        return gradient * upstream[0][0][:, None].to(gradient.dtype), None, None, None, None, None
