"""L. Frank Baum's The Wonderful Wizard of Oz in characters, from Project Gutenberg.

python data/wizard_of_oz_char/prepare.py [--input FILE]
"""

import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where training/ lies

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

from training.corpus import Corpus, download_text, main

URL = "https://www.gutenberg.org/cache/epub/55/pg55.txt"


def strip_licence(text: str) -> str:
    """Return the book without what Project Gutenberg puts around it, with line ends as on Unix."""
    text = text.replace("\r\n", "\n")
    begin = re.search(r"^\*\*\* ?START OF TH.*\n+", text, re.MULTILINE)
    end = re.search(r"^\*\*\* ?END OF TH", text, re.MULTILINE)
    return text[begin.end() if begin else 0 : end.start() if end else len(text)]


CORPUS = Corpus(
    folder=Path(__file__).resolve().parent,
    description="Make an alphabet and token files from The Wonderful Wizard of Oz.",
    tokenizer="char",
    fetch=lambda: download_text(URL),
    clean=strip_licence,
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
