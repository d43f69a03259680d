"""evaluate.py: its numbers against transformers, against files whose sizes are known, and against each other; the forms
of its output; and all kinds of bad input."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_model import save_random
from tiny_checkpoints import CONTEXT, VOCABULARY, edit_config, random_checkpoint
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import evaluate
import quantization
from engine import compile_model, config_of, load_model
from tokenizer import load_tokenizer
from weight_loader import open_checkpoint

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = quantization.EMBEDDED_CHECKPOINT
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
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


# --- perplexity ------------------------------------------------------------------------------------------------------


def reference_nats(model: GPT2LMHeadModel, ids: np.ndarray, context: int, stride: int) -> np.ndarray:
    """A sliding window over the text, one window after the other: HuggingFace's recipe, plainly."""
    nats: list[float] = []
    start = 0
    while len(nats) < len(ids) - 1:
        window = torch.from_numpy(ids[start : start + context].astype(np.int64))
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        for place in range(len(window)):
            following = start + place + 1
            if following < len(ids) and following > len(nats):  # token 1 is the first that is predicted
                nats.append(-torch.log_softmax(logits[place], 0)[int(ids[following])].item())
        start += stride
    return np.array(nats)


@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_windows_predict_each_token_once_with_enough_before_it(predictions: int, context: int, data: Any) -> None:
    stride = data.draw(st.integers(1, context))
    predicted = []
    for number, window in enumerate(evaluate.windows(predictions, context, stride)):
        assert 0 <= window.start <= window.scored < window.stop <= min(predictions, window.start + context)
        assert window.start == number * stride
        assert number == 0 or window.scored - window.start >= context - stride
        predicted += range(window.scored, window.stop)
    assert predicted == list(range(predictions))


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT2LMHeadModel, Any]:
    """A random GPT-2 in transformers, and loaded for nvtripy."""
    folder = tmp_path_factory.mktemp("random")
    model = save_random(folder, n_layer=2, n_head=4, n_embd=32, vocab_size=160, n_positions=24)
    checkpoint = open_checkpoint(folder)
    return model, load_model(checkpoint, config_of(checkpoint, "float32"))


@pytest.mark.parametrize(
    ("tokens", "context", "stride"),
    [
        (101, 24, 24),
        (101, 24, 12),
        (101, 24, 7),
        (60, 10, 3),
        (40, 24, 1),
        (25, 24, 24),
        (26, 24, 5),
        (9, 24, 12),
        (2, 24, 1),
    ],
)
def test_nats_are_those_of_transformers(random_model: Any, tokens: int, context: int, stride: int) -> None:
    """Every token's, to 1e-4: both compute in float32, in another order."""
    model, gpt = random_model
    ids = np.random.default_rng(tokens).integers(0, 160, tokens).astype(np.int32)
    size = min(context, tokens - 1)
    logits_of, batch = evaluate.stateless_model(gpt, size, sum(1 for _ in evaluate.windows(tokens - 1, size, stride)))
    found = evaluate.negative_log_likelihoods(logits_of, batch, ids, context, stride)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, reference_nats(model, ids, context, stride), rtol=1e-4, atol=1e-4)


def test_what_the_padding_predicts_does_not_count() -> None:
    """A batch that the windows do not fill, and a last window that is shorter."""
    shapes = []

    def logits_of(idx: np.ndarray) -> np.ndarray:
        shapes.append(idx.shape)
        logits = np.zeros((*idx.shape, 5), np.float32)
        np.put_along_axis(logits, (idx[..., None] + 1) % 5, 30.0, axis=2)  # sure that one more follows
        return logits

    ids = (np.arange(1, 24) % 5).astype(np.int32)
    nats = evaluate.negative_log_likelihoods(logits_of, 4, ids, context=8, stride=4)
    assert set(shapes) == {(4, 8)}
    assert nats.shape == (22,) and (nats < 1e-6).all()


def test_nats_of_extreme_logits() -> None:
    logits = np.array([[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0], [0.0, 0.0, 0.0]], np.float32)
    assert evaluate._cross_entropy(logits, np.array([1, 1, 2])).tolist() == [2e4, 0.0, np.log(3.0)]
    assert evaluate.perplexity(np.array([800.0])) == np.inf


def test_embedded_checkpoint_against_transformers(run: Any, tmp_path: Path) -> None:
    """The program's own number. In float16 weights and activations are rounded: a tenth of a percent is their share."""
    done = run("--max-tokens=700", "--stride=200", "--variants", "float32", "float32", "float16", "--format=json")
    assert done.code == 0, done.err
    variants = json.loads(done.out)["variants"]
    words = evaluate.HELD_OUT_TEXT.read_text()
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
    assert evaluate.HELD_OUT_TEXT.read_bytes().decode() == words[int(len(words) * 0.9) :]


def test_docstrings() -> None:
    results = doctest.testmod(evaluate)
    assert results.attempted >= 2 and results.failed == 0


# --- weights ---------------------------------------------------------------------------------------------------------

WIDTH, INNER = 128, 512
LINEARS = {
    "attn.c_attn": (3 * WIDTH, WIDTH),
    "attn.c_proj": (WIDTH, WIDTH),
    "mlp.c_fc": (INNER, WIDTH),
    "mlp.c_proj": (WIDTH, INNER),
}
WEIGHTS = 3 * 128 * 128 + 128 * 128 + 2 * 512 * 128  # 196608
HEAD = VOCABULARY * WIDTH
ALGORITHMS = {"int8-weight-only": "W8A16", "int4-weight-only": "W4A16_AWQ", "fp8": "FP8"}

# (bytes of the layers on disk, bytes in memory at least, weights): weights, then float32 scales, then pre_quant_scales.
EXPECTED = {
    "int8-weight-only": (WEIGHTS + 4 * (384 + 128 + 512 + 128), WEIGHTS + 4 * (384 + 128 + 512 + 128), WEIGHTS),
    "int4-weight-only": (
        WEIGHTS // 2 + 4 * (384 + 128 + 512 + 4 * 128) + 4 * (128 + 128 + 128 + 512),
        WEIGHTS // 2 + 4 * (384 + 128 + 512 + 4 * 128),
        WEIGHTS,
    ),
    "fp8": (WEIGHTS + HEAD + 5 * 8, WEIGHTS + HEAD + 5 * 4, WEIGHTS + HEAD),
}


def quantized_folder(folder: Path, mode: str) -> Path:
    """What ModelOpt would export of a random model of one layer: its layout, with arbitrary values."""
    random_checkpoint(folder)  # for its tokenizer
    random = np.random.default_rng(0)

    def floats(*shape: int) -> np.ndarray:
        return random.uniform(0.01, 0.02, shape).astype(np.float32)

    tensors = {"wte.weight": floats(VOCABULARY, WIDTH), "wpe.weight": floats(CONTEXT, WIDTH)}
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        tensors |= {f"{name}.weight": floats(WIDTH), f"{name}.bias": floats(WIDTH)}
    layers = {f"h.0.{name}": shape for name, shape in LINEARS.items()}
    tensors |= {f"{name}.bias": floats(rows) for name, (rows, _) in layers.items()}
    if mode == "fp8":
        layers["lm_head"] = (VOCABULARY, WIDTH)
    for name, (rows, columns) in layers.items():
        if mode == "int4-weight-only":
            tensors[f"{name}.weight"] = random.integers(0, 256, (rows // 2, columns), dtype=np.uint8)
            tensors[f"{name}.weight_scale"] = floats(rows, columns // 128)
            tensors[f"{name}.pre_quant_scale"] = floats(columns)
        elif mode == "fp8":
            import ml_dtypes

            tensors[f"{name}.weight"] = random.normal(size=(rows, columns)).astype(ml_dtypes.float8_e4m3fn)
            tensors[f"{name}.weight_scale"] = floats()
            tensors[f"{name}.input_scale"] = floats()
        else:
            tensors[f"{name}.weight"] = random.integers(-127, 128, (rows, columns), dtype=np.int8)
            tensors[f"{name}.weight_scale"] = floats(rows)
    prefixed = {
        name if name.startswith("lm_head") else f"transformer.{name}": np.asarray(t) for name, t in tensors.items()
    }
    save_file(prefixed, folder / "model.safetensors")
    how: dict[str, Any] = {"quant_algo": ALGORITHMS[mode], "kv_cache_quant_algo": None}
    if mode == "int4-weight-only":
        how |= {"group_size": 128, "has_zero_point": False, "pre_quant_scale": True}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": how}))
    edit_config(folder, n_embd=WIDTH, tie_word_embeddings=True, quantization_config={"quant_method": "modelopt"})
    return folder


@pytest.mark.parametrize("mode", EXPECTED)
def test_bytes_of_quantized_weights(mode: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(quantized_folder(tmp_path / "quantized", mode))
    on_disk, at_least, weights = EXPECTED[mode]
    stored = evaluate.stored_weight_bytes(checkpoint)
    tensors = load_file(checkpoint.path / "model.safetensors") if mode != "fp8" else None
    assert (stored.layers, stored.num_weights) == (on_disk, weights)
    assert tensors is None or stored.total == sum(tensor.nbytes for tensor in tensors.values())
    compiled = evaluate.compiled_weight_bytes(
        compile_model(load_model(checkpoint, config_of(checkpoint, "float16")), 1), checkpoint.config
    )
    assert compiled.num_weights == weights
    # The input's scales are counted where the runtime keeps them with the layer.
    assert compiled.layers is not None and at_least <= compiled.layers <= on_disk
    assert compiled.total is not None and compiled.total >= compiled.layers
    limit = 0.28 if mode == "int4-weight-only" else 0.52
    assert stored.to_float16 is not None and stored.to_float16 <= limit
    assert compiled.to_float16 is not None and compiled.to_float16 <= limit


def test_bytes_of_shards(tiny: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    names = sorted(tensors)
    for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / shard)
    index = {name: "ab"[number % 2] + ".safetensors" for number, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_bytes((tiny / file).read_bytes())
    whole, shards = (evaluate.stored_weight_bytes(open_checkpoint(folder)) for folder in (tiny, tmp_path))
    assert shards == whole and whole.layers == 4 * 12 * 32 * 32


def test_pytorch_files_have_a_total_only(tiny: Path, tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in load_file(tiny / "model.safetensors").items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    stored = evaluate.stored_weight_bytes(open_checkpoint(tmp_path))
    assert stored.total == (tmp_path / "pytorch_model.bin").stat().st_size
    assert stored.layers is None and stored.to_float16 is None


# --- speed and memory ------------------------------------------------------------------------------------------------


def test_memory_of_this_process_is_not_counted() -> None:
    ballast = np.ones(400 << 20, np.uint8)
    assert evaluate.peak_memory_bytes() > ballast.nbytes
    assert evaluate.run_apart(evaluate.peak_memory_bytes) < ballast.nbytes


def test_a_killed_process_is_told() -> None:
    with pytest.raises(evaluate.UsageError, match="was killed"):
        evaluate.run_apart(os._exit, 9)


# --- output ----------------------------------------------------------------------------------------------------------

SETTINGS = evaluate.Settings("a|b.txt", 700, 512, 256, 32, 128, 3, "AMD EPYC", 2, "0.1.7")


def result(variant: str, size: int = 1_000_000, perplexity: float = 20.0, **changes: Any) -> evaluate.Result:
    weights = evaluate.WeightBytes(size, size // 2, size // 4)
    values: dict[str, Any] = {
        "dtype": "float16",
        "ratio": 1.0,
        "speed": evaluate.Speed(100.0, 0.01, 50_000_000),
        "disk": weights,
        "memory": weights,
    }
    return evaluate.Result(variant=variant, perplexity=perplexity, **(values | changes))


RESULTS = [
    result("float16", 2_000_000),
    result("int4-weight-only+lm-head", 600_000, 21.5, ratio=1.075),
    result("over|flow", perplexity=float("inf"), ratio=float("nan"), memory=evaluate.WeightBytes()),
]


def test_text_is_aligned() -> None:
    lines = evaluate.as_text(SETTINGS, RESULTS).splitlines()
    assert "700 tokens in windows of 512, stride 256" in " ".join(lines[: lines.index("")])
    table = lines[lines.index("") + 1 :][: 1 + len(RESULTS)]
    assert len({len(line) for line in table}) == 1
    assert [line.split()[0] for line in table] == ["variant", "float16", "int4-weight-only+lm-head", "over|flow"]
    assert table[1].split()[1:] == ["20.000", "1.0000", "100.0", "10.0", "2.00", "1.000", "2.00", "1.000", "50"]
    assert table[3].split()[1:] == ["inf", "nan", "100.0", "10.0", "1.00", "1.000", "-", "-", "50"]


def test_markdown_is_a_table() -> None:
    lines = evaluate.as_markdown(SETTINGS, RESULTS).splitlines()
    table = [line for line in lines if line.startswith("|")]
    cells = [line.replace("\\|", "").strip("|").split("|") for line in table]
    assert len(table) == 2 + len(RESULTS) and {len(row) for row in cells} == {len(evaluate.COLUMNS)}
    assert set("".join(cells[1])) == set(":-")
    assert lines[0].startswith("a|b.txt, 700 tokens") and lines[1] == ""


def test_json_has_everything_and_no_other_numbers() -> None:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(evaluate.as_json(SETTINGS, RESULTS), parse_constant=refuse)
    assert found["settings"]["stride"] == 256
    first, _, last = found["variants"]
    assert first["memory_bytes"] == 2_000_000 and first["memory_bits_per_weight"] == 16
    assert last["perplexity"] is None and last["ratio"] is None and last["memory_layers_bytes"] is None
    assert set(first) == set(last)


@pytest.fixture
def matplotlib() -> Any:
    return pytest.importorskip("matplotlib", reason="pictures need requirements-evaluate.txt")


@pytest.mark.parametrize("name", ["picture.png", "picture.SVG"])
def test_picture(matplotlib: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("what was there before")
    finite = RESULTS[:2]
    evaluate.draw(SETTINGS, finite, path)
    once = path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == [name]
    if path.suffix == ".png":
        from matplotlib import image

        pixels = image.imread(path)
        assert pixels.shape[0] > 400 and pixels.shape[1] > 600 and pixels.std() > 0.01
    else:
        text = once.decode()
        assert "<svg" in text and "float16" in text and "int4-weight-only+lm-head" in text
    evaluate.draw(SETTINGS, finite, path)
    assert path.read_bytes() == once


def test_names_in_a_picture_do_not_overlap(matplotlib: Any) -> None:
    """A dozen variants that are nearly equal, and one far off."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(9, 5.5))
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [(4.0 + 0.01 * n, 20.0 + 0.01 * (n % 3), f"int8-smoothquant+kv-{n}") for n in range(12)]
    points.append((15.0, 25.0, "float32"))
    for x, y, _ in points:
        axes.plot([x], [y], "o")
    evaluate._label(axes, points)
    boxes = [Text.get_window_extent(label, canvas.get_renderer()) for label in axes.texts]
    assert sorted(label.get_text() for label in axes.texts) == sorted(name for *_, name in points)
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_a_name_that_has_no_room_is_written_all_the_same(matplotlib: Any, tmp_path: Path) -> None:
    evaluate.draw(SETTINGS, [result("/a/very/long/path" * 20)], tmp_path / "picture.svg")
    assert "/a/very/long/path" in (tmp_path / "picture.svg").read_text()


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
    assert f"{len(TEXT)} tokens in windows of 64, stride 32" in lines[0]
    assert "33 tokens after a prompt of 32" in lines[0], "what fits the context"
    assert [line.split("|")[1].strip() for line in lines[4:7]] == ["float16", str(folder), f"{folder}+float32"]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "Traceback" not in done.stderr


# --- which variants --------------------------------------------------------------------------------------------------


def test_every_word_of_a_variant_has_its_effect() -> None:
    options = evaluate.parse_arguments(["--calib-size=5", "--calib-length=64"])
    variant = evaluate.parse_variant("int8-smoothquant+float32+lm-head+per-channel+per-token+kv-int8", options)
    assert variant.dtype == "float32"
    assert variant.quantization == quantization.QuantizationConfig(
        mode="int8-smoothquant",
        kv_cache_dtype="int8",
        quant_lm_head=True,
        per_channel=True,
        per_token=True,
        calib_size=5,
        calib_length=64,
    )
    assert evaluate.parse_variant("bfloat16", options) == evaluate.Variant("bfloat16", "bfloat16")
    cache_only = evaluate.parse_variant("kv-fp8", options)
    assert cache_only.dtype == "float16" and cache_only.quantization is not None
    assert (cache_only.quantization.mode, cache_only.quantization.kv_cache_dtype) == (None, "fp8")
    assert evaluate.parse_variant("./x+y+float32", options) == evaluate.Variant(
        "./x+y+float32", "float32", None, Path("x+y")
    )


def test_without_modelopt_the_default_is_what_is_left(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "modelopt", None)
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    variants = evaluate.open_variants(evaluate.parse_arguments([f"--model-type={EMBEDDED}"]))
    assert [variant.name for variant, _ in variants] == ["float32", "float16"]
    told = capsys.readouterr().err.splitlines()
    for mode in quantization.MODES:
        assert any(line.startswith(f"left out {mode}: quantizing needs the packages of") for line in told)


def test_a_quantized_checkpoint_is_evaluated_as_it_is(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path / "quantized", "int8-weight-only")
    variants = evaluate.open_variants(evaluate.parse_arguments([f"--model-type={folder}"]))
    assert [variant.name for variant, _ in variants] == ["float32", "float16"]


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
        (["--variants", "./nowhere"], "expected a checkpoint folder at 'nowhere'"),
        (["--variants"], "expected at least one argument"),
        (["--model-type=nowhere/"], "expected a checkpoint folder at 'nowhere/'"),
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
        (["--data=nowhere.txt"], "cannot read the text nowhere.txt: No such file"),
        (["--data="], "cannot read the text .: Is a directory"),
        (["--calib-size=0", "--variants", "fp8"], "expected --calib-size to be at least 1"),
        (["--plot=picture.gif"], "expected --plot to end in .png or .svg but got picture.gif"),
        (["--plot=nowhere/picture.png"], "cannot write nowhere/picture.png: No such file or directory"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_input(run: Any, tiny: Path, text: Path, arguments: list[str], expected: str) -> None:
    if any(argument.startswith("--plot=nowhere") for argument in arguments):
        pytest.importorskip("matplotlib", reason="pictures need requirements-evaluate.txt")
    defaults = [f"--model-type={tiny}", f"--data={text}", "--variants", "float32"]
    assert expected in run(*defaults, *arguments).complaint


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"x", "expected a text of at least 2 tokens but"),
        (b"good\xff", "expected UTF-8 text but byte 4 of"),
        (b"a\0b", "is a binary file"),
    ],
)
def test_bad_text(run: Any, tiny: Path, text: Path, content: bytes, expected: str) -> None:
    text.write_bytes(content)
    complaint = run(f"--model-type={tiny}", f"--data={text}", "--variants", "float32").complaint
    assert expected in complaint and "calibrat" not in complaint


def test_picture_in_place_of_a_folder(matplotlib: Any, run: Any, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    assert "folder.png is a folder" in run(f"--model-type={tiny}", f"--plot={tmp_path / 'folder.png'}").complaint


def test_without_matplotlib(run: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    complaint = run(f"--model-type={tiny}", "--plot=picture.png").complaint
    assert "--plot needs matplotlib" in complaint and "pip install -r requirements-evaluate.txt" in complaint


def test_without_modelopt(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    done = run("--variants", "int8-weight-only")
    last = done.err.splitlines()[-1]
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err
    assert last.startswith("evaluate.py: error: quantizing needs the packages of requirements-quant.txt")


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
    text, name = evaluate.read_text("someone/something", max_tokens=64 * 40)
    assert text.startswith("document 0\n\ndocument 1\n\n") and text.endswith("document 39")
    assert name == "data set someone/something"


def test_other_tokenizers_are_refused(run: Any, tiny: Path, text: Path) -> None:
    complaint = run(f"--model-type={tiny}", f"--data={text}", "--variants", "float32", EMBEDDED).complaint
    assert "expected variants with the same tokenizer but" in complaint


def test_weights_that_float16_cannot_hold(run: Any, tiny: Path, text: Path, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wpe.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors")
    done = run(f"--model-type={folder}", f"--data={text}", "--variants", "float16")
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err
    assert "wpe.weight holds 1e+06, which overflows float16" in done.err.splitlines()[-1]
