"""Training: the order in which answers are visited, the Accelerate loop, checkpoints, and which adapter is kept.

Knows: optimizers, processes, interruptions. Does not know: the loss (loss.py), how acceptance is foretold
(foretell.py), where answers come from, or how generation uses the adapter. Only the adapter has gradients.

A folder holds `checkpoint-<step>/` (Accelerate's own), `best.safetensors` (the adapter that foretold most on held-out
answers), `curve.jsonl`, and in the end the adapter with `training.json`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, broadcast
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .adapter import StreamAdapter
from .answers import Answers
from .config import StreamingConfig
from .draft import Drafter
from .errors import UsageError
from .features import Block, Features, FeatureStore, make_block
from .foretell import foretell
from .generate import new_adapter
from .loss import StreamLoss
from .models import Base, differentiable, fingerprint, fingerprint_differences, processes
from .storage import append_jsonl, ensure_room, read_jsonl, versions, write_json
from .streams import StreamRunner

_LENGTH_WINDOW = 24  # batches whose answers are sorted by length, so that little of each is padding
_MIXED = ("", "no", "bf16", "fp16")
_PRACTICAL = ("feature_memory_gb", "logits_memory_gb", "checkpoint_every", "tracker")


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to learn.

    A step visits `answers_per_step` runs of `positions_per_answer` positions, `gradient_accumulation` times over, in
    every process, of a `share` of the answers. `patience` evaluations without
    a better one end the training; 0 never does.
    """

    steps: int = 900
    answers_per_step: int = 8
    positions_per_answer: int = 64
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
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "answers_per_step", "positions_per_answer", "gradient_accumulation", "held_out",
                     "eval_every", "checkpoint_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise UsageError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.patience < 0:
            raise UsageError(f"patience must be at least 0, got {self.patience}")
        if self.logits_memory_gb <= 0:
            raise UsageError(f"logits_memory_gb must be above 0, got {self.logits_memory_gb}")
        if not 0 < self.share <= 1:
            raise UsageError(f"share must be above 0 and at most 1, got {self.share}")
        if self.mixed_precision not in _MIXED:
            raise UsageError(f"mixed_precision must be one of {', '.join(_MIXED[1:])}, or empty for what Accelerate is configured to, got {self.mixed_precision!r}")


def draft_vocabulary(answers: Answers, size: int) -> torch.Tensor:
    """The `size` tokens that the base emits most, in the order of their ids; more frequent or lower ids win."""
    ids, counts = np.unique(answers.emitted(), return_counts=True)
    best = ids[np.lexsort((ids, -counts))[:size]]
    return torch.from_numpy(np.sort(best)).long()


def batches(lengths: list[int], config: TrainConfig, epoch: int) -> list[list[int]]:
    """The answers of each step of an epoch; the same for the same seed."""
    rng = random.Random(f"{config.seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    found: list[list[int]] = []
    window = config.answers_per_step * _LENGTH_WINDOW
    for begin in range(0, len(order), window):
        near = sorted(order[begin : begin + window], key=lambda i: lengths[i])
        found += [near[i : i + config.answers_per_step] for i in range(0, len(near), config.answers_per_step)]
    rng.shuffle(found)
    return found


def train(
    base: Base, data: str | Path, out: str | Path, streaming: StreamingConfig, config: TrainConfig
) -> tuple[StreamAdapter, Answers, dict[str, Any]]:
    """Train an adapter on the answers in `data` and save it into `out`.

    A checkpoint is written every `checkpoint_every` steps; after an interruption the same command goes on from it. Of the
    adapters that were evaluated the best is the one that is saved. Under `accelerate launch` the processes of a step
    visit different answers.

    Returns:
        The adapter, the answers that were held out, and the summary that is also written to `out/training.json`.

    Raises:
        UsageError: no answers, answers of another base, another configuration than the checkpoint's, or
            a loss that is no number (the last checkpoint stays).
    """
    out = Path(out)
    answers, provenance = _read_answers(base, Path(data))
    held_out, answers = _split(answers, config)
    if streaming.draft_vocab_size:
        seen = len(np.unique(answers.emitted()))
        streaming = replace(streaming, draft_vocab_size=min(streaming.draft_vocab_size, seen))
    accelerator = _accelerator(config, out)
    if base.model.device != accelerator.device:
        raise UsageError(
            f"training computes on {accelerator.device}, but the base is on {base.model.device}: the device of a training "
            "is chosen with CUDA_VISIBLE_DEVICES or by accelerate launch"
        )
    settings = json.loads(json.dumps({"streaming": streaming.to_dict(), "train": asdict(config)}))
    if config.tracker:
        accelerator.init_trackers("lossless", settings["streaming"] | settings["train"])
    digest = hashlib.sha256("\n".join(sorted(answers.column("id"))).encode()).hexdigest()
    torch.manual_seed(config.seed)
    draft_ids = draft_vocabulary(answers, streaming.draft_vocab_size) if streaming.draft_vocab_size else None
    adapter = new_adapter(base.model, streaming, base.tokenizer, draft_ids).to(accelerator.device)
    adapter.base["name"] = base.name
    runner = StreamRunner(base.model, adapter)
    with torch.no_grad(), runner.installed():
        scale = runner.logit_scale()
    drafter = Drafter(adapter, base.model.get_input_embeddings(), base.model.get_output_embeddings(), scale)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, config))
    accelerator.register_for_checkpointing(schedule)  # not prepared: a step of it is a step, whatever the processes
    loss_module, optimizer = accelerator.prepare(StreamLoss(runner, drafter, config.logits_memory_gb, config.hard_labels), optimizer)
    checkpoints = _Checkpoints(out, settings | {"answers": digest}, accelerator, 4 * adapter.parameter_count())
    progress = checkpoints.resume()

    order = _Order(_text_lengths(answers), config)
    held_store = FeatureStore(runner, held_out, config.feature_memory_gb / 8)
    store = FeatureStore(runner, answers, config.feature_memory_gb * 7 / 8)
    tokens = sum(answers.lengths("answer_ids"))
    accelerator.print(
        f"{len(answers)} answers, {tokens:,} tokens; {adapter.parameter_count():,} trained parameters; "
        f"{len(held_out)} answers held out"
    )
    bar = tqdm(total=config.steps, initial=progress.step, desc="training", disable=not accelerator.is_main_process)
    with append_jsonl(out / "curve.jsonl") as log, bar, differentiable(base.model), runner.installed():
        try:
            while progress.step < config.steps and not progress.stopped:
                # 1. learn: every process and every part of an accumulated step visits answers of its own
                parts = []
                for part in range(config.gradient_accumulation):
                    visit = (progress.step * config.gradient_accumulation + part) * accelerator.num_processes
                    visit += accelerator.process_index
                    block = _block(store.get(order.visit(visit)), config, streaming.num_streams, runner, visit)
                    with accelerator.accumulate(loss_module):
                        loss, each, agreement = loss_module(block)
                        if not math.isfinite(loss.item()):
                            raise UsageError(
                                f"the loss is {loss.item()} at step {progress.step}: training stopped, "
                                f"{checkpoints.latest_told()}; try a lower learning rate"
                            )
                        accelerator.backward(loss)
                        if accelerator.sync_gradients:
                            norm = accelerator.clip_grad_norm_(adapter.parameters(), config.max_grad_norm)
                            # a scaler of half precision skips such a step by itself
                            if accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
                                raise UsageError(
                                    f"the gradient is {float(norm)} at step {progress.step}: training stopped, "
                                    f"{checkpoints.latest_told()}; try a lower learning rate"
                                )
                        optimizer.step()
                        optimizer.zero_grad()
                    parts.append(torch.stack([loss.detach().expand(streaming.num_streams), each, agreement]))
                schedule.step()
                progress.step += 1
                entry = _entry(progress.step, accelerator.reduce(torch.stack(parts).mean(0), "mean"))
                bar.update()
                bar.set_postfix(loss=f"{entry['loss']:.3f}", agree="/".join(f"{a:.2f}" for a in entry["agreement"]))
                # 2. evaluate: what would the decode loop make of it
                if progress.step % config.eval_every == 0 or progress.step == config.steps:
                    told = foretell(runner, drafter, held_store, streaming.tree_nodes)
                    # one word for all processes, whose numbers might differ in a bit
                    length = round(float(broadcast(torch.tensor(told.acceptance_length, device=accelerator.device))), 3)
                    entry |= {"acceptance_length": told.acceptance_length, "reached": told.reached}
                    if accelerator.is_main_process:
                        bar.write(f"step {progress.step}: loss {entry['loss']:.3f}, held-out acceptance length {length:.3f}")
                    if progress.note(length, config.patience) and accelerator.is_main_process:
                        _save_whole(adapter, out / "best.safetensors")
                # 3. note it, and keep it
                if accelerator.is_main_process:
                    log(entry)
                if config.tracker:
                    accelerator.log(_flat(entry), step=progress.step)
                if progress.step % config.checkpoint_every == 0 or progress.step == config.steps or progress.stopped:
                    checkpoints.save(progress)
        except KeyboardInterrupt:  # in the middle of a step, so that nothing but the last checkpoint is whole
            accelerator.print(f"stopped in step {progress.step + 1}; {checkpoints.latest_told()}, the same command goes on from it")
            raise
    if progress.stopped:
        accelerator.print(f"stopped early: {config.patience} evaluations without a better one than at step {progress.best_step}")
    accelerator.wait_for_everyone()
    adapter.load_state_dict(load_file(out / "best.safetensors"))
    summary = settings | {
        "model": base.name,
        "data": provenance,
        "answers": len(answers),
        "answer_tokens": tokens,
        "trained_parameters": adapter.parameter_count(),
        "parameters_by_part": adapter.parts(),
        "base_parameters": base.model.num_parameters(),
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "versions": versions(),
        "steps_done": progress.step,
        "best_step": progress.best_step,
        "acceptance_length": progress.best,
    }
    if accelerator.is_main_process:
        adapter.save_pretrained(out)
        write_json(out / "training.json", summary)
    for tracker in accelerator.trackers:
        tracker.finish()
    return adapter, held_out, summary


class _Order:
    """Which answers each visit is of, epoch after epoch."""

    def __init__(self, lengths: list[int], config: TrainConfig) -> None:
        self._lengths, self._config, self._epoch = lengths, config, 0
        self._batches = batches(lengths, config, 0)

    def visit(self, number: int) -> list[int]:
        epoch, place = divmod(number, len(self._batches))
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, batches(self._lengths, self._config, epoch)
        return self._batches[place]


@dataclass
class _Progress:
    """How far a training has come."""

    step: int = 0
    best: float = 0.0
    best_step: int = 0
    worse: int = 0  # evaluations since the best
    stopped: bool = False

    def note(self, acceptance_length: float, patience: int) -> bool:
        """One more evaluation; whether it is the best so far."""
        if acceptance_length > self.best:
            self.best, self.best_step, self.worse = acceptance_length, self.step, 0
            return True
        self.worse += 1
        self.stopped = 0 < patience <= self.worse
        return False


class _Checkpoints:
    """Accelerate's checkpoints, of which the newest whole one counts: its `progress.json` is written last."""

    def __init__(self, out: Path, settings: dict[str, Any], accelerator: Accelerator, weights_bytes: int) -> None:
        self.out, self.settings, self.accelerator = out, settings, accelerator
        self._bytes = 4 * weights_bytes  # weights and two moments, and room to spare
        out.mkdir(parents=True, exist_ok=True)

    def save(self, progress: _Progress) -> None:
        folder = self.out / f"checkpoint-{progress.step:06d}"
        if folder in (before := self._whole()):
            return
        ensure_room(self.out, self._bytes)
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_json(folder / "progress.json", {"settings": self.settings, "progress": asdict(progress)})
            for old in before:
                shutil.rmtree(old)

    def resume(self) -> _Progress:
        """Take up the newest checkpoint, if there is one, and cut from the curve what came after it."""
        found = self._whole()
        if self.accelerator.is_main_process:
            for folder in set(self.out.glob("checkpoint-*")) - set(found):
                shutil.rmtree(folder)
        progress = _Progress()
        if found:
            written = json.loads((found[-1] / "progress.json").read_text(encoding="utf-8"))
            if _compared(written["settings"]) != _compared(self.settings):
                raise UsageError(
                    f"{self.out} holds a checkpoint of other settings or answers: use them again to go on, or another folder"
                )
            self.accelerator.load_state(str(found[-1]))
            progress = _Progress(**written["progress"])
        if self.accelerator.is_main_process:
            curve = [entry for entry in read_jsonl(self.out / "curve.jsonl") if entry["step"] <= progress.step]
            staging = self.out / "curve.jsonl.part"
            staging.write_text("".join(json.dumps(entry) + "\n" for entry in curve), encoding="utf-8")
            os.replace(staging, self.out / "curve.jsonl")
        self.accelerator.wait_for_everyone()
        return progress

    def latest_told(self) -> str:
        """Where the last good one is, in words."""
        found = self._whole()
        return f"the last good checkpoint is {found[-1]}" if found else "before any checkpoint"

    def _whole(self) -> list[Path]:
        return sorted(path.parent for path in self.out.glob("checkpoint-*/progress.json"))


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that may change on the way: what fits into memory, and what is told to whom."""
    return settings | {"train": {key: value for key, value in settings["train"].items() if key not in _PRACTICAL}}


def _accelerator(config: TrainConfig, out: Path) -> Accelerator:
    try:
        accelerator = Accelerator(
            cpu=processes().device.type == "cpu",
            mixed_precision=config.mixed_precision or None,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation),
            log_with=config.tracker or None,
            project_dir=out,
        )
    except ValueError as error:
        raise UsageError(f"Accelerate refuses these settings: {str(error).splitlines()[0]}") from error
    if config.tracker and not accelerator.log_with:
        raise UsageError(f"tracker {config.tracker!r} is not installed here: pip install it, or leave --tracker out")
    return accelerator


def _save_whole(adapter: StreamAdapter, path: Path) -> None:
    staging = path.with_name(path.name + ".part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in adapter.state_dict().items()}, staging)
    os.replace(staging, path)


def _block(features: list[Features], config: TrainConfig, gamma: int, runner: StreamRunner, visit: int) -> Block:
    """A run of positions of each answer, from a random one on; a short answer gives all that it has."""
    rng = random.Random(f"{config.seed}/block {visit}")
    starts = []
    for f in features:
        first, last = f.prompt - 1, len(f.ids) - 2 - config.positions_per_answer
        starts.append(rng.randint(first, max(first, last)))
    count = max(min(config.positions_per_answer, len(f.ids) - 2 - start) for f, start in zip(features, starts, strict=True))
    return make_block(features, starts, max(count, 1), gamma, runner.first_top, runner.model.dtype)


def _warm_cosine(step: int, config: TrainConfig) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _entry(step: int, told: torch.Tensor) -> dict[str, Any]:
    """A line of the curve; told: `[3, gamma]`, the loss (in every column), each stream's KL and agreement."""
    loss, each, agreement = ([round(value, 4) for value in row] for row in told.tolist())
    return {"step": step, "loss": loss[0], "kl": each, "agreement": agreement}


def _flat(entry: dict[str, Any]) -> dict[str, float]:
    """For trackers, which take numbers only."""
    found = {key: value for key, value in entry.items() if not isinstance(value, list)}
    for key, values in entry.items():
        if isinstance(values, list):
            found |= {f"{key}/stream {j}": value for j, value in enumerate(values, 1)}
    return found


def _text_lengths(answers: Answers) -> list[int]:
    return [a + b for a, b in zip(answers.lengths("prompt_ids"), answers.lengths("answer_ids"), strict=True)]


def _read_answers(base: Base, folder: Path) -> tuple[Answers, dict[str, Any]]:
    """Answers long enough to learn from, and where they came from."""
    if not (folder / "distill.json").is_file():
        raise UsageError(f"no answers in {folder}: make some with 'lossless distill --out {folder}'")
    provenance = json.loads((folder / "distill.json").read_text(encoding="utf-8"))
    if differing := fingerprint_differences(provenance["fingerprint"], fingerprint(base.model, base.tokenizer)):
        raise UsageError(f"the answers in {folder} are another base's (other {', '.join(differing)})")
    answers = Answers.read(folder)
    # one position needs a certain token, and one after it to draft
    provenance.pop("fingerprint")
    return answers.select(i for i, length in enumerate(answers.lengths("answer_ids")) if length >= 3), provenance


def _split(answers: Answers, config: TrainConfig) -> tuple[Answers, Answers]:
    """Held-out answers and the rest; the same ones whatever the order of the shards."""
    if len(answers) < config.held_out + config.answers_per_step:
        raise UsageError(
            f"training needs at least held_out + answers_per_step = {config.held_out + config.answers_per_step} "
            f"answers of three tokens or more, got {len(answers)}"
        )
    talks: dict[str, list[int]] = {}  # all turns of a conversation, and all answers to a prompt, are on one side
    ids = answers.column("id")
    for number in sorted(range(len(ids)), key=lambda i: ids[i]):
        talks.setdefault(ids[number].partition(":")[2] or ids[number], []).append(number)
    names = sorted(talks)
    random.Random(config.seed).shuffle(names)
    held: list[int] = []
    while len(held) < config.held_out:
        held += talks[names.pop()]
    rest = [number for name in names for number in talks[name]]
    if len(rest) < config.answers_per_step:
        raise UsageError(f"all but {len(rest)} answers belong to held-out conversations: more prompts are needed, or a lower held_out")
    return answers.select(held[: config.held_out]), answers.select(rest[: max(config.answers_per_step, int(config.share * len(rest)))])
