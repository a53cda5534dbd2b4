"""The chat page: which parts it has, where they stand, and which of them answers to what.

Knows: Gradio, and the pictures of `flow`. Does not know: models, or how a figure comes about. What a visitor has stands in a
`Session`; nothing but the engine is shared between two of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import gradio as gr

from . import flow, render, style, words
from .session import Session
from .settings import MOST_CHARACTERS, MOST_TOKENS

SESSION_S = 3600  # a session that nothing was asked in for so long is forgotten
AT_ONCE = 24  # answers that wait for the engine or are made; what comes beyond waits in Gradio's own queue
MOST_WAITING = 64


def build(engine: Any) -> gr.Blocks:
    """The page of an engine; how it looks comes with `mount`."""
    fast = bool(engine.info.adapter)
    visitors: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()
    welcome = words.WELCOME if fast else words.WELCOME_PLAIN
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    long: dict[str, Any] = hidden | {"concurrency_limit": AT_ONCE, "concurrency_id": "answers"}
    brief: dict[str, Any] = hidden | {"queue": False}

    def of(session: Session | None, request: gr.Request) -> Session:
        found = session or Session(engine.conversation())
        visitors[str(request.session_hash)] = found
        return found

    with gr.Blocks(title="lossless", analytics_enabled=False, fill_width=True) as page:
        state = gr.State(None, time_to_live=SESSION_S, delete_callback=lambda session: session and session.leave())
        with gr.Row(elem_id="top"):
            gr.Markdown(words.about(engine.info), elem_id="name", sanitize_html=True)
            mode = gr.Radio(
                [flow.ACCELERATED, flow.PLAIN, flow.COMPARE], value=flow.ACCELERATED if fast else flow.PLAIN, interactive=fast,
                label="How to answer", show_label=False, container=False, elem_id="mode",
            )  # fmt: skip
            shade = gr.Button("◐", elem_id="shade", min_width=40)
        with gr.Row(elem_id="body"):
            with gr.Column(scale=9, min_width=320):
                with gr.Row(elem_id="talks"):
                    looks: dict[str, Any] = {
                        "layout": "bubble", "buttons": ["copy"], "sanitize_html": True, "allow_tags": False, "latex_delimiters": [],
                        "feedback_options": None, "elem_classes": "talk", "min_width": 260, "height": "",
                    }  # fmt: skip
                    examples: Any = [{"text": text, "display_text": f"{kind}\n{text}"} for kind, text in words.EXAMPLES]
                    chat = gr.Chatbot(
                        label="Accelerated", show_label=False, editable="user", placeholder=words.ASK, examples=examples, **looks
                    )
                    twin = gr.Chatbot(label="Plain", show_label=True, visible=False, placeholder=words.TWIN, **looks)
                badge = gr.Markdown("", elem_id="badge", sanitize_html=True, visible=False)
                with gr.Row(elem_id="line"):
                    status = gr.Markdown("", elem_classes="status", elem_id="status", sanitize_html=True)
                    again = gr.Button("Replay again", size="sm", visible=False, elem_id="again", min_width=110, scale=0)
                    clear = gr.Button("Clear", size="sm", elem_id="clear", min_width=70, scale=0)
                with gr.Row(elem_id="composer"):
                    box = gr.Textbox(
                        label="Message", placeholder="Message", lines=1, max_lines=6, max_length=MOST_CHARACTERS + 1, elem_id="box", scale=1
                    )
                    submit = gr.Button("Send", variant="primary", elem_id="send", min_width=76, scale=0)
                    stop = gr.Button("Stop", variant="primary", elem_id="stop", min_width=76, scale=0, visible=False)
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    system = gr.Textbox(label="System prompt", lines=2, max_length=MOST_CHARACTERS)
                    with gr.Row():
                        temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0: the likeliest token, always")
                        top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p", info="Tokens that make up so much are drawn from")
                    with gr.Row():
                        room = min(MOST_TOKENS, engine.info.context)
                        most = gr.Slider(1, room, value=min(256, room), step=1, label="Most tokens", info="Of an answer")
                        seed = gr.Number(value=0, precision=0, minimum=0, label="Seed", info="The same seed draws the same answer")
            with gr.Column(scale=5, min_width=320, elem_id="panel"):
                if not fast:
                    gr.Markdown(words.training(engine.info.name), elem_id="train", sanitize_html=True)
                headline = gr.Markdown(welcome, elem_id="headline", sanitize_html=True)
                figures = gr.Markdown("", elem_id="figures", sanitize_html=True)
                curves = gr.LinePlot(
                    render.curves([]), x="seconds", y="tokens", color="answer", color_map=style.RUNS, label="Tokens over time", height=250,
                    x_title="seconds", y_title=" ", color_title=" ", elem_id="curves", buttons=[], visible=False,
                )  # fmt: skip
                key = gr.Markdown("", elem_id="key", sanitize_html=True)
                with gr.Accordion("How drafts fared", open=True, elem_id="drafts"):
                    acceptance = gr.Markdown("", elem_id="acceptance", sanitize_html=True)
        with gr.Accordion("Where each token came from", open=False, elem_id="origin"):
            gr.Markdown(words.SIGNS, elem_id="legend")
            tokens = gr.HighlightedText(
                [], color_map=style.SIGNS, show_legend=False, label="Tokens of the last answer", show_label=False, elem_id="tokens"
            )

        parts = {
            "chat": chat, "twin": twin, "status": status, "headline": headline, "figures": figures, "curves": curves, "key": key,
            "tokens": tokens, "acceptance": acceptance, "badge": badge, "box": box,
        }  # fmt: skip
        shown = [*parts.values(), submit, stop, again, state]

        def draw(pictures: Iterator[flow.Picture], session: Session) -> Iterator[dict[Any, Any]]:
            """Pictures as what Gradio takes: the parts that changed, by component."""
            kept: dict[Any, Any] = {state: session}  # once: Gradio looks at everything that it is told anew
            for picture in pictures:
                changed: dict[Any, Any] = {parts[name]: value for name, value in picture.items() if name in parts}
                if "badge" in picture:
                    changed[badge] = gr.update(value=picture["badge"], visible=bool(picture["badge"]))
                if "curves" in picture:
                    changed[curves] = gr.update(value=picture["curves"], visible=bool(picture["curves"].tokens.any()))
                if "busy" in picture:
                    changed |= {submit: gr.update(visible=not picture["busy"]), stop: gr.update(visible=picture["busy"])}
                if "replay" in picture:
                    changed[again] = gr.update(visible=picture["replay"])
                if "refused" in picture:
                    gr.Warning(picture["refused"], title="Not sent")
                yield changed | kept
                kept = {}

        asked = [state, mode, system, temperature, top_p, seed, most]

        def ask(message: str, session: Session, at: int | None, rest: tuple[Any, ...]) -> Iterator[dict[Any, Any]]:
            way, prompt, heat, share, number, tokens_at_most = rest
            settings = {"temperature": heat, "top_p": share, "seed": number, "max_tokens": tokens_at_most}
            return draw(flow.ask(engine, session, message, way, settings, prompt or "", at), session)

        def send(request: gr.Request, message: str, session: Session | None, *rest: Any) -> Iterator[dict[Any, Any]]:
            yield from ask(message, of(session, request), None, rest)

        def example(request: gr.Request, data: gr.SelectData, session: Session | None, *rest: Any) -> Iterator[dict[Any, Any]]:
            yield from ask(str(data.value["text"]), of(session, request), None, rest)

        def edit(request: gr.Request, data: gr.EditData, session: Session | None, *rest: Any) -> Iterator[dict[Any, Any]]:
            yield from ask(render.as_written(str(data.value)), of(session, request), turn_of(data), rest)

        def retry(request: gr.Request, data: gr.RetryData, session: Session | None, *rest: Any) -> Iterator[dict[Any, Any]]:
            found = of(session, request)
            number = min(turn_of(data), len(found.turns) - 1)
            if number >= 0:
                yield from ask(found.turns[number].message, found, number, rest)

        def undo(session: Session | None, request: gr.Request, data: gr.UndoData) -> Iterator[dict[Any, Any]]:
            found = of(session, request)
            message = found.take_back(turn_of(data))
            yield from draw(iter([flow.idle(found) | flow.blank() | {"headline": welcome, "box": message}]), found)

        def wipe(session: Session | None, request: gr.Request) -> Iterator[dict[Any, Any]]:
            found = of(session, request)
            found.clear()
            yield from draw(iter([flow.idle(found) | flow.blank() | {"headline": welcome}]), found)

        def play(session: Session | None, request: gr.Request) -> Iterator[dict[Any, Any]]:
            found = of(session, request)
            yield from draw(flow.replay(engine, found), found)

        def show_twin(way: str) -> tuple[Any, Any]:
            return gr.update(show_label=way == flow.COMPARE), gr.update(visible=way == flow.COMPARE)

        def leave(request: gr.Request) -> None:
            if (session := visitors.get(str(request.session_hash))) is not None:
                session.leave()

        gr.on([box.submit, submit.click], send, [box, *asked], shown, **long)
        chat.example_select(example, asked, shown, **long)
        chat.edit(edit, asked, shown, **long)
        chat.retry(retry, asked, shown, **long)
        chat.undo(undo, [state], shown, **brief)
        clear.click(wipe, [state], shown, **brief)
        again.click(play, [state], shown, **long)
        stop.click(lambda session: session and session.stop(), [state], None, **brief)
        mode.change(show_twin, [mode], [chat, twin], **brief)
        shade.click(None, None, None, js=style.SWITCH_SHADE, api_visibility="private")
        page.load(of, [state], [state], **brief)
        page.unload(leave)
    return page.queue(max_size=MOST_WAITING)


def turn_of(data: gr.EditData | gr.RetryData | gr.UndoData) -> int:
    """The turn that an event of the conversation is about: two messages make one."""
    index = data.index[0] if isinstance(data.index, list | tuple) else data.index
    return int(index) // 2


class _LocalOnly:
    """ASGI: every page says that a browser is to fetch nothing for it from elsewhere, whatever a text on it may ask for."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = [(b"content-security-policy", style.LOCAL_ONLY.encode()), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", ()), *policy]
            await send(message)

        await self._app(scope, receive, with_policy if scope["type"] == "http" else send)


def mount(app: Any, engine: Any, **auth: Any) -> Any:
    """The FastAPI app with the page of an engine at /; `auth` and `auth_message` as `gradio.mount_gradio_app` has them."""
    app.add_middleware(_LocalOnly)
    return gr.mount_gradio_app(
        app, build(engine), path="/", footer_links=[], run_history=False, show_error=True, max_file_size=1,
        enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, theme=style.theme(), css=style.CSS, js=style.SCRIPT, **auth,
    )  # fmt: skip
