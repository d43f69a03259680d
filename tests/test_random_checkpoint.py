"""random_checkpoint.py: folders that transformers and weight_loader.py open, of any size in the same memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from selection import partly_slow

import random_checkpoint
from converting import random_numbers
from parallelism.mapping import Mapping
from random_checkpoint import ARCHITECTURES, DEVIATION, PRESETS, Shape, tensors, write, write_ranks
from weight_loader import open_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TINY = {"n_layer": 3, "n_embd": 64, "n_head": 4, "vocab_size": 300, "n_positions": 32}
SHAPES = {
    "gpt2": Shape("GPT2LMHeadModel", **TINY),
    "gpt2-inner-untied": Shape("GPT2LMHeadModel", **TINY, n_inner=96, tied=False),
    "bigcode": Shape("GPTBigCodeForCausalLM", **TINY),
    "bigcode-multi-head": Shape("GPTBigCodeForCausalLM", **TINY, n_kv_head=4),
    "starcoder2": Shape("Starcoder2ForCausalLM", **TINY, n_kv_head=2, window=8),
    "starcoder2-untied": Shape("Starcoder2ForCausalLM", **TINY, n_kv_head=1, tied=False),
    "llama": Shape("LlamaForCausalLM", **TINY, n_kv_head=2, n_inner=160),
    "llama-untied": Shape("LlamaForCausalLM", **TINY, tied=False),
}


def stored(folder: Path) -> dict[str, Any]:
    """All tensors of a folder, of whatever number of files."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            assert not names & found.keys()
            found |= {name: file.get_tensor(name) for name in names}
    return found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_transformers_and_we_open_it(tmp_path: Path, name: str, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    shape, folder = SHAPES[name], tmp_path / "made"
    write(shape, folder, dtype)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == shape.architecture and model.dtype == getattr(torch, dtype)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits = model(torch.arange(20)[None]).logits
    assert logits.shape == (1, 20, shape.vocab_size) and torch.isfinite(logits).all()
    assert model.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False).shape[1] >= 5

    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.n_layer == shape.n_layer and checkpoint.config.tie_word_embeddings == shape.tied
    for _, array in checkpoint.parameters(dtype):
        assert np.isfinite(array.astype(np.float32)).all()


@pytest.mark.parametrize("name", SHAPES)
def test_the_scale_is_gpt2s(tmp_path: Path, name: str) -> None:
    write(SHAPES[name], tmp_path / "made")
    found = stored(tmp_path / "made")
    assert list(found) and set(found) == {tensor.name for tensor in tensors(SHAPES[name])}
    for tensor in tensors(SHAPES[name]):
        values = found[tensor.name].numpy()
        assert values.shape == tensor.shape
        if tensor.deviation is None:
            assert (values == 1).all()
            continue
        is_residual = any(part in tensor.name for part in ("c_proj.weight", "o_proj.weight", "down_proj.weight"))
        assert tensor.deviation == (DEVIATION / math.sqrt(2 * 3) if is_residual else DEVIATION)
        error = 5 / math.sqrt(tensor.count)  # five deviations of what is measured
        assert abs(values.mean()) < error * tensor.deviation
        assert abs(values.std() / tensor.deviation - 1) < error


def test_presets_are_the_models_of_these_names() -> None:
    """Their parameters, counted by transformers' own classes without any memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for preset, shape in PRESETS.items():
        content = random_checkpoint.config(shape, "float16")
        config = AutoConfig.for_model(content.pop("model_type"), **content)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        names = {name: tuple(value.shape) for name, value in model.named_parameters()}
        assert {tensor.name: tensor.shape for tensor in tensors(shape)} == names, preset
    counts = {preset: sum(tensor.count for tensor in tensors(shape)) for preset, shape in PRESETS.items()}
    assert counts["gpt2"] == 124_439_808 and counts["gpt2-xl"] == 1_557_611_200
    assert round(counts["gpt-175b"] / 1e9) == 175 and round(counts["starcoder2-3b"] / 1e8) == 30


def test_shards_hold_the_same(tmp_path: Path) -> None:
    shape = SHAPES["llama"]
    write(shape, tmp_path / "one", "float16", seed=3)
    write(shape, tmp_path / "many", "float16", seed=3, shard_bytes=50_000)
    one, many = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert one.keys() == many.keys() and all((one[name] == many[name]).all() for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert set(index["weight_map"].values()) == set(files) and len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = [(tmp_path / "many" / file).stat().st_size for file in files]
    assert max(sizes) < 55_000 and index["metadata"]["total_size"] == sum(2 * value.numel() for value in many.values())
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    for name in ("one", "many"):
        parameters = dict(open_checkpoint(tmp_path / name).parameters("float16"))
        assert parameters["wte.weight"].shape == (300, 64)


def test_a_seed_is_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of threads; and no two tensors, nor blocks of one, are alike."""
    shape = Shape("GPT2LMHeadModel", **{**TINY, "vocab_size": 40_000})
    for name, seed, threads in (("a", 0, 1), ("b", 0, 5), ("c", 1, 2)):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        write(shape, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b and a != c and len(a) == len(c)
    found = stored(tmp_path / "a")
    table = found["transformer.wte.weight"].numpy().ravel()
    assert table.size > 2 * random_checkpoint.BLOCK
    starts = [value.numpy().ravel()[:64] for name, value in found.items() if value.numel() >= 64 and "ln_" not in name]
    starts += [table[random_checkpoint.BLOCK :][:64], table[2 * random_checkpoint.BLOCK :][:64]]
    assert len({start.tobytes() for start in starts}) == len(starts)


@pytest.mark.parametrize("name", partly_slow(SHAPES, ["gpt2", "llama-untied"]))
def test_ranks_hold_one_model(tmp_path: Path, name: str) -> None:
    """The same, however many there are, of the scale and with the settings of the folder without ranks."""
    shape = SHAPES[name]
    write(shape, tmp_path / "plain", "float16")
    plain = open_checkpoint(tmp_path / "plain")
    wanted = dict(plain.parameters("float16"))
    found: dict[str, Any] = {}
    for tp_size, pp_size, dimension in ((1, 1, None), (2, 3, 0), (4, 2, 1)):
        folder = tmp_path / f"{tp_size}"
        write_ranks(shape, folder, Mapping(tp_size, pp_size, 0, dimension), "float16")
        checkpoint = open_checkpoint(folder)
        assert checkpoint.config.eos_token_ids == plain.config.eos_token_ids
        assert checkpoint.config.n_inner == plain.config.n_inner and checkpoint.config.window == plain.config.window
        read = dict(checkpoint.parameters("float16"))
        assert list(read) == list(wanted)
        for parameter, values in read.items():
            assert values.shape == wanted[parameter].shape
            assert np.array_equal(values, found.setdefault(parameter, values))
            deviation, expected = (float(each.astype(np.float32).std()) for each in (values, wanted[parameter]))
            assert deviation == pytest.approx(expected, rel=1 / math.sqrt(values.size) * 8)


def test_blocks_of_rows_are_of_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of many blocks, of which ranks have some rows, or some columns of each row."""
    monkeypatch.setattr(random_numbers, "BLOCK", 1000)
    for tp_size in (1, 4):
        write_ranks(SHAPES["llama"], tmp_path / f"{tp_size}", Mapping(tp_size, embedding_sharding_dim=0))
    one, four = (dict(open_checkpoint(tmp_path / f"{size}").parameters("float32")) for size in (1, 4))
    assert all(np.array_equal(values, four[name]) for name, values in one.items())
    rows = one["wte.weight"]
    assert len({row.tobytes() for row in rows}) == len(rows)


PEAK = """
import resource, sys
import random_checkpoint
code = random_checkpoint.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "ranks",
    [[], pytest.param(["--tp-size=4", "--use-parallel-embedding"], marks=pytest.mark.slow)],
    ids=["plain", "ranks"],
)
def test_memory_does_not_grow_with_the_size(tmp_path: Path, ranks: list[str]) -> None:
    peaks = []
    for width in (256, 2048):
        sizes = ["--n-layer=2", f"--n-embd={width}", "--n-head=8", "--vocab-size=60000", *(ranks or ["--shard-gb=0.2"])]
        command = [sys.executable, "-c", PEAK, "--architecture=GPT2LMHeadModel", *sizes, "--dtype=float16"]
        folder = tmp_path / str(width)
        done = subprocess.run(
            [*command, f"--output={folder}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        peaks.append((size / 1e6, int(done.stdout) / 1e3))
        shutil.rmtree(folder)
    (small, low), (large, high) = peaks
    assert large > 9 * small
    assert high - low < 20, f"{low} MB for {small} MB, {high} MB for {large} MB"


# --- the command line ------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = random_checkpoint.main(list(map(str, arguments)))
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err.replace("\r", "\n").splitlines()[-1]


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a" / "b"
    sizes = ["--n-layer=1", "--n-embd=32", "--n-head=2", "--vocab-size=50", "--n-positions=8"]
    code, line = run(capsys, "--preset=starcoder2-3b", *sizes, "--dtype=bfloat16", "--output", folder)
    assert (code, line) == (0, f"{folder}: 14,368 parameters in bfloat16, 28.7 kB")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert list(folder.parent.iterdir()) == [folder]
    config = json.loads((folder / "config.json").read_text())
    assert config["num_key_value_heads"] == 2 and config["sliding_window"] == 4096
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())


GPT2 = ["--architecture=GPT2LMHeadModel", "--n-layer=1", "--n-embd=32", "--n-head=2"]
WRONG: list[tuple[list[str], str]] = [
    (
        [],
        "expected --preset, or --architecture and sizes, but --architecture, --n-layer, --n-embd, --n-head is missing",
    ),
    (["--preset=gpt3"], "argument --preset: invalid choice: 'gpt3'"),
    (["--architecture=BertModel"], "argument --architecture: invalid choice: 'BertModel'"),
    ([*GPT2, "--n-head=5"], "expected --n-head to divide --n-embd, but got 5 and 32"),
    ([*GPT2, "--n-kv-head=1"], "expected --n-kv-head to be 2 for GPT2LMHeadModel but got 1"),
    ([*GPT2, "--n-layer=0"], "expected --n-layer to be at least 1 but got 0"),
    ([*GPT2, "--n-layer=10000"], "expected --n-layer to be at most 9999 but got 10000"),
    ([*GPT2, "--seed=-1"], "expected --seed to be at least 0 but got -1"),
    ([*GPT2, "--shard-gb=0"], "expected --shard-gb to be at least 0.000001 but got 0.0"),
    ([*GPT2, "--shard-gb=nan"], "expected --shard-gb to be at least 0.000001 but got nan"),
    ([*GPT2, "--tp-size=3"], "expected tp_size to divide the 2 heads but got 3: 1 or 2 would do"),
    ([*GPT2, "--pp-size=0"], "expected --pp-size to be at least 1 but got 0"),
    ([*GPT2, "--pp-size=2"], "expected pp_size to be at most 1, the number of layers, but got 2"),
    ([*GPT2, "--tp-size=2", "--shard-gb=1"], "expected --shard-gb without ranks only: each of them has one file"),
    ([*GPT2, "--embedding-sharding-dim=1"], "expected --embedding-sharding-dim with --use-parallel-embedding only"),
    ([*GPT2, "--window=3"], "--window is for Starcoder2ForCausalLM, but the architecture is GPT2LMHeadModel"),
    ([*GPT2, "--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
    (["--preset=santacoder", "--n-kv-head=4"], "expected --n-kv-head to be 1 or 16 for GPTBigCodeForCausalLM"),
    (["--preset=starcoder2-3b", "--n-kv-head=5"], "expected --n-kv-head to divide --n-head, but got 5 and 24"),
    (["--preset=starcoder2-3b", "--n-embd=72", "--n-head=24"], "expected heads of an even width for Starcoder2"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message for _, message in WRONG])
def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, line = run(capsys, *arguments, f"--output={tmp_path / 'made'}")
    assert code == 2 and line.startswith(f"random_checkpoint.py: error: {message}")
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "link"):
        code, line = run(capsys, *GPT2, f"--output={tmp_path / name}")
        assert code == 2 and "expected --output to be a folder that is not there yet" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]
    (tmp_path / "empty").mkdir()
    assert run(capsys, *GPT2, f"--output={tmp_path / 'empty'}")[0] == 0


def test_what_does_not_fit_is_not_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=300 * 10**9))
    code, line = run(capsys, "--preset=gpt-175b", "--dtype=float16", f"--output={tmp_path / 'new' / 'made'}")
    assert code == 2
    assert f"the checkpoint takes 349.2 GB, but at {tmp_path / 'new'} there are 300.0 GB free" in line
    assert not list(tmp_path.iterdir())


LIMITED = """
import resource, sys
import random_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(random_checkpoint.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("ranks", [[], ["--tp-size=2"]], ids=["plain", "ranks"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, ranks: list[str]) -> None:
    command = [sys.executable, "-c", LIMITED, *GPT2, *ranks, f"--output={tmp_path / 'new' / 'made'}"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.replace("\r", "\n").splitlines()[-1].startswith("random_checkpoint.py: error: ")
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(random_checkpoint, "header_of", interrupted)
    assert random_checkpoint.main([*GPT2, f"--output={tmp_path / 'new' / 'made'}"]) == 130
    assert not list(tmp_path.iterdir())


def test_architectures_are_those_that_the_help_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        random_checkpoint.main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in (*ARCHITECTURES, *PRESETS))
