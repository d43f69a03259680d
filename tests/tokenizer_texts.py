"""Texts over which tokenizers differ, for all tests that compare tokenizers."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

PROPERTY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

# What tokenizers differ over: contractions, runs of odd white space, digits of other scripts, combining characters,
# emoji with joiners, control characters, and special tokens written as text.
FRAGMENTS = [
    *[
        "'s",
        "'re",
        "'LL",
        "don't",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        " \n ",
        "\x00",
        "\x1c",
        "\x1f",
        "\x85",
    ],
    *["\xa0", "\u180e", "\u2003", "\u2028", "\u200b", "\u3000", "\ufeff", "é", "e\u0301", "ﬁ", "ß", "Ǆ", "٣", "½", "Ⅷ"],
    *[
        "中文",
        "日本",
        "한국",
        "👩‍👩‍👧",
        "🇩🇪",
        "\U0001f600",
        "\U00010400",
        "\U0010ffff",
        "the",
        " the",
        "The",
        "1234",
        "_x",
        "!?",
        "...",
    ],
    *["<|endoftext|>", "<|endoftext|", "|>", "<pad>", " <pad> ", "<|end", "Ġ", "Ċ"],
]
TEXT = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=20).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=12)
    .map("".join)
    .filter(lambda text: text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)),
)

CORPUS = [
    "It's the answer to life, the universe, and everything; don't panic.\n\n  What's 42?",
    "the theory of the thing that they thought\tof, there and then   1234 12 2024",
    "Ünïcödé — 中文, 日本語, naïve café, 👩‍👩‍👧 emoji…\r\n" * 2,
    "aaaa aaa aaaaaaa abab ababab baba",
] * 3
