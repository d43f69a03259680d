"""``python -m nvtripy_portable SCRIPT [ARGUMENTS]`` runs a program that imports nvtripy, as ``python SCRIPT`` would."""

from __future__ import annotations

import os
import runpy
import sys


def main() -> int:
    if len(sys.argv) < 2:
        print("usage: python -m nvtripy_portable SCRIPT [ARGUMENTS]", file=sys.stderr)
        return 2
    script = sys.argv[1]
    if not os.path.isfile(script):
        print(f"nvtripy_portable: error: expected a Python script but there is no file {script}", file=sys.stderr)
        return 2
    # As `python SCRIPT` sets them: its own arguments, and its folder in place of the working directory.
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
