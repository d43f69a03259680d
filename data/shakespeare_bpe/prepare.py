"""Turn a text into a BPE tokenizer and two token files for train.py.

    python data/shakespeare_bpe/prepare.py                      # downloads tinyshakespeare
    python data/shakespeare_bpe/prepare.py --input my_text.txt  # or any UTF-8 text

The last 10 % of the characters are the validation text. The tokenizer is learned from the first 90 % alone, so that the
validation loss says something about text which no part of the checkpoint has seen. Written beside this file, or to
--output-dir:

    tokenizer.json        byte-level BPE (every byte is in the alphabet: any text encodes, and decodes to itself)
    train.bin, val.bin    token ids, little-endian uint16
    meta.json             sizes; val_chars turns a loss in nats per token into one in nats per character
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
END_OF_TEXT = "<|endoftext|>"
TRAIN_SHARE = 0.9  # of the characters, from the start of the text
SMALLEST_VOCAB = 256 + 1  # the bytes and the end-of-text token


class UserError(Exception):
    """Something that the user can put right; shown as one line, without a traceback."""


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, its line ends untouched."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from None


def download_text(url: str) -> str:
    """Return the UTF-8 text at `url`."""
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            return reply.read().decode("utf-8")
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"cannot download {url} ({reason}); give a local copy with --input FILE") from None


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE of exactly `vocab_size` entries, cut into words as GPT-2 cuts them.

    The end-of-text token has id 0. Training is deterministic: the same text gives the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    learned = tokenizer.get_vocab_size()
    if learned != vocab_size:
        raise UserError(
            f"the text is too short: its BPE ends at {learned} of {vocab_size} tokens; "
            f"give a longer text or --vocab-size {learned}"
        )
    return tokenizer


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` beside `path` and rename, so that no reader ever sees half a file."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def prepare(text: str, output_dir: Path, vocab_size: int) -> dict[str, int]:
    """Write tokenizer.json, train.bin, val.bin and meta.json to `output_dir`; return what meta.json holds."""
    if not SMALLEST_VOCAB <= vocab_size <= 2**16:
        raise UserError(f"--vocab-size must be {SMALLEST_VOCAB} to {2**16}, not {vocab_size}")
    train_chars = int(len(text) * TRAIN_SHARE)
    parts = {"train": text[:train_chars], "val": text[train_chars:]}
    tokenizer = train_tokenizer(parts["train"], vocab_size)
    meta = {"vocab_size": vocab_size, "eos_token_id": tokenizer.token_to_id(END_OF_TEXT)}
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {output_dir}: {error.strerror}") from None
    for name, part in parts.items():
        ids = np.array(tokenizer.encode(part).ids, dtype="<u2")
        write_atomically(output_dir / f"{name}.bin", ids.tobytes())
        meta |= {f"{name}_chars": len(part), f"{name}_tokens": len(ids)}
    write_atomically(output_dir / "tokenizer.json", tokenizer.to_str(pretty=True).encode("utf-8"))
    write_atomically(output_dir / "meta.json", (json.dumps(meta, indent=2) + "\n").encode("utf-8"))
    return meta


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code (2: bad input, told on one line of stderr)."""
    parser = argparse.ArgumentParser(description="Make a BPE tokenizer and token files from one text.")
    parser.add_argument("--input", type=Path, help="a UTF-8 text file (default: download tinyshakespeare)")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--vocab-size", type=int, default=1024, help="entries of the tokenizer (default: 1024)")
    args = parser.parse_args(argv)
    try:
        text = read_text(args.input) if args.input else download_text(URL)
        meta = prepare(text, args.output_dir, args.vocab_size)
    except UserError as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 2
    for name in ("train", "val"):
        chars, tokens = meta[f"{name}_chars"], meta[f"{name}_tokens"]
        print(f"{name}: {chars:,} characters, {tokens:,} tokens ({chars / max(tokens, 1):.2f} characters per token)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
