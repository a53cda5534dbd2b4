"""The base is nobody's but its owner's: looked at in the middle of a call, broken off anywhere, used by several threads at once."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import lossless
from lossless.adapter.compat import new_adapter
from lossless.generation.fallback import lock_of
from lossless.generation.model import AcceleratedModel, accelerate
from lossless.kernels import native
from lossless.streams.passes import PASS

from .conftest import build_tiny, prompt_ids, tiny_config
from .moments import elsewhere, interrupted, moments
from .test_generate import letters

INTERRUPTIONS = int(os.environ.get("LOSSLESS_TEST_INTERRUPTIONS", "25"))  # a long run takes a thousand

GREEDY: dict[str, Any] = {"attention_mask": torch.ones(1, 7), "max_new_tokens": 12, "do_sample": False}
LOGITS_OF = prompt_ids(9, seed=8)

# An interruption in a destructor is one that Python has to ignore.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def owned(dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    """A base with hooks and patches of its owner's."""
    model: Any = build_tiny(seed=5, hidden=64, inner=160, attention=attention).to(dtype)
    layer = model.model.layers[1]
    plain = type(layer.mlp).forward
    layer.mlp.forward = types.MethodType(lambda self, rows: 1.25 * plain(self, rows), layer.mlp)
    layer.register_forward_hook(lambda module, args, output: output)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    made = model._get_stopping_criteria
    model._get_stopping_criteria = lambda *args, **kwargs: made(*args, **kwargs)
    return model


def plain(dtype: torch.dtype) -> Any:
    """A base that nobody touched, of a shape that the kernels take: its layers are fused."""
    return build_tiny(seed=5, hidden=128, inner=192).to(dtype)


BASES: dict[str, Callable[[], Any]] = {
    "hooks": owned, "float32": lambda: plain(torch.float32), "bfloat16": lambda: plain(torch.bfloat16), "packed": lambda: lossless.pack(plain(torch.bfloat16)),
}  # fmt: skip


class State:
    """All that a base is: what each of its modules holds, down to the very objects, the tensors' bytes, settings, and its logits."""

    def __init__(self, model: Any) -> None:
        self.model, self.objects, self.settings = model, dict(self._objects(model)), model.config.to_json_string()
        self.bytes = {name: tensor.clone() for name, tensor in self._tensors(model)}
        self.logits = self._logits()

    @staticmethod
    def _objects(model: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                yield (name, key), value
                if isinstance(value, dict):
                    yield from (((name, key, inner), held) for inner, held in value.items())
        yield ("attention",), model.config._attn_implementation

    @staticmethod
    def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return itertools.chain(model.named_parameters(), model.named_buffers())

    def _logits(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(LOGITS_OF).logits

    def changes(self) -> list[Any]:
        """What is otherwise than it was."""
        now, gone = dict(self._objects(self.model)), object()
        found: list[Any] = [key for key in {**self.objects, **now} if self.objects.get(key, gone) is not now.get(key, gone)]
        found += [name for name, tensor in self._tensors(self.model) if not torch.equal(tensor, self.bytes[name])]
        if self.model.config.to_json_string() != self.settings:
            found.append("settings")
        if not torch.equal(self._logits(), self.logits):
            found.append("logits")
        return found


def attached(model: Any, **options: Any) -> AcceleratedModel:
    """Accelerated, and drafting whether it pays or not."""
    return accelerate(model, new_adapter(model, tiny_config()).randomize(2), adaptive=False, **options)


@pytest.mark.parametrize("schedule", ["parallel", "deferred"])
@pytest.mark.parametrize("base", [*BASES, "eager", "bfloat16 with hooks"])
def test_in_the_middle_of_anything_the_base_is_as_it_was(schedule: str, base: str) -> None:
    more = {"eager": lambda: owned(attention="eager"), "bfloat16 with hooks": lambda: owned(torch.bfloat16)}
    model = (BASES | more)[base]()
    before, rng, found = State(model), random.Random(1), []
    fast = attached(model, schedule=schedule)
    for run, count in ((lambda: fast.generate(prompt_ids(), **GREEDY), 60), (lambda: attached(model, schedule=schedule), 15)):
        run()
        last = moments(run)
        at = set(rng.sample(range(1, last + 1), count))
        moments(run, at, lambda: found.append(elsewhere(before.changes)))
    assert found == [[]] * len(found)
    assert len(found) > 60
    assert fast.stats.served


def calls(model: Any) -> dict[str, Callable[[], tuple[AcceleratedModel, dict[str, Any]]]]:
    """What is interrupted: accelerated models, each with a call."""
    near, bits = attached(model, schedule="parallel"), attached(model, exact="bitwise")
    tokenizer = letters()
    more = {
        "greedy": (near, {}),
        "sampled": (bits, {"do_sample": True, "temperature": 0.8, "top_k": 20}),
        "stop strings": (near, {"stop_strings": ["no such"], "tokenizer": tokenizer}),
        "scores": (bits, {"return_dict_in_generate": True, "output_scores": True, "repetition_penalty": 1.2}),
        "handed over": (near, {"num_beams": 2}),
    }
    return {name: (fast, GREEDY | options) for name, (fast, options) in more.items()}  # type: ignore[misc]


def answer(speaker: Any, options: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(4)
    out = speaker.generate(prompt_ids(), **options)
    return getattr(out, "sequences", out)


def left_behind(model: Any, before: State) -> list[Any]:
    """Whatever a call should have taken with it."""
    torch.set_grad_enabled(True)  # torch's own no_grad may stay if it is interrupted on its way out
    found = before.changes()
    if PASS.get() is not None:
        found.append("a plan")
    base_lock = lock_of(model)
    if base_lock.serving or not elsewhere(lambda: base_lock.lock.acquire(blocking=False) and not base_lock.lock.release()):
        found.append("a turn")
    return found


@pytest.mark.parametrize("base", BASES)
def test_a_call_that_is_interrupted_anywhere_leaves_nothing_behind(base: str) -> None:
    model, count = BASES[base](), INTERRUPTIONS if base == "hooks" else max(5, INTERRUPTIONS // 2)
    every = calls(model)
    assert any(fast.runner.fused for fast, _ in every.values()) == (base != "hooks" and native.available())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beams are handed over
        expected = {name: answer(model, options) for name, (_, options) in every.items()}
        for fast, options in every.values():
            answer(fast, options)
        before, rng, times = State(model), random.Random(2), 0
        lasts = {name: moments(lambda f=fast, o=options: answer(f, o)) for name, (fast, options) in every.items()}
        for number in range(count):
            name = list(every)[number % len(every)]
            fast, options = every[name]
            moment = rng.randint(1, lasts[name])
            times += interrupted(lambda f=fast, o=options: answer(f, o), moment)
            assert left_behind(model, before) == [], (name, moment)
            assert torch.equal(answer(fast, options), expected[name]), (name, moment)
            assert fast.stats.served == (name != "handed over"), (name, moment)
    assert times > 0.8 * count  # of a few Python cannot tell, in destructors


def test_attaching_that_is_interrupted_anywhere_leaves_nothing_behind() -> None:
    model = owned()
    expected = answer(model, GREEDY)
    attached(model)
    before, rng, times, count = State(model), random.Random(3), 0, max(1, INTERRUPTIONS // 5)
    last = moments(lambda: attached(model))
    for _ in range(count):
        moment = rng.randint(1, last)
        times += interrupted(lambda: attached(model), moment)
        assert left_behind(model, before) == [], moment
    fast = attached(model)
    assert torch.equal(answer(fast, GREEDY), expected)
    assert fast.stats.served
    assert before.changes() == []
    assert times > 0.9 * count


class Pausing(BaseStreamer):
    """Holds a call up behind its first token until it is told to go on."""

    def __init__(self) -> None:
        self.puts, self.here, self.go = 0, threading.Event(), threading.Event()

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 2:  # the first is the prompt
            self.here.set()
            assert self.go.wait(60)

    def end(self) -> None: ...


class Beside:
    """Something that runs in another thread."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.given: list[Any] = []
        self._thread = threading.Thread(target=lambda: self.given.append(run()))
        self._thread.start()

    @property
    def waits(self) -> bool:
        self._thread.join(0.1)
        return self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(60)
        assert self.given, "it failed, or hangs"
        return self.given[0]


@contextlib.contextmanager
def under_way(call: Callable[[Pausing], Any]) -> Iterator[Beside]:
    """A call that has begun, and goes on behind this context."""
    pause = Pausing()
    beside = Beside(lambda: call(pause))
    try:
        assert pause.here.wait(60)
        yield beside
    finally:
        pause.go.set()


def test_whoever_comes_while_a_call_is_under_way_gets_its_own_or_waits() -> None:
    model = owned()
    first, second = attached(model), attached(model, schedule="deferred", exact="bitwise")
    expected, logits = answer(model, GREEDY), State(model).logits
    with under_way(lambda pause: first.generate(prompt_ids(), **GREEDY, streamer=pause)) as call:
        with torch.no_grad():
            assert torch.equal(model(LOGITS_OF).logits, logits)
            assert torch.equal(first(LOGITS_OF).logits, logits)
        assert torch.equal(answer(model, GREEDY), expected)
        waiting = {
            "the same": Beside(lambda: first.generate(prompt_ids(), **GREEDY)),
            "another": Beside(lambda: second.generate(prompt_ids(), **GREEDY)),
            "attaching": Beside(lambda: attached(model).generate(prompt_ids(), **GREEDY)),
            "costs": Beside(lambda: first.measure_costs(refresh=False)),
        }
        assert {name: one.waits for name, one in waiting.items()} == dict.fromkeys(waiting, True)
    assert torch.equal(call.result(), expected)
    found = {name: one.result() for name, one in waiting.items()}
    assert all(torch.equal(found[name], expected) for name in ("the same", "another", "attaching"))


def test_stop_strings_are_read_by_the_tokenizer_of_their_own_call() -> None:
    model = build_tiny(seed=5)
    fast = attached(model)
    plain = answer(model, GREEDY)[0, 7:].tolist()
    ours = letters()
    theirs = type(ours)(tokenizer_object=letters().backend_tokenizer, eos_token="<eos>")
    theirs.get_vocab = lambda: {piece: (number + 40) % 95 for piece, number in ours.get_vocab().items()}
    pieces = ours.convert_ids_to_tokens([plain[5]])[0], ours.convert_ids_to_tokens([(plain[9] - 40) % 95])[0]
    options = [GREEDY | {"stop_strings": [piece], "tokenizer": by} for piece, by in zip(pieces, (ours, theirs), strict=True)]
    expected = [answer(model, given) for given in options]
    assert expected[0].shape != expected[1].shape
    with under_way(lambda pause: fast.generate(prompt_ids(), **options[0], streamer=pause)) as call:
        found = answer(model, options[1])
    assert torch.equal(call.result(), expected[0])
    assert torch.equal(found, expected[1])
    assert torch.equal(answer(fast, options[1]), expected[1])
    assert fast.stats.served


@pytest.mark.parametrize("drafts", ["8 bits", "float_drafts"])
def test_attaching_moves_no_random_number(drafts: str, request: pytest.FixtureRequest) -> None:
    """Not even for a while: another thread may be drawing."""
    if drafts == "float_drafts":
        request.getfixturevalue("float_drafts")
    model = build_tiny(seed=5)
    adapter = new_adapter(model, tiny_config(next_token_rank=4, init_rank=4, schedule="deferred")).randomize(2)
    accelerate(model, adapter)  # costs are measured once
    last = moments(lambda: accelerate(model, adapter))
    drawn: list[torch.Tensor] = []
    torch.manual_seed(6)
    moments(lambda: accelerate(model, adapter), range(1, last, last // 50), lambda: drawn.append(elsewhere(lambda: torch.rand(1))))
    torch.manual_seed(6)
    assert torch.equal(torch.cat(drawn), torch.cat([torch.rand(1) for _ in drawn]))
    assert len(drawn) > 40


def test_a_hook_of_the_owner_s_may_run_the_base_in_the_middle_of_a_pass() -> None:
    model = build_tiny(seed=5)
    within = threading.local()

    def steer(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if getattr(within, "here", False):
            return None
        within.here = True
        try:
            return output + 0.1 * model(LOGITS_OF).logits.mean()
        finally:
            within.here = False

    model.model.layers[2].register_forward_hook(steer)
    fast = attached(model)
    assert torch.equal(answer(fast, GREEDY), answer(model, GREEDY))
    assert fast.stats.served


def test_all_at_once() -> None:
    model = owned()
    fasts = [attached(model, schedule="parallel"), attached(model, schedule="deferred"), attached(model, exact="bitwise")]
    before, expected = State(model), answer(model, GREEDY)

    def generate(speaker: Any) -> bool:
        return all(torch.equal(speaker.generate(prompt_ids(), **GREEDY), expected) for _ in range(4))

    work = [Beside(lambda speaker=speaker: generate(speaker)) for speaker in (*fasts, fasts[0], model)]  # type: ignore[misc]
    work += [Beside(lambda: not any(before.changes() for _ in range(20))), Beside(lambda: generate(attached(model)))]
    assert [one.result() for one in work] == [True] * len(work)
    assert left_behind(model, before) == []
