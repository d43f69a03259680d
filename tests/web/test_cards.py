"""What the cards show, and that no text becomes markup."""

from __future__ import annotations

import re

from evaluation.facts import Facts
from web.cards import cards, line
from web.side_by_side import Answer

FACTS = [Facts("float16", 7_105_536, 16.0, 29.2531, 2.0193), Facts("int4 <b>", None, None, None, None)]
ANSWERS = [
    Answer(" I will", 201, 0.0025, 0.5, is_done=True),
    Answer(" <i>not</i>", 11, 0.001, 0.0125),
]


def text_of(html: str, kind: str) -> list[str]:
    return [re.sub(r"<[^>]*>", "", found) for found in re.findall(rf'class="{kind}">(.*?)</(?:dd|p|footer)>', html)]


def test_before_an_answer() -> None:
    html = cards(FACTS)
    assert html.count("<article") == 2 and 'data-variant="int4 &lt;b&gt;"' in html and "<b>" not in html
    assert text_of(html, "speed") == ["\N{EN DASH}", "\N{EN DASH}"]
    assert text_of(html, "memory") == ["7.11 MB", "\N{EN DASH}"] and text_of(html, "perplexity") == [
        "29.253",
        "\N{EN DASH}",
    ]
    assert text_of(html, "small") == ["&nbsp;", "16.00 bits/weight", "2.0193 bits/byte", *["&nbsp;"] * 3]
    assert text_of(html, "status") == ["ready", "ready"]


def test_answers_under_their_numbers() -> None:
    html = cards(FACTS, "Shall <u>I</u>?", ANSWERS)
    assert text_of(html, "speed") == ["400", "800"]
    assert text_of(html, "small")[::3] == ["&nbsp;", "2.00 \N{MULTIPLICATION SIGN} first"]
    prompt = "Shall &lt;u&gt;I&lt;/u&gt;?"
    assert text_of(html, "text") == [f"{prompt} I will", f"{prompt} &lt;i&gt;not&lt;/i&gt;"]
    assert html.count('class="cursor"') == 1 and 'class="card done"' in html and 'class="card running"' in html
    assert text_of(html, "status") == [
        "201 tokens · the first after 2.5 ms · done",
        "11 tokens · the first after 1.0 ms",
    ]
    stopped = cards(FACTS[:1], "", [Answer(tokens=1, first_token_seconds=1.5, is_done=True, is_stopped=True)])
    assert text_of(stopped, "status") == ["1 token · the first after 1,500.0 ms · stopped"]
    assert text_of(stopped, "speed") == ["\N{EN DASH}"]


def test_an_error_is_its_models_own() -> None:
    html = cards(FACTS, "", [Answer("a", 1, 0.001, is_done=True, error="not <finite>"), ANSWERS[0]])
    assert text_of(html, "status") == ["not &lt;finite&gt;", "201 tokens · the first after 2.5 ms · done"]


def test_a_line_is_one_line() -> None:
    assert line("a\n <b>", is_error=True) == '<p class="line error" role="alert">a &lt;b&gt;</p>'
    assert 'role="status"' in line("Seed 1")
