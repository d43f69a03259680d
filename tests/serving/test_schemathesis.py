"""Whatever /openapi.json allows, and much that it does not: no errors of the server, and answers as documented."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from served import Server
from tiny_checkpoints import random_checkpoint

pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed (requirements/test.txt; Python 3.11 or newer)"
)

#: All but one: what the types allow may be too long for the model, or name a token or a model that it does not have.
CHECKS = ["--checks=all", "--exclude-checks=positive_data_acceptance"]


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, "secret"])
def test_the_whole_api(tmp_path: Path, key: str | None) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}")
    options = [] if key is None else [f"--api-key={key}"]
    server = Server(random_checkpoint(tmp_path / "tiny"), f"--chat-template={template}", "--max-queue=1000", *options)
    if key is not None:
        options = [f"--header=Authorization: Bearer {key}"]
        server.http.headers["Authorization"] = f"Bearer {key}"
    document = tmp_path / "openapi.json"
    document.write_bytes(server.http.get("/openapi.json").content)
    limits = ["--max-examples=60", "--request-timeout=20", "--generation-deterministic"]
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(document), f"--url={server.url}"]
    found = subprocess.run(
        [*command, *CHECKS, *limits, *options, "--continue-on-failure", "--no-color"],
        cwd=tmp_path,
        env={**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    operations = sum(len(each) for each in json.loads(document.read_bytes())["paths"].values())
    assert f"Tested: {operations}\n" in found.stdout, found.stdout
    assert re.search(r"\b(\d{3,}) generated, \1 passed", found.stdout), found.stdout
    assert server.metric("kv_cache_pages_used") == 0
    assert server.close() == 0
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)
