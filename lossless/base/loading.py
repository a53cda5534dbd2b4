"""Base models: from a hub id, a local folder, a GGUF file, or the embedded default `demo`.

Knows: where a model's files come from, and how they are loaded. Does not know: adapters or generation. A base that it returns is
frozen and in eval mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from ..errors import UsageError, require_one_of
from .demo import demo_folder
from .gguf import check_header, from_files, load_gguf, quiet
from .processes import processes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
LOAD_IN = ("4bit", "8bit")


@dataclass(frozen=True)
class Base:
    """A frozen `PreTrainedModel`, its tokenizer, and the name that it was asked for by."""

    model: Any
    tokenizer: Any
    name: str

    @property
    def vocabulary(self) -> int:
        """Token ids that it can be given, those that pad the embeddings among them."""
        return vocabulary_of(self.model)


def load_base(
    name: str, dtype: str = "auto", load_in: str | None = None, device: str | None = None
) -> Base:
    """Load a frozen causal LM and its tokenizer.

    Args:
        name: `demo`, a local folder (safetensors or GGUF), a `.gguf` file, or a hub id.
        dtype: one of `DTYPES`; `auto` is what the checkpoint holds, and with `4bit` on a CPU bfloat16 where bitsandbytes multiplies in that.
        load_in: `4bit` (NF4) or `8bit` through bitsandbytes; None for plain weights.
        device: a torch device; by default the GPU of this process if there is one, else the CPU.

    Raises:
        UsageError: unknown dtype or `load_in`, or a model that can be neither found nor fetched.
    """
    require_one_of(DTYPES, "dtype", dtype)
    if load_in is not None:
        require_one_of(LOAD_IN, "load_in", load_in)
    device = str(_device(device)) if device else str(processes().device)
    source, gguf_file = _locate(name)
    if load_in == "4bit" and dtype == "auto" and torch.device(device).type == "cpu" and _rounds_rows():
        dtype = "bfloat16"
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    try:
        with quiet():
            model: Any
            if gguf_file is None and not Path(source).is_dir():
                with contextlib.suppress(RemoteEntryNotFoundError):  # adapters have none
                    hf_hub_download(source, "config.json")  # of a hub that is silent every file would be waited for, one after the other
            if gguf_file is not None:
                check_header(Path(source) / gguf_file)
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
            if load_in is not None and gguf_file is None:
                options |= {"quantization_config": _quantization(load_in, source, dtype, device), "device_map": {"": device}}
            if gguf_file is None:
                model = from_files(source, **options)
            elif load_in is None:
                model = load_gguf(source, gguf_file, DTYPES[dtype])
            else:
                raise UsageError(f"load_in={load_in!r} needs safetensors weights, and {name} is a GGUF file")
    except (UsageError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of a broken file the loaders say whatever they stumbled over, tokenizers even a plain Exception
        raise UsageError(f"cannot load {name!r}: {_first_line(error)}") from error
    if load_in is None:
        model.to(device)
    return Base(model=freeze(model), tokenizer=tokenizer, name=name)


def _device(name: str) -> torch.device:
    """Raises UsageError if there is none of this name here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # an AssertionError where torch was built without CUDA
        raise UsageError(f"device must be one that torch has here, got {name!r} ({_first_line(error)})") from error


def precision(model: Any) -> str:
    """In what a base computes: its dtype, and how it is quantized."""
    how = [name for name in LOAD_IN if getattr(model, f"is_loaded_in_{name}", False)]
    return ", ".join([str(model.dtype).removeprefix("torch."), *how])


def require_model(model: Any) -> None:
    """Raises UsageError for anything that is not a loaded model, whatever wraps it."""
    if not all(hasattr(model, name) for name in ("generate", "get_input_embeddings", "config")):
        raise UsageError(f"model must be a loaded Hugging Face causal LM, got {type(model).__name__}")


def vocabulary_of(model: Any) -> int:
    """Token ids that a model can be given, those that pad the embeddings among them."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_tokens(ids: Sequence[int], model: Any) -> None:
    """Raises UsageError for what a tokenizer makes of a text if the model can do nothing with it: no token, or one that it has no embedding of."""
    if not ids:
        raise UsageError("a prompt must have at least one token, and the tokenizer makes none of this one")
    if max(ids) >= (known := vocabulary_of(model)):
        raise UsageError(f"the tokenizer is not this model's: tokens must be below {known}, got {max(ids)}")


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Eval mode, and no parameter asks for a gradient."""
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def differentiable(model: torch.nn.Module) -> Iterator[None]:
    """Quantized projections keep to ways through which gradients flow.

    In eval mode bitsandbytes packs 4-bit weights for a CPU kernel that has no derivative, and what came before it
    would be taught nonsense. It leaves them alone in training mode, which changes nothing else in a projection.
    """
    quantized: list[Any] = [module for module in model.modules() if type(module).__name__ == "Linear4bit" and not module.training]
    if any(getattr(module.weight.quant_state, "packing_format_for_cpu", False) for module in quantized):
        raise UsageError(
            "this 4-bit base has answered already, and its weights are packed for a kernel that has no derivative: "
            "load it anew to train on it"
        )
    for module in quantized:
        module.train()
    try:
        yield
    finally:
        for module in quantized:
            module.eval()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _rounds_rows() -> bool:
    """Whether bitsandbytes rounds rows to bfloat16 here before it multiplies them: then float32 brings little, and costs."""
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def _quantization(load_in: str, source: str, dtype: str, device: str) -> BitsAndBytesConfig:
    """How bitsandbytes is to load; `auto` computes in what the checkpoint holds on a GPU, and in float32 on another device."""
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute: Any = DTYPES[dtype]
    if dtype == "auto":
        compute = AutoConfig.from_pretrained(source).dtype if torch.device(device).type == "cuda" else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute or torch.float32)


def _locate(name: str) -> tuple[str, str | None]:
    """Where the files are, and the GGUF file's name if that is what they are."""
    if name == "demo":
        return str(demo_folder()), None
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), path.name
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if (path / "config.json").is_file() or not ggufs:
            return str(path), None
        if len(ggufs) > 1:
            raise UsageError(f"{path} holds {len(ggufs)} GGUF files: name the one to load")
        return str(path), ggufs[0].name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"no model folder or GGUF file at {path}")
    return name, None


