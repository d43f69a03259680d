"""The options that say how to quantize, for every program that takes them."""

from __future__ import annotations

import argparse

from quantizing.settings import CALIB_LENGTH, CALIB_SIZE, KV_CACHE_DTYPES, METHODS, MODES, QuantizationConfig


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """The options that say how to quantize, for every program that takes them."""
    parser.add_argument("--quant-mode", metavar="MODE", help=f"quantize the weights: {', '.join(MODES)}")
    parser.add_argument(
        "--method", metavar="NAME", default="modelopt", help=f"of rounding: {', '.join(METHODS)} (default %(default)s)"
    )
    parser.add_argument("--bits", metavar="N", type=int, help="rtn, gptq: 8, 4 or 3 (default: the mode's)")
    parser.add_argument(
        "--group-size",
        metavar="N",
        type=int,
        help="int4: input features a scale (default 128; rtn, gptq: one an output feature)",
    )
    parser.add_argument(
        "--no-clipping", dest="clipping", action="store_false", help="rtn, gptq: scales that span the largest weight"
    )
    parser.add_argument(
        "--no-act-order", dest="act_order", action="store_false", help="gptq: round columns from left to right"
    )
    parser.add_argument(
        "--damping", metavar="X", type=float, default=0.01, help="gptq: of the Hessian (default %(default)s)"
    )
    parser.add_argument(
        "--kv-cache-dtype", metavar="DTYPE", default="float16", help=f"{', '.join(KV_CACHE_DTYPES)} (default float16)"
    )
    parser.add_argument("--quant-lm-head", action="store_true", help="quantize the head and the tied embedding, too")
    parser.add_argument(
        "--quant-embeddings", action="store_true", help="int8-weight-only: quantize both embeddings and the head, too"
    )
    parser.add_argument("--per-channel", action="store_true", help="int8-smoothquant: a scale an output feature")
    parser.add_argument("--per-token", action="store_true", help="int8-smoothquant: a scale an input token")
    parser.add_argument(
        "--calib-data",
        metavar="FILE|DATASET",
        help="a UTF-8 text, or a data set at the hub such as cnn_dailymail (default: checkpoints/shakespeare's)",
    )
    parser.add_argument("--calib-size", metavar="N", type=int, default=CALIB_SIZE, help="samples (default %(default)s)")
    parser.add_argument(
        "--calib-length", metavar="N", type=int, help=f"tokens a sample (default {CALIB_LENGTH}, or the context)"
    )


def is_asked_for(options: argparse.Namespace) -> bool:
    """Whether any of `add_arguments`' options was given."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    return any(getattr(options, name) != default for name, default in vars(parser.parse_args([])).items())


def config_from(options: argparse.Namespace) -> QuantizationConfig:
    """The settings that `add_arguments`' options give.

    Raises:
        QuantizationError: they are not possible.
    """
    return QuantizationConfig(
        mode=options.quant_mode,
        kv_cache_dtype=options.kv_cache_dtype,
        quant_lm_head=options.quant_lm_head or options.quant_embeddings,
        quant_embeddings=options.quant_embeddings,
        per_channel=options.per_channel,
        per_token=options.per_token,
        calib_data=options.calib_data,
        calib_size=options.calib_size,
        calib_length=options.calib_length,
        method=options.method,
        bits=options.bits,
        group_size=options.group_size,
        clipping=options.clipping,
        act_order=options.act_order,
        damping=options.damping,
    )
