"""Where a base computes: these processes, their devices and their memory.

Knows: Accelerate's processes, and what the system tells of processor and memory. Does not know: models.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import get_max_memory

from ..storage import alone_with

_SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # as `accelerate launch` names them to its processes


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


def tokens_at_once(device: torch.device) -> int:
    """How many tokens to read in a pass where there are many to read: more fall out of the caches of a CPU, fewer leave a GPU idle."""
    return 2048 if device.type == "cpu" else 32768


def give_back_memory() -> None:
    """Let the system have what was freed: glibc keeps it otherwise, and what attaching takes for a while is much of a small model; and MKL
    keeps what each of its threads lays out weights of float32 in, which few models need after that."""
    for library, function, given in ((torch._C.__file__, "mkl_serv_free_buffers", ()), (None, "malloc_trim", (0,))):
        with contextlib.suppress(OSError, AttributeError):  # another build of torch, another C library
            getattr(ctypes.CDLL(library), function)(*given)
