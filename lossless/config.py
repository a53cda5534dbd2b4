"""The shape of an adapter, how many streams, how deep, how wide; how long and how fast it learns; and from which answers.

Knows: numbers and the rules they obey. Does not know: tensors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import UsageError, nearest, require_at_least, require_one_of, require_seed, require_types

SCHEDULES = ("parallel", "deferred")
WEIGHT_FIELDS = (  # of a StreamingConfig: those that shape weights; the others are of decoding
    "num_streams", "num_msa_layers", "lora_rank", "transition_rank", "start_rank", "told_rank", "rotate_values", "pruning_rank",
    "draft_vocab_size",
)  # fmt: skip
_MIXED = ("", "no", "bf16", "fp16")


@dataclass(frozen=True)
class StreamingConfig:
    """Everything that shapes an adapter and the trees it drafts.

    Args:
        num_streams: gamma, the tokens drafted ahead of the certain one; also the depth of a tree.
        num_msa_layers: N_s, the top decoder layers in which stream rows exist.
        lora_rank: rank of the MSA adapters; their scale is 1.
        transition_rank: width of the recurrent transition head; 0 for none, as in the paper: then no stream knows the
            tokens of its path.
        start_rank: rank of what f adds to the main stream where streams start; 0: f is the identity.
        told_rank: rank of the map through which streams are told the token after theirs, when they start; 0: they are
            not. It takes the deferred schedule: in a parallel pass nobody knows that token yet.
        rotate_values: tell streams apart by turning their values in attention, in place of stream embeddings.
        pruning_rank: rank of the pruning layer's early exit; 0 for none.
        pruning_floor: least probability, by the early exit, of a path whose nodes speculate in a parallel pass.
        draft_vocab_size: tokens that may be drafted, 0 for all of them. Costs coverage, never exactness.
        tree_nodes: most nodes of a draft tree, the root counted: the rows of a verification pass.
        adaptive: draw the tree that fits what rows cost on this machine, and leave drafts out while they do not pay; else every
            tree has `tree_nodes` nodes.
        tree_top_k: most children of one node.
        schedule: `parallel` verifies a tree and speculates from every node of it in one pass, as in
            the paper; `deferred` speculates after the walk, from the accepted node only.
        recall: mix into the draft what followed the same few tokens earlier in the text.
    """

    num_streams: int = 4
    num_msa_layers: int = 4
    lora_rank: int = 32
    transition_rank: int = 384
    start_rank: int = 0
    told_rank: int = 0
    rotate_values: bool = False
    pruning_rank: int = 0
    pruning_floor: float = 0.01
    draft_vocab_size: int = 0
    tree_nodes: int = 16
    adaptive: bool = True
    tree_top_k: int = 8
    schedule: str = "parallel"
    recall: bool = True

    def __post_init__(self) -> None:
        require_types(self)
        require_at_least(1, self, "num_streams", "num_msa_layers", "lora_rank", "tree_nodes", "tree_top_k")
        require_at_least(0, self, "transition_rank", "start_rank", "told_rank", "pruning_rank", "draft_vocab_size")
        if not 0 <= self.pruning_floor < 1:
            raise UsageError(f"pruning_floor must be at least 0 and below 1, got {self.pruning_floor}")
        if self.told_rank and self.schedule == "parallel":
            raise UsageError(
                f"schedule must be deferred where streams are told the next token (told_rank={self.told_rank}), got 'parallel'"
            )
        require_one_of(SCHEDULES, "schedule", self.schedule)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StreamingConfig:
        """Raises UsageError for a field that no version of this class has."""
        values = {name: value for name, value in values.items() if name != "tree_floor"}  # measured costs stand in its place
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise UsageError(f"an adapter's config has no field {', '.join(unknown)}{nearest(unknown[0], [f.name for f in fields(cls)])}")
        return cls(**values)


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to learn.

    Args:
        steps: of the optimizer.
        answers_per_step: stretches of answers that a step visits in every process, most of them of different answers.
        positions_per_answer: the length of a stretch.
        visit_every: of an answer's stretches an epoch visits one in so many, others in the next: with more answers than
            time, a few positions of all of them teach more than all positions of a few.
        gradient_accumulation: so many visits make a step.
        learning_rate: of AdamW, at its highest; it falls to 0 as a cosine.
        warmup_steps: while it rises.
        max_grad_norm: longer gradients are cut.
        hard_labels: learn the base's likeliest tokens only, not their probabilities.
        share: part of the answers that is learnt from.
        mixed_precision: of Accelerate: no, bf16 or fp16; empty for what it is configured to.
        held_out: answers that are kept for evaluation.
        eval_every: steps between evaluations; the adapter of the best one is kept.
        patience: evaluations without a better one that end the training; 0 never does.
        checkpoint_every: steps that an interruption can cost.
        feature_memory_gb: for the base's hidden states of answers that are visited soon or again.
        logits_memory_gb: for the logits of all streams; what does not fit at once is computed a piece at a time.
        tracker: of Accelerate: tensorboard, wandb and others; empty for none.
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
    share: float = 1.0
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
        if not 0 < self.share <= 1:
            raise UsageError(f"share must be above 0 and at most 1, got {self.share}")
        if self.mixed_precision not in _MIXED:
            raise UsageError(f"mixed_precision must be one of {', '.join(_MIXED[1:])}, or empty for what Accelerate is configured to, got {self.mixed_precision!r}{nearest(self.mixed_precision, _MIXED)}")


@dataclass(frozen=True)
class DistillConfig:
    """What to ask of the base.

    Args:
        answer_tokens: stop after so many.
        max_new_tokens: of one answer.
        max_prompt_tokens: longer prompts are skipped; a later turn of a conversation may be as much longer as its answers.
        max_turns: of a conversation.
        batch_size: answers at once; a finished one is replaced. Their keys and values have to fit into memory.
        temperatures: used in turn, conversation by conversation; 0 is greedy.
        self_drawn: prompts that the model draws itself.
        seed: of the order of prompts, and of what is sampled.
    """

    answer_tokens: int = 600_000
    max_new_tokens: int = 256
    max_prompt_tokens: int = 384
    max_turns: int = 4
    batch_size: int = 128
    temperatures: tuple[float, ...] = (0.0, 0.8)
    self_drawn: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        require_types(self)
        require_at_least(1, self, "answer_tokens", "max_new_tokens", "max_prompt_tokens", "max_turns", "batch_size")
        require_at_least(0, self, "self_drawn")
        require_seed(self.seed)
        if not self.temperatures or min(self.temperatures) < 0:
            raise UsageError(f"temperatures must be at least 0, got {self.temperatures}")
