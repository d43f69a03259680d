"""The table in its three forms."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from results import RESULTS, SETTINGS, result

from evaluation import table as form


def test_text_is_aligned() -> None:
    lines = form.as_text(SETTINGS, RESULTS).splitlines()
    assert "700 tokens in windows of 512, stride 256" in " ".join(lines[: lines.index("")])
    table = lines[lines.index("") + 1 :][: 1 + len(RESULTS)]
    assert len({len(line) for line in table}) == 1
    assert [line.split()[0] for line in table] == ["variant", "float16", "int4-weight-only+lm-head", "over|flow"]
    assert table[1].split()[1:] == [
        "20.000",
        "1.0000",
        "2.0000",
        "100.0",
        "10.0",
        "2.00",
        "16.00",
        "2.00",
        "16.00",
        "50",
    ]
    assert table[3].split()[1:] == ["inf", "inf", "2.0000", "100.0", "10.0", "1.00", "16.00", "-", "-", "50"]


def test_markdown_is_a_table() -> None:
    lines = form.as_markdown(SETTINGS, RESULTS).splitlines()
    table = [line for line in lines if line.startswith("|")]
    cells = [line.replace("\\|", "").strip("|").split("|") for line in table]
    assert len(table) == 2 + len(RESULTS) and {len(row) for row in cells} == {len(form.COLUMNS)}
    assert set("".join(cells[1])) == set(":-")
    assert lines[0].startswith("a|b.txt, 1500 bytes, 700 tokens") and lines[1] == ""


def test_json_has_everything_and_no_other_numbers() -> None:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(form.as_json(SETTINGS, RESULTS), parse_constant=refuse)
    assert found["settings"]["stride"] == 256
    first, _, last = found["variants"]
    assert first["memory_bytes"] == 2_000_000 and first["memory_bits_per_weight"] == 16
    assert last["perplexity"] is None and last["ratio"] is None and last["memory_layers_bytes"] is None
    assert set(first) == set(last)


def test_other_tokenizers_are_told() -> None:
    settings = replace(SETTINGS, is_one_tokenizer=False)
    others = [*RESULTS[:1], result("other", ratio=None)]
    lines = form.as_text(settings, others).splitlines()
    assert "tokenizers differ: compare bits/byte" in " ".join(lines)
    (line,) = (line for line in lines if line.startswith("other"))
    assert line.split()[1:4] == ["20.000", "-", "2.0000"]
    assert json.loads(form.as_json(settings, others))["variants"][1]["ratio"] is None
