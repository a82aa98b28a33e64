"""What a training process sets once, before anything else, for all that it does."""

import logging
import os
import warnings

import torch

from spectitan.config.sections import Job
from spectitan.training.allocator import use_huge_pages


def prepare_process(job: Job) -> None:
    """Memory, logging, threads and determinism. Rank 0 says what happens, the others what goes wrong."""
    use_huge_pages()
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if job.threads > 0:
        torch.set_num_threads(job.threads)
    if job.deterministic:  # cuBLAS reads the variable when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(job.deterministic)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # of tp; nothing works on it in place
