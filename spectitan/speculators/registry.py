"""The drafter families by name. A new one is a file beside this and an entry here."""

import difflib

from spectitan.config.sections import Objective, Training
from spectitan.errors import UserError
from spectitan.speculators.base import Speculator
from spectitan.speculators.eagle3 import Eagle3Config, Eagle3Speculator
from spectitan.speculators.joint import Joint
from spectitan.speculators.lstm import LstmConfig, LstmSpeculator
from spectitan.speculators.mlp import MlpConfig, MlpSpeculator
from spectitan.speculators.next_token import NextToken

# speculator.type -> (its configuration keys, its module)
SPECULATORS: dict[str, tuple[type, type[Speculator]]] = {
    "mlp": (MlpConfig, MlpSpeculator),
    "lstm": (LstmConfig, LstmSpeculator),
    "eagle3": (Eagle3Config, Eagle3Speculator),
}


# speculator.type -> configuration keys, for config/manager; "none", which has no keys, is known there
SPECULATOR_CONFIGS: dict[str, type] = {name: config for name, (config, _) in SPECULATORS.items()}


def build_speculator(type: str, config, base_config, objective: Objective) -> Speculator:
    """A speculator of a registered family, its weights not yet initialised.

    Args:
        type: `speculator.type`; "none" gives the base's own next-token loss.
        config: the family's configuration keys.
        base_config: has the base's `hidden_size` and `vocab_size`.
        objective: the loss it is trained with.

    Raises:
        UserError: no such family, or keys that do not fit together.
    """
    if type == "none":
        return NextToken(base_config.hidden_size, base_config.vocab_size, objective)
    if type not in SPECULATORS:
        near = difflib.get_close_matches(type, SPECULATORS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"speculator.type = {type!r}: allowed: {', '.join(SPECULATORS)}, none{hint}")
    return SPECULATORS[type][1](config, base_config, objective)


def new_speculator(type: str, config, base_config, objective: Objective) -> Speculator:
    """As `build_speculator`, for one that is not read from anywhere: see `Speculator.new`."""
    if type not in SPECULATORS:
        return build_speculator(type, config, base_config, objective)
    return SPECULATORS[type][1].new(config, base_config, objective)


def build_objective(speculator: Speculator, base_config, objective: Objective, training: Training, freeze_base: bool) -> Speculator:
    """What a run learns from: the speculator's loss, with a trained base beside its own; `speculator.type = "none"` is the base's own loss."""
    if freeze_base or isinstance(speculator, NextToken):
        return speculator
    next_token = build_speculator("none", None, base_config, objective)
    return Joint(next_token, speculator, training.speculator_loss_coeff, training.detach_states)


def type_of(speculator: Speculator) -> str:
    """The `speculator.type` of a registered family's speculator."""
    return next(name for name, (_, family) in SPECULATORS.items() if family is type(speculator))
