"""job.run_name and its placeholders."""

import re
import time

from spectitan.errors import UserError

PLACEHOLDERS = ("time", "utc_time", "speculator", "base", "seed", "rank", "local_rank")


def check_run_name(template: str) -> None:
    """Raises UserError for a placeholder that there is not."""
    unknown = [name for name in re.findall(r"\{(.*?)\}", template) if name not in PLACEHOLDERS]
    if unknown:
        allowed = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise UserError(f"job.run_name = {template!r}: no placeholder {{{unknown[0]}}}; allowed: {allowed}")


def fill_run_name(template: str, *, speculator: str, base: str, seed: int) -> str:
    """Times are those of now, as 2026-11-21T18-05-33. What is logged is of rank 0."""
    now = time.time()
    values = {"speculator": speculator, "base": base, "seed": seed, "rank": 0, "local_rank": 0}
    values |= {
        name: time.strftime("%Y-%m-%dT%H-%M-%S", clock(now)) for name, clock in (("time", time.localtime), ("utc_time", time.gmtime))
    }
    return re.sub(r"\{(\w+)\}", lambda match: str(values[match[1]]), template)
