"""How the page looks: theme, colours, style sheet, and the few lines of script that a style sheet cannot do.

Knows: Gradio's themes and the class names of its parts. Does not know: what the page does. Nothing is fetched from elsewhere: the fonts
are the system's.
"""

from __future__ import annotations

from gradio import themes

from .render import JOINER, OWN, RECALLED, STREAM_SIGNS

ACCENT = themes.Color(
    name="teal",
    c50="#effaf7", c100="#d5f2ea", c200="#ade4d6", c300="#79cfbc", c400="#45b29e", c500="#259683", c600="#16786a", c700="#146157",
    c800="#144d46", c900="#13403b", c950="#062522",
)  # fmt: skip

RUNS = {"accelerated": "#259683", "plain": "#c2762b"}  # of the plot; both read on white and on black
SIGNS = {
    OWN: "#8a8f98", RECALLED: "#b45ac2",
    **dict(zip(STREAM_SIGNS, ("#259683", "#3b82f6", "#d08a1d", "#d9534f", "#6d5ae0", "#5f9e2f", "#c2477f", "#2c9ab7"), strict=True)),
}  # fmt: skip

LOCAL_ONLY = (  # what a browser may fetch for the page: what is served here; Gradio's own scripts and styles stand in it
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; img-src 'self' data: blob:; connect-src 'self' data: blob:; "
    "frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'"
)


def theme() -> themes.Base:
    return themes.Base(
        primary_hue=ACCENT, secondary_hue=ACCENT, neutral_hue=themes.colors.stone, radius_size=themes.sizes.radius_lg,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"],
    ).set(
        body_background_fill="#fbfaf8", body_background_fill_dark="#141312",
        background_fill_primary="#ffffff", background_fill_primary_dark="#1c1b1a",
        background_fill_secondary="#f5f3ef", background_fill_secondary_dark="#232120",
        block_background_fill="#ffffff", block_background_fill_dark="#1c1b1a",
        border_color_primary="#e7e3dc", border_color_primary_dark="#33302d",
        block_border_width="0px", block_border_width_dark="0px", block_shadow="none", block_shadow_dark="none",
        body_text_color="#24211e", body_text_color_dark="#ece8e2",
        body_text_color_subdued="#6b655d", body_text_color_subdued_dark="#a39c92",
        input_background_fill="#ffffff", input_background_fill_dark="#232120",
        color_accent_soft="*primary_50", color_accent_soft_dark="#17302c",
        border_color_accent_subdued="*primary_200", border_color_accent_subdued_dark="#23453f",
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600", button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="#ffffff", button_primary_text_color_dark="#ffffff",
    )  # fmt: skip


CSS = """
.gradio-container {
  box-sizing: border-box; width: 100% !important; max-width: 1480px !important; margin: 0 auto !important;
  padding: 14px 24px 20px !important;
}
.gradio-container > .main { padding: 0 !important; }
#top { align-items: center; gap: 20px; flex-wrap: wrap; }
#name h1 { font-size: 1.25rem; font-weight: 650; letter-spacing: -.01em; margin: 0; }
#name p { color: var(--body-text-color-subdued); font-size: .82rem; margin: 2px 0 0; }
#mode { padding: 0 !important; flex: 0 0 auto; min-width: 0; width: auto; }
#mode .wrap { gap: 2px; background: var(--background-fill-secondary); border-radius: 12px; padding: 3px; flex-wrap: nowrap; }
#mode label { border: 0; box-shadow: none; background: none; padding: 7px 15px; border-radius: 9px; font-size: .9rem; }
#mode label.selected {
  background: var(--block-background-fill); color: var(--body-text-color); font-weight: 600; box-shadow: 0 1px 3px rgb(0 0 0 / .16);
}
#mode label:focus-within { outline: 2px solid var(--primary-500); }
#mode input { position: absolute; opacity: 0; width: 1px; height: 1px; }
#mode label span { margin: 0; }
#shade { flex: 0 0 auto; min-width: 40px; width: 40px; padding: 8px; background: none; border: 0; box-shadow: none; font-size: 1.1rem; }
#body { gap: 28px; align-items: flex-start; }
.talk { border: 0 !important; background: none !important; height: calc(100dvh - 318px) !important; min-height: 340px; }
.talk:has(label.float) .bubble-wrap { margin-top: 30px; }  /* or text that is scrolled up runs under the label */
.talk .message { font-size: .96rem; line-height: 1.6; }
.talk .example { white-space: pre-line; text-align: left; border: 1px solid var(--border-color-primary); }
.talk .example:hover, .talk .example:focus-visible { border-color: var(--primary-500); }
.talk .example *::first-line { font-weight: 600; }
.status { min-height: 1.7em; padding: 0 4px; }
.status p { color: var(--body-text-color-subdued); font-size: .86rem; margin: 0; font-variant-numeric: tabular-nums; }
#badge { padding: 0 4px; } #badge p { margin: 0; font-size: .95rem; }
#composer {
  align-items: flex-end; flex-wrap: nowrap; gap: 6px; border: 1px solid var(--border-color-primary); border-radius: 18px;
  background: var(--input-background-fill); box-shadow: 0 2px 14px rgb(0 0 0 / .05); padding: 7px;
}
#composer:focus-within { border-color: var(--primary-500); }
#composer button { border-radius: 12px; padding: 9px 16px; font-size: .92rem; flex: none; }
#composer .form { background: none; border: 0; box-shadow: none; }
#box, #box * { background: transparent !important; }
#box { background: none !important; padding: 0 !important; min-width: 0 !important; }
#box [data-testid=block-info] { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
#box textarea { border: 0; background: none; box-shadow: none; font-size: 1rem; line-height: 1.5; }
#panel {
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary); border-radius: 18px; padding: 20px 22px;
  gap: 18px;
}
#headline h2 {
  font-size: 1.7rem; font-weight: 680; letter-spacing: -.02em; line-height: 1.15; margin: 0 0 6px; color: var(--primary-700);
  font-variant-numeric: tabular-nums;
}
#headline h2 em { font-style: normal; color: #a1591a; }
.dark #headline h2 em { color: #e2a15e; }
.dark #headline h2 { color: var(--primary-300); }
#headline p { color: var(--body-text-color-subdued); margin: 0; font-size: .9rem; }
#figures ul {
  list-style: none; padding: 0; margin: 0; display: grid; grid-template-columns: repeat(auto-fill, minmax(138px, 1fr)); gap: 8px;
}
#figures li {
  background: var(--background-fill-secondary); border-radius: 12px; padding: 10px 12px; margin: 0; font-size: .78rem;
  line-height: 1.3; color: var(--body-text-color-subdued);
}
#figures li strong {
  display: block; font-size: 1.22rem; font-weight: 640; color: var(--body-text-color); font-variant-numeric: tabular-nums;
}
#figures table, #acceptance table {
  width: 100%; border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: 0;
}
#figures table, #acceptance table, #figures tr, #acceptance tr, #figures thead, #acceptance thead {
  border: 0 !important; box-shadow: none; background: none;
}
#figures th, #figures td, #acceptance th, #acceptance td {
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; padding: 7px 2px; background: none;
  font-weight: 400;
}
#figures th, #acceptance th { color: var(--body-text-color-subdued); font-size: .8rem; }
#figures :is(td, th):not(:first-child), #acceptance :is(td, th):last-child { text-align: right !important; }
#figures td:nth-child(2) { font-weight: 640; }
#curves .role-legend { display: none; }
#key { margin-top: -10px; overflow: visible !important; }
#key p { font-size: .82rem; color: var(--body-text-color-subdued); margin: 0; font-variant-numeric: tabular-nums; }
#key em, #key strong { font-style: normal; font-weight: 600; color: var(--body-text-color); }
#key em::before, #key strong::before { content: "━ "; }
#key em::before { color: RUN-accelerated; }
#key strong::before { color: RUN-plain; }
#acceptance td:nth-child(2) { font-family: var(--font-mono); color: var(--primary-600); letter-spacing: -1px; white-space: nowrap; }
#drafts:not(:has(#acceptance p)) { display: none; }
.dark #acceptance td:nth-child(2) { color: var(--primary-400); }
#acceptance p { font-size: .88rem; line-height: 1.5; margin: 0 0 10px; }
#legend p { font-size: .82rem; color: var(--body-text-color-subdued); margin: 0; }
#tokens .textfield { line-height: 1.9; font-size: .9rem; white-space: pre-wrap; overflow-wrap: anywhere; }
#tokens .token { margin: 0 1px; padding: 1px 3px; border-radius: 5px; color: var(--body-text-color) !important; }
#tokens .token .label { color: #fff; text-transform: none; font-size: .62rem; padding: 0 3px; margin: 0 0 0 3px; border-radius: 4px; }
.talk .icon-button-wrapper.top-panel { display: none; }
#train { border: 1px solid var(--border-color-primary); border-radius: 14px; padding: 12px 16px; font-size: .88rem; }
#train pre { overflow-x: auto; }
footer { display: none !important; }
@media (max-width: 900px) {
  .gradio-container { padding: 10px 12px 16px !important; }
  #body { flex-direction: column; gap: 16px; }
  #body > * { width: 100%; min-width: 0 !important; }
  #talks { flex-direction: column; }
  .talk { flex: none !important; width: 100%; height: 58dvh !important; min-height: 300px; }
  #line { flex-wrap: wrap; } #line #status { flex: 1 1 150px; min-width: 0 !important; }
  #mode { width: 100%; } #mode .wrap { width: 100%; } #mode label { flex: 1; justify-content: center; padding: 8px 6px; }
  #panel { padding: 16px; }
  #top { position: relative; } #name { padding-right: 44px; } #shade { position: absolute; top: -6px; right: -6px; }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
"""
for _run, _colour in RUNS.items():
    CSS = CSS.replace(f"RUN-{_run}", _colour)

# what is copied goes without the word joiners of `render.as_text`; the shade is kept between visits
SCRIPT = f"""
() => {{
  const clean = text => text.replace(/([<&!]){JOINER}/g, "$1");
  if (navigator.clipboard) {{
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = text => write(clean(text));
  }}
  document.addEventListener("copy", event => {{
    const chosen = String(document.getSelection());
    if (chosen.includes("{JOINER}")) {{ event.clipboardData.setData("text/plain", clean(chosen)); event.preventDefault(); }}
  }});
  document.getElementById("shade")?.setAttribute("aria-label", "Light or dark");
  document.getElementById("badge")?.setAttribute("aria-live", "polite");
  if (matchMedia("(pointer: fine)").matches) document.querySelector("#box textarea")?.focus();  // elsewhere it would open a keyboard
  const shade = localStorage.getItem("shade");
  if (shade) document.body.classList.toggle("dark", shade === "dark");
}}
"""
SWITCH_SHADE = """() => { localStorage.setItem("shade", document.body.classList.toggle("dark") ? "dark" : "light"); }"""
