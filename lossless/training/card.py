"""What a trained adapter is told about: its curve as a picture, and its model card.

Knows: the files of a training's folder and Markdown. Does not know: how any of the numbers came about.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..storage import read_jsonl

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # the hub refuses a card with any other name of a base
CURVE, CARD = "curve.png", "README.md"
_SMOOTHED = 0.05  # of all steps: a running mean over so many


def draw_curve(folder: Path) -> None:
    """`curve.jsonl` as a picture: loss on the left, acceptance of each stream on held-out answers on the right."""
    from matplotlib.figure import Figure  # takes half a second that most commands need not wait

    entries = read_jsonl(folder / "curve.jsonl")
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    learnt = [entry for entry in entries if "kl" in entry]  # what a training begins from has learnt nothing yet
    width = max(1, int(_SMOOTHED * len(learnt)))
    for j in range(len(learnt[-1]["kl"])):
        values = [entry["kl"][j] for entry in learnt]
        means = [sum(values[max(0, i + 1 - width) : i + 1]) / len(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]
        left.plot([entry["step"] for entry in learnt], means, label=f"stream {j + 1}")
    left.set(xlabel="step", ylabel=f"KL to the base (mean of {width} steps)", title="Loss")
    told = [entry for entry in entries if "acceptance_length" in entry]
    for j in range(len(told[-1]["reached"])):
        right.plot([e["step"] for e in told], [e["reached"][j] for e in told], marker=".")
    right.set(xlabel="step", ylabel="part of passes that accept its token", ylim=(0, 1), title="Acceptance, held-out answers")
    lengths = right.twinx()
    length = lengths.plot([e["step"] for e in told], [e["acceptance_length"] for e in told], color="black", marker="o")
    lengths.set(ylabel="acceptance length")
    streams, names = left.get_legend_handles_labels()
    figure.legend([*streams, *length], [*names, "acceptance length"], loc="outside lower center", ncols=len(names) + 1)
    figure.savefig(folder / CURVE, dpi=120)


def write_card(folder: Path, training: dict[str, Any], parity: dict[str, Any], certificate: dict[str, Any]) -> None:
    """`README.md`: what the adapter is for, what it was trained on, and what was measured."""
    data, streaming = training["data"], training["streaming"]
    total = training["trained_parameters"]
    rows = [f"| {part} | {count:,} |" for part, count in training["parameters_by_part"].items()]
    base = training["model"] if _HUB_ID.fullmatch(training["model"]) else None
    about = ModelCardData(library_name="lossless", base_model=base, tags=["speculative-decoding", "speculative-streaming"])
    text = f"""---
{about.to_yaml()}
---

# Streams for {training["model"]}

An adapter for *lossless* (Speculative Streaming, arXiv 2402.11131): the base model drafts several tokens at once
through it and checks them itself, so that its words stay its own. It is of use with this base only.

```python
import lossless

fast = lossless.accelerate(model, "this folder or hub id")
```

## Trained parameters

| part | parameters |
|---|---|
{chr(10).join(rows)}
| all | {total:,} ({100 * total / training["base_parameters"]:.2f} % of the base's {training["base_parameters"]:,}) |

{streaming["num_streams"]} streams in the top {streaming["num_msa_layers"]} layers, schedule `{streaming["schedule"]}`, draft
vocabulary {streaming["draft_vocab_size"] or "the base's own"}.

## Data

{training["answers"]:,} answers, {training["answer_tokens"]:,} tokens, all of them the base's own; temperatures
{", ".join(sorted({str(t) for part in data for t in part["config"]["temperatures"]}))}; {sum(part["config"]["self_drawn"] for part in data)} prompts drawn by the model itself.
{chr(10).join(_sources(data))}

The settings of both
commands and the versions are in `training.json`.

## Curve

![loss and acceptance]({CURVE})

Held-out acceptance length {training["acceptance_length"]:.3f} at step {training["best_step"]} of {training["steps_done"]}, trees of {streaming["tree_nodes"]}.

## Acceptance of the decode loop

Emitted tokens per pass of the base, greedy, on {parity["prompts"]} held-out prompts ({parity["tokens"]} tokens), trees of
{parity["tree_nodes"]}, without recall: **{parity["decoded"]:.2f}**, where {parity["foretold"]:.2f} was simulated for these texts and trees. Along the stored
answers, sampled ones among them, training saw {parity["trained"]:.2f} and the adapter as it was saved gives {parity["read_back"]:.2f}:
{"both pairs agree within 5 %" if parity["agrees"] else "**they do not agree**"}.

{_table("category", parity["by_category"])}

{_table("context, tokens", parity["by_context"])}

## Certificate

{certificate["tokens"]} tokens of {certificate["prompts"]} held-out prompts, {certificate["dtype"]}, {certificate["device"]}, guarantee
`{certificate["guarantee"]["exact"]}`: {certificate["mismatches"]} mismatches, {certificate["near_ties"]} near-ties,
{certificate["identical_prompts"]} of {certificate["prompts"]} answers identical. The whole of it is in `certificate.json`.
"""
    (folder / CARD).write_text(text, encoding="utf-8")


def _sources(data: list[dict[str, Any]]) -> list[str]:
    """Files by name and data sets by id: folders are nobody else's business."""
    asked = [part["prompts"] for part in data if part.get("prompts", {}).get("sources")]
    return [f"- {', '.join(Path(s).name if Path(s).is_absolute() else s for s in part['sources'])}: {part['count']:,} prompts" for part in asked]


def _table(name: str, groups: dict[str, dict[str, Any]]) -> str:
    rows = [f"| {key} | {g['prompts']} | {g['tokens']} | {g['acceptance_length']:.2f} |" for key, g in groups.items()]
    return "\n".join([f"| {name} | prompts | tokens | acceptance length |", "|---|---|---|---|", *rows])
