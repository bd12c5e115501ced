"""Stages that run in some of a study's scenarios."""

from pathlib import Path

import pytest
import yaml

from torchlethe._cli.errors import UsageError
from torchlethe.study import load_study, plan_jobs
from torchlethe.study.results import Results, Run
from torchlethe.study.tables import latex, markdown

SCENARIOS = {"whole_class": {"title": "A class"}, "random": {}}


def study(folder, stages, **top):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"seeds": [0, 1], "scenarios": SCENARIOS, "stages": stages, **top}))
    return load_study(path)


def test_a_stage_runs_where_it_is_meant_to(tmp_path):
    stages = {
        "original": {"per": ["seed"]},
        "unsir": {"method": "UNSIR", "scenarios": ["whole_class"], "set": {"w": "${original.weights}"}},
        "repair": {"method": "Repaired", "scenarios": "whole_class", "set": {"w": "${unsir.weights}"}},
        "sfron": {"method": "SFRon", "set": {"w": "${original.weights}"}},
    }
    jobs = plan_jobs(study(tmp_path, stages), tmp_path)
    where = {(job.stage.name, job.scenario and job.scenario.name) for job in jobs}
    assert where == {
        ("original", None),
        ("unsir", "whole_class"),
        ("repair", "whole_class"),
        ("sfron", "whole_class"),
        ("sfron", "random"),
    }
    assert len(jobs) == 2 * 5


@pytest.mark.parametrize(
    ("stages", "top", "parts"),
    [
        ({"a": {"scenarios": ["randon"]}}, {}, ["'stages.a.scenarios' names 'randon'", "random"]),
        ({"a": {"scenarios": []}}, {}, ["'stages.a.scenarios' is []"]),
        ({"a": {"scenarios": ["random"], "per": ["seed"]}}, {}, ["'stages.a.scenarios'", "runs per scenario"]),
        ({"a": {"scenarios": ["random"]}, "b": {"needs": ["a"]}}, {}, ["'stages.b'", "'whole_class'", "'a'"]),
        (
            {"a": {"method": "Retrain", "scenarios": ["random"]}},
            {"reference": "a"},
            ["'stages.a.scenarios'", "'reference'"],
        ),
    ],
    ids=["misspelt", "empty", "not per scenario", "needed elsewhere", "reference"],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, stages, top, parts):
    with pytest.raises(UsageError) as caught:
        study(tmp_path, stages, **top)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_table_has_the_rows_of_its_scenario_only():
    def run(method, scenario):
        return Run(method, scenario, 0, {"forget_accuracy": 50.0}, Path("none.npz"))

    runs = (run("UNSIR", "whole_class"), run("SFRon", "whole_class"), run("SFRon", "random"))
    titles = {"whole_class": "A class", "random": "A tenth"}
    results = Results(name="Both", description="", seeds=(0,), titles=titles, runs=runs, outcomes=())
    first, second = markdown(results).split("## A tenth")
    assert "| UNSIR |" in first
    assert "UNSIR" not in second
    assert latex(results).count("UNSIR") == 1
