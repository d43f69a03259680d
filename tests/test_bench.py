"""benchmarks/: its models are what they are called, its peers compute the same, its tables say what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bandwidth
import bench
import model_files
import numpy as np
import peers
import pytest
import report
from peers import OURS, PEERS, Task
from report import Record, Run
from workers import Timed, Worker, WorkerError, write_model

import modelopt_layout
from weight_loader import open_checkpoint

ROOT = Path(__file__).resolve().parent.parent
PROMPT = np.random.default_rng(0).integers(0, 1000, 24).tolist()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def reference(cache: Path) -> np.ndarray:
    """transformers' logits in float32."""
    task = Task(model_files.model_file("transformers", "tiny", "fp16", cache), "float32", 1)
    return peers.start("transformers", task).logits(PROMPT)


# ---- the models ------------------------------------------------------------------------------------------------------


def test_random_weights_are_made_once_and_the_same_again(cache: Path, tmp_path: Path) -> None:
    first = model_files.float_checkpoint("tiny", cache)
    changed = (first / "model.safetensors").stat().st_mtime_ns
    assert model_files.float_checkpoint("tiny", cache) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == changed
    again = model_files.float_checkpoint("tiny", tmp_path)
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


@pytest.mark.parametrize("width", ["int8", "int4"])
def test_quantized_folders_hold_the_float_weights_rounded(width: str, cache: Path) -> None:
    quantized = open_checkpoint(model_files.checkpoint_folder("tiny", width, cache))
    assert quantized.config.quant_mode == {"int8": "int8-weight-only", "int4": "int4-weight-only"}[width]
    assert quantized.config.quant_lm_head and quantized.config.quant_embedding
    expected = dict(open_checkpoint(model_files.float_checkpoint("tiny", cache)).parameters("float32"))
    found = dict(quantized.parameters("float32"))
    for name in ("wte", "h.0.attn.c_attn", "h.1.mlp.c_proj"):
        stored = "lm_head" if name == "wte" else name
        weight, scale = found[f"{stored}.weight"], found[f"{stored}.weight_scale"]
        if width == "int4":  # (in, out), scaled in blocks along in, for inputs that have been scaled
            weight, scale = weight.T, np.repeat(scale.T, modelopt_layout.BLOCK, axis=1)
            input_scale = found.get(f"{stored}.pre_quant_scale", np.ones(weight.shape[1], np.float32))
            assert (name == "wte") == (input_scale == 1).all()
            weight, scale = weight * input_scale, scale * input_scale
        else:
            scale = scale[:, None]
        assert (np.abs(weight - expected[f"{name}.weight"]) <= 0.51 * scale).all()


def test_an_odd_vocabulary_can_be_packed_in_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPT-2's 50257 has to be."""
    odd = model_files.Shape(1, 2, 128, vocab_size=999, n_positions=16)
    monkeypatch.setitem(model_files.SHAPES, "tiny", odd)
    checkpoint = open_checkpoint(model_files.checkpoint_folder("tiny", "int4", tmp_path))
    assert dict(checkpoint.parameters("float32"))["lm_head.weight"].shape == (128, 999)


def test_an_interrupted_run_leaves_nothing_half_written(tmp_path: Path) -> None:
    def make(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model_files._made_once(tmp_path / "model", make)
    assert list(tmp_path.iterdir()) == []


def test_bytes_per_token(cache: Path) -> None:
    config = open_checkpoint(model_files.float_checkpoint("tiny", cache)).config
    embd, layers, vocabulary = 128, 2, 1000
    weights = layers * 12 * embd**2 + vocabulary * embd
    outputs = layers * 9 * embd  # of all linear layers
    floats = 2 * outputs + 4 * 2 * embd * (2 * layers + 1)  # biases in float16, LayerNorm in float32
    assert model_files.bytes_per_token(config, "fp16") == 2 * weights + floats
    assert model_files.bytes_per_token(config, "int8") == weights + 2 * (outputs + vocabulary) + floats
    inputs = layers * 7 * embd  # of all linear layers, which have input scales
    assert model_files.bytes_per_token(config, "int4") == weights // 2 + 2 * weights // 128 + 2 * inputs + floats


# ---- the engines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,width", [(name, width) for name in PEERS for width in PEERS[name].variants])
@pytest.mark.slow
def test_logits_are_those_of_transformers(name: str, width: str, cache: Path, reference: np.ndarray) -> None:
    module = peers.missing(name)
    if module is not None:
        pytest.skip(f"{module} is not installed: requirements-bench.txt")
    for variant in PEERS[name].variants[width]:
        # In a process of its own, as in a run: not every two of them bear each other.
        Worker(write_model, name, "tiny", width, cache).close()
        worker = Worker(Timed, name, Task(model_files.model_file(name, "tiny", width, cache), variant, 1))
        deviation = bench.deviation(worker.call("logits", PROMPT), reference)
        assert deviation < bench.TOLERANCES[width] / (10 if variant in ("float32", "F16") else 1)
        for moments in worker.call("turn", PROMPT, 4):
            assert len(moments) == 4 and sorted(moments) == moments and moments[0] > 0
        full = [*PROMPT, *([7] * (128 - len(PROMPT) - 3))]  # three places are left, and one token needs none
        assert len(worker.call("turn", full, 4)[0]) == 4
        worker.close()


def test_a_broken_model_is_noticed(reference: np.ndarray) -> None:
    assert bench.deviation(reference, reference) == 0
    assert bench.deviation(np.roll(reference, 1), reference) > max(bench.TOLERANCES.values())
    assert bench.deviation(np.zeros_like(reference), reference) > max(bench.TOLERANCES.values())


def test_workers_say_why_they_fail() -> None:
    with pytest.raises(WorkerError, match="ValueError: invalid literal"):
        Worker(int, "three")
    worker = Worker(list, [1, 2])
    assert worker.call("__len__") == 2
    with pytest.raises(WorkerError, match="IndexError"):
        worker.call("pop", 7)
    worker.close()
    with pytest.raises(WorkerError, match="exit code 3"):
        Worker(os._exit, 3)


# ---- bandwidth -------------------------------------------------------------------------------------------------------


def test_bandwidth_reads_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "last_level_cache", lambda: 1 << 20)
    monkeypatch.setattr(bandwidth, "LEAST_BYTES", 1 << 20)
    measured = bandwidth.Bandwidth(2)
    assert sum(part.nbytes for part in measured._parts) == 4 << 20
    assert measured.measure() > 0


def test_the_last_level_cache_has_a_size() -> None:
    assert bandwidth.last_level_cache() >= 1 << 16


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments,expected",
    [
        (["--shapes", "1b"], "invalid choice: '1b'"),
        (["--widths", "int2"], "invalid choice: 'int2'"),
        (["--peers", "nobody"], "invalid choice: 'nobody'"),
        (["--threads", "0"], "expected --threads to be at least 1 but got 0"),
        (["--runs", "-1"], "expected --runs to be at least 1 but got -1"),
        (["--runs", "few"], "invalid int value: 'few'"),
        (["--plot", "speeds.pdf"], "expected --plot to end in .png or .svg but got speeds.pdf"),
        (["--json", "no/such/folder.json"], "expected --json to be a file in a writable folder"),
        (["--json", "."], "expected --json to be a file in a writable folder"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_input_gets_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    assert bench.main() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("bench.py: error: ") and expected in err


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("context", [1024, 512, 128])
def test_turns_stay_within_the_context(quick: bool, context: int) -> None:
    turns = bench.turns(quick, context)
    assert [turn.length for turn in turns] == sorted({turn.length for turn in turns})
    assert all(turn.length >= 1 and turn.length + turn.steps <= context for turn in turns)
    assert any(turn.steps for turn in turns) and any(turn.is_prefill_wanted for turn in turns)
    if not quick and context == 1024:
        assert [turn.length for turn in turns if turn.steps] == [16, 64, 256, 1000]
        assert [turn.length for turn in turns if turn.is_prefill_wanted] == [64, 256, 512, 1000]


def test_a_missing_peer_is_left_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "missing", lambda name: None if name == OURS else "its_module")
    started = bench.Bench(bench.parse_arguments(["--peers", "llama.cpp"]), Path())
    assert started._names == [OURS]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "llama.cpp is left out: its_module is not installed" in err


@pytest.mark.slow
def test_a_whole_run(cache: Path, tmp_path: Path) -> None:
    numbers, picture = tmp_path / "speeds.json", tmp_path / "speeds.svg"
    options = ["--quick", "--shapes", "tiny", "--widths", "fp16", "--threads", "1", "--markdown", "--peers"]
    command = ["benchmarks/bench.py", *options]
    files = ["--json", str(numbers), "--plot", str(picture), "--cache", str(cache)]
    done = subprocess.run([sys.executable, *command, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "| fp16 " in done.stdout and "turn" not in done.stdout
    run = json.loads(numbers.read_text())
    (record,) = run["records"]
    assert record["peer"] == OURS and list(record["decode"]) == ["16", "64"] and list(record["prefill"]) == ["64"]
    assert record["warm"][0] > 0 and record["cold"][0] > 0 and record["peak"][0] > 1 << 20
    assert run["bandwidth"][0] > 0 and picture.read_text().startswith("<?xml")


# ---- the report ------------------------------------------------------------------------------------------------------


def records() -> list[Record]:
    return [
        Record(
            *("tiny", "fp16", OURS, "fp16", 0.001, {64: [99.0, 100.0, 120.0]}, {64: [1000.0]}, [3.0], [0.5], [10**8]),
            bandwidth=[1.98e9, 4e9, 2e9],
        ),
        Record("tiny", "fp16", "transformers", "float32", 0.0, {64: [20.0]}, {64: [500.0]}, [5.0], [], [4 * 10**8]),
        Record("tiny", "fp16", "transformers", "bfloat16", 0.01, {64: [40.0]}, {64: [250.0]}, [4.0], [], [5 * 10**8]),
        Record("tiny", "int8", OURS, "int8", 0.01, {64: [200.0]}, {64: [1000.0]}, [3.0], [0.25], [5 * 10**7], [2e9]),
    ]


def test_ratios_are_to_the_best_of_a_peer() -> None:
    fp16, int8 = report.ratios(records())
    assert fp16 == {
        "width": "fp16",
        "peer": "transformers",
        "decode @64": 2.5,
        "prefill @64": 2.0,
        "first token": 0.125,
        "peak memory": 0.25,
    }
    assert int8["peer"] == "transformers at fp16" and int8["decode @64"] == 5.0


def test_what_is_shown() -> None:
    assert report.shown([]) == "-"
    assert report.shown([3.14159]) == "3.14"
    assert report.shown([120.0, 99.0, 100.0]) == "100 (99.0-120)"
    assert report.shown([0.5, 0.25], 2) == "0.38 (0.25-0.50)"


@pytest.mark.parametrize("markdown", [True, False])
def test_columns_are_straight(markdown: bool) -> None:
    lines = report.table(["width", "engine", "speed"], [["fp16", "ours", "1"], ["int8", "x", "1000"]], markdown).split(
        "\n"
    )
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert ("|" in lines[0]) == markdown


@pytest.mark.parametrize("markdown", [True, False])
def test_the_report_names_everything(markdown: bool) -> None:
    run = Run(
        machine="a processor",
        isa="x86_64 with avx2",
        threads=2,
        versions={OURS: "nvtripy 0", "transformers": "transformers 5"},
        settings={"runs": 3},
        weight_bytes={"tiny": {"fp16": 10**7, "int8": 5 * 10**6}},
        bandwidth=[2e9],
        cache_bytes=8 << 20,
        records=records(),
    )
    text = report.text(run, markdown)
    for part in (
        "a processor",
        "avx2",
        "2 threads",
        "2.00 GB/s",
        "transformers 5",
        "3 interleaved",
        "transformers bfloat16",
    ):
        assert part in text
    assert "50%" in text  # the middle round: 99 tokens/s of 10 MB each, of 1.98 GB/s
    assert text.count("%") == 1  # the cache holds int8's 5 MB
    assert "a scale for each row" in text
