"""Adapters over HTTP: each is a model's name; they come and go while others are answered."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lora_folders import write_lora
from served import Server
from tiny_checkpoints import random_checkpoint

import serve
from command_line import UsageError

MODULES = {"h.0.attn.c_attn": (32, 96), "h.0.mlp.c_fc": (32, 128)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    random_checkpoint(folder / "tiny")
    (folder / "adapters").mkdir()
    for number in range(6):
        write_lora(folder / "adapters" / f"a{number}", MODULES, rank=1 + number, seed=number)
    write_lora(folder / "adapters" / "wide", MODULES, rank=40, seed=1)
    write_lora(folder / "elsewhere", MODULES, rank=1, seed=1)
    (folder / "adapters" / "link").symlink_to(folder / "elsewhere")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    modules = [f"--lora-modules=first={folder / 'adapters' / 'a0'}", "--max-loras=2", "--max-cpu-loras=3"]
    server = Server(folder / "tiny", *modules, f"--lora-dir={folder / 'adapters'}", "--max-lora-rank=8")
    yield server
    assert server.close() == 0, "".join(server.lines)
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)


def ask(server: Server, model: str, seed: int = 1) -> Any:
    asked = {"model": model, "prompt": "What is it", "max_tokens": 16, "seed": seed, "logprobs": 1, "ignore_eos": True}
    answer = server.post("/v1/completions", **asked)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["model"] == model
    return body["choices"][0]["text"], body["choices"][0]["logprobs"]


def test_adapters_come_and_go(server: Server) -> None:
    plain, first = ask(server, "tiny"), ask(server, "first")
    assert plain != first
    listed = server.http.get("/v1/models").json()["data"]
    assert [(each["id"], each["parent"]) for each in listed] == [("tiny", None), ("first", "tiny")]
    loaded = server.post("/v1/load_lora_adapter", lora_name="second", lora_path="a1")
    assert loaded.status_code == 200 and loaded.json()["parent"] == "tiny"
    second = ask(server, "second")
    assert second not in (plain, first)
    # Another one under the same name takes its place; requests are answered by what is there when they come.
    assert server.post("/v1/load_lora_adapter", lora_name="second", lora_path="a2").status_code == 200
    assert ask(server, "second") not in (plain, first, second)
    assert server.post("/v1/load_lora_adapter", lora_name="third", lora_path="a1").status_code == 200
    assert ask(server, "third") == second, "what a name stands for makes no difference"
    assert server.http.get("/v1/models/third").json()["parent"] == "tiny"
    # Three are kept: the one that was not named for the longest time goes.
    assert server.post("/v1/load_lora_adapter", lora_name="fourth", lora_path="a4").status_code == 200
    assert {each["id"] for each in server.http.get("/v1/models").json()["data"]} == {
        "tiny",
        "second",
        "third",
        "fourth",
    }
    assert server.post("/v1/completions", model="first", prompt="A").status_code == 404
    assert server.post("/v1/unload_lora_adapter", lora_name="third").status_code == 200
    missing = server.post("/v1/completions", model="third", prompt="A")
    assert missing.status_code == 404 and "'third' is not served here" in missing.json()["error"]["message"]
    assert server.post("/v1/load_lora_adapter", lora_name="first", lora_path="a0").status_code == 200
    assert ask(server, "first") == first and ask(server, "tiny") == plain


def test_many_at_the_same_time_while_others_are_loaded(server: Server) -> None:
    """More adapters than slots, each beside the others, as alone."""
    for name, path in (("x", "a3"), ("y", "a4"), ("z", "a5")):
        assert server.post("/v1/load_lora_adapter", lora_name=name, lora_path=path).status_code == 200
    alone = {(model, seed): ask(server, model, seed) for model in ("tiny", "x", "y", "z") for seed in range(4)}
    found: dict[tuple[str, int], Any] = {}

    def client(model: str, seed: int) -> None:
        found[model, seed] = ask(server, model, seed)

    threads = [threading.Thread(target=client, args=key) for key in alone]
    for thread in threads:
        thread.start()
    for _ in range(5):
        assert server.post("/v1/load_lora_adapter", lora_name="z", lora_path="a5").status_code == 200
    for thread in threads:
        thread.join()
    assert found == alone


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../elsewhere", "a folder in that of --lora-dir"),
        ("link", "a folder in that of --lora-dir"),
        ("/etc", "a folder in that of --lora-dir"),
        ("a\0b", "a folder in that of --lora-dir"),
        ("nothing", "a folder in that of --lora-dir"),
        (".", "it has none"),
        ("wide", "at most that of --max-lora-rank"),
    ],
)
def test_what_is_not_loaded(server: Server, path: str, message: str) -> None:
    answer = server.post("/v1/load_lora_adapter", lora_name="bad", lora_path=path)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "lora_path"


def test_names_that_are_taken(server: Server) -> None:
    assert (
        server.post("/v1/load_lora_adapter", lora_name="tiny", lora_path="a0").json()["error"]["param"] == "lora_name"
    )
    assert server.post("/v1/unload_lora_adapter", lora_name="tiny").status_code == 400
    assert server.post("/v1/unload_lora_adapter", lora_name="nobody").status_code == 404
    assert server.post("/v1/load_lora_adapter", lora_name="", lora_path="a0").status_code in (400, 422)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora-modules", "a"], "to be NAME=PATH but got 'a'"),
        (["--lora-modules", "a=x", "a=y"], "'a' is there twice"),
        (["--lora-modules", "a=x", "b=y", "--max-cpu-loras=1"], "expected at most 1 --lora-modules"),
        (["--lora-dir", "/nowhere"], "expected --lora-dir to be a folder"),
        (["--max-loras", "0"], "max-loras"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        serve.parse_arguments(arguments)
