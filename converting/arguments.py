"""The command-line options that say how ranks share a model."""

from __future__ import annotations

import argparse

import command_line
from command_line import UsageError
from parallelism.mapping import Mapping

MOST_RANKS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options: `mapping_of` reads them."""
    parser.add_argument("--tp-size", type=int, metavar="N", help="ranks that share each layer (default: 1)")
    parser.add_argument("--pp-size", type=int, metavar="N", help="stages of layers (default: 1)")
    parser.add_argument(
        "--use-parallel-embedding", action="store_true", help="the ranks of the first stage share the embeddings, too"
    )
    parser.add_argument(
        "--embedding-sharding-dim",
        type=int,
        choices=(0, 1),
        help="along which dimension: 0, rows, padded with zeros where they do not divide; 1, columns (default: 0)",
    )


def are_given(options: argparse.Namespace) -> bool:
    """Whether any of them is."""
    return options.use_parallel_embedding or any(
        getattr(options, name) is not None for name in ("tp_size", "pp_size", "embedding_sharding_dim")
    )


def mapping_of(options: argparse.Namespace) -> Mapping:
    """What they say.

    Raises:
        UsageError: a value out of its range, or a dimension without what it is for.
    """
    command_line.check_range(options, tp_size=(1, MOST_RANKS), pp_size=(1, MOST_RANKS))
    tp_size, pp_size = options.tp_size or 1, options.pp_size or 1
    if tp_size * pp_size > MOST_RANKS:
        raise UsageError(f"expected at most {MOST_RANKS} ranks but got {tp_size} x {pp_size}")
    if options.embedding_sharding_dim is not None and not options.use_parallel_embedding:
        raise UsageError("expected --embedding-sharding-dim with --use-parallel-embedding only but got it without")
    dimension = (options.embedding_sharding_dim or 0) if options.use_parallel_embedding else None
    return Mapping(tp_size, pp_size, embedding_sharding_dim=dimension)
