"""Tests with other programs, those that take exported folders and loggers: run where an environment variable names the virtual environment of one.

environment.sh makes such environments.
"""

import os

_NEEDS = {"test_vllm.py": "SPECTITAN_VLLM", "test_speculators.py": "SPECTITAN_SPECULATORS", "test_loggers.py": "SPECTITAN_LOGGERS"}
collect_ignore = [file for file, variable in _NEEDS.items() if not os.environ.get(variable)]
