"""A model's structure, copied, over the same tensors.

Knows: how to make modules of our own that compute what the base's modules compute, with its weights, so that what is hooked
into them is not hooked into the base; and what tells that the base has changed since. Does not know: what the copies are for.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Module = TypeVar("Module", bound=nn.Module)


class _SharedTensors(TorchFunctionMode):
    """Tensors are not copied but shared, in the one deep copy that has this memo: Ctrl-C may leave the mode on."""

    def __init__(self, memo: dict[int, Any]) -> None:
        super().__init__()
        self.memo = memo

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__ and args[1] is self.memo:
            return args[0]
        return func(*args, **(kwargs or {}))


def structure_of(model: Module) -> Module:
    """The same modules, configuration and hooks, once more; every tensor in them is the model's own."""
    module: Any
    for module in model.modules():  # bitsandbytes keeps 8-bit weights with the tensor until the first call, then with the module
        if hasattr(module, "init_8bit_state") and getattr(module.weight, "CB", None) is not None:
            module.init_8bit_state()
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    for module in model.modules():
        shared |= {id(value): OrderedDict() for value in vars(module).values() if type(value) is OrderedDict and not value}  # hooks: most time
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):  # what it keeps in mind is its owner's to change
            shared[id(hook)] = hook
        if hasattr(module, "alike"):  # a packed weight cannot be copied
            shared[id(module)] = module.alike()
    with _SharedTensors(shared):
        return copy.deepcopy(model, shared)


def listeners(module: nn.Module) -> int:
    """How many hooks a module has, and whether its forward was replaced."""
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))


_SWITCHES = frozenset((bool, int, float, str))  # attributes of these types may change what a module computes
_OF_PEFT = ("_active_adapter", "merged_adapters", "scaling")  # and so may these, lists and dictionaries
_LOOKED_AT = 7  # numbers of a weight, about


def state_of(model: nn.Module) -> int:
    """A number that changes when a copy of the structure is no longer the model's: other modules, other tensors, tensors written
    to, hooks, patched forwards, switches (an adapter of the user's turned off, merged or scaled, for example). Asked for at each call: it
    takes a few milliseconds. A write through `weight.data`, of which torch keeps no count, shows in some of the numbers, if it changes most."""
    parts: list[Any] = [*global_hooks()]
    weights: dict[Any, list[torch.Tensor]] = {}
    for module in model.modules():
        own = module.__dict__
        parts += [id(module), *own["_forward_hooks"], *own["_forward_pre_hooks"], id(own.get("forward")), id(type(module).forward)]
        if "_hf_hook" not in own:  # Accelerate may fetch and drop them
            for tensor in own["_parameters"].values():
                if tensor is not None:
                    parts += [id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version]
                    if type(tensor) in (nn.Parameter, torch.Tensor):
                        weights.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        if "Rotary" not in type(module).__name__:  # some count how far they have come
            parts += [value for value in own.values() if type(value) in _SWITCHES]
            parts += [repr(own[name]) for name in _OF_PEFT if name in own]
    parts += [_some_bytes(alike) for (_, device), alike in weights.items() if device.type != "meta"]
    return hash(tuple(parts))


def comes_from(forward: Any) -> str:
    """The module whose code a forward is, whatever it says of itself: `functools.wraps` has a patch say that it is what it was put in the place of."""
    return str(getattr(forward, "__globals__", {}).get("__name__", ""))


def global_hooks() -> list[int]:
    """The numbers of hooks that torch calls for every module; as those of all hooks, none is given twice."""
    return [*nn.modules.module._global_forward_hooks, *nn.modules.module._global_forward_pre_hooks]


@torch.no_grad()
def _some_bytes(weights: list[torch.Tensor]) -> bytes:
    """Of each of these weights, alike in dtype and device, a few numbers."""
    flat = [weight.detach().flatten() if weight.is_contiguous() else weight.detach().select(-1, 0).flatten() for weight in weights]
    some = [weight[:: len(weight) // _LOOKED_AT + 1] for weight in flat]
    return torch.cat(some).view(torch.uint8).cpu().numpy().tobytes()
