"""What `objective.loss` says: a loss by name, or several with their weights."""

import functools
import json
import math
from collections.abc import Mapping
from types import MappingProxyType

from spectitan.errors import UserError

_AGAINST_THE_BASE = ("kl_div", "rkl", "jsd", "tv", "nla", "lk_hybrid", "ce_argmax")
LOSSES = ("ce", *_AGAINST_THE_BASE)
_ALLOWED = f"""one of {", ".join(LOSSES)}, or weights above 0 of several: {{"ce": 0.1, "tv": 0.9}}"""


@functools.cache
def loss_weights(text: str) -> Mapping[str, float]:
    """Weights by name: of "tv", or of '{"ce": 0.1, "tv": 0.9}', as speculators writes it.

    Raises:
        UserError: it is neither.
    """
    if text in LOSSES:
        return MappingProxyType({text: 1.0})
    try:
        pairs = json.loads(text, object_pairs_hook=list, parse_int=float)
    except (ValueError, RecursionError):
        pairs = None
    if not text.lstrip().startswith("{") or not pairs:
        raise _refused(text)
    for name, weight in pairs:
        if name not in LOSSES:
            raise _refused(text, f"{name!r} is no loss")
        if type(weight) is not float or not 0 < weight < math.inf:
            raise _refused(text, f"the weight of {name} is {json.dumps(weight, ensure_ascii=False)}")
    if len(dict(pairs)) < len(pairs):
        raise _refused(text, "a loss is named twice")
    return MappingProxyType(dict(pairs))


def needs_teacher(text: str) -> bool:
    """Whether the base's distribution is needed: for all but "ce"."""
    return any(name in _AGAINST_THE_BASE for name in loss_weights(text))


def _refused(text: str, found: str = "") -> UserError:
    shown = json.dumps(text, ensure_ascii=False)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return UserError(f"objective.loss = {shown}{found and f': {found}'}; allowed: {_ALLOWED}")
