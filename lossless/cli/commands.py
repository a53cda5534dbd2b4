"""What each command does, given its flags: load, attach, run, report.

Knows: what goes to the terminal and to files, and exit codes. Does not know: anything that a script could not do through
the modules above it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TextStreamer

from ..adapter.compat import new_adapter
from ..adapter.weights import StreamAdapter, push_to_hub
from ..base import kernels
from ..base.layers import depth
from ..base.loading import Base, device_name, free_memory, load_base, precision, processes
from ..base.packed import copied_bytes, is_packed, pack, packed_bytes
from ..config import DistillConfig, StreamingConfig, TrainConfig
from ..distillation.answers import Answers
from ..distillation.distill import distill as collect
from ..distillation.prompts import Prompt, from_text, read_prompts
from ..errors import UsageError
from ..evaluation import bench as benchmark
from ..evaluation.bench_plot import draw
from ..evaluation.certificate import Asked, asked, certify
from ..evaluation.certificate import summary as summarize
from ..evaluation.forecast import Forecast
from ..evaluation.forecast import draw as draw_forecast
from ..evaluation.forecast import table as forecast_table
from ..evaluation.machine import ceiling
from ..evaluation.memory import Trial
from ..evaluation.memory import compare as compare_memory
from ..evaluation.memory import table as memory_table
from ..evaluation.report import categories_table, sides_table
from ..evaluation.sides import STOCK, rivals, wanted
from ..evaluation.suites import SUITES, read_suite
from ..generation.model import OVERRIDES, AcceleratedModel, accelerate
from ..storage import versions, write_json
from ..training.ablation import ablate as compare_variants
from ..training.ablation import table
from ..training.acceptance import TOLERANCE, check_parity
from ..training.card import draw_curve, write_card
from ..training.trainer import train as learn

Config = TypeVar("Config", StreamingConfig, TrainConfig, DistillConfig, Trial)

_CERTIFIED, _CERTIFIED_TOKENS = 4, 64  # held-out prompts that training ends with a certificate of


def shipped_adapter(model: str) -> str | None:
    """The folder of the adapter that the package brings for this model, if it brings one."""
    folder = Path(str(files("lossless"))) / "adapters" / model
    return str(folder) if model == "demo" and folder.is_dir() else None


def _decoding(arguments: argparse.Namespace) -> benchmark.Decoding:
    names = ("max_new_tokens", "do_sample", "temperature", "top_p", "seed")
    return benchmark.Decoding(**{name: getattr(arguments, name) for name in names})


def _load(arguments: argparse.Namespace) -> Base:
    for flag in ("json", "plot"):  # before any work is done
        if (path := getattr(arguments, flag, None)) is not None:
            if not path or Path(path).is_dir():
                raise UsageError(f"--{flag} must name a file, got {path!r}")
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"--{flag} must name a file in a folder that is there or can be made, got {path!r} ({error.strerror})") from error
    base = load_base(arguments.model, arguments.dtype, arguments.load_in, arguments.device)
    if getattr(arguments, "pack", False):
        pack(base.model)
    if not base.tokenizer.chat_template:
        print(f"lossless: note: {base.name} has no chat template: prompts are given to it as plain text", file=sys.stderr)
    return base


def _attach(arguments: argparse.Namespace, base: Base) -> tuple[AcceleratedModel, str]:
    """The accelerated model, and the adapter's name for reports."""
    source: str | StreamAdapter | None = arguments.adapter or shipped_adapter(arguments.model)
    if source == "random":
        source = new_adapter(base.model, StreamingConfig(), base.tokenizer).randomize(0)
    if source is None:
        raise UsageError(f"there is no adapter for {arguments.model!r} in the package: name one with --adapter")
    overrides = {n: getattr(arguments, n) for n in sorted(OVERRIDES) if getattr(arguments, n) is not None}
    fast = accelerate(base.model, source, base.tokenizer, arguments.exact, **overrides)
    return fast, arguments.adapter or "shipped"


def generate(arguments: argparse.Namespace) -> int:
    """Answer one prompt; the statistics go to the error stream."""
    prompt, decoding = from_text(arguments.prompt), _decoding(arguments)
    base = _load(arguments)
    [ids] = benchmark.encode_checked(base, [prompt], decoding)
    fast, _ = _attach(arguments, base)
    torch.manual_seed(decoding.seed)
    streamer = TextStreamer(base.tokenizer, skip_prompt=True, skip_special_tokens=True)
    fast.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **decoding.arguments())
    print(f"\n[{fast.stats}]", file=sys.stderr)
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """One prompt on both sides."""
    prompt, decoding = from_text(arguments.prompt), _decoding(arguments)
    base, fast, name = _both_sides(arguments, [prompt], decoding)
    found = benchmark.bench(base, fast, name, [prompt], decoding, arguments.load_in)
    run = benchmark.Run(**found["runs"][0])
    print(run.answer.strip())
    print(f"\n{_verdict(run)}")
    print(f"plain        {run.baseline_tokens_per_s:8.1f} tokens/s   {found['dtype']}, {found['device']}, {found['threads']} threads")
    print(f"accelerated  {run.tokens_per_s:8.1f} tokens/s   {run.speedup:.2f} times as fast as the stock model.generate of this model")
    print(f"acceptance length {run.acceptance_length:.2f}: {run.tokens} tokens in {run.target_passes} passes after the first")
    if fast.runner is fast.reader and packed_bytes(base.model):  # neither packed in place nor with a twin, and could be
        print("lossless: note: with --pack (lossless.pack) this model answers faster by itself, and drafts pay more; it is the reference then", file=sys.stderr)
    _store(arguments, found)
    return _same(found)


def _verdict(run: benchmark.Run) -> str:
    if run.identical:
        return f"identical: all {run.tokens} tokens are the plain model's own"
    return f"DIFFERENT: the answers part at token {run.first_difference}"


def bench(arguments: argparse.Namespace) -> int:
    """A suite or a file of prompts on every side that is asked for; 3 if a token of the accelerated one is not stock's."""
    names = wanted(arguments.sides)
    prompts, decoding = _asked(arguments)
    base, fast, name = _both_sides(arguments, prompts, decoding)
    others, left_out = rivals(names, base, arguments.load_in, arguments.gguf)
    for side, reason in left_out.items():
        print(f"lossless: note: {side} is left out: {reason}", file=sys.stderr)
    plain, journal = arguments.plain and STOCK in names, _journal(arguments)
    measured = benchmark.bench(base, fast, name, prompts, decoding, arguments.load_in, journal, plain, others)
    found = {"suite": arguments.suite, "left_out": left_out, "machine": ceiling(base)} | measured
    print(f"{categories_table(found)}\n\n{sides_table(found)}")
    print(
        f"\n{found['dtype']}, {found['device']}, {found['threads']} threads, exact: {fast.guarantee.level}, "
        f"trees of {fast.tree_nodes}, {fast.schedule}"
    )
    _store(arguments, found, journal)
    if arguments.plot:
        draw(found, arguments.plot)
        print(f"picture in {arguments.plot}")
    return _same(found)


def _asked(arguments: argparse.Namespace) -> tuple[list[Prompt], benchmark.Decoding]:
    """The prompts of a suite or of files, and what is asked of `generate`."""
    if arguments.plot and Path(arguments.plot).suffix != ".png":
        raise UsageError(f"a picture is written as .png, got {arguments.plot}")
    if not arguments.suite:
        prompts = _prompts(arguments)
    else:
        prompts = read_suite(arguments.suite, arguments.suites, arguments.limit)
    if arguments.max_new_tokens is None:
        arguments.max_new_tokens = SUITES[arguments.suite].max_new_tokens if arguments.suite else benchmark.Decoding().max_new_tokens
    return prompts, _decoding(arguments)


def verify(arguments: argparse.Namespace) -> int:
    """The certificate; 3 if it finds a mismatch."""
    prompts, decoding = _prompts(arguments), _decoding(arguments)
    base, fast, name = _both_sides(arguments, prompts, decoding)
    journal = _journal(arguments)
    found = certify(base, fast, name, asked(base, prompts, decoding), decoding, arguments.load_in, journal)
    print(summarize(found))
    _store(arguments, found, journal)
    return 3 if found["mismatches"] else 0


def forecast(arguments: argparse.Namespace) -> int:
    """What this machine makes of each acceptance length; an adapter need not be trained for it, nor be there."""
    base = _load(arguments)
    if not (arguments.adapter or shipped_adapter(arguments.model)):
        layers = min(arguments.streaming.num_msa_layers, depth(base.model))
        shape = replace(arguments.streaming, num_msa_layers=layers, draft_vocab_size=0)
        fast = accelerate(base.model, new_adapter(base.model, shape, base.tokenizer), base.tokenizer, arguments.exact)
    else:
        fast, _ = _attach(arguments, base)
    found = Forecast(fast.measure_costs() if arguments.refresh else fast.costs, fast.adapter.config.num_streams)
    print(forecast_table(found))
    print(f"\n{precision(base.model)}, {device_name(base.model.device)}, {torch.get_num_threads()} threads, exact: {fast.guarantee.level}")
    if arguments.json:
        about = {"model": base.name, "precision": precision(base.model), "device": device_name(base.model.device),
                 "threads": torch.get_num_threads(), "versions": versions(), "guarantee": fast.guarantee.describe()}  # fmt: skip
        write_json(arguments.json, about | found.to_dict())
    if arguments.plot:
        draw_forecast(found, Path(arguments.plot))
        print(f"picture in {arguments.plot}")
    return 0


def memory(arguments: argparse.Namespace) -> int:
    """What answers take in memory, plain and accelerated, each in a process of its own."""
    trial = _given(arguments, Trial())
    if arguments.device not in (None, "cpu"):
        raise UsageError(f"memory is measured on the CPU, got --device {arguments.device}")
    arguments.device = "cpu"
    base = _load(arguments)  # bad input is told here, not by a process that ends
    places = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if places and trial.context > places:
        raise UsageError(f"context must be at most {places}, the model's, got {trial.context}")
    about = {"model": base.name, "precision": precision(base.model), "packed": arguments.pack, "device": device_name(base.model.device),
             "threads": torch.get_num_threads(), "versions": versions()}  # fmt: skip
    _attach(arguments, base)
    del base
    found = about | compare_memory(partial(_ready, arguments), trial)
    print(memory_table(found))
    _store(arguments, found)
    return 0


def _ready(arguments: argparse.Namespace, side: str) -> tuple[Any, float]:
    """A side of a comparison of memory, and what a twin of it copies, in MiB."""
    base = _load(arguments)
    if side == "plain":
        return base.model, 0.0
    fast, _ = _attach(arguments, base)
    return fast, copied_bytes(fast.runner.model) / 2**20 if fast.runner is not fast.reader else 0.0


def doctor(arguments: argparse.Namespace) -> int:
    """What a probe found on this device, and what steps cost on it."""
    base = _load(arguments)
    fast, name = _attach(arguments, base)
    found = fast.guarantee
    costs = fast.measure_costs() if arguments.refresh else fast.costs
    for key, value in (
        ("versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
        ("model", f"{base.name}, {str(base.model.dtype).removeprefix('torch.')}, {base.model.device}, {torch.get_num_threads()} threads"),
        ("adapter", f"{name}, {fast.adapter.parameter_count():,} weights"),
        ("drafts", f"{fast.schedule}, {'trees that fit, ' if fast.adaptive else ''}of at most {fast.tree_nodes} rows"),
        ("exact", found.level),
        ("packed weights", _packed(fast)),
        ("kernels of our own", "compiled" if kernels.available() else "none: they take gcc"),
        ("noise", f"{found.noise:.2g} logits between passes of different shapes" if found.noise else "not measured"),
        *((f"  {kind}", f"{rows} rows at a time keep their bits") for kind, rows in found.operations.items()),
        ("plain token", f"{1000 * costs.plain_s:.1f} ms"),
        ("pass by rows", ", ".join(f"{rows}: {1000 * seconds:.1f} ms" for rows, seconds in zip(costs.rows, costs.pass_s, strict=True))),
        ("drafting", f"{1000 * costs.streams_s:.1f} ms for streams, {1000 * costs.level_s:.2f} ms for each level of a tree"),
    ):
        print(f"{key:<24}{value}")
    return 0


def _packed(fast: AcceleratedModel) -> str:
    """What computes with packed weights, and what memory that takes."""
    needed = packed_bytes(fast.base) / 2**20
    if is_packed(fast.base):
        return "the model's own"
    if fast.runner is not fast.reader:
        return f"a twin for passes over trees, {copied_bytes(fast.runner.model) / 2**20:.0f} MB beside the model's own weights"
    free = f"{1024 * free_memory(torch.device('cpu')):.0f} MB are free"
    return f"none; a twin would take {needed:.0f} MB, and {free}" if needed else "none: this device and dtype have none"


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    if arguments.limit is not None and arguments.limit < 1:
        raise UsageError(f"limit must be at least 1, got {arguments.limit}")
    return read_prompts(arguments.prompts, arguments.limit)


def _both_sides(
    arguments: argparse.Namespace, prompts: list[Prompt], decoding: benchmark.Decoding
) -> tuple[Base, AcceleratedModel, str]:
    base = _load(arguments)
    benchmark.encode_checked(base, prompts, decoding)  # before any work is done
    fast, name = _attach(arguments, base)
    return base, fast, name


def _journal(arguments: argparse.Namespace) -> Path | None:
    """Where a long measurement keeps what it has until its report is written."""
    return Path(f"{arguments.json}.journal") if arguments.json else None


def _store(arguments: argparse.Namespace, found: dict[str, Any], journal: Path | None = None) -> None:
    """Write the report, if one is asked for; its journal has done its work then."""
    if arguments.json:
        write_json(arguments.json, found)
    if journal:
        journal.unlink(missing_ok=True)


def _same(found: dict[str, Any]) -> int:
    """The exit code; what was not compared has not differed."""
    return 0 if found["identical"] in (found["prompts"], None) else 3


def distill(arguments: argparse.Namespace) -> int:
    """Collect answers."""
    config = _given(arguments, DistillConfig())
    if not arguments.prompts and not config.self_drawn:
        raise UsageError("there is nothing to answer: name --prompts FILE, or --self-drawn N, or both")
    prompts = read_prompts(arguments.prompts, arguments.limit) if arguments.prompts else []
    summary = collect(_load(arguments), prompts, config, arguments.out, arguments.prompts or ())
    if processes().is_main_process:
        print(f"{summary['answers']} answers, {summary['answer_tokens']} tokens in {arguments.out}")
        if summary["answer_tokens"] < config.answer_tokens:
            print(f"the prompts ran out before {config.answer_tokens} answer tokens: more prompts give more", file=sys.stderr)
    return 0


def _configs(arguments: argparse.Namespace) -> tuple[StreamingConfig, TrainConfig]:
    """The command's defaults, with what was given in their place; an adapter that goes on learning has a shape already."""
    streaming, config = arguments.streaming, _given(arguments, arguments.training)
    if config.begin_from:
        streaming = StreamAdapter.from_pretrained(config.begin_from).config
    return _given(arguments, streaming), config


def _given(arguments: argparse.Namespace, config: Config) -> Config:
    return replace(config, **{key: value for key, value in vars(arguments).items() if key in vars(config)})


def ablate(arguments: argparse.Namespace) -> int:
    """Compare variants of the method."""
    if getattr(arguments, "begin_from", ""):
        raise UsageError("an ablation compares adapters of different shapes: they cannot begin from one, leave --begin-from out")
    streaming, config = _configs(arguments)
    report = compare_variants(_load(arguments), arguments.data, arguments.out, streaming, config, arguments.only)
    print(f"\n{table(report)}")
    return 0


def train(arguments: argparse.Namespace) -> int:
    """Train, then measure and certify what was trained; 3 if a token differs, 4 if decoding does not keep what training foretold."""
    streaming, config = _configs(arguments)
    base, out = _load(arguments), Path(arguments.out)
    adapter, held_out, summary = learn(base, arguments.data, out, streaming, config)
    if not processes().is_main_process:
        return 0
    print(f"adapter in {out}: held-out acceptance length {summary['acceptance_length']}")
    parity = check_parity(base, adapter, held_out, config.feature_memory_gb, summary["acceptance_length"])
    write_json(out / "parity.json", parity)
    fast = AcceleratedModel(base.model, adapter)
    certificate = certify(base, fast, str(out), _some(held_out, base), benchmark.Decoding(max_new_tokens=_CERTIFIED_TOKENS), arguments.load_in)
    write_json(out / "certificate.json", certificate)
    draw_curve(out)
    write_card(out, summary, parity, certificate)
    print(
        f"along those answers the saved adapter drafts {parity['read_back']} tokens a pass; on the same prompts the decode loop, "
        f"greedily, accepts {parity['decoded']} where {parity['foretold']} are foretold for what it says"
    )
    print(summarize(certificate))
    if certificate["mismatches"]:
        return 3
    if parity["agrees"]:
        return 0
    print(
        f"lossless: WARNING: the decode loop or the saved adapter disagrees with what was foretold by more than {100 * TOLERANCE:.0f} %: "
        "it does not draft what it was taught to; do not trust its curve",
        file=sys.stderr,
    )
    return 4


def _some(held_out: Answers, base: Base) -> list[Asked]:
    """The first held-out prompts, to be certified."""
    records = [held_out[number] for number in range(min(_CERTIFIED, len(held_out)))]
    return [Asked(r["id"], r["category"], torch.tensor([r["prompt_ids"]], device=base.model.device)) for r in records]


def push(arguments: argparse.Namespace) -> int:
    """Upload an adapter."""
    where = push_to_hub(arguments.adapter, arguments.repo, private=arguments.private, revision=arguments.revision)
    print(f"{arguments.adapter} is at {where}")
    return 0
