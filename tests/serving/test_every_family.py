"""Every family, width and cache: a request among others, put aside, guessed for and cancelled beside, gets what it gets
alone, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from selection import partly_slow
from serving_bench import Bench, results
from tiny_checkpoints import random_checkpoint

from engine import Engine, compile_model, config_of, load_model
from quantization import QuantizationConfig
from serving.draft_model import DraftModel
from serving.engine import Ticket
from serving.settings import SamplingSettings
from serving.speculation import PromptLookup, Speculation
from tokenizer import Tokenizer, load_tokenizer
from weight_loader import open_checkpoint

pytest.importorskip("modelopt.torch.quantization", reason="NVIDIA ModelOpt is not installed")

from quantizing.calibration import quantize_model
from quantizing.export import export
from quantizing.torch_model import load_torch_model

PAGE = 8
CONTEXT = 48
EOS = 1
WIDE = {"hidden_size": 64, "intermediate_size": 96}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 64}),
    "multi-query": ("gpt_bigcode", {"n_embd": 64}),
    "multi-head": ("gpt_bigcode", {"n_embd": 64, "multi_query": False}),
    "starcoder2": ("starcoder2", WIDE | {"sliding_window": 11}),
    "llama": ("llama", WIDE | {"tie_word_embeddings": True}),
    "mistral": ("mistral", WIDE | {"sliding_window": 20}),
    "nemotron": ("nemotron", WIDE),
    "stablelm": ("stablelm", WIDE | {"partial_rotary_factor": 0.5}),
    "granite": ("granite", WIDE),
}
WIDTHS: dict[str, dict[str, Any]] = {
    "float16": {},
    "int8": {"mode": "int8-weight-only"},
    "int4": {"method": "rtn", "bits": 4, "group_size": 32},
}
CACHES = ("float16", "int8", "fp8")
CASES = [(family, width, cache) for family in FAMILIES for width in WIDTHS for cache in CACHES]
QUICK = [("gpt2", "int4", "int8"), ("starcoder2", "float16", "fp8"), ("llama", "int8", "float16")]
SAMPLES = np.random.default_rng(1).integers(0, 97, (8, 32))


@dataclass(frozen=True)
class Load:
    """How hard a run is.

    Attributes:
        guesser: What guesses tokens.
        pages: There are; 6 hold one whole context.
        step_tokens: Of one step.
        sequences: That run at the same time.
    """

    guesser: str | None
    pages: int
    step_tokens: int
    sequences: int


LOADS = (
    Load("lookup", pages=8, step_tokens=16, sequences=8),
    Load("draft", pages=60, step_tokens=512, sequences=64),
    Load("draft", pages=7, step_tokens=5, sequences=3),
    Load(None, pages=10, step_tokens=7, sequences=64),
)


@dataclass(frozen=True)
class Request:
    """What somebody asks, and what happens after it has come.

    Attributes:
        turns: Steps before the next request comes.
        cancels: The number of the request before that leaves then; None: nobody.
    """

    prompt: list[int]
    choices: int
    salt: bytes
    how: SamplingSettings
    turns: int
    cancels: int | None


def request(random: np.random.Generator, number: int) -> Request:
    """One of many kinds. Prompts begin alike, and some quote themselves, so that lookup finds something."""
    common = [7, 3, 9, 2] * 7
    own = random.integers(0, 97, random.integers(1, 8)).tolist()
    how = SamplingSettings(
        seed=int(random.integers(0, 3)),
        temperature=float(random.choice([0.0, 0.0, 0.7, 1.5])),
        top_k=[None, 5][random.integers(2)],
        top_p=[None, 0.9][random.integers(2)],
        repetition_penalty=float(random.choice([1.0, 1.0, 1.3])),
        frequency_penalty=float(random.choice([0.0, 0.5])),
        logit_bias=[{}, {7: 6.0, 3: 5.0}][random.integers(2)],
        max_tokens=int(random.integers(0, 14)),
        ignore_eos=bool(random.integers(2)),
        stop=[(), ("A",)][random.integers(2)],
        logprobs=[None, 0, 2][random.integers(3)],
        prompt_logprobs=[None, None, 1][random.integers(3)],
    )
    return Request(
        common[: random.integers(0, 28)] + own,
        int(random.integers(1, 4)),
        [b"", b"", b"other"][random.integers(3)],
        how,
        int(random.integers(0, 6)),
        int(random.integers(number)) if number and random.random() < 0.2 else None,
    )


@dataclass(frozen=True)
class Family:
    """A random model, and one that guesses for it: with weights of its own, though close enough to be right now and
    then."""

    folder: Path
    draft: Engine
    tokenizer: Tokenizer


class Families:
    """Those that were asked for, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Family] = {}

    def __getitem__(self, name: str) -> Family:
        if name not in self._made:
            kind, sizes = FAMILIES[name]
            folder, draft, tokenizer = (self._folder / name / part for part in ("plain", "draft", "tokenizer"))
            model = random_model(kind, n_positions=CONTEXT, **sizes) if "gpt" in kind else random_model(kind, **sizes)
            model.save_pretrained(folder)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
            model.save_pretrained(draft)
            self._made[name] = Family(folder, _engine(draft), load_tokenizer(random_checkpoint(tokenizer), 257))
        return self._made[name]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Families]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other where models are as small as these
    yield Families(tmp_path_factory.mktemp("families"))
    torch.set_num_threads(threads)


class Served:
    """A family's model in some width and cache."""

    def __init__(self, folder: Path, family: Family, width: str, cache: str) -> None:
        self.draft, self.tokenizer = family.draft, family.tokenizer
        served = family.folder
        how = WIDTHS[width] | ({} if cache == "float16" else {"kv_cache_dtype": cache})
        if how:
            config, model, served = QuantizationConfig(**how), load_torch_model(family.folder), folder / "served"
            quantize_model(model, config, SAMPLES)
            export(model, served, config)
        self.engine = _engine(served)

    def alone(self, asked: Request) -> list[tuple[Any, ...]]:
        bench = Bench(self.engine.paged(PAGE, 30), self.tokenizer, frozenset({EOS}), sharing=False)
        ticket = bench.engine.submit(asked.prompt, asked.how, asked.choices)
        bench.finish()
        return results(bench.told[ticket])

    def among_others(self, load: Load, asked: list[Request]) -> tuple[Bench, dict[int, Ticket]]:
        """What has come of those that nobody has cancelled."""
        guesser: Any = PromptLookup() if load.guesser == "lookup" else DraftModel(self.draft.paged(PAGE, 20))
        bench = Bench(
            self.engine.paged(PAGE, load.pages),
            self.tokenizer,
            frozenset({EOS}),
            max_sequences=load.sequences,
            max_tokens=load.step_tokens,
            speculation=Speculation(guesser, most=4, max_sequences=64) if load.guesser else None,
        )
        tickets: dict[int, Ticket] = {}
        for number, each in enumerate(asked):
            tickets[number] = bench.engine.submit(each.prompt, each.how, each.choices, salt=each.salt)
            for _ in range(each.turns):
                bench.turn()
            if each.cancels in tickets:
                bench.engine.cancel(tickets.pop(each.cancels))
        bench.finish()
        return bench, tickets


def _engine(folder: Path) -> Engine:
    checkpoint = open_checkpoint(folder)
    config = config_of(checkpoint, "float16")
    return Engine(compile_model(load_model(checkpoint, config), 1), config, 1)


@pytest.mark.parametrize(("family", "width", "cache"), partly_slow(CASES, QUICK))
def test_a_request_gets_what_it_gets_alone(
    tmp_path: Path, families: Families, family: str, width: str, cache: str
) -> None:
    served = Served(tmp_path, families[family], width, cache)
    random = np.random.default_rng(CASES.index((family, width, cache)))
    preempted = drafted = accepted = hit = 0
    for load in LOADS:
        asked = [request(random, number) for number in range(10)]
        bench, tickets = served.among_others(load, asked)
        assert bench.engine.pages.used == 0 and len(tickets) > 2
        for number, ticket in tickets.items():
            assert results(bench.told[ticket]) == served.alone(asked[number]), (load, asked[number])
        counters = bench.engine.counters
        preempted += bench.engine.scheduler.preemptions
        drafted, accepted = drafted + counters.drafted_tokens, accepted + counters.accepted_tokens
        hit += bench.engine.pages.hit
    assert preempted and hit, "there was too little pressure, or nothing was shared"
    assert 0 < accepted < drafted, "some guesses have to be right, and some wrong"
