"""Training: the streams learn the base's own next-token distributions.

Knows: the loss, the order in which answers are visited, checkpoints, and how acceptance is foretold on
held-out answers. Does not know: where answers come from, or how generation uses the adapter.

For a position t of an answer, stream j is to say what the base says after x_{t+j}:

    loss = sum_j 0.8^(j-1) KL( p_base(. | x_<=t+j) || q_j(. | S[t, <=j], x_t+1 .. x_t+j) )

over the draft vocabulary, the targets being the base's probabilities at temperature 1 from its own
hidden states. Only the adapter has gradients.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .adapter import StreamAdapter
from .config import StreamingConfig
from .draft import Drafter
from .errors import UsageError
from .features import Block, Features, FeatureStore, make_block
from .generate import new_adapter
from .models import Base, differentiable, fingerprint, fingerprint_differences
from .storage import append_jsonl, read_jsonl, versions, write_json
from .streams import StreamRunner

_STREAM_DECAY = 0.8
_LENGTH_WINDOW = 24  # batches whose answers are sorted by length, so that little of each is padding


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to learn. A step visits `answers_per_step` runs of `positions_per_answer` positions."""

    steps: int = 900
    answers_per_step: int = 8
    positions_per_answer: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    max_grad_norm: float = 1.0
    held_out: int = 24
    eval_every: int = 100
    checkpoint_every: int = 50
    feature_memory_gb: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "answers_per_step", "positions_per_answer", "held_out", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise UsageError(f"learning_rate must be above 0, got {self.learning_rate}")


class StreamLoss(nn.Module):
    """The loss of a block; its parameters are the adapter's."""

    def __init__(self, runner: StreamRunner, drafter: Drafter) -> None:
        super().__init__()
        self.adapter = runner.adapter
        self._base = (runner, drafter)  # in a tuple: not to be registered as submodules

    def forward(self, block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the loss, and for each stream its KL and how often its best token is the base's."""
        runner, drafter = self._base
        transition, gamma = self.adapter.transition, self.adapter.config.num_streams
        streams = runner.speculate(block.entry, block.positions, block.context, block.rows)  # [b, p, gamma, dim]
        with torch.no_grad():  # a target serves every stream that foretells it
            target_logits = drafter.logits(block.final)  # [b, p + gamma - 1, draft vocabulary]
        count = streams.shape[1]
        r = transition.begin(streams[:, :, 0])
        losses, agreements = [], []
        for j in range(1, gamma + 1):
            stream, valid = streams[:, :, j - 1], block.valid[:, :, j - 1]
            r = transition.advance(r, drafter.embed(block.tokens[:, :, j - 1]), stream, j)
            logits = drafter.logits(transition.adjust(stream, r)[valid])  # [n, draft vocabulary]
            target = target_logits[:, j - 1 : j - 1 + count][valid]
            divergence = F.kl_div(
                F.log_softmax(logits, dim=-1), F.log_softmax(target, dim=-1), reduction="sum", log_target=True
            )
            learnt = max(len(logits), 1)  # none, if every answer of the block ends before
            losses.append(divergence / learnt)
            agreements.append((logits.argmax(-1) == target.argmax(-1)).float().sum() / learnt)
        weights = torch.tensor([_STREAM_DECAY**j for j in range(gamma)], device=losses[0].device)
        each = torch.stack(losses)
        return (each * weights).sum() / weights.sum(), each.detach(), torch.stack(agreements)


def draft_vocabulary(records: list[dict[str, Any]], size: int) -> torch.Tensor:
    """The `size` tokens that the base emits most, in the order of their ids; more frequent or lower ids win."""
    counts = Counter(token for record in records for token in record["answer_ids"])
    best = sorted(counts, key=lambda token: (-counts[token], token))[:size]
    return torch.tensor(sorted(best), dtype=torch.long)


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


def train(base: Base, data: str | Path, out: str | Path, streaming: StreamingConfig, config: TrainConfig) -> dict[str, Any]:
    """Train an adapter on the answers in `data` and save it into `out`.

    `out/checkpoint.pt` is renewed every `checkpoint_every` steps and on Ctrl-C; the same command goes on
    from it. `out/curve.jsonl` holds loss and acceptance as they came.

    Returns:
        The summary that is also written to `out/training.json`.

    Raises:
        UsageError: no answers, answers of another base, another configuration than the checkpoint's, or
            a loss that is no number (the last checkpoint stays).
    """
    out = Path(out)
    accelerator = Accelerator()
    records, provenance = _read_answers(base, Path(data), streaming.num_streams)
    held_out, records = _split(records, config)
    if streaming.draft_vocab_size:
        seen = len({token for record in records for token in record["answer_ids"]})
        streaming = StreamingConfig(**(asdict(streaming) | {"draft_vocab_size": min(streaming.draft_vocab_size, seen)}))
    torch.manual_seed(config.seed)
    draft_ids = draft_vocabulary(records, streaming.draft_vocab_size) if streaming.draft_vocab_size else None
    base.model.to(accelerator.device)
    adapter = new_adapter(base.model, streaming, base.tokenizer, draft_ids).to(accelerator.device)
    adapter.base["name"] = base.name
    runner = StreamRunner(base.model, adapter)
    drafter = Drafter(adapter, base.model.get_input_embeddings(), base.model.get_output_embeddings())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, config))
    loss_module, optimizer = accelerator.prepare(StreamLoss(runner, drafter), optimizer)
    settings = json.loads(json.dumps({"streaming": streaming.to_dict(), "train": asdict(config)}))
    step = _resume(out, settings, adapter, optimizer, schedule)

    store = FeatureStore(runner, records, config.feature_memory_gb)
    held_store = FeatureStore(runner, held_out, config.feature_memory_gb)
    tokens = sum(len(r["answer_ids"]) for r in records)
    if accelerator.is_main_process:
        print(
            f"{len(records)} answers, {tokens} tokens; {adapter.parameter_count():,} trained parameters; "
            f"{len(held_out)} answers held out"
        )
    bar = tqdm(total=config.steps, initial=step, desc="training", disable=not accelerator.is_main_process)
    lengths = [len(r["prompt_ids"]) + len(r["answer_ids"]) for r in records]
    per_epoch = len(batches(lengths, config, 0))
    with append_jsonl(_made(out) / "curve.jsonl") as log, bar, differentiable(base.model), runner.installed():
        try:
            while step < config.steps:
                # processes walk one order side by side
                visit = step * accelerator.num_processes + accelerator.process_index
                numbers = batches(lengths, config, visit // per_epoch)[visit % per_epoch]
                block = _block(store.get(numbers), config, streaming.num_streams, runner, visit)
                loss, each, agreement = loss_module(block)
                value = loss.item()
                if not math.isfinite(value):
                    raise UsageError(
                        f"the loss is {value} at step {step}: training stopped, the checkpoint of step "
                        f"{step - step % config.checkpoint_every} is in {out}; try a lower learning rate"
                    )
                optimizer.zero_grad()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(adapter.parameters(), config.max_grad_norm)
                optimizer.step()
                schedule.step()
                step += 1
                bar.update()
                bar.set_postfix(loss=f"{value:.3f}", agree="/".join(f"{a:.2f}" for a in agreement.tolist()))
                entry = {"step": step, "loss": round(value, 4), "kl": _rounded(each), "agreement": _rounded(agreement)}
                if step % config.eval_every == 0 or step == config.steps:
                    entry["acceptance_length"] = foretell_acceptance(runner, drafter, held_store, streaming.tree_nodes)
                    bar.write(f"step {step}: loss {value:.3f}, held-out acceptance length {entry['acceptance_length']}")
                if accelerator.is_main_process:
                    log(entry)
                    if step % config.checkpoint_every == 0 or step == config.steps:
                        _save_checkpoint(out, settings, step, adapter, optimizer, schedule)
        except KeyboardInterrupt:
            if accelerator.is_main_process:
                _save_checkpoint(out, settings, step, adapter, optimizer, schedule)
                bar.write(f"stopped at step {step}; the same command goes on from there")
            raise
    summary = settings | {
        "model": base.name,
        "data": provenance,
        "answers": len(records),
        "answer_tokens": tokens,
        "trained_parameters": adapter.parameter_count(),
        "device": str(accelerator.device),
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "versions": versions(),
        "acceptance_length": next(
            (e["acceptance_length"] for e in reversed(read_jsonl(out / "curve.jsonl")) if "acceptance_length" in e), None
        ),
    }
    if accelerator.is_main_process:
        adapter.save_pretrained(out)
        write_json(out / "training.json", summary)
    return summary


def foretell_acceptance(runner: StreamRunner, drafter: Drafter, store: FeatureStore, tree_nodes: int) -> float:
    """Emitted tokens per pass that the decode loop would reach on stored answers, by drafting along them."""
    tokens = passes = 0
    gamma = runner.adapter.config.num_streams
    with torch.no_grad():
        for number in range(len(store.records)):
            features = store.get([number])
            text, t = features[0].ids.tolist(), features[0].prompt - 1
            count = len(text) - 1 - t
            block = make_block(features, [t], count, gamma, _first_top(runner), runner.model.dtype)
            streams = runner.speculate(block.entry, block.positions, block.context, block.rows)[0]
            offset = t
            while t + 2 < len(text):  # x_{t+1} is certain; draft what follows it
                [tree] = drafter.trees(streams[None, t - offset], [text[t + 1]], tree_nodes, [None])
                node, ahead = tree.child(0, text[t + 2]), t + 2
                while node is not None and ahead + 1 < len(text):
                    ahead += 1
                    node = tree.child(node, text[ahead])
                tokens, passes, t = tokens + ahead - t - 1, passes + 1, ahead - 1
    return round(tokens / max(passes, 1), 3)


def _block(features: list[Features], config: TrainConfig, gamma: int, runner: StreamRunner, visit: int) -> Block:
    """A run of positions of each answer, from a random one on; a short answer gives all that it has."""
    rng = random.Random(f"{config.seed}/block {visit}")
    starts = []
    for f in features:
        first, last = f.prompt - 1, len(f.ids) - 2 - config.positions_per_answer
        starts.append(rng.randint(first, max(first, last)))
    count = max(min(config.positions_per_answer, len(f.ids) - 2 - start) for f, start in zip(features, starts, strict=True))
    return make_block(features, starts, max(count, 1), gamma, _first_top(runner), runner.model.dtype)


def _first_top(runner: StreamRunner) -> int:
    return len(runner.layers) - len(runner.top)


def _warm_cosine(step: int, config: TrainConfig) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(v, 4) for v in values.tolist()]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _read_answers(base: Base, folder: Path, gamma: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Answers long enough to learn from, and where they came from."""
    if not (folder / "answers.jsonl").is_file():
        raise UsageError(f"no answers in {folder}: make some with 'lossless distill --out {folder}'")
    provenance = json.loads((folder / "distill.json").read_text(encoding="utf-8"))
    if differing := fingerprint_differences(provenance["fingerprint"], fingerprint(base.model, base.tokenizer)):
        raise UsageError(f"the answers in {folder} are another base's (other {', '.join(differing)})")
    # one position needs a certain token, and one after it to draft
    records = [r for r in read_jsonl(folder / "answers.jsonl") if len(r["answer_ids"]) >= 3]
    provenance.pop("fingerprint")
    return records, provenance


def _split(records: list[dict[str, Any]], config: TrainConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if len(records) < config.held_out + config.answers_per_step:
        raise UsageError(
            f"training needs at least held_out + answers_per_step = {config.held_out + config.answers_per_step} "
            f"answers of three tokens or more, got {len(records)}"
        )
    order = sorted(records, key=lambda r: r["id"])
    random.Random(config.seed).shuffle(order)
    return order[: config.held_out], order[config.held_out :]


def _save_checkpoint(
    out: Path, settings: dict[str, Any], step: int, adapter: StreamAdapter, optimizer: Any, schedule: Any
) -> None:
    staging = out / "checkpoint.pt.part"
    torch.save(
        {"settings": settings, "step": step, "adapter": adapter.state_dict(),
         "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()},
        staging,
    )  # fmt: skip
    os.replace(staging, out / "checkpoint.pt")


def _resume(out: Path, settings: dict[str, Any], adapter: StreamAdapter, optimizer: Any, schedule: Any) -> int:
    """Take up the checkpoint in `out`, if there is one; returns the step to go on from."""
    path = out / "checkpoint.pt"
    if not path.is_file():
        return 0
    checkpoint = torch.load(path, map_location=adapter.stream_embeddings.device, weights_only=True)
    if checkpoint["settings"] != settings:
        raise UsageError(f"{out} holds a checkpoint of other settings: use them again to go on, or another folder")
    adapter.load_state_dict(checkpoint["adapter"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    schedule.load_state_dict(checkpoint["schedule"])
    return int(checkpoint["step"])
