"""The shape of an adapter, and how trees are drafted with it.

Knows: numbers and the rules they obey. Does not know: tensors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..errors import UsageError, nearest, require_at_least, require_one_of, require_types

SCHEDULES = ("parallel", "deferred")
_FORMER = {"told_rank": "next_token_rank", "start_rank": "init_rank"}  # names of fields in adapters that were saved before
_GONE = ("tree_floor",)  # measured costs stand in its place


@dataclass(frozen=True)
class DraftConfig:
    """How trees are drafted: any adapter can draft any of these ways, so a session may choose otherwise.

    Args:
        tree_nodes: most nodes of a draft tree, the root counted: the rows of a verification pass.
        tree_top_k: most children of one node.
        adaptive: draw the tree that fits what rows cost on this machine, and leave drafts out while they do not pay; else every
            tree has `tree_nodes` nodes.
        schedule: `parallel` verifies a tree and speculates from every node of it in one pass, as in
            the paper; `deferred` speculates after a path is accepted, from its last node only.
        recall: mix n-grams into the draft: what followed the same few tokens earlier in the text.
        pruning_floor: least probability, by the pruning layer's early exit, of a path whose nodes speculate in a parallel pass.
    """

    tree_nodes: int = 32
    tree_top_k: int = 8
    adaptive: bool = True
    schedule: str = "deferred"
    recall: bool = True
    pruning_floor: float = 0.01

    def __post_init__(self) -> None:
        require_types(self)
        require_at_least(1, self, "tree_nodes", "tree_top_k")
        if not 0 <= self.pruning_floor < 1:
            raise UsageError(f"pruning_floor must be at least 0 and below 1, got {self.pruning_floor}")
        require_one_of(SCHEDULES, "schedule", self.schedule)


@dataclass(frozen=True)
class AdapterConfig:
    """What has the shape of weights. The defaults are those of the demo model's adapter, but for `next_token_rank` (576 there, its width).

    Args:
        num_streams: gamma, the tokens drafted ahead of the certain one; also the depth of a tree.
        num_msa_layers: N_s, the top decoder layers in which stream rows exist.
        lora_rank: rank of the MSA adapters; their scale is 1.
        transition_rank: width of the recurrent transition head; 0 for none, as in the paper: then no stream knows the
            tokens of its path.
        init_rank: rank of what f adds to the main stream where streams start; 0: f is the identity.
        next_token_rank: rank of the map through which streams are told the token after theirs, when they start; 0: they are
            not. It takes the deferred schedule: in a parallel pass nobody knows that token yet.
        rotate_values: tell streams apart by rotating their values in attention, in place of stream embeddings.
        pruning_rank: rank of the pruning layer's early exit; 0 for none.
        draft_vocab_size: tokens that may be drafted, 0 for all of them. Costs coverage, never exactness.
        drafting: what it drafts with unless a session says otherwise.
    """

    num_streams: int = 5
    num_msa_layers: int = 8
    lora_rank: int = 48
    transition_rank: int = 768
    init_rank: int = 0
    next_token_rank: int = 512
    rotate_values: bool = False
    pruning_rank: int = 0
    draft_vocab_size: int = 16384
    drafting: DraftConfig = field(default_factory=DraftConfig)

    def __post_init__(self) -> None:
        require_types(self)
        require_at_least(1, self, "num_streams", "num_msa_layers", "lora_rank")
        require_at_least(0, self, "transition_rank", "init_rank", "next_token_rank", "pruning_rank", "draft_vocab_size")
        if self.next_token_rank and self.drafting.schedule == "parallel":
            raise UsageError(
                f"schedule must be deferred where streams are told the next token (next_token_rank={self.next_token_rank}), got 'parallel'"
            )

    def changed(self, **values: Any) -> AdapterConfig:
        """With other values of its fields, or of those of `drafting`, by their names alone."""
        names = {each.name for each in fields(DraftConfig)}
        drafting = replace(self.drafting, **{name: value for name, value in values.items() if name in names})
        return replace(self, drafting=drafting, **{name: value for name, value in values.items() if name not in names})

    def shape(self) -> dict[str, Any]:
        """All but `drafting`."""
        return {name: value for name, value in vars(self).items() if name != "drafting"}

    def to_dict(self) -> dict[str, Any]:
        """All fields of both, by their names alone."""
        return self.shape() | asdict(self.drafting)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AdapterConfig:
        """What `to_dict` gave, of this version or an earlier one. Raises UsageError for a field that none of them has."""
        values = {_FORMER.get(name, name): value for name, value in values.items() if name not in _GONE}
        known = cls().to_dict()
        if unknown := sorted(values.keys() - known.keys()):
            raise UsageError(f"an adapter's config has no field {', '.join(unknown)}{nearest(unknown[0], known)}")
        neutral = cls(next_token_rank=0, draft_vocab_size=0, drafting=DraftConfig(schedule="parallel"))  # what was not written was not there yet
        return neutral.changed(**values)
