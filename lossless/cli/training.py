"""The commands that make an adapter: distill, train, ablate, push.

Knows: what goes to the terminal and to files, and exit codes. Does not know: anything that a script could not do through
the modules above it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ..adapter.hub import push_to_hub
from ..adapter.weights import StreamAdapter
from ..base.loading import Base
from ..base.processes import processes
from ..distillation.answers import Answers
from ..distillation.config import DistillConfig
from ..distillation.distill import distill as collect
from ..distillation.prompts import read_prompts
from ..errors import UsageError
from ..evaluation import bench as benchmark
from ..evaluation.certificate import Asked, certify
from ..evaluation.certificate import summary as summarize
from ..evaluation.parity import TOLERANCE, check_parity
from ..generation.model import AcceleratedModel
from ..storage import write_json
from ..training.ablation import ablate as compare_variants
from ..training.ablation import table
from ..training.card import draw_curve, write_card
from ..training.trainer import train as learn
from .given import (
    load,
    training_configs,
    with_given,
)

_CERTIFIED, _CERTIFIED_TOKENS = 4, 64  # held-out prompts that training ends with a certificate of


def distill(arguments: argparse.Namespace) -> int:
    """Collect answers."""
    config = with_given(arguments, DistillConfig())
    if not arguments.prompts and not config.self_drawn:
        raise UsageError("there is nothing to answer: name --prompts FILE, or --self-drawn N, or both")
    prompts = read_prompts(arguments.prompts, arguments.limit) if arguments.prompts else []
    summary = collect(load(arguments), prompts, config, arguments.out, arguments.prompts or ())
    if processes().is_main_process:
        print(f"{summary['answers']} answers, {summary['answer_tokens']} tokens in {arguments.out}")
        if summary["answer_tokens"] < config.answer_tokens:
            print(f"the prompts ran out before {config.answer_tokens} answer tokens: more prompts give more", file=sys.stderr)
    return 0


def ablate(arguments: argparse.Namespace) -> int:
    """Compare variants of the method."""
    if getattr(arguments, "begin_from", ""):
        raise UsageError("an ablation compares adapters of different shapes: they cannot begin from one, leave --begin-from out")
    shape, config = training_configs(arguments)
    report = compare_variants(load(arguments), arguments.data, arguments.out, shape, config, arguments.only)
    print(f"\n{table(report)}")
    return 0


def train(arguments: argparse.Namespace) -> int:
    """Train, then measure and certify what was trained; 3 if a token differs, 4 if decoding does not keep what training simulated."""
    shape, config = training_configs(arguments)
    base, out = load(arguments), Path(arguments.out)
    adapter, held_out, summary = learn(base, arguments.data, out, shape, config)
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
        f"greedily, accepts {parity['decoded']} where {parity['foretold']} are simulated for what it says"
    )
    print(summarize(certificate))
    if certificate["mismatches"]:
        return 3
    if parity["agrees"]:
        return 0
    print(
        f"lossless: WARNING: the decode loop or the saved adapter disagrees with what was simulated by more than {100 * TOLERANCE:.0f} %: "
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
    StreamAdapter.from_pretrained(arguments.adapter)  # whole, or not at all
    where = push_to_hub(arguments.adapter, arguments.repo, private=arguments.private, revision=arguments.revision)
    print(f"{arguments.adapter} is at {where}")
    return 0
