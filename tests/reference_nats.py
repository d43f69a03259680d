"""How unlikely transformers finds a text, token by token: the reference of the tests of perplexity."""

from __future__ import annotations

import numpy as np
import torch
from transformers import GPT2LMHeadModel


def reference_nats(model: GPT2LMHeadModel, ids: np.ndarray, context: int, stride: int) -> np.ndarray:
    """A sliding window over the text, one window after the other: HuggingFace's recipe, plainly."""
    nats: list[float] = []
    start = 0
    while len(nats) < len(ids) - 1:
        window = torch.from_numpy(ids[start : start + context].astype(np.int64))
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        for place in range(len(window)):
            following = start + place + 1
            if following < len(ids) and following > len(nats):  # token 1 is the first that is predicted
                nats.append(-torch.log_softmax(logits[place], 0)[int(ids[following])].item())
        start += stride
    return np.array(nats)
