"""What stands in for CUDA graphs where there is no GPU: operations are written down as they are made, and made again into the same tensors.

As in a CUDA graph, what is replayed reads and writes the tensors that it had when it was captured, nothing that Python did is done again,
and to wait for a number is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lossless.kernels import graphs

_WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


def _tensors(of: Any) -> list[torch.Tensor]:
    return [each for each in tree_flatten(of)[0] if isinstance(each, torch.Tensor)]


class _Graph(TorchDispatchMode):
    """One captured piece."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Callable[..., Any], Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in _tensors((args, kwargs))}
        view = any(each.untyped_storage().data_ptr() in given for each in _tensors(out)) and not func._schema.is_mutable
        if not view and "empty" not in func.__name__:
            self.steps.append((func, args, kwargs or {}, _tensors(out)))
        return out

    def replay(self) -> None:
        for func, args, kwargs, outs in self.steps:
            for own, made in zip(outs, _tensors(func(*args, **kwargs)), strict=True):
                if own.data_ptr() != made.data_ptr():
                    own.copy_(made)


class Pieces(graphs.Pieces):
    """In the place of the real ones."""

    open: _Graph | None = None  # that is being captured

    def capture(self, run: Callable[[graphs.Pieces], graphs.Outputs]) -> graphs.Outputs:
        run(self)
        self._capturing = True
        self._begin()
        try:
            return run(self)
        finally:
            self._end()
            self._capturing = False

    def _begin(self) -> None:
        Pieces.open = _Graph()
        Pieces.open.__enter__()
        self.graphs.append(Pieces.open)

    def _end(self) -> None:
        Pieces.open = None
        self.graphs[-1].__exit__(None, None, None)


def noted(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that torch knows nothing of, written down with the rest."""

    def run(*args: Any, **kwargs: Any) -> Any:
        out = kernel(*args, **kwargs)
        if Pieces.open is not None:
            Pieces.open.steps.append((kernel, args, kwargs, _tensors(out)))
        return out

    return run
