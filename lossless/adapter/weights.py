"""The adapter: everything that is trained, and nothing that is not.

Knows: the weights of the stream embeddings, the MSA adapters and the transition head, what each of
them computes, and how they are saved. Does not know: how rows travel through the base (streams/),
trees, or generation.

Speculative Streaming (Bhendawade et al., arXiv 2402.11131). Stream j at position t starts at layer
N - N_s as S[t, j] = f(M[t]) + P[j], and stands for the token at t + 1 + j. f is the identity, or adds a low-rank map.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from ..base.drafts import FusedLevel
from ..base.fingerprint import fingerprint_differences
from ..base.linears import draft_linear
from ..errors import UsageError
from ..kernels.pages import own_pages
from ..storage import ensure_room, read_json, versions, write_json
from .config import AdapterConfig
from .hub import CONFIG_FILE, WEIGHTS_FILE, find_adapter

_ROOM = 2**20  # bytes beside the weights: the config, and some to spare


class LowRank(nn.Module):
    """An MSA adapter: x -> B A x, added to a frozen projection's output on stream rows.

    Like all that follows it computes in the dtype of its input: training keeps float32 weights over the
    base's own activations.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.shape = (in_features, out_features)
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.zeros(out_features, rank))  # zero: an untrained adapter changes nothing
        nn.init.normal_(self.down, std=in_features**-0.5)

        self._cheap: nn.Module | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _linear(_linear(x, self.down), self.up) if self._cheap is None else self._cheap(x)

    def cheapen(self, dtype: torch.dtype) -> None:
        """From now on as one product, the cheapest there is for inputs of this dtype; the weights learn no more."""
        self._cheap = draft_linear(self.up.float() @ self.down.float(), None, dtype)

    def merged_into(self, weight: torch.Tensor) -> torch.Tensor:
        """`[out, in]`, W + B A, in float32."""
        found = own_pages(*weight.shape, apart=True) if weight.device.type == "cpu" else torch.empty_like(weight, dtype=torch.float32)
        return found.copy_(weight).addmm_(self.up.detach().float(), self.down.detach().float())


class Transition(nn.Module):
    """The recurrent head that tells a stream which tokens its path holds so far.

        r_0 = tanh(A N(s_1))
        r_j = silu(U r_{j-1} + E N(e(x_{t+j})) + S N(s_j) + b_j)
        logits_j = head(s_j + V r_j)

    s_j is stream j after the base's final norm, e the base's token embedding, x_{t+1} the token that
    is already certain, N the RMS norm without a weight, head the base's own LM head.
    """

    def __init__(self, dim: int, rank: int, num_streams: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.empty(rank, dim))  # A
        self.recur = nn.Parameter(torch.empty(rank, rank))  # U
        self.token = nn.Parameter(torch.empty(rank, dim))  # E
        self.stream = nn.Parameter(torch.empty(rank, dim))  # S
        self.bias = nn.Parameter(torch.zeros(num_streams, rank))  # b
        self.out = nn.Parameter(torch.zeros(dim, rank))  # V, zero: an untrained head predicts as the stream does
        self._cheap: dict[str, Any] = {}
        for weight in (self.start, self.recur, self.token, self.stream):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def begin(self, first_stream: torch.Tensor) -> torch.Tensor:
        """r_0 of `[..., dim]`."""
        return torch.tanh(self._times("start", _norm(first_stream)))

    def hear(self, streams: torch.Tensor) -> torch.Tensor:
        """S N(s_j) + b_j of all streams at once: `[..., num_streams, dim]` -> `[..., num_streams, rank]`."""
        return self._times("stream", _norm(streams)) + self.bias.to(streams.dtype)

    def advance(self, r: torch.Tensor, token: torch.Tensor, heard: torch.Tensor) -> torch.Tensor:
        """r_j from r_{j-1} `[..., rank]`, the token's embedding `[..., dim]`, and what `hear` gave for stream j, `[..., rank]`."""
        return F.silu(self._times("recur", r) + self._times("token", _norm(token)) + heard)

    def adjust(self, stream: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        """s_j + V r_j, what the LM head reads: `[..., dim]`."""
        return stream + self._times("out", r)

    def cheapen(self, dtype: torch.dtype) -> None:
        """From now on with the cheapest products there are for inputs of this dtype; the weights learn no more."""
        self._cheap = {name: draft_linear(getattr(self, name), None, dtype) for name in ("start", "recur", "token", "stream", "out")}

    def fused(self, head: Any, scale: float, ids: torch.Tensor | None) -> FusedLevel | None:
        """`begin` and `hear` in one, and `advance`, `adjust` and the head, where the cheapest products allow it; scale: of the logits; ids: the tokens that they
        are of, None for all."""
        recur, token, out, *first = map(self._cheap.get, ("recur", "token", "out", "start", "stream"))
        return FusedLevel.of([recur, token, out, head, *first], self.bias, scale, ids)

    def _times(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A weight times x."""
        return self._cheap[name](x) if self._cheap else _linear(x, getattr(self, name))


class NoTransition(nn.Module):
    """In its place: logits_j = head(s_j), as in the paper. No stream knows its path."""

    def begin(self, first_stream: torch.Tensor) -> torch.Tensor:
        return first_stream[..., :0]

    def hear(self, streams: torch.Tensor) -> torch.Tensor:
        return streams[..., :0]

    def advance(self, r: torch.Tensor, token: torch.Tensor, heard: torch.Tensor) -> torch.Tensor:
        return r

    def adjust(self, stream: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return stream

    def cheapen(self, dtype: torch.dtype) -> None:
        pass

    def fused(self, head: Any, scale: float, ids: torch.Tensor | None) -> FusedLevel | None:
        return None


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight.to(x.dtype))


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class StreamAdapter(nn.Module):
    """The trained weights of one base.

    Args:
        config: its shape.
        dim: width of the base's hidden states.
        projections: for each adapted projection of the top layers, named `<layer from N - N_s>.<path>`,
            its (in_features, out_features).
        draft_ids: token ids that may be drafted, `[draft_vocab_size]`; None for all.
        base: name and fingerprint of the base it belongs to.
    """

    def __init__(
        self,
        config: AdapterConfig,
        dim: int,
        projections: dict[str, tuple[int, int]],
        draft_ids: torch.Tensor | None = None,
        base: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.base = base or {}
        self.dim = dim
        self._place: torch.Tensor
        self.register_buffer("_place", torch.empty(0), persistent=False)
        self.stream_embeddings: nn.Parameter | None = None  # P
        if not config.rotate_values:
            self.stream_embeddings = nn.Parameter(torch.randn(config.num_streams, dim) * 0.02)
        self.start = LowRank(dim, dim, config.init_rank) if config.init_rank else None
        self.told = LowRank(dim, dim, config.next_token_rank) if config.next_token_rank else None
        self.pruning = LowRank(dim, dim, config.pruning_rank) if config.pruning_rank else None
        # module names hold no dots
        self.msa = nn.ModuleDict(
            {name.replace(".", "-"): LowRank(*shape, config.lora_rank) for name, shape in projections.items()}
        )
        self.transition: Transition | NoTransition = NoTransition()
        if config.transition_rank:
            self.transition = Transition(dim, config.transition_rank, config.num_streams)
        self.draft_ids: torch.Tensor | None
        self.register_buffer("draft_ids", draft_ids)
        if config.draft_vocab_size != (0 if draft_ids is None else len(draft_ids)):
            raise UsageError(
                f"draft_vocab_size is {config.draft_vocab_size}, but "
                f"{'no' if draft_ids is None else len(draft_ids)} draft ids were given"
            )

    def start_streams(self, main: torch.Tensor, told: torch.Tensor | None = None) -> torch.Tensor:
        """S[t, j] = f(M[t]) + P[j]: `[batch, nodes, dim]` -> `[batch, nodes * num_streams, dim]`.

        told: `[batch, nodes, dim]`, embeddings of the tokens after each node, for an adapter that is told them.
        """
        begun = main
        if self.start is not None:
            begun = begun + self.start(main)
        if self.told is not None and told is not None:
            begun = begun + self.told(_norm(told))
        streams = begun[:, :, None].expand(-1, -1, self.config.num_streams, -1)
        if self.stream_embeddings is not None:
            streams = streams + self.stream_embeddings.to(main.dtype)
        return streams.flatten(1, 2)

    def exit_early(self, main: torch.Tensor) -> torch.Tensor:
        """M[t] + B A M[t], what the base's final norm and LM head read of layer N - N_s: `[..., dim]`."""
        return main + self.pruning(main) if self.pruning is not None else main

    def adapters(self) -> Iterator[tuple[str, LowRank]]:
        """The MSA adapters and the projections that they are for, `<layer from N - N_s>.<path>`."""
        for name, module in self.msa.items():
            yield name.replace("-", "."), cast(LowRank, module)

    def projections(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of each adapted projection."""
        return {name: low_rank.shape for name, low_rank in self.adapters()}

    def copy_as(self, device: torch.device, dtype: torch.dtype) -> StreamAdapter:
        """A frozen copy for inference, over the same numbers where they are on that device already: drafts need no more precision than
        the base's own activations, which are of this dtype."""
        shared: dict[int, Any] = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in self.parameters()}
        copied = copy.deepcopy(self, shared | {id(buffer): buffer for buffer in self.buffers()}).to(device).eval()
        for part in (copied.transition, copied.told, copied.start):
            if part is not None:
                part.cheapen(dtype)
        return copied

    @property
    def device(self) -> torch.device:
        """Where all of it is but the MSA adapters, which are with their projections."""
        return self._place.device

    def parameter_count(self) -> int:
        """Trained parameters."""
        return sum(p.numel() for p in self.parameters())

    def parts(self) -> dict[str, int]:
        """Trained parameters of each part of the method."""
        names = {"stream_embeddings": "stream embeddings", "msa": "MSA adapters", "transition": "transition",
                 "start": "start", "told": "told", "pruning": "pruning layer"}  # fmt: skip
        counts = dict.fromkeys(names.values(), 0)
        for name, parameter in self.named_parameters():
            counts[names[name.split(".")[0]]] += parameter.numel()
        return {name: count for name, count in counts.items() if count}

    def digest(self) -> str:
        """Tells these weights from others, as they are saved."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            found.update(name.encode() + (tensor.half() if tensor.is_floating_point() else tensor.int()).cpu().numpy().tobytes())
        return found.hexdigest()[:12]

    def randomize(self, seed: int, scale: float = 0.5) -> StreamAdapter:
        """Random numbers in every weight: the worst adapter there is, for checking that output stays exact."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(noise / max(1, parameter.shape[-1]) ** 0.5)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights (float16) and config into `folder`, each file whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: (tensor.half() if tensor.is_floating_point() else tensor.int()).contiguous().cpu()
            for name, tensor in self.state_dict().items()
        }
        ensure_room(folder, sum(tensor.nbytes for tensor in tensors.values()) + _ROOM)
        staging = folder / (WEIGHTS_FILE + ".part")
        save_file(tensors, staging, metadata={"format": "pt"})
        staging.replace(folder / WEIGHTS_FILE)
        write_json(
            folder / CONFIG_FILE,
            {
                "format": 1,
                "streaming": self.config.to_dict(),
                "dim": self.dim,
                "projections": self.projections(),
                "base": self.base,
                "versions": versions(),
            },
        )

    @classmethod
    def from_pretrained(cls, source: str | Path, base: dict[str, Any] | None = None) -> StreamAdapter:
        """Load from a local folder or a hub id.

        Args:
            base: name and fingerprint of the base it will serve; another fingerprint than the
                adapter's own is a warning, because output stays exact all the same.

        Raises:
            UsageError: no adapter there, or a file that is broken or does not fit its config.
        """
        folder = find_adapter(str(source))
        try:
            written = read_json(folder / CONFIG_FILE)
            tensors = load_file(folder / WEIGHTS_FILE)
            config = AdapterConfig.from_dict(written["streaming"])
            with torch.device("meta"):  # what a broken config asks for takes no memory before it is compared with the weights
                adapter = cls(
                    config,
                    written["dim"],
                    {name: (shape[0], shape[1]) for name, shape in written["projections"].items()},
                    tensors["draft_ids"].long() if "draft_ids" in tensors else None,
                    dict(written["base"]),
                )
            adapter.load_state_dict({k: v.float() if v.is_floating_point() else v.long() for k, v in tensors.items()}, assign=True)
            adapter._place = torch.empty(0)
        except FileNotFoundError as error:
            raise UsageError(f"no adapter in {folder}: {Path(error.filename or WEIGHTS_FILE).name} is missing") from None
        except (SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UsageError(f"the adapter in {folder} is broken or cut short: {reason}") from error
        if base is not None:
            ours, theirs = adapter.base.get("fingerprint", {}), base.get("fingerprint", {})
            if differing := fingerprint_differences(ours, theirs):
                warnings.warn(
                    f"the adapter in {folder} was trained for {adapter.base.get('name', 'another base')}, and this "
                    f"base differs in {', '.join(differing)}: output stays exact, but it may be slow",
                    stacklevel=2,
                )
        return adapter


