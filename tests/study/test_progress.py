"""What a study shows while it runs."""

import io
import re

import pytest
from rich.console import Console

from tests.study.stages import plan
from torchlethe.study.progress import Display
from torchlethe.study.runner import Outcome, write_json


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return plan({"a": {}, "b": {}}, seeds=(0, 1))


def test_lines_where_there_is_no_terminal(jobs):
    text = io.StringIO()
    with Display(Console(file=text, width=40), jobs, workers=2) as display:
        assert display.remaining() is None
        for job in jobs[:2]:
            display.start(job)
        display.end(Outcome(jobs[0], "done", 10.0))
        display.end(Outcome(jobs[1], "failed", 20.0, "no"))
        display.end(Outcome(jobs[2], "kept", 20.0))
        display.end(Outcome(jobs[3], "blocked", 0.0))
    assert text.getvalue().splitlines() == [
        "✓ a · all · seed 0 10.0 s (1 of 4, about 15 s left)",
        "✗ a · all · seed 1 20.0 s (2 of 4, about 10 s left)",
        "– b · all · seed 1 0.0 s (4 of 4)",
    ]


def test_the_time_left_is_known_from_the_last_time(jobs):
    for job in jobs:
        write_json(job.folder / "done.json", {"seconds": 100.0 if job.stage.name == "a" else 10.0})
    display = Display(Console(file=io.StringIO()), jobs, workers=1)
    assert display.remaining() == 220
    display.end(Outcome(jobs[0], "done", 100.0))
    assert display.remaining() == 120
    assert display.counts() == "1 of 4, about 2 min left"


def test_a_terminal_shows_what_runs(jobs):
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100, color_system=None)
    with Display(console, jobs) as display:
        display.start(jobs[0])
        display.end(Outcome(jobs[2], "done", 60.0))
        display.live.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())
    assert "1 of 4, about 3 min left, 1 running" in shown
    assert "a · all · seed 0  0 s" in shown
    assert "✓ b · all · seed 0 60.0 s" in shown
