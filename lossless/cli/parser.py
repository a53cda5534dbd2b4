"""The command line: `lossless generate | compare | bench | verify | forecast | doctor | memory | distill | train | ablate | push`.

Knows: flags and exit codes (0 done, 2 bad input, 3 tokens differ, 4 drafts are not what training simulated, 130 Ctrl-C).
Does not know: what a command does (commands.py, training.py).
"""

from __future__ import annotations

import argparse
import errno
import inspect
import os
import re
import sys
import warnings
from dataclasses import is_dataclass
from typing import Any

import torch
import transformers

from ..adapter.config import AdapterConfig, DraftConfig
from ..distillation.config import DistillConfig
from ..errors import UsageError
from ..evaluation.memory import Trial
from ..evaluation.sides import ACCELERATED, ALL, COMPILING, LLAMA_CPP, SIDES, STOCK
from ..evaluation.suites import FOLDER_VARIABLE, SUITES
from ..storage import versions
from ..training.ablation import VARIANTS
from ..training.config import TrainConfig
from . import commands, training
from .flags import Parser

# a variant of an ablation in a few minutes on two cores: many small steps learn fastest at first
_SMALL_SHAPE = AdapterConfig(4, 4, lora_rank=32, transition_rank=256, next_token_rank=0, drafting=DraftConfig(schedule="parallel"))
_SMALL_TRAINING = TrainConfig(steps=300, answers_per_step=8, eval_every=300, checkpoint_every=50, held_out=32)
_FORMER = {"--told-rank": "--next-token-rank", "--start-rank": "--init-rank", "--share": "--data-fraction"}  # flags of before, for a release
_PROMPTS = "JSONL, JSON, CSV, Parquet, Arrow, a folder for datasets, or a data set's hub id; plain, alpaca, chat or ShareGPT records"


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    transformers.logging.set_verbosity_error()
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # what it logs of a broken file is in the one line, too
    with warnings.catch_warnings():
        warnings.showwarning = _one_line_warning
        try:
            arguments = _parser().parse_args(_renamed(sys.argv[1:] if argv is None else argv))
            return int(arguments.run(arguments))
        except UsageError as error:
            print(f"lossless: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            if error.errno == errno.ENOSPC:
                print("lossless: the disk is full; what was whole is kept, and with more room the same command goes on", file=sys.stderr)
            else:  # a place that cannot be read or written
                place = f"{error.filename}: " if error.filename is not None else ""
                print(f"lossless: {place}{error.strerror or ' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except (torch.OutOfMemoryError, MemoryError) as error:
            print(
                f"lossless: out of memory ({str(error).splitlines()[0] if str(error) else 'the machine has no more'}); what was done is "
                "kept. Less is needed with a lower --batch-size (distill), --feature-memory-gb and --logits-memory-gb (train, ablate), "
                "or, in another folder, with a lower --answers-per-step or --load-in 4bit",
                file=sys.stderr,
            )
            return 2
        except KeyboardInterrupt:
            print("lossless: interrupted; what was done is kept", file=sys.stderr)
            return 130
        finally:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def _renamed(argv: list[str]) -> list[str]:
    """With the names that flags have now."""
    found = []
    for word in argv:
        flag, given, value = word.partition("=")
        if flag in _FORMER:
            warnings.warn(f"{flag} is now {_FORMER[flag]}", stacklevel=2)
        found.append(_FORMER.get(flag, flag) + given + value)
    return found


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"lossless: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lossless", description="Faster answers from a frozen chat model, token for token the same.")
    parser.add_argument("--version", action="version", version=" ".join(f"{k} {v}" for k, v in versions().items()))
    verbs = parser.add_subparsers(title="commands", required=True)

    command = verbs.add_parser("generate", help="answer one prompt, accelerated")
    _model_flags(command)
    _adapter_flags(command)
    _decoding_flags(command)
    command.add_argument("--prompt", required=True, help="what to ask")
    command.set_defaults(run=commands.generate)

    command = verbs.add_parser("compare", help="answer one prompt plain and accelerated, and compare tokens and speed")
    _model_flags(command)
    _adapter_flags(command)
    _decoding_flags(command)
    command.add_argument("--prompt", required=True, help="what to ask")
    command.add_argument("--json", metavar="OUT", help="write the report here")
    command.set_defaults(run=commands.compare)

    command = verbs.add_parser("bench", help="compare over a suite or a file of prompts")
    _model_flags(command)
    _adapter_flags(command)
    _decoding_flags(command, None)
    asked = command.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompts", nargs="+", metavar="FILE", help=_PROMPTS)
    asked.add_argument("--suite", choices=tuple(SUITES), help="prompts by name; the files of public benchmarks are looked up in --suites")
    command.add_argument("--suites", metavar="FOLDER", help=f"where the files of public benchmarks lie; ${FOLDER_VARIABLE} by default")
    command.add_argument("--limit", type=int, metavar="N", help="the first N prompts of each file, or N spread evenly over a suite")
    command.add_argument("--sides", nargs="+", metavar="NAME", default=[STOCK, ACCELERATED],
                         help=f"what is measured, of {', '.join(SIDES)}; {ALL} is all but {' and '.join(COMPILING)}, which take minutes ({STOCK} {ACCELERATED})")  # fmt: skip
    command.add_argument("--gguf", metavar="FILE", help=f"the same model for {LLAMA_CPP}")
    command.add_argument("--beside", type=int, default=0, metavar="N", help="beside N other processes that never rest, as on a machine in use (%(default)s)")
    command.add_argument("--plain", action=argparse.BooleanOptionalAction, default=True,
                         help=f"with {STOCK}, to compare; or measure acceptance only")  # fmt: skip
    command.add_argument("--json", metavar="OUT", help="write the report here; after an interruption the same command goes on")
    command.add_argument("--plot", metavar="OUT.png", help="draw the report here")
    command.set_defaults(run=commands.bench)

    command = verbs.add_parser("verify", help="check every token of accelerated answers against the plain base")
    _model_flags(command)
    _adapter_flags(command)
    _decoding_flags(command)
    command.add_argument("--prompts", required=True, nargs="+", metavar="FILE", help=_PROMPTS)
    command.add_argument("--limit", type=int, metavar="N", help="the first N prompts of each file only")
    command.add_argument("--json", metavar="OUT", help="write the certificate here; after an interruption the same command goes on")
    command.set_defaults(run=commands.verify)

    command = verbs.add_parser("forecast", help="say what speedup each acceptance length gives on this machine, before any training")
    _model_flags(command)
    _adapter_flags(command)
    command.add_argument("--refresh", action="store_true", help="measure what steps cost anew")
    command.add_argument("--json", metavar="OUT", help="write the forecast here")
    command.add_argument("--plot", metavar="OUT.png", help="draw it here")
    command.set_defaults(run=commands.forecast)

    command = verbs.add_parser("doctor", help="say what this device, dtype and model can do, how exactly, and what steps cost")
    _model_flags(command)
    _adapter_flags(command)
    command.add_argument("--refresh", action="store_true", help="measure what steps cost anew")
    command.set_defaults(run=commands.doctor)

    command = verbs.add_parser("memory", help="compare what plain and accelerated answers take in memory, on the CPU")
    _model_flags(command)
    _adapter_flags(command)
    _config_flags(command, Trial())
    command.add_argument("--json", metavar="OUT", help="write the report here")
    command.set_defaults(run=commands.memory)

    command = verbs.add_parser("distill", help="collect the model's own answers to train on")
    _model_flags(command)
    command.add_argument("--prompts", nargs="+", metavar="FILE", help=_PROMPTS)
    command.add_argument("--limit", type=int, metavar="N", help="the first N prompts of each file only")
    _config_flags(command, DistillConfig())
    command.add_argument("--out", required=True, metavar="FOLDER", help="where the answers go; the same command goes on there")
    command.set_defaults(run=training.distill)

    command = verbs.add_parser("train", help="train an adapter on collected answers")
    _training_flags(command, AdapterConfig(), TrainConfig())
    command.set_defaults(run=training.train)

    command = verbs.add_parser("ablate", help="train variants of the method on the same answers, and compare them")
    command.add_argument("--only", nargs="+", metavar="NAME", choices=[v.name for v in VARIANTS], help="these variants only")
    _training_flags(command, _SMALL_SHAPE, _SMALL_TRAINING)
    command.set_defaults(run=training.ablate)

    command = verbs.add_parser("push", help="put a trained adapter on the Hugging Face hub")
    command.add_argument("--adapter", required=True, metavar="FOLDER", help="a folder that train has written")
    command.add_argument("--repo", required=True, help="hub id, owner/name; it is made if it is not there")
    command.add_argument("--private", action="store_true", help="if it is made, for your eyes only")
    command.add_argument("--revision", help="a branch other than main")
    command.set_defaults(run=training.push)
    return parser


def _training_flags(command: argparse.ArgumentParser, shape: AdapterConfig, learning: TrainConfig) -> None:
    _model_flags(command)
    command.add_argument("--data", required=True, nargs="+", metavar="FOLDER", help="folders that distill has written")
    command.add_argument("--out", required=True, metavar="FOLDER", help="where it goes; the same command goes on there")
    command.set_defaults(shape=shape, training=learning)
    _config_flags(command.add_argument_group("shape of the adapter"), shape)
    _config_flags(command.add_argument_group("drafting"), shape.drafting)
    _config_flags(command.add_argument_group("training"), learning)


def _config_flags(group: argparse._ActionsContainer, config: Any) -> None:
    """A flag for each field of a config, with what its docstring says of it. Only what is given is set."""
    meanings = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(type(config)) or "", re.MULTILINE))
    for key, value in vars(config).items():
        if is_dataclass(value):
            continue  # has flags of its own
        how: dict[str, Any] = {"type": type(value)}
        if isinstance(value, bool):
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(value, tuple):
            how = {"type": type(value[0]), "nargs": "+"}
        meaning = " ".join(meanings[key].split()).rstrip(".").replace("%", "%%")
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        told = f"{meaning} ({shown})" if shown else meaning
        group.add_argument(f"--{key.replace('_', '-')}", default=argparse.SUPPRESS, help=told, **how)


def _model_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="demo", help="hub id, local folder, .gguf file, or 'demo' (%(default)s)")
    command.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto (%(default)s)")
    command.add_argument("--load-in", metavar="4bit|8bit", help="quantize while loading, with bitsandbytes")
    command.add_argument("--device", help="a torch device; by default the GPU if there is one")


def _adapter_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--adapter",
        help="folder or hub id of an adapter; 'random' for one of random numbers, which must not change a token; "
        "the demo model brings its own",
    )
    command.add_argument("--pack", action="store_true",
                         help="pack the model's weights in place first: it answers faster by itself, and is what answers are compared with")  # fmt: skip
    command.add_argument("--exact", help="bitwise, near-tie or off; by default what a probe finds: bitwise if it can be had and is worth it")
    command.add_argument("--tree-nodes", type=int, help="most rows of a verification pass; the adapter's own choice by default")
    command.add_argument("--adaptive", action=argparse.BooleanOptionalAction,
                         help="trees that fit what rows cost here, and none while drafts do not pay; or full trees; the adapter's own choice by default")  # fmt: skip
    command.add_argument("--schedule", help="parallel or deferred; the adapter's own choice by default")
    command.add_argument("--pruning-floor", type=float, help="least probability, by the pruning layer, of a node that speculates; the adapter's own choice by default")
    command.add_argument("--recall", action=argparse.BooleanOptionalAction, help="draft from n-grams of the text too, or not; the adapter's own choice by default")


def _decoding_flags(command: argparse.ArgumentParser, max_new_tokens: int | None = 128) -> None:
    """`max_new_tokens` None: a suite says it."""
    shown = "(%(default)s)" if max_new_tokens else "(what the suite says; 128 with --prompts)"
    command.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help=f"tokens of an answer at most {shown}")
    command.add_argument("--do-sample", action="store_true", help="sample instead of taking the likeliest token")
    command.add_argument("--temperature", type=float, default=1.0, help="divides the logits before sampling (%(default)s)")
    command.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that have so much probability (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of every side, anew for each prompt (%(default)s)")
