"""CUDA graphs: what a GPU did once, launched again as a whole.

Knows: how work is captured, all of it or in pieces between which something is computed as ever, and how it is run again on other inputs.
Does not know: models. Captured work reads and writes the tensors that it had when it was captured, and cannot wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Outputs = tuple[torch.Tensor, ...]


class Recorded:
    """Captured work over some inputs.

    Args:
        run: the inputs -> the outputs; called a few times now, never later.
        inputs: what it is captured with; copied into tensors of its own.

    Raises:
        RuntimeError: it waits for the GPU.
    """

    def __init__(self, run: Callable[..., Outputs], *inputs: torch.Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode could not be written to outside of it
            self.inputs = tuple(given.clone() for given in inputs)
            pieces = Pieces()
            self.outputs = pieces.capture(lambda _: run(*self.inputs))
        self.replay = pieces.graphs[0].replay

    def __call__(self, *inputs: torch.Tensor) -> Outputs:
        """The outputs for other inputs, which may be on the CPU: good until the next call."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)  # from memory that is not pinned: it is read before this returns
        self.replay()
        return self.outputs


class Pieces:
    """Work that is captured but for some calls in between.

    Attributes:
        graphs: in order; between two of them stands a call.
        calls: what `leave_out` was given, and the tensor that takes what such a call gives.
    """

    def __init__(self) -> None:
        self.graphs: list[Any] = []
        self.calls: list[tuple[tuple[Any, ...], torch.Tensor]] = []
        self._capturing = False

    def capture(self, run: Callable[[Pieces], Outputs]) -> Outputs:
        """The outputs of `run`, which calls `leave_out`.

        Raises:
            RuntimeError: it waits for the GPU.
        """
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            run(self)
            run(self)  # libraries make ready what they must not make ready in a capture
            torch.cuda.synchronize()
            self._pool = torch.cuda.graph_pool_handle()
            self._capturing = True
            self._begin()
            try:
                outputs = run(self)
            finally:
                self._end()
                self._capturing = False
        torch.cuda.current_stream().wait_stream(beside)
        return outputs

    def leave_out(self, like: torch.Tensor, *call: Any) -> torch.Tensor:
        """A call that is not captured: a tensor for what it gives, of this shape."""
        if not self._capturing:
            return torch.zeros_like(like, memory_format=torch.contiguous_format)
        self._end()
        out = torch.zeros_like(like, memory_format=torch.contiguous_format)
        self.calls.append((call, out))
        self._begin()
        return out

    def replay(self, answer: Callable[..., None]) -> None:
        """Do it again; `answer` is given each call's arguments and its tensor, which it fills."""
        for number, graph in enumerate(self.graphs):
            graph.replay()
            if number < len(self.calls):
                call, out = self.calls[number]
                answer(out, *call)

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self.graphs.append(graph)

    def _end(self) -> None:
        self.graphs[-1].capture_end()
