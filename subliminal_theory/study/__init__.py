"""One pipeline for three worlds: digits, the compact language model, and published checkpoints."""

from subliminal_theory.study.asking import BehindNumbers
from subliminal_theory.study.checkpoint import Checkpoint
from subliminal_theory.study.compact import Compact
from subliminal_theory.study.costs import Costs
from subliminal_theory.study.digits import Digits, Network, TrainingImages
from subliminal_theory.study.run import (
    Elsewhere,
    Embeddings,
    Everything,
    FineTuned,
    Frozen,
    LowRank,
    Optimizer,
    Prompted,
    Run,
    Steered,
    Student,
    Untrained,
    identity,
    stacks,
)
from subliminal_theory.study.stages import Computation, Job, PerRun, finite, trained
from subliminal_theory.study.store import Store
from subliminal_theory.study.study import Study, labels, rows
from subliminal_theory.study.texts import Behind, CorpusChats, Dataset, Lessons, RandomNumbers, Reading, Written
from subliminal_theory.study.world import Finished, World

__all__ = [
    "Behind",
    "BehindNumbers",
    "Checkpoint",
    "Compact",
    "Computation",
    "CorpusChats",
    "Costs",
    "Dataset",
    "Digits",
    "Elsewhere",
    "Embeddings",
    "Everything",
    "FineTuned",
    "Finished",
    "Frozen",
    "Job",
    "Lessons",
    "LowRank",
    "Network",
    "Optimizer",
    "PerRun",
    "Prompted",
    "RandomNumbers",
    "Reading",
    "Run",
    "Steered",
    "Store",
    "Student",
    "Study",
    "TrainingImages",
    "Untrained",
    "World",
    "Written",
    "finite",
    "identity",
    "labels",
    "rows",
    "stacks",
    "trained",
]
