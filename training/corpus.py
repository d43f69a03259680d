"""A text → the files that train.py reads. The programs data/*/prepare.py say which text; this module does the rest.

    tokenizer.json                  an alphabet (one character, one token) or a byte-level BPE, in HuggingFace's format
    train.bin, val.bin, test.bin    token ids, little-endian uint16
    meta.json                       sizes; the parts' characters turn a loss in nats per token into one per character

A text may hold <|endoftext|> between its documents; it becomes one token, at which example.py ends its answer.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

import command_line
from command_line import Parser, UsageError
from text_file import decode_text, read_text
from tokenizer import GPT2_VOCAB_SIZE, Tokenizer, UnknownCharacterError, build, describe
from tokenizing.description import END_OF_TEXT, Description, from_json, to_json, write_json
from tokenizing.files import has_files
from training.folders import written_together
from weight_loader import CheckpointError, find_tokenizer, read_json

TOKENIZERS = ("char", "bpe")
DEFAULT_BPE_VOCAB = 1024
SMALLEST_BPE_VOCAB = 256 + 1  # the bytes and the end-of-text token
LARGEST_VOCAB = 2**16  # ids are stored as uint16
LARGEST_ID = 2**31  # that a tokenizer's files may name
TRAIN_SHARE = 0.9  # of the characters, from the start of the text


@dataclass(frozen=True)
class Corpus:
    """What a prepare.py knows about its text.

    Attributes:
        folder: where the files go, unless --output-dir says otherwise.
        description: for --help.
        tokenizer: "char" or "bpe"; None leaves the choice to --tokenizer.
        fetch: gets the text where there is no --input; None: there has to be one.
        clean: takes away what is not the text, such as a licence; also from --input.
        has_test: whether the last tenth is split into val and test. The published figures of some corpora measure on
            all of it, and such a corpus has no third part: its test.bin is its val.bin.
    """

    folder: Path
    description: str
    tokenizer: str | None = None
    fetch: Callable[[], str] | None = None
    clean: Callable[[str], str] = str
    has_test: bool = True


def main(corpus: Corpus, argv: list[str] | None = None) -> int:
    """Run a prepare.py's command line; return its exit code (2: bad input, told on one line of stderr)."""
    return command_line.main("prepare.py", lambda: _run(corpus, argv))


def _run(corpus: Corpus, argv: list[str] | None) -> None:
    parser = Parser("prepare.py", corpus.description)
    source = "a UTF-8 text file" if corpus.fetch is None else "a UTF-8 text file, instead of the download"
    parser.add_argument("--input", metavar="FILE", type=command_line.path, required=corpus.fetch is None, help=source)
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        type=command_line.path,
        default=corpus.folder,
        help="where the files go (default: %(default)s)",
    )
    if corpus.tokenizer is None:
        parser.add_argument(
            "--tokenizer",
            metavar="char|bpe|NAME",
            default="char",
            help="one token for each character of the text; a byte-level BPE learned from it; or the tokenizer of a "
            "checkpoint to be finetuned, a folder or a hub name such as gpt2 (default: %(default)s)",
        )
    if corpus.tokenizer != "char":
        parser.add_argument(
            "--vocab-size", metavar="N", type=int, help=f"entries of the BPE (default: {DEFAULT_BPE_VOCAB})"
        )
    options = parser.parse_args(argv)
    kind = corpus.tokenizer or options.tokenizer
    vocab_size = getattr(options, "vocab_size", None)
    if kind != "bpe" and vocab_size is not None:
        raise UsageError("--vocab-size is for --tokenizer bpe; others are as large as they are")
    text = read_text(options.input) if options.input or corpus.fetch is None else corpus.fetch()
    meta = prepare(
        corpus.clean(text),
        options.output_dir,
        kind,
        DEFAULT_BPE_VOCAB if vocab_size is None else vocab_size,
        corpus.has_test,
    )
    print(f"{options.output_dir}: a vocabulary of {meta['vocab_size']:,}")
    for name in ("train", "val", "test"):
        print(f"{name}: {meta[f'{name}_chars']:,} characters, {meta[f'{name}_tokens']:,} tokens")


# ---- the text --------------------------------------------------------------------------------------------------------


def download_text(url: str) -> str:
    """Return the UTF-8 text at `url`, as if it were a file; shows progress."""
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            total = int(reply.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1], leave=False) as progress:
                content = bytearray()
                while block := reply.read(1 << 16):
                    content += block
                    progress.update(len(block))
        return decode_text(bytes(content), url)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        raise UsageError(f"cannot download {url} ({reason}); give a local copy with --input FILE") from None


def split_text(text: str, has_test: bool) -> dict[str, str]:
    """Cut a text into its parts: the first 90 % of the characters to train on, and the rest, or half of it each.

    Raises:
        UsageError: a part would be empty.
    """

    def after_mark(place: int) -> int:
        """`place`, or the end of the END_OF_TEXT in whose midst it is."""
        begin = text.find(END_OF_TEXT, max(0, place - len(END_OF_TEXT) + 1), place + len(END_OF_TEXT) - 1)
        return place if begin == -1 else max(place, begin + len(END_OF_TEXT))

    cut = after_mark(int(len(text) * TRAIN_SHARE))
    middle = after_mark((cut + len(text)) // 2) if has_test else len(text)
    parts = {"train": text[:cut], "val": text[cut:middle], "test": text[middle:] if has_test else text[cut:]}
    if not all(parts.values()):
        raise UsageError(f"the text is too short: {len(text)} characters cannot be split into train, val and test")
    return parts


# ---- the tokenizers --------------------------------------------------------------------------------------------------


def alphabet_tokenizer(text: str) -> tokenizers.Tokenizer:
    """Return the tokenizer whose tokens are the characters of `text`, in the order of their code points.

    Where the text has END_OF_TEXT, that is a token too, the last. Text outside of the alphabet raises an error.
    """
    is_divided = END_OF_TEXT in text
    characters = sorted(set(text.replace(END_OF_TEXT, "")))
    vocabulary = {character: number for number, character in enumerate(characters)}
    # A token that stands for unknown characters is not in the vocabulary, and so there are none.
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if is_divided:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def learn_bpe(text: str, vocab_size: int) -> tokenizers.Tokenizer:
    """Learn a byte-level BPE of exactly `vocab_size` entries, cut into words as GPT-2 cuts them.

    The end-of-text token has id 0. Learning is deterministic: the same text gives the same tokenizer. Every byte is in
    the vocabulary: any text encodes, and decodes to itself.

    Raises:
        UsageError: the text has too few different words for so many entries.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(END_OF_TEXT), trainer)
    learned = tokenizer.get_vocab_size()
    if learned != vocab_size:
        raise UsageError(
            f"the text is too short: its BPE ends at {learned} of {vocab_size} tokens; "
            f"give a longer text or --vocab-size {learned}"
        )
    return tokenizer


def existing_tokenizer(name: str) -> Description:
    """Open the tokenizer of a checkpoint, a folder or a name at the Hugging Face Hub, as example.py does.

    Raises:
        UsageError: there is none, or it is one that example.py refuses.
    """
    try:
        folder = find_tokenizer(name)
        if not (folder / "config.json").is_file():  # a tokenizer without a model: all of its ids will do
            return describe(folder, LARGEST_ID if has_files(folder) else 0)
        vocab_size = read_json(folder / "config.json").get("vocab_size", GPT2_VOCAB_SIZE)
        if type(vocab_size) is not int:
            raise CheckpointError(f"{folder / 'config.json'}: expected vocab_size to be an integer")
        return describe(folder, vocab_size)
    except CheckpointError as error:
        raise UsageError(f"--tokenizer is char, bpe or a checkpoint, but {name} cannot be used: {error}") from None


def encode(tokenizer: Tokenizer, text: str, name: str) -> np.ndarray:
    """Return the token ids, uint16, document by document; shows progress where there are many.

    Raises:
        UsageError: the text has a character that the alphabet of a checkpoint lacks.
    """
    parts = tqdm(tokenizer.encode_in_parts(text), desc=f"{name}.bin", unit=" parts", disable=END_OF_TEXT not in text)
    try:
        return np.concatenate([np.array(ids, dtype="<u2") for ids in parts])
    except UnknownCharacterError as error:
        raise UsageError(str(error)) from None


# ---- the files -------------------------------------------------------------------------------------------------------


def prepare(text: str, output_dir: Path, kind: str, vocab_size: int = 0, has_test: bool = True) -> dict[str, int]:
    """Write the files to `output_dir`; return what meta.json holds.

    A BPE is learned from the part to train on alone, so that a loss on the other parts says something about text which
    nothing in the checkpoint has seen. An alphabet is that of the whole text: with fewer characters the other parts
    could not be encoded.
    """
    if kind == "bpe" and not SMALLEST_BPE_VOCAB <= vocab_size <= LARGEST_VOCAB:
        raise UsageError(f"--vocab-size must be {SMALLEST_BPE_VOCAB} to {LARGEST_VOCAB}, not {vocab_size}")
    parts = split_text(text, has_test)
    if kind in TOKENIZERS:
        made = learn_bpe(parts["train"], vocab_size) if kind == "bpe" else alphabet_tokenizer(text)
        description = from_json(output_dir / "tokenizer.json", json.loads(made.to_str()))
    else:
        description = existing_tokenizer(kind)
    meta = {"vocab_size": description.vocab_size}
    if meta["vocab_size"] > LARGEST_VOCAB:
        raise UsageError(
            f"the vocabulary has ids up to {meta['vocab_size'] - 1:,}, but files of 16 bits hold those up to "
            f"{LARGEST_VOCAB - 1:,}"
        )
    try:
        tokenizer = build(description, meta["vocab_size"])
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    # Before anything is written: an alphabet may lack a character.
    encoded = {name: encode(tokenizer, part, name) for name, part in parts.items()}
    with written_together(output_dir, last=".json") as partial:
        for name, ids in encoded.items():
            (partial / f"{name}.bin").write_bytes(ids.tobytes())
            meta |= {f"{name}_chars": len(parts[name]), f"{name}_tokens": len(ids)}
        (partial / "tokenizer.json").write_text(write_json(to_json(description), indent=2), encoding="utf-8")
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return meta
