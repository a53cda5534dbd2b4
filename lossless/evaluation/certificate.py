"""The certificate: every emitted token checked against the plain base, position by position.

Knows: how to teacher-force an answer through the base in the very steps of `model.generate`, how much the
base's own logits move when the same rows are read in other shapes, and when two tokens are closer than
that. Does not know: adapters, drafts, or how the answer came about.

    identical   the base's own choice at this position, in one-row steps
    near-tie    another token, but closer to that choice than the measured noise
    mismatch    anything else: a defect
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from ..base.layers import CACHE, as_decoding
from ..base.loading import Base
from ..distillation.prompts import Prompt
from ..errors import UsageError, require_types
from ..generation.model import AcceleratedModel
from ..storage import resumed
from .bench import settings, whose
from .timing import Decoding, encode_checked

_SHAPES = (2, 3, 4, 5, 8, 16, 32)  # rows of the passes that are compared with passes of one
_RIVALS = 8  # the noise is that of differences between a position's best tokens
_CONTEXT = 12  # tokens shown on either side of a divergence


@dataclass(frozen=True)
class Position:
    """What the base says about one emitted token.

    Attributes:
        emitted, chosen: token ids, ours and the base's own choice after the same text.
        gap: how far the emitted token is behind the chosen one, in units of (processed) logits; 0 if it is the same.
        lead: how far the base's choice is ahead of its next rival.
        same_bits: the logits that ours was chosen from are the base's own in every bit.
    """

    emitted: int
    chosen: int
    gap: float
    lead: float
    same_bits: bool


def force(
    base: Base, ids: torch.Tensor, answer: list[int], logits: Sequence[torch.Tensor], decoding: Decoding
) -> tuple[list[Position], float]:
    """The base's own choice at every position of an answer, read in one-row steps, as `model.generate` would.

    Returns:
        A judgement of each position, and the seconds that the passes after the first took.

    Args:
        ids: `[1, prompt]`; answer: emitted token ids, as they came; logits: `[1, vocab]` that each was chosen from.
    """
    found: list[Position] = []
    seconds: list[float] = []

    def steps(
        model: Any, input_ids: torch.Tensor, logits_processor: Any, generation_config: GenerationConfig, **_: Any
    ) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        fed = prompt = input_ids
        with contextlib.ExitStack() as behind_the_prompt:
            for token, ours in zip(answer, logits, strict=True):
                started = time.perf_counter()
                raw = model(fed, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits[:, -1]
                raw = raw.to(copy=True, dtype=torch.float32)
                raw.argmax().item()  # waits for a device that works on its own
                seconds.append(time.perf_counter() - started)
                if fed is prompt:
                    behind_the_prompt.enter_context(as_decoding(model))
                # a processor may write into what it is given
                scores = logits_processor(input_ids, raw.clone())
                found.append(_judge(raw, scores, token, ours, generation_config.do_sample))
                fed = torch.tensor([[token]], device=input_ids.device)
                input_ids = torch.cat([input_ids, fed], dim=1)
        return input_ids

    torch.manual_seed(decoding.seed)
    base.model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=steps, **decoding.arguments())
    return found, sum(seconds[1:])


def _judge(raw: torch.Tensor, scores: torch.Tensor, emitted: int, ours: torch.Tensor, do_sample: bool) -> Position:
    """One position; `raw` and `scores` are `[1, vocab]`, before and after the logits processors; `ours` as `raw`."""
    ranking = scores
    if do_sample:  # argmax(p / q), in logarithms: the draw of torch.multinomial
        probabilities = torch.softmax(scores, dim=-1)
        noise = torch.empty_like(probabilities).exponential_(1)
        chosen = int((probabilities / noise).argmax())
        ranking = scores - noise.log()
    else:
        chosen = int(scores.argmax())
    best = ranking[0].topk(2).values
    gap = 0.0
    if chosen != emitted:
        gap = float(ranking[0, chosen] - ranking[0, emitted])
        if scores[0, emitted] == -torch.inf:  # cut off by top-k or the like: how far outside it stood
            kept = scores[0] > -torch.inf
            gap = float((raw[0][kept].min() - raw[0, emitted]).clamp_min(0.0)) if kept.any() else torch.inf
    return Position(emitted, chosen, gap, float(best[0] - best[1]), torch.equal(raw, ours.to(raw)))


@torch.no_grad()
def measure_noise(base: Base, texts: list[list[int]], rows: int = 96) -> dict[str, Any]:
    """How much differences between the best tokens' logits move with the shape of a pass.

    The last `rows` positions of each text are read one at a time, and again 2, 3, ... 32 at a time.

    Returns:
        `max` and `median` absolute change over all positions, shapes and the best tokens of a position, in
        units of logits, how often the best token itself changed (`flips_per_1000`), and `positions`.
    """
    changes: list[float] = []
    flips = positions = 0
    for text in texts:
        start = max(1, len(text) - rows)
        one = _read(base, text, start, 1)  # [rows, vocab]
        rivals = one.topk(_RIVALS).indices
        behind = one.gather(1, rivals[:, :1]) - one.gather(1, rivals)
        for shape in _SHAPES:
            other = _read(base, text, start, shape)
            moved = other.gather(1, rivals[:, :1]) - other.gather(1, rivals) - behind
            changes += moved.abs().amax(dim=1).tolist()
            flips += int((other.argmax(-1) != rivals[:, 0]).sum())
            positions += len(one)
    return {
        "max": max(changes, default=0.0),
        "median": statistics.median(changes) if changes else 0.0,
        "flips_per_1000": round(1000 * flips / max(positions, 1), 3),
        "positions": positions,
    }


def _read(base: Base, text: list[int], start: int, shape: int) -> torch.Tensor:
    """Logits `[len(text) - start, vocab]` of the last rows, `shape` rows a pass; what lies before is read at once."""
    ids = torch.tensor([text], device=base.model.device)
    cache = DynamicCache(config=base.model.config)
    base.model(ids[:, :start], **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    found = [
        base.model(ids[:, i : i + shape], **{CACHE: cache}, use_cache=True).logits[0].float()
        for i in range(start, len(text), shape)
    ]
    return torch.cat(found)


@dataclass(frozen=True)
class Asked:
    """A prompt as token ids `[1, length]`, and what the certificate is to call it."""

    id: str
    category: str
    ids: torch.Tensor


def asked(base: Base, prompts: list[Prompt], decoding: Decoding) -> list[Asked]:
    """Prompts in the model's own tokens; raises UsageError if one and its answer would not fit."""
    encoded = encode_checked(base, prompts, decoding)
    return [Asked(prompt.id, prompt.category, ids) for prompt, ids in zip(prompts, encoded, strict=True)]


def certify(
    base: Base,
    fast: AcceleratedModel,
    name: str,
    prompts: list[Asked],
    decoding: Decoding,
    load_in: str | None,
    journal: Path | None = None,
) -> dict[str, Any]:
    """Generate, teacher-force, and judge every position of every answer.

    Args:
        journal: a file that keeps each answer as it is judged; a later call with the same one goes on after them.

    Returns:
        The certificate, ready for JSON: totals, the noise, the worst position, and one entry for each prompt.

    Raises:
        UsageError: the journal is another certificate's.
    """
    encoded = [prompt.ids for prompt in prompts]
    header = settings(base, fast, name, load_in, decoding)
    checked = _check_all(base, fast, encoded, decoding, header, journal)
    texts = [ids[0].tolist() + answer.tokens() for ids, answer in zip(encoded, checked, strict=True)]
    noise = measure_noise(base, texts[: max(4, len(texts) // 16)])
    scale = 1 / decoding.temperature if decoding.do_sample else 1.0  # a temperature magnifies logits, and their noise
    limit = noise["max"] * scale
    entries = [_entry(base, prompt, answer.positions, limit) for prompt, answer in zip(prompts, checked, strict=True)]
    positions = [position for answer in checked for position in answer.positions]
    ratios = [answer.speedup for answer in checked if answer.speedup]
    return header | {
        "prompts": len(prompts),
        "tokens": len(positions),
        "speedup": round(statistics.median(ratios), 4) if ratios else 1.0,
        "same_bits": sum(position.same_bits for position in positions),
        "identical_prompts": sum(entry["near_ties"] + entry["mismatches"] == 0 for entry in entries),
        "near_ties": sum(entry["near_ties"] for entry in entries),
        "mismatches": sum(entry["mismatches"] for entry in entries),
        "noise": noise | {"limit": limit},
        "worst": max((position.gap for position in positions), default=0.0),
        "runs": entries,
    }


@dataclass(frozen=True)
class Checked:
    """One answer, judged; `speedup` is the ratio of plain passes to accelerated decoding, None for a single token."""

    positions: list[Position]
    speedup: float | None

    @classmethod
    def of(cls, line: dict[str, Any], vocabulary: int) -> Checked:
        """A line of the journal; raises UsageError if it is none, or holds a token that so many do not have."""
        try:
            positions, speedup = [Position(*position) for position in line["positions"]], line["speedup"]
            for position in positions:
                require_types(position)
                if not (0 <= position.emitted < vocabulary and 0 <= position.chosen < vocabulary):
                    raise ValueError(f"tokens must be at least 0 and below {vocabulary}, got {position.emitted} and {position.chosen}")
            return cls(positions, None if speedup is None else float(speedup))
        except (KeyError, ValueError, TypeError) as error:
            raise UsageError(f"a line of the journal is broken ({type(error).__name__}: {error}): remove the journal, and begin anew") from error

    def tokens(self) -> list[int]:
        return [position.emitted for position in self.positions]


def _check_all(
    base: Base, fast: AcceleratedModel, encoded: list[torch.Tensor], decoding: Decoding, header: dict[str, Any], journal: Path | None
) -> list[Checked]:
    """Every answer, those of the journal first."""
    with resumed(journal, whose("verify", header, fast, encoded)) as (kept, write), tqdm(total=len(encoded), unit="prompt", desc="verify") as bar:
        found = [Checked.of(line, base.vocabulary) for line in kept]
        bar.update(len(found))
        for ids in encoded[len(found) :]:
            found.append(_check(base, fast, ids, decoding))
            write({"positions": [astuple(position) for position in found[-1].positions], "speedup": found[-1].speedup})
            bar.update()
    return found


def _check(base: Base, fast: AcceleratedModel, ids: torch.Tensor, decoding: Decoding) -> Checked:
    torch.manual_seed(decoding.seed)
    options = decoding.arguments() | {"return_dict_in_generate": True, "output_logits": True}
    out = fast.generate(ids, attention_mask=torch.ones_like(ids), **options)
    answer = out.sequences[0, ids.shape[1] :].tolist()
    positions, plain_s = force(base, ids, answer, out.logits, decoding)
    return Checked(positions, plain_s / fast.stats.decode_s if len(answer) > 1 else None)


def _entry(base: Base, prompt: Asked, positions: list[Position], limit: float) -> dict[str, Any]:
    other = [i for i, position in enumerate(positions) if position.chosen != position.emitted]
    entry: dict[str, Any] = {
        "id": prompt.id,
        "category": prompt.category,
        "tokens": len(positions),
        "near_ties": sum(positions[i].gap <= limit for i in other),
        "mismatches": sum(not positions[i].gap <= limit for i in other),
    }
    if other:
        first = other[0]
        ours = [position.emitted for position in positions]
        decode = base.tokenizer.decode
        entry["first"] = {
            "token": first,
            "gap": positions[first].gap,
            "before": decode(ours[max(0, first - _CONTEXT) : first]),
            "emitted": decode(ours[first : first + 1]),
            "chosen": decode([positions[first].chosen]),
        }
    return entry


def summary(found: dict[str, Any]) -> str:
    """A certificate to read: the verdict, the noise, and the first divergences in context."""
    lines = [
        f"{found['tokens']} tokens of {found['prompts']} answers checked one by one against the plain base "
        f"({found['dtype']}{' ' + found['load_in'] if found['load_in'] else ''}, {found['device']})",
        f"identical answers   {found['identical_prompts']} of {found['prompts']}",
        f"near-ties           {found['near_ties']}  (within {found['noise']['limit']:.2g}, the base's own noise between shapes)",
        f"mismatches          {found['mismatches']}",
        f"same in every bit   the logits of {found['same_bits']} tokens",
        f"guaranteed          {found['guarantee']['exact']}",
        f"speed               {found['speedup']:.2f} times that of plain one-row passes",
    ]
    for entry in [entry for entry in found["runs"] if "first" in entry][:5]:
        first = entry["first"]
        kind = "mismatch" if entry["mismatches"] else "near-tie"
        lines += [
            f"\n{entry['id']}, token {first['token']} ({kind}, {first['gap']:.2g} behind):",
            f"  ...{first['before']!r}  emitted {first['emitted']!r}, the base's choice is {first['chosen']!r}",
        ]
    return "\n".join(lines)
