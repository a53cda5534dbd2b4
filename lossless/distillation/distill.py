"""Self-distillation data: the frozen model's own answers to many prompts.

Knows: a folder that several processes fill and that can be taken up again after an interruption, and how the model
draws prompts itself. Does not know: how a conversation goes on (conversations.py), how a batch is decoded, adapters, or
training. It stores token ids only; the base's distributions are computed again when they are learnt from.

A folder holds `distill.json` (what was asked for, of which base), the answers in Arrow shards (answers.py), and
`drawn-<process>.jsonl`, the prompts that the model drew itself, if it did.
"""

from __future__ import annotations

import json
import re
import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..base.fingerprint import fingerprint, fingerprint_differences
from ..base.layers import CACHE, context_limit
from ..base.loading import Base, precision
from ..base.processes import alone_in, free_memory, processes
from ..errors import UsageError
from ..storage import append_jsonl, read_json, read_jsonl, versions, write_json
from ..streams.cache import RowCache
from .answers import Answers, AnswerWriter, mend
from .batching import Job, JobQueue, continue_all
from .config import DistillConfig
from .conversations import Conversations, digest
from .prompts import Prompt, encode_user_opening, from_text, some

_DRAWN_PROMPT_TOKENS = 96
_TRIAL_TOKENS = 3  # of each row of one batch: what the estimate of time goes by
_TOKEN_BYTES = 4
_SUMMARY = ("answers", "answer_tokens", "prompt_tokens", "turns_skipped", "answer_tokens_per_s", "processes")


def eos_ids(base: Base) -> set[int]:
    """Every id that ends an answer of this base."""
    found = base.model.generation_config.eos_token_id
    found = found if found is not None else base.tokenizer.eos_token_id
    return set(found if isinstance(found, list) else [] if found is None else [found])


def distill(
    base: Base, prompts: Sequence[Prompt], config: DistillConfig, folder: str | Path, sources: Sequence[str | Path] = ()
) -> dict[str, Any]:
    """Write answers until there are `config.answer_tokens` of them, or no more prompts.

    Running it again with the same arguments goes on where it stopped: every answer that was whole is kept. More prompts
    may follow those of before. Under `accelerate launch` each process answers its part of the prompts.

    Args:
        sources: where the prompts came from, for the record.

    Returns:
        The summary that is also written into `distill.json`: answers, prompt and answer tokens.

    Raises:
        UsageError: the folder was begun with other settings, prompts or another base, or another process is at work in it; there are
            no prompts, or none that can be answered.
    """
    if not prompts and not config.self_drawn:
        raise UsageError("there are no prompts: name a prompt file, or let the model draw some (self_drawn)")
    limit = context_limit(base.model)
    if limit is not None and config.max_new_tokens >= limit:
        raise UsageError(f"max_new_tokens must be below the model's context of {limit}, got {config.max_new_tokens}")
    with alone_in(Path(folder)), torch.inference_mode():
        return _distill(base, prompts, config, Path(folder), sources)


def _distill(
    base: Base, prompts: Sequence[Prompt], config: DistillConfig, folder: Path, sources: Sequence[str | Path]
) -> dict[str, Any]:
    state = processes()
    settings = {"model": base.name, "config": json.loads(json.dumps(asdict(config)))}
    settings |= {"precision": precision(base.model), "fingerprint": fingerprint(base.model, base.tokenizer)}
    settings["prompts"] = {"sources": list(map(str, sources)), "count": len(prompts), "digest": digest(prompts)}
    if state.is_main_process:
        _check_same_job(_written(folder), folder, settings, prompts)
        Answers.read(folder).check_ids(base.vocabulary, str(folder))  # a shard that is damaged is not written anew
        mend(folder)
        _drawn(folder)  # what is broken is told before anything is written
    state.wait_for_everyone()
    before, done = _written(folder), Answers.read(folder)
    missing = -(-max(0, config.answer_tokens - sum(done.lengths("answer_ids"))) // state.num_processes)  # of each, rounded up
    if not missing and before.get("complete"):
        if state.is_main_process:
            print(f"nothing is missing in {folder}")
        return {name: before[name] for name in _SUMMARY}
    state.wait_for_everyone()
    if state.is_main_process:
        write_json(folder / "distill.json", settings | {"versions": versions(), "complete": False})
        turns = sum(min(config.max_turns, 1 + len(prompt.from_the_start()[1])) for prompt in prompts) + config.self_drawn
        most = (turns - len(done)) * config.max_new_tokens // state.num_processes
        print(_estimate(base, config, max(1, min(missing, most)), state.num_processes))
    if config.self_drawn:
        prompts = [*_draw_prompts(base, config, folder), *prompts]

    talks = Conversations(base, prompts, config, done)
    queue = JobQueue(talks.opening_jobs(state.process_index, state.num_processes))
    started, fresh = time.monotonic(), 0
    bar = tqdm(total=missing, unit="tok", desc="answers", disable=not state.is_main_process)
    with AnswerWriter(folder, state.process_index, settings | {"versions": versions()}) as writer, bar:
        decoding = continue_all(
            base.model, queue, eos_ids=eos_ids(base), batch_size=config.batch_size, max_new_tokens=config.max_new_tokens,
            generator=torch.Generator(base.model.device).manual_seed(config.seed + len(done) + state.process_index),
        )  # fmt: skip
        with decoding as answers:
            while fresh < missing and (answered := next(answers, None)):
                job, answer = answered
                writer.write(talks.record(job, answer))
                if following := talks.go_on(job, answer):
                    queue.put(following)
                fresh += len(answer)
                bar.update(len(answer))
    state.wait_for_everyone()
    seconds, done = time.monotonic() - started, Answers.read(folder)
    told = gather_object([(talks.skipped, fresh)])
    skipped, fresh = [reason for reasons, _ in told for reason in reasons], sum(count for _, count in told)
    summary = {
        "answers": len(done),
        "answer_tokens": sum(done.lengths("answer_ids")),
        "prompt_tokens": sum(done.lengths("prompt_ids")),
        "turns_skipped": len(skipped),
        "answer_tokens_per_s": round(fresh / max(seconds, 1e-9), 1) if fresh else before.get("answer_tokens_per_s", 0.0),
        "processes": state.num_processes,
    }
    if not done:
        raise UsageError(f"not one of {len(prompts)} prompts could be answered ({some(skipped)})")
    if state.is_main_process:
        write_json(folder / "distill.json", settings | {"versions": versions(), "complete": True, **summary})
        if skipped:
            warnings.warn(f"{len(skipped)} turns of conversations were skipped ({some(skipped)})", stacklevel=2)
    return summary


def _written(folder: Path) -> dict[str, Any]:
    """What the folder says of itself; nothing, if it is not begun."""
    path = folder / "distill.json"
    return read_json(path) if path.is_file() else {}


def _check_same_job(before: dict[str, Any], folder: Path, settings: dict[str, Any], prompts: Sequence[Prompt]) -> None:
    if not before:
        return
    kinds: dict[str, Any] = {"fingerprint": dict, "config": dict, "prompts": dict}
    kinds |= dict.fromkeys(_SUMMARY if before.get("complete") else (), int | float)
    if broken := [name for name, kind in kinds.items() if not isinstance(before.get(name), kind)]:
        raise UsageError(f"{folder / 'distill.json'} is broken ({', '.join(broken)}): use another folder, or put a whole copy in its place")
    other = fingerprint_differences(before["fingerprint"], settings["fingerprint"])
    # asking for more tokens than before goes on with the same data, and so do batches that fit into memory
    differing = [k for k in settings["config"] if k not in ("answer_tokens", "batch_size") and before["config"].get(k) != settings["config"][k]]
    if before.get("precision", settings["precision"]) != settings["precision"]:
        differing.append("precision")
    asked, count = before["prompts"], before["prompts"].get("count")
    if type(count) is not int or not 0 <= count <= len(prompts) or digest(prompts[:count]) != asked.get("digest"):
        differing.append("prompts")
    if other or differing:
        raise UsageError(
            f"{folder} was begun with other settings ({', '.join(differing + other)}): "
            "use them again to go on, or another folder to start anew"
        )


def _estimate(base: Base, config: DistillConfig, tokens: int, processes: int) -> str:
    """What lies ahead, from a trial of a few tokens; each answer is taken to be as long as its prompt."""

    def trial(count: int) -> float:
        jobs = [Job(str(i), [1 + i % 7], 0.0) for i in range(config.batch_size)]
        started = time.monotonic()
        with continue_all(
            base.model, JobQueue(jobs), eos_ids=set(), batch_size=config.batch_size, max_new_tokens=count,
            generator=torch.Generator(base.model.device),
        ) as answers:  # fmt: skip
            deque(answers, maxlen=0)
        return time.monotonic() - started

    gigabytes = _batch_gb(base, config)  # before there is a batch of that size
    trial(1)  # the first passes of a program are slow
    tokens_to_draw = config.self_drawn * _DRAWN_PROMPT_TOKENS // processes
    seconds = (2 * tokens + tokens_to_draw) * trial(_TRIAL_TOKENS) / (_TRIAL_TOKENS * config.batch_size)
    disk = tokens * processes * 2 * _TOKEN_BYTES
    return (
        f"{tokens * processes:,} answer tokens to go at most: about {_duration(seconds)}, longer where texts are long, "
        f"{disk / 2**20:,.1f} MB of disk, and up to {gigabytes:.1f} GB of memory for keys and values"
    )


def _batch_gb(base: Base, config: DistillConfig) -> float:
    """GiB that keys and values of a full batch take where its texts are as long as they may be.

    Raises:
        UsageError: more than there is.
    """
    cache = RowCache(base.model.config.get_text_config().num_hidden_layers, capacity=1)
    base.model(input_ids=torch.ones(1, 1, dtype=torch.long, device=base.model.device), use_cache=True, **{CACHE: cache})
    row = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.rows if layer.is_initialized)
    each, free = row * (config.max_prompt_tokens + config.max_new_tokens) / 2**30, free_memory(base.model.device)
    if each * config.batch_size > free:
        raise UsageError(
            f"batch_size must be at most {max(1, int(free / each))} here, got {config.batch_size}: keys and values of a text take up "
            f"to {each:.2g} GB, and {free:.1f} GB are free"
        )
    return each * config.batch_size


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def _draw_prompts(base: Base, config: DistillConfig, folder: Path) -> list[Prompt]:
    """Prompts out of the model itself: its chat template opened at the user's turn, at temperature 1. Each process
    draws its part, and all of them get all."""
    state, have = processes(), {record["id"] for record in _drawn(folder)}
    state.wait_for_everyone()  # nobody writes before all have read
    opening, closing = encode_user_opening(base.tokenizer)
    names = [f"drawn-{i}" for i in range(state.process_index, config.self_drawn, state.num_processes)]
    jobs = (Job(name, opening, 1.0) for name in names if name not in have)
    bar = tqdm(total=len(names), initial=len(have & set(names)), unit="prompt", desc="prompts drawn", disable=not state.is_main_process)
    drawing = continue_all(
        base.model, JobQueue(jobs), eos_ids=eos_ids(base), batch_size=config.batch_size, max_new_tokens=_DRAWN_PROMPT_TOKENS,
        generator=torch.Generator(base.model.device).manual_seed(config.seed + len(have) + state.process_index),
    )  # fmt: skip
    with append_jsonl(folder / f"drawn-{state.process_index:03d}.jsonl") as write, bar, drawing as answers:
        for job, ids in answers:
            write({"id": job.id, "prompt": _closed(base, ids, closing)})
            bar.update()
    state.wait_for_everyone()
    found = sorted(_drawn(folder), key=lambda record: int(record["id"].split("-")[1]))
    if state.is_main_process and (endless := sum(not record["prompt"] for record in found)):
        print(f"{endless} of {len(found)} drawn prompts had no end within {_DRAWN_PROMPT_TOKENS} tokens, and are left out")
    return [from_text(record["prompt"], record["id"]) for record in found if record["prompt"]]


def _closed(base: Base, ids: list[int], closing: str) -> str:
    """The user's turn that these tokens hold; nothing, if it does not come to its end."""
    if ids[-1] in eos_ids(base):
        return str(base.tokenizer.decode(ids[:-1], skip_special_tokens=True)).strip()
    said, end, _ = str(base.tokenizer.decode(ids, skip_special_tokens=False)).partition(closing or "\0")
    return said.strip() if end else ""  # what follows would be the answer


def _drawn(folder: Path) -> list[dict[str, Any]]:
    """Raises UsageError for a line that is no drawn prompt."""
    found = [record for path in sorted(folder.glob("drawn-*.jsonl")) for record in read_jsonl(path)]
    for record in found:
        if not isinstance(record.get("prompt"), str) or not re.fullmatch(r"drawn-\d+", str(record.get("id"))):
            raise UsageError(f"drawn prompts in {folder} are broken: a line must hold an id, drawn-<number>, and a prompt, got {str(record)[:80]}")
    return found
