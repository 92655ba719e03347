"""Tensor parallelism: who holds which part of a model, how its tensors are split and read, and how ranks exchange sums.

A rank is a process that a launcher started, `connect()`, or a thread of this one, `run(function, ranks)`; either way it loads
its part, `load_model(folder, comm)`, and calls it as any model. Design: docs/design/0007-tensor-parallelism.md.
"""

from cupyq.tp.bootstrap import check_same, connect, find_place, group, model_digest
from cupyq.tp.comm import Comm, together
from cupyq.tp.loading import load_model
from cupyq.tp.model import RankModel
from cupyq.tp.plan import TPPlan
from cupyq.tp.running import run

__all__ = [
    "Comm",
    "RankModel",
    "TPPlan",
    "check_same",
    "connect",
    "find_place",
    "group",
    "load_model",
    "model_digest",
    "run",
    "together",
]
