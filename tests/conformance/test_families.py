"""Every decoder-only family is served exactly, or refused at attach with a sentence that says why."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from lossless import pack
from lossless.adapter.weights import StreamAdapter

from ..conftest import prompt_ids
from ..test_batches import padded
from ..test_lossless import both
from .families import ALL, REQUIRED, WINDOW, build
from .judge import ALONE, SERVED, attach, check, judge, written

# Models of other people's making warn of their own matters (deprecated options, unused weights); what is asked
# here is only whether tokens agree.
pytestmark = pytest.mark.filterwarnings("ignore")


def digest(model: PreTrainedModel) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("family", REQUIRED)
def test_a_required_family_is_served_exactly(family: str, tmp_path: Path) -> None:
    model = build(family)
    before = digest(model)
    fast = attach(model)
    verdict = check(fast)
    assert verdict == (ALONE if family == "mpt" else SERVED)
    if told():
        assert is_told(family, verdict)
    fast.drafting = replace(fast.drafting, schedule="parallel")
    expected, found = both(fast, prompt_ids(2 * WINDOW, seed=2), seed=6, max_new_tokens=WINDOW, do_sample=True)
    assert torch.equal(expected, found)
    ids, mask = padded(7, 2 * WINDOW, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, found = both(fast, ids, attention_mask=mask, max_new_tokens=WINDOW)
    assert torch.equal(expected, found)
    assert len(set(expected[:, 2 * WINDOW :].flatten().tolist())) > 1  # a model that repeats itself proves little
    fast.adapter.save_pretrained(tmp_path)
    assert StreamAdapter.from_pretrained(tmp_path).projections() == fast.adapter.projections()
    assert digest(fast.detach()) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def told() -> bool:
    """Whether the README's table was written with the version that is installed."""
    return f"transformers {transformers.__version__}," in written()


def is_told(family: str, verdict: str) -> bool:
    """Whether the README's table says so of a family."""
    [line] = [line for line in written().splitlines() if line.startswith(f"| {verdict} |")]
    return family in line.split("|")[3].replace(",", " ").split()


@pytest.mark.parametrize("family", [family for family in ALL if family not in REQUIRED])
def test_the_table_in_the_readme_tells_the_truth(family: str) -> None:
    if not told():
        pytest.skip(f"the table was written with another version than {transformers.__version__}")
    assert is_told(family, judge(family))


@pytest.mark.parametrize("family", REQUIRED)
def test_a_packed_model_says_what_it_said_and_is_served_exactly(family: str) -> None:
    """Packing rounds otherwise; anything else would be another model."""
    model = build(family, wider=True)
    ids = torch.arange(1, 2 * WINDOW)[None]
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    before = model.generate(ids, **asked)
    packed = pack(model).generate(ids, **asked)
    assert torch.equal(before.sequences, packed.sequences)
    for plain, found in zip(before.logits, packed.logits, strict=True):
        assert (found - plain).abs().max() < 1e-3 * plain.std()
    check(attach(model))
