"""A process of which the start and the memory are measured: loads a model, generates, ends.

It reads from standard input what to do, as JSON, and writes a line when the first token is there, and another one with
its peak memory in bytes. It imports nothing that the engine does not need.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the programs at the root

from peers import PEERS
from peers.task import Task

from machine import peak_memory_bytes


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    asked = json.load(sys.stdin)
    engines = asked["engines"] and Path(asked["engines"])
    prompts = [asked["prompt"]]
    engine = PEERS[asked["name"]].make(Task(Path(asked["model"]), asked["variant"], asked["threads"], engines))
    engine.generate(prompts, 1)
    print("first token", file=answers, flush=True)
    engine.generate(prompts, asked["new"])
    print(peak_memory_bytes(), file=answers, flush=True)


if __name__ == "__main__":
    main()
