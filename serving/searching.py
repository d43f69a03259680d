"""The options of a command line that ask for beam search."""

from __future__ import annotations

import argparse

from command_line import UsageError
from serving.settings import BeamSettings, RequestError

_EARLY: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """The options."""
    parser.add_argument("--num-beams", metavar="N", type=int, help="search with N beams, instead of drawing")
    parser.add_argument(
        "--length-penalty",
        metavar="X",
        type=float,
        help="above 0 longer texts are preferred, below 0 shorter ones (default 1)",
    )
    parser.add_argument(
        "--early-stopping",
        choices=tuple(_EARLY),
        help="true: end with N finished texts; never: only where no better one can come (default false: in between)",
    )


def beams_of(options: argparse.Namespace) -> BeamSettings | None:
    """The search that is asked for, if one is.

    Raises:
        UsageError: an option is out of its range, or speaks of a search that is not asked for.
    """
    if options.num_beams is None:
        for name in ("length_penalty", "early_stopping"):
            if getattr(options, name) is not None:
                raise UsageError(f"expected --num-beams with --{name.replace('_', '-')}")
        return None
    penalty = 1.0 if options.length_penalty is None else options.length_penalty
    beams = BeamSettings(options.num_beams, penalty, _EARLY[options.early_stopping or "false"])  # type: ignore[arg-type]
    try:
        beams.check()
    except RequestError as error:
        param = error.param or ""
        raise UsageError(str(error).replace(param, f"--{param.replace('_', '-')}")) from None
    return beams
