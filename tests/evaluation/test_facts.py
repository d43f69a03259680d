"""Facts are those of the evaluation, and measured once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from quantized_folders import quantized_folder
from reference_nats import reference_nats
from tiny_checkpoints import CONTEXT, VOCABULARY, random_checkpoint
from transformers import AutoModelForCausalLM

import evaluation.facts
from engine import compile_model, config_of, load_model
from evaluation.facts import facts_of
from evaluation.text import encode
from evaluation.variants import Variant
from weight_loader import open_checkpoint

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings."


def test_facts_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_checkpoint(tmp_path / "tiny")
    variant, checkpoint = Variant("tiny", "float32"), open_checkpoint(folder)
    tokens = encode(TEXT, "a text", 0, [(variant, checkpoint)])[checkpoint.path]
    executable = compile_model(load_model(checkpoint, config_of(checkpoint, "float32")), 1)
    kept = tmp_path / "kept"
    found = facts_of(variant, checkpoint, tokens, executable, kept)
    model = AutoModelForCausalLM.from_pretrained(folder)
    nats = reference_nats(model, tokens.ids, CONTEXT, CONTEXT // 2)
    assert found.name == "tiny" and found.bits == 32.0
    assert found.perplexity == pytest.approx(np.exp(nats.mean()), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats.mean() / np.log(2), rel=1e-4), "a token is a byte"
    assert found.memory_bytes is not None and found.memory_bytes >= 4 * 12 * 32 * 32 + 4 * 2 * VOCABULARY * 32

    measured = evaluation.facts.nats_of
    monkeypatch.setattr(evaluation.facts, "nats_of", lambda *_: pytest.fail("it is measured again"))
    assert facts_of(variant, checkpoint, tokens, executable, kept) == found
    assert facts_of(Variant("other name", "float32"), checkpoint, tokens, executable, kept).name == "other name"
    (file,) = kept.iterdir()
    for damage in (b"", b"{", b"[]", b'{"name": 1}', b"\xff"):
        file.write_bytes(damage)
        monkeypatch.setattr(evaluation.facts, "nats_of", measured)
        assert facts_of(variant, checkpoint, tokens, executable, kept) == found
    assert list(kept.iterdir()) == [file]
    others = encode(TEXT[1:], "a text", 0, [(variant, checkpoint)])[checkpoint.path]
    assert facts_of(variant, checkpoint, others, executable, kept).perplexity != found.perplexity
    assert len(list(kept.iterdir())) == 2


def test_facts_that_cannot_be_kept_are_there_all_the_same(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(quantized_folder(tmp_path / "int4", "int4-weight-only"))
    variant = Variant("int4")
    tokens = encode(TEXT, "a text", 0, [(variant, checkpoint)])[checkpoint.path]
    executable = compile_model(load_model(checkpoint, config_of(checkpoint, "float16")), 1)
    (tmp_path / "file").write_text("")
    found = facts_of(variant, checkpoint, tokens, executable, tmp_path / "file")
    assert found.bits is not None and 4.0 < found.bits < 4.5
    assert found.perplexity is None or found.perplexity > 0
