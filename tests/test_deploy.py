"""deploy/: the unit and the container start what is there, with options that it has."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import httpx
import pytest

import serve

ROOT = Path(__file__).resolve().parent.parent
UNIT = ROOT / "deploy" / "nanogpt-tripy.service"
CONTAINERFILE = ROOT / "deploy" / "Containerfile"
PLACE = "/opt/nanogpt-tripy"


def unit_values(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    systemd = shutil.which("systemd-analyze")
    if systemd is None:
        pytest.skip("systemd-analyze is not installed")
    found = tmp_path / UNIT.name
    found.write_text(UNIT.read_text().replace(f"{PLACE}/.venv/bin/python", sys.executable))
    done = subprocess.run([systemd, "verify", found], capture_output=True, text=True, timeout=60)
    said = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert not said, done.stderr


def answered(client: httpx.Client, path: str) -> httpx.Response:
    """The answer of a server that has said that it serves, and listens in a moment."""
    for _ in range(200):
        try:
            return client.get(path)
        except httpx.ConnectError:
            time.sleep(0.05)
    raise AssertionError("it does not listen")


def test_the_unit_starts_a_server_that_asks_for_the_key_and_ends_by_sigterm(tmp_path: Path) -> None:
    """Its command line, with systemd's part played by hand."""
    (tmp_path / "api-key").write_text("secret\n")
    [command] = unit_values("ExecStart")
    (variables,) = (value for value in unit_values("Environment") if "XDG_CACHE_HOME" in value)
    environment = os.environ | dict(each.split("=", 1) for each in variables.split())
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    words = shlex.split(command.replace("%d", str(tmp_path)).replace("$SERVE_OPTIONS", "--port 0"))
    assert words[0] == f"{PLACE}/.venv/bin/python" and unit_values("WorkingDirectory") == [PLACE]
    with subprocess.Popen(
        [sys.executable, *words[1:]], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "serving" in line)
        url = line.split(" on ")[1].split()[0]
        with httpx.Client(base_url=url, trust_env=False) as client:
            assert answered(client, "/v1/models").status_code == 401
            assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        [number] = unit_values("KillSignal")
        process.send_signal(signal.Signals[number])
        assert process.wait(30) == 0


def instructions() -> list[list[str]]:
    """The Containerfile's, as words."""
    text = re.sub(r"^#.*\n", "", CONTAINERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def ignored(path: Path) -> bool:
    """Whether .dockerignore leaves out a path below the root."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    names = [str(path), *map(str, list(path.parents)[:-1])]
    return any(fnmatch(name, pattern) for name in names for pattern in (*patterns, *_anywhere(patterns)))


def _anywhere(patterns: list[str]) -> list[str]:
    return [pattern.removeprefix("**/") for pattern in patterns if pattern.startswith("**/")]


def test_the_container_has_what_the_server_needs(tmp_path: Path) -> None:
    """No engine is here to build it: what it copies exists, what it installs is asked for in files that it has, and the
    files that are left when .dockerignore's are gone serve."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    kept = [Path(name) for name in listed.stdout.splitlines() if not ignored(Path(name)) and (ROOT / name).exists()]
    copied = [
        word for line in instructions() if line[0] == "COPY" and "--from=build" not in line for word in line[1:-1]
    ]
    for name in copied:
        assert name == "." or any(path.is_relative_to(name) for path in kept), name
    installed = [word for line in instructions() if line[0] == "RUN" for word in line if word.endswith(".txt")]
    assert installed and all(Path(name) in kept for name in installed)
    for path in kept:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tmp_path / path)
    assert not any((tmp_path / name).exists() for name in ("tests", "benchmarks", ".git", ".venv"))
    [entry] = [line for line in instructions() if line[0] == "ENTRYPOINT"]
    words = [word.strip("[],") for word in entry[1:]]
    assert words[:2] == ["/opt/venv/bin/python", "serve.py"]
    serve.parse_arguments(words[2:])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        [sys.executable, "serve.py", "--port=0"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "serving" in line)
        with httpx.Client(base_url=line.split(" on ")[1].split()[0], trust_env=False) as client:
            assert answered(client, "/health").status_code == 200
        process.terminate()
        assert process.wait(30) == 0
