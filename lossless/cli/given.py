"""From flags to what they name: models, adapters, prompts, configs, and the files of reports.

Knows: what is checked before any work is done. Does not know: what a command does.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..adapter.compat import new_adapter
from ..adapter.config import AdapterConfig
from ..adapter.hub import shipped_adapter
from ..adapter.weights import StreamAdapter
from ..base.layers import depth
from ..base.loading import Base, load_base
from ..base.packed import pack
from ..distillation.config import DistillConfig
from ..distillation.prompts import Prompt, read_prompts
from ..errors import UsageError
from ..evaluation import bench as benchmark
from ..evaluation.memory import Trial
from ..evaluation.suites import SUITES, read_suite
from ..generation.model import OVERRIDES, AcceleratedModel, accelerate
from ..storage import write_json
from ..training.config import TrainConfig

Config = TypeVar("Config", TrainConfig, DistillConfig, Trial)


def decoding_of(arguments: argparse.Namespace) -> benchmark.Decoding:
    """What is asked of `generate`."""
    names = ("max_new_tokens", "do_sample", "temperature", "top_p", "seed")
    return benchmark.Decoding(**{name: getattr(arguments, name) for name in names})


def load(arguments: argparse.Namespace) -> Base:
    """The base; places of reports are looked at before."""
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


def attach(arguments: argparse.Namespace, base: Base) -> tuple[AcceleratedModel, str]:
    """The accelerated model, and the adapter's name for reports."""
    source: str | StreamAdapter | None = arguments.adapter or shipped_adapter(arguments.model)
    if source == "random":
        source = untrained(base).randomize(0)
    if source is None:
        raise UsageError(f"there is no adapter for {arguments.model!r} in the package: name one with --adapter")
    overrides = {n: getattr(arguments, n) for n in sorted(OVERRIDES) if getattr(arguments, n) is not None}
    fast = accelerate(base.model, source, base.tokenizer, arguments.exact, **overrides)
    return fast, arguments.adapter or "shipped"


def untrained(base: Base) -> StreamAdapter:
    """A fresh adapter of the default shape, as far as the base is deep enough for it."""
    shape = AdapterConfig()
    return new_adapter(base.model, replace(shape, num_msa_layers=min(shape.num_msa_layers, depth(base.model))), base.tokenizer)


def suite_or_file(arguments: argparse.Namespace) -> tuple[list[Prompt], benchmark.Decoding]:
    """The prompts of a suite or of files, and what is asked of `generate`."""
    if arguments.plot and Path(arguments.plot).suffix != ".png":
        raise UsageError(f"a picture is written as .png, got {arguments.plot}")
    if not arguments.suite:
        prompts = named_prompts(arguments)
    else:
        prompts = read_suite(arguments.suite, arguments.suites, arguments.limit)
    if arguments.max_new_tokens is None:
        arguments.max_new_tokens = SUITES[arguments.suite].max_new_tokens if arguments.suite else benchmark.Decoding().max_new_tokens
    return prompts, decoding_of(arguments)


def named_prompts(arguments: argparse.Namespace) -> list[Prompt]:
    """Those of the files that were named."""
    if arguments.limit is not None and arguments.limit < 1:
        raise UsageError(f"limit must be at least 1, got {arguments.limit}")
    return read_prompts(arguments.prompts, arguments.limit)


def journal_of(arguments: argparse.Namespace) -> Path | None:
    """Where a long measurement keeps what it has until its report is written."""
    return Path(f"{arguments.json}.journal") if arguments.json else None


def store(arguments: argparse.Namespace, found: dict[str, Any], journal: Path | None = None) -> None:
    """Write the report, if one is asked for; its journal has done its work then."""
    if arguments.json:
        write_json(arguments.json, found)
    if journal:
        journal.unlink(missing_ok=True)


def training_configs(arguments: argparse.Namespace) -> tuple[AdapterConfig, TrainConfig]:
    """The command's defaults, with what was given in their place; an adapter that goes on learning has a shape already."""
    shape, config = arguments.shape, with_given(arguments, arguments.training)
    if config.begin_from:
        shape = StreamAdapter.from_pretrained(config.begin_from).config
    return shape.changed(**fields_given(arguments, shape, shape.drafting)), config


def with_given(arguments: argparse.Namespace, config: Config) -> Config:
    """A config with what was given in place of its defaults."""
    return replace(config, **fields_given(arguments, config))


def fields_given(arguments: argparse.Namespace, *configs: Any) -> dict[str, Any]:
    """What was given of the fields of these configs."""
    known = {key for config in configs for key in vars(config)}
    return {key: value for key, value in vars(arguments).items() if key in known}
