"""The same summaries by transformers, for comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from command_line import UsageError
from serving.settings import BeamSettings


class Peer:
    """A checkpoint in transformers.

    Args:
        folder: In HuggingFace's format, not quantized.
        dtype: Of weights and activations.

    Raises:
        UsageError: transformers is not installed, or cannot open the checkpoint.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UsageError(f"--test-hf needs torch and transformers ({error})") from None
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        except Exception as error:  # whatever its loader raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"transformers cannot open {folder}: {reason[:200]}") from None
        self._model: Any = model.eval()
        # Nothing but what is asked for here: a checkpoint's own settings may sample.
        self._model.generation_config = transformers.GenerationConfig()

    def summaries(
        self, prompts: Sequence[list[int]], beams: BeamSettings, max_new_tokens: int, endings: Sequence[int]
    ) -> Iterator[list[list[int]]]:
        """The ids of each prompt's summaries, the best first, up to and with what has ended them. One prompt after the
        other, as padding would change numbers.

        Raises:
            UsageError: transformers cannot compute them.
        """
        import torch

        how: dict[str, Any] = {"num_beams": beams.beams, "num_return_sequences": beams.beams, "do_sample": False}
        if beams.beams > 1:
            how |= {"length_penalty": beams.length_penalty, "early_stopping": beams.early_stopping}
        for prompt in prompts:
            ids = torch.tensor([prompt])
            try:
                found = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    eos_token_id=list(endings) or None,
                    pad_token_id=0,
                    **how,
                )
            except Exception as error:
                raise UsageError(f"transformers cannot compute a summary: {error}") from None
            yield [_ended(each[len(prompt) :], endings) for each in found.tolist()]


def _ended(ids: list[int], endings: Sequence[int]) -> list[int]:
    """Without what pads it."""
    end = next((place for place, id in enumerate(ids) if id in endings), len(ids) - 1)
    return ids[: end + 1]
