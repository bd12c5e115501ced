"""Studies: a graph of stages from one file, and the table and report it ends in.

The pieces, each of which works without the others: :mod:`~torchlethe.study.reader` and :mod:`~torchlethe.study.grids`
read and check the file, :mod:`~torchlethe.study.plan` turns it into jobs, :mod:`~torchlethe.study.keys` and
:mod:`~torchlethe.study.fingerprints` say what a result depends on, :mod:`~torchlethe.study.stage` runs one job through
any ``run_stage(command, words)``, :mod:`~torchlethe.study.runner` decides which ones run, in this process, in
:mod:`~torchlethe.study.workers` or on a :mod:`~torchlethe.study.cluster`. :mod:`~torchlethe.study.collect` reads the
evaluations into :mod:`~torchlethe.study.results`, and :mod:`~torchlethe.study.output` writes tables, figures and
report. Nothing here knows how a stage is run, and planning imports no PyTorch.
"""

from torchlethe.study.plan import Job, plan_jobs
from torchlethe.study.reader import load_study
from torchlethe.study.runner import Outcome, run_jobs
from torchlethe.study.spec import Stage, Study

__all__ = ["Job", "Outcome", "Stage", "Study", "load_study", "plan_jobs", "run_jobs"]
