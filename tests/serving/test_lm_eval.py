"""lm-eval's `local-completions` on tasks of our own: the log-likelihoods are those of transformers' model of the same
weights."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_model
from served import Server
from tiny_checkpoints import EOS, VOCABULARY, random_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="lm-eval is not installed: pip install -r requirements/lm-eval-test.txt",
    ),
]

CONTEXT = 64
CHOICES = [
    {"question": "To be, or not to be, that is", "choices": ["the question", "nothing", "a way"], "answer": 0},
    {"question": "Wo Licht ist, ist", "choices": ["Schatten", "Wärme", "¿por qué?"], "answer": 0},
    {"question": "two and two", "choices": [" is four", " is five"], "answer": 1},
    {"question": "x" * 55, "choices": ["longer than fits", "short"], "answer": 0},
]
TEXTS = ["a", "Shorter than a context.", "Whether 'tis nobler in the mind to suffer " * 7, "é" * 31 + "→ and more"]
TASKS = {
    "local_choice": """
task: local_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "local_text": """
task: local_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
}


class Direct:
    """transformers' model of the weights that are served, in float32."""

    def __init__(self, folder: Path) -> None:
        model = random_model("gpt2", vocab_size=VOCABULARY, n_positions=CONTEXT, bos_token_id=EOS, eos_token_id=EOS)
        model.save_pretrained(folder)
        self._model = model

    def likelihood(self, context: list[int], continuation: list[int]) -> float:
        ids = torch.tensor([[*context, *continuation]])
        with torch.no_grad():
            logprobs = torch.log_softmax(self._model(ids).logits[0].double(), -1)
        places = range(len(context), ids.shape[1])
        return sum(float(logprobs[place - 1, ids[0, place]]) for place in places)

    def of_choice(self, question: str, choice: str) -> float:
        """Of what comes after a space. lm-eval leaves room for one more token, and drops the beginning of the rest."""
        context, continuation = list(question.encode()), list(f" {choice}".encode())
        return self.likelihood(context[len(continuation) - (CONTEXT - 1) :], continuation)

    def of_text(self, text: str) -> float:
        """In windows: the first behind the end of a text, each other behind the last token of the one before; the last,
        which may be shorter, behind as many as make it as long as the others."""
        tokens, window, total = list(text.encode()), CONTEXT - 2, 0.0
        for start in range(0, len(tokens), window):
            end = min(start + window, len(tokens))
            total += self.likelihood(tokens[end - window - 1 : start] if start else [EOS], tokens[start:end])
        return total


def task_folder(folder: Path) -> Path:
    folder.mkdir()
    for name, rows in (("local_choice", CHOICES), ("local_text", [{"text": text} for text in TEXTS])):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(TASKS[name] + source)
    return folder


def samples(folder: Path, task: str) -> list[Any]:
    """What lm-eval has got for each document, in their order."""
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]


@pytest.mark.parametrize("tokenizer", ["remote", "huggingface"])
def test_likelihoods(tmp_path: Path, tokenizer: str) -> None:
    """With the server's tokenizer, which lm-eval finds by itself, or the checkpoint's."""
    checkpoint = random_checkpoint(tmp_path / "tiny")
    direct = Direct(checkpoint)
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(special))
    server = Server(checkpoint, "--dtype=float32")
    arguments = f"base_url={server.url}/v1/completions,model=tiny,max_length={CONTEXT},tokenized_requests=True"
    if tokenizer == "huggingface":
        arguments += f",tokenizer_backend=huggingface,tokenizer={checkpoint}"
    tasks, output = task_folder(tmp_path / "tasks"), tmp_path / "output"
    command = [sys.executable, "-m", "lm_eval", "--model=local-completions", f"--model_args={arguments}"]
    command += [f"--tasks={','.join(TASKS)}", f"--include_path={tasks}", f"--output_path={output}", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
    found = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **offline, "no_proxy": "*"}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
    for row, asked in zip(samples(output, "local_choice"), CHOICES, strict=True):
        expected = [direct.of_choice(str(asked["question"]), choice) for choice in asked["choices"]]  # type: ignore[attr-defined]
        assert [float(each[0][0]) for each in row] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for row, text in zip(samples(output, "local_text"), TEXTS, strict=True):
        value = row[0][0]
        value = value[0] if isinstance(value, list) else value
        assert float(value) == pytest.approx(direct.of_text(text), rel=1e-4, abs=1e-4)
    assert server.close() == 0
