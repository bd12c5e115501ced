"""``lethe study FILE --explain-metrics``: what each number of a report means."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from torchlethe.metrics.definitions import METRIC_DEFINITIONS, define_metric
from torchlethe.study.results import OWN_DEFINITIONS, SHOWN

READING = {
    "Gap": "A method's value minus the reference's of the same seed and scenario, averaged over seeds.",
    "σ": "The reference's own sample standard deviation over its seeds: the size of the gap divided by it. About 1 σ "
    "is what another seed alone changes in the reference; from few seeds σ is a rough estimate.",
    "×": "A distance to the reference divided by the mean distance between two seeds of the reference, which stands in "
    "the reference's own row. Known where all seeds have the same split and their outputs were recorded.",
}
GOOD = {"reference": "best close to the reference", "higher": "higher is better", "lower": "lower is better"}


def explain_metrics(chosen: Iterable[str], console: Console | None = None) -> int:
    """Print the definition of each metric: first those of the study's table, then all others.

    Args:
        chosen: the study's own choice, empty for the usual metrics.
        console: where to write; standard output by default.

    Returns:
        The exit status.
    """
    console = console or Console(highlight=False)
    first = list(dict.fromkeys(chosen)) or list(SHOWN)
    known = {**METRIC_DEFINITIONS, **OWN_DEFINITIONS}
    console.print(Text("In the table of this study", style="bold"))
    for name in first:
        _show(console, name)
    console.print(Text("\nHow the table compares", style="bold"))
    for title, text in READING.items():
        console.print(Text(title, style="cyan"))
        console.print(Padding(Text(text), (0, 0, 0, 4)))
    console.print(Text("\nOther metrics that an evaluation can hold", style="bold"))
    for name in known:
        if name not in first:
            _show(console, name)
    return 0


def _show(console: Console, name: str) -> None:
    found = OWN_DEFINITIONS.get(name) or define_metric(name)
    if found is None:
        line = Text.assemble((name, "cyan"), "  ", ("not in the catalogue: shown under its own name", "dim"))
        console.print(line)
        return
    unit = f", {found.unit}" if found.unit else ""
    console.print(Text.assemble((name, "cyan"), f"  {found.title}{unit}  ", (GOOD[found.orientation], "dim")))
    console.print(Padding(Text(found.definition), (0, 0, 0, 4)))
