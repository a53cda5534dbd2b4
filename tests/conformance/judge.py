"""What becomes of a family: served, refused, or not to be tried; and the README's table of all of them.

`python -m tests.conformance.judge` tries every family and writes the table into the README beside it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import PreTrainedModel

from lossless.adapter.compat import new_adapter
from lossless.adapter.config import AdapterConfig, DraftConfig
from lossless.errors import UsageError
from lossless.generation.model import AcceleratedModel, accelerate

from ..conftest import prompt_ids
from ..test_batches import padded
from ..test_lossless import both
from .families import ALL, WINDOW, build

CONFIG = AdapterConfig(3, 2, lora_rank=4, transition_rank=8, next_token_rank=0, drafting=DraftConfig(tree_nodes=12, schedule="parallel"))
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- families: written by python -m tests.conformance.judge -->", "<!-- end of families -->"
SERVED, ALONE, BROKEN = "served", "served, batches by the base itself", "not tried: no tiny model of it runs here"
REFUSALS = {  # what a refusal says -> what the table says
    "running state": "refused: keeps a running state, which cannot be rolled back when a draft is rejected",
    "encoder-decoder": "refused: encoder-decoder",
    "no list of": "refused: its decoder layers do not stand in one list",
    "another width": "refused: its token embeddings are of another width than its hidden states",
    "than the model's own loop": "refused: behind a long text its own cache forgets what its attention would see, or the like",
    "gives other logits": "refused: a trial at attach gave other logits over a draft tree (its positions, for example, follow columns)",
    "hidden states of the shape": "refused: hidden states of its layers are not [batch, rows, width]",
    "a rule of its own": "refused: adds a position bias to attention scores by a rule of its own",
    "a tensor of their own": "refused: its layers take a tensor of their own for each text",
    "leaves no keys": "refused: leaves no keys in a cache for later passes to look back at",
    "over a draft tree ended in": "refused: a trial at attach ended in an error, its layers do not take the rows of a draft tree",
}
BUILDING = (StrictDataclassError, ImportError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, IndexError, AssertionError)


def attach(model: PreTrainedModel, schedule: str = "deferred") -> AcceleratedModel:
    return accelerate(model, new_adapter(model, CONFIG).randomize(2), schedule=schedule)


def runnable(family: str) -> PreTrainedModel | None:
    """A tiny model of the family, if one can be built that generates by itself."""
    try:
        model = build(family)
        ids = prompt_ids(4)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    except BUILDING:
        return None
    return model


def check(fast: AcceleratedModel) -> str:
    """Greedy and sampled, one text longer than any window and a batch of three: `SERVED` or `ALONE`."""
    batches = True
    for options in ({}, {"do_sample": True, "top_k": 0}):
        expected, found = both(fast, prompt_ids(2 * WINDOW, seed=1), seed=5, max_new_tokens=2 * WINDOW, **options)
        assert torch.equal(expected, found), options
        assert fast.stats.served
        ids, mask = padded(5, 2 * WINDOW, 9)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="not accelerated: a (batch|padded prompt) for a base")
            expected, found = both(fast, ids, seed=5, attention_mask=mask, max_new_tokens=WINDOW, **options)
        assert torch.equal(expected, found), (options, "batch")
        batches = batches and fast.stats.served
    return SERVED if batches else ALONE


def judge(family: str) -> str:
    """The family's line in the table. Raises AssertionError if what it gives is not the base's."""
    model = runnable(family)
    if model is None:
        return BROKEN
    try:
        fast = attach(model)
    except UsageError as refusal:
        return next(said for words, said in REFUSALS.items() if words in str(refusal))
    return check(fast)


def table(verdicts: dict[str, str]) -> str:
    """Markdown: one line for each verdict, its families behind it."""
    found = defaultdict(list)
    for family, verdict in verdicts.items():
        found[verdict].append(family)
    order = [SERVED, ALONE, *REFUSALS.values(), BROKEN]
    lines = [f"transformers {transformers.__version__}, {len(verdicts)} families:", "", "| | number | families |", "|---|---|---|"]
    lines += [f"| {verdict} | {len(found[verdict])} | {', '.join(found[verdict])} |" for verdict in order if verdict in found]
    return "\n".join(lines)


def written() -> str:
    """The table as the README has it."""
    return README.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    verdicts = {family: judge(family) for family in tqdm(ALL, unit="family")}
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n\n{table(verdicts)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
