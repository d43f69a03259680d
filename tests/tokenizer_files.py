"""Small tokenizers of each kind that GPT-2's relatives come with, trained by Hugging Face's own trainer."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizer_texts import CORPUS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

#: Llama 3's, as its tokenizer.json has it.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "\u2581"


@cache
def _starcoder() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    _train(tokenizer, ["<|endoftext|>", "<fim_prefix>", "<fim_suffix>"], 400)
    return tokenizer.to_str()


@cache
def _llama3() -> str:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, [], 380)
    # Tokens that no merge makes, which only a word as a whole can be.
    raw = json.loads(tokenizer.to_str())
    for word in ("\u0120zzyzx", "Quux"):
        raw["model"]["vocab"][word] = len(raw["model"]["vocab"])
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.add_special_tokens(
        ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_{n}|>" for n in range(5)), "<|eot_id|>"]
    )
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                special_tokens=[("<|begin_of_text|>", begin)],
            ),
        ]
    )
    return tokenizer.to_str()


@cache
def _llama2() -> str:
    """Like that of Llama 2 and TinyLlama: SentencePiece's vocabulary, with a token for each byte."""
    learned = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    learned.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    _train(learned, ["<unk>"], 330, [])
    model = json.loads(learned.to_str())["model"]
    words = [word for word in model["vocab"] if word != "<unk>"]
    listed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {word: id for id, word in enumerate(listed)}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer.to_str()


@cache
def _unigram() -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


KINDS = {"starcoder": _starcoder, "llama3": _llama3, "llama2": _llama2, "unigram": _unigram}


def made(kind: str) -> Tokenizer:
    """A tokenizer of that kind: the same each time."""
    return Tokenizer.from_str(KINDS[kind]())


def write_folder(
    folder: Path, tokenizer: Tokenizer, model_type: str | None = None, settings: dict[str, Any] | None = None
) -> Path:
    """A folder with a tokenizer.json, and where they are given config.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _train(tokenizer: Tokenizer, special: list[str], size: int, alphabet: list[str] | None = None) -> None:
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
