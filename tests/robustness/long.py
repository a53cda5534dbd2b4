"""Long answers and long prompts, up to the model's context: exact, and in no more memory than foretold.

    python -m tests.robustness.long --json long.json
    python -m tests.robustness.long --model demo --dtype bfloat16

Knows: how long a text may be, what keys and values of it take, and the most that this process ever took. Does not know: how they
are kept.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from tqdm import tqdm

from lossless.adapter.compat import new_adapter
from lossless.adapter.hub import shipped_adapter
from lossless.base.layers import context_limit
from lossless.base.loading import freeze, load_base
from lossless.generation.model import AcceleratedModel, accelerate

from ..conftest import VOCAB, build_tiny, tiny_config
from .report import Tally, own_cache, peak_mib

_SLACK_MIB = 64.0
_COPIES = 2.5  # keys and values grow in steps, and a step holds the old ones and the new


def cases(context: int, answer: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """A name, tokens of the prompt, and arguments of `generate`."""
    for how, options in (("greedy", {"do_sample": False}), ("sampled", {"do_sample": True, "temperature": 0.8})):
        yield f"an answer of {answer}, {how}", 16, {"max_new_tokens": answer, **options}
        yield f"a prompt of {context - 48}, {how}", context - 48, {"max_new_tokens": 48, **options}
    yield f"a prompt of {context}, beyond the context", context, {"max_new_tokens": 8, "do_sample": False}


def try_long(tally: Tally, fast: AcceleratedModel, vocabulary: int, answer: int, seed: int) -> None:
    """Every case on both sides."""
    limit = context_limit(fast.base)
    if limit is None:
        raise SystemExit("long: the model does not say how long its context is")
    for name, length, options in tqdm(list(cases(limit, answer)), unit="text", desc="long"):
        ids = torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))
        found, grown = [], []
        for model in (fast.base, fast):
            torch.manual_seed(seed)
            before = peak_mib(reset=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tokens = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **options)
            grown.append(peak_mib() - before)
            found.append((tokens.tolist(), torch.random.get_rng_state().tolist()))
        foretold = _COPIES * (length + options["max_new_tokens"] + 256) * row_bytes(fast) / 2**20 + max(grown[0], 0.0) + _SLACK_MIB
        if found[0] != found[1]:
            same = [a == b for a, b in zip(found[0][0][0], found[1][0][0], strict=False)]
            tally.fail(f"{name} (seed {seed}): other tokens from {same.index(False) if False in same else len(same)} on, or another generator")
        elif grown[1] > foretold:
            tally.fail(f"{name}: it took {grown[1]:.0f} MiB, foretold were {foretold:.0f}")
        else:
            tally.count("exact, in the memory foretold")
        tally.measured[name] = {"peak of the base, MiB": round(grown[0], 1), "accelerated": round(grown[1], 1), "at most": round(foretold, 1),
                                "acceptance length": round(fast.stats.acceptance_length, 2), "served": fast.stats.served}  # fmt: skip
        tally.done += 1
    tally.measured["level"] = fast.guarantee.level


def row_bytes(fast: AcceleratedModel) -> int:
    """Bytes of the keys and values of one token."""
    config = fast.base.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * size * fast.base.dtype.itemsize)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.long", description="long answers and long prompts")
    parser.add_argument("--model", default="tiny", help="tiny, demo, or anything that lossless --model takes (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="(%(default)s)")
    parser.add_argument("--answer", type=int, default=2048, help="tokens (%(default)s)")
    parser.add_argument("--context", type=int, default=4096, help="of the tiny model (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--json", metavar="OUT", help="the findings")
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    tally = Tally("long", {key: value for key, value in vars(arguments).items() if key != "json"})
    if arguments.model == "tiny":
        with own_cache():
            try_long(tally, tiny(arguments.context, arguments.dtype), VOCAB, arguments.answer, arguments.seed)
    else:
        base = load_base(arguments.model, arguments.dtype)
        adapter = shipped_adapter(arguments.model) or new_adapter(base.model, tiny_config()).randomize(1)
        try_long(tally, accelerate(base.model, adapter, base.tokenizer), 40_000, arguments.answer, arguments.seed)
    return tally.close(arguments.json)


def tiny(context: int, dtype: str) -> AcceleratedModel:
    """A tiny model of that context."""
    small = build_tiny(seed=5, hidden=64, inner=160)
    settings = {**small.config.to_dict(), "max_position_embeddings": context}
    base: Any = type(small)(type(small.config)(**settings))
    base.load_state_dict(small.state_dict())
    base.generation_config.pad_token_id = 0
    base = freeze(base.to(getattr(torch, dtype)))
    return accelerate(base, new_adapter(base, tiny_config()).randomize(1))


if __name__ == "__main__":
    sys.exit(main())
