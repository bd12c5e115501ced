"""Stages that run in some of a study's scenarios."""

import pytest
import yaml

from torchlethe._cli.errors import UsageError
from torchlethe.study import load_study, plan_jobs

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
