"""The web page of demo.py, in Gradio: a prompt, a few controls, and a card for each model.

It loads nothing from elsewhere: no fonts, no scripts, no telemetry. demo.py imports it once that is arranged.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import gradio as gr

from command_line import UsageError, report
from evaluation.facts import Facts
from web.cards import STYLE, cards, line
from web.proxies import no_proxies
from web.side_by_side import Comparison

PROMPT = "What is the answer to life, the universe, and everything?"
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def build(comparison: Comparison, facts: Sequence[Facts], about: str, context: int) -> gr.Blocks:
    """The page.

    Args:
        comparison: Answers.
        facts: Of each model, for the cards.
        about: What is compared, and where.
        context: Tokens that a prompt and its answer may have together, at most.
    """
    with gr.Blocks(title="NanoGPT, side by side", analytics_enabled=False) as blocks:
        gr.HTML(f'<div class="intro"><h1>NanoGPT, side by side</h1><p>{escape(about)}</p></div>')
        prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, max_lines=12, elem_id="prompt", autofocus=True)
        with gr.Row(elem_id="controls"):
            seed = gr.Number(1, label="Seed", info="empty: a new one", elem_id="seed", min_width=200)
            temperature = _slider("Temperature", "0: the likeliest", 0, 2, 0.8, 0.05)
            top_k = _slider("Top-k", "0: all tokens", 0, 100, 5)
            tokens = _slider("New tokens", "at most", 1, context, min(200, context))
        with gr.Row():
            go = gr.Button("Compare", variant="primary", elem_id="go", scale=3, min_width=160)
            stop = gr.Button("Stop", interactive=False, elem_id="stop", scale=1, min_width=100)
        told = gr.HTML(line("The same seed for all."), elem_id="told")
        shown = gr.HTML(cards(facts), elem_id="cards")

        def compare(
            asked: str, seed: Any, temperature: Any, top_k: Any, tokens: Any, request: gr.Request
        ) -> Iterator[dict[Any, Any]]:
            for state in comparison.start(request.session_hash, asked, seed, temperature, top_k, tokens):
                update = {
                    told: line(state.line, state.is_error),
                    go: gr.Button(interactive=not state.is_running),
                    stop: gr.Button(interactive=state.is_running),
                }
                if state.answers is not None:
                    update[shown] = cards(facts, asked, state.answers)
                yield update

        def halt(request: gr.Request) -> None:
            comparison.stop(request.session_hash)

        gr.on(
            [go.click, prompt.submit],
            compare,
            [prompt, seed, temperature, top_k, tokens],
            [told, shown, go, stop],
            show_progress="hidden",
            concurrency_limit=1,  # engines hold one sequence each
            trigger_mode="once",
            api_name="compare",
        )
        stop.click(halt, queue=False, show_progress="hidden", api_visibility="private")
    return blocks


def _slider(label: str, info: str, least: float, most: float, value: float, step: float = 1) -> gr.Slider:
    name = label.lower().replace(" ", "-")
    return gr.Slider(least, most, value, step=step, label=label, info=info, elem_id=name, min_width=200)


def serve(blocks: gr.Blocks, host: str, port: int) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        UsageError: it cannot be served there.
    """
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="slate", radius_size="lg", font=SANS, font_mono=MONO)
    theme.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")
    try:
        with no_proxies():
            blocks.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                mcp_server=False,
                theme=theme,
                css=STYLE,
                footer_links=[],
            )
    except Exception as error:  # of Gradio, httpx or the operating system
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"cannot serve at {host}:{port}: {reason}") from None
    reached = "localhost" if host in ("0.0.0.0", "::", "") else host
    report(f"the page is at http://{f'[{reached}]' if ':' in reached else reached}:{port} (Ctrl-C ends it)")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        report("ended")
    finally:
        blocks.close(verbose=False)
