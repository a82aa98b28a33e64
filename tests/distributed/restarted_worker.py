"""The trainer as torchrun starts it, with an accident in one rank at its first two starts; tells its exit status.

python -m torch.distributed.run --max-restarts 2 ... -m tests.distributed.restarted_worker FOLDER FLAGS
"""

import os
import signal
import sys
from pathlib import Path

from spectitan import train
from tests.integration import processes

# At each start: the rank that is killed, and where.
KILLED = [
    {"rank": 1, "module": "spectitan.train", "function": "step_if_finite", "call": 9},
    {"rank": 0, "module": "spectitan.training.checkpoint", "function": "write_json", "call": 2},
]

if __name__ == "__main__":
    folder, *flags = sys.argv[1:]
    start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), os.environ["RANK"]
    if start < len(KILLED):
        processes.kill_at(**KILLED[start], number=signal.SIGKILL)
    else:
        processes.hold_at(2, Path(folder))
    status = train.main(flags)
    Path(folder, f"{start}.{rank}.status").write_text(str(status))
    sys.exit(status)
