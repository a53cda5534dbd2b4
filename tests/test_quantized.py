"""4-bit and 8-bit bases, end to end: every command, and an adapter trained on the quantized base itself."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoTokenizer

from lossless.base.loading import differentiable, load_base
from lossless.cli.parser import main
from lossless.errors import UsageError

from .conftest import build_tiny


@pytest.fixture(scope="module")
def wide(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose projections are as wide as 4-bit kernels ask, and 12 prompts for it."""
    folder = tmp_path_factory.mktemp("wide")
    build_tiny(seed=5, hidden=64, inner=128, layers=3).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    prompts = "".join(json.dumps({"prompt": f"w{i} w{i + 1} w{2 * i}"}) + "\n" for i in range(12))
    (folder / "prompts.jsonl").write_text(prompts)
    return folder


# bitsandbytes converts 8-bit inputs to float16 and says so each time
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_every_command_on_a_quantized_base(
    wide: Path, tmp_path: Path, load_in: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "bitsandbytes")  # it tells of casts at every product
    base = ["--model", str(wide), "--load-in", load_in, "--dtype", "float32"]
    prompts = ["--prompts", str(wide / "prompts.jsonl")]
    answers, adapter, report = (str(tmp_path / name) for name in ("answers", "adapter", "report.json"))
    assert main(["distill", *base, *prompts, "--answer-tokens", "300", "--max-new-tokens", "30", "--out", answers]) == 0
    shape = ["--num-streams", "3", "--num-msa-layers", "2", "--lora-rank", "4", "--transition-rank", "8"]
    amount = ["--steps", "6", "--answers-per-step", "4", "--positions-per-answer", "8", "--held-out", "2"]
    assert main(["train", *base, "--data", answers, "--out", adapter, *shape, *amount]) == 0
    speaking = [*base, "--adapter", adapter, "--max-new-tokens", "16"]
    assert main(["doctor", *base, "--adapter", adapter]) == 0
    assert main(["generate", *speaking, "--prompt", "w3 w4"]) == 0
    for sampled in ([], ["--do-sample", "--temperature", "0.8", "--seed", "2"]):
        assert main(["compare", *speaking, *sampled, "--prompt", "w3 w4"]) == 0
        assert main(["bench", *speaking, *sampled, *prompts, "--limit", "2"]) == 0
        assert main(["verify", *speaking, *sampled, *prompts, "--limit", "2", "--json", report]) == 0
        found = json.loads(Path(report).read_text())
        assert (found["load_in"], found["mismatches"], found["identical_prompts"]) == (load_in, 0, 2)
    assert "exact" in capsys.readouterr().out


def test_gradients_flow_through_4_bit_projections(wide: Path) -> None:
    base = load_base(str(wide), "float32", "4bit")
    projection = base.model.model.layers[2].mlp.up_proj
    weight = dequantize_4bit(projection.weight.data, projection.weight.quant_state)  # [128, 64]
    rows, upstream = torch.randn(5, 64), torch.randn(5, 128)
    with differentiable(base.model):
        asked = rows.clone().requires_grad_(True)
        projection(asked).backward(upstream)
    assert asked.grad is not None
    torch.testing.assert_close(asked.grad, upstream @ weight, rtol=1e-3, atol=1e-3)
    assert not projection.training
    with torch.no_grad():
        projection(rows)
    if getattr(projection.weight.quant_state, "packing_format_for_cpu", False):  # not on every processor
        with pytest.raises(UsageError, match="load it anew to train on it"), differentiable(base.model):
            pass
