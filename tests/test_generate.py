"""All of generate(): whatever its arguments switch on gives what the base's own loop gives."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import warnings
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AsyncTextIteratorStreamer,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from lossless.adapter.compat import new_adapter
from lossless.base.layers import CACHE
from lossless.base.loading import Base, freeze, load_base
from lossless.evaluation.bench import Decoding
from lossless.evaluation.certificate import force
from lossless.generation import exactness
from lossless.generation.exactness import Passes, find_guarantee
from lossless.generation.model import AcceleratedModel, accelerate

from .conftest import VOCAB, build_tiny, prompt_ids, tiny_config
from .test_lossless import Oracle, both

SWITCHES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.4},
    "encoder-repetition": {"encoder_repetition_penalty": 1.3},
    "n-grams": {"no_repeat_ngram_size": 2},
    "encoder-n-grams": {"encoder_no_repeat_ngram_size": 2},
    "bad-words": {"bad_words_ids": [[5], [11, 12], [40]]},
    "forced-eos": {"forced_eos_token_id": 2, "eos_token_id": 2},
    "suppressed": {"suppress_tokens": [3, 4, 5, 6, 7, 8, 9, 10]},
    "suppressed-first": {"begin_suppress_tokens": list(range(40, 90))},
    "bias": {"sequence_bias": {(10,): 4.0, (20, 21): -5.0, (30,): 2.5}},
    "decay": {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 7},
    "min-length": {"min_length": 20, "eos_token_id": list(range(10, 40))},
    "min-new": {"min_new_tokens": 15, "eos_token_id": list(range(10, 40))},
    "eos-list": {"eos_token_id": [17, 23, 31, 44]},
    "max-length": {"max_new_tokens": None, "max_length": 19},
    "invalid": {"remove_invalid_values": True, "renormalize_logits": True},
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [9], "sequence_bias": {(12,): 3.0}},
}
WARPERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.05},
    "top-h": {"top_h": 0.4},
    "typical": {"typical_p": 0.6},
    "epsilon": {"epsilon_cutoff": 0.01},
    "eta": {"eta_cutoff": 0.02},
    "several": {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.01},
    "all": {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9},
}
BY_ENTROPY = ("top-h", "typical", "eta", "all")  # which no guard covers: not under near-tie


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_every_processor_that_a_config_switches_on(fast: AcceleratedModel, switch: str, do_sample: bool) -> None:
    for seed in range(2):
        expected, found = both(fast, prompt_ids(7, seed), seed, do_sample=do_sample, **SWITCHES[switch])
        assert torch.equal(expected, found)
        assert fast.stats.served


@pytest.mark.parametrize(
    ("warper", "exact"), [(warper, exact) for warper in WARPERS for exact in ("bitwise", "near-tie") if exact == "bitwise" or warper not in BY_ENTROPY]
)
def test_every_warper(warper: str, exact: str) -> None:
    model = build_tiny(hidden=64, inner=160)  # whose products keep their bits for some rows
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(1), exact=exact)
    for seed in range(3):
        expected, found = both(fast, prompt_ids(7, seed), seed, do_sample=True, **{"top_k": 0, **WARPERS[warper]})
        assert torch.equal(expected, found)
        assert fast.stats.served


def test_a_grammar(fast: AcceleratedModel) -> None:
    def allowed(batch: int, ids: torch.Tensor) -> list[int]:
        return [3 + (int(ids[-1]) * k) % 80 for k in (1, 2, 3, 5)]

    for do_sample in (False, True):
        expected, found = both(fast, prompt_ids(), 1, do_sample=do_sample, prefix_allowed_tokens_fn=allowed)
        assert torch.equal(expected, found)
        ids = prompt_ids(6).repeat(3, 1)
        expected, found = both(fast, ids, 1, do_sample=do_sample, prefix_allowed_tokens_fn=allowed)
        assert torch.equal(expected, found)


@pytest.fixture
def chat(tiny_folder: Any) -> tuple[Base, AcceleratedModel]:
    base = load_base(str(tiny_folder), "float32")
    return base, accelerate(base.model, new_adapter(base.model, tiny_config()).randomize(1))


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, in the manner of byte-level ones."""
    symbols = [*pre_tokenizers.ByteLevel.alphabet()]
    ascii_ones = sorted(symbol for symbol in symbols if 33 <= ord(symbol) < 127)
    tokenizer = Tokenizer(BPE({symbol: i for i, symbol in enumerate([*ascii_ones, "\u0120"][:95])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_stop_strings(fast: AcceleratedModel, do_sample: bool) -> None:
    ids, tokenizer = prompt_ids(), letters()
    torch.manual_seed(5)
    plain = fast.base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=do_sample)
    stop = tokenizer.decode(plain[0, 30:32])
    assert len(stop) == 2
    expected, found = both(fast, ids, 5, do_sample=do_sample, stop_strings=[stop, "no such"], tokenizer=tokenizer)
    assert torch.equal(expected, found)
    assert found.shape[1] <= 32


@pytest.mark.filterwarnings("ignore:not accelerated")
def test_criteria_that_are_none_are_refused_as_by_the_base(fast: AcceleratedModel) -> None:
    said = []
    for model in (fast.base, fast):
        with pytest.raises(TypeError) as caught:
            model.generate(prompt_ids(), max_new_tokens=3, stop_strings=["a"], tokenizer=letters(), stopping_criteria=3)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_no_time_left(fast: AcceleratedModel) -> None:
    expected, found = both(fast, prompt_ids(), max_time=0.0)
    assert torch.equal(expected, found)
    assert found.shape[1] == 8


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_scores_and_logits(fast: AcceleratedModel, do_sample: bool) -> None:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "do_sample": do_sample}
    expected, found = both(fast, prompt_ids(), 4, temperature=0.7, repetition_penalty=1.2, **options)
    assert type(expected) is type(found)
    assert torch.equal(expected.sequences, found.sequences)
    for name in ("scores", "logits"):
        ours, theirs = torch.cat(getattr(found, name)), torch.cat(getattr(expected, name))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert getattr(found, CACHE).get_seq_length() == getattr(expected, CACHE).get_seq_length()


def test_several_answers_to_each_prompt(fast: AcceleratedModel) -> None:
    ids = torch.cat([prompt_ids(5, 1), prompt_ids(5, 2)])
    expected, found = both(fast, ids, 3, do_sample=True, num_return_sequences=3)
    assert torch.equal(expected, found)
    assert len({tuple(row) for row in found.tolist()}) == 6


@pytest.mark.parametrize("schedule", ["parallel", "deferred"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_embeddings_in_place_of_tokens(schedule: str, do_sample: bool) -> None:
    model = build_tiny(seed=5)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), schedule=schedule)
    lengths = (9, 4, 6)
    embeds, mask = torch.zeros(3, 9, 32), torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        embeds[row, 9 - length :] = torch.randn(length, 32)
        mask[row, 9 - length :] = 1
    for rows in (slice(0, 1), slice(1, 2), slice(0, 3)):
        given = {"inputs_embeds": embeds[rows], "attention_mask": mask[rows], "max_new_tokens": 30, "do_sample": do_sample}
        torch.manual_seed(1)
        expected = model.generate(**given)
        torch.manual_seed(1)
        assert torch.equal(fast.generate(**given), expected)
        assert fast.stats.served


@pytest.mark.parametrize("schedule", ["parallel", "deferred"])
@pytest.mark.parametrize("whole", [True, False], ids=["all ids", "new ids"])
def test_a_conversation_that_goes_on_from_its_cache(schedule: str, whole: bool) -> None:
    model = build_tiny(seed=5)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), schedule=schedule)

    def talk(speaker: Any) -> tuple[list[torch.Tensor], DynamicCache]:
        cache, ids, said = DynamicCache(config=model.config), prompt_ids(6), []
        for turn in range(3):
            given = ids if whole or turn == 0 else ids[:, cache.get_seq_length() :]
            torch.manual_seed(turn)
            out = speaker.generate(
                given, attention_mask=torch.ones_like(ids), **{CACHE: cache}, max_new_tokens=15, do_sample=turn == 1
            )
            said.append(out)
            ids = torch.cat([ids, out[:, given.shape[1] :], prompt_ids(4, seed=turn)], dim=1)
        return said, cache

    (expected, theirs), (found, ours) = talk(model), talk(fast)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert fast.stats.served
    assert ours.get_seq_length() == theirs.get_seq_length()
    torch.testing.assert_close(ours.layers[2].keys, theirs.layers[2].keys, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("why", "options"),
    [
        ("the generation mode beam_search", {"num_beams": 3}),
        ("the generation mode beam_sample", {"num_beams": 2, "do_sample": True}),
        ("past_key_values is not a DynamicCache", {CACHE: "static"}),
        ("cache_implementation was set", {"cache_implementation": "static"}),
        ("output_hidden_states was set", {"output_hidden_states": True, "return_dict_in_generate": True}),
        ("the generation mode assisted_generation", {"prompt_lookup_num_tokens": 3}),
        ("assistant_model was given", {"assistant_model": "itself"}),
        ("return_dict_in_generate for a batch", {"num_return_sequences": 2, "do_sample": True, "return_dict_in_generate": True}),
        ("guidance_scale, prefill_chunk_size or use_cache=False was set", {"use_cache": False}),
        ("position_ids was given", {"position_ids": torch.tensor([[0, 1, 2, 3, 9, 10, 11]])}),
        ("a prompt that is padded elsewhere than on the left", {"attention_mask": torch.tensor([[1, 1, 0, 0, 1, 1, 1]])}),
    ],
)
def test_what_is_not_served_is_the_base_s_own_with_one_warning(why: str, options: dict[str, Any]) -> None:
    model = build_tiny(seed=5)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))

    def given() -> dict[str, Any]:
        real = dict(options)
        if real.get(CACHE):
            real[CACHE] = StaticCache(config=model.config, max_cache_len=64)
        if real.get("assistant_model"):
            real["assistant_model"] = build_tiny(seed=6)
        return {"attention_mask": torch.ones(1, 7), "max_new_tokens": 12, "do_sample": False, **real}

    ids = prompt_ids()
    torch.manual_seed(0)
    expected = model.generate(ids, **given())
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=f"not accelerated: {why}"):
        found = fast.generate(ids, **given())
    assert torch.equal(getattr(expected, "sequences", expected), getattr(found, "sequences", found))
    assert not fast.stats.served
    fast.generate(ids, **given())  # a second warning would be an error here


def test_a_text_streamer_prints_what_the_base_s_prints(
    chat: tuple[Base, AcceleratedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    base, fast = chat
    ids = prompt_ids()
    said = []
    for speaker in (fast.base, fast):
        streamer = TextStreamer(base.tokenizer, skip_prompt=True)
        speaker.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, streamer=streamer)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


def test_an_async_streamer(chat: tuple[Base, AcceleratedModel]) -> None:
    base, fast = chat
    tokenizer: PreTrainedTokenizerFast = base.tokenizer
    ids = prompt_ids()
    plain = fast.base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[0, 7:]

    async def read() -> str:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=fast.generate, args=(ids,), kwargs=options)
        thread.start()
        said = "".join([piece async for piece in streamer])
        thread.join()
        return said

    assert asyncio.run(read()) == tokenizer.decode(plain)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_turn_otherwise_in_long_texts(kind: str) -> None:
    """The base goes by the last position it reads; a draft or a stream would be one further on."""
    model = build_tiny(seed=5)
    more = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]} if kind == "longrope" else {}
    model.config.max_position_embeddings = 40
    model.config.rope_parameters = {
        "rope_type": kind, "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 40, **more
    }  # fmt: skip
    model = freeze(type(model)(model.config))
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    # what `dynamic` does with a text that is long from the start hangs on the call before, in the base's own loop too
    cache = DynamicCache(config=model.config)
    model(prompt_ids(30), **{CACHE: cache})
    with pytest.warns(UserWarning, match="a text that may outgrow"):  # with what is in the cache already
        fast.generate(prompt_ids(4), attention_mask=torch.ones(1, 34), **{CACHE: cache}, max_new_tokens=10, do_sample=False)
    fast._warned.clear()
    for length, count, reason in ((7, 20, False), (7, 60, True), *([(50, 20, False)] if kind == "longrope" else [])):
        options = {"attention_mask": torch.ones(1, length), "max_new_tokens": count, "do_sample": False}
        expected = model.generate(prompt_ids(length), **options)
        with pytest.warns(UserWarning, match="a text that may outgrow") if reason and not fast._warned else contextlib.nullcontext():
            assert torch.equal(fast.generate(prompt_ids(length), **options), expected)
        assert fast.stats.served != reason


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
@pytest.mark.parametrize("schedule", ["parallel", "deferred"])
@pytest.mark.parametrize("most", [25, 90], ids=["the last allowed", "with an end before it"])
def test_an_answer_up_to_the_end_of_the_context(family: str, schedule: str, most: int) -> None:
    """No draft and no stream may stand where the base has no position."""
    config = AutoConfig.for_model(
        family, vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=32, rotary_dim=4, initializer_range=0.3,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(3)
    model = freeze(AutoModelForCausalLM.from_config(config))
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), schedule=schedule, exact="near-tie", adaptive=False)
    options = {"attention_mask": torch.ones(1, 7), "max_new_tokens": most, "do_sample": False}
    options["stopping_criteria"] = [lambda ids, scores, **_: torch.tensor([ids.shape[1] == 32])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(fast.generate(prompt_ids(), **options), model.generate(prompt_ids(), **options))
    assert fast.stats.served
    assert fast.stats.drafted > 25


def test_the_cache_that_is_returned_can_be_gone_on_from() -> None:
    model = build_tiny(seed=5)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    answers = []
    for speaker in (model, fast):
        first = speaker.generate(
            prompt_ids(), attention_mask=torch.ones(1, 7), max_new_tokens=12, do_sample=False, return_dict_in_generate=True
        )
        more = torch.cat([first.sequences, prompt_ids(3, seed=4)], dim=1)
        mask = torch.ones_like(more)
        answers.append(
            speaker.generate(more, attention_mask=mask, **{CACHE: getattr(first, CACHE)}, max_new_tokens=12, do_sample=False)
        )
    assert torch.equal(*answers)
    assert fast.stats.served


def test_experts_go_about_rows_as_in_the_base_s_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the prefill HF lets them compute otherwise on some devices; so the probe and the certificate must, too."""
    model = build_tiny(seed=5)
    told: list[Any] = []

    @contextlib.contextmanager
    def mark() -> Iterator[None]:
        told.append("decode")
        yield
        told.append("end")

    monkeypatch.setattr(model, "_optimize_model_for_decode", mark, raising=True)
    def note(module: Any, given: Any, kwargs: Any, output: Any) -> None:
        told.append("prompt" if output.last_hidden_state.shape[1] in (7, 24) else "pass")

    hook = model.model.register_forward_hook(note, with_kwargs=True)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    seen = []
    for speaker in (model, fast):
        told.clear()
        speaker.generate(prompt_ids(), attention_mask=torch.ones(1, 7), max_new_tokens=5, do_sample=False)
        order = [what for what, _ in groupby(told)]  # a twin enters it, too
        seen.append((order[:3], order[-1], order.count("decode")))
    assert seen[0] == seen[1] == (["prompt", "decode", "pass"], "end", 1)
    base, logits = Base(model, None, "tiny"), torch.zeros(1, VOCAB)
    monkeypatch.setattr(exactness, "_LONG", 24)  # behind which prompts are read in pieces
    for ask in (
        lambda: find_guarantee(fast.runner, "near-tie", Passes(6)),
        lambda: force(base, prompt_ids(), [3, 4, 5], [logits] * 3, Decoding(max_new_tokens=3)),
    ):
        told.clear()
        ask()
        within = [told[:place].count("decode") - told[:place].count("end") for place in range(len(told))]
        assert {what: {inside for inside, said in zip(within, told, strict=True) if said == what} for what in ("prompt", "pass")} == {
            "prompt": {0}, "pass": {1}
        }  # fmt: skip
    hook.remove()


def test_two_threads_with_an_adapter_each_on_one_base() -> None:
    model = build_tiny(seed=5)
    both = [accelerate(model, new_adapter(model, tiny_config(schedule=s)).randomize(2)) for s in ("parallel", "deferred")]
    options = {"attention_mask": torch.ones(1, 7), "max_new_tokens": 40, "do_sample": False}
    expected, found = model.generate(prompt_ids(), **options), []

    def speak(fast: AcceleratedModel) -> None:
        for number in range(6):
            more = {"num_beams": 2} if number == 3 else {}  # the base's own loop, in the middle of the other's
            out = fast.generate(prompt_ids(), **options, **more)
            found.append(bool(more) or torch.equal(out, expected))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beams are not accelerated; warnings are not caught by thread
        threads = [threading.Thread(target=speak, args=(fast,)) for fast in both]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 12
    assert model.config._attn_implementation == "sdpa"


def test_a_processor_may_call_the_base() -> None:
    model = build_tiny(seed=5)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), exact="off")

    class Guided(LogitsProcessor):
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return scores + 0.5 * model(ids[:, -3:]).logits[:, -1]

    class Asking(LogitsProcessor):
        speaker: Any = model

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            said = self.speaker.generate(ids[:, -2:], attention_mask=torch.ones(1, 2), max_new_tokens=1, do_sample=False)
            scores[:, said[0, -1]] += 3.0
            return scores

    asking = Asking()
    for processor in (Guided(), asking):
        options = {"attention_mask": torch.ones(1, 7), "max_new_tokens": 20, "do_sample": False, "logits_processor": [processor]}
        asking.speaker = model
        expected = model.generate(prompt_ids(), **options)
        asking.speaker = fast
        with pytest.warns(UserWarning, match="generate was called within generate") if processor is asking else contextlib.nullcontext():
            assert torch.equal(fast.generate(prompt_ids(), **options), expected)
        assert fast.stats.served
        assert fast.stats.tokens == 20


def test_a_streamer_can_tell_a_criterion_to_stop() -> None:
    """Token for token: the base asks its criteria, tells the streamer, and only then goes on."""

    class Enough(BaseStreamer, StoppingCriteria):
        def __init__(self) -> None:
            self.seen = 0

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.numel()

        def end(self) -> None: ...

        def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.tensor([self.seen >= 7 + 5])

    model = build_tiny(seed=5)
    plain = model.generate(prompt_ids(), attention_mask=torch.ones(1, 7), max_new_tokens=30, do_sample=False)[0, 7:].tolist()
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    fast.attached.drafter = Oracle(plain)
    said = []
    for speaker in (model, fast):
        stop = Enough()
        said.append(
            speaker.generate(
                prompt_ids(), attention_mask=torch.ones(1, 7), max_new_tokens=30, do_sample=False, streamer=stop, stopping_criteria=[stop]
            )
        )
    assert torch.equal(*said)
    assert said[0].shape[1] < 37


def test_a_draw_that_torch_refuses() -> None:
    class Broken(LogitsProcessor):
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores if ids.shape[1] < 12 else torch.full_like(scores, -torch.inf)

    model = build_tiny(seed=5)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), exact="off")
    for speaker in (model, fast):
        with pytest.raises(RuntimeError, match="probability tensor contains either"):
            speaker.generate(
                prompt_ids(), attention_mask=torch.ones(1, 7), max_new_tokens=20, do_sample=True, logits_processor=[Broken()]
            )


def test_a_watermark_that_remembers_is_not_asked_twice() -> None:
    model = build_tiny(seed=5)
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2), exact="near-tie")
    mark = SynthIDTextWatermarkingConfig(keys=[3, 1, 4, 1, 5], ngram_len=3)
    options = {"attention_mask": torch.ones(1, 7), "max_new_tokens": 20, "do_sample": True, "watermarking_config": mark}
    torch.manual_seed(0)
    expected = model.generate(prompt_ids(), **options)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="a processor that may remember what it was asked, under near-tie"):
        assert torch.equal(fast.generate(prompt_ids(), **options), expected)
    bitwise = accelerate(build_tiny(seed=5, hidden=64, inner=160), new_adapter(build_tiny(hidden=64, inner=160), tiny_config()), exact="bitwise")
    assert bitwise.generate(prompt_ids(), **options) is not None
    assert bitwise.stats.served
    with pytest.warns(UserWarning, match="a processor that may remember what it was asked, under near-tie"):  # which padding brings
        bitwise.generate(prompt_ids(), **options | {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]])})


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_long_prompts_and_answers(do_sample: bool) -> None:
    """The cache grows in the middle of the call."""
    model = build_tiny(seed=5)
    model.config.max_position_embeddings = 1024
    fast = accelerate(model, new_adapter(model, tiny_config()).randomize(2))
    expected, found = both(fast, prompt_ids(530), 2, do_sample=do_sample, max_new_tokens=300)
    assert torch.equal(expected, found)
    assert fast.stats.served
    assert fast.stats.tokens == 300
