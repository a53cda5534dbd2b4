"""How long and how fast an adapter learns, and from how much.

Knows: numbers and the rules they obey. Does not know: tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError, nearest, require_at_least, require_seed, require_types

_MIXED = ("", "no", "bf16", "fp16")


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to learn.

    Args:
        steps: steps of the optimizer.
        answers_per_step: stretches of answers that a step visits in every process, most of them of different answers.
        positions_per_answer: the length of a stretch, in tokens.
        visit_every: of an answer's stretches an epoch visits one in so many, others in the next: with more answers than
            time, a few positions of all of them teach more than all positions of a few.
        gradient_accumulation: so many visits make a step.
        learning_rate: AdamW's learning rate at its highest; it falls to 0 as a cosine.
        warmup_steps: steps over which the learning rate rises.
        max_grad_norm: longer gradients are cut.
        hard_labels: learn the base's likeliest tokens only, not their probabilities.
        data_fraction: part of the answers that is learnt from.
        mixed_precision: Accelerate's mixed precision: no, bf16 or fp16; empty for what it is configured to.
        held_out: answers that are kept for evaluation.
        eval_every: steps between evaluations; the adapter of the best one is kept.
        patience: evaluations without a better one that end the training; 0 never does.
        checkpoint_every: steps between checkpoints: what an interruption can cost.
        feature_memory_gb: for the base's hidden states of answers that are visited soon or again.
        logits_memory_gb: for the logits of all streams; what does not fit at once is computed a piece at a time.
        tracker: one of Accelerate's trackers: tensorboard, wandb and others; empty for none.
        begin_from: folder or hub id of an adapter that goes on learning: with its `seed` and at most its `held_out`, nothing
            is held out that it has learnt from.
        seed: of the weights, of the order of answers, and of what is held out.
    """

    steps: int = 900
    answers_per_step: int = 16
    positions_per_answer: int = 32
    visit_every: int = 1
    gradient_accumulation: int = 1
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    max_grad_norm: float = 1.0
    hard_labels: bool = False
    data_fraction: float = 1.0
    mixed_precision: str = ""
    held_out: int = 24
    eval_every: int = 100
    patience: int = 0
    checkpoint_every: int = 50
    feature_memory_gb: float = 8.0
    logits_memory_gb: float = 2.0
    tracker: str = ""
    begin_from: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        require_types(self)
        require_at_least(1, self, "steps", "answers_per_step", "positions_per_answer", "visit_every", "gradient_accumulation", "held_out")
        require_at_least(1, self, "eval_every", "checkpoint_every")
        require_at_least(0, self, "patience", "warmup_steps")
        require_seed(self.seed)
        for name in ("learning_rate", "logits_memory_gb"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.data_fraction <= 1:
            raise UsageError(f"data_fraction must be above 0 and at most 1, got {self.data_fraction}")
        if self.mixed_precision not in _MIXED:
            raise UsageError(f"mixed_precision must be one of {', '.join(_MIXED[1:])}, or empty for what Accelerate is configured to, got {self.mixed_precision!r}{nearest(self.mixed_precision, _MIXED)}")
