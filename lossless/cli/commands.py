"""The commands that answer and measure: generate, compare, bench, verify, forecast, memory, doctor.

Knows: what goes to the terminal and to files, and exit codes. Does not know: anything that a script could not do through
the modules above it.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from ..adapter.hub import shipped_adapter
from ..base.loading import Base, precision
from ..base.packed import copied_bytes, is_packed, packed_bytes
from ..base.processes import device_name, free_memory
from ..distillation.prompts import Prompt, from_text
from ..errors import UsageError
from ..evaluation import bench as benchmark
from ..evaluation.bench_plot import draw
from ..evaluation.certificate import asked, certify
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
from ..generation.model import AcceleratedModel, accelerate
from ..kernels import native
from ..storage import versions, write_json
from .given import attach, decoding_of, journal_of, load, named_prompts, store, suite_or_file, untrained, with_given


def generate(arguments: argparse.Namespace) -> int:
    """Answer one prompt; the statistics go to the error stream."""
    prompt, decoding = from_text(arguments.prompt), decoding_of(arguments)
    base = load(arguments)
    [ids] = benchmark.encode_checked(base, [prompt], decoding)
    fast, _ = attach(arguments, base)
    torch.manual_seed(decoding.seed)
    streamer = TextStreamer(base.tokenizer, skip_prompt=True, skip_special_tokens=True)
    fast.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **decoding.arguments())
    print(f"\n[{fast.stats}]", file=sys.stderr)
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """One prompt on both sides."""
    prompt, decoding = from_text(arguments.prompt), decoding_of(arguments)
    base, fast, name = _both_sides(arguments, [prompt], decoding)
    found = benchmark.bench(base, fast, name, [prompt], decoding, arguments.load_in)
    run = benchmark.Run(**found["runs"][0])
    print(run.answer.strip())
    print(f"\n{_verdict(run)}")
    print(f"plain        {run.baseline_tokens_per_s:8.1f} tokens/s   {found['dtype']}, {found['device']}, {found['threads']} threads")
    print(f"accelerated  {run.tokens_per_s:8.1f} tokens/s   {run.speedup:.2f} times as fast as the stock model.generate of this model")
    print(f"acceptance length {run.acceptance_length:.2f}: {run.tokens} tokens in {run.target_passes} passes after the first")
    if fast.runner is fast.reader and packed_bytes(base.model):  # neither packed in place nor with a twin, and could be
        print("lossless: note: with --pack (lossless.pack) this model answers faster by itself, and is the reference then", file=sys.stderr)
    if not native.available() and base.model.device.type == "cpu":
        print("lossless: note: there is no gcc on this machine; with it, passes are faster", file=sys.stderr)
    store(arguments, found)
    return _same(found)


def _verdict(run: benchmark.Run) -> str:
    if run.identical:
        return f"identical: all {run.tokens} tokens are the plain model's own"
    return f"DIFFERENT: the answers part at token {run.first_difference}"


def bench(arguments: argparse.Namespace) -> int:
    """A suite or a file of prompts on every side that is asked for; 3 if a token of the accelerated one is not stock's."""
    names = wanted(arguments.sides)
    prompts, decoding = suite_or_file(arguments)
    base, fast, name = _both_sides(arguments, prompts, decoding)
    others, left_out = rivals(names, base, arguments.load_in, arguments.gguf)
    for side, reason in left_out.items():
        print(f"lossless: note: {side} is left out: {reason}", file=sys.stderr)
    plain, journal = arguments.plain and STOCK in names, journal_of(arguments)
    measured = benchmark.bench(base, fast, name, prompts, decoding, arguments.load_in, journal, plain, others, arguments.beside)
    found = {"suite": arguments.suite, "left_out": left_out, "machine": ceiling(base)} | measured
    print(f"{categories_table(found)}\n\n{sides_table(found)}")
    print(
        f"\n{found['dtype']}, {found['device']}, {found['threads']} threads, exact: {fast.guarantee.level}, "
        f"trees of {fast.drafting.tree_nodes}, {fast.drafting.schedule}"
    )
    store(arguments, found, journal)
    if arguments.plot:
        draw(found, arguments.plot)
        print(f"picture in {arguments.plot}")
    return _same(found)


def verify(arguments: argparse.Namespace) -> int:
    """The certificate; 3 if it finds a mismatch."""
    prompts, decoding = named_prompts(arguments), decoding_of(arguments)
    base, fast, name = _both_sides(arguments, prompts, decoding)
    journal = journal_of(arguments)
    found = certify(base, fast, name, asked(base, prompts, decoding), decoding, arguments.load_in, journal)
    print(summarize(found))
    store(arguments, found, journal)
    return 3 if found["mismatches"] else 0


def forecast(arguments: argparse.Namespace) -> int:
    """What this machine makes of each acceptance length; an adapter need not be trained for it, nor be there."""
    base = load(arguments)
    if not (arguments.adapter or shipped_adapter(arguments.model)):
        fast = accelerate(base.model, untrained(base), base.tokenizer, arguments.exact)
    else:
        fast, _ = attach(arguments, base)
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
    trial = with_given(arguments, Trial())
    if arguments.device not in (None, "cpu"):
        raise UsageError(f"memory is measured on the CPU, got --device {arguments.device}")
    arguments.device = "cpu"
    base = load(arguments)  # bad input is told here, not by a process that ends
    places = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if places and trial.context > places:
        raise UsageError(f"context must be at most {places}, the model's, got {trial.context}")
    about = {"model": base.name, "precision": precision(base.model), "packed": arguments.pack, "device": device_name(base.model.device),
             "threads": torch.get_num_threads(), "versions": versions()}  # fmt: skip
    attach(arguments, base)
    del base
    found = about | compare_memory(partial(_ready, arguments), trial)
    print(memory_table(found))
    store(arguments, found)
    return 0


def _ready(arguments: argparse.Namespace, side: str) -> tuple[Any, float]:
    """A side of a comparison of memory, and what a twin of it copies, in MiB."""
    base = load(arguments)
    if side == "plain":
        return base.model, 0.0
    fast, _ = attach(arguments, base)
    return fast, copied_bytes(fast.runner.model) / 2**20 if fast.runner is not fast.reader else 0.0


def doctor(arguments: argparse.Namespace) -> int:
    """What a probe found on this device, and what steps cost on it."""
    base = load(arguments)
    fast, name = attach(arguments, base)
    found = fast.guarantee
    costs = fast.measure_costs() if arguments.refresh else fast.costs
    for key, value in (
        ("versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
        ("model", f"{base.name}, {str(base.model.dtype).removeprefix('torch.')}, {base.model.device}, {torch.get_num_threads()} threads"),
        ("adapter", f"{name}, {fast.adapter.parameter_count():,} weights"),
        ("drafts", f"{fast.drafting.schedule}, {'trees that fit, ' if fast.drafting.adaptive else ''}of at most {fast.drafting.tree_nodes} rows"),
        ("exact", found.level),
        ("packed weights", _packed(fast)),
        ("kernels of our own", "compiled" if native.available() else "none: they take gcc"),
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


def _both_sides(
    arguments: argparse.Namespace, prompts: list[Prompt], decoding: benchmark.Decoding
) -> tuple[Base, AcceleratedModel, str]:
    base = load(arguments)
    benchmark.encode_checked(base, prompts, decoding)  # before any work is done
    fast, name = attach(arguments, base)
    return base, fast, name


def _same(found: dict[str, Any]) -> int:
    """The exit code; what was not compared has not differed."""
    return 0 if found["identical"] in (found["prompts"], None) else 3


