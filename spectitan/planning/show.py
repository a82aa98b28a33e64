"""`job.plan`: the plan of a configured run, printed."""

from pathlib import Path

from spectitan.models.registry import choose_config
from spectitan.planning.rehearsal import plan_run
from spectitan.planning.report import check_fits, describe
from spectitan.trained import speculator_shape


def show_plan(config) -> None:
    """Nothing is read but config.json, and that only where base.variant names no size.

    Args:
        config: a dataclass of tables; takes the keys of the speculator at speculator.path.

    Raises:
        UserError: a layout that is impossible, or that does not fit.
    """
    named = config.base.variant != "auto" and not Path(config.base.path).is_dir()
    base_config = choose_config(config.base.arch, config.base.variant, "" if named else config.base.path)
    plan = plan_run(config, base_config, speculator_shape(config, base_config))
    print(describe(plan, config.plan))
    check_fits(plan, config.plan)
