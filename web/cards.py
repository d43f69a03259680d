"""The cards of demo.py's page as HTML: a model's name, its numbers, and its answer as far as it has come."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from evaluation.facts import Facts
from web.side_by_side import Answer

UNKNOWN = "\N{EN DASH}"
EMPTY = "&nbsp;"  # which takes the height of a line


def cards(facts: Sequence[Facts], prompt: str = "", answers: Sequence[Answer] | None = None) -> str:
    """A card for each model, without an answer where ``answers`` is None. All text is escaped."""
    found: list[Answer | None] = [None] * len(facts) if answers is None else list(answers)
    first = found[0].tokens_per_second if found and found[0] else None
    made = [_card(fact, prompt, each, None) for fact, each in zip(facts[:1], found[:1], strict=True)]
    made += [_card(fact, prompt, each, first) for fact, each in zip(facts[1:], found[1:], strict=True)]
    return f'<div class="cards">{"".join(made)}</div>'


def _card(facts: Facts, prompt: str, answer: Answer | None, compared_speed: float | None) -> str:
    """A card; the speed is also shown relative to ``compared_speed``, if there is one."""
    speed = answer.tokens_per_second if answer else None
    relative = f"{speed / compared_speed:.2f} \N{MULTIPLICATION SIGN} first" if speed and compared_speed else EMPTY
    size = UNKNOWN if facts.memory_bytes is None else f"{facts.memory_bytes / 1e6:,.2f} MB"
    bits = EMPTY if facts.bits is None else f"{facts.bits:.2f} bits/weight"
    perplexity = UNKNOWN if facts.perplexity is None else f"{facts.perplexity:,.3f}"
    per_byte = EMPTY if facts.bits_per_byte is None else f"{facts.bits_per_byte:.4f} bits/byte"
    if answer is None:
        state, status, text = "idle", "ready", '<span class="asked">The answer will be here.</span>'
    else:
        state, status = "done" if answer.is_done else "running", _status(answer)
        cursor = "" if answer.is_done else '<span class="cursor"></span>'
        text = f'<span class="asked">{escape(prompt)}</span>{escape(answer.text)}{cursor}'
    numbers = [
        _number("tokens/s", "speed", UNKNOWN if speed is None else f"{speed:,.0f}", relative),
        _number("in memory", "memory", size, bits),
        _number("perplexity", "perplexity", perplexity, per_byte),
    ]
    return (
        f'<article class="card {state}" data-variant="{escape(facts.name)}"><h2>{escape(facts.name)}</h2>'
        f'<dl class="numbers">{"".join(numbers)}</dl>'
        f'<p class="text">{text}</p><footer class="status">{status}</footer></article>'
    )


def _number(name: str, kind: str, value: str, more: str) -> str:
    return f'<div><dt>{name}</dt><dd class="{kind}">{value}</dd><dd class="small">{more}</dd></div>'


def _status(answer: Answer) -> str:
    parts = [f"{answer.tokens} token{'' if answer.tokens == 1 else 's'}"]
    if answer.first_token_seconds is not None:
        parts.append(f"the first after {answer.first_token_seconds * 1e3:,.1f} ms")
    if answer.error is not None:
        return f'<span class="failed" role="alert">{escape(answer.error)}</span>'
    if answer.is_done:
        parts.append("stopped" if answer.is_stopped else "done")
    return " \N{MIDDLE DOT} ".join(parts)


def line(text: str, is_error: bool = False) -> str:
    """The line above the cards."""
    kind, role = ("error", "alert") if is_error else ("note", "status")
    return f'<p class="line {kind}" role="{role}">{escape(" ".join(text.split()))}</p>'


#: For the classes above, in Gradio's own colors, of which there are light and dark ones.
STYLE = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; padding: .5rem 0 2rem !important;
  --quiet: #55647a; --lively: var(--primary-700); }
.dark .gradio-container, .dark.gradio-container, .dark { --quiet: #a3b2c7; --lively: var(--primary-400); }
.gradio-container .main { padding: 1rem !important; }
.gradio-container .html-container { padding: 0 !important; }
.intro h1 { margin: 0 0 .35rem; font-size: 1.55rem; font-weight: 650; letter-spacing: -.02em; }
.intro p { margin: 0; max-width: 64rem; line-height: 1.5; color: var(--quiet); }
.line { margin: 0; font-size: .9rem; color: var(--quiet); }
.line.error { padding: .55rem .8rem; border: 1px solid #f0b4b4; border-radius: 8px; background: #fdecec;
  color: #9b1111; }
.dark .line.error { border-color: #6b2a2a; background: #3a1717; color: #ffb9b9; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
.card { display: flex; flex-direction: column; gap: .8rem; min-width: 0; padding: 1rem 1.1rem .8rem;
  border: 1px solid var(--border-color-primary); border-radius: 12px; background: var(--block-background-fill);
  color: var(--body-text-color); }
.card.running { border-color: var(--lively); }
.card h2 { margin: 0; font: 600 .95rem/1.3 var(--font-mono); overflow-wrap: anywhere; }
.card .numbers { display: grid; grid-template-columns: 1fr 1.15fr 1.1fr; gap: .5rem; margin: 0; }
.card dt { font-size: .74rem; color: var(--quiet); }
.card dd { margin: 0; font-size: 1.1rem; font-weight: 620; font-variant-numeric: tabular-nums; white-space: nowrap; }
.card dd.speed { color: var(--lively); }
.card dd.small { font-size: .7rem; font-weight: 400; color: var(--quiet); }
.card .text { flex: 1; min-height: 9rem; margin: 0; padding-top: .8rem; font-size: .95rem; line-height: 1.55;
  border-top: 1px solid var(--border-color-primary); white-space: pre-wrap; overflow-wrap: anywhere; }
.card .asked { color: var(--quiet); }
.card .status { font-size: .75rem; color: var(--quiet); font-variant-numeric: tabular-nums; }
.card .failed { color: #9b1111; }
.dark .card .failed { color: #ffb9b9; }
.card .cursor { display: inline-block; width: .5em; height: 1em; margin-left: 1px; vertical-align: -.12em;
  background: var(--lively); opacity: .7; }
"""
