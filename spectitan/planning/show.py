"""`job.plan`: the plan of a configured run, printed."""

from pathlib import Path

import torch

from spectitan.models.registry import choose_config
from spectitan.planning.plan import plan_run
from spectitan.planning.report import check_fits, describe
from spectitan.speculators.registry import new_speculator
from spectitan.trained import family_keys, find_trained


def show_plan(config) -> None:
    """Nothing is read but config.json, and that only where base.variant names no size.

    Args:
        config: a dataclass of tables; takes the keys of the speculator at speculator.path.

    Raises:
        UserError: a layout that is impossible, or that does not fit.
    """
    if config.speculator.path:
        trained = find_trained(config)
        config.adopt_speculator(*family_keys(trained), source=str(trained.path))
    named = config.base.variant != "auto" and not Path(config.base.path).is_dir()
    base_config = choose_config(config.base.arch, config.base.variant, "" if named else config.base.path)
    with torch.device("meta"):
        speculator = new_speculator(config.speculator.type, config.speculator, base_config, config.objective)
    plan = plan_run(config, base_config, speculator)
    print(describe(plan, config.plan))
    check_fits(plan, config.plan)
