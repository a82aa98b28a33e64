"""torch.compile of the base's blocks, one by one, and of what a speculator's rows go through: a graph serves all blocks that are alike."""

import logging
import os
import shutil
from collections.abc import Sequence

import torch
from torch import nn

from spectitan import heartbeat
from spectitan.errors import UserError

logger = logging.getLogger(__name__)


def apply_compile(
    enabled: str,
    device: torch.device,
    blocks: Sequence[nn.Module],
    methods: Sequence[tuple[nn.Module, str]] = (),
    backend: str = "inductor",
) -> bool:
    """Compiles in place; parameter names stay as they are. Returns whether it did.

    Args:
        enabled: `compile.enabled`; auto compiles on a GPU, and on a CPU if there is a C++ compiler.
        blocks: whole modules, whose inputs keep their shapes.
        methods: modules and the names of their methods, whose inputs have another number of rows each time. With auto they stay eager on
            a CPU, where a step gains 2 to 4%: in a short run, less than compiling takes.
        backend: as torch.compile's.

    Raises:
        UserError: "true", and there is no compiler.
    """
    if enabled == "false":
        return False
    if backend == "inductor" and device.type == "cpu" and not _cpp_compiler():
        if enabled == "true":
            raise UserError("compile.enabled = true needs a C++ compiler: g++ or clang++ in PATH, or CXX; or set auto or false")
        logger.info("compile.enabled = auto: no C++ compiler found, running eagerly")
        return False
    if enabled == "auto" and device.type == "cpu":
        methods = ()
    _compiling_is_a_sign_of_life()
    for block in blocks:
        block.compile(backend=backend)
    for module, name in methods:
        setattr(module, name, torch.compile(getattr(module, name), backend=backend, dynamic=True))
    logger.info("compiled: %d blocks of the base, %d parts of the speculator", len(blocks), len(methods))
    return True


def _compiling_is_a_sign_of_life() -> None:
    from torch._dynamo.callback import callback_handler  # slow to import where nothing is compiled

    if heartbeat.begin_covered not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(heartbeat.begin_covered)
        callback_handler.register_end_callback(heartbeat.end_covered)


def _cpp_compiler() -> str | None:
    names = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    return next((path for name in names if name and (path := shutil.which(name))), None)
