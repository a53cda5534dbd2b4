"""The page in a real browser, on an engine without a model. Skipped where there is no playwright or no Chromium.

Each test keeps a picture in the folder that LOSSLESS_SCREENSHOTS names, or in its own temporary one.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .fake import REPLY, FakeEngine, made

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
pytest.importorskip("gradio", reason="the page needs the extra `chat`")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the browser tests need Chromium")

expect = playwright.expect
WIDE, PHONE = (1440, 900), (390, 844)


@contextmanager
def served(engine: FakeEngine) -> Iterator[str]:
    import fastapi
    import uvicorn

    from chat_app.page import mount

    server = uvicorn.Server(uvicorn.Config(made(lambda: mount(fastapi.FastAPI(), engine)), port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(pace=0.4)


@pytest.fixture(scope="module")
def address(engine: FakeEngine) -> Iterator[str]:
    with served(engine) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as made:
        found = made.chromium.launch(executable_path=CHROMIUM)
        yield found
        found.close()


class Visitor:
    """A browser of its own, with what a person does there. Whatever its console complains of and whatever it asks of others is noted."""

    def __init__(self, browser: Any, address: str, size: tuple[int, int] = WIDE, dark: bool = False) -> None:
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light", reduced_motion="reduce")
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: None if request.url.startswith((address, "data:", "blob:")) else self.complaints.append(request.url))
        self.page.goto(address)
        self.box = self.page.get_by_label("Message", exact=True)
        self.status = self.page.locator("#status")
        expect(self.box).to_be_visible(timeout=30_000)
        expect(self.page.get_by_text("Harder: free verse")).to_be_visible()

    def send(self, message: str) -> None:
        self.box.fill(message)
        self.box.press("Enter")

    def ask(self, message: str) -> None:
        """Send, and wait for the whole answer."""
        self.send(message)
        expect(self.bot.last).to_contain_text(message.split("say: ")[-1] if "say: " in message else "as there are numbers", timeout=20_000)
        self.done()

    def compare(self) -> None:
        """Ask both, and go to the end of the race."""
        self.mode("Compare")
        self.send("hello")
        expect(self.status).to_contain_text("Replay", timeout=30_000)
        self.page.get_by_role("button", name="Stop").click()
        self.done()

    def done(self) -> None:
        expect(self.status).to_contain_text(re.compile("Done|Compared|Stopped"), timeout=30_000)
        expect(self.page.get_by_role("button", name="Send")).to_be_visible(timeout=20_000)

    @property
    def user(self) -> Any:
        return self.page.locator(".talk").first.get_by_test_id("user")

    @property
    def bot(self) -> Any:
        return self.page.locator(".talk").first.get_by_test_id("bot")

    def mode(self, name: str) -> None:
        self.page.get_by_label(name, exact=True).check(force=True)


Arrive = Callable[..., Visitor]


@pytest.fixture
def arrive(browser: Any, address: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Arrive]:
    """Makes visitors. At the end each leaves a picture, and must have had nothing to complain of."""
    visitors: list[Visitor] = []

    def make(at: str = address, **how: Any) -> Visitor:
        visitors.append(Visitor(browser, at, **how))
        return visitors[-1]

    yield make
    folder = Path(os.environ.get("LOSSLESS_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    for number, visitor in enumerate(visitors):
        name = request.node.name.removeprefix("test_") + (f"-{number}" if number else "")
        visitor.page.screenshot(path=folder / f"{name}.png")
        visitor.context.close()
    assert [complaint for visitor in visitors for complaint in visitor.complaints] == []


def test_a_message_is_answered_while_one_looks(arrive: Arrive) -> None:
    with served(FakeEngine(pace=1.5)) as address:
        visitor = arrive(address)
        visitor.send("Write a Fibonacci function")
        expect(visitor.box).to_have_value("")
        lengths = set()
        until(lambda: lengths.add(len(visitor.bot.last.inner_text())) or "Done" in visitor.status.inner_text())  # type: ignore[func-returns-value]
        assert len(lengths) > 4
        visitor.done()
        expect(visitor.bot.last.locator("strong")).to_have_text("bold")
        expect(visitor.bot.last.locator("pre")).to_contain_text("def fibonacci(n):")
        for what in ("tokens/s, this answer", "acceptance length", "to the first token", "passes of the model saved"):
            expect(visitor.page.locator("#figures")).to_contain_text(what)


def test_stop_midway_and_go_on(arrive: Arrive, engine: FakeEngine) -> None:
    visitor = arrive()
    visitor.send("say: on " + "and on " * 100 + "to the end")
    expect(visitor.bot.last).to_contain_text("on and on", timeout=20_000)
    visitor.page.get_by_role("button", name="Stop").click()
    expect(visitor.bot.last).to_contain_text("stopped")
    expect(visitor.bot.last).not_to_contain_text("to the end")
    until(lambda: engine.running == 0)
    visitor.ask("say: all is well")
    expect(visitor.user).to_have_count(2)


def test_edit_retry_and_undo(arrive: Arrive) -> None:
    visitor = arrive()
    visitor.ask("say: first words")
    visitor.user.last.hover()
    visitor.page.get_by_role("button", name="Edit").first.click()
    visitor.page.locator(".talk textarea").first.fill("say: other words")
    visitor.page.get_by_role("button", name="Submit").first.click()
    expect(visitor.bot.last).to_contain_text("other words", timeout=20_000)
    visitor.done()
    expect(visitor.user).to_have_count(1)
    visitor.page.get_by_role("button", name="Retry").click()
    visitor.done()
    expect(visitor.bot).to_have_count(1)
    expect(visitor.bot.last).to_contain_text("other words")
    visitor.page.get_by_role("button", name="Undo").click()
    expect(visitor.box).to_have_value("say: other words")
    expect(visitor.user).to_have_count(0)
    expect(visitor.page.locator("#headline")).to_contain_text("The same words, sooner")


def test_compare_and_see_the_race_again(arrive: Arrive) -> None:
    visitor = arrive()
    visitor.mode("Compare")
    visitor.send("hello")
    expect(visitor.status).to_contain_text("Replay", timeout=30_000)
    visitor.done()
    tokens = visitor.page.locator("#badge").inner_text()
    assert re.search(r"Identical (\d+)/\1 tokens", tokens)
    expect(visitor.page.locator("#headline")).to_contain_text("times as fast")
    expect(visitor.page.locator(".talk").nth(1).get_by_test_id("bot")).to_contain_text("as there are numbers")
    visitor.page.get_by_role("button", name="Replay again").click()
    expect(visitor.status).to_contain_text("Replay")
    visitor.page.get_by_role("button", name="Stop").click()  # goes to the end
    visitor.done()
    expect(visitor.bot.last).to_contain_text("as there are numbers")


def test_an_answer_that_differs(arrive: Arrive) -> None:
    with served(FakeEngine(pace=0.1, differs=True)) as address:
        visitor = arrive(address)
        visitor.mode("Compare")
        visitor.send("hello")
        visitor.done()
        expect(visitor.page.locator("#badge")).to_contain_text("Different")
        expect(visitor.page.locator("#headline")).to_contain_text("No speedup")


def test_slower_is_called_slower(arrive: Arrive) -> None:
    with served(FakeEngine(pace=0.1, drafts=False)) as address:
        visitor = arrive(address)
        visitor.mode("Compare")
        visitor.send("hello")
        visitor.done()
        expect(visitor.page.locator("#headline")).to_contain_text("slower here")
        expect(visitor.page.locator("#headline")).to_contain_text("Drafts do not pay on this text")


def test_two_visitors_do_not_see_each_other(arrive: Arrive) -> None:
    one, other = arrive(), arrive()
    one.send("say: mine " + "and mine " * 40)
    expect(one.bot.last).to_contain_text("mine", timeout=20_000)
    other.send("say: yours")
    expect(other.status).to_contain_text("Waiting: 1 answer before yours.")
    other.done()
    expect(other.bot.last).to_contain_text("yours")
    one.done()
    expect(other.page.locator(".talk").first).not_to_contain_text("mine")
    expect(one.page.locator(".talk").first).not_to_contain_text("yours")


def test_who_closes_the_page_frees_the_slot(arrive: Arrive, browser: Any) -> None:
    engine = FakeEngine(pace=3)  # left alone, the answer would take half a minute
    with served(engine) as address:
        leaver = Visitor(browser, address)
        leaver.send("say: " + "on and on " * 130)
        expect(leaver.bot.last).to_contain_text("on and on", timeout=20_000)
        leaver.context.close()
        until(lambda: engine.running == 0, seconds=8)
        arrive(address).ask("say: my turn")


def test_markup_stays_text(arrive: Arrive) -> None:
    visitor = arrive()
    hostile = "say: <script>window.hit=1</script> <img src=x onerror='window.hit=1'> ![x](http://example.com/x.png) <b>b</b>"
    visitor.send(hostile)
    visitor.done()
    for bubble in (visitor.user.last, visitor.bot.last):
        shown = bubble.inner_text().replace("\u2060", "")
        assert "<script>window.hit=1</script>" in shown
        assert "onerror=" in shown
        assert bubble.locator("img, script, b").count() == 0
    assert visitor.page.evaluate("window.hit") is None
    visitor.page.locator("#origin").get_by_role("button").click()
    expect(visitor.page.locator("#tokens")).to_contain_text("<script>")
    assert visitor.page.evaluate("window.hit") is None


def test_too_long_a_message_stays_in_the_box(arrive: Arrive) -> None:
    visitor = arrive()
    visitor.send(long := "word " * 450)
    expect(visitor.status).to_contain_text("at most 400 tokens")
    expect(visitor.box).to_have_value(long)
    expect(visitor.user).to_have_count(0)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_it_fits(arrive: Arrive, size: tuple[int, int], dark: bool) -> None:
    visitor = arrive(size=size, dark=dark)
    visitor.compare()
    expect(visitor.page.locator("#curves svg").get_by_text("seconds")).to_be_visible()  # drawn a while after all else
    width, room = visitor.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width <= room
    assert visitor.page.evaluate("document.body.classList.contains('dark')") is dark
    red, green, blue = map(int, re.findall(r"\d+", visitor.page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])
    assert (max(red, green, blue) < 60) is dark
    visitor.page.evaluate("window.scrollTo(0, document.body.scrollHeight)")


def test_an_example_is_asked_and_the_keyboard_is_enough(arrive: Arrive) -> None:
    visitor = arrive()
    visitor.page.get_by_text("Count from 1 to 60").click()
    visitor.done()
    expect(visitor.user.last).to_contain_text("Count from 1 to 60")
    visitor.page.get_by_label("Plain", exact=True).focus()
    visitor.page.keyboard.press("Space")
    expect(visitor.page.get_by_label("Plain", exact=True)).to_be_checked()
    unnamed = visitor.page.evaluate("""[...document.querySelectorAll('button, input, textarea')].filter(e => e.checkVisibility() &&
        !(e.innerText?.trim() || e.ariaLabel || e.title || e.labels?.length)).map(e => e.outerHTML.slice(0, 200))""")
    assert unnamed == []


def test_without_an_adapter(arrive: Arrive) -> None:
    with served(FakeEngine(adapter="", pace=0.1)) as address:
        visitor = arrive(address)
        expect(visitor.page.get_by_text("lossless distill --model")).to_be_visible()
        expect(visitor.page.get_by_label("Compare", exact=True)).to_be_disabled()
        visitor.ask("hello")
        expect(visitor.page.locator("#headline")).to_contain_text("tokens/s")


def test_the_reply_is_what_these_tests_think() -> None:
    assert "as there are numbers" in REPLY
