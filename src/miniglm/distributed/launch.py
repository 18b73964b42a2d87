"""What torchrun tells each of its processes. Knows the environment alone, so that asking needs no torch."""

from __future__ import annotations

import os

TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process; a variable or two of them alone may be some cluster's own."""


def size() -> int:
    """How many processes train together; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in TOLD) else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def local_rank() -> int:
    """Which of those on this machine."""
    return int(os.environ["LOCAL_RANK"]) if size() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that prints, holds the run folder and writes what is written once."""
    return rank() == 0
