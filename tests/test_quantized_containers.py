"""GGUF, NeMo and nanoGPT's ckpt.pt quantized: the bytes that a folder of the same weights gives, and they run."""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from nanogpt_files import nano_model, write_ckpt, write_meta
from nemo_archives import write_nemo
from random_models import random_model
from selection import partly_slow
from tiny_checkpoints import EOS, byte_vocabulary

import example
import quantization
import quantizing.cache
from quantization import QuantizationConfig
from tokenizing.export import files_of
from weight_loader import Checkpoint, open_checkpoint

needs_modelopt = pytest.mark.skipif(find_spec("modelopt") is None, reason="nvidia-modelopt is not installed")

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. " * 20
#: The bytes, the token that ends a text, and one of two letters.
WORDS = {**byte_vocabulary(), "<|endoftext|>": EOS, "To": EOS + 1}


def write_gguf(folder: Path, model: Any) -> Path:
    pytest.importorskip("gguf", reason="gguf is not installed: requirements/checkpoints.txt")
    import gguf_files

    tokens = sorted(WORDS, key=WORDS.__getitem__)
    tokenizer = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": ["T o"], "eos_token_id": EOS}
    tokenizer["token_type"] = [3 if token == "<|endoftext|>" else 1 for token in tokens]
    changes = {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    return gguf_files.write_gguf(folder / "model.gguf", model, **changes)


def write_archive(folder: Path, model: Any, **changes: Any) -> Path:
    files = {"vocab.json": json.dumps(WORDS).encode(), "merges.txt": b"#version: 0.2\nT o\n"}
    tokenizer = {"vocab_file": "nemo:vocab.json", "merge_file": "nemo:merges.txt"}
    return write_nemo(folder / "model.nemo", model, ranks=2, files=files, tokenizer=tokenizer, **changes)


def write_nano(folder: Path, model: Any) -> Path:
    write_meta(folder)
    return write_ckpt(folder / "ckpt.pt", model)


#: What it is → transformers' model, and what writes the checkpoint.
CONTAINERS: dict[str, tuple[Callable[[], Any], Callable[[Path, Any], Path]]] = {
    "gguf, gpt2": (lambda: random_model("gpt2", vocab_size=len(WORDS)), write_gguf),
    "gguf, llama": (lambda: random_model("llama", vocab_size=len(WORDS)), write_gguf),
    "ckpt.pt": (nano_model, write_nano),
    "nemo, gpt2": (lambda: random_model("gpt2", vocab_size=len(WORDS)), write_archive),
    "nemo, nemotron": (lambda: random_model("nemotron", vocab_size=len(WORDS)), write_archive),
    "nemo, stablelm": (lambda: random_model("stablelm", vocab_size=len(WORDS)), write_archive),
    "nemo, llama": (lambda: random_model("llama", vocab_size=len(WORDS)), write_archive),
}
MODES: dict[str, dict[str, Any]] = {
    "int8": {"mode": "int8-weight-only"},
    "awq": {"mode": "int4-weight-only", "group_size": 16},
    "fp8": {"mode": "fp8", "kv_cache_dtype": "fp8"},
    "gptq": {"method": "gptq", "bits": 4, "group_size": 16},
    "smoothquant": {"mode": "int8-smoothquant"},
}
QUICK = [("ckpt.pt", "fp8"), ("gguf, gpt2", "int8"), ("gguf, llama", "awq"), ("nemo, llama", "fp8")]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT)
    return path


def folder_of(model: Any, checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """A folder of a checkpoint's weights and tokenizer, as transformers writes it."""
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": checkpoint.config.eos_token_ids}))
    for name, content in files_of(checkpoint.tokenizer_source).items():
        (path / name).write_bytes(content)
    return open_checkpoint(path)


@needs_modelopt
@pytest.mark.parametrize(("name", "mode"), partly_slow([(name, mode) for name in CONTAINERS for mode in MODES], QUICK))
def test_the_bytes_of_a_folder(tmp_path: Path, text_file: Path, name: str, mode: str) -> None:
    make, write = CONTAINERS[name]
    (tmp_path / "container").mkdir()
    model = make()
    checkpoint = open_checkpoint(write(tmp_path / "container", model))
    config = QuantizationConfig(**MODES[mode], calib_data=str(text_file), calib_size=4)
    found, wanted = tmp_path / "found", tmp_path / "wanted"
    quantization.quantize_checkpoint(checkpoint, config, found)
    quantization.quantize_checkpoint(folder_of(model, checkpoint, tmp_path / "folder"), config, wanted)

    assert {path.name for path in wanted.iterdir()} - {path.name for path in found.iterdir()} <= {GENERATION}
    for path in found.iterdir():
        if path.name not in ("config.json", GENERATION):  # which have what does not bear on the computation, too
            assert path.read_bytes() == (wanted / path.name).read_bytes(), path.name
    left, right = open_checkpoint(found).config, open_checkpoint(wanted).config
    assert left.eos_token_ids == right.eos_token_ids == checkpoint.config.eos_token_ids
    assert left == replace(right, layer_norm_epsilon=left.layer_norm_epsilon)
    assert left.layer_norm_epsilon == pytest.approx(right.layer_norm_epsilon, rel=1e-7)  # GGUF has it in float32
    assert (found / GENERATION).is_file() == bool(left.eos_token_ids)
    settings = [json.loads((folder / "config.json").read_text()) for folder in (found, wanted)]
    assert settings[0]["architectures"] == settings[1]["architectures"] == [type(model).__name__]
    assert settings[0]["quantization_config"] == settings[1]["quantization_config"]


GENERATION = "generation_config.json"


@needs_modelopt
@pytest.mark.parametrize("name", partly_slow(CONTAINERS, ["ckpt.pt"]))
def test_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """quantization.py's folder runs, and says what example.py says of the container, which quantizes it once."""
    make, write = CONTAINERS[name]
    (tmp_path / "container").mkdir()
    container = write(tmp_path / "container", make())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*options: object) -> str:
        given = ["--input-text=To be", "--seed=1", "--max-new-tokens=8"]
        monkeypatch.setattr(sys, "argv", ["example.py", *given, *map(str, options)])
        code = example.main()
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    output = tmp_path / "quantized"
    mode = "--quant-mode=int8-weight-only"
    assert quantization.main(["--model-type", str(container), mode, "--output", str(output)]) == 0
    assert f"wrote {output}: int8-weight-only" in capsys.readouterr().err
    text = run("--model-type", container, mode)
    assert text.startswith("To be") and len(text) > len("To be")
    assert run("--model-type", output) == text
    monkeypatch.setattr(quantizing.cache, "quantize_checkpoint", lambda *_: pytest.fail("it is in the cache"))
    assert run("--model-type", container, mode) == text


@pytest.mark.parametrize("program", ["example.py", "quantization.py"])
def test_a_model_that_transformers_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    """Refused before any work, by what is needed for none of it."""
    model = random_model("nemotron", vocab_size=len(WORDS), partial_rotary_factor=0.5)
    container = write_archive(tmp_path, model, normalization="layernorm")
    arguments = ["--model-type", str(container), "--quant-mode=int8-weight-only"]
    if program == "example.py":
        monkeypatch.setattr(sys, "argv", [program, "--input-text=To be", *arguments])
        assert example.main() == 2
    else:
        assert quantization.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (
        "",
        f"{program}: error: expected a model that one of transformers' classes computes (gpt2, gpt_bigcode, "
        f"starcoder2, llama, mistral, nemotron, stablelm) but got {container}, which is starcoder2 but for "
        "rotary_fraction=0.5\n",
    )


def test_another_tokenizer_is_another_checkpoint(tmp_path: Path, text_file: Path) -> None:
    """Of the cache: what is calibrated depends on it."""
    config = QuantizationConfig("fp8", calib_data=str(text_file))
    container = write_nano(tmp_path, nano_model())
    names = {quantization.cache_name(open_checkpoint(container), config)}
    (tmp_path / "meta.pkl").write_bytes((tmp_path / "meta.pkl").read_bytes() + b" ")
    names.add(quantization.cache_name(open_checkpoint(container), config))
    write_archive(tmp_path, random_model("gpt2", vocab_size=len(WORDS)))
    with tarfile.open(tmp_path / "model.nemo") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    names.add(quantization.cache_name(open_checkpoint(tmp_path / "unpacked"), config))
    (tmp_path / "unpacked" / "merges.txt").write_text("#version: 0.2\n")
    names.add(quantization.cache_name(open_checkpoint(tmp_path / "unpacked"), config))
    assert len(names) == 4
