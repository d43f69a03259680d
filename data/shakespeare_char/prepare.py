"""Shakespeare's plays in characters, split as nanoGPT's shakespeare_char is, so that losses compare.

    python data/shakespeare_char/prepare.py [--input FILE]

The two halves of the last tenth are so unlike each other (the embedded checkpoint's loss is 1.41 nats per character on
the first, 1.58 on the second, 1.50 on both) that a validation loss on one of them would say nothing beside published
ones. That is why val.bin is the whole tenth, and there is no third part.
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
    description="Make an alphabet and token files from Shakespeare's plays.",
    tokenizer="char",
    fetch=lambda: download_text(URL),
    has_test=False,
)

if __name__ == "__main__":
    sys.exit(main(CORPUS))
