"""The command line: `lossless generate | compare | bench | verify | doctor | distill | train | ablate | push`.

Knows: flags, what goes to the terminal, exit codes (0 done, 2 bad input, 3 tokens differ, 4 drafts are not
what training foretold, 130 Ctrl-C).
Does not know: anything that a script could not do through the modules above it.
"""

from __future__ import annotations

import argparse
import errno
import sys
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from transformers import TextStreamer

from . import bench as benchmark
from .ablation import VARIANTS, ablate, table
from .adapter import StreamAdapter, push_to_hub
from .answers import Answers
from .card import draw_curve, write_card
from .config import StreamingConfig
from .distill import DistillConfig, distill
from .errors import UsageError
from .foretell import TOLERANCE, check_parity
from .generate import OVERRIDES, AcceleratedModel, accelerate, new_adapter
from .models import Base, load_base, processes
from .prompts import Prompt, from_text, read_prompts
from .storage import versions, write_json
from .train import TrainConfig, train
from .verify import Asked, asked, certify
from .verify import summary as summarize

_CERTIFIED, _CERTIFIED_TOKENS = 4, 64  # held-out prompts that training ends with a certificate of
# a variant of an ablation in a few minutes on two cores
_SMALL_STREAMING = StreamingConfig(transition_rank=256, draft_vocab_size=16384, tree_nodes=32)
_SMALL_TRAINING = TrainConfig(steps=150, eval_every=150, checkpoint_every=25, held_out=32)
_PROMPTS = "JSONL, JSON, CSV, Parquet, Arrow, a folder for datasets, or a data set's hub id; plain, alpaca, chat or ShareGPT records"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help tells more)\n")


def shipped_adapter(model: str) -> str | None:
    """The folder of the adapter that the package brings for this model, if it brings one."""
    folder = Path(str(files("lossless"))) / "adapters" / model
    return str(folder) if model == "demo" and folder.is_dir() else None


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.showwarning = _one_line_warning
        try:
            arguments = _parser().parse_args(argv)
            return int(arguments.run(arguments))
        except UsageError as error:
            print(f"lossless: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            print("lossless: the disk is full; what was whole is kept, and with more room the same command goes on", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("lossless: interrupted; what was done is kept", file=sys.stderr)
            return 130
        finally:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"lossless: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lossless", description="Faster answers from a frozen chat model, token for token the same.")
    parser.add_argument("--version", action="version", version=" ".join(f"{k} {v}" for k, v in versions().items()))
    commands = parser.add_subparsers(title="commands", required=True)

    command = commands.add_parser("generate", help="answer one prompt, accelerated")
    _model_flags(command)
    _adapter_flags(command)
    _decoding_flags(command)
    command.add_argument("--prompt", required=True, help="what to ask")
    command.set_defaults(run=_generate)

    command = commands.add_parser("compare", help="answer one prompt plain and accelerated, and compare tokens and speed")
    _model_flags(command)
    _adapter_flags(command)
    _decoding_flags(command)
    command.add_argument("--prompt", required=True, help="what to ask")
    command.add_argument("--json", metavar="OUT", help="write the report here")
    command.set_defaults(run=_compare)

    command = commands.add_parser("bench", help="compare over a file of prompts")
    _model_flags(command)
    _adapter_flags(command)
    _decoding_flags(command)
    command.add_argument("--prompts", required=True, nargs="+", metavar="FILE", help=_PROMPTS)
    command.add_argument("--limit", type=int, metavar="N", help="the first N prompts of each file only")
    command.add_argument("--json", metavar="OUT", help="write the report here")
    command.set_defaults(run=_bench)

    command = commands.add_parser("verify", help="check every token of accelerated answers against the plain base")
    _model_flags(command)
    _adapter_flags(command)
    _decoding_flags(command)
    command.add_argument("--prompts", required=True, nargs="+", metavar="FILE", help=_PROMPTS)
    command.add_argument("--limit", type=int, metavar="N", help="the first N prompts of each file only")
    command.add_argument("--json", metavar="OUT", help="write the certificate here; after an interruption the same command goes on")
    command.set_defaults(run=_verify)

    command = commands.add_parser("doctor", help="say what this device, dtype and model can do, and how exactly")
    _model_flags(command)
    _adapter_flags(command)
    command.set_defaults(run=_doctor)

    command = commands.add_parser("distill", help="collect the model's own answers to train on")
    _model_flags(command)
    defaults = DistillConfig()
    command.add_argument("--prompts", nargs="+", metavar="FILE", help=_PROMPTS)
    command.add_argument("--limit", type=int, metavar="N", help="the first N prompts of each file only")
    command.add_argument("--self-drawn", type=int, default=0, metavar="N", help="let the model draw N prompts itself")
    command.add_argument("--answer-tokens", type=int, default=defaults.answer_tokens, help="stop after so many (%(default)s)")
    command.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, help="of one answer (%(default)s)")
    command.add_argument("--max-turns", type=int, default=defaults.max_turns, help="of a conversation (%(default)s)")
    command.add_argument("--max-prompt-tokens", type=int, default=defaults.max_prompt_tokens, help="longer prompts are skipped (%(default)s)")
    command.add_argument("--temperatures", type=float, nargs="+", default=list(defaults.temperatures), help="used in turn, 0 is greedy (%(default)s)")
    command.add_argument("--batch-size", type=int, default=defaults.batch_size, help="answers at once (%(default)s)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--out", required=True, metavar="FOLDER", help="where the answers go; the same command goes on there")
    command.set_defaults(run=_distill)

    command = commands.add_parser("train", help="train an adapter on collected answers")
    _training_flags(command, StreamingConfig(), TrainConfig())
    command.set_defaults(run=_train)

    command = commands.add_parser("ablate", help="train variants of the method on the same answers, and compare them")
    command.add_argument("--only", nargs="+", metavar="NAME", choices=[v.name for v in VARIANTS], help="these variants only")
    _training_flags(command, _SMALL_STREAMING, _SMALL_TRAINING)
    command.set_defaults(run=_ablate)

    command = commands.add_parser("push", help="put a trained adapter on the Hugging Face hub")
    command.add_argument("--adapter", required=True, metavar="FOLDER", help="a folder that train has written")
    command.add_argument("--repo", required=True, help="hub id, owner/name; it is made if it is not there")
    command.add_argument("--private", action="store_true", help="if it is made, for your eyes only")
    command.add_argument("--revision", help="a branch other than main")
    command.set_defaults(run=_push)
    return parser


def _training_flags(command: argparse.ArgumentParser, streaming: StreamingConfig, training: TrainConfig) -> None:
    _model_flags(command)
    command.add_argument("--data", required=True, metavar="FOLDER", help="a folder that distill has written")
    command.add_argument("--out", required=True, metavar="FOLDER", help="where it goes; the same command goes on there")
    for name, kind in (("streaming", streaming), ("training", training)):
        group = command.add_argument_group(name)
        for key, value in vars(kind).items():
            how: dict[str, Any] = {"type": type(value)}
            if isinstance(value, bool):
                how = {"action": argparse.BooleanOptionalAction}
            group.add_argument(f"--{key.replace('_', '-')}", default=value, help="(%(default)s)", **how)


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
    command.add_argument("--exact", help="bitwise, near-tie or off; by default what a probe finds: bitwise if it can be had and is worth it")
    command.add_argument("--tree-nodes", type=int, help="most rows of a verification pass; the adapter's own choice by default")
    command.add_argument("--tree-floor", type=float, help="least probability of a path that is worth a row; the same")
    command.add_argument("--schedule", help="parallel or deferred; the adapter's own choice by default")
    command.add_argument("--recall", action=argparse.BooleanOptionalAction, help="draft from the text itself too, or not")


def _decoding_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-new-tokens", type=int, default=128, help="(%(default)s)")
    command.add_argument("--do-sample", action="store_true", help="sample instead of taking the likeliest token")
    command.add_argument("--temperature", type=float, default=1.0, help="(%(default)s)")
    command.add_argument("--top-p", type=float, default=1.0, help="(%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of both sides, anew for each prompt (%(default)s)")


def _decoding(arguments: argparse.Namespace) -> benchmark.Decoding:
    names = ("max_new_tokens", "do_sample", "temperature", "top_p", "seed")
    return benchmark.Decoding(**{name: getattr(arguments, name) for name in names})


def _load(arguments: argparse.Namespace) -> Base:
    base = load_base(arguments.model, arguments.dtype, arguments.load_in, arguments.device)
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


def _generate(arguments: argparse.Namespace) -> int:
    prompt, decoding = from_text(arguments.prompt), _decoding(arguments)
    base = _load(arguments)
    [ids] = benchmark.encode_checked(base, [prompt], decoding)
    fast, _ = _attach(arguments, base)
    torch.manual_seed(decoding.seed)
    streamer = TextStreamer(base.tokenizer, skip_prompt=True, skip_special_tokens=True)
    fast.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **decoding.arguments())
    print(f"\n[{fast.stats}]", file=sys.stderr)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    prompt, decoding = from_text(arguments.prompt), _decoding(arguments)
    base, fast, name = _both_sides(arguments, [prompt], decoding)
    run = benchmark.bench(base, fast, [prompt], decoding)[0]
    found = benchmark.report(base, fast, name, arguments.dtype, arguments.load_in, decoding, [run])
    print(run.answer.strip())
    print(f"\n{_verdict(run)}")
    print(f"plain        {run.baseline_tokens_per_s:8.1f} tokens/s   {found['dtype']}, {found['device']}, {found['threads']} threads")
    print(f"accelerated  {run.tokens_per_s:8.1f} tokens/s   {run.speedup:.2f} times as fast")
    print(f"acceptance length {run.acceptance_length:.2f}: {run.tokens} tokens in {run.target_passes} passes after the first")
    return _finish(arguments, found)


def _verdict(run: benchmark.Run) -> str:
    if run.identical:
        return f"identical: all {run.tokens} tokens are the plain model's own"
    return f"DIFFERENT: the answers part at token {run.first_difference}"


def _bench(arguments: argparse.Namespace) -> int:
    prompts, decoding = _prompts(arguments), _decoding(arguments)
    base, fast, name = _both_sides(arguments, prompts, decoding)
    runs = benchmark.bench(base, fast, prompts, decoding)
    found = benchmark.report(base, fast, name, arguments.dtype, arguments.load_in, decoding, runs)
    print(benchmark.table(found))
    print(
        f"\n{found['dtype']}, {found['device']}, {found['threads']} threads, exact: {fast.guarantee.level}, "
        f"trees of {fast.tree_nodes}, {fast.schedule}"
    )
    return _finish(arguments, found)


def _verify(arguments: argparse.Namespace) -> int:
    prompts, decoding = _prompts(arguments), _decoding(arguments)
    base, fast, name = _both_sides(arguments, prompts, decoding)
    journal = Path(f"{arguments.json}.journal") if arguments.json else None
    found = certify(base, fast, name, asked(base, prompts, decoding), decoding, arguments.load_in, journal)
    print(summarize(found))
    if journal:
        write_json(arguments.json, found)
        journal.unlink()
    return 3 if found["mismatches"] else 0


def _doctor(arguments: argparse.Namespace) -> int:
    base = _load(arguments)
    fast, name = _attach(arguments, base)
    found = fast.guarantee
    for key, value in (
        ("versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
        ("model", f"{base.name}, {str(base.model.dtype).removeprefix('torch.')}, {base.model.device}, {torch.get_num_threads()} threads"),
        ("adapter", f"{name}, {fast.adapter.parameter_count():,} weights"),
        ("drafts", f"{fast.schedule}, trees of at most {fast.tree_nodes} rows, none below a probability of {fast.tree_floor:.2g}"),
        ("exact", found.level),
        ("noise", f"{found.noise:.2g} logits between passes of different shapes" if found.noise else "not measured"),
        ("row cost", f"{found.row_cost:.2f} passes for each further row" if found.row_cost else "not measured"),
        *((f"  {kind}", f"{rows} rows at a time keep their bits") for kind, rows in found.operations.items()),
    ):
        print(f"{key:<24}{value}")
    return 0


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


def _finish(arguments: argparse.Namespace, found: dict[str, Any]) -> int:
    if arguments.json:
        write_json(arguments.json, found)
    return 0 if found["identical"] == found["prompts"] else 3


def _distill(arguments: argparse.Namespace) -> int:
    names = ("answer_tokens", "max_new_tokens", "max_prompt_tokens", "max_turns", "batch_size", "self_drawn", "seed")
    config = DistillConfig(
        **{name: getattr(arguments, name) for name in names}, temperatures=tuple(arguments.temperatures)
    )
    if not arguments.prompts and not config.self_drawn:
        raise UsageError("there is nothing to answer: name --prompts FILE, or --self-drawn N, or both")
    prompts = read_prompts(arguments.prompts, arguments.limit) if arguments.prompts else []
    summary = distill(_load(arguments), prompts, config, arguments.out)
    if processes().is_main_process:
        print(f"{summary['answers']} answers, {summary['answer_tokens']} tokens in {arguments.out}")
        if summary["answer_tokens"] < config.answer_tokens:
            print(f"the prompts ran out before {config.answer_tokens} answer tokens: more prompts give more", file=sys.stderr)
    return 0


def _configs(arguments: argparse.Namespace) -> tuple[StreamingConfig, TrainConfig]:
    streaming = StreamingConfig(**{key: getattr(arguments, key) for key in vars(StreamingConfig())})
    return streaming, TrainConfig(**{key: getattr(arguments, key) for key in vars(TrainConfig())})


def _ablate(arguments: argparse.Namespace) -> int:
    streaming, config = _configs(arguments)
    report = ablate(_load(arguments), arguments.data, arguments.out, streaming, config, arguments.only)
    print(f"\n{table(report)}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    streaming, config = _configs(arguments)
    base, out = _load(arguments), Path(arguments.out)
    adapter, held_out, summary = train(base, arguments.data, out, streaming, config)
    if not processes().is_main_process:
        return 0
    print(f"adapter in {out}: held-out acceptance length {summary['acceptance_length']}")
    parity = check_parity(base, adapter, held_out, config.feature_memory_gb)
    write_json(out / "parity.json", parity)
    fast = AcceleratedModel(base.model, adapter)
    certificate = certify(base, fast, str(out), _some(held_out, base), benchmark.Decoding(max_new_tokens=_CERTIFIED_TOKENS), arguments.load_in)
    write_json(out / "certificate.json", certificate)
    draw_curve(out)
    write_card(out, summary, parity, certificate)
    print(f"the decode loop accepts {parity['decoded']} tokens a pass where training foretold {parity['foretold']}")
    print(summarize(certificate))
    if parity["agrees"]:
        return 0
    print(
        f"lossless: WARNING: decoding and training disagree by {100 * parity['difference']:.1f} % (allowed are {100 * TOLERANCE:.0f} %): "
        "the adapter does not draft what it was taught to; do not trust its curve",
        file=sys.stderr,
    )
    return 4


def _some(held_out: Answers, base: Base) -> list[Asked]:
    """The first held-out prompts, to be certified."""
    records = [held_out[number] for number in range(min(_CERTIFIED, len(held_out)))]
    return [Asked(r["id"], r["category"], torch.tensor([r["prompt_ids"]], device=base.model.device)) for r in records]


def _push(arguments: argparse.Namespace) -> int:
    where = push_to_hub(arguments.adapter, arguments.repo, private=arguments.private, revision=arguments.revision)
    print(f"{arguments.adapter} is at {where}")
    return 0
