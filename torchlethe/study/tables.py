"""The table of a study as Markdown, CSV and LaTeX, and its numbers as people write them."""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Sequence

from torchlethe.study.results import Cell, Results

DASH = "–"
GREEK = """
    alpha beta gamma delta varepsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau varphi chi psi omega
    Delta Lambda Sigma Omega
"""
LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "[": "{[}",  # behind the end of a row a bracket would be its spacing
    "]": "{]}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "→": r"$\to$",
    "·": r"$\cdot$",
    "∞": r"$\infty$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
    "\N{NO-BREAK SPACE}": "~",
    "\N{NARROW NO-BREAK SPACE}": r"\,",
    **{letter: f"$\\{name}$" for letter, name in zip("αβγδεζηθκλμνξπρστφχψωΔΛΣΩ", GREEK.split(), strict=True)},
}


def digits(value: float, unit: str = "") -> int:
    """How many decimals a number of this size deserves."""
    if unit in ("%", "×", "steps"):
        return 1
    if unit == "s":
        return 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    if abs(value) >= 1000:
        return 0
    if abs(value) >= 1 or value == 0:
        return 1 if abs(value) >= 10 or value == 0 else 2
    return min(2 - math.floor(math.log10(abs(value))), 6)


def number(value: float, unit: str = "", decimals: int | None = None) -> str:
    """A number with as many decimals as it deserves, with a true minus sign.

    Args:
        value: the number.
        unit: its unit, as in a :class:`~torchlethe.metrics.MetricDefinition`.
        decimals: how many decimals to show instead.

    Example:
        >>> number(97.1234, "%"), number(0.4567, "nats"), number(-0.01, "%"), number(0.00123), number(2.5e-7)
        ('97.1', '0.457', '0.0', '0.00123', '2.5e−7')
    """
    if decimals is None and unit not in ("%", "×", "s", "steps") and (0 < abs(value) < 1e-5 or abs(value) >= 1e7):
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    text = f"{value:.{digits(value, unit) if decimals is None else decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def std_text(cell: Cell, unit: str) -> str | None:
    """The standard deviation with the decimals of its mean; None for a single seed."""
    return None if cell.std is None else number(cell.std, unit, digits(cell.mean, unit))


def spread(cell: Cell, unit: str) -> str:
    """Mean and standard deviation as text."""
    std = std_text(cell, unit)
    return number(cell.mean, unit) + (f" ± {std}" if std is not None else "")


def signed(value: float, unit: str = "") -> str:
    """A difference with its sign."""
    text = number(value, unit)
    return text if text.startswith("−") or not text.strip("0.") else f"+{text}"


def in_spreads(cell: Cell) -> str | None:
    """The gap in standard deviations of the reference, such as ``2.8 σ``; None where there is none."""
    size = cell.gap_in_spreads
    if size is None:
        return None
    return "≥ 100 σ" if size >= 99.5 else f"{size:.0f} σ" if size >= 9.95 else f"{size:.1f} σ"


def in_seed_distances(cell: Cell) -> str | None:
    """A distance as a multiple of that between the reference's seeds, such as ``×2.9``; None where there is none."""
    size = cell.in_seed_distances
    if size is None:
        return None
    return "≥ ×100" if size >= 99.5 else f"×{size:.0f}" if size >= 9.95 else f"×{size:.1f}"


def gap_text(cell: Cell, unit: str, separator: str = ", ") -> str | None:
    """The gap and, where known, its size in spreads; of a distance, its size in those between the reference's seeds."""
    if cell.gap is None:
        return in_seed_distances(cell)
    return separator.join(text for text in (signed(cell.gap, unit), in_spreads(cell)) if text)


def heading(results: Results, metric: str) -> str:
    """A column's head with its unit."""
    found = results.definition(metric)
    return f"{found.title} / {found.unit}" if found.unit and found.unit != "×" else found.title


def markdown(results: Results) -> str:
    """The table of every scenario in Markdown: mean ± standard deviation over seeds, difference to the reference."""
    lines = [f"# {results.name}", ""]
    if results.description:
        lines += [results.description, ""]
    for scenario in results.scenarios:
        columns = results.columns(scenario)
        if results.headed:
            lines += [f"## {results.titles[scenario]}", ""]
        lines.append(_row(["method", *(heading(results, name) for name in columns)]))
        lines.append(_row(["---", *("---:" for _ in columns)]))
        for method in results.rows(scenario):
            cells = []
            for name in columns:
                cell, unit = results.cell(scenario, method, name), results.definition(name).unit
                text = spread(cell, unit) if cell else DASH
                if cell and (gap := gap_text(cell, unit)):
                    text += f" ({gap})"
                cells.append(f"**{text}**" if results.best(scenario, name) == method else text)
            lines.append(_row([method, *cells]))
        lines.append("")
    lines += [caption(results), ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def caption(results: Results, place: str = "in parentheses") -> str:
    """What the numbers of the table are, in words.

    Args:
        results: the results.
        place: where the table shows the difference to the reference.
    """
    seeds = len(results.seeds)
    text = f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed"
    cells = _cells(results)
    compared = [cell for cell in cells if cell.gap is not None]
    if results.reference and compared:
        text += f"; {place} the difference to {results.reference}"
        if any(cell.spread for cell in compared):
            text += f", and its size in standard deviations σ of {results.reference} over its seeds"
            if not all(cell.spread for cell in compared):
                text += " (left out where all seeds agree)"
        elif seeds > 1:
            text += f" (no sizes in standard deviations, as {results.reference} has the same value for all seeds)"
        else:
            text += f" (one seed gives no spread of {results.reference} to compare it with)"
    between = [name for s in results.scenarios for name in results.columns(s) if name in results.between_seeds]
    if between:
        text += f"; in the row of {results.reference} its seeds are compared with each other"
        if any(cell.seed_distance for cell in cells):
            text += ", and × says how many times as far from it a method is"
    if any(results.best(s, m) for s in results.scenarios for m in results.columns(s)):
        goals = {results.better(m) for s in results.scenarios for m in results.columns(s) if results.best(s, m)}
        words = {"reference": f"closest to {results.reference}", "lower": "lowest", "higher": "highest"}
        *front, last = (word for goal, word in words.items() if goal in goals)
        text += f"; the best of each column is bold ({' or '.join([', '.join(front), last] if front else [last])})"
        if any(results.better(m) is None for s in results.scenarios for m in results.columns(s)):
            text += ", where it is known what is good"
    text += "."
    if results.missing:
        text += f" Not measured: {', '.join(results.missing)}."
    return text


def _cells(results: Results) -> list[Cell]:
    return [
        cell
        for scenario in results.scenarios
        for method in results.methods
        for name in results.columns(scenario)
        if (cell := results.cell(scenario, method, name))
    ]


def table_csv(results: Results) -> str:
    """Every metric in a tidy table: one line per scenario, method and metric, one column per seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    gaps = ("gap_to_reference", "reference_std", "gap_in_reference_std", "in_reference_seed_distances")
    seeds = [f"seed_{seed}" for seed in results.seeds]
    writer.writerow(["scenario", "method", "metric", "unit", "mean", "std", "t_interval_95", "runs", *gaps, *seeds])
    for scenario in results.scenarios:
        for method in results.methods:
            by_seed = {run.seed: run.metrics for run in results.select(scenario, method)}
            for name in results.metrics(scenario):
                if (cell := results.cell(scenario, method, name)) is None:
                    continue
                values = [by_seed.get(seed, {}).get(name, "") for seed in results.seeds]
                known = [cell.std, cell.interval, len(cell.values)]
                known += [cell.gap, cell.spread, cell.gap_in_spreads, cell.in_seed_distances]
                optional = ["" if value is None else value for value in known]
                unit = results.definition(name).unit
                writer.writerow([scenario, method, name, unit, cell.mean, *optional, *values])
    return text.getvalue()


def latex(results: Results) -> str:
    r"""The table of every scenario for ``\input`` into a paper; it needs the package booktabs and nothing else.

    Below each method's mean ± standard deviation stands a line with the differences to the reference.
    """
    lines = [
        r"% \input this file into a document with \usepackage{booktabs}.",
        "% Too wide? List fewer metrics under `metrics:` in the study file.",
    ]
    for scenario in results.scenarios:
        columns = results.columns(scenario)
        title = results.name + (f": {results.titles[scenario]}" if results.headed else "")
        lines += [
            r"\begin{table}[t]",
            r"  \centering",
            rf"  \caption{{{escape(title)}. {escape(caption(results, 'below it'))}}}",
            rf"  \label{{tab:{re.sub(r'[^A-Za-z0-9]+', '-', scenario)}}}",
            r"  \footnotesize",
            r"  \setlength{\tabcolsep}{4pt}",
            rf"  \begin{{tabular}}{{@{{}}l{'r' * len(columns)}@{{}}}}",
            r"    \toprule",
            "    " + " & ".join(["Method", *(_stacked(heading(results, name)) for name in columns)]) + r" \\",
            r"    \midrule",
        ]
        for method in results.rows(scenario):
            values, gaps = [escape(method)], [""]
            for name in columns:
                cell, unit = results.cell(scenario, method, name), results.definition(name).unit
                mean = escape(number(cell.mean, unit)) if cell else "--"
                if cell and results.best(scenario, name) == method:
                    mean = rf"\textbf{{{mean}}}"
                if cell and (std := std_text(cell, unit)):
                    mean += rf" {{\scriptsize$\pm$ {escape(std)}}}"
                values.append(mean)
                gap = gap_text(cell, unit) if cell else None
                gaps.append(rf"\scriptsize {escape(gap)}" if gap else "")
            lines.append(f"    {' & '.join(values)} \\\\")
            if any(gaps):
                lines.append(f"    {' & '.join(gaps)} \\\\[2pt]")
        lines += [r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def escape(text: str) -> str:
    r"""Text for LaTeX.

    Example:
        >>> print(escape("a_b & 10 % ± 2 σ"))
        a\_b \& 10 \% $\pm$ 2 $\sigma$
    """
    return "".join(LATEX.get(sign, sign) for sign in _one_line(text))


def _one_line(text: str) -> str:
    return re.sub(r"[ \t\r\n]+", " ", text)


def _stacked(text: str) -> str:
    """A long head on several lines."""
    lines = textwrap.wrap(text.replace("_", "_ "), 13, break_long_words=False)
    escaped = [escape(line.replace("_ ", "_")) for line in lines]
    stack = r"\\".join(escaped)
    return stack if len(escaped) == 1 else rf"\shortstack[r]{{{stack}}}"
