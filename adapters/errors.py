"""What is raised when an adapter cannot be used."""

from __future__ import annotations

from loading.errors import CheckpointError


class AdapterError(CheckpointError):
    """An adapter cannot be used. The text is one line, ready to be shown to the user."""


class NotPlainError(AdapterError):
    """It is more than plain LoRA: peft may know what to make of it."""
