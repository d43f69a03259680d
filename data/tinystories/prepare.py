"""TinyStories (Eldan and Li 2023, arXiv:2305.07759) in characters: short stories in the words of small children.

    python data/tinystories/prepare.py [--input FILE]

The first STORIES of them come from the Hugging Face Hub, through the package `datasets`. A file has <|endoftext|>
between its stories, as the authors' own files do.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where training/ lies

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

from tqdm import tqdm

from training.corpus import END_OF_TEXT, Corpus, UsageError, main

REPOSITORY = "roneneldan/TinyStories"
STORIES = 100_000  # of two million: 90 million characters, more than a small model can learn from in a day on a CPU


def fetch() -> str:
    """Return the stories, END_OF_TEXT between them."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UsageError(
            f"{REPOSITORY} needs the package datasets: pip install datasets, or give a text with --input FILE"
        ) from None
    try:
        rows = load_dataset(REPOSITORY, split="train", streaming=True).take(STORIES)
        return END_OF_TEXT.join(row["text"] for row in tqdm(rows, total=STORIES, unit=" stories", leave=False))
    except Exception as error:  # whatever the network provokes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"cannot get {REPOSITORY} from the hub ({reason}); give a text with --input FILE") from None


CORPUS = Corpus(
    folder=Path(__file__).resolve().parent,
    description="Make an alphabet and token files from TinyStories.",
    tokenizer="char",
    fetch=fetch,
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
