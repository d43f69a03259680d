"""Shakespeare's plays in byte-pair tokens: the data of the embedded checkpoint.

python data/shakespeare_bpe/prepare.py [--input FILE] [--vocab-size N]
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where training/ lies

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

from training.corpus import Corpus, download_text, main

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CORPUS = Corpus(
    folder=Path(__file__).resolve().parent,
    description="Make a BPE tokenizer and token files from Shakespeare's plays.",
    tokenizer="bpe",
    fetch=lambda: download_text(URL),
    has_test=False,  # the embedded checkpoint's loss is that of the whole last tenth
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
