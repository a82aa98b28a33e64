"""Mixed precision on one process: parameters stay as they are, and are seen in the compute dtype while the module runs."""

import functools
from collections.abc import Collection

import torch
from torch import nn


def cast_on_use(module: nn.Module, dtype: torch.dtype, heads: Collection[str] = ()) -> None:
    """While `module.forward` runs, its parameters and those of its submodules are seen in `dtype`, in place; but not those of the
    submodules named `heads`: the fused loss casts these itself, and has gradients for them that need not be rounded.

    What FSDP does on many ranks, without what one rank has no use for: casts live no longer than autograd needs them, there is no
    gradient in the compute dtype beside the parameter's own, and an embedding's rows are cast after the lookup, not its table before.
    """
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.register_forward_hook(lambda _part, _inputs, rows: rows.to(dtype))
    left = {part for name in heads if hasattr(module, name) for part in getattr(module, name).modules()}
    owners = [
        (part, name)
        for part in module.modules()
        if part not in left and not isinstance(part, nn.Embedding)
        for name, _ in part.named_parameters(recurse=False, remove_duplicate=False)
    ]
    forward = module.forward

    @functools.wraps(forward)
    def forward_in_dtype(*args, **kwargs):
        casts = {}
        for part, name in owners:
            parameter = getattr(part, name)
            casts.setdefault(parameter, parameter.to(dtype))
            # An attribute of the instance comes before the registered parameter, which stays what it is for everyone else.
            part.__dict__[name] = casts[parameter]
        try:
            return forward(*args, **kwargs)
        finally:
            for part, name in owners:
                del part.__dict__[name]

    module.forward = forward_in_dtype
