"""Training: the Accelerate loop, and which adapter is kept.

Knows: optimizers, processes, the order of things. Does not know: the loss (loss.py), what a step visits (sampler.py),
how acceptance is simulated (simulation.py), or how generation uses the adapter. Only the adapter has gradients.

A folder holds `checkpoint-<step>/` (Accelerate's own), the adapter that was best by the simulated acceptance on held-out answers so far,
`curve.jsonl`, and in the end `training.json`.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from tqdm.auto import tqdm

from ..adapter.compat import check_fit, new_adapter
from ..adapter.config import AdapterConfig
from ..adapter.weights import StreamAdapter
from ..base.fingerprint import fingerprint
from ..base.loading import Base, differentiable
from ..base.processes import alone_in, processes
from ..distillation.answers import Answers
from ..drafting.drafter import Drafter
from ..errors import UsageError
from ..storage import append_jsonl, versions, write_json
from ..streams.passes import logit_scale
from ..streams.runner import StreamRunner
from .checkpoints import Checkpoints
from .config import TrainConfig
from .features import Features, FeatureStore, affordable, bytes_of
from .loss import StreamLoss
from .sampler import Order, block, draft_vocabulary, read_answers, split
from .simulation import AcceptanceEstimate, simulate_acceptance

_SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
Kept = dict[tuple[str, int], dict[int, Features]]


def train(
    base: Base,
    data: Sequence[str | Path],
    out: str | Path,
    shape: AdapterConfig,
    config: TrainConfig,
    kept: Kept | None = None,
) -> tuple[StreamAdapter, Answers, dict[str, Any]]:
    """Train an adapter on the answers in the folders of `data` and save it into `out`.

    A checkpoint is written every `checkpoint_every` steps; after an interruption the same command goes on from it. Of the
    adapters that were evaluated the best is the one that is saved. Under `accelerate launch` the processes of a step
    visit different answers.

    Args:
        kept: features that trainings of several adapters on the same answers share: the base is frozen for all of them.
            An adapter of another depth needs others, for which they make room.

    Returns:
        The adapter, the answers that were held out, and the summary that is also written to `out/training.json`.

    Raises:
        UsageError: no answers, answers of another base, another configuration than the checkpoint's, or
            a loss that is no number (the last checkpoint stays); another process is at work in `out`.
    """
    out = Path(out)
    with alone_in(out):
        return _Training(base, data, out, shape, config, {} if kept is None else kept).run()


class _Training:
    """One training, set up and ready to go on from its newest checkpoint; the arguments are those of `train`."""

    def __init__(
        self, base: Base, data: Sequence[str | Path], out: Path, shape: AdapterConfig, config: TrainConfig, kept: Kept
    ) -> None:
        self.base, self.out, self.config = base, out, config
        answers, self.provenance = read_answers(base, [Path(folder) for folder in data])
        self.held_out, self.answers = split(answers, config)
        torch.manual_seed(config.seed)
        self.adapter = _adapter(base, self.answers, shape, config.begin_from)
        self.accelerator = accelerator = _accelerator(config, base.model.dtype, out)
        here, there = accelerator.device, base.model.device
        if not _same(here, there):
            raise UsageError(
                f"training computes on {here}, but the base is on {there}: the device of a training "
                "is chosen with CUDA_VISIBLE_DEVICES or by accelerate launch"
            )
        self.settings = json.loads(json.dumps({"streaming": self.adapter.config.to_dict(), "train": asdict(config)}))
        if config.tracker:
            accelerator.init_trackers("lossless", self.settings["streaming"] | self.settings["train"])
        job = self.settings | {
            "answers": self.answers.digest(),
            "begins_with": self.adapter.digest() if config.begin_from else "",
            "processes": accelerator.num_processes,  # other answers would be visited
            "precision": accelerator.mixed_precision,
        }
        self.runner = StreamRunner(base.model, self.adapter)
        with differentiable(self.runner.parts):
            head = base.model.get_output_embeddings()
            self.drafter = Drafter(self.adapter, base.model.get_input_embeddings(), head, logit_scale(self.runner))
        loss = StreamLoss(self.runner, self.drafter, config.logits_memory_gb, config.hard_labels)
        optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.loss, self.optimizer = accelerator.prepare(loss, optimizer)
        self.checkpoints = Checkpoints(out, job, accelerator, 4 * self.adapter.parameter_count())
        self.progress = self.checkpoints.resume()
        self.order = Order(self.answers, config, accelerator.process_index, accelerator.num_processes)
        self.store, self.held_store = self._stores(kept)

    def _stores(self, kept: Kept) -> tuple[FeatureStore, FeatureStore]:
        """Features of the answers that are learnt from, and of those that are held out."""
        config, top = self.config, self.runner.first_top
        for key in [key for key in kept if key[1] != top]:
            del kept[key]
        learnt, held = (kept.setdefault((what, top), {}) for what in ("learnt from", "held out"))
        room = affordable(config.feature_memory_gb, self.base.model.device, config.logits_memory_gb, bytes_of(learnt) + bytes_of(held))
        return FeatureStore(self.runner, self.answers, room * 7 / 8, learnt), FeatureStore(self.runner, self.held_out, room / 8, held)

    def run(self) -> tuple[StreamAdapter, Answers, dict[str, Any]]:
        """The loop: learn, evaluate, note; returns what `train` does."""
        config, progress, main = self.config, self.progress, self.accelerator.is_main_process
        self.accelerator.print(
            f"{len(self.answers)} answers, {self._tokens:,} tokens; {self.adapter.parameter_count():,} trained parameters; "
            f"{len(self.held_out)} answers held out; {config.steps} steps are "
            f"{self.order.epochs(config.steps * config.gradient_accumulation):.1f} epochs"
        )
        bar = tqdm(total=config.steps, initial=progress.step, desc="training", disable=not main)
        with append_jsonl(self.out / "curve.jsonl") as log, bar, differentiable(self.runner.parts):
            try:
                if config.begin_from and not progress.step:  # what it is now is the best so far
                    told = _evaluate(self.runner, self.drafter, self.held_store, self.accelerator)
                    progress.note(told.acceptance_length, 0)
                    if main:
                        bar.write(f"begins with a held-out acceptance length of {progress.best:.3f}")
                        self.adapter.save_pretrained(self.out)
                        log({"step": 0, "acceptance_length": told.acceptance_length, "reached": told.reached})
                while progress.step < config.steps and not progress.stopped:
                    # 1. learn
                    learnt = self._learn()
                    progress.step += 1
                    entry = _entry(progress.step, learnt)
                    bar.update()
                    bar.set_postfix(loss=f"{entry['loss']:.3f}", agree="/".join(f"{a:.2f}" for a in entry["agreement"]))
                    # 2. evaluate: what would the decode loop make of it
                    if progress.step % config.eval_every == 0 or progress.step == config.steps:
                        told = _evaluate(self.runner, self.drafter, self.held_store, self.accelerator)
                        entry |= {"acceptance_length": told.acceptance_length, "reached": told.reached}
                        if main:
                            bar.write(f"step {progress.step}: loss {entry['loss']:.3f}, held-out acceptance length {told.acceptance_length:.3f}")
                        if progress.note(told.acceptance_length, config.patience) and main:
                            self.adapter.save_pretrained(self.out)
                    # 3. note it, and keep it
                    if main:
                        log(entry)
                    if config.tracker:
                        self.accelerator.log(_flat(entry), step=progress.step)
                    if progress.step % config.checkpoint_every == 0 or progress.step == config.steps or progress.stopped:
                        self.checkpoints.save(progress)
            except KeyboardInterrupt:  # in the middle of a step, so that nothing but the last checkpoint is whole
                told_where = self.checkpoints.latest_told()
                self.accelerator.print(f"stopped in step {progress.step + 1}; {told_where}, the same command goes on from it")
                raise
        return self._finish()

    def _learn(self) -> torch.Tensor:
        """One step of the optimizer: every process and every part of an accumulated step visits answers of its own.

        Returns:
            `[3, num_streams]`, means over them: the loss (in every column), each stream's KL and agreement.
        """
        config, step = self.config, self.progress.step
        gamma, parts = self.adapter.config.num_streams, []
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * _warm_cosine(step, config)
        for part in range(config.gradient_accumulation):
            visit = self.order.visit(step * config.gradient_accumulation + part)
            self.store.read_ahead(visit.near)
            features = self.store.get([answer for answer, _ in visit.stretches])
            with self.accelerator.accumulate(self.loss):
                loss, each, agreement = self.loss(block(features, visit, config, gamma, self.runner))
                self._require_finite("loss", loss.item())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.adapter.parameters(), config.max_grad_norm)
                    if self.accelerator.scaler is None and norm is not None:  # a scaler of half precision skips such a step by itself
                        self._require_finite("gradient", float(norm))
                self.optimizer.step()
                self.optimizer.zero_grad()
            parts.append(torch.stack([loss.detach().expand(gamma), each, agreement]))
        found: torch.Tensor = self.accelerator.reduce(torch.stack(parts).mean(0), "mean")
        return found

    def _require_finite(self, what: str, value: float) -> None:
        """Raises UsageError for a training that has gone astray; the best adapter so far, if there is one, is in `out`."""
        if not math.isfinite(value):
            begin = f", with --begin-from {self.out}" if self.progress.best else ""
            raise UsageError(
                f"the {what} is {value} at step {self.progress.step}: training stopped, {self.checkpoints.latest_told()}; "
                f"try a lower learning rate in another folder{begin}"
            )

    @property
    def _tokens(self) -> int:
        """Of the answers that are learnt from."""
        return sum(self.answers.lengths("answer_ids"))

    def _finish(self) -> tuple[StreamAdapter, Answers, dict[str, Any]]:
        """The best adapter, and the summary of its training."""
        adapter, accelerator, progress, model = self.adapter, self.accelerator, self.progress, self.base.model
        if progress.stopped:
            accelerator.print(f"stopped early: {self.config.patience} evaluations without a better one than at step {progress.best_step}")
        accelerator.wait_for_everyone()
        adapter.load_state_dict(StreamAdapter.from_pretrained(self.out).state_dict())  # the best one, as others will read it
        summary = self.settings | {
            "model": self.base.name,
            "data": self.provenance,
            "answers": len(self.answers),
            "answer_tokens": self._tokens,
            "trained_parameters": adapter.parameter_count(),
            "parameters_by_part": adapter.parts(),
            "base_parameters": model.num_parameters(),
            "device": str(accelerator.device),
            "processes": accelerator.num_processes,
            "dtype": str(model.dtype).removeprefix("torch."),
            "versions": versions(),
            "steps_done": progress.step,
            "best_step": progress.best_step,
            "acceptance_length": progress.best,
        }
        if accelerator.is_main_process:
            write_json(self.out / "training.json", summary)
        for tracker in accelerator.trackers:
            tracker.finish()
        return adapter, self.held_out, summary


def _adapter(base: Base, answers: Answers, shape: AdapterConfig, begin_from: str) -> StreamAdapter:
    """The adapter that is to learn: a fresh one, or one that has learnt before, with the vocabulary it has."""
    if begin_from:
        ours = {"name": base.name, "fingerprint": fingerprint(base.model, base.tokenizer)}
        before = StreamAdapter.from_pretrained(begin_from, ours)
        check_fit(base.model, before)
        draft_ids = before.draft_ids
        for name, value in before.config.shape().items():
            if (wanted := getattr(shape, name)) != value:
                raise UsageError(f"{name} must be that of the adapter to begin from ({value}), got {wanted}")
    elif shape.draft_vocab_size:
        seen = len(np.unique(answers.emitted()))
        shape = replace(shape, draft_vocab_size=min(shape.draft_vocab_size, seen))
        draft_ids = draft_vocabulary(answers, shape.draft_vocab_size)
    else:
        draft_ids = None
    adapter = new_adapter(base.model, shape, base.tokenizer, draft_ids).to(base.model.device)
    adapter.base["name"] = base.name
    if begin_from:
        adapter.load_state_dict(before.state_dict())
    return adapter


def _accelerator(config: TrainConfig, dtype: torch.dtype, out: Path) -> Accelerator:
    on_cpu = processes().device.type == "cpu"
    if on_cpu and (config.mixed_precision == "fp16" or dtype == torch.float16):
        raise UsageError("float16 learns only with its losses scaled, which is for GPUs: on a CPU take bfloat16 or float32 (--dtype)")
    # gradients of a half-precision base are too small for it
    precision = config.mixed_precision or ("fp16" if dtype == torch.float16 else None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no supported trackers")  # that is an error, told below
            accelerator = Accelerator(
                cpu=on_cpu,
                mixed_precision=precision,
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation),
                log_with=config.tracker or None,
                project_dir=out,
            )
    except ValueError as error:
        raise UsageError(f"Accelerate refuses these settings: {str(error).splitlines()[0]}") from error
    if accelerator.distributed_type in _SHARDING:
        raise UsageError(
            f"{accelerator.distributed_type.value} shards the weights that are trained; here those are a small adapter's, which "
            "each process needs whole: launch several processes without it"
        )
    if config.tracker and not accelerator.log_with:
        raise UsageError(f"tracker {config.tracker!r} is not installed here: pip install it, or leave --tracker out")
    return accelerator


def _evaluate(runner: StreamRunner, drafter: Drafter, held_out: FeatureStore, accelerator: Accelerator) -> AcceptanceEstimate:
    """What the decode loop would make of the adapter; each process walks along its part of the held-out answers."""
    whose = accelerator.process_index, accelerator.num_processes
    counts = simulate_acceptance(runner, drafter, held_out, runner.adapter.config.drafting.tree_nodes, *whose)
    return AcceptanceEstimate.of(accelerator.reduce(counts, "sum"))


def _same(here: torch.device, there: torch.device) -> bool:
    """Whether two devices are one: a GPU without a number is the current one, and there is one CPU, whatever its number."""
    if here.type != "cuda" or there.type != "cuda":
        return here.type == there.type
    return len({torch.cuda.current_device() if device.index is None else device.index for device in (here, there)}) == 1


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


