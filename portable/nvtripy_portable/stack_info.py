"""nvtripy's stack capture, remembered per line of code.

nvtripy records the Python stack for every tensor it creates, so that errors can point at the user's line. On Python
3.11+ its ``get_stack_info`` walks ``co_positions()`` of every frame's code object each time, about 2 ms a tensor: 0.8 s
of tracing for each transformer layer. The column range depends on the code object and the line alone, so here it is
computed once for each. When it compiles, nvtripy formats each of these stacks again, and parses every line of code in
them: a frame's text, too, is computed once. nvtripy's internals are replaced here and in
:mod:`nvtripy_portable.plugin_tracing` alone; the records and texts that come out are equal to the original's.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable
from types import CodeType

from nvtripy_portable import plugin_tracing

_MAX_STACK_DEPTH = 100  # nvtripy's own limit

# Keyed by the code object itself, which the dict keeps alive: an id could be reused.
_column_ranges: dict[tuple[CodeType, int], tuple[int, int] | None] = {}


_frame_texts: dict[Hashable, str] = {}


def install() -> None:
    """Replaces ``get_stack_info`` and ``str_from_source_info`` wherever nvtripy holds them."""
    from nvtripy.common import exception
    from nvtripy.frontend.module import parameter
    from nvtripy.utils import function_registry, stack_info

    registry_module = function_registry.__name__

    def get_stack_info(include_code_index: int | None = None) -> stack_info.StackInfo:
        records = stack_info.StackInfo([], include_code_index)
        frame = sys._getframe(1)
        while frame is not None and len(records) < _MAX_STACK_DEPTH:
            code, line = frame.f_code, frame.f_lineno
            module = frame.f_globals.get("__name__")
            if module == plugin_tracing.__name__:  # stands between nvtripy's frames, and is no line of the user's
                frame = frame.f_back  # type: ignore[assignment]
                continue
            is_dispatch = module == registry_module and code.co_name == "wrapper"
            records.append(
                stack_info.SourceInfo(
                    module=module,
                    file=code.co_filename,
                    line=line,
                    function=code.co_name,
                    code=None,
                    _dispatch_target=frame.f_locals["key"] if is_dispatch else "",
                    column_range=_column_range(code, line),
                )
            )
            frame = frame.f_back  # type: ignore[assignment]
        return records

    original_text = exception.str_from_source_info
    excluded = stack_info.get_module_names_to_exclude_from_stack_info()

    @functools.wraps(original_text)
    def str_from_source_info(
        source_info: stack_info.SourceInfo,
        enable_color: bool = True,
        is_first_frame: bool = True,
        callee_info: stack_info.SourceInfo | None = None,
    ) -> str:
        frame = (source_info.file, source_info.line, source_info.function, source_info.code, source_info.column_range)
        callee = None if callee_info is None else (callee_info.function, callee_info._dispatch_target)
        key = (frame, enable_color, is_first_frame, callee)
        if key not in _frame_texts:
            _frame_texts[key] = original_text(source_info, enable_color, is_first_frame, callee_info)
        return _frame_texts[key]

    exception.str_from_source_info = str_from_source_info
    stack_info.get_module_names_to_exclude_from_stack_info = lambda: excluded
    stack_info.get_stack_info = get_stack_info
    parameter.get_stack_info = get_stack_info


def _column_range(code: CodeType, line: int) -> tuple[int, int] | None:
    """The columns that the instructions of ``line`` span, where they all agree on one range (Python 3.11+)."""
    key = (code, line)
    if key not in _column_ranges:
        ranges = set()
        if hasattr(code, "co_positions"):
            ranges = {
                (start, end)
                for start_line, _, start, end in code.co_positions()
                if start_line == line and start is not None and end is not None
            }
        _column_ranges[key] = ranges.pop() if len(ranges) == 1 else None
    return _column_ranges[key]
