"""summarize.py: what transformers says, scores, long articles, and all kinds of bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import EOS, random_checkpoint, reciting_checkpoint

import summarize
from command_line import EMBEDDED_CHECKPOINT, UsageError
from summarizing.articles import SUFFIX, Article, prompt_of, read_articles
from summarizing.peer import Peer
from tokenizer import load_tokenizer
from weight_loader import open_checkpoint

pytest.importorskip("rouge_score", reason="rouge_score is not installed (requirements/summarize.txt)")

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests" / "summaries.jsonl"

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch's threads wait for each other longer than they compute, where others use the cores, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs main() in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["summarize.py", *map(str, arguments)])
        code = summarize.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model of random bytes, with a context of 64 of them."""
    folder = tmp_path_factory.mktemp("model")
    return [
        f"--model-type={random_checkpoint(folder / 'checkpoint')}",
        f"--engine-dir={folder / 'engines'}",
        "--max-new-tokens=20",
        "--dtype=float32",
    ]


def rows(table: str) -> list[tuple[str, int, list[float]]]:
    """Of each row the program, the beam, and the numbers."""
    found = []
    for line in table.splitlines()[1:]:
        name, beam, *numbers = line.split()
        found.append((name, int(beam), [float(each) for each in numbers]))
    return found


@pytest.mark.parametrize("beams", [1, 3])
def test_the_summaries_are_those_of_transformers(beams: int, tmp_path: Path) -> None:
    """Token by token, in float32, on the embedded checkpoint; and so is their ROUGE."""
    options = summarize.parse_arguments(
        [f"--num-beams={beams}", "--dtype=float32", "--max-new-tokens=20", "--batch-size=3", "--no-engine-cache"]
    )
    checkpoint = open_checkpoint(EMBEDDED_CHECKPOINT)
    tokenizer = load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size)
    prompts = summarize.prompts_of(read_articles(CORPUS, 4), checkpoint, options)
    ours, _, tokens = summarize.summaries_of(prompts, checkpoint, tokenizer, options)
    peer = Peer(EMBEDDED_CHECKPOINT, "float32")
    theirs, _, their_tokens = summarize.peer_summaries_of(prompts, checkpoint, tokenizer, peer, options)
    assert ours == theirs and all(len(each) == beams for each in ours) and tokens == their_tokens


def test_rouge_beside_transformers(ask: Ask) -> None:
    """The whole corpus, in the type that is served: a rounding may choose another word here and there."""
    code, out, _ = ask(f"--data={CORPUS}", "--max-new-tokens=12", "--test-hf", "--dtype=float32", "--no-engine-cache")
    (name, _, ours), (other, _, theirs) = rows(out)
    assert (code, name, other) == (0, "summarize.py", "transformers")
    assert ours[:4] == pytest.approx(theirs[:4], abs=0.5) and ours[0] > 0


def test_a_summary_that_is_right_has_all_points(ask: Ask, tmp_path: Path) -> None:
    """It ends where the model ends it, and what ends it is no part of it."""
    article = "an article"
    text = (article + SUFFIX).encode() + b" The cat sat on the mat."
    checkpoint = reciting_checkpoint(tmp_path / "checkpoint", [[byte] for byte in text] + [[EOS]])
    (tmp_path / "data").write_text(json.dumps({"article": article, "highlights": "The cat sat on the mat."}))
    options = [f"--model-type={checkpoint}", "--no-engine-cache", "--max-new-tokens=40", f"--data={tmp_path / 'data'}"]
    code, out, _ = ask(*options, f"--output={tmp_path / 'out'}", "--test-hf", "--rouge1-threshold=100")
    assert code == 0
    for _, _, numbers in rows(out):
        assert numbers[:4] == [100.0] * 4
    (line,) = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert line["summaries"] == [" The cat sat on the mat."] and line["scores"][0]["rouge1"] == 100
    assert line["prompt_tokens"] == len(article + SUFFIX)


def test_each_beam_has_a_row(ask: Ask, tiny: list[str], tmp_path: Path) -> None:
    code, out, err = ask(*tiny, f"--data={CORPUS}", "--max-articles=3", "--num-beams=3", f"--output={tmp_path / 'out'}")
    assert code == 0 and not re.search("error|Traceback", err)
    assert [(name, beam, len(numbers)) for name, beam, numbers in rows(out)] == [
        ("summarize.py", 0, 6),
        ("summarize.py", 1, 4),
        ("summarize.py", 2, 4),
    ]
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2] and all(len(line["summaries"]) == 3 for line in lines)
    assert all(line["prompt_tokens"] == 44 for line in lines)  # of the context of 64


def test_the_batch_changes_nothing(ask: Ask, tiny: list[str], tmp_path: Path) -> None:
    found = []
    for size in (1, 5):
        path = tmp_path / str(size)
        assert ask(*tiny, f"--data={CORPUS}", f"--batch-size={size}", "--num-beams=2", f"--output={path}")[0] == 0
        found.append(path.read_text())
    assert found[0] == found[1]


@pytest.mark.parametrize("most", [8, 9, 40, 300])
def test_a_long_article_keeps_its_suffix(most: int) -> None:
    """Its end is left out, in tokens as they are in front of the suffix, and in whole characters."""
    checkpoint = open_checkpoint(EMBEDDED_CHECKPOINT)
    tokenizer = load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size)
    suffix = len(tokenizer.encode("a" + SUFFIX)) - 1
    text = "\n".join(["It has n't rained since Tuesday, they say; Zoë and 東京 wait for it.  "] * 40)
    ids = prompt_of(Article(text, "x", "line 1"), tokenizer, suffix + most)
    told = tokenizer.decode(ids)
    assert len(ids) <= suffix + most and told.endswith(SUFFIX) and "\ufffd" not in told
    assert text.replace(" n't", "n't").startswith(told.removesuffix(SUFFIX)) and len(ids) >= suffix + most - 4
    short = prompt_of(Article("  It is n't.  ", "x", "line 1"), tokenizer, suffix + 99)
    assert tokenizer.decode(short) == "It isn't." + SUFFIX


def test_the_threshold_is_an_exit_code(ask: Ask, tiny: list[str]) -> None:
    code, out, err = ask(*tiny, f"--data={CORPUS}", "--max-articles=2", "--rouge1-threshold=99.5")
    assert code == 1 and "below the threshold of 99.5" in err and "summarize.py" in out
    code, _, _ = ask(*tiny, f"--data={CORPUS}", "--max-articles=2", "--rouge1-threshold=0")
    assert code == 0


BAD_LINES: dict[str, tuple[str, str]] = {
    "empty file": ("", "expected an article on each line of"),
    "no JSON": ("{", "expected a JSON object on line 2 of"),
    "no object": ("[1]", "expected a JSON object with an article and highlights on line 2 of"),
    "no highlights": ('{"article": "a"}', "expected highlights to be a text on line 2 of {} but it is not there"),
    "a number": ('{"article": 3, "highlights": "b"}', "expected article to be a text on line 2 of {} but got 3"),
    "empty article": ('{"article": " ", "highlights": "b"}', "expected article to be a text on line 2 of {} but it is"),
    "empty line": ("\n", "expected a JSON object on line 2 of"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_articles_that_are_none(ask: Ask, tiny: list[str], tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data"
    path.write_text(f'{{"article": "a", "highlights": "b"}}\n{line}' if line else "")
    code, out, err = ask(*tiny, f"--data={path}")
    assert (code, out, err.count("\n")) == (2, "", 1) and message.format(path) in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-articles=0"], "--max-articles to be at least 1"),
        (["--max-new-tokens=64"], "--max-new-tokens to be less than the model's context of 64 but got 64"),
        (["--max-new-tokens=60"], "expected room for more than 4 tokens"),
        (["--max-input-tokens=3"], "expected room for more than 3 tokens"),
        (["--num-beams=99"], "--num-beams to be at least 1 and at most 64"),
        (["--length-penalty=2"], "expected --num-beams with --length-penalty"),
        (["--rouge1-threshold=101"], "--rouge1-threshold to be 0 to 100 but got 101"),
        (["--rouge1-threshold=nan"], "--rouge1-threshold to be 0 to 100 but got nan"),
        (["--batch-size=65"], "--batch-size to be at most 64"),
        (["--data=nowhere.jsonl"], "cannot read nowhere.jsonl"),
        ([f"--output={CORPUS}"], "to name a new file"),
        (["--output=nowhere/at-all"], "cannot write nowhere/at-all"),
        (["--model-type=./nowhere"], "nowhere"),
    ],
)
def test_bad_input(ask: Ask, tiny: list[str], options: list[str], message: str) -> None:
    code, out, err = ask(*tiny, f"--data={CORPUS}", *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err, err


def test_without_datasets(ask: Ask, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, err = ask(*tiny)
    assert code == 2 and "needs: pip install datasets; or name a file of articles with --data" in err


def test_the_data_set_of_the_hub(ask: Ask, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that is asked as the hub would be; and a hub that is not there."""
    asked: list[Any] = []

    class Hub:
        def take(self, count: int) -> list[dict[str, str]]:
            return [{"article": f"Number {number}.", "highlights": "A number.", "id": "x"} for number in range(count)]

        def load_dataset(self, *arguments: Any, **more: Any) -> Hub:
            asked.append((*arguments, more))
            return self

    monkeypatch.setitem(sys.modules, "datasets", Hub())  # type: ignore[arg-type]
    assert len(read_articles(None, 3)) == 3
    assert asked == [("abisee/cnn_dailymail", "3.0.0", {"split": "test", "streaming": True})]
    monkeypatch.setitem(sys.modules, "datasets", object())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cannot be loaded from the hub"):
        read_articles(None, 3)


def test_nothing_heavy_is_imported_where_nobody_asks(tiny: list[str]) -> None:
    script = (
        "import sys, summarize\n"
        f"sys.argv = ['summarize.py', '--data={CORPUS}', '--max-articles=1', *{tiny!r}]\n"
        "assert summarize.main() == 0\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
