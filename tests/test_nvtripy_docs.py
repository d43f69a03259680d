"""nvtripy's own documentation runs: every code example in the docstrings of the installed nvtripy is one test here.

An example runs as NVIDIA wrote it, in a namespace and a folder of its own, with the names that nvtripy's documentation
takes for granted: ``tp``, ``np``, ``torch`` and ``cp``. The last is CuPy, which exists for NVIDIA's GPUs only; NumPy
stands in for the few functions that the examples call. What does not run on this runtime is in EXCEPTIONS, with the
reason; such an example has to fail, so that one that starts to work is noticed.

The examples are read from the sources without importing nvtripy: should the import break, each fails by itself.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

DIRECTIVE = re.compile(r"^(?P<indent> *)\.\. code-block:: python *$")
OPTION = re.compile(r"^ *:[a-z-]+:.*$")

#: Examples that compare with a torch module on the device "cuda". With "cpu" in its place they have to run.
TORCH_ON_CUDA = (
    "frontend.module.conv.conv_transpose.ConvTranspose.__init__[0]",
    "frontend.module.groupnorm.GroupNorm.__init__[0]",
)

#: The examples that cannot run here, and why.
EXCEPTIONS = {
    **({} if torch.cuda.is_available() else dict.fromkeys(TORCH_ON_CUDA, "needs a torch with a CUDA device")),
}


@dataclass(frozen=True)
class Example:
    """One code block: ``name`` says where it stands, e.g. ``ops.resize.resize[1]``."""

    name: str
    code: str


def code_blocks(docstring: str) -> list[str]:
    """The bodies of a docstring's ``code-block:: python`` directives, without their options and their indentation."""
    lines = docstring.expandtabs().splitlines()
    blocks = []
    for at, line in enumerate(lines):
        if not (directive := DIRECTIVE.match(line)):
            continue
        indent = len(directive["indent"])
        body = []
        for following in lines[at + 1 :]:
            if following.strip() and len(following) - len(following.lstrip()) <= indent:
                break
            body.append(following)
        while body and OPTION.match(body[0]):
            del body[0]
        blocks.append(textwrap.dedent("\n".join(body)).strip() + "\n")
    return blocks


@functools.cache
def examples() -> tuple[Example, ...]:
    """Every example of the installed nvtripy, in the order of its files."""
    spec = importlib.util.find_spec("nvtripy")
    assert spec is not None and spec.origin is not None, "nvtripy is not installed"
    package = Path(spec.origin).parent
    found = []
    for file in sorted(package.rglob("*.py")):
        module = ".".join(file.relative_to(package).with_suffix("").parts)
        numbers: Counter[str] = Counter()  # overloads of a function share a name
        for qualname, docstring in _docstrings(ast.parse(file.read_text()), module):
            for code in code_blocks(docstring):
                found.append(Example(f"{qualname}[{numbers[qualname]}]", code))
                numbers[qualname] += 1
    return tuple(found)


def _docstrings(node: ast.AST, qualname: str) -> list[tuple[str, str]]:
    """The docstrings of a node and of all the functions and classes within, under their qualified names."""
    found = []
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (docstring := ast.get_docstring(node)):
        found.append((qualname, docstring))
    for child in ast.iter_child_nodes(node):
        inner = f"{qualname}.{child.name}" if isinstance(child, (ast.ClassDef, ast.FunctionDef)) else qualname
        found += _docstrings(child, inner)
    return found


class HostArray(np.ndarray):
    """What ``cp`` gives: an array that can be fetched from the device on which it already is."""

    def get(self) -> np.ndarray:
        return self.view(np.ndarray)


CUPY = SimpleNamespace(
    from_dlpack=lambda tensor: np.from_dlpack(tensor).view(HostArray),
    array=lambda values: np.array(values).view(HostArray),
    array_equal=np.array_equal,
    cumsum=np.cumsum,
    repeat=np.repeat,
)


def _run(code: str, folder: Path) -> None:
    """Runs an example from a file in ``folder``: nvtripy's messages quote the user's source."""
    import nvtripy as tp

    file = folder / "example.py"
    file.write_text(code)
    namespace: dict[str, Any] = {"__name__": "__main__", "tp": tp, "np": np, "cp": CUPY, "torch": torch}
    exec(compile(code, str(file), "exec"), namespace)


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_example(
    example: Example, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if example.name in EXCEPTIONS:
        request.applymarker(pytest.mark.xfail(strict=True, reason=EXCEPTIONS[example.name]))
    monkeypatch.chdir(tmp_path)
    _run(example.code, tmp_path)


@pytest.mark.parametrize("name", TORCH_ON_CUDA)
def test_example_with_torch_on_the_cpu(name: str, tmp_path: Path) -> None:
    (code,) = (example.code for example in examples() if example.name == name)
    assert 'torch.device("cuda")' in code
    _run(code.replace('torch.device("cuda")', 'torch.device("cpu")'), tmp_path)


def test_97_percent_of_the_examples_run() -> None:
    # An exception has to fail and everything else has to pass, so the exceptions are the examples that do not run.
    names = [example.name for example in examples()]
    assert len(set(names)) == len(names) >= 184
    assert set(EXCEPTIONS) <= set(names)
    assert len(EXCEPTIONS) <= 0.03 * len(names)


def test_every_public_name_is_covered() -> None:
    """No example was missed in the documentation that nvtripy's registry of public names holds at run time."""
    from nvtripy.export import PUBLIC_APIS

    # Compared without white space: nvtripy edits docstrings on import, and Python 3.13 takes their indentation away.
    collected = tuple(_squeeze(example.code) for example in examples())
    assert len(PUBLIC_APIS) > 100
    for api in PUBLIC_APIS:
        for block in (api.obj.__doc__ or "").split(".. code-block:: python\n")[1:]:
            code = re.sub(r"\A( *:[a-z-]+:.*\n)*", "", block)
            assert _squeeze(code).startswith(collected), (
                f"{api.qualname} has an example that was not collected:\n{code}"
            )


def _squeeze(code: str) -> str:
    return "".join(code.split())
