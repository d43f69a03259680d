"""What the ranks of a model agree on before they begin, and what those do that follow."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import nvtripy as tp

import engine
from command_line import UsageError
from engine import config_of, open_engine
from engine_cache import EngineFolder
from nvtripy_portable.decoder import Decoder
from parallelism.team import Team
from serving.opening import open_model
from weight_loader import Checkpoint, open_checkpoint

#: What has to be the same program on every rank: what makes numbers, and what ranks say to each other.
_SOURCES = (engine.__file__, str(engine.model_module.__file__), str(Path(__file__).with_name("team.py")))


@dataclass(frozen=True)
class Plan:
    """What rank 0 is about to do.

    Attributes:
        checkpoint: Its folder or file.
        sequences: That are computed together; None: one, and as fast as it goes.
        beams: Of a search, at most.
    """

    checkpoint: str
    sequences: int | None
    beams: int = 1


def agree(team: Team, checkpoint: Checkpoint, dtype: str, plan: Plan) -> None:
    """That all ranks are about to run the same model.

    Raises:
        UsageError: one is not; the text names it.
        CheckpointError: they cannot share it so.
    """
    digest = hashlib.sha256(b"".join(Path(source).read_bytes() for source in _SOURCES)).hexdigest()
    config = replace(config_of(checkpoint, dtype, team.mapping), tp_rank=0)
    team.compare(
        {
            "program": digest[:16],
            "nvtripy": tp.__version__,
            "checkpoint fingerprint": checkpoint.fingerprint(),
            "configuration": ", ".join(f"{name}={value}" for name, value in asdict(config).items()),
            "plan": f"{plan.sequences} sequences, {plan.beams} beams",
        }
    )


def follow(
    team: Team, options: argparse.Namespace, engines: EngineFolder | None, report: Callable[[str], None]
) -> None:
    """What a rank does that is not the first: the same steps, with its part of the model, until there are no more."""
    plan: Plan = team.share()
    checkpoint = open_checkpoint(Path(plan.checkpoint))
    os.environ["NVTRIPY_PORTABLE_THREADS"] = str(options.threads)
    agree(team, checkpoint, options.dtype, plan)
    opened: object
    if plan.sequences is None:
        opened = open_engine(checkpoint, options.dtype, 1, engines, report, mapping=team.mapping).decoder
    else:
        opened = open_model(
            checkpoint, options.dtype, plan.sequences, None, engines, report, None, plan.beams, team.mapping
        ).decoder
    team.follow(shared(opened))
    if engines is not None:
        engines.save_pending()


def shared(decoder: object) -> Decoder:
    """The decoder of a model that ranks share.

    Raises:
        UsageError: NVIDIA's runtime runs the model, whose steps nobody announces yet.
    """
    if not isinstance(decoder, Decoder):
        raise UsageError("expected the portable runtime for --tp-size, which NVIDIA's is not run on yet")
    return decoder
