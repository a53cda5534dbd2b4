"""The sides of a comparison: ways to answer a prompt that accelerated decoding is measured against.

Knows: how each is made from a loaded base, and why one cannot run here. Does not know: prompts, the order of runs, or
what a report says.

    stock               `model.generate` of the very model that is accelerated
    accelerated         the same model with its adapter
    prompt-lookup       `generate(prompt_lookup_num_tokens=...)` of transformers, the same model
    plain-float32, plain-bfloat16       `model.generate` of the weights in another dtype
    packed-float32, packed-bfloat16     the same, with projections packed for passes of one row
    compiled            the model in its own dtype, its decoder layers compiled by torch.compile, which takes minutes
    static-cache        the model in its own dtype with transformers' `StaticCache`, for which `generate` compiles the whole decoding and captures
                        it as a CUDA graph; on a GPU only, and takes a minute
    llama.cpp           its Python binding, with a GGUF file
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

from ..base.layers import CACHE, decoder_layers
from ..base.linears import packable
from ..base.loading import Base, load_base, precision
from ..base.packed import is_packed, pack
from ..errors import UsageError, nearest, require_one_of
from ..kernels import gpu
from .timing import Clock, Decoding, timed_generate

STOCK, ACCELERATED, PROMPT_LOOKUP, COMPILED, STATIC_CACHE, LLAMA_CPP = "stock", "accelerated", "prompt-lookup", "compiled", "static-cache", "llama.cpp"
_DTYPE_SIDES = {"plain-float32": "float32", "plain-bfloat16": "bfloat16"}
_PACKED_SIDES = {"packed-float32": "float32", "packed-bfloat16": "bfloat16"}
SIDES = (STOCK, ACCELERATED, PROMPT_LOOKUP, *_DTYPE_SIDES, *_PACKED_SIDES, COMPILED, STATIC_CACHE, LLAMA_CPP)
ALL = "all"  # but those of `COMPILING`
COMPILING = (COMPILED, STATIC_CACHE)  # they take minutes, and have to be asked for
_LOOKED_UP = 10  # tokens, as in the documentation of transformers
_CONTEXT_STEP = 4096  # llama.cpp takes the memory of its whole context at once
_STATIC_STEP, _FEW = 512, Decoding(max_new_tokens=4)  # a static cache of another length is compiled for anew

Answer = tuple[list[int], Clock]


@dataclass(frozen=True)
class Side:
    """One way to answer.

    Attributes:
        answer: from token ids `[1, prompt]` to the answer's token ids and the clock that noted when each was there. What
            it needs is loaded at its first call and kept.
        dtype: of the weights that it reads; "" if they are none of torch's.
        plain: it is the model alone, through torch, one token a pass.
        same_tokens: it has the weights of the stock model in the same dtype, so that its tokens are stock's but for rounding;
            those of any other side may differ for good reason.
    """

    name: str
    answer: Callable[[torch.Tensor, Decoding], Answer]
    dtype: str
    plain: bool = False
    same_tokens: bool = False

    def __post_init__(self) -> None:
        require_one_of(SIDES, "a side", self.name)


def stock(base: Base) -> Side:
    """The model's own `generate`."""
    return Side(STOCK, functools.partial(timed_generate, base.model), _dtype(base), plain=True, same_tokens=True)


def accelerated(base: Base, fast: Any) -> Side:
    """`fast` is the `AcceleratedModel` of this base."""
    return Side(ACCELERATED, functools.partial(timed_generate, fast), _dtype(base), same_tokens=True)


def wanted(names: Iterable[str]) -> list[str]:
    """The sides that are asked for, in the order of `SIDES`; `all` stands for those that do not take minutes.

    Raises:
        UsageError: an unknown name, or none of them is the accelerated side, which the others are measured against.
    """
    asked = set(names)
    if unknown := sorted(asked - {*SIDES, ALL}):
        raise UsageError(f"sides must be of {', '.join(SIDES)} or {ALL}, got {', '.join(unknown)}{nearest(unknown[0], [*SIDES, ALL])}")
    if ALL in asked:
        asked |= set(SIDES) - {*COMPILING}
    if ACCELERATED not in asked:
        raise UsageError(f"sides must name {ACCELERATED!r}, which is what the others are measured against, got {', '.join(sorted(asked))}")
    return [name for name in SIDES if name in asked]


def rivals(names: Iterable[str], base: Base, load_in: str | None = None, gguf: str | Path | None = None) -> tuple[list[Side], dict[str, str]]:
    """The sides of these names beyond stock and accelerated, and for each that cannot run here the reason.

    A side of another dtype, or one that changes modules, loads the model once more, and keeps it.

    Args:
        base: what is accelerated; load_in: how it was quantized; gguf: a file for llama.cpp, if the base is not one itself.

    Raises:
        UsageError: an unknown name.
    """
    found: list[Side] = []
    left_out: dict[str, str] = {}
    for name in wanted({*names, ACCELERATED}):
        if name in (STOCK, ACCELERATED):
            continue
        made = _make(name, base, load_in, gguf)
        if isinstance(made, Side):
            found.append(made)
        else:
            left_out[name] = made
    return found, left_out


def _make(name: str, base: Base, load_in: str | None, gguf: str | Path | None) -> Side | str:
    """A side, or why there is none."""
    own = _dtype(base)
    if name == PROMPT_LOOKUP:
        return Side(name, functools.partial(_look_up, base.model), own, same_tokens=True)
    if name == LLAMA_CPP:
        return _llama_cpp(base, gguf)
    if load_in is not None:
        return f"it would load the weights anew, and those of {precision(base.model)} are not plain ones"
    if name == COMPILED:
        return _compiled(base, own)
    if name == STATIC_CACHE:
        return _static(base, own)
    dtype = (_DTYPE_SIDES | _PACKED_SIDES)[name]
    if name in _PACKED_SIDES:
        return _packed(name, base, dtype)
    if dtype == own and not is_packed(base.model):
        return f"the stock side is of {dtype} here"
    return Side(name, _generating(base, dtype, _as_it_is), dtype, plain=True)


def _dtype(base: Base) -> str:
    return str(base.model.dtype).removeprefix("torch.")


def _as_it_is(model: Any) -> Any:
    return model


def _generating(base: Base, dtype: str, prepare: Callable[[Any], Any]) -> Callable[[torch.Tensor, Decoding], Answer]:
    """`generate` of the base's weights in a dtype, loaded and prepared when first asked."""
    model = functools.cache(lambda: prepare(_anew(base, dtype)))
    return lambda ids, decoding: timed_generate(model(), ids, decoding)


def _anew(base: Base, dtype: str) -> Any:
    """The base's model, loaded once more."""
    return load_base(base.name, dtype, device=str(base.model.device)).model


def _look_up(model: Any, ids: torch.Tensor, decoding: Decoding) -> Answer:
    return timed_generate(model, ids, decoding, prompt_lookup_num_tokens=_LOOKED_UP)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _packed(name: str, base: Base, dtype: str) -> Side | str:
    there, on_cpu = getattr(torch, dtype), base.model.device.type == "cpu"
    if not (packable(there, 2) if on_cpu else gpu.available() and there in gpu.DTYPES):
        return f"weights of {dtype} cannot be packed on this {'processor' if on_cpu else 'GPU'}"
    return Side(name, _generating(base, dtype, pack), dtype, plain=True, same_tokens=dtype == _dtype(base))


def _compiled(base: Base, own: str) -> Side | str:
    compiler = os.environ.get("CXX", "g++")
    if base.model.device.type == "cpu" and not shutil.which(compiler):
        return f"torch.compile needs a C++ compiler, and there is no {compiler}"
    return Side(COMPILED, _generating(base, own, _compile), own, plain=True, same_tokens=True)


def _compile(model: Any) -> Any:
    import torch._dynamo  # takes seconds that other sides need not wait

    # layers share their code, and each is compiled for the prompt, the token after it, and all later ones; beyond the
    # limit of this process what is left would silently run as it is
    layers, settings = decoder_layers(model), torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, 4 * len(layers))
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 4 * len(layers))
    for layer in layers:
        layer.compile(dynamic=True)  # the cache grows with each token
    return model


def _static(base: Base, own: str) -> Side | str:
    if base.model.device.type == "cpu":
        return "transformers compiles decoding with a static cache on a GPU only"
    return Side(STATIC_CACHE, _with_static_cache(base, own), own, plain=True, same_tokens=True)


def _with_static_cache(base: Base, own: str) -> Callable[[torch.Tensor, Decoding], Answer]:
    model = functools.cache(lambda: _anew(base, own))

    @functools.cache
    def cache(room: int) -> StaticCache:  # compiled for before it is timed
        made = StaticCache(config=model().config.get_text_config(decoder=True), max_cache_len=room)
        timed_generate(model(), torch.ones(1, 8, dtype=torch.long, device=base.model.device), _FEW, **{CACHE: made})
        return made

    def answer(ids: torch.Tensor, decoding: Decoding) -> Answer:
        kept = cache(_STATIC_STEP * math.ceil((ids.shape[1] + decoding.max_new_tokens) / _STATIC_STEP))
        kept.reset()  # the same tensors for each answer: what was captured reads those
        return timed_generate(model(), ids, decoding, **{CACHE: kept})

    return answer


def _llama_cpp(base: Base, gguf: str | Path | None) -> Side | str:
    if not _installed("llama_cpp"):
        return "its Python binding is not installed (pip install llama-cpp-python)"
    file = Path(gguf or base.name).expanduser()
    if file.suffix != ".gguf" or not file.is_file():
        return f"it reads GGUF files, and there is none at {file}: name one of the same model with --gguf"
    return Side(LLAMA_CPP, _llama_answers(base, file), "")


def _llama_answers(base: Base, file: Path) -> Callable[[torch.Tensor, Decoding], Answer]:
    @functools.lru_cache(maxsize=1)
    def model(context: int) -> Any:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        layers = -1 if base.model.device.type == "cuda" else 0  # on the GPU: all or none
        return Llama(
            str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, n_gpu_layers=layers, verbose=False
        )

    ends = base.model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])

    def answer(ids: torch.Tensor, decoding: Decoding) -> Answer:
        llama = model(_CONTEXT_STEP * math.ceil((ids.shape[1] + decoding.max_new_tokens) / _CONTEXT_STEP))
        llama.reset()  # or it would keep what it has read of the same prompt
        llama.set_seed(decoding.seed)
        how = {"temp": decoding.temperature, "top_p": decoding.top_p} if decoding.do_sample else {"temp": 0.0}
        tokens: list[int] = []
        clock = Clock(ids.shape[1])
        for token in llama.generate(ids[0].tolist(), top_k=0, min_p=0.0, repeat_penalty=1.0, **how):
            clock.tick()
            tokens.append(token)
            if token in stops or len(tokens) == decoding.max_new_tokens:
                break
        return tokens, clock

    return answer
