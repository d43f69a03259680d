"""Prompt tables: logits as peft computes them, each sequence as alone, and what is refused."""

from __future__ import annotations

import io
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_models import adapted
from random_models import logits_of, random_model
from safetensors.numpy import load_file, save_file
from selection import partly_slow
from served import Server
from test_model import relative_error
from test_model_on_tensorrt import SIZES, model_of_ones, variants
from tiny_checkpoints import random_checkpoint

import example
import prompt_table
import serve
from adapters.errors import AdapterError
from adapters.lora import read_lora
from adapters.prompts import Prompt, PromptTable, find_prompts, read_prompts
from command_line import UsageError
from engine import AdapterRoom, Engine, compile_model, config_of, load_model, open_engine
from loading.errors import CheckpointError
from model import GPTConfig
from nvtripy_portable.decoder import Decoder, Piece
from serving.speculation import PromptLookup, Speculation
from weight_loader import open_checkpoint

torch = pytest.importorskip("torch", reason="the reference needs torch")
peft = pytest.importorskip("peft", reason="the reference needs peft (requirements/test.txt)")
yaml = pytest.importorskip("yaml", reason="NeMo's archives need PyYAML")

from nemo_archives import config_of as nemo_config  # noqa: E402
from nemo_archives import write_tar  # noqa: E402

IDX = np.random.default_rng(0).integers(0, 97, (1, 14)).astype(np.int32)
IDS: list[int] = IDX[0].tolist()
#: Of float rounding alone, as for the models themselves (test_relatives.py).
TOLERANCES = {"float32": 1e-5, "float16": 2e-3}
#: GPT-2's positions, rotary ones, one key-value head, a window.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_bigcode": {},
    "llama": {},
    "starcoder2": {},
    "mistral": {"sliding_window": 7},
}


def tuned(base: Any, folder: Path, tokens: int = 5, **settings: Any) -> Any:
    """A model of peft's with random virtual tokens, saved in a folder."""
    torch.manual_seed(1)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return model.eval()


def decoder_with(checkpoint: Any, dtype: str, rows: np.ndarray) -> Decoder:
    decoder = open_engine(checkpoint, dtype, 1, room=AdapterRoom(prompt_rows=len(rows))).paged(8, 64)
    assert decoder is not None and decoder.prompt_rows == len(rows)
    decoder.set_prompts(rows)
    return decoder


def logits_with(decoder: Decoder, ids: list[int]) -> np.ndarray:
    """Of every position: a prompt, and the last tokens as generated ones."""
    pages = decoder.pool.take(-(-len(ids) // decoder.page_tokens))
    prompt = len(ids) - 3
    found = [decoder.step([Piece(ids[:prompt], 0, pages, rows=list(range(prompt)))])]
    for position in range(prompt, len(ids)):
        found.append(decoder.step([Piece([ids[position]], position, pages, generated=True)]))
    decoder.pool.release(pages)
    return np.concatenate(found)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_pefts(family: str, dtype: str, tmp_path: Path) -> None:
    base = random_model(family, **FAMILIES[family])
    if dtype != "float32":
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if parameter.ndim > 1 and "embed" not in name and "wte" not in name:
                    parameter.mul_(0.5)
    base.save_pretrained(tmp_path / "base")
    plain = logits_of(base, IDX)[0]
    expected = logits_of(tuned(base, tmp_path / "prompt"), IDX)[0][5:]
    assert relative_error(expected, plain) > 0.05, "the prompt does nothing"
    checkpoint = open_checkpoint(tmp_path / "base")
    table = PromptTable(find_prompts(str(tmp_path / "prompt"), checkpoint), checkpoint.config.vocab_size)
    decoder = decoder_with(checkpoint, dtype, table.rows)
    found = logits_with(decoder, [*table.ids(0), *IDS])[5:]
    assert relative_error(found, expected) < TOLERANCES[dtype]
    assert relative_error(logits_with(decoder, IDS), plain) < TOLERANCES[dtype]


def test_p_tuning_is_a_table_in_its_folder(tmp_path: Path) -> None:
    """peft saves what its encoder computes."""
    base = random_model("gpt2")
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(2)
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "prompt")
    checkpoint = open_checkpoint(tmp_path / "base")
    table = PromptTable(find_prompts(str(tmp_path / "prompt"), checkpoint), checkpoint.config.vocab_size)
    found = logits_with(decoder_with(checkpoint, "float32", table.rows), [*table.ids(0), *IDS])[4:]
    assert relative_error(found, logits_of(model, IDX)[0][4:]) < TOLERANCES["float32"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base")
    random_model("gpt2").save_pretrained(folder)
    return open_checkpoint(folder)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_of_the_vocabulary_are_its_tokens(base: Any, dtype: str) -> None:
    """To the last bit, in any mix of sequences, wherever they stand in the text."""
    embedding = next(array for name, array in base.parameters("float32") if name == "wte.weight")
    decoder = decoder_with(base, dtype, np.asarray(embedding, np.float32)[[7, 96, 0]])
    same = {7: 97, 96: 98, 0: 99}
    texts = [[7, 1, 96, 2], [0, 7, 7], [3, 96, 5, 0, 7, 1]]
    virtual = [[same.get(id, id) for id in text] for text in texts]
    tables = [decoder.pool.take(1) for _ in range(6)]
    pieces = [Piece(text, 0, table) for text, table in zip([*texts, *virtual], tables, strict=True)]
    found = decoder.step(pieces)
    assert np.array_equal(found[:3], found[3:])
    generated = [7, 96, 0, *(same[id] for id in (7, 96, 0))]
    pieces = [
        Piece([id], len(text), table, generated=True)
        for id, text, table in zip(generated, [*texts, *virtual], tables, strict=True)
    ]
    found = decoder.step(pieces)
    assert np.array_equal(found[:3], found[3:])


@pytest.mark.parametrize("native", [True, False])
def test_ids_beyond_the_table_are_refused(base: Any, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setenv("NVTRIPY_PORTABLE_NATIVE", "0")
    decoder = decoder_with(base, "float32", np.ones((2, base.config.n_embd), np.float32))
    pages = decoder.pool.take(1)
    with pytest.raises(ValueError, match="expects indices in"):
        decoder.step([Piece([1, 99], 0, pages)])
    plain = open_engine(base, "float32", 1).paged(8, 8)
    assert plain is not None and plain.prompt_rows == 0
    with pytest.raises(ValueError, match="expects indices in"):
        plain.step([Piece([97], 0, plain.pool.take(1))])
    for rows in (np.ones((3, base.config.n_embd)), np.ones((1, 7)), np.ones(4)):
        with pytest.raises(ValueError, match="rows of prompts but got"):
            decoder.set_prompts(rows.astype(np.float32))
    with pytest.raises(ValueError, match="rows of prompts but got"):
        plain.set_prompts(np.ones((1, 32), np.float32))


def test_numpy_and_rows_of_a_batch_compute_the_same(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(3).normal(size=(4, base.config.n_embd)).astype(np.float32)
    ids = [97, 100, *IDS]
    native = logits_with(decoder_with(base, "float32", rows), ids)
    config = replace(config_of(base, "float32"), prompt_rows=4)
    engine = Engine(compile_model(load_model(base, config), 2), config, 2)
    engine.set_prompts(rows)
    found = engine.step(np.array([ids] * 2, np.int32), np.zeros(2, np.int32), np.full(2, len(ids) - 1, np.int32))
    monkeypatch.setenv("NVTRIPY_PORTABLE_NATIVE", "0")
    numpy = logits_with(decoder_with(base, "float32", rows), ids)
    assert relative_error(numpy, native) < 1e-5
    assert all(relative_error(row, native[-1]) < 1e-5 for row in found)


@pytest.mark.parametrize("mode", ["int8-weight-only", "int4-weight-only"])
def test_quantized_tables_beside_float_rows(mode: str, tmp_path: Path) -> None:
    """The base's own embedding stays quantized; the prompt's rows are floats, as in the base without quantization."""
    from quantized_folders import quantized_folder

    folder = quantized_folder(tmp_path / "quantized", mode)
    checkpoint = open_checkpoint(folder)
    vocabulary = checkpoint.config.vocab_size
    rows = np.random.default_rng(4).normal(size=(3, checkpoint.config.n_embd)).astype(np.float32)
    decoder = decoder_with(checkpoint, "float32", rows)
    plain = open_engine(checkpoint, "float32", 1).paged(8, 64)
    assert plain is not None
    ids = [1, 2, 3, 4, 5]
    assert np.array_equal(logits_with(decoder, ids), logits_with(plain, ids))
    assert not np.array_equal(logits_with(decoder, [vocabulary, *ids])[1:], logits_with(plain, ids))


@pytest.mark.parametrize(
    "options",
    partly_slow(list(variants()), [each for each in variants() if each.get("quant_embedding")][:4]),
    ids=lambda each: "-".join(map(str, each.values())),
)
def test_every_variant_has_room_for_prompts(options: dict[str, Any]) -> None:
    """Natively, and over pages: an odd vocabulary in int4 has a row too many, which is no prompt's."""
    config = GPTConfig(**SIZES, **options, prompt_rows=3)  # type: ignore[arg-type]
    executable = compile_model(model_of_ones(config), 1)
    [embedding] = [each for each in executable._executable.portable.graph.operations if each.kind == "embedding"]
    assert len(embedding.operands) == 7
    decoder = Decoder.of(executable)
    assert decoder is not None and decoder.prompt_rows == 3
    rows = np.random.default_rng(5).normal(size=(3, config.n_embd)).astype(np.float32)
    decoder.set_prompts(rows)
    pages = decoder.pool.take(1)
    one = decoder.step([Piece([config.vocab_size - 1, config.vocab_size], 0, pages)])
    decoder.set_prompts(rows[1:])
    assert np.isfinite(one).all()
    with pytest.raises(ValueError, match="expects indices in"):
        decoder.step([Piece([config.vocab_size + 3], 0, pages)])


# ---- containers ------------------------------------------------------------------------------------------------------


def write_nemo_prompts(path: Path, tables: dict[str, Any], settings: dict[str, Any] | None = None) -> Path:
    buffer = io.BytesIO()
    torch.save(tables, buffer)
    config = nemo_config(random_model("gpt2"), **(settings or {}))
    contents = {"./model_config.yaml": yaml.safe_dump(config).encode(), "./model_weights.ckpt": buffer.getvalue()}
    write_tar(path, contents)
    return path


def rows_of(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def task(name: str, rows: np.ndarray) -> dict[str, Any]:
    return {f"prompt_table.{name}.prompt_embeddings.weight": torch.from_numpy(rows)}


def test_nemos_tables(base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbered as the settings have them, with their lengths; converted, each as TensorRT-LLM's table or ours."""
    first, second = rows_of(3, 32), rows_of(6, 32, seed=1)
    templates = {"task_templates": [{"taskname": "squad"}, {"taskname": "absent"}, {"taskname": "mood"}]}
    state = {"prompt_table": {**task("mood", first), **task("squad", second)}, "prompt_encoder.x": torch.ones(2)}
    path = write_nemo_prompts(tmp_path / "both.nemo", state, templates)
    found = find_prompts(str(path), base)
    assert [each.name for each in found] == ["squad", "mood"]
    assert np.array_equal(found[0].rows, second) and np.array_equal(found[1].rows, first)
    peft_name = "model.embedding.adapter_layer.ptuning_adapter.inference_table"
    other = write_nemo_prompts(tmp_path / "one.nemo", {peft_name: torch.from_numpy(first)})
    assert np.array_equal(read_prompts(other)[0].rows, first)
    npy, own = tmp_path / "all.npy", tmp_path / "all.safetensors"
    for output in (npy, own):
        assert prompt_table.main(["convert", str(path), str(other), f"--output={output}"]) == 0
        out, err = capsys.readouterr()
        assert err == f"wrote {output}: 3 tasks\n"
        assert [line.split() for line in out.splitlines()] == [
            ["task", "tokens", "width", "name"],
            ["0", "6", "32", "squad"],
            ["1", "3", "32", "mood"],
            ["2", "3", "32", "-"],
        ]
    table = np.load(npy)
    assert table.dtype == np.float32 and table.shape == (3, 6, 32)
    assert np.array_equal(table[0], second) and np.array_equal(table[1, :3], first) and not table[1, 3:].any()
    assert [len(each.rows) for each in read_prompts(npy)] == [6, 6, 6], "its zeros are virtual tokens, too"
    kept = read_prompts(own)
    assert [each.name for each in kept] == ["squad", "mood", None]
    assert all(np.array_equal(a.rows, b) for a, b in zip(kept, (second, first, first), strict=True))


def test_nemos_rows_are_prepended_as_embeddings(tmp_path: Path) -> None:
    model = random_model("gpt2")
    model.save_pretrained(tmp_path / "base")
    checkpoint = open_checkpoint(tmp_path / "base")
    rows = rows_of(4, 32)
    path = write_nemo_prompts(tmp_path / "x.nemo", {"prompt_table": task("a", rows)})
    table = PromptTable(find_prompts(str(path), checkpoint), checkpoint.config.vocab_size)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.from_numpy(IDX.astype(np.int64)))
        given = torch.cat([torch.from_numpy(rows)[None], embedded], dim=1)
        expected = model(inputs_embeds=given).logits[0].numpy()
    found = logits_with(decoder_with(checkpoint, "float32", table.rows), [*table.ids(0), *IDS])
    assert relative_error(found, expected) < 1e-5


# ---- programs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    random_checkpoint(folder / "model")
    width = open_checkpoint(folder / "model").config.n_embd
    prompts = [Prompt("cheerful", rows_of(3, width)), Prompt("sad", rows_of(5, width, seed=1))]
    (folder / "both.safetensors").write_bytes(prompt_table.content_of(prompts, ".safetensors"))
    (folder / "one.npy").write_bytes(prompt_table.content_of(prompts[:1], ".npy"))
    return folder


def ask(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["example.py", *map(str, arguments), "--no-engine-cache", "--seed=1"])
    code = example.main()
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_each_prompt_has_its_task(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts").write_text("The\nThe\nThe\n")
    common = [f"--model-type={tiny / 'model'}", "--max-new-tokens=12"]
    both = f"--prompt-table={tiny / 'both.safetensors'}"
    code, out, err = ask(
        monkeypatch, capsys, *common, both, f"--batch={tmp_path / 'prompts'}", "--prompt-tasks", 1, -1, 0
    )
    assert (code, err) == (0, "")
    texts = out.split(f"\n{example.SEPARATOR}\n")
    for text, more in zip(texts, ([both, "--prompt-tasks", 1], [], [both, "--prompt-tasks", 0]), strict=True):
        assert ask(monkeypatch, capsys, *common, "--input-text=The", *more)[1].removesuffix("\n") == text.removesuffix(
            "\n"
        )
    assert len(set(texts)) == 3
    alone = ask(monkeypatch, capsys, *common, "--input-text=The", f"--prompt-table={tiny / 'one.npy'}")
    assert alone[1] == texts[2].removesuffix("\n") + "\n", "of one task there is nothing to choose"
    (tmp_path / "jobs").write_text('{"prompt": "The", "prompt_task": 1}\n{"prompt": "The", "prompt_task": -1}\n')
    code, out, err = ask(monkeypatch, capsys, *common, both, "--jsonl", f"--batch={tmp_path / 'jobs'}")
    found = ["The" + json.loads(line)["choices"][0]["text"] for line in out.splitlines()]
    assert found == [text.removesuffix("\n") for text in texts[:2]]
    assert json.loads(out.splitlines()[0])["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tasks", "2"], "expected --prompt-tasks to be -1 (none) to 1 but got 2"),
        (["--prompt-tasks", "0", "1"], "expected --prompt-tasks to be one number, or 1, one a prompt, but got 2"),
        ([], "expected --prompt-tasks with 2 tasks: the number of each prompt's, or -1"),
    ],
)
def test_tasks_that_are_not_there(
    arguments: list[str], message: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f"--model-type={tiny / 'model'}", "--input-text=The", f"--prompt-table={tiny / 'both.safetensors'}"]
    assert ask(monkeypatch, capsys, *common, *arguments) == (2, "", f"example.py: error: {message}\n")


def test_tasks_without_a_table(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    common = [f"--model-type={tiny / 'model'}", "--input-text=The"]
    code, _, err = ask(monkeypatch, capsys, *common, "--prompt-tasks", 0)
    assert code == 2 and "to be -1 (none), as there is no --prompt-table, but got 0" in err
    long = "ab" * 28
    code, _, err = ask(monkeypatch, capsys, f"--model-type={tiny / 'model'}", f"--input-text={long}")
    assert code == 0
    code, _, err = ask(
        monkeypatch,
        capsys,
        f"--model-type={tiny / 'model'}",
        f"--input-text={'ab' * 32}",
        f"--prompt-table={tiny / 'one.npy'}",
    )
    assert code == 2 and "expected a prompt of at most" in err


def test_a_guess_is_never_a_virtual_token(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guesses by lookup, from the known tokens alone; the text is the same, penalties or not."""
    assert Speculation(PromptLookup()) is not None
    common = [f"--model-type={tiny / 'model'}", "--input-text=abababab", "--max-new-tokens=20", "--temperature=0"]
    table = [f"--prompt-table={tiny / 'both.safetensors'}", "--prompt-tasks", 1]
    plain = ask(monkeypatch, capsys, *common, *table)
    assert plain[0] == 0
    assert ask(monkeypatch, capsys, *common, *table, "--speculate=prompt-lookup") == plain
    assert ask(monkeypatch, capsys, *common, *table, f"--speculate={tiny / 'model'}") == plain
    assert ask(monkeypatch, capsys, *common, *table, "--num-samples=2")[1].startswith(plain[1])


def test_tasks_are_models_of_the_server(tiny: Path) -> None:
    server = Server(tiny / "model", "--prompt-tables", f"mood={tiny / 'both.safetensors'}", f"one={tiny / 'one.npy'}")
    names = [each["id"] for each in server.http.get("/v1/models").json()["data"]]
    assert names == ["model", "mood:cheerful", "mood:sad", "one"]
    asked = {"prompt": "The", "max_tokens": 12, "seed": 1, "logprobs": 1, "repetition_penalty": 1.2, "echo": False}
    answers = {}
    for name in names:
        answer = server.post("/v1/completions", model=name, **asked)
        assert answer.status_code == 200, answer.text
        answers[name] = answer.json()["choices"][0]["text"]
        assert answer.json()["usage"]["prompt_tokens"] == 3
    assert answers["one"] == answers["mood:cheerful"] and len(set(answers.values())) == 3
    refused = server.post("/v1/completions", model="one", **{**asked, "echo": True})
    assert refused.status_code == 400 and "virtual tokens have no probabilities" in refused.json()["error"]["message"]
    ids = server.post("/v1/completions", model="model", prompt=[10_000], max_tokens=1)
    assert ids.status_code == 400 and "expected token ids from 0 to" in ids.json()["error"]["message"]
    gone = server.post("/v1/unload_lora_adapter", lora_name="one")
    assert gone.status_code == 400 and "is a task's prompt" in gone.json()["error"]["message"]
    assert server.post("/v1/completions", model="mood", **asked).status_code == 404
    assert server.close() == 0


def test_names_of_the_server() -> None:
    for tables, message in [
        (["x"], "expected --prompt-tables to be NAME=PATH but got 'x'"),
        (["a=x", "a=y"], "'a' is there twice"),
    ]:
        with pytest.raises(UsageError, match=message):
            serve.parse_arguments(["--prompt-tables", *tables])


# ---- bad input -------------------------------------------------------------------------------------------------------


def refuse(path: Path, message: str, checkpoint: Any = None) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_prompts(path) if checkpoint is None else find_prompts(str(path), checkpoint)
    assert "\n" not in str(caught.value)


def test_folders_that_are_refused(base: Any, tmp_path: Path) -> None:
    folder = tmp_path / "prompt"
    tuned(random_model("gpt2"), folder)
    path, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    settings, tensors = json.loads(path.read_text()), load_file(file)
    for changes, message in [
        ({"peft_type": "PREFIX_TUNING"}, 'expected peft_type to be PROMPT_TUNING or P_TUNING but got "PREFIX_TUNING"'),
        ({"peft_type": "LORA"}, 'but got "LORA"'),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules 1"),
        ({"num_virtual_tokens": 6}, r"to be \(6, 32\), by adapter_config.json, but got \(5, 32\)"),
    ]:
        path.write_text(json.dumps({**settings, **changes}))
        refuse(folder, message)
    path.write_text(json.dumps(settings))
    rows = tensors["prompt_embeddings"]
    for changed, message in [
        ({"prompt_embeddings": rows, "more": rows}, "expected prompt_embeddings alone"),
        ({"prompt_embeddings": rows[0]}, r"to be \(tokens, width\) but got"),
        ({"prompt_embeddings": np.full_like(rows, np.inf)}, "expected finite numbers"),
        ({"prompt_embeddings": rows.astype(np.int64)}, "to be of floats"),
    ]:
        save_file(changed, file)
        refuse(folder, message)
    file.unlink()
    refuse(folder, "holds no adapter")
    with pytest.raises(AdapterError, match="it is for --prompt-table"):
        read_lora(folder, base)


def test_tables_that_do_not_fit(base: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", rows_of(2, 3, 33))
    refuse(tmp_path / "wide.npy", "expected a width of 32 but got 33", base)
    np.save(tmp_path / "long.npy", rows_of(1, base.config.n_positions, 32))
    refuse(tmp_path / "long.npy", "virtual tokens, which leave the context of", base)


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    for array, message in [
        (rows_of(3, 32), r"\(tasks, tokens, width\) but got float32 \(3, 32\)"),
        (np.ones((1, 2, 3), np.int32), "but got int32"),
        (np.full((1, 2, 3), np.nan), "expected finite numbers"),
        (np.ones((1, 0, 3)), r"but got float64 \(1, 0, 3\)"),
    ]:
        np.save(path, array)
        refuse(path, message)
    np.save(path, np.array([[["x"]]], object), allow_pickle=True)
    refuse(path, "cannot read")
    for content in (b"", b"nonsense", b"\x93NUMPY\x01\x00v\x00"):
        path.write_bytes(content)
        refuse(path, "cannot read")
    path = tmp_path / "x.safetensors"
    save_file({"squad": rows_of(2, 4)}, path)
    refuse(path, "expected tensors <number>.<task> but got squad")
    save_file({"0.a": rows_of(2, 4), "2.b": rows_of(2, 4)}, path)
    refuse(path, r"expected tasks 0 to 1 but got 0\.a, 2\.b")
    refuse(write_nemo_prompts(tmp_path / "x.nemo", {"y": torch.ones(2)}), "holds no prompts")
    refuse(write_nemo_prompts(tmp_path / "x.nemo", {"prompt_table": {"a": [1]}}), "expected only named tensors")
    (tmp_path / "x.txt").write_text("x")
    refuse(tmp_path / "x.txt", "expected prompts in a PEFT folder")


def test_the_converters_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", rows_of(1, 2, 4))
    np.save(tmp_path / "b.npy", rows_of(1, 2, 5))
    a, b = str(tmp_path / "a.npy"), str(tmp_path / "b.npy")
    for arguments, message in [
        (["show", a, "--output=x.npy"], "expected --output with convert, and not with show"),
        (["convert", a], "expected --output with convert"),
        (["convert", a, f"--output={tmp_path / 'x.txt'}"], "to end in .npy or .safetensors"),
        (["convert", a, b, f"--output={tmp_path / 'x.npy'}"], "expected prompts of one width but got 4 and 5"),
        (["convert", a, f"--output={tmp_path / 'no' / 'x.npy'}"], "cannot write"),
        (["show", str(tmp_path / "nowhere")], "expected an adapter's folder at"),
    ]:
        assert prompt_table.main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("prompt_table.py: error: ") and message in err and err.count("\n") == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.npy", "b.npy"]


def test_a_lora_beside_a_prompt(tmp_path: Path) -> None:
    """A sequence may have both."""
    base = random_model("gpt2")
    base.save_pretrained(tmp_path / "base")
    tuned(base, tmp_path / "prompt")
    model = adapted(random_model("gpt2"), tmp_path / "lora", 1, target_modules=["c_attn"], fan_in_fan_out=True)
    checkpoint = open_checkpoint(tmp_path / "base")
    lora = read_lora(tmp_path / "lora", checkpoint)
    table = PromptTable(find_prompts(str(tmp_path / "prompt"), checkpoint), checkpoint.config.vocab_size)
    decoder = open_engine(checkpoint, "float32", 1, room=AdapterRoom(1, lora.ranks, len(table.rows))).paged(8, 64)
    assert decoder is not None
    decoder.set_prompts(table.rows)
    decoder.set_adapter(1, lora.tables(lora.ranks))
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.from_numpy(IDX.astype(np.int64)))
        given = torch.cat([torch.from_numpy(table.rows)[None], embedded], dim=1)
        expected = model(inputs_embeds=given).logits[0, -1].numpy()
    found = decoder.step([Piece([*table.ids(0), *IDS], 0, decoder.pool.take(3), slot=1)])[0]
    assert relative_error(found, expected) < 1e-5
