"""What a study leaves: tables, figures and the report."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from torchlethe.study.collect import collect
from torchlethe.study.environment import environment
from torchlethe.study.panels import write_figures
from torchlethe.study.report import render
from torchlethe.study.results import Results
from torchlethe.study.runner import Outcome, write_text
from torchlethe.study.spec import Study
from torchlethe.study.tables import latex, markdown, table_csv


def write_results(study: Study, outcomes: Sequence[Outcome], root: Path, words: Sequence[str]) -> Path:
    """Write ``table.md``, ``table.csv``, ``table.tex``, ``figures/`` and ``report.html``.

    Args:
        study: the study.
        outcomes: of its jobs.
        root: the folder to write to.
        words: the command line that reproduces it, after ``lethe study``.

    Returns:
        The path of the report.
    """
    return write_report(collect(study, outcomes), root, shlex.join(["lethe", "study", *words]), study.path.parent)


def write_report(results: Results, root: Path, command: str, sources: Path) -> Path:
    """The same for results of any origin.

    Args:
        results: what to show.
        root: the folder to write to.
        command: the shell command that reproduces it.
        sources: a folder of the repository whose commit counts.

    Returns:
        The path of the report.
    """
    write_text(root / "table.md", markdown(results))
    write_text(root / "table.csv", table_csv(results))
    write_text(root / "table.tex", latex(results))
    figures = write_figures(results, root / "figures")
    files = {
        "table.md, table.csv, table.tex": "the table for a text, a program or a paper",
        **({"figures/": f"the plots as PNG and PDF ({len(figures) // 2} sheets)"} if figures else {}),
    }
    report = root / "report.html"
    write_text(report, render(results, environment(sources), command, files))
    return report
