"""What each part of the method is worth: the same data and steps, one thing changed at a time.

Knows: which variants are compared, and how drafters of other papers would be counted on the same base. Does not know:
how any of them is trained or measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..adapter.config import AdapterConfig
from ..base.layers import decoder_layers, features, is_projection
from ..base.loading import Base
from ..base.processes import processes
from ..errors import NotOfThisBase, UsageError
from ..storage import read_json, versions, write_json
from .checkpoints import differing
from .config import TrainConfig
from .sampler import read_answers
from .trainer import Kept, train


@dataclass(frozen=True)
class Variant:
    """A name, what it changes in the adapter and in the training, and the part of the answers that it sees."""

    name: str
    shape: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    data_fraction: float = 1.0


_PAPER = {
    "transition_rank": 0, "init_rank": 0, "next_token_rank": 0, "pruning_rank": 0, "rotate_values": False, "schedule": "parallel"
}  # fmt: skip
_CENTRE = "paper + transition"  # what the rest is compared with
VARIANTS = (
    Variant("paper", _PAPER),
    Variant("paper, values rotated", _PAPER | {"rotate_values": True}),
    Variant("paper, f of rank 32", _PAPER | {"init_rank": 32}),
    Variant("paper + pruning layer", _PAPER | {"pruning_rank": 16}),
    Variant("paper + next token told", _PAPER | {"next_token_rank": 32, "schedule": "deferred"}),
    Variant(_CENTRE),
    Variant("paper + both", {"next_token_rank": 32, "schedule": "deferred"}),
    Variant("2 streams", {"num_streams": 2}),
    Variant("6 streams", {"num_streams": 6}),
    Variant("2 MSA layers", {"num_msa_layers": 2}),
    Variant("8 MSA layers", {"num_msa_layers": 8}),
    Variant("LoRA rank 8", {"lora_rank": 8}),
    Variant("LoRA rank 128", {"lora_rank": 128}),
    Variant("transition rank 128", {"transition_rank": 128}),
    Variant("values rotated", {"rotate_values": True}),
    Variant("hard labels", training={"hard_labels": True}),
    Variant("draft vocabulary 4096", {"draft_vocab_size": 4096}),
    Variant("draft vocabulary of all", {"draft_vocab_size": 0}),
    Variant("half of the answers", data_fraction=0.5),
    Variant("an eighth of the answers", data_fraction=0.125),
)


def ablate(
    base: Base, data: Sequence[str | Path], out: str | Path, shape: AdapterConfig, config: TrainConfig, only: list[str] | None = None
) -> dict[str, Any]:
    """Train every variant in a folder of its own under `out`; what is done already is not done again.

    Raises:
        UsageError: `out` holds rows of another model, other answers or other settings.

    Returns:
        The report that is also written to `out/ablation.json`, and as a table to `out/ablation.md`.
    """
    out = Path(out)
    head = {
        "model": base.name,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "streaming": shape.to_dict(),
        "train": asdict(config),
        "answers": read_answers(base, [Path(folder) for folder in data])[0].digest(),
    }
    before = _report(out)
    if before and (other := differing({key: before.get(key) for key in head}, head)):
        raise UsageError(f"{out} holds an ablation of another kind ({', '.join(other)}): rows of one table must be of one kind, use another folder")
    rows = {row["name"]: row for row in before.get("variants", [])}
    report: dict[str, Any] = {}
    kept: Kept = {}  # no variant changes the base, nor the order of the answers
    for variant in VARIANTS:
        if only and variant.name not in only:
            continue
        if processes().is_main_process:
            print(f"\n{variant.name}", flush=True)
        rows[variant.name] = _row(base, data, out, variant, shape, config, kept)
        report = head | {
            "device": str(base.model.device),
            "versions": versions(),
            "variants": [rows[v.name] for v in VARIANTS if v.name in rows],
            "others": _others(base, shape),
        }
        if processes().is_main_process:
            write_json(out / "ablation.json", report)
            (out / "ablation.md").write_text(table(report) + "\n", encoding="utf-8")
    return report


def _report(out: Path) -> dict[str, Any]:
    """What was written before."""
    path = out / "ablation.json"
    found = read_json(path) if path.is_file() else {}
    rows = found.get("variants", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(row.get("name"), str) for row in rows):
        raise UsageError(f"{path} is broken: each of its variants must have a name; use another folder, or remove it and train them anew")
    return found


def _row(
    base: Base,
    data: Sequence[str | Path],
    out: Path,
    variant: Variant,
    shape: AdapterConfig,
    config: TrainConfig,
    kept: Kept,
) -> dict[str, Any]:
    """One variant, trained; or why this base cannot have it."""
    folder = out / variant.name.replace(" ", "-").replace(",", "")
    try:
        own = shape.changed(**variant.shape)
        _, _, summary = train(base, data, folder, own, replace(config, **variant.training, data_fraction=config.data_fraction * variant.data_fraction), kept)
    except NotOfThisBase as error:
        return {"name": variant.name, "refused": str(error)}
    told = ("acceptance_length", "trained_parameters", "parameters_by_part", "answer_tokens")
    return {"name": variant.name} | {key: summary[key] for key in told}


def _others(base: Base, shape: AdapterConfig) -> dict[str, int]:
    """Trained parameters of other drafters for this base, by the shapes that their papers give.

    Medusa: for each token ahead a residual layer (d d + d) and an LM head (d V). EAGLE: one decoder layer of the base's
    own shape and a map from 2 d to d. The paper of this method counts its stream embeddings (gamma d) and no LoRA.
    """
    config, gamma = base.model.config.get_text_config(), shape.num_streams
    dim, vocabulary = config.hidden_size, config.vocab_size
    modules = [module for module in decoder_layers(base.model)[0].modules() if is_projection(module)]
    matrices = sum(features(module)[0] * features(module)[1] for module in modules)  # quantized weights are packed
    inside = {id(module.weight) for module in modules}
    layer = matrices + sum(p.numel() for p in decoder_layers(base.model)[0].parameters() if id(p) not in inside)
    return {
        f"Medusa, {gamma} heads": gamma * (dim * dim + dim + dim * vocabulary),
        "EAGLE": layer + 2 * dim * dim + dim,
        f"Speculative Streaming as its paper counts, {gamma} streams": gamma * dim,
    }


def table(report: dict[str, Any]) -> str:
    """A report as Markdown."""
    centre = next((row.get("acceptance_length") for row in report["variants"] if row["name"] == _CENTRE), None)
    lines = ["| variant | trained parameters | answer tokens | acceptance length | against the centre |", "|---|---|---|---|---|"]
    for row in report["variants"]:
        if "refused" in row:
            lines.append(f"| {row['name']} | - | - | not for this base | - |")
            continue
        against = f"{row['acceptance_length'] - centre:+.2f}" if centre else "-"
        lines.append(
            f"| {row['name']} | {row['trained_parameters']:,} | {row['answer_tokens']:,} | {row['acceptance_length']:.2f} | {against} |"
        )
    lines += [f"| *{name}* | {count:,} | - | - | - |" for name, count in report["others"].items()]
    return "\n".join(lines)
