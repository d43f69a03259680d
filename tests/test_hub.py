"""Downloads with the real huggingface_hub client, from a small hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from nemo_archives import write_nemo
from random_models import random_model
from transformers import GPT2Config, GPT2LMHeadModel

import weight_loader

# --- the hub ---------------------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """Repositories by name, revisions by commit; a log of what was asked; and what goes wrong.

    `cut`: for the files named in it, how many GETs of a whole file break off half way; then all GETs of it fail until
    the entry is removed, if `dead`.
    """

    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)  # name → revision → folder
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    log: list[tuple[str, str, str | None]] = field(default_factory=list)  # (method, file, Range)
    url: str = ""

    def downloads(self) -> list[tuple[str, str | None]]:
        """The files that were sent, and from where on."""
        return [(file, start) for method, file, start in self.log if method == "GET"]


def commit_of(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """HEAD and ranged GET on /{repository}/resolve/{revision}/{file}, with the headers that the client relies on."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def refuse(self, status: int, code: str, commit: str | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        name, _, rest = unquote(self.path).lstrip("/").partition("/resolve/")
        if name.startswith("api/models/"):
            name, _, rest = name.partition("/revision/")
            rest = rest or "main"
        revision, _, file = rest.partition("/")
        wanted = self.headers.get("Range")
        self.hub.log.append((self.command, file, wanted))
        revisions = self.hub.repositories.get(name.removeprefix("api/models/"))
        if revisions is None:
            return self.refuse(404, "RepoNotFound")
        if name in self.hub.gated and self.headers.get("Authorization") != "Bearer hf_valid":
            return self.refuse(403, "GatedRepo")
        by_commit = {commit_of(folder): folder for folder in revisions.values()}
        folder = revisions.get(revision) or by_commit.get(revision)
        if folder is None:
            return self.refuse(404, "RevisionNotFound")
        if name.startswith("api/models/"):
            return self.list_files(folder)
        if not (folder / file).is_file():
            return self.refuse(404, "EntryNotFound", commit_of(folder))
        content = (folder / file).read_bytes()
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if with_body and file in self.hub.dead and (start or not self.hub.cut.get(file)):
            self.close_connection = True
            return self.connection.close()
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit_of(folder))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if with_body:
            if self.hub.cut.get(file):
                self.hub.cut[file] -= 1
                content = content[: start + (len(content) - start) // 2]
                self.close_connection = True
            self.wfile.write(content[start:])

    def list_files(self, folder: Path) -> None:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        content = json.dumps({"id": "a/b", "sha": commit_of(folder), "siblings": [{"rfilename": n} for n in names]})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content.encode())))
        self.end_headers()
        self.wfile.write(content.encode())


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


# --- the client, in a process of its own: it reads its settings when it is imported -----------------------------------

PROGRAM = """
import hashlib, json, sys
import weight_loader
try:
    checkpoint = weight_loader.open_checkpoint(sys.argv[1], *sys.argv[2:])
    digest = {n: hashlib.sha256(a.tobytes()).hexdigest() for n, a in checkpoint.parameters("float32")}
    print(json.dumps({"path": str(checkpoint.path), "digest": digest, "torch": "torch" in sys.modules}))
except weight_loader.CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""


@dataclass
class Client:
    home: Path
    hub: Hub

    def open(self, *arguments: str, **environment: str) -> dict[str, Any]:
        """What open_checkpoint did: its folder and the parameters' hashes, or its error."""
        run = self.run(PROGRAM, *arguments, **environment)
        result: dict[str, Any] = json.loads(run.stdout)
        assert "\n" not in result.get("error", "")
        return result

    def run(self, program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a Python program that sees the hub of this machine."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        settings = {"HF_HOME": str(self.home), "HF_ENDPOINT": self.hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        run = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=Path(weight_loader.__file__).parent,
            env=clean | settings | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stderr
        return run

    def error(self, *arguments: str, **environment: str) -> str:
        return str(self.open(*arguments, **environment)["error"])

    def files(self) -> list[str]:
        """The names in the cache's snapshots."""
        return sorted(path.name for path in self.home.glob("hub/models--*/snapshots/*/*"))


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(tmp_path / "home", hub)


def make_model(folder: Path, seed: int = 0, vocab_size: int = 61, **save: Any) -> dict[str, str]:
    """Save a tiny model, with what else a repository of the hub has; the hashes that its parameters should have."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=16, n_layer=2, n_head=2, n_embd=12))
    model.save_pretrained(folder, **save)
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tf_model.h5").write_bytes(bytes(1000))
    (folder / "README.md").write_text("# a model")
    (folder / "onnx").mkdir(exist_ok=True)
    (folder / "onnx" / "model.safetensors").write_bytes(bytes(1000))
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    digest = {}
    for name, tensor in model.transformer.state_dict().items():
        array = np.ascontiguousarray((tensor.T if name.endswith(conv1d) else tensor).numpy())
        digest[name] = hashlib.sha256(array.tobytes()).hexdigest()
    return digest


WANTED = ["config.json", "generation_config.json", "merges.txt", "vocab.json"]


# --- found -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "repository"),
    [("gpt2", "openai-community/gpt2"), ("distilgpt2", "distilbert/distilgpt2"), ("some-one/Some.Model", None)],
)
def test_found_then_cached(client: Client, hub: Hub, tmp_path: Path, name: str, repository: str | None) -> None:
    digest = make_model(tmp_path / "repo")
    hub.repositories[repository or name] = {"main": tmp_path / "repo"}
    result = client.open(name)
    assert result["digest"] == digest and result["torch"] is False
    assert client.files() == sorted([*WANTED, "model.safetensors"])  # nothing else of the repository
    hub.log.clear()
    assert client.open(name) == result
    assert {file for _, file, _ in hub.log} == {"config.json"} and not hub.downloads()  # only whether it has changed


def test_a_tokenizer_comes_without_weights(client: Client, hub: Hub, tmp_path: Path) -> None:
    make_model(tmp_path / "repo")
    hub.repositories["openai-community/gpt2"] = {"main": tmp_path / "repo"}
    program = "import weight_loader; print(weight_loader.find_tokenizer('gpt2'))"
    folder = Path(client.run(program).stdout.strip())
    assert client.files() == WANTED == sorted(file.name for file in folder.iterdir())


def test_many_shards(client: Client, hub: Hub, tmp_path: Path) -> None:
    digest = make_model(tmp_path / "repo", max_shard_size="6KB")
    hub.repositories["a/b"] = {"main": tmp_path / "repo"}
    assert client.open("a/b")["digest"] == digest
    shards = [path.name for path in (tmp_path / "repo").glob("model-*")]
    assert len(shards) > 2 and client.files() == sorted([*WANTED, "model.safetensors.index.json", *shards])
    assert client.open("a/b", HF_HUB_OFFLINE="1")["digest"] == digest


def test_missing_shard(client: Client, hub: Hub, tmp_path: Path) -> None:
    make_model(tmp_path / "repo", max_shard_size="6KB")
    victim = sorted((tmp_path / "repo").glob("model-*"))[1]
    victim.unlink()
    hub.repositories["a/b"] = {"main": tmp_path / "repo"}
    assert f"lacks the shard {victim.name}" in client.error("a/b")


def test_old_pytorch_bin(client: Client, hub: Hub, tmp_path: Path) -> None:
    digest = make_model(tmp_path / "repo")
    (tmp_path / "repo" / "model.safetensors").unlink()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=16, n_layer=2, n_head=2, n_embd=12))
    torch.save(model.state_dict(), tmp_path / "repo" / "pytorch_model.bin")
    hub.repositories["a/b"] = {"main": tmp_path / "repo"}
    result = client.open("a/b")
    assert result["digest"] == digest and result["torch"] is True
    assert client.files() == sorted([*WANTED, "pytorch_model.bin"])


def test_revision(client: Client, hub: Hub, tmp_path: Path) -> None:
    main, other = make_model(tmp_path / "main"), make_model(tmp_path / "other", seed=1)
    hub.repositories["a/b"] = {"main": tmp_path / "main", "v2": tmp_path / "other"}
    assert client.open("a/b", "v2")["digest"] == other != main
    assert client.open("a/b")["digest"] == main
    assert client.open("a/b", commit_of(tmp_path / "other"))["digest"] == other
    assert client.error("a/b", "v3") == "the hub has 'a/b', but not its revision 'v3'"


@pytest.mark.parametrize("kind", ["gguf", pytest.param("nemo", marks=pytest.mark.slow)])
def test_one_file(client: Client, hub: Hub, tmp_path: Path, kind: str) -> None:
    """A repository that is nothing but one: fetched alone, and found again when the hub is not reached."""
    model = random_model("gpt2", vocab_size=96)
    path = tmp_path / "repo" / f"model.{kind}"
    path.parent.mkdir()
    if kind == "nemo":
        write_nemo(path, model)
    else:
        pytest.importorskip("gguf", reason="gguf is not installed: requirements/checkpoints.txt")
        import gguf_files

        gguf_files.write_gguf(path, model)
    (tmp_path / "repo" / "README.md").write_text("# a model")
    hub.repositories["a/b"] = {"main": tmp_path / "repo"}
    wanted = client.open(str(path))["digest"]
    result = client.open("a/b")
    assert result["digest"] == wanted and result["path"].endswith(path.name)
    assert client.files() == [path.name]
    hub.log.clear()
    assert client.open("a/b", HF_HUB_OFFLINE="1") == result and not hub.log
    assert client.open("a/b") == result and (path.name, None) not in hub.downloads()


def test_several_files(client: Client, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    for name in ("b.Q4_0.gguf", "a.nemo"):
        (tmp_path / "repo" / name).write_bytes(b"GGUF")
    hub.repositories["a/b"] = {"main": tmp_path / "repo"}
    assert client.error("a/b") == (
        "expected one checkpoint in 'a/b', got a.nemo, b.Q4_0.gguf: download one (hf download a/b a.nemo) and name "
        "the file"
    )
    assert client.files() == []


# --- not found -------------------------------------------------------------------------------------------------------


def test_not_found(client: Client) -> None:
    assert "there is no folder 'a/b', and no such repository at the hub" in client.error("a/b")


def test_not_a_checkpoint(client: Client, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    hub.repositories["a/b"] = {"main": tmp_path / "repo"}
    assert client.error("a/b") == "'a/b' at the hub is not a checkpoint: it has no config.json or *.gguf or *.nemo"
    (tmp_path / "repo" / "config.json").write_text('{"model_type": "gpt2"}')
    assert "holds no weights: expected one of model.safetensors" in client.error("a/b")


def test_invalid_name(client: Client, hub: Hub) -> None:
    assert "'a--b/c..d' is not a valid name at the hub" in client.error("a--b/c..d")
    assert not hub.log


def test_gated(client: Client, hub: Hub, tmp_path: Path) -> None:
    digest = make_model(tmp_path / "repo")
    hub.repositories["a/b"] = {"main": tmp_path / "repo"}
    hub.gated.add("a/b")
    assert "'a/b' is gated at the hub" in client.error("a/b")
    assert client.open("a/b", HF_TOKEN="hf_valid")["digest"] == digest
    assert client.open("a/b")["digest"] == digest  # what is in the cache may be used


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_cut_connection_is_taken_up(client: Client, hub: Hub, tmp_path: Path) -> None:
    """Within one run the client asks for the rest of the file, in the chunks of 10 MiB in which it writes."""
    digest = make_model(tmp_path / "repo", vocab_size=500_000)
    assert 20 * 2**20 < (tmp_path / "repo" / "model.safetensors").stat().st_size < 40 * 2**20
    hub.repositories["a/b"] = {"main": tmp_path / "repo"}
    hub.cut["model.safetensors"] = 1
    assert client.open("a/b")["digest"] == digest
    ranges = [start for file, start in hub.downloads() if file == "model.safetensors"]
    assert ranges == [None, f"bytes={10 * 2**20}-"]


def test_interrupted_download(client: Client, hub: Hub, tmp_path: Path) -> None:
    """A connection that stays lost: a clear error, no half file in the cache; the next run fetches that file anew."""
    digest = make_model(tmp_path / "repo")
    hub.repositories["a/b"] = {"main": tmp_path / "repo"}
    hub.cut["model.safetensors"] = 1
    hub.dead.add("model.safetensors")
    assert "the download of model.safetensors of 'a/b' failed (run again: complete files are kept)" in client.error(
        "a/b"
    )
    assert client.files() == WANTED
    assert not list(client.home.rglob("*.incomplete"))
    assert "the weights of 'a/b' are not in the cache" in client.error("a/b", HF_HUB_OFFLINE="1")
    hub.dead.clear()
    hub.log.clear()
    assert client.open("a/b")["digest"] == digest
    assert hub.downloads() == [("model.safetensors", None)]


# --- without the hub -------------------------------------------------------------------------------------------------


def test_offline(client: Client, hub: Hub, tmp_path: Path) -> None:
    message = "'a/b' is not in the cache, and HF_HUB_OFFLINE forbids a download"
    assert client.error("a/b", HF_HUB_OFFLINE="1") == message
    digest = make_model(tmp_path / "repo")
    hub.repositories["a/b"] = {"main": tmp_path / "repo"}
    client.open("a/b")
    hub.log.clear()
    assert client.open("a/b", HF_HUB_OFFLINE="1")["digest"] == digest
    assert not hub.log
    assert "'a/b' at revision 'v2' is not in the cache" in client.error("a/b", "v2", HF_HUB_OFFLINE="1")


def test_no_network(client: Client, hub: Hub, tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9"
    assert "'a/b' is not in the cache, and the hub cannot be reached: " in client.error("a/b", HF_ENDPOINT=nobody)
    digest = make_model(tmp_path / "repo")
    hub.repositories["a/b"] = {"main": tmp_path / "repo"}
    client.open("a/b")
    assert client.open("a/b", HF_ENDPOINT=nobody)["digest"] == digest


def test_endpoint_that_is_no_hub(client: Client, tmp_path: Path) -> None:
    class Plain(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Plain) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        message = client.error("a/b", HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert message.endswith("the hub cannot be reached: the answer is not a hub's (is HF_ENDPOINT right?)")
