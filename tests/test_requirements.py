"""requirements/: each file is explained in the folder's table, and whatever is named anywhere is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"


def test_the_table_has_every_file() -> None:
    rows = re.findall(r"^\| \[[\w.-]+\]\(([\w./-]+)\) \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    files = {"../requirements.txt"} | {path.name for path in FOLDER.glob("*.txt")}
    assert len(rows) == len(set(rows)) and set(rows) == files


def test_files_that_are_named_exist() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    named = set()
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in {".md", ".py", ".txt", ".toml", ""} and path.is_file():
            named |= set(re.findall(r"requirements[/-][a-z-]+\.txt", path.read_text()))
    assert "requirements/quant.txt" in named
    assert not [name for name in sorted(named) if not (ROOT / name).is_file()]
