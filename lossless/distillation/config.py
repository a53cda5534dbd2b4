"""Which answers are collected from the base.

Knows: numbers and the rules they obey. Does not know: tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError, require_at_least, require_seed, require_types


@dataclass(frozen=True)
class DistillConfig:
    """What to ask of the base.

    Args:
        answer_tokens: stop after so many tokens of answers.
        max_new_tokens: tokens of one answer at most.
        max_prompt_tokens: longer prompts are skipped; a later turn of a conversation may be as much longer as its answers.
        max_turns: turns of a conversation at most.
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
