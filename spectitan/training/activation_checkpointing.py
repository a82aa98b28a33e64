"""Activation checkpointing: a block keeps its input only, and runs once more in the backward (Chen et al. 2016)."""

import logging
from collections.abc import Iterable

from torch import nn
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger(__name__)


def apply_activation_checkpointing(blocks: Iterable[nn.Module]) -> None:
    """In place, before compilation and sharding, whose hooks then lie outside; parameter names stay as they are."""
    for block in blocks:
        _checkpoint_forward(block)
    logger.info("base: activations of blocks are computed again in the backward")


def _checkpoint_forward(block: nn.Module) -> None:
    forward = block.forward

    def checkpointed(*args):  # a frame of its own, which torch.compile can trace
        # There is no dropout, so there is no random state to keep; on a GPU that would make the host wait.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)

    block.forward = checkpointed
