"""Makes ``import nvtripy`` work where NVIDIA's compiled packages are missing.

Four things happen, all through one finder on ``sys.meta_path``:

- ``mlir_tensorrt`` resolves to :mod:`nvtripy_portable.bindings`, but only after every other finder has failed: NVIDIA's
  own package wins wherever it is installed.
- nvtripy imports ``tensorrt`` for nothing but a table of data types. Where it is missing, a stand-in with those names
  stands in ``sys.modules`` while nvtripy is being imported and not a moment longer: left behind, it breaks programs
  that probe for TensorRT (``torch._dynamo`` calls ``find_spec("tensorrt")``).
- once nvtripy is imported, its stack capture is replaced by one that remembers (:mod:`nvtripy_portable.stack_info`),
- and its tracing of plug-ins by one that asks for no library of TensorRT's (:mod:`nvtripy_portable.plugin_tracing`).

Every start of Python in the environment pays for what this module imports, so it does without importlib.abc, which
brings half of the standard library along (20 ms): its classes are not needed, only their methods. What else takes time
is imported where it is used.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys

TYPE_CHECKING = False  # typing's own costs an import of typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from types import ModuleType

_BINDINGS = os.path.join(os.path.dirname(__file__), "bindings")
_TENSORRT_DTYPES = ("float32", "float16", "fp8", "bfloat16", "int4", "int8", "int32", "int64", "bool")


def install() -> None:
    """Registers the finders. Safe to call more than once."""
    if not any(isinstance(finder, _NvtripyFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NvtripyFinder())
        sys.meta_path.append(_BindingsFinder())


class _BindingsFinder:
    """Last on the path: answers for ``mlir_tensorrt`` when nobody else did."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "mlir_tensorrt":
            import importlib.util

            return importlib.util.spec_from_file_location(
                fullname, os.path.join(_BINDINGS, "__init__.py"), submodule_search_locations=[_BINDINGS]
            )
        if fullname == "tensorrt" and _imported_by("nvtripy.frontend.ops.plugin_qdp"):
            raise ImportError(
                "quickly deployable plug-ins need NVIDIA's tensorrt package: expected `import tensorrt` to succeed, "
                "but it is not installed. The portable runtime runs plug-ins that are called with output_info, and to "
                "which nvtripy_portable.plugins.register gives a meaning.",
                name="tensorrt",
            )
        return None


class _NvtripyFinder:
    """First on the path: finds nvtripy as everybody else would, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "nvtripy":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None and not _nvidia_is_installed():
            spec.loader = _NvtripyLoader(spec.loader)  # type: ignore[assignment]  # one by its methods
        return spec


class _NvtripyLoader:
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        import importlib.util

        # A module that the program itself put there counts as well; one without a spec makes find_spec raise.
        is_missing = "tensorrt" not in sys.modules and importlib.util.find_spec("tensorrt") is None
        stand_in = _tensorrt_stand_in() if is_missing else None
        if stand_in is not None:
            sys.modules["tensorrt"] = stand_in
        try:
            self._loader.exec_module(module)
        finally:
            if stand_in is not None and sys.modules.get("tensorrt") is stand_in:
                del sys.modules["tensorrt"]
        from nvtripy_portable import plugin_tracing, stack_info

        stack_info.install()
        plugin_tracing.install()

    def __getattr__(self, name: str) -> object:
        # Resources, source text and the like: whatever the real loader offers (inspect and pkgutil ask for it).
        return getattr(self._loader, name)


def _nvidia_is_installed() -> bool:
    return importlib.machinery.PathFinder.find_spec("mlir_tensorrt") is not None


def _tensorrt_stand_in() -> ModuleType:
    module = type(sys)(
        "tensorrt", "Data type names, for the time of nvtripy's import (see nvtripy_portable.importing)."
    )
    for name in _TENSORRT_DTYPES:
        setattr(module, name, f"tensorrt.{name}")
    return module


def _imported_by(*modules: str) -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") in modules:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
