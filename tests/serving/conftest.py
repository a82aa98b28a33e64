"""Tests with the programs that take exported folders: run where an environment variable names the virtual environment of one.

environment.sh makes such environments.
"""

import os

_NEEDS = {"test_vllm.py": "SPECTITAN_VLLM", "test_speculators.py": "SPECTITAN_SPECULATORS"}
collect_ignore = [file for file, variable in _NEEDS.items() if not os.environ.get(variable)]
