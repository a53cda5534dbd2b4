"""A short training run lowers the loss and raises acceptance; an interrupted one goes on."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import tracking
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import DistributedType
from torch.nn import functional as F

from lossless.adapter.compat import new_adapter
from lossless.adapter.weights import StreamAdapter
from lossless.base import processes as process_module
from lossless.base.loading import Base, freeze
from lossless.distillation.answers import Answers, AnswerWriter
from lossless.distillation.config import DistillConfig
from lossless.distillation.distill import distill
from lossless.distillation.prompts import from_text
from lossless.drafting.drafter import Drafter
from lossless.errors import UsageError
from lossless.evaluation.parity import check_parity
from lossless.generation.loop import DecodeLoop
from lossless.generation.model import AcceleratedModel, accelerate
from lossless.storage import read_json, read_jsonl, write_json
from lossless.streams.cache import RowCache
from lossless.streams.passes import logit_scale
from lossless.streams.runner import StreamRunner
from lossless.training import features, simulation
from lossless.training import trainer as module
from lossless.training.ablation import ablate
from lossless.training.card import draw_curve
from lossless.training.checkpoints import differing
from lossless.training.config import TrainConfig
from lossless.training.features import FeatureStore, make_batch
from lossless.training.loss import StreamLoss, _Divergence
from lossless.training.sampler import Order, block, draft_vocabulary, read_answers, split
from lossless.training.simulation import AcceptanceEstimate
from lossless.training.trainer import train

from .conftest import build_tiny, prompt_ids, tiny_config
from .test_distill import Words

TRAINING = TrainConfig(
    steps=150, answers_per_step=8, positions_per_answer=16, learning_rate=1e-2, held_out=8, eval_every=50, checkpoint_every=25
)


def answer(prompt_ids: list[int], answer_ids: list[int]) -> dict[str, Any]:
    return {"id": "x", "category": "", "turn": 0, "temperature": 0.0, "prompt_ids": prompt_ids, "answer_ids": answer_ids}


def counting_text(rng: torch.Generator, length: int) -> list[int]:
    """x, x+k, x+2k, ... over 40 tokens, k shown by the first token: easy to learn, impossible to guess blindly."""
    step = int(torch.randint(1, 4, (1,), generator=rng))
    start = int(torch.randint(0, 40, (1,), generator=rng))
    return [step, *(10 + (start + step * i) % 40 for i in range(length - 1))]


@pytest.fixture(scope="module")
def taught() -> Base:
    """A tiny base that has learnt to count, so that its own text can be foretold."""
    model = build_tiny(seed=0).train().requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.3)
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        ids = torch.tensor([counting_text(rng, 24) for _ in range(16)])
        logits = model(ids).logits
        loss = F.cross_entropy(logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    assert loss.item() < 0.5
    return Base(freeze(model), Words(), "taught")


@pytest.fixture(scope="module")
def answers(taught: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, folder = torch.Generator().manual_seed(1), tmp_path_factory.mktemp("answers")
    prompts = [from_text(" ".join(map(str, counting_text(rng, 2 + i % 4))), f"p{i}") for i in range(120)]
    distill(taught, prompts, DistillConfig(answer_tokens=4000, max_new_tokens=30, batch_size=16), folder)
    return folder


def test_training_lowers_the_loss_and_raises_acceptance(taught: Base, answers: Path, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in taught.model.state_dict().items()}
    streaming = tiny_config(lora_rank=8, transition_rank=32, draft_vocab_size=50)
    _, _, summary = train(taught, [answers], tmp_path, streaming, TRAINING)

    for name, tensor in taught.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    curve = read_jsonl(tmp_path / "curve.jsonl")
    assert [entry["step"] for entry in curve] == list(range(1, 151))
    assert sum(e["loss"] for e in curve[-10:]) < 0.5 * sum(e["loss"] for e in curve[:10])
    foretold = [entry["acceptance_length"] for entry in curve if "acceptance_length" in entry]
    assert len(foretold) == 3
    assert summary["acceptance_length"] == max(foretold)
    assert summary["best_step"] == 50 * (1 + foretold.index(max(foretold)))
    reached = [entry["reached"] for entry in curve if "reached" in entry][-1]
    assert 1 >= reached[0] >= reached[1] >= reached[2] >= reached[3] > 0

    ids = torch.tensor([[2, 11, 13]])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 41, "do_sample": False}
    lengths = []
    for adapter in (new_adapter(taught.model, streaming_without_vocabulary(streaming)), tmp_path):
        fast = accelerate(taught.model, adapter)
        assert torch.equal(fast.generate(ids, **options), taught.model.generate(ids, **options))
        lengths.append(fast.stats.acceptance_length)
    assert lengths[1] > lengths[0] + 0.5
    assert lengths[1] > 2


def streaming_without_vocabulary(streaming: Any) -> Any:
    return tiny_config(lora_rank=streaming.lora_rank, transition_rank=streaming.transition_rank)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    taught: Base, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(steps=30, answers_per_step=4, positions_per_answer=8, held_out=4, eval_every=30, checkpoint_every=7)
    train(taught, [answers], tmp_path / "whole", tiny_config(), config)

    real, calls = module.block, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 18:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(taught, [answers], tmp_path / "cut", tiny_config(), config)
    assert not (tmp_path / "cut" / "adapter.safetensors").exists()
    monkeypatch.setattr(module, "block", real)
    train(taught, [answers], tmp_path / "cut", tiny_config(), config)

    whole, cut = (StreamAdapter.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[name], tensor, rtol=0, atol=1e-3)
    assert [e["step"] for e in read_jsonl(tmp_path / "cut" / "curve.jsonl")] == list(range(1, 31))
    with pytest.raises(UsageError, match=r"checkpoint of another training \(lora_rank\)"):
        train(taught, [answers], tmp_path / "cut", tiny_config(lora_rank=5), config)


def test_logits_in_pieces_are_the_same_loss(taught: Base, answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = new_adapter(taught.model, tiny_config()).randomize(0)
    runner = StreamRunner(taught.model, adapter)
    drafter = Drafter(adapter, taught.model.get_input_embeddings(), taught.model.get_output_embeddings())
    seen: list[int] = []
    real = Drafter.logits

    def noted(self: Drafter, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.numel() // hidden.shape[-1])
        return real(self, hidden)

    monkeypatch.setattr(Drafter, "logits", noted)
    found = []
    features = FeatureStore(runner, Answers.read(answers), memory_gb=1).get([0, 1, 2, 3])
    block = make_batch(features, [f.prompt - 1 for f in features], 12, 4, runner.first_top, torch.float32)
    for gigabytes in (1.0, 1e-9):
        seen.clear()
        loss, each, agreement = StreamLoss(runner, drafter, gigabytes)(block)
        adapter.zero_grad()
        loss.backward()
        found.append((loss.detach(), each, agreement, *(p.grad.clone() for p in adapter.parameters() if p.grad is not None)))
        most = max(seen)
    assert most == 12 + 3  # one answer at a time: its positions, and the targets beyond them
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=1e-5)


def test_the_loss_and_its_gradient_are_those_of_torch() -> None:
    """The gradient that is taken piece by piece, beside autograd through all logits at once."""
    torch.manual_seed(0)
    head, drafting = torch.randn(20, 8, dtype=torch.double), torch.randn(5, 4, 3, 8, dtype=torch.double, requires_grad=True)
    final, valid = torch.randn(5, 6, 8, dtype=torch.double), torch.rand(5, 4, 3) < 0.7
    weights = torch.tensor([1.0, 0.5, 0.25])

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ head.T

    targets = torch.stack([logits(final)[:, j : j + 4] for j in range(3)], dim=2)
    for hard in (False, True):
        if hard:
            each = F.cross_entropy(logits(drafting).flatten(0, 2), targets.argmax(-1).flatten(), reduction="none").view(5, 4, 3)
        else:
            each = F.kl_div(logits(drafting).log_softmax(-1), targets.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        whole = (each * valid).sum((0, 1))
        (theirs,) = torch.autograd.grad((whole * weights).sum(), drafting)
        found = _Divergence.apply(drafting, final, valid, logits, 2, hard)
        (ours,) = torch.autograd.grad((found[0] * weights).sum(), drafting)
        torch.testing.assert_close(found[0].double(), whole.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
        assert torch.equal(found[1], ((logits(drafting).argmax(-1) == targets.argmax(-1)) & valid).sum((0, 1)))


def test_accumulated_steps_are_steps_of_larger_batches(
    taught: Base, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of a step of two visits is the mean of theirs."""
    config = TrainConfig(steps=1, answers_per_step=4, positions_per_answer=8, gradient_accumulation=2, held_out=4, max_grad_norm=1e9)
    seen: list[list[Any]] = []
    real = torch.optim.AdamW.step

    def noted(self: Any, *args: Any) -> Any:
        parameters = self.param_groups[0]["params"]
        seen.append([None if p.grad is None else p.grad.clone() for p in parameters])
        return real(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    train(taught, [answers], tmp_path, tiny_config(), config)
    assert len(seen) == 1
    _, rest = split(read_answers(taught, [answers])[0], config)
    torch.manual_seed(config.seed)
    adapter = new_adapter(taught.model, tiny_config())
    runner = StreamRunner(taught.model, adapter)
    drafter = Drafter(adapter, taught.model.get_input_embeddings(), taught.model.get_output_embeddings(), logit_scale(runner))
    order = Order(rest, config)
    store = FeatureStore(runner, rest, memory_gb=1)
    for part in range(2):
        visit = order.visit(part)
        visited = block(store.get([number for number, _ in visit.stretches]), visit, config, 4, runner)
        (StreamLoss(runner, drafter, 1.0)(visited)[0] / 2).backward()
    for ours, theirs in zip(seen[0], adapter.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-3, atol=1e-6)


@pytest.fixture
def afresh() -> Iterator[None]:
    """Accelerate settles its precision once in a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("how", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_configuration_that_shards_trains_plainly_and_says_so(
    taught: Base, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{how}", "true")
    train(taught, [answers], tmp_path, tiny_config(), replace(TRAINING, steps=1, eval_every=1))
    assert capsys.readouterr().out.count(f"{how} of Accelerate's configuration is not used: nothing is sharded") == 1


@pytest.mark.usefixtures("afresh")
def test_an_accelerator_that_shards_already_is_refused(
    taught: Base, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UsageError, match="FSDP shards the weights that are trained"):
        train(taught, [answers], tmp_path, tiny_config(), TRAINING)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"tracker": "trackless"}, "Accelerate refuses these settings: .*trackless"),
        ({"tracker": "clearml"}, "tracker 'clearml' is not installed here"),
        ({"mixed_precision": "fp4"}, "mixed_precision must be one of no, bf16, fp16"),
        ({"data_fraction": 0.0}, "data_fraction must be above 0"),
        ({"patience": -1}, "patience must be at least 0"),
        ({"logits_memory_gb": 0.0}, "logits_memory_gb must be above 0"),
    ],
)
def test_settings_that_cannot_be_had_are_told(taught: Base, answers: Path, tmp_path: Path, change: dict[str, Any], rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        train(taught, [answers], tmp_path, tiny_config(), TrainConfig(steps=2, answers_per_step=4, held_out=4, **change))


@pytest.mark.usefixtures("afresh")
def test_mixed_precision_learns_too(taught: Base, answers: Path, tmp_path: Path) -> None:
    config = TrainConfig(steps=40, answers_per_step=8, positions_per_answer=16, learning_rate=1e-2, held_out=4, mixed_precision="bf16")
    train(taught, [answers], tmp_path, tiny_config(), config)
    curve = [entry["loss"] for entry in read_jsonl(tmp_path / "curve.jsonl")]
    assert sum(curve[-5:]) < 0.7 * sum(curve[:5])


def test_training_stops_when_nothing_gets_better_and_keeps_the_best(
    taught: Base, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = iter([2.0, 3.0, 2.5, 2.9, 4.0])
    kept: list[dict[str, torch.Tensor]] = []

    def told(runner: StreamRunner, *_: Any) -> AcceptanceEstimate:
        kept.append({name: tensor.clone() for name, tensor in runner.adapter.state_dict().items()})
        return AcceptanceEstimate(next(lengths), [0.5] * 4)

    monkeypatch.setattr(module, "_evaluate", told)
    config = TrainConfig(steps=30, answers_per_step=4, positions_per_answer=8, held_out=4, eval_every=3, patience=2)
    adapter, _, summary = train(taught, [answers], tmp_path, tiny_config(), config)
    assert (summary["steps_done"], summary["best_step"], summary["acceptance_length"]) == (12, 6, 3.0)
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, kept[1][name].half().to(tensor.dtype) if tensor.is_floating_point() else kept[1][name])
    again, _, _ = train(taught, [answers], tmp_path, tiny_config(), config)  # it is over, and stays so
    assert torch.equal(again.stream_embeddings, adapter.stream_embeddings)


def test_the_decode_loop_accepts_what_training_foretold(taught: Base, answers: Path, tmp_path: Path) -> None:
    config = TrainConfig(steps=30, answers_per_step=8, positions_per_answer=16, learning_rate=1e-2, held_out=12, eval_every=30)
    adapter, held_out, summary = train(taught, [answers], tmp_path, tiny_config(), config)
    parity = check_parity(taught, adapter, held_out, 1.0, summary["acceptance_length"])
    assert parity["read_back"] == pytest.approx(parity["trained"], rel=0.05)
    assert parity["decoded"] > 1.2
    assert parity["agrees"]
    assert parity["difference"] <= 0.05
    assert sum(group["prompts"] for group in parity["by_category"].values()) == 12
    assert list(parity["by_context"]) == ["up to 128"]


def test_a_loop_that_drafts_otherwise_is_found_out(
    taught: Base, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(steps=60, answers_per_step=8, positions_per_answer=16, learning_rate=1e-2, held_out=12, eval_every=60)
    adapter, held_out, summary = train(taught, [answers], tmp_path, tiny_config(), config)
    other = new_adapter(taught.model, tiny_config())  # saved in place of the trained one, say
    assert not check_parity(taught, other, held_out, 1.0, summary["acceptance_length"])["agrees"]
    real = DecodeLoop._go_on

    def muddled(self: DecodeLoop, *args: Any) -> Any:
        texts, streams = real(self, *args)
        return texts, None if streams is None else streams.flip(-1)

    monkeypatch.setattr(DecodeLoop, "_go_on", muddled)
    parity = check_parity(taught, adapter, held_out, 1.0, summary["acceptance_length"])
    assert not parity["agrees"]
    assert parity["decoded"] < 0.9 * parity["foretold"]


@pytest.mark.usefixtures("float_drafts")
def test_walks_along_answers_are_the_same_however_they_are_made(taught: Base, answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of positions at a time, several answers at a time, each process its part."""
    adapter = new_adapter(taught.model, tiny_config()).randomize(3, scale=0.1)
    fast, counts = AcceleratedModel(taught.model, adapter, "off"), []
    real = simulation.make_batch
    monkeypatch.setattr(simulation, "make_batch", lambda *given: counts.append(given[2]) or real(*given))
    store = FeatureStore(fast.runner, Answers.read(answers).select(range(10)), memory_gb=1)
    found = [simulation.simulate_acceptance(fast.runner, fast.drafter, store, 8)]
    monkeypatch.setattr(simulation, "_RUN", 7)
    monkeypatch.setattr(simulation, "_TOGETHER", 1)
    counts.clear()
    found.append(simulation.simulate_acceptance(fast.runner, fast.drafter, store, 8))
    assert max(counts) == 7
    monkeypatch.setattr(simulation, "_TOGETHER", 2)
    parts = [simulation.simulate_acceptance(fast.runner, fast.drafter, store, 8, process, 3) for process in range(3)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], sum(parts))
    tokens, passes, *reached = found[0].tolist()
    assert tokens == sum(length - 1 for length in store.answers.lengths("answer_ids"))  # the first is certain
    assert tokens == passes + sum(reached)
    assert AcceptanceEstimate.of(found[0]).acceptance_length == round(tokens / passes, 3) > 1


def test_a_pruning_layer_learns_nothing_from_a_block_of_one_position(taught: Base, answers: Path) -> None:
    adapter = new_adapter(taught.model, tiny_config(pruning_rank=4)).randomize(0)
    runner = StreamRunner(taught.model, adapter)
    drafter = Drafter(adapter, taught.model.get_input_embeddings(), taught.model.get_output_embeddings())
    features = FeatureStore(runner, Answers.read(answers), memory_gb=1).get([0, 1])
    for count, learns in ((1, False), (2, True)):
        found = make_batch(features, [f.prompt - 1 for f in features], count, 4, runner.first_top, torch.float32)
        adapter.zero_grad()
        StreamLoss(runner, drafter, 1.0)(found)[0].backward()
        gradients = [parameter.grad for parameter in adapter.pruning.parameters()]
        assert all(gradient is not None for gradient in gradients), "processes wait for each other's gradients"
        assert any(gradient.abs().max() > 0 for gradient in gradients) == learns


@pytest.mark.parametrize("damage", [{"step": -1}, {"step": -(2**70)}, {"step": 5}, {"best_step": 4}, {"worse": -1}, {"stopped": "no"}])
def test_a_checkpoint_whose_steps_cannot_be_is_not_gone_on_from(taught: Base, answers: Path, tmp_path: Path, damage: dict[str, Any]) -> None:
    config = TrainConfig(steps=3, answers_per_step=4, positions_per_answer=8, held_out=4, eval_every=3, checkpoint_every=3)
    train(taught, [answers], tmp_path, tiny_config(), config)
    progress = tmp_path / "checkpoint-000003" / "progress.json"
    written = read_json(progress)
    write_json(progress, written | {"progress": written["progress"] | damage})
    with pytest.raises(UsageError, match=r"the checkpoint .*checkpoint-000003 is broken \(.*\): remove it"):
        train(taught, [answers], tmp_path, tiny_config(), config)


def test_an_interrupted_evaluation_is_made_again(
    taught: Base, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(steps=6, answers_per_step=4, positions_per_answer=8, held_out=4, eval_every=6, checkpoint_every=3)
    real = module._evaluate

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(taught, [answers], tmp_path, tiny_config(), config)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000003"]
    monkeypatch.setattr(module, "_evaluate", real)
    _, _, summary = train(taught, [answers], tmp_path, tiny_config(), config)
    assert (summary["steps_done"], summary["best_step"]) == (6, 6)
    assert [e["step"] for e in read_jsonl(tmp_path / "curve.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_other_answers_are_another_training(taught: Base, answers: Path, tmp_path: Path) -> None:
    config = TrainConfig(steps=2, answers_per_step=4, positions_per_answer=8, held_out=4, checkpoint_every=1)
    shutil.copytree(answers, tmp_path / "answers")
    train(taught, [tmp_path / "answers"], tmp_path / "out", tiny_config(), config)
    train(taught, [tmp_path / "answers"], tmp_path / "out", tiny_config(), replace(config, feature_memory_gb=0.1))
    with AnswerWriter(tmp_path / "answers", 7, {}) as writer:
        writer.write(answer([11], [12, 13, 14]) | {"id": "99/0:more"})
    joined, _ = read_answers(taught, [answers, tmp_path / "answers"])
    assert len(joined) == 2 * len(read_answers(taught, [answers])[0]) + 1
    with pytest.raises(UsageError, match=r"checkpoint of another training \(answers\)"):
        train(taught, [tmp_path / "answers"], tmp_path / "out", tiny_config(), config)
    stored = Answers.read(answers)
    shutil.rmtree(tmp_path / "answers")
    shutil.copytree(answers, tmp_path / "answers", ignore=shutil.ignore_patterns("*.arrow"))
    with AnswerWriter(tmp_path / "answers", 0, {}) as writer:  # the same prompts, answered anew
        for number in range(len(stored)):
            writer.write(stored[number] | {"answer_ids": [*stored[number]["answer_ids"][:-1], 11]})
    with pytest.raises(UsageError, match=r"checkpoint of another training \(answers\)"):
        train(taught, [tmp_path / "answers"], tmp_path / "out", tiny_config(), config)


@pytest.mark.usefixtures("afresh")
def test_trackers_are_told_each_step(taught: Base, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Notebook(GeneralTracker):
        name, requires_logging_directory, tracker = "notebook", False, None
        told: ClassVar[list[tuple[int, dict[str, Any]]]] = []

        def __init__(self, run: str, **_: Any) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.told.append((0, values))

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            self.told.append((step or 0, values))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Notebook)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [tracking.LoggerType.TENSORBOARD])
    config = TrainConfig(steps=3, answers_per_step=4, positions_per_answer=8, held_out=4, eval_every=3, tracker="tensorboard")
    train(taught, [answers], tmp_path, tiny_config(), config)
    curve = read_jsonl(tmp_path / "curve.jsonl")
    assert Notebook.told[0][1]["num_streams"] == 4
    assert [(step, values["loss"]) for step, values in Notebook.told[1:]] == [(entry["step"], entry["loss"]) for entry in curve]
    assert Notebook.told[-1][1]["reached/stream 4"] == curve[-1]["reached"][3]


def test_settings_of_a_checkpoint_do_not_hide_each_other() -> None:
    outer = {"answers": "a", "begins_with": "", "processes": 2, "precision": "bf16"}
    streaming, training = tiny_config().to_dict(), asdict(TrainConfig())
    settings = {"streaming": streaming, "train": training, **outer}
    assert differing(settings, settings) == []
    for key, value in (outer | streaming | training).items():
        groups = [{**group, key: (value, "changed")} if key in group else group for group in (streaming, training)]
        changed = {**settings, "streaming": groups[0], "train": groups[1], **({key: "changed"} if key in outer else {})}
        practical = key in ("feature_memory_gb", "logits_memory_gb", "checkpoint_every", "tracker")
        assert differing(settings, changed) == ([] if practical else [key])
    del settings["processes"]  # as an earlier version wrote it
    assert differing(settings, settings | {"processes": 3}) == []


def test_a_conversation_is_held_out_as_a_whole() -> None:
    stored = Answers.of([answer([1], [2, 3, 4]) | {"id": f"{i}/{turn}:talk {i}"} for i in range(40) for turn in range(3)])
    held, rest = split(stored, TrainConfig(held_out=8, answers_per_step=4))
    talks = [{id.partition(":")[2] for id in side.column("id")} for side in (held, rest)]
    assert len(held) == 8
    assert not talks[0] & talks[1]
    _, half = split(stored, TrainConfig(held_out=8, answers_per_step=4, data_fraction=0.5))
    assert len(half) == len(rest) // 2


def test_added_answers_hold_nothing_out_that_was_learnt_from_before() -> None:
    records = [answer([1], [2, 3, 4]) | {"id": f"0/{turn}:talk {i}"} for i in range(60) for turn in range(2)]
    config = TrainConfig(held_out=9, answers_per_step=4)
    (held_first, _), (held, rest) = (split(Answers.of(part), config) for part in (records[:60], records))
    first = {f"0/{turn}:talk {i}" for i in range(30) for turn in range(2)}
    assert set(held.column("id")) & first <= set(held_first.column("id"))
    assert set(held.column("id")) - first, "and what was added has its share"
    assert not set(held.column("id")) & set(rest.column("id"))


def test_an_adapter_goes_on_learning(taught: Base, answers: Path, tmp_path: Path) -> None:
    streaming = tiny_config(lora_rank=8, transition_rank=32, draft_vocab_size=50)
    short = replace(TRAINING, steps=50)
    before, _, first = train(taught, [answers], tmp_path / "first", streaming, short)
    on = replace(short, steps=2, warmup_steps=2, eval_every=1, begin_from=str(tmp_path / "first"))
    shape = before.config.changed(tree_nodes=8)
    after, _, second = train(taught, [answers], tmp_path / "second", shape, on)

    assert after.draft_ids is not None
    assert before.draft_ids is not None
    assert torch.equal(after.draft_ids, before.draft_ids)
    assert second["trained_parameters"] == first["trained_parameters"]
    begun = read_jsonl(tmp_path / "second" / "curve.jsonl")[1]["loss"]
    losses = [entry["loss"] for entry in read_jsonl(tmp_path / "first" / "curve.jsonl")]
    assert begun < 0.7 * sum(losses[:5]) / 5, "it begins where the other ended"
    assert json.loads((tmp_path / "second" / "training.json").read_text())["train"]["begin_from"] == str(tmp_path / "first")

    worse = replace(on, steps=3, warmup_steps=0, learning_rate=0.3)
    unharmed, _, third = train(taught, [answers], tmp_path / "third", shape, worse)
    assert third["best_step"] == 0
    curve = read_jsonl(tmp_path / "third" / "curve.jsonl")
    assert third["acceptance_length"] == curve[0]["acceptance_length"] >= curve[-1]["acceptance_length"]
    draw_curve(tmp_path / "third")
    assert (tmp_path / "third" / "curve.png").stat().st_size
    for checkpoint in (tmp_path / "third").glob("checkpoint-*"):  # as if it had been killed before the first of them
        shutil.rmtree(checkpoint)
    train(taught, [answers], tmp_path / "third", shape, worse)
    assert [entry["step"] for entry in read_jsonl(tmp_path / "third" / "curve.jsonl")] == [0, 1, 2, 3]
    assert unharmed.digest() == before.digest(), "what only got worse is not kept"
    for change, rule in ({"lora_rank": 5}, "lora_rank must be that of the adapter to begin from .8., got 5"), (
        {"draft_vocab_size": 0},
        "draft_vocab_size must be that",
    ):
        with pytest.raises(UsageError, match=rule):
            train(taught, [answers], tmp_path / "third", shape.changed(**change), on)


def test_gradients_reach_the_adapter_alone(taught: Base, answers: Path) -> None:
    adapter = new_adapter(taught.model, tiny_config()).randomize(0)
    runner = StreamRunner(taught.model, adapter)
    drafter = Drafter(adapter, taught.model.get_input_embeddings(), taught.model.get_output_embeddings())
    stored = Answers.read(answers)
    stored = stored.select([i for i, length in enumerate(stored.lengths("answer_ids")) if length > 8][:3])
    features = FeatureStore(runner, stored, memory_gb=1).get([0, 1, 2])
    block = make_batch(features, [f.prompt - 1 for f in features], 4, 4, runner.first_top, torch.float32)
    loss, _, _ = StreamLoss(runner, drafter, 1.0)(block)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in taught.model.parameters())


def test_training_streams_are_the_decoding_streams(taught: Base) -> None:
    """What is trained over stored features is what a pass of the decode loop computes."""
    runner = StreamRunner(taught.model, new_adapter(taught.model, tiny_config()).randomize(0))
    ids = prompt_ids(12)
    record = answer(ids[0, :4].tolist(), ids[0, 4:].tolist())
    with torch.no_grad():
        features = FeatureStore(runner, Answers.of([record]), memory_gb=0).get([0])
        block = make_batch(features, [3], 6, 4, runner.first_top, torch.float32)
        trained = runner.speculate(block.entry, block.positions, block.context, block.rows)[0]
        decoded = runner.verify(ids, torch.arange(12)[None], None, RowCache(3), torch.arange(12)).streams
    # features are stored in bfloat16
    torch.testing.assert_close(trained, decoded[0, 3:9], rtol=0.1, atol=0.1)
    assert block.tokens[0, 0].tolist() == ids[0, 4:8].tolist()
    assert block.valid[0].all(-1).tolist() == [True, True, True, True, False, False]


def test_every_position_is_visited_once_an_epoch(taught: Base) -> None:
    """Of an answer of n tokens n - 1 positions have a certain token and one to draft; the first is the prompt's last."""
    lengths = [3 + i * 7 % 90 for i in range(150)]
    stored = Answers.of([answer([1, 2, 3][: 1 + i % 3], [5] * length) for i, length in enumerate(lengths)])
    config = TrainConfig(answers_per_step=4, positions_per_answer=16)
    runner = StreamRunner(taught.model, new_adapter(taught.model, tiny_config()))
    order, again, other = Order(stored, config), Order(stored, config), Order(stored, replace(config, seed=1))
    visited, number = Counter[tuple[int, int]](), 0
    with torch.no_grad():
        store = FeatureStore(runner, stored, memory_gb=1)
        while visited.total() < sum(lengths) - len(lengths):
            visit = order.visit(number)
            found = block(store.get([number for number, _ in visit.stretches]), visit, config, 4, runner)
            for (which, _), places, valid in zip(visit.stretches, found.positions, found.valid[:, :, 0], strict=True):
                visited.update((which, int(place)) for place in places[valid])
            number += 1
    assert set(visited.values()) == {1}
    first = {which: min(place for answer, place in visited if answer == which) for which in range(150)}
    assert first == {i: i % 3 for i in range(150)}
    assert [again.visit(i) for i in (5, 0, number + 3)] == [order.visit(i) for i in (5, 0, number + 3)]
    assert order.visit(0) != other.visit(0)
    assert {answer for answer, _ in order.visit(number).stretches} <= set(order.visit(number).near)


def test_epochs_that_visit_a_part_see_every_answer_and_with_time_all_of_it() -> None:
    lengths = [3 + i * 7 % 90 for i in range(90)]
    stored = Answers.of([answer([1, 2], [5] * length) for length in lengths])
    order = Order(stored, TrainConfig(answers_per_step=1, positions_per_answer=16, visit_every=3))
    begins = {which: range(1, length, 16) for which, length in enumerate(lengths)}
    visits = sum(max(3, len(starts)) for starts in begins.values())  # in three epochs; each visit is of one stretch
    seen = [stretch for number in range(visits) for stretch in order.visit(number).stretches]
    assert len(seen) == visits
    assert set(seen) == {(which, start) for which, starts in begins.items() for start in starts}
    assert {which for which, _ in seen[: visits * 4 // 9]} == set(begins)  # an epoch is a third, more or less


def test_processes_visit_different_answers() -> None:
    stored = Answers.of([answer([1, 2], [5] * 40) for _ in range(384)])
    config, seen = TrainConfig(answers_per_step=8, positions_per_answer=64), []
    for process in range(2):
        order = Order(stored, config, process, 2)
        seen.append({answer for number in range(24) for answer, _ in order.visit(number).stretches})
    assert not seen[0] & seen[1]
    assert sum(map(len, seen)) == 384
    uneven = Answers.of([answer([1, 2], [5] * (3 + 37 * i % 90)) for i in range(500)])
    orders = [Order(uneven, replace(config, answers_per_step=1), process, 3) for process in range(3)]
    assert all(order.visit(number).stretches for order in orders for number in range(2500))  # none is without
    near = [[order.visit(number).near for number in range(2500)] for order in orders]
    moves = [[number for number in range(1, 2500) if of[number] != of[number - 1]] for of in near]
    assert moves[0] == moves[1] == moves[2]  # they go on to other answers together
    assert len(moves[0]) > 2
    alone = [Order(stored.select(range(3)), config, process, 5).visit(0) for process in range(5)]
    assert all(visit.stretches for visit in alone)  # fewer answers than processes: some share them


def test_features_that_do_not_fit_make_room(taught: Base, answers: Path) -> None:
    runner = StreamRunner(taught.model, new_adapter(taught.model, tiny_config()))
    stored = Answers.read(answers)
    with torch.no_grad():
        plenty = FeatureStore(runner, stored, memory_gb=1)
        wanted = plenty.get(list(range(6)))
        scarce = FeatureStore(runner, stored, memory_gb=sum(f.bytes for f in wanted[:3]) / 2**30)
        for numbers in ([0, 1, 2], [3, 3, 0], [4, 5]):
            for number, features in zip(numbers, scarce.get(numbers), strict=True):
                torch.testing.assert_close(features.final, wanted[number].final, rtol=0.1, atol=0.1)
    assert {4, 5} <= set(scarce._kept) < set(range(6))


def test_features_leave_room_for_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what nobody needs: of a GPU with what torch holds on to, of a CPU for each of the processes on it."""
    gib = 2**30
    for name, said in (("mem_get_info", (6 * gib, 40 * gib)), ("memory_reserved", 5 * gib), ("memory_allocated", 3 * gib)):
        monkeypatch.setattr(torch.cuda, name, lambda device, said=said: said)
    gpu = torch.device("cuda")
    assert [features.affordable(wanted, gpu) for wanted in (3.0, 9.0)] == [3.0, 4.0]
    assert features.affordable(9.0, gpu, besides_gb=2.0) == 3.0
    assert features.affordable(9.0, gpu, besides_gb=2.0, kept_bytes=2 * gib) == 4.0  # what is kept may stay
    assert features.affordable(9.0, gpu, besides_gb=20.0) == 0.0
    monkeypatch.setattr(process_module, "get_max_memory", lambda: {"mps": 16 * gib})  # one memory for both
    assert features.affordable(9.0, torch.device("cpu")) == 8.0
    monkeypatch.setattr(process_module, "get_max_memory", lambda: {0: 99 * gib, "cpu": 16 * gib})
    assert features.affordable(9.0, torch.device("cpu")) == 8.0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert features.affordable(9.0, torch.device("cpu")) == 2.0


def test_long_answers_are_read_a_few_at_a_time(taught: Base, answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded by tokens, not by answers; and of the layers below the streams no keys are kept."""
    runner = StreamRunner(taught.model, new_adapter(taught.model, tiny_config()))
    stored, seen = Answers.read(answers), []
    lengths = [len(stored[n]["prompt_ids"]) + len(stored[n]["answer_ids"]) for n in range(12)]

    def note(ids: torch.Tensor, cache: RowCache) -> Any:
        found = real(ids, cache)
        seen.append((tuple(ids.shape), [layer.is_initialized for layer in cache.rows]))
        return found

    real = runner.observe
    with torch.no_grad():
        whole = FeatureStore(runner, stored, memory_gb=1).get(list(range(12)))
        monkeypatch.setattr(features, "tokens_at_once", lambda device: 3 * max(lengths))
        monkeypatch.setattr(runner, "observe", note)
        parts = FeatureStore(runner, stored, memory_gb=1).get(list(range(12)))
    assert sum(count for (count, _), _ in seen) == 12
    assert max(count * width for (count, width), _ in seen) <= 3 * max(lengths)
    assert all(kept == [False, True, True] for _, kept in seen)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=0.02, atol=0.02)
        torch.testing.assert_close(one.final, other.final, rtol=0.02, atol=0.02)


def test_reading_ahead_holds_no_more_at_once_than_a_pass(taught: Base, answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, stored = StreamRunner(taught.model, new_adapter(taught.model, tiny_config())), Answers.read(answers)
    lengths = [len(stored[n]["prompt_ids"]) + len(stored[n]["answer_ids"]) for n in range(12)]
    monkeypatch.setattr(features, "tokens_at_once", lambda device: 3 * max(lengths))
    store, read = FeatureStore(runner, stored, memory_gb=0), []
    monkeypatch.setattr(store, "get", read.append)
    store.read_ahead(list(range(12)))
    assert [n for some in read for n in some] == list(range(12))
    assert len(read) > 1
    assert max(len(some) * max(lengths[n] for n in some) for some in read) <= 3 * max(lengths)


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    device = torch.device
    assert module._same(device("cuda"), device("cuda:1"))
    assert module._same(device("cuda:1"), device("cuda"))
    assert not module._same(device("cuda"), device("cuda:0"))
    assert not module._same(device("cuda"), device("cpu"))
    assert module._same(device("cpu:3"), device("cpu"))


@pytest.mark.usefixtures("afresh")
def test_float16_on_a_cpu_is_refused(answers: Path, tmp_path: Path, taught: Base) -> None:
    half = Base(build_tiny(seed=5).to(torch.float16), taught.tokenizer, taught.name)
    for base, precision in ((taught, "fp16"), (half, "")):
        with pytest.raises(UsageError, match="float16 learns only with its losses scaled"):
            module._accelerator(replace(TRAINING, mixed_precision=precision), base.model.dtype, tmp_path)


def test_the_draft_vocabulary_holds_the_commonest_tokens() -> None:
    stored = Answers.of([answer([8], [5, 5, 5, 9, 9, 2]), answer([8], [7, 7, 9, 1])])
    assert draft_vocabulary(stored, 3).tolist() == [5, 7, 9]
    assert draft_vocabulary(stored, 99).tolist() == [1, 2, 5, 7, 9]


def test_bad_data_is_told(taught: Base, answers: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no answers in"):
        train(taught, [tmp_path], tmp_path / "out", tiny_config(), TRAINING)
    with pytest.raises(UsageError, match="at least held_out"):
        train(taught, [answers], tmp_path / "out", tiny_config(), TrainConfig(held_out=5000))
    other = Base(build_tiny(seed=9), Words(), "other")
    with pytest.raises(UsageError, match="another base's"):
        train(other, [answers], tmp_path / "out", tiny_config(), TRAINING)
    with pytest.raises(UsageError, match="steps must be at least 1, got 0"):
        TrainConfig(steps=0)


def test_a_loss_that_is_no_number_stops_the_run(
    taught: Base, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(steps=30, answers_per_step=4, positions_per_answer=8, held_out=4, checkpoint_every=3)
    real, calls = StreamLoss.forward, []

    def poisoned(self: StreamLoss, block: Any) -> Any:
        calls.append(1)
        loss, each, agreement = real(self, block)
        return (loss * float("nan") if len(calls) == 8 else loss), each, agreement

    monkeypatch.setattr(StreamLoss, "forward", poisoned)
    with pytest.raises(UsageError, match=r"loss is nan at step 7: .* the last good checkpoint is .*checkpoint-000006; .* in another folder$"):
        train(taught, [answers], tmp_path / "early", tiny_config(), config)
    calls.clear()
    with pytest.raises(UsageError, match=r"a lower learning rate in another folder, with --begin-from .*late$"):
        train(taught, [answers], tmp_path / "late", tiny_config(), replace(config, eval_every=4))
    slower = replace(config, steps=2, begin_from=str(tmp_path / "late"), learning_rate=1e-4)
    assert train(taught, [answers], tmp_path / "on", tiny_config(), slower)[2]["steps_done"] == 2
    assert [path.name for path in (tmp_path / "early").glob("checkpoint-*")] == ["checkpoint-000006"]


def test_an_ablation_trains_each_variant_once(taught: Base, answers: Path, tmp_path: Path) -> None:
    training = TrainConfig(steps=4, answers_per_step=4, positions_per_answer=8, held_out=4, eval_every=4)
    names = ["paper", "paper + next token told", "paper + transition", "8 MSA layers", "half of the answers"]
    options = {"lora_rank": 4, "transition_rank": 8, "num_msa_layers": 2, "draft_vocab_size": 40}
    report = ablate(taught, [answers], tmp_path, tiny_config(**options), training, names)
    rows = {row["name"]: row for row in report["variants"]}
    assert list(rows) == names
    assert set(rows["paper"]["parameters_by_part"]) == {"stream embeddings", "MSA adapters"}
    assert rows["paper + next token told"]["parameters_by_part"]["told"] == 2 * 32 * 32
    assert rows["8 MSA layers"]["refused"] == "num_msa_layers must be between 1 and 3 (model depth), got 8"
    assert rows["half of the answers"]["answer_tokens"] < 0.6 * rows["paper"]["answer_tokens"]
    layer = sum(p.numel() for p in taught.model.model.layers[0].parameters())
    assert list(report["others"].values()) == [4 * (32 * 32 + 32 + 32 * 96), layer + 2 * 32 * 32 + 32, 4 * 32]
    train(taught, [answers], tmp_path / "alone", tiny_config(**options), training)
    curves = [read_jsonl(tmp_path / folder / "curve.jsonl") for folder in ("alone", "paper-+-transition")]
    for alone, among in zip(*curves, strict=True):  # features that variants share change nothing
        assert among["loss"] == pytest.approx(alone["loss"], rel=1e-3)
    again = ablate(taught, [answers], tmp_path, tiny_config(**options), training, names[:1])  # the rest is kept
    assert again["variants"] == report["variants"]
    ablate(taught, [answers], tmp_path, tiny_config(**options), replace(training, feature_memory_gb=1.0), names[:1])  # as memory has it
    for other, what in ((replace(training, steps=5), "steps"), (replace(training, seed=1), "seed")):
        with pytest.raises(UsageError, match=rf"holds an ablation of another kind \({what}\)"):
            ablate(taught, [answers], tmp_path, tiny_config(**options), other, names[:1])
    rich = tiny_config(**options, next_token_rank=4, init_rank=2, rotate_values=True, schedule="deferred")  # the paper stays the paper
    paper = ablate(taught, [answers], tmp_path / "rich", rich, training, ["paper"])["variants"][0]
    assert paper["parameters_by_part"] == rows["paper"]["parameters_by_part"]
    written = (tmp_path / "ablation.md").read_text()
    assert written.count("\n") == 2 + 5 + 3
    assert f"| paper | {rows['paper']['trained_parameters']:,} |" in written
