"""RMS norms in one call, where the base's take six.

Knows: which modules are x / sqrt(mean(x^2) + eps) times a weight, or times 1 + that weight (found by trying), and how to compute it with
a kernel of ours: rounded otherwise than the base, or with its own bits. Does not know: models, or which of their modules are to be
replaced (base/packed.py, base/exact.py).
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any, Self

import torch
from torch import nn

from ..kernels import gpu, native
from .linears import check_width

_ROWS, _SWALLOWS = 512, 2.0**11  # that `exact` tries
_CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}  # of outputs that are about as large as the weight


def is_norm(module: nn.Module) -> bool:
    """Whether it is one by its name, and has no parts."""
    return type(module).__name__.endswith("Norm") and not any(True for _ in module.children())


class FusedNorm(nn.Module):
    """Stands in for an RMS norm, over the same weight: the same numbers but for rounding, and a row's bits are its own.

    Args:
        module: the norm.
        eps: what it adds to the mean of squares; offset: to its weight, 0 or 1.
    """

    def __init__(self, module: nn.Module, eps: float, offset: float) -> None:
        super().__init__()
        self.weight: Any = module.weight
        self._module, self.eps, self.offset = [module], eps, offset  # in a list: it is no part of the model

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`[..., dim]` -> `[..., dim]`."""
        check_width(rows, len(self.weight))
        if rows.dtype is not self.weight.dtype or rows.dtype not in _CLOSE or (rows.requires_grad and torch.is_grad_enabled()):
            return self.original()(rows)
        kernel = _kernel(rows)  # the model may have been moved
        return self.original()(rows) if kernel is None else kernel(rows, self.weight, self.offset, self.eps)

    def behind(self, rows: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[..., dim]` twice -> their sum and its norm, with the bits of two steps."""
        if rows.dtype is self.weight.dtype and _kernel(rows) is gpu.norm:
            return gpu.add_and_norm(rows, added, self.weight, self.offset, self.eps)
        rows = rows + added
        return rows, self(rows)

    def original(self) -> nn.Module:
        """The norm that it stands in for, with the weight as it is now."""
        module: Any = self._module[0]
        module.weight = self.weight
        return module


class ExactNorm(FusedNorm):
    """The same with the bits of the norm's own, in 16 bits; what it stands for is found by `exact`.

    Args:
        twice: numbers are rounded before they are multiplied with the weight, too.
    """

    def __init__(self, module: nn.Module, eps: float, offset: float, twice: bool) -> None:
        super().__init__(module, eps, offset)
        self.twice, self._kept = twice, []  # type: ignore[var-annotated]
        self._told = Norm.of(self, self._kept)

    def __deepcopy__(self, memo: Any) -> ExactNorm:
        return ExactNorm(self._module[0], self.eps, self.offset, self.twice)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`[..., dim]` -> `[..., dim]`."""
        check_width(rows, len(self.weight))
        if rows.dtype is not self.weight.dtype or rows.dtype not in native.SIXTEEN or (rows.requires_grad and torch.is_grad_enabled()):
            return self.original()(rows)
        rows = rows.contiguous()
        out, dim = torch.empty_like(rows), rows.shape[-1]
        native.in_torchs_order("norm", rows.dtype)(ctypes.byref(self._told), rows.data_ptr(), out.data_ptr(), rows.numel() // dim, dim)
        return out


class Norm(ctypes.Structure):
    """A norm as C is told of it (layer.h)."""

    _fields_ = [("weight", ctypes.c_void_p), ("eps", ctypes.c_double), ("twice", ctypes.c_int64)]

    @classmethod
    def of(cls, norm: FusedNorm | None, kept: list[torch.Tensor]) -> Self:
        """None: there is none. To `kept` goes the tensor that it points to."""
        if norm is None:
            return cls(None, math.nan, 0)
        weight = (norm.weight.detach().float() + norm.offset).contiguous()
        kept.append(weight)
        return cls(weight.data_ptr(), norm.eps, getattr(norm, "twice", False))


def _kernel(tensor: torch.Tensor) -> Any:
    """What computes norms where this is; None if there is nothing."""
    if gpu.here(tensor) and gpu.available():
        return gpu.norm
    return native.norm if tensor.device.type == "cpu" and native.available() and native.has_kernels(tensor.dtype) else None


def _eps(module: Any) -> float | None:
    """What a norm adds to the mean of squares; None if that is not to be seen, or it is no norm that a kernel here could compute."""
    if not type(module).__name__.endswith("RMSNorm"):  # first of all: the weight of a packed product would be unpacked to be looked at
        return None
    weight: Any = getattr(module, "weight", None)
    if [name for name, _ in module.named_parameters()] != ["weight"] or weight.ndim != 1:
        return None
    if module._forward_hooks or module._forward_pre_hooks or weight.dtype not in _CLOSE or _kernel(weight) is None:
        return None
    found = [getattr(module, name) for name in ("variance_epsilon", "eps") if isinstance(getattr(module, name, None), float)]
    return found[0] if found else None


@torch.no_grad()
def fused(module: nn.Module) -> FusedNorm | None:
    """What may stand in for a module, None if it is no norm of this kind, or there is no kernel here."""
    if isinstance(module, ExactNorm):
        module = module.original()
    if isinstance(module, FusedNorm) or (eps := _eps(module)) is None:
        return None
    weight: Any = module.weight
    rows = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0), dtype=torch.float32) * torch.tensor([[0.01], [1.0], [30.0]], dtype=torch.float32)
    rows = rows.to(weight.device)
    expected = module(rows.to(weight.dtype)).float()
    for offset in (0.0, 1.0):
        made = FusedNorm(module, eps, offset)
        if (made(rows.to(weight.dtype)).float() - expected).abs().max() < _CLOSE[weight.dtype] * expected.abs().max():
            return made
    return None


@torch.no_grad()
def exact(module: nn.Module) -> ExactNorm | None:
    """What may stand in for a norm in 16 bits and has its bits, None if nothing has."""
    if isinstance(module, FusedNorm) or (eps := _eps(module)) is None:
        return None
    weight: Any = module.weight
    if weight.device.type != "cpu" or weight.dtype not in native.SIXTEEN or len(weight) % native.LANES or not native.knows_order():
        return None
    rows = _rows(len(weight), weight.dtype)
    expected, alone = module(rows), module(rows[None, :1])
    for offset, twice in ((0.0, True), (1.0, False), (0.0, False), (1.0, True)):
        made = ExactNorm(module, eps, offset, twice)
        if torch.equal(made(rows), expected) and torch.equal(made(rows[None, :1]), alone):
            return made
    return None


@functools.cache
def _rows(dim: int, dtype: torch.dtype) -> torch.Tensor:
    """`[rows, dim]`: in every second one a number swallows parts of the others, as they are added up, so that the order shows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_ROWS, dim, generator=generator, dtype=torch.float32)
    rows[::2].scatter_(1, torch.randint(dim, (len(rows[::2]), 1), generator=generator), _SWALLOWS)
    return rows.to(dtype)
