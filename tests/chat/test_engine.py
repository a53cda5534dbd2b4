"""Answers are the base's own, whoever else asks, whatever is kept, and however an answer before it ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from chat_app.answer import Answer, Comparison, Info, Waiting, Way
from chat_app.engine import MOST_WAITING, Busy, Engine
from chat_app.settings import Settings, TooLong
from lossless.adapter.compat import new_adapter
from lossless.base.loading import Base
from lossless.errors import UsageError
from lossless.generation.model import accelerate
from tests.conftest import tiny_config

from .conftest import Hold, assistant, engine_over, expected, last, until, user

GREEDY = Settings(max_tokens=24)
SAMPLED = Settings(max_tokens=24, temperature=1.0, top_p=0.9, seed=7)
BOTH: tuple[Way, ...] = ("accelerated", "plain")


@pytest.mark.parametrize("way", BOTH)
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_is_the_bases_own(engine: Engine, base: Base, way: Way, settings: Settings) -> None:
    messages = [{"role": "system", "content": "w2 w3"}, user("w5 w6 w7")]
    answer = last(engine.answer(messages, settings, way))
    assert list(answer.tokens) == expected(base, messages, settings)
    assert answer.ending == "length"
    assert answer.served
    assert "".join(answer.pieces) == answer.text == base.tokenizer.decode(answer.tokens, skip_special_tokens=True)
    assert len(answer.sources) == len(answer.tokens) == len(answer.pieces) == 24
    assert list(answer.steps) == sorted(answer.steps, key=lambda step: step.at_s)


def test_the_figures_are_the_loops_own(engine: Engine) -> None:
    answer = last(engine.answer([user("w5 w6 w7")], SAMPLED))
    assert engine.fast is not None
    stats = engine.fast.stats
    assert answer.target_passes == stats.target_passes
    assert answer.acceptance_length == pytest.approx(stats.acceptance_length)
    assert answer.exact == stats.exact
    assert sum(answer.accepted_at_depth()) > 0 or all(source == 0 for source in answer.sources)


@pytest.fixture
def doubtful(base: Base) -> Iterator[Engine]:
    """An engine to which many choices are too close to call."""
    fast = accelerate(base.model, new_adapter(base.model, tiny_config()).randomize(1), exact="near-tie", adaptive=False)
    fast.attached.guarantee = replace(fast.guarantee, noise=1.0)  # many times the real noise
    engine = Engine(base.model, base.tokenizer, fast, Info("tiny", "random", context=512))
    yield engine
    engine.close()


@pytest.mark.parametrize("steps", [24, 9], ids=["whole", "cancelled"])
def test_the_figures_where_close_choices_are_made_again(doubtful: Engine, base: Base, steps: int) -> None:
    engine, calls = doubtful, iter(range(100))
    answer = last(engine.answer([user("w5 w6 w7")], SAMPLED, cancelled=lambda: next(calls) >= steps))
    assert list(answer.tokens) == expected(base, [user("w5 w6 w7")], SAMPLED)[:steps]
    assert len(answer.sources) == len(answer.tokens) == len(answer.pieces)
    assert engine.fast is not None
    stats = engine.fast.stats
    assert stats.reread > 0
    assert answer.target_passes == stats.target_passes
    assert answer.acceptance_length == pytest.approx(stats.acceptance_length)
    assert answer.exact == stats.exact == "near-tie"


def test_pictures_grow(engine: Engine) -> None:
    hold = Hold(after=6)
    events = engine.answer([user("w9")], Settings(max_tokens=12), "plain", cancelled=hold)
    first = next(events)
    assert isinstance(first, Answer)
    assert first.ending is None
    hold.released.set()
    whole = last(events)
    assert whole.text.startswith(first.text)
    assert whole.tokens[: len(first.tokens)] == first.tokens
    assert whole.pieces[: len(first.pieces)] == first.pieces


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_comparison(engine: Engine, base: Base, settings: Settings) -> None:
    before = engine.conversation()
    events = list(engine.compare([user("w8 w9")], settings, before))
    both = events[-1]
    assert isinstance(both, Comparison)
    assert both.difference is None
    assert both.margin is None
    assert list(both.plain.tokens) == expected(base, [user("w8 w9")], settings)
    assert both.speedup == both.plain.seconds / both.accelerated.seconds
    ways = [event.way for event in events[:-1]]
    assert ways == sorted(ways)  # all pictures of the accelerated one come first


def test_the_margin_of_a_difference(engine: Engine, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.fast is not None
    generate = engine.fast.generate

    def astray(ids: torch.Tensor, **arguments: Any) -> Any:  # as if the accelerated model read another text
        return generate(torch.cat([ids[:, :-1], ids[:, -1:] + 1], dim=1), **arguments)

    monkeypatch.setattr(engine.fast, "generate", astray)
    rows: list[int] = []
    watch = base.model.lm_head.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[1]))
    both = last(engine.compare([user("w8 w9")], GREEDY))
    watch.remove()
    assert both.difference is not None
    assert both.margin is not None
    assert both.margin > 0
    assert both.speedup is None
    assert rows[-1] == 1  # of the text whose last choice is looked at: each is of a whole vocabulary


@pytest.mark.parametrize("way", BOTH)
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_kept_rows_change_nothing(engine: Engine, base: Base, way: Way, settings: Settings) -> None:
    conversation, messages = engine.conversation(), list[dict[str, str]]()
    for turn in range(4):
        messages.append(user(f"w{turn + 5} w{turn + 20}"))
        answer = last(engine.answer(messages, settings, way, conversation))
        assert list(answer.tokens) == expected(base, messages, settings)
        assert (answer.cached_tokens > 0) == (turn > 0)
        messages.append(assistant(answer.text))
    retried = last(engine.answer(messages[:-1], settings, way, conversation))
    assert list(retried.tokens) == expected(base, messages[:-1], settings)
    assert retried.cached_tokens == retried.prompt_tokens - 1
    edited = [*messages[:2], user("w40 w41 w42")]
    answer = last(engine.answer(edited, settings, way, conversation))
    assert list(answer.tokens) == expected(base, edited, settings)
    assert 0 < answer.cached_tokens < answer.prompt_tokens
    other = [user("w60")]
    assert list(last(engine.answer(other, settings, way, conversation)).tokens) == expected(base, other, settings)


def test_a_comparison_starts_both_sides_from_the_same_rows(engine: Engine, base: Base) -> None:
    conversation, messages = engine.conversation(), [user("w5 w6")]
    messages.append(assistant(last(engine.answer(messages, GREEDY, conversation=conversation)).text))
    messages.append(user("w7"))
    both = last(engine.compare(messages, GREEDY, conversation))
    assert both.accelerated.cached_tokens == both.plain.cached_tokens > 0
    assert list(both.plain.tokens) == list(both.accelerated.tokens) == expected(base, messages, GREEDY)


def test_one_conversation_may_keep_several_texts(engine: Engine) -> None:
    conversation = engine.conversation(most=2)
    for text in ("w5 w6 w7", "w15 w16 w17", "w5 w6 w7", "w15 w16 w17"):
        answer = last(engine.answer([user(text)], GREEDY, conversation=conversation))
    assert answer.cached_tokens == answer.prompt_tokens - 1


def test_what_is_kept_is_bounded(base: Base) -> None:
    probe = engine_over(base, adapted=False)
    last(probe.answer([user("w5")], GREEDY, "plain", one := probe.conversation()))
    once = probe.kept_bytes
    assert once > 0
    small = engine_over(base, adapted=False, kept_bytes=int(2.5 * once))
    conversations = [small.conversation() for _ in range(4)]
    for conversation in conversations:
        last(small.answer([user("w5")], GREEDY, "plain", conversation))
        assert small.kept_bytes <= 2.5 * once
    assert [bool(conversation.texts) for conversation in conversations] == [False, False, True, True]
    assert list(last(small.answer([user("w5")], GREEDY, "plain", conversations[0])).tokens) == expected(base, [user("w5")], GREEDY)
    del one, conversation, conversations
    assert small.kept_bytes == 0  # a session that is over holds nothing
    probe.close()
    small.close()


def test_first_come_first_served(engine: Engine, in_background: Callable[..., list[Any]]) -> None:
    hold = Hold()
    first = in_background(engine.answer([user("w5")], GREEDY, cancelled=hold))
    assert hold.reached.wait(20)
    others = [engine.answer([user(f"w{number}")], GREEDY) for number in (6, 7, 8)]
    assert [next(events) for events in others] == [Waiting(1), Waiting(2), Waiting(3)]
    assert engine.waiting == 4
    others[0].close()
    assert [next(events) for events in others[1:]] == [Waiting(1), Waiting(2)]
    hold.released.set()
    assert [last(events).ending for events in others[1:]] == ["length", "length"]
    assert not any(isinstance(event, Waiting) for event in first)


def test_cancelled_while_waiting(engine: Engine, in_background: Callable[..., list[Any]]) -> None:
    hold, gone = Hold(), threading.Event()
    in_background(engine.answer([user("w5")], GREEDY, cancelled=hold))
    assert hold.reached.wait(20)
    events = engine.answer([user("w6")], GREEDY, cancelled=gone.is_set)
    assert next(events) == Waiting(1)
    gone.set()
    answer = last(events)
    assert (answer.ending, answer.tokens) == ("cancelled", ())
    hold.released.set()


@pytest.mark.parametrize("way", BOTH)
def test_cancelled_midway(engine: Engine, base: Base, way: Way) -> None:
    whole, calls, conversation = expected(base, [user("w5")], SAMPLED), iter(range(100)), engine.conversation()
    answer = last(engine.answer([user("w5")], SAMPLED, way, conversation, cancelled=lambda: next(calls) >= 9))
    assert answer.ending == "cancelled"
    assert list(answer.tokens) == whole[:9]  # asked once before the first token, and once after each
    again = [user("w5"), assistant(answer.text), user("w6")]
    after = last(engine.answer(again, SAMPLED, way, conversation))
    assert list(after.tokens) == expected(base, again, SAMPLED)
    assert after.cached_tokens > 0


def test_a_cancelled_comparison_ends_with_both_cancelled(engine: Engine) -> None:
    calls = iter(range(100))
    both = last(engine.compare([user("w5")], GREEDY, cancelled=lambda: next(calls) >= 5))
    assert (both.accelerated.ending, both.plain.ending) == ("cancelled", "cancelled")
    assert len(both.accelerated.tokens) == 5
    assert both.speedup is None


@pytest.mark.parametrize("way", BOTH)
def test_closing_frees_the_slot(engine: Engine, base: Base, way: Way) -> None:
    hold = Hold(after=3)
    events = engine.answer([user("w5")], Settings(max_tokens=400), way, cancelled=hold)
    assert isinstance(next(events), Answer)
    assert hold.reached.wait(20)
    events.close()  # type: ignore[attr-defined]
    before = engine.totals()[way, "cancelled"].tokens if (way, "cancelled") in engine.totals() else 0
    hold.released.set()
    assert list(last(engine.answer([user("w6")], GREEDY, way)).tokens) == expected(base, [user("w6")], GREEDY)
    assert 0 < engine.totals()[way, "cancelled"].tokens - before < 12  # at most the rest of one step came after it


@pytest.mark.parametrize("way", BOTH)
def test_a_failure_is_how_one_answer_ends(engine: Engine, base: Base, way: Way, caplog: pytest.LogCaptureFixture) -> None:
    calls = iter(range(100))

    def broken() -> bool:
        if next(calls) == 6:
            raise RuntimeError("the device fell off\nand more")
        return False

    conversation = engine.conversation()
    answer = last(engine.answer([user("w5")], GREEDY, way, conversation, broken))
    assert (answer.ending, answer.why) == ("error", "the answer could not be finished: the device fell off")
    assert "Traceback" in caplog.text
    assert not conversation.texts
    assert list(last(engine.answer([user("w5")], GREEDY, way, conversation)).tokens) == expected(base, [user("w5")], GREEDY)


@pytest.mark.parametrize("way", BOTH)
def test_stop_strings(engine: Engine, base: Base, way: Way) -> None:
    whole = last(engine.answer([user("w5")], SAMPLED, way))
    words = whole.text.split()
    stop = f"{words[8]} {words[9]}"
    answer = last(engine.answer([user("w5")], Settings(max_tokens=24, temperature=1.0, top_p=0.9, seed=7, stop=("nothing", stop)), way))
    assert answer.ending == "stop"
    assert answer.text == whole.text[: whole.text.index(stop)] == "".join(answer.pieces)
    assert whole.tokens[: len(answer.tokens)] == answer.tokens
    assert answer.tokens[-1] == base.tokenizer.convert_tokens_to_ids(words[9])


def test_a_beginning_of_a_stop_string_is_held_back(engine: Engine, in_background: Callable[..., list[Any]]) -> None:
    pieces = last(engine.answer([user("w5")], SAMPLED, "plain")).pieces
    hold = Hold(after=8)  # once before the first token, and up to the eighth
    settings = Settings(max_tokens=12, temperature=1.0, top_p=0.9, seed=7, stop=(f"{pieces[7].strip()} nothing",))
    found = in_background(engine.answer([user("w5")], settings, "plain", cancelled=hold))
    assert hold.reached.wait(20)
    until(lambda: bool(found) and len(found[-1].tokens) == 8)
    assert found[-1].text == "".join(pieces[:7]) + " "
    hold.released.set()
    until(lambda: found[-1].ending is not None)
    assert found[-1].text == "".join(pieces[:12])
    assert all(later.text.startswith(earlier.text) for earlier, later in pairwise(found))


@pytest.mark.parametrize("way", BOTH)
def test_the_end_of_a_text(base: Base, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = expected(base, [user("w5")], SAMPLED)
    monkeypatch.setattr(base.model.generation_config, "eos_token_id", [whole[10], 95])
    engine = engine_over(base)
    answer = last(engine.answer([user("w5")], SAMPLED, way))
    assert answer.ending == "stop"
    assert list(answer.tokens) == whole[: whole.index(whole[10]) + 1]
    engine.close()


@pytest.mark.parametrize("way", BOTH)
def test_the_models_defaults_do_not_decide(engine: Engine, base: Base, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = [list(last(engine.answer([user("w5")], settings, way)).tokens) for settings in (GREEDY, SAMPLED)]
    for name, value in {"do_sample": True, "top_k": 1, "min_p": 0.9, "temperature": 0.1, "typical_p": 0.2, "epsilon_cutoff": 0.5}.items():
        monkeypatch.setattr(base.model.generation_config, name, value)
    assert [list(last(engine.answer([user("w5")], settings, way)).tokens) for settings in (GREEDY, SAMPLED)] == usual


@pytest.mark.filterwarnings("ignore:not accelerated. output_hidden_states:UserWarning")  # said on the server's terminal, too
def test_what_is_not_accelerated_says_so(engine: Engine, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = expected(base, [user("w5")], SAMPLED)
    monkeypatch.setattr(base.model.generation_config, "output_hidden_states", True)
    answer = last(engine.answer([user("w5")], SAMPLED))
    assert (answer.served, answer.why) == (False, "output_hidden_states was set")
    assert list(answer.tokens) == whole
    assert len(answer.steps) == len(whole)
    assert last(engine.answer([user("w5")], SAMPLED, "plain")).served


@pytest.mark.parametrize("way", BOTH)
def test_logprobs_are_the_models_own(engine: Engine, base: Base, way: Way) -> None:
    answer = last(engine.answer([user("w5")], SAMPLED, way, logprobs=3))
    ids = torch.tensor([[*base.tokenizer(base.tokenizer.apply_chat_template([user("w5")], tokenize=False, add_generation_prompt=True))["input_ids"], *answer.tokens]])
    logits = torch.log_softmax(base.model(ids).logits[0, -len(answer.tokens) - 1 : -1], dim=-1)
    assert len(answer.logprobs) == len(answer.tokens)
    for row, token, (own, best) in zip(logits, answer.tokens, answer.logprobs, strict=True):
        assert own == pytest.approx(float(row[token]), abs=1e-3)
        assert [value for _, value in best] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


def test_a_text_is_gone_on_with(engine: Engine, base: Base) -> None:
    assert list(last(engine.answer("w5 w6", GREEDY)).tokens) == expected(base, "w5 w6", GREEDY)


def test_an_answer_has_as_much_room_as_the_context_leaves(engine: Engine) -> None:
    answer = last(engine.answer([user("w5 " * 500)], Settings(max_tokens=100)))
    assert answer.ending == "length"
    assert answer.prompt_tokens + len(answer.tokens) == 512


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one message"),
        ([{"role": "tool", "content": "x"}], "the role of message 1 must be one of system, user, assistant, got 'tool'"),
        ([user("x"), assistant("y")], "the last message must be the user's"),
        ([user("x"), {"role": "system", "content": "y"}, user("z")], "must be the first one, got one as message 2"),
        ([{"role": "user", "content": None}], "must be a text, got NoneType"),
        ([user("w5")] * 201, "at most 200 messages, got 201"),
        ([user("w5 \ud83d")], "must be Unicode text, got half of a surrogate pair at character 4"),
        ("w5 \ud83d", "must be Unicode text, got half of a surrogate pair at character 4"),
    ],
)
def test_what_cannot_be_answered(engine: Engine, messages: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        engine.check(messages, GREEDY)
    with pytest.raises(UsageError, match=said):  # by the call, before anything is asked of the iterator
        engine.answer(messages, GREEDY)


def test_too_long_a_prompt(engine: Engine) -> None:
    with pytest.raises(TooLong, match="less than 512 tokens, this one has 513"):
        engine.check([user("w5 " * 511)], GREEDY)
    with pytest.raises(TooLong, match="at most 100000 characters, got 100001"):
        engine.check([user("x" * 100_001)], GREEDY)


def test_too_many_at_once(engine: Engine, in_background: Callable[..., list[Any]]) -> None:
    hold = Hold()
    in_background(engine.answer([user("w5")], GREEDY, cancelled=hold))
    assert hold.reached.wait(20)
    waiting = [engine.answer([user("w5")], GREEDY) for _ in range(MOST_WAITING - 1)]
    for events in waiting:
        next(events)
    with pytest.raises(Busy, match=f"at most {MOST_WAITING} answers"):
        engine.answer([user("w5")], GREEDY)
    for events in waiting:
        events.close()  # type: ignore[attr-defined]
    hold.released.set()


def test_without_an_adapter_the_only_way_is_the_plain_one(base: Base) -> None:
    engine = engine_over(base, adapted=False)
    assert list(last(engine.answer([user("w5")], GREEDY, "plain")).tokens) == expected(base, [user("w5")], GREEDY)
    for ask in (engine.answer, engine.compare):
        with pytest.raises(UsageError, match="there is no adapter for tiny"):
            ask([user("w5")], GREEDY)
    assert engine.plain_tokens_per_s is not None
    engine.close()


def test_a_closed_engine_gives_nothing(base: Base, in_background: Callable[..., list[Any]]) -> None:
    engine, hold = engine_over(base, adapted=False), Hold()
    found = in_background(engine.answer([user("w5")], GREEDY, "plain", cancelled=hold))
    assert hold.reached.wait(20)
    waiting = in_background(engine.answer([user("w5")], GREEDY, "plain"))
    threading.Timer(0.1, hold.released.set).start()
    engine.close()
    assert last(engine.answer([user("w5")], GREEDY, "plain")).ending == "cancelled"
    until(lambda: all(some and getattr(some[-1], "ending", None) for some in (found, waiting)))  # the threads have only to be told
    assert found[-1].ending == waiting[-1].ending == "cancelled"


def test_twenty_messages_from_four_sessions_at_once(engine: Engine, base: Base) -> None:
    said: dict[tuple[int, int], Answer] = {}

    def session(number: int) -> None:
        conversation, messages = engine.conversation(), list[dict[str, str]]()
        for turn in range(5):
            messages.append(user(f"w{5 + 7 * number} w{10 + turn}"))
            settings = Settings(max_tokens=16, temperature=float(turn % 2), seed=100 * number + turn)
            answer = last(engine.answer(messages, settings, BOTH[number % 2], conversation))
            said[number, turn] = answer
            messages.append(assistant(answer.text))

    threads = [threading.Thread(target=session, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(said) == 20
    for number in range(4):
        messages = list[dict[str, str]]()
        for turn in range(5):
            messages.append(user(f"w{5 + 7 * number} w{10 + turn}"))
            settings = Settings(max_tokens=16, temperature=float(turn % 2), seed=100 * number + turn)
            assert list(said[number, turn].tokens) == expected(base, messages, settings)
            messages.append(assistant(said[number, turn].text))
