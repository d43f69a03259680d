"""evaluate.py: its numbers against transformers and against each other, and all kinds of bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_folders import quantized_folder
from reference_nats import reference_nats
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import overflowing_checkpoint, random_checkpoint
from transformers import AutoModelForCausalLM

import evaluate
from command_line import EMBEDDED_CHECKPOINT as EMBEDDED
from evaluation.text import HELD_OUT_TEXT, read_text
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer."


# --- ways to run it --------------------------------------------------------------------------------------------------


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that bad input gets."""
        assert (self.code, self.out) == (2, "")
        assert self.err.startswith("evaluate.py: error: ") and self.err.count("\n") == 1, self.err
        return self.err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """evaluate.py in this process, with a cache of its own and, of what is not said, the least that it can do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments: Any, **environment: str) -> Done:
        few = ["--new-tokens=2", "--runs=1", "--max-tokens=100"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *few, *map(str, arguments)])
        code = evaluate.main()
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint, whose tokens are bytes."""
    return random_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def matplotlib() -> Any:
    return pytest.importorskip("matplotlib", reason="pictures need requirements/evaluate.txt")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.slow
def test_embedded_checkpoint_against_transformers(run: Any, tmp_path: Path) -> None:
    """The program's own number. In float16 weights and activations are rounded: a tenth of a percent is their share."""
    done = run("--max-tokens=700", "--stride=200", "--variants", "float32", "float32", "float16", "--format=json")
    assert done.code == 0, done.err
    variants = json.loads(done.out)["variants"]
    words = HELD_OUT_TEXT.read_text()
    ids = np.array(load_tokenizer(EMBEDDED, 1024).encode(words)[:700], dtype=np.int32)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    expected = np.exp(reference_nats(model, ids, 512, 200).mean())
    print(f"perplexity {variants[0]['perplexity']:.6f}, by transformers {expected:.6f}")
    assert variants[0]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert variants[1]["perplexity"] == variants[0]["perplexity"] and variants[1]["ratio"] == 1.0
    assert variants[2]["perplexity"] == pytest.approx(expected, rel=1e-3)
    assert variants[2]["ratio"] == variants[2]["perplexity"] / variants[0]["perplexity"]
    linear = 4 * 12 * 256 * 256  # weights of the linear layers
    for variant, width in zip(variants, (4, 4, 2), strict=True):
        assert variant["disk_layers_bytes"] == 4 * linear
        assert variant["disk_bytes"] == 4 * 3_552_768
        assert variant["memory_layers_bytes"] == width * linear
        assert variant["memory_bytes"] >= width * 3_552_768 - 4 * 2 * 9 * 256  # LayerNorms are in float32
        assert variant["tokens_per_second"] > 0 and variant["first_token_seconds"] > 0
        assert 20e6 < variant["peak_memory_bytes"] < 1e9


#: Perplexity relative to float32 at most, and bytes of the quantized layers relative to float16 at most.
BOUNDS = {
    "int8-weight-only": (1.002, 0.52),
    "int4-weight-only": (1.05, 0.28),
    "fp8": (1.01, 0.52),
    "int8-smoothquant": (1.01, 0.52),
    "kv-int8": (1.003, 2.0),  # its layers are as they were: float32 on disk
    "kv-fp8": (1.01, 2.0),
}


@pytest.mark.skipif(find_spec("modelopt") is None, reason="nvidia-modelopt is not installed")
@pytest.mark.slow
def test_what_quantization_costs_and_saves(run: Any) -> None:
    """On text that the embedded checkpoint has not been trained on."""
    done = run("--max-tokens=6000", "--variants", "float32", *BOUNDS, "--format=json")
    assert done.code == 0, done.err
    print(done.out)
    first, *others = json.loads(done.out)["variants"]
    assert first["ratio"] == 1.0
    for variant in others:
        ratio, size = BOUNDS[variant["variant"]]
        assert 0.99 < variant["ratio"] <= ratio, variant
        assert variant["disk_layers_to_float16"] <= size, variant
        assert variant["memory_layers_to_float16"] <= size, variant


def test_held_out_text_is_the_last_tenth() -> None:
    if not SHAKESPEARE.exists():
        pytest.skip(f"{SHAKESPEARE} is not here")
    words = SHAKESPEARE.read_bytes().decode()
    assert HELD_OUT_TEXT.read_bytes().decode() == words[int(len(words) * 0.9) :]


def test_the_whole_program(matplotlib: Any, tmp_path: Path, text: Path, tiny: Path) -> None:
    """In a process of its own, with folders as variants; standard output holds the table and nothing else."""
    folder = quantized_folder(tmp_path / "quantized", "int4-weight-only")
    picture = tmp_path / "picture.png"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "evaluate.py", f"--model-type={tiny}", f"--data={text}", "--format=markdown"),
            *("--variants", "float16", folder, f"{folder}+float32", f"--plot={picture}", "--new-tokens=99", "--runs=1"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"{len(TEXT) - 1} bytes, {len(TEXT)} tokens in windows of 64, stride 32" in lines[0]
    assert "33 tokens after a prompt of 32" in lines[0], "what fits the context"
    assert [line.split("|")[1].strip() for line in lines[4:7]] == ["float16", str(folder), f"{folder}+float32"]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "Traceback" not in done.stderr


# --- several checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_other_tokenizers_compare_by_bits_per_byte(run: Any, tiny: Path, text: Path) -> None:
    """The same text to both; what they say of it against transformers."""
    sentence = "To be, or not to be: ça ira? → "
    text.write_text(sentence * 2)
    folders = {"tiny": tiny, "embedded": EMBEDDED}
    done = run(
        f"--model-type={tiny}", f"--data={text}", "--max-tokens=50", "--stride=8", "--format=json",
        *("--variants", "float32", f"{EMBEDDED}+float32", f"{EMBEDDED}+float16"),
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["settings"]["is_one_tokenizer"] is False and found["settings"]["tokens"] == 50
    first, other, rounded = found["variants"]
    assert first["ratio"] == 1.0 and other["ratio"] is None and rounded["ratio"] is None
    covered = (sentence * 2).encode()[:50].decode("utf-8", "ignore")  # the tiny one's tokens are bytes
    for variant, folder in ((first, folders["tiny"]), (other, folders["embedded"])):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = load_tokenizer(folder, model.config.vocab_size)
        cut = (sentence * 2).encode()[:50].decode("utf-8", "surrogateescape") if folder == tiny else covered
        ids = list(cut.encode("utf-8", "surrogateescape")) if folder == tiny else tokenizer.encode(covered)
        assert folder != tiny or ids == tokenizer.encode(sentence * 2)[:50]
        nats = reference_nats(model, np.array(ids), min(64, len(ids) - 1), 8)
        size = sum(len(tokenizer.decode_bytes([token])) for token in ids[1:])
        assert variant["bits_per_byte"] == pytest.approx(nats.sum() / np.log(2) / size, rel=1e-4)
        assert variant["perplexity"] == pytest.approx(np.exp(nats.mean()), rel=1e-4)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--variants", "int3"],
            "unknown variant 'int3': expected a folder, or words of float32, float16, bfloat16, int8",
        ),
        (["--variants", "float16+"], "unknown variant 'float16+'"),
        (["--variants", "float16+float32"], "expected one data type in a variant but got 2"),
        (["--variants", "fp8+int8-weight-only"], "expected one quantization mode in a variant but got 2"),
        (["--variants", "kv-int8+kv-fp8"], "expected one KV cache type in a variant but got 2"),
        (["--variants", "float16+lm-head"], "variant 'float16+lm-head': expected a quantization mode"),
        (["--variants", "fp8+per-token"], "expected --per-token with int8-smoothquant only"),
        (["--variants", "./nowhere"], "expected a checkpoint folder or file at 'nowhere'"),
        (["--variants"], "expected at least one argument"),
        (["--model-type=nowhere/"], "expected a checkpoint folder or file at 'nowhere/'"),
        (["--model-type=nobody"], "no model 'nobody'"),
        (["--format=html"], "invalid choice: 'html'"),
        (["--max-tokens=1"], "expected --max-tokens to be at least 2, or 0 for all, but got 1"),
        (["--max-tokens=-1"], "expected --max-tokens to be at least 0 but got -1"),
        (["--stride=0"], "expected --stride to be at least 1 but got 0"),
        (["--stride=65"], "expected --stride to be at most the window of 64 tokens but got 65"),
        (["--context=9", "--stride=10"], "expected --stride to be at most the window of 9 tokens but got 10"),
        (["--context=65"], "expected --context to be at most the model's context of 64 but got 65"),
        (["--context=0"], "expected --context to be at least 1"),
        (["--new-tokens=1"], "expected --new-tokens to be at least 2"),
        (["--runs=0"], "expected --runs to be at least 1"),
        (["--data=nowhere.txt"], "cannot read nowhere.txt: No such file"),
        (["--data="], "cannot read .: Is a directory"),
        (["--calib-size=0", "--variants", "fp8"], "expected --calib-size to be at least 1"),
        (["--plot=picture.gif"], "expected --plot to end in .png or .svg but got picture.gif"),
        (["--plot=nowhere/picture.png"], "cannot write nowhere/picture.png: No such file or directory"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_input(run: Any, tiny: Path, text: Path, arguments: list[str], expected: str) -> None:
    if any(argument.startswith("--plot=nowhere") for argument in arguments):
        pytest.importorskip("matplotlib", reason="pictures need requirements/evaluate.txt")
    defaults = [f"--model-type={tiny}", f"--data={text}", "--variants", "float32"]
    assert expected in run(*defaults, *arguments).complaint


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"x", "expected a text of at least 2 tokens but"),
        (b"good\xff", "expected UTF-8 text in {path} but byte 4 is not"),
        (b"a\0b", "expected UTF-8 text in {path} but byte 1 is NUL: it is a binary file"),
        ("good".encode("utf-16"), "expected UTF-8 text in {path} but it is UTF-16: save it as UTF-8"),
    ],
)
def test_bad_text(run: Any, tiny: Path, text: Path, content: bytes, expected: str) -> None:
    text.write_bytes(content)
    complaint = run(f"--model-type={tiny}", f"--data={text}", "--variants", "float32").complaint
    assert expected.format(path=text) in complaint and "calibrat" not in complaint


def test_a_text_from_windows_is_the_same_text(text: Path) -> None:
    text.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read_text(str(text), 0)[0] == "one\ntwo\n"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("NVTRIPY_PORTABLE_ISA", "sse9", "expected NVTRIPY_PORTABLE_ISA to be one of "),
        ("NVTRIPY_PORTABLE_PREFETCH", "t3", "expected NVTRIPY_PORTABLE_PREFETCH to be t0, t1 or nta, with 64 to "),
        ("NVTRIPY_PORTABLE_THREADS", "0", "expected NVTRIPY_PORTABLE_THREADS to be 1 to 1024 but got '0'"),
        ("NVTRIPY_PORTABLE_THREADS", str(1 << 40), f"1 to 1024 but got '{1 << 40}'"),
    ],
)
def test_what_the_runtime_does_not_have(
    run: Any, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    """Told by the process that measures speed."""
    monkeypatch.setenv(name, value)
    done = run(f"--model-type={tiny}", f"--data={text}", "--variants", "float32")
    assert (done.code, done.out) == (2, "")
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("evaluate.py: error: ") and expected in done.err.splitlines()[-1]


def test_picture_in_place_of_a_folder(matplotlib: Any, run: Any, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    assert "folder.png is a folder" in run(f"--model-type={tiny}", f"--plot={tmp_path / 'folder.png'}").complaint


def test_without_matplotlib(run: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    complaint = run(f"--model-type={tiny}", "--plot=picture.png").complaint
    assert "--plot needs matplotlib" in complaint and "pip install -r requirements/evaluate.txt" in complaint


def test_without_modelopt(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    done = run("--variants", "int8-weight-only")
    last = done.err.splitlines()[-1]
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err
    assert last.startswith("evaluate.py: error: quantizing needs the packages of requirements/quant.txt")


def test_a_data_set_needs_its_package(run: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    complaint = run(f"--model-type={tiny}", "--data=cnn_dailymail").complaint
    assert "there is no file 'cnn_dailymail', and the data set of that name needs: pip install datasets" in complaint


def test_a_data_set_without_a_network(run: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Datasets:
        @staticmethod
        def load_dataset(*arguments: Any, **options: Any) -> Any:
            raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setitem(sys.modules, "datasets", Datasets)  # type: ignore[arg-type]
    complaint = run(f"--model-type={tiny}", "--data=cnn_dailymail").complaint
    assert "the data set cannot be loaded from the hub: Couldn't reach the hub" in complaint


def test_a_data_set_is_a_text(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Datasets:
        @staticmethod
        def load_dataset(*arguments: Any, **options: Any) -> Any:
            class Split:
                def take(self, count: int) -> list[dict[str, str]]:
                    return [{"text": f"document {number}"} for number in range(count)]

            return Split()

    monkeypatch.setitem(sys.modules, "datasets", Datasets)  # type: ignore[arg-type]
    text, name = read_text("someone/something", max_tokens=64 * 40)
    assert text.startswith("document 0\n\ndocument 1\n\n") and text.endswith("document 39")
    assert name == "data set someone/something"


def test_weights_that_float16_cannot_hold(run: Any, tiny: Path, text: Path, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wpe.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors")
    done = run(f"--model-type={folder}", f"--data={text}", "--variants", "float16")
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err
    assert "wpe.weight holds 1e+06, which overflows float16" in done.err.splitlines()[-1]


def test_numbers_that_are_not_finite_are_no_perplexity(run: Any, text: Path, tmp_path: Path) -> None:
    folder = overflowing_checkpoint(tmp_path / "overflowing")
    done = run("--data", text, "--variants", folder)
    assert (done.code, done.out) == (2, "")
    last = done.err.splitlines()[-1]
    assert last.startswith("evaluate.py: error: variant ") and "the model's numbers are not finite" in last
    assert run("--data", text, "--variants", f"{folder}+bfloat16").code == 0
