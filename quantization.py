"""A checkpoint of any kind → a quantized one, by NVIDIA ModelOpt's methods or ours, exported by ModelOpt.

    python quantization.py --model-type gpt2 --quant-mode int4-weight-only --output gpt2-int4
    python quantization.py --model-type gpt2 --method gptq --bits 4 --group-size 64 --output gpt2-gptq

The folder is in ModelOpt's unified HuggingFace layout, which TensorRT-LLM, vLLM and SGLang read: config.json with a
quantization_config, hf_quant_config.json, packed weights and their scales in model.safetensors, and the tokenizer. It
is written by ModelOpt's own exporter. The same weights, settings and text give the same bytes.

torch, transformers and ModelOpt (requirements/quant.txt) are imported only while a checkpoint is being quantized. What
`cached_checkpoint` finds in its cache costs none of them.

The way of the data: a checkpoint → transformers' model of it; calibration text → samples; both → `quantize_model`
(ModelOpt observes and chooses scales, or gptq.py chooses integers and scales, and ModelOpt's quantizers get those) →
`export`.
"""

from __future__ import annotations

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import command_line
import compression
from quantizing.arguments import add_arguments, config_from, is_asked_for
from quantizing.cache import cache_name, cached_checkpoint, default_cache
from quantizing.folders import quantize_checkpoint
from quantizing.settings import METHODS, MODES, QuantizationConfig, QuantizationError
from weight_loader import CheckpointError, open_checkpoint

__all__ = [
    "METHODS",
    "MODES",
    "QuantizationConfig",
    "QuantizationError",
    "add_arguments",
    "cache_name",
    "cached_checkpoint",
    "config_from",
    "default_cache",
    "is_asked_for",
    "quantize_checkpoint",
]


def run(arguments: Sequence[str] | None = None) -> None:
    """Carries out the command."""
    parser = command_line.Parser("quantization.py", "Quantize a GPT-2.")
    command_line.add_model_arguments(parser)
    parser.add_argument("--output", metavar="DIR", type=command_line.path, help="the folder to write")
    parser.add_argument(
        "--show-stats",
        action="store_true",
        help="print what each part of the written folder takes or, without --output, of the given checkpoint",
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.output is None and (not options.show_stats or is_asked_for(options)):
        raise command_line.UsageError("expected --output DIR, the folder to write, but got none")
    checkpoint = open_checkpoint(options.model_type, options.revision)
    if options.output is not None:
        config = config_from(options)
        quantize_checkpoint(checkpoint, config, options.output)
        sizes = _megabytes(options.output.glob("*.safetensors"))
        command_line.report(f"wrote {options.output}: {', '.join(_kinds(config))}, {sizes:.1f} MB")
        checkpoint = open_checkpoint(options.output)
    if options.show_stats:
        print(compression.table(checkpoint))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on standard error for input that cannot be used."""
    return command_line.main("quantization.py", lambda: run(arguments), QuantizationError, CheckpointError)


def _kinds(config: QuantizationConfig) -> list[str]:
    cache = [] if config.kv_cache_dtype == "float16" else [f"KV cache in {config.kv_cache_dtype}"]
    rounding = [] if config.method == "modelopt" else [f"{config.bits} bits by {config.method}"]
    return [*([config.mode] if config.mode else []), *rounding, *cache]


def _megabytes(paths: Iterable[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / 1e6


if __name__ == "__main__":
    sys.exit(main())
