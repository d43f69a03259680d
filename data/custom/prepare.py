"""Your own text, in characters or in byte-pair tokens.

python data/custom/prepare.py --input FILE [--tokenizer char|bpe] [--vocab-size N] [--output-dir DIR]
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where training/ lies

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

from training.corpus import Corpus, main

CORPUS = Corpus(
    folder=Path(__file__).resolve().parent, description="Make a tokenizer and token files from a text of your own."
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
