"""The decode loop: draft, verify, accept, keep.

Knows: the order of things in one call. Does not know: how trees are grown or streams computed, nor how a call came about: HF's own
`generate` prepares the config, the logits processors, the stopping criteria and the inputs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GenerationConfig

from ..adapter.config import DraftConfig
from ..base.attention import GROUPED
from ..base.layers import as_decoding, cache_among, input_device
from ..base.processes import give_back_memory
from ..drafting.costs import CostCurve
from ..drafting.ngram import NGramCache
from ..drafting.noise import PEEKABLE, NoiseBias, NoiseTape
from ..drafting.policy import FIRST_PAUSE, DraftPolicy
from ..drafting.tree import DraftTree
from ..streams.cache import RowCache
from ..streams.passes import PassOutput, read_plainly
from .acceptance import accept
from .attach import Attachment
from .exactness import moved
from .fallback import exactness
from .sequence import Sequence, result
from .stats import Stats
from .trial import is_fine
from .verdict import keep


class NearlyTied(RuntimeError):
    """Two tokens of a batch are too close to each other to tell which one the base would choose."""


_ROOM = 256  # rows behind the prompts, at first
_LONG = 512  # rows of prompts whose activations are a good part of a small model


class DecodeLoop:
    """One call of `generate`.

    Args:
        attached: what passes run through, and how exactly.
        drafting: how trees are drafted.
        costs: of a step's parts here.
        stats: where it counts what it does.
        pause: plain steps between drafts where they do not pay, as the call before left them.
    """

    def __init__(self, attached: Attachment, drafting: DraftConfig, costs: CostCurve, stats: Stats, pause: int = FIRST_PAUSE) -> None:
        self.attached, self.drafting, self.costs, self.stats = attached, drafting, costs, stats
        self.reader, self.runner, self.drafter = attached.reader, attached.runner, attached.drafter
        self.adapter, self.pause = attached.reader.adapter, pause
        self.level = ""  # of exactness, that this call has
        self.stale = False  # whether steps were so quick that the costs must have been measured beside other work

    def run(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        streamer: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        passed_in: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Stands in for `GenerationMixin._sample`, and is given what HF's `generate` has prepared; `input_ids` is `[batch, prompt]`.

        Raises:
            NearlyTied: in float32, of a batch; random numbers have been drawn by then.
        """
        prompt, past = input_ids if inputs_embeds is None else inputs_embeds, cache_among(model_kwargs)
        # with a passed-in cache the ids may be the new ones only; the mask is always of the whole text
        width = getattr(generation_config, "_mask_length", 0) if attention_mask is None else attention_mask.shape[1]
        width, padding = max(width, prompt.shape[1]), None
        if attention_mask is not None and not attention_mask.all():  # some versions of HF hand over a mask of ones
            padding = attention_mask == 0
        self.level = self.stats.exact = exactness(self.attached.guarantee.level, len(input_ids), padding is not None)
        sequences = self._sequences(input_ids, width, padding, generation_config, logits_processor, stopping_criteria, streamer)
        cache = RowCache(len(self.runner.layers), width + min(_ROOM, sequences[0].remaining + self.drafting.tree_nodes), padding)
        if past is not None and past.get_seq_length():
            cache.adopt(past)

        # 1. prefill: each prompt's last row gives the first token, and its streams are computed
        started = time.perf_counter()
        out = self._read_prompts(prompt[:, cache.length - width :], padding, cache)
        cache.keep(range(width - cache.length))
        for sequence, logits in zip(sequences, out.logits[:, -1], strict=True):
            sequence.remember(sequence.choose_alone(logits))
            self.stats.emit(sequence.number, (sequence.last,), (0,), 0)
        policy = DraftPolicy(self.costs if self.drafting.adaptive else None, self.pause)
        active, streams = self._go_on(sequences, out, [out.entry.shape[1] - 1] * len(sequences), cache, policy)
        self.stats.prefill_s = (begun := time.perf_counter()) - started

        with self._as_decoding():
            while active:
                # 2. draft: under each certain token, a tree of likely continuations
                with self.stats.timing("draft_s"):
                    noise_bias = self._peek_noise(active, out.logits) if policy.drafting else None
                    policy.read(cache.length)
                    trees = self._draft(streams, active, noise_bias, policy)
                # 3. verify: the base's own logits after every node, and the next streams, in one pass
                with self.stats.timing("pass_s"):
                    out = self._read_trees(trees, active, cache, noise_bias, policy)
                # 4. accept: follow the base's choices as far as they were drafted
                native = self.runner is self.reader and len(active) == len(sequences)
                choices = [sequence.choose_after(rows, native) for sequence, rows in zip(active, out.logits, strict=True)]
                walks = [accept(tree, choose) for tree, choose in zip(trees, choices, strict=True)]
                if len(sequences) > 1 and any(accepted.open for accepted in walks):
                    raise NearlyTied
                for sequence, tree, accepted in zip(active, trees, walks, strict=True):
                    sequence.remember(accepted.tokens)
                    self.stats.count(sequence.number, tree, accepted)
                emitted = sum(len(accepted.tokens) for accepted in walks) / len(walks)
                policy.note(*self._cost(trees), emitted, self.stats.draft_s + self.stats.pass_s)
                # 5. keep the accepted rows; the last choice is the next root
                cache.keep_each([accepted.path for accepted in walks])
                rows = [accepted.path[-1] for accepted in walks]
                if walks[0].open:  # too close to call: made again from rows read as the base reads them
                    out = self._read_alone(active[0], cache, out.logits[0, rows])
                    rows = [out.entry.shape[1] - 1]
                # 6. streams: those of each last accepted node, if drafts pay; finished texts leave the batch
                with self.stats.timing("draft_s"):
                    active, streams = self._go_on(active, out, rows, cache, policy)

        self.stale, self.pause = policy.stale, policy.pause
        self.stats.texts = len(sequences)
        self.stats.tokens = sum(sequence.emitted for sequence in sequences)
        self.stats.decode_s = time.perf_counter() - begun
        if passed_in or generation_config.return_dict_in_generate:
            cache.pass_on(past)
        return result(sequences, past)

    @contextlib.contextmanager
    def _as_decoding(self) -> Iterator[None]:
        """What HF's own loop enters behind the prefill, for every model that passes run through."""
        with contextlib.ExitStack() as entered:
            for model in {id(by.model): by.model for by in (self.reader, self.runner)}.values():
                entered.enter_context(as_decoding(model))
            yield

    def _draft(self, streams: torch.Tensor | None, sequences: list[Sequence], noise_bias: NoiseBias | None, policy: DraftPolicy) -> list[DraftTree]:
        """A tree under the certain token of each text."""
        roots, ngrams = [sequence.last for sequence in sequences], [sequence.ngrams if policy.recalling else None for sequence in sequences]
        depths = [self._depth_limit(sequence) for sequence in sequences]
        most = self.attached.most_nodes(self.drafting)
        return self.drafter.trees(streams, roots, most, ngrams, noise_bias, depths, policy.curve)

    def _depth_limit(self, sequence: Sequence) -> int:
        """How deep a tree under this text may be: neither tokens nor places go on for ever."""
        return max(0, min(sequence.remaining, self.runner.places - sequence.position) - 1)

    def _cost(self, trees: list[DraftTree]) -> tuple[int, int]:
        """Rows and drafted levels of a step over these trees, of the largest of them."""
        depth = max(max(tree.depths) for tree in trees)
        return max(map(len, trees)), min(depth + 1, self.adapter.config.num_streams)

    @property
    def _reads_plainly(self) -> bool:
        """Whether rows may be read by the base itself: not where a twin is faster, nor where the base (a packed one) knows only caches of its own."""
        return self.runner is self.reader and self.runner.as_the_base and self.runner.implementation != GROUPED

    def _streams_join(self, alone: bool) -> bool:
        """Whether streams run in the base's own pass: under near-tie not if its rows are to have the shapes of the base's own; and not
        where layers go the short way, which streams cannot."""
        return self.drafting.schedule == "parallel" and not self.runner.fused and not (alone and self.level == "near-tie")

    def _sequences(
        self, input_ids: torch.Tensor, width: int, padding: torch.Tensor | None, config: GenerationConfig,
        processor: Any, criteria: Any, streamer: Any,
    ) -> list[Sequence]:  # fmt: skip
        """The sequences of the batch before anything is generated; `width` columns hold each prompt."""
        noise = NoiseTape(len(input_ids)) if config.do_sample else None
        guard = self.attached.guarantee.noise if self.level == "near-tie" else 0.0
        if len(input_ids) > 1 and is_fine(self.reader.base) and input_ids.device.type in PEEKABLE:  # whose draws can be taken back
            guard = self.attached.guarantee.of_batches
        sequences = []
        for number, ids in enumerate(input_ids):
            hidden, before = 0 if padding is None else int(padding[number].sum()), width - len(ids)
            ngrams = NGramCache(ids[max(0, hidden - before) :].tolist()) if self.drafting.recall else None
            prepared = (processor, criteria, config, noise, ngrams, streamer, guard)
            sequences.append(Sequence(number, ids[None], hidden, before, *prepared))
        return sequences

    def _read_prompts(self, prompt: torch.Tensor, padding: torch.Tensor | None, cache: RowCache) -> PassOutput:
        """The pass over what the cache has not of the prompts, `[batch, rows]` ids or `[batch, rows, dim]` embeddings.

        Prompts are padded on the left; their last rows speculate.
        """
        rows, device = prompt.shape[1], input_device(self.reader.base)
        positions, mask = torch.arange(cache.length, cache.length + rows)[None].expand(len(prompt), -1), None
        if padding is not None:
            positions = (positions - padding.sum(1, keepdim=True).to(positions.device)).clamp_min(0)
            own = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
            # a padding row sees itself, so that its softmax has something to sum
            mask = own & ~padding[:, None, cache.length :].to(device) | torch.eye(rows, dtype=torch.bool, device=device)
        nodes = torch.tensor([rows - 1]) if self._streams_join(alone=True) else None
        by = self.runner if self.attached.guarantee.prompts and padding is None and len(prompt) == 1 else self.reader
        out = by.verify(prompt, positions, mask, cache, nodes, last_only=True)
        if device.type == "cpu" and len(prompt) * rows > _LONG:
            give_back_memory()
        return out

    def _peek_noise(self, sequences: list[Sequence], logits: torch.Tensor) -> NoiseBias | None:
        """The noise that sampling will draw for the tokens of a tree under each text, if it draws any."""
        noise, config, device = sequences[0].noise, sequences[0].config, sequences[0].ids.device
        if noise is None or self.drafting.tree_nodes == 1 or config.top_k == 1 or device.type not in PEEKABLE:
            return None
        like = torch.empty(1, logits.shape[-1], dtype=torch.float32, device=device)
        ahead = noise.peek([sequence.number for sequence in sequences], self.adapter.config.num_streams, like)
        # drafts do not know for sure which tokens are the base's best few
        return NoiseBias(ahead, config.temperature or 1.0, max(config.top_k, self.drafting.tree_top_k) if config.top_k else 0)

    def _read_trees(self, trees: list[DraftTree], sequences: list[Sequence], cache: RowCache, noise_bias: NoiseBias | None, policy: DraftPolicy) -> PassOutput:
        """One target pass over a tree for each text; with the parallel schedule every node speculates, while drafts pay."""
        width = max(map(len, trees))
        filled = [(0,) * (width - len(tree)) for tree in trees]
        ids = torch.tensor([(*tree.tokens, *rest) for tree, rest in zip(trees, filled, strict=True)])
        depths = torch.tensor([(*tree.depths, *rest) for tree, rest in zip(trees, filled, strict=True)])
        positions = depths + torch.tensor([[sequence.position] for sequence in sequences])
        mask = None if width == 1 else torch.stack([tree.mask(width) for tree in trees])
        if policy.resting and width == len(trees) == 1 and self._reads_plainly and cache.visible() is None:
            return read_plainly(self.reader.base, ids, positions, cache)
        nodes = self._speculators(trees, width, noise_bias) if policy.drafting and self._streams_join(alone=width == 1) else None
        out = self.runner.verify(ids, positions, mask, cache, nodes)
        self.stats.speculated += len(trees) * len(out.nodes)
        return out

    def _speculators(
        self, trees: list[DraftTree], width: int, noise_bias: NoiseBias | None
    ) -> torch.Tensor | Callable[[torch.Tensor], torch.Tensor]:
        """The rows of a pass over trees that speculate: all, or those that the pruning layer finds worth it."""
        if self.adapter.pruning is None:
            return torch.arange(width)

        def choose(entry: torch.Tensor) -> torch.Tensor:
            exits = self.runner.finish(self.runner.adapter.exit_early(entry))
            return self.drafter.worth_streams(exits, trees, self.drafting.pruning_floor, noise_bias)

        return choose

    def _read_alone(self, sequence: Sequence, cache: RowCache, doubted: torch.Tensor) -> PassOutput:
        """Read whatever of the text was not read in the base's own shapes, every row as in a pass of its own; choose after the last,
        whose logits in a pass of another shape were `doubted`, `[1, vocab]`."""
        cache.forget(sequence.before + sequence.num_exact_rows)
        device, first, end, passes = input_device(self.reader.base), sequence.num_exact_rows, sequence.ids.shape[1], 0
        several = self.attached.guarantee.again if cache.visible() is None else ()
        while sequence.num_exact_rows < end:
            place = sequence.num_exact_rows
            rows = next((rows for rows in several if rows <= end - place), 1)
            positions = torch.arange(place, place + rows, device=device)[None] - sequence.start
            ids = sequence.ids[:, place : place + rows].to(device)
            out = self.reader.verify(ids, positions, None, cache, None, last_only=rows > 1, apart=rows > 1)
            cache.keep(range(rows))
            sequence.num_exact_rows += rows
            passes += 1
        found = self.attached.guarantee.after(moved(doubted, out.logits[0, -1:].float()))
        if found is not self.attached.guarantee:  # what the probe promised was too little: no longer
            self.attached.guarantee = found
            self.stats.exceeded += 1
            sequence.widen(found.noise)
            keep(self.attached.kept, self.reader.model, found)
        sequence.remember(sequence.choose_alone(out.logits[0, -1]))
        self.stats.count_alone(sequence.number, sequence.last, end - first, passes)
        return out

    def _go_on(
        self, sequences: list[Sequence], out: PassOutput, rows: list[int], cache: RowCache, policy: DraftPolicy
    ) -> tuple[list[Sequence], torch.Tensor | None]:
        """The texts that are not finished, and `[texts, num_streams, dim]`: the streams of their row of the pass, None while drafts
        do not pay.

        `rows` are by now the last certain ones in the cache; finished texts are dropped from it.
        """
        going = [i for i, sequence in enumerate(sequences) if not sequence.stopped]
        active, chosen = [sequences[i] for i in going], [rows[i] for i in going]
        if len(going) < len(sequences) and going:
            cache.select(going)
        if not going or not policy.drafting or self.drafting.tree_nodes == 1:
            return active, None
        if out.streams is not None and set(chosen) <= set(out.nodes):  # not if one was pruned
            return active, out.streams[going, [out.nodes.index(row) for row in chosen]]
        if out.streams is not None:
            self.stats.pruned_wrongly += sum(row not in out.nodes for row in chosen)
        entry = out.entry[going, chosen][:, None]  # [texts, 1, dim]
        positions = torch.tensor([[sequence.position - 1] for sequence in active])
        context = cache.visible()
        if context is None:
            context = torch.ones(len(active), cache.length, dtype=torch.bool)
        told = None
        if self.adapter.told is not None:
            told = self.drafter.embed(torch.tensor([[sequence.last] for sequence in active], device=entry.device))
        return active, self.runner.speculate(entry, positions, context[:, None], cache, told)[:, 0]
