"""The data flows one way, and so do the imports: each part knows the parts below it, and no other.

The imports are read from the sources (those inside functions too); only the last test asks a running program.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PORTABLE = ROOT / "portable" / "nvtripy_portable"

#: The programs at the root and their parts, from top to bottom. Each may import those below it.
PROGRAMS = (
    "random_checkpoint",
    "convert_checkpoint",
    "converting.arguments",
    "converting.random_ranks",
    "converting.random_numbers",
    "converting.ranks",
    "converting.weight_only",
    "converting.rank_writer",
    "serve",
    "serving.http.server",
    "serving.http.app",
    "serving.http.openapi",
    "serving.http.completions",
    "serving.http.chat",
    "serving.http.answering",
    "serving.http.service",
    "serving.http.limits",
    "serving.http.connections",
    "serving.http.metrics",
    "serving.http.bridge",
    "serving.http.adapters",
    "serving.http.errors",
    "serving.http.schemas",
    "demo",
    "web.page",
    "web.cards",
    "web.side_by_side",
    "web.proxies",
    "summarize",
    "summarizing.peer",
    "summarizing.table",
    "summarizing.rouge",
    "summarizing.articles",
    "example",
    "generation_options",
    # Ranks of one model: what those do that follow.
    "parallelism.following",
    # Many prompts: from files of them to files of answers, on the scheduler that serves.
    "serving.results",
    "serving.searching",
    "serving.offline",
    "serving.jobs",
    "serving.opening",
    "serving.draft_model",
    "serving.slots",
    "serving.engine",
    "serving.speculation",
    "serving.scheduler",
    "serving.pages",
    "serving.sequence",
    "serving.adapters",
    "serving.beams",
    "serving.drawing",
    "serving.text",
    "serving.settings",
    "evaluate",
    "evaluation.chart",
    "evaluation.table",
    "evaluation.facts",
    "evaluation.speed",
    "evaluation.perplexity",
    "evaluation.weights",
    "evaluation.text",
    "evaluation.variants",
    "train",
    "training.building",
    "training.lora",
    "training.log",
    "training.state",
    "training.resume",
    "training.batches",
    "training.config",
    "training.corpus",
    "training.folders",
    "engine",
    "engine_cache",
    "generation",
    "response",
    "training.qat",
    "lora",
    "adapters.merging",
    "prompt_table",
    "quantization",
    "quantizing.cache",
    "quantizing.folders",
    "quantizing.export",
    "quantizing.calibration",
    "quantizing.gptq",
    "quantizing.torch_model",
    "quantizing.counterpart",
    "quantizing.text",
    "quantizing.network",
    "quantizing.arguments",
    "quantizing.quiet",
    "quantizing.settings",
    "compression",
    "tokenizer",
    "tokenizing.export",
    "tokenizing.gguf",
    "tokenizing.sentencepiece_model",
    "tokenizing.files",
    "tokenizing.meta_pickle",
    "tokenizing.gpt2",
    "tokenizing.pipelines",
    "tokenizing.byte_pairs",
    "tokenizing.characters",
    "tokenizing.description",
    "tokenizing.added_tokens",
    "adapters.folding",
    "adapters.prompts",
    "adapters.lora",
    "adapters.nemo_lora",
    "adapters.parts",
    "adapters.places",
    "adapters.download",
    "adapters.errors",
    "weight_loader",
    # Where from, container, family, numbers: a tensor goes down.
    "loading.checkpoint",
    "loading.location",
    "loading.opening",
    "loading.rank_opening",
    "loading.rank_folder",
    "loading.hub",
    "loading.endings",
    "loading.numbers",
    "loading.rank_layout",
    "parallelism.team",
    "parallelism.watch",
    "parallelism.launcher",
    "parallelism.splitting",
    "loading.modelopt_layout",
    "loading.families.gpt_next",
    "loading.families.santacoder",
    "loading.families.gpt_bigcode",
    "loading.families.gpt2",
    "loading.families.tensorrt_llm",
    "loading.families.starcoder2",
    "loading.families.nemotron",
    "loading.families.stablelm",
    "loading.families.llama",
    "loading.families.rotary",
    "loading.families.gguf_settings",
    "loading.table",
    "loading.settings",
    "parallelism.mapping",
    "loading.config",
    "loading.containers.folder",
    "loading.containers.gguf_file",
    "loading.containers.nanogpt_file",
    "loading.containers.nemo_archive",
    "loading.containers.torch_file",
    "loading.containers.safetensors_file",
    "loading.containers.tensors",
    "loading.fingerprint",
    "loading.disk",
    "loading.errors",
    "tokenizing.sources",
    "conversion",
    "model",
    "picture",
    "machine",
    "text_file",
    "output_folder",
    "whole_file",
    "command_line",
    "interrupt",
)
#: They train, with torch; the other programs import it only where it is needed.
TRAINING = (
    *("train", "training.building", "training.log", "training.state", "training.resume", "training.batches"),
    *("training.qat", "training.lora"),
)
#: What programs may use of the portable runtime.
SURFACE = {
    "nvtripy_portable.collectives",
    "nvtripy_portable.engine_file",
    "nvtripy_portable.decoder.Decoder",
    "nvtripy_portable.decoder.Piece",
    "nvtripy_portable.decoder.Rows",
    "nvtripy_portable.plugins",
    "nvtripy_portable.pages.PagePool",
    "nvtripy_portable.pages.PagesExhausted",
    "nvtripy_portable.unchanging.never_changes",
    "nvtripy_portable.sampling",
}
#: It looks into what the compiler made of the weights, where the portable runtime is the compiler.
LOOKS_INSIDE = ("evaluate", "evaluation.speed", "evaluation.weights")

#: The rooms of the portable runtime, from top to bottom. Each may import those below it and the modules of its own.
ROOMS = (
    "engine_file",
    "decoder",
    "pages",
    "sampling",
    "bindings",
    "compiler",
    "passes",
    "rewrite",
    "elements",
    "inequalities",
    "executable",
    "cpu",
    "interpreter",
    "plan",
    "verify",
    "shape_inference",
    "fused",
    "collectives",
    "plugins",
    "reference",
    "graph",
    "packing",
    "dims",
    "unchanging",
)
#: The rooms that know the compiled module.
COMPILED = {"cpu": "_native", "sampling": "_native"}
#: Outside the house: they make `import nvtripy` find it, and import none of its rooms.
DOOR = ("__init__", "__main__", "importing", "plugin_tracing", "stack_info")

#: What `mlir_tensorrt` means within the bindings.
ALIASES = {"mlir_tensorrt": "nvtripy_portable.bindings"}

#: Third-party packages on which the unquantized path of a program must not depend.
HEAVY = {"torch", "transformers", "gradio"}
#: Those that are nothing without them: demo.py imports the page once it is sure that Gradio is there, quantization.py
#: gptq.py where it quantizes.
EAGER = ("web.page", "quantizing.gptq")


@dataclass(frozen=True)
class Import:
    """``module`` is imported at ``line``; ``lazy`` inside a function, that is, only when the function is called."""

    module: str
    line: int
    lazy: bool


def imports(file: Path, package: str = "") -> list[Import]:
    """What a source file imports, as absolute names; ``from a import b`` counts as ``a.b``, which it may be.

    Imports for the type checker alone (``if TYPE_CHECKING:``) count as well: a type that is named is known.
    """
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1] + base
            found.extend(Import(".".join([*base, alias.name]), node.lineno, lazy) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(ast.parse(file.read_text()), lazy=False)
    return found


def third_party(module: str) -> bool:
    return module.split(".")[0] not in sys.stdlib_module_names


def program_file(program: str) -> Path:
    return ROOT.joinpath(*program.split(".")).with_suffix(".py")


def is_within(module: str, program: str) -> bool:
    """Whether an imported name is the program, or something in it."""
    return module == program or module.startswith(f"{program}.")


def portable_files() -> list[Path]:
    return sorted(PORTABLE.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(PORTABLE).with_suffix("").parts[0]


def package_of(file: Path) -> str:
    return ".".join(("nvtripy_portable", *file.relative_to(PORTABLE).parent.parts))


def rooms_imported(file: Path) -> dict[str, int]:
    """The rooms of the portable runtime that ``file`` imports, each with the line that does."""
    rooms = {}
    for imported in imports(file, package_of(file)):
        head, _, rest = imported.module.partition(".")
        parts = f"{ALIASES.get(head, head)}.{rest}".split(".")
        if parts[0] == "nvtripy_portable" and parts[1]:
            rooms[parts[1]] = imported.line
    return rooms


def test_the_model_is_written_in_nvtripy_alone() -> None:
    assert {i.module.split(".")[0] for i in imports(ROOT / "model.py") if third_party(i.module)} == {"nvtripy"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_import_only_what_is_below_them(program: str) -> None:
    above = PROGRAMS[: PROGRAMS.index(program)]
    for imported in imports(program_file(program)):
        wrong = [other for other in above if is_within(imported.module, other)]
        assert not wrong, f"{program}:{imported.line} imports {imported.module}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_know_nvtripy_and_not_what_is_under_it(program: str) -> None:
    for imported in imports(program_file(program)):
        parts = imported.module.split(".")
        assert parts[0] not in ("mlir_tensorrt", "tensorrt"), f"{program}:{imported.line}"
        if program not in LOOKS_INSIDE:
            assert parts[0] != "nvtripy_portable" or imported.module in SURFACE, f"{program}:{imported.line}"


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name not in (*TRAINING, *EAGER)])
def test_heavy_packages_are_not_imported_at_start(program: str) -> None:
    for imported in imports(program_file(program)):
        assert imported.lazy or imported.module.split(".")[0] not in HEAVY, f"{program}:{imported.line}"


def test_every_module_has_its_place() -> None:
    """A new file has to be put somewhere in the order above before anything else can be said about it."""
    packages = (
        "adapters",
        "converting",
        "evaluation",
        "loading",
        "parallelism",
        "quantizing",
        "serving",
        "summarizing",
        "tokenizing",
        "training",
        "web",
    )
    files = [*ROOT.glob("*.py"), *(file for package in packages for file in (ROOT / package).rglob("*.py"))]
    assert {file for file in files if file.name != "__init__.py"} == set(map(program_file, PROGRAMS))
    assert {room_of(file) for file in portable_files()} == {*ROOMS, *DOOR}


@pytest.mark.parametrize("file", portable_files(), ids=lambda file: str(file.relative_to(PORTABLE)))
def test_rooms_import_only_what_is_below_them(file: Path) -> None:
    room = room_of(file)
    allowed = DOOR if room in DOOR else ROOMS[ROOMS.index(room) :]
    for imported, line in rooms_imported(file).items():
        assert imported in (*allowed, "__version__") or imported == COMPILED.get(room), (
            f"{file.relative_to(ROOT)}:{line}: {room} knows {imported}"
        )


@pytest.mark.parametrize("file", portable_files(), ids=lambda file: str(file.relative_to(PORTABLE)))
def test_the_portable_runtime_stands_on_its_own(file: Path) -> None:
    """No programs, no nvtripy (but for the door), no heavy packages: NumPy and its data types."""
    allowed = {"nvtripy_portable", "numpy", "ml_dtypes"}
    if room_of(file) in DOOR:
        allowed = {"nvtripy_portable", "nvtripy"}
    if room_of(file) == "bindings":
        allowed |= {"mlir_tensorrt"}
    if room_of(file) in ("engine_file", "decoder"):
        allowed |= {"nvtripy"}
    for imported in imports(file, package_of(file)):
        if third_party(imported.module):
            assert imported.module.split(".")[0] in allowed, f"{file.relative_to(ROOT)}:{imported.line}"


def test_relative_imports_are_resolved(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text("from . import a\nfrom ..b import c\ndef f():\n    import d.e\n")
    assert imports(file, "nvtripy_portable.bindings") == [
        Import("nvtripy_portable.bindings.a", 1, False),
        Import("nvtripy_portable.b.c", 2, False),
        Import("d.e", 4, True),
    ]


def test_the_example_runs_without_torch_and_transformers(tmp_path: Path) -> None:
    script = (
        "import runpy, sys\n"
        "sys.argv = ['example.py', '--input-text', 'Good morrow', '--seed=1', '--max-new-tokens=2', *sys.argv[1:]]\n"
        "try:\n"
        "    runpy.run_path('example.py', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print('\\nimported:', sorted({HEAVY!r} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--engine-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported: []"
