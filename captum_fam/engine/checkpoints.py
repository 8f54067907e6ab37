"""Gradient checkpointing in the encoder that lets no gradient through."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch.utils.checkpoint import CheckpointError, CheckpointFunction

CUT = (
    "No gradient reaches the layer through gradient checkpointing with use_reentrant=True, which is on in this encoder;"
    " switch it off to explain (timm: model.set_grad_checkpointing(False), transformers:"
    " model.gradient_checkpointing_disable()), or pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
)


def in_reentrant_part() -> bool:
    """Whether this runs in a checkpointed part that keeps nothing now, and runs again for its gradients."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


@contextmanager
def checkpointing_named() -> Iterator[None]:
    """Replaces torch's error about a gradient through such a part by one that says what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except RuntimeError as error:
        if "checkpoint" not in str(error).lower():
            raise
        raise ValueError(CUT) from error
