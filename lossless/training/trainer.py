"""Training: the Accelerate loop, and which adapter is kept.

Knows: optimizers, processes, the order of things. Does not know: the loss (loss.py), what a step visits (curriculum.py),
how acceptance is foretold (foretell.py), or how generation uses the adapter. Only the adapter has gradients.

A folder holds `checkpoint-<step>/` (Accelerate's own), the adapter that foretold most on held-out answers so far,
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
from ..adapter.weights import StreamAdapter
from ..base.loading import Base, alone_in, differentiable, fingerprint, processes
from ..config import WEIGHT_FIELDS, StreamingConfig, TrainConfig
from ..distillation.answers import Answers
from ..drafting.drafter import Drafter
from ..errors import UsageError
from ..generation.exactness import logit_scale
from ..storage import append_jsonl, versions, write_json
from ..streams.runner import StreamRunner
from .acceptance import Foretold, walk_along
from .checkpoints import Checkpoints, Progress
from .features import Features, FeatureStore, affordable, bytes_of
from .loss import StreamLoss
from .sampler import Order, block, draft_vocabulary, read_answers, split

_SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
Kept = dict[tuple[str, int], dict[int, Features]]


def train(
    base: Base,
    data: Sequence[str | Path],
    out: str | Path,
    streaming: StreamingConfig,
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
        return _train(base, data, out, streaming, config, kept)


def _train(
    base: Base,
    data: Sequence[str | Path],
    out: Path,
    streaming: StreamingConfig,
    config: TrainConfig,
    kept: Kept | None,
) -> tuple[StreamAdapter, Answers, dict[str, Any]]:
    answers, provenance = read_answers(base, [Path(folder) for folder in data])
    held_out, answers = split(answers, config)
    torch.manual_seed(config.seed)
    adapter = _adapter(base, answers, streaming, config.begin_from)
    streaming = adapter.config
    accelerator = _accelerator(config, base.model.dtype, out)
    here, there = accelerator.device, base.model.device
    if not _same(here, there):
        raise UsageError(
            f"training computes on {here}, but the base is on {there}: the device of a training "
            "is chosen with CUDA_VISIBLE_DEVICES or by accelerate launch"
        )
    settings = json.loads(json.dumps({"streaming": streaming.to_dict(), "train": asdict(config)}))
    if config.tracker:
        accelerator.init_trackers("lossless", settings["streaming"] | settings["train"])
    whose = settings | {
        "answers": answers.digest(),
        "begins_with": adapter.digest() if config.begin_from else "",
        "processes": accelerator.num_processes,  # other answers would be visited
        "precision": accelerator.mixed_precision,
    }
    runner = StreamRunner(base.model, adapter)
    with differentiable(runner.parts):
        drafter = Drafter(adapter, base.model.get_input_embeddings(), base.model.get_output_embeddings(), logit_scale(runner))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    loss_module, optimizer = accelerator.prepare(StreamLoss(runner, drafter, config.logits_memory_gb, config.hard_labels), optimizer)
    checkpoints = Checkpoints(out, whose, accelerator, 4 * adapter.parameter_count())
    progress = checkpoints.resume()

    order = Order(answers, config, accelerator.process_index, accelerator.num_processes)
    kept = {} if kept is None else kept
    for key in [key for key in kept if key[1] != runner.first_top]:
        del kept[key]
    ours = {what: kept.setdefault((what, runner.first_top), {}) for what in ("held out", "learnt from")}
    room = affordable(config.feature_memory_gb, there, config.logits_memory_gb, sum(map(bytes_of, ours.values())))
    held_store = FeatureStore(runner, held_out, room / 8, ours["held out"])
    store = FeatureStore(runner, answers, room * 7 / 8, ours["learnt from"])
    tokens = sum(answers.lengths("answer_ids"))
    accelerator.print(
        f"{len(answers)} answers, {tokens:,} tokens; {adapter.parameter_count():,} trained parameters; "
        f"{len(held_out)} answers held out; {config.steps} steps are {order.epochs(config.steps * config.gradient_accumulation):.1f} epochs"
    )
    bar = tqdm(total=config.steps, initial=progress.step, desc="training", disable=not accelerator.is_main_process)
    with append_jsonl(out / "curve.jsonl") as log, bar, differentiable(runner.parts):
        try:
            if config.begin_from and not progress.step:  # what it is now is the best so far
                told = _evaluate(runner, drafter, held_store, accelerator)
                progress.note(told.acceptance_length, 0)
                if accelerator.is_main_process:
                    bar.write(f"begins with a held-out acceptance length of {progress.best:.3f}")
                    adapter.save_pretrained(out)
                    log({"step": 0, "acceptance_length": told.acceptance_length, "reached": told.reached})
            while progress.step < config.steps and not progress.stopped:
                # 1. learn: every process and every part of an accumulated step visits answers of its own
                parts = []
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * _warm_cosine(progress.step, config)
                for part in range(config.gradient_accumulation):
                    visit = order.visit(progress.step * config.gradient_accumulation + part)
                    store.read_ahead(visit.near)
                    visited = block(store.get([answer for answer, _ in visit.stretches]), visit, config, streaming.num_streams, runner)
                    with accelerator.accumulate(loss_module):
                        loss, each, agreement = loss_module(visited)
                        if not math.isfinite(loss.item()):
                            raise UsageError(
                                f"the loss is {loss.item()} at step {progress.step}: training stopped, "
                                f"{checkpoints.latest_told()}; {_lower(progress, out)}"
                            )
                        accelerator.backward(loss)
                        if accelerator.sync_gradients:
                            norm = accelerator.clip_grad_norm_(adapter.parameters(), config.max_grad_norm)
                            # a scaler of half precision skips such a step by itself
                            if accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
                                raise UsageError(
                                    f"the gradient is {float(norm)} at step {progress.step}: training stopped, "
                                    f"{checkpoints.latest_told()}; {_lower(progress, out)}"
                                )
                        optimizer.step()
                        optimizer.zero_grad()
                    parts.append(torch.stack([loss.detach().expand(streaming.num_streams), each, agreement]))
                progress.step += 1
                entry = _entry(progress.step, accelerator.reduce(torch.stack(parts).mean(0), "mean"))
                bar.update()
                bar.set_postfix(loss=f"{entry['loss']:.3f}", agree="/".join(f"{a:.2f}" for a in entry["agreement"]))
                # 2. evaluate: what would the decode loop make of it
                if progress.step % config.eval_every == 0 or progress.step == config.steps:
                    told = _evaluate(runner, drafter, held_store, accelerator)
                    entry |= {"acceptance_length": told.acceptance_length, "reached": told.reached}
                    if accelerator.is_main_process:
                        bar.write(f"step {progress.step}: loss {entry['loss']:.3f}, held-out acceptance length {told.acceptance_length:.3f}")
                    if progress.note(told.acceptance_length, config.patience) and accelerator.is_main_process:
                        adapter.save_pretrained(out)
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
    adapter.load_state_dict(StreamAdapter.from_pretrained(out).state_dict())  # the best one, as others will read it
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
        write_json(out / "training.json", summary)
    for tracker in accelerator.trackers:
        tracker.finish()
    return adapter, held_out, summary


def _adapter(base: Base, answers: Answers, streaming: StreamingConfig, begin_from: str) -> StreamAdapter:
    """The adapter that is to learn: a fresh one, or one that has learnt before, with the vocabulary it has."""
    if begin_from:
        ours = {"name": base.name, "fingerprint": fingerprint(base.model, base.tokenizer)}
        before = StreamAdapter.from_pretrained(begin_from, ours)
        check_fit(base.model, before)
        draft_ids = before.draft_ids
        for name in WEIGHT_FIELDS:
            if getattr(streaming, name) != (value := getattr(before.config, name)):
                raise UsageError(f"{name} must be that of the adapter to begin from ({value}), got {getattr(streaming, name)}")
    elif streaming.draft_vocab_size:
        seen = len(np.unique(answers.emitted()))
        streaming = replace(streaming, draft_vocab_size=min(streaming.draft_vocab_size, seen))
        draft_ids = draft_vocabulary(answers, streaming.draft_vocab_size)
    else:
        draft_ids = None
    adapter = new_adapter(base.model, streaming, base.tokenizer, draft_ids).to(base.model.device)
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


def _evaluate(runner: StreamRunner, drafter: Drafter, held_out: FeatureStore, accelerator: Accelerator) -> Foretold:
    """What the decode loop would make of the adapter; each process walks along its part of the held-out answers."""
    whose = accelerator.process_index, accelerator.num_processes
    counts = walk_along(runner, drafter, held_out, runner.adapter.config.tree_nodes, *whose)
    return Foretold.of(accelerator.reduce(counts, "sum"))


def _same(here: torch.device, there: torch.device) -> bool:
    """Whether two devices are one: a GPU without a number is the current one, and there is one CPU, whatever its number."""
    if here.type != "cuda" or there.type != "cuda":
        return here.type == there.type
    return len({torch.cuda.current_device() if device.index is None else device.index for device in (here, there)}) == 1


def _lower(progress: Progress, out: Path) -> str:
    """What to do about a training that has gone astray; the best adapter so far, if there is one, is in `out`."""
    begin = f", with --begin-from {out}" if progress.best else ""
    return f"try a lower learning rate in another folder{begin}"


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


