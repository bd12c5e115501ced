"""Studies: a graph of stages from one file, and the table and report it ends in.

The pieces, each of which works without the others: :mod:`~torchlethe.study.spec` reads and checks the file,
:mod:`~torchlethe.study.plan` turns it into jobs with keys, :mod:`~torchlethe.study.runner` runs jobs through any
``run_stage(command, words)`` and skips what is done, :mod:`~torchlethe.study.results` collects the evaluations, and
:mod:`~torchlethe.study.report` shows them. Nothing here knows how a stage is run, and planning
imports no PyTorch.
"""

from torchlethe.study.plan import Job, plan_jobs
from torchlethe.study.runner import Outcome, run_jobs
from torchlethe.study.spec import Stage, Study, load_study

__all__ = ["Job", "Outcome", "Stage", "Study", "load_study", "plan_jobs", "run_jobs"]
