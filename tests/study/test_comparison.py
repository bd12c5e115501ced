"""Beside Retrain in a study: its seeds among themselves, gaps in its spread, and what each class lost."""

import csv
import io
import json

import numpy as np
import pytest

from tests.study.test_report import NUMBERS, STUDY, make, unlearned
from torchlethe.study.collect import collect
from torchlethe.study.figures import inline
from torchlethe.study.heatmap import class_changes, class_panels, heat_map
from torchlethe.study.panels import write_figures
from torchlethe.study.report import render
from torchlethe.study.tables import caption, markdown, table_csv

CLASSES, SAMPLES = 4, 40
ONE = STUDY | {"scenarios": {"one": {"title": "One class"}}, "seeds": [0, 1, 2]}


def recorded(job, split="x", classes=CLASSES, noise=1.0):
    """An evaluation with arrays, in which Retrain's seeds differ by ``noise``."""
    rng = np.random.default_rng([job.seed, sorted(NUMBERS).index(job.stage.name)])
    labels = np.arange(SAMPLES) % classes
    logits = 3.0 * np.eye(classes)[labels] + noise * rng.standard_normal((SAMPLES, classes))
    p = np.exp(logits)[np.arange(SAMPLES), labels] / np.exp(logits).sum(1)
    arrays = {"logits_forget": logits.astype(np.float32)}
    for name in ("forget", "remain", "test"):
        arrays |= {
            f"index_{name}": np.arange(SAMPLES),
            f"label_{name}": labels.astype(np.uint8),
            f"prediction_{name}": logits.argmax(1).astype(np.uint8),
            f"confidence_{name}": p.astype(np.float32),
        }
    np.savez(job.folder / "evaluation.npz", **arrays)
    kept = [None if k == classes - 1 else 100.0 - k - job.seed for k in range(classes)]  # the last is to be forgotten
    lists = {"forget": kept, "remain": kept, "test": [90.0 - k for k in range(classes)]}
    if job.stage.name == "sfron":
        lists["test"] = [lists["test"][0] - 12.0, *lists["test"][1:]]
    found = unlearned(job) | {"agreement_forget": 70.0, "over_forgetting": 1.0, "class_drop_test": 3.0}
    if job.stage.name == "retrain":
        for name in ("agreement_forget", "over_forgetting", "class_drop_test", "kl_to_reference"):
            found.pop(name, None)
    counts = {"forget": SAMPLES, "remain": 100, "test": 200}
    remain = [0 if k == classes - 1 else 25 for k in range(classes)]
    return found | {
        "per_class": {"counts": {"remain": remain}, "accuracy": lists},
        "meta": {"split_hash": split if isinstance(split, str) else split(job.seed), "counts": counts},
    }


@pytest.fixture
def results(tmp_path):
    return collect(*make(tmp_path / "x", ONE, recorded))


def test_the_seeds_of_the_reference_are_compared_with_each_other(results):
    agreement = results.cell("one", "Retrain", "agreement_forget")
    assert len(agreement.values) == 3
    assert 0 < agreement.mean < 100
    kl = results.cell("one", "Retrain", "kl_to_reference")
    assert kl.mean > 0
    method = results.cell("one", "SFRon", "kl_to_reference")
    assert method.in_seed_distances == pytest.approx(method.mean / kl.mean)
    assert method.gap is None
    assert {"agreement_forget", "kl_to_reference", "average_gap"} <= results.between_seeds
    # three seeds of Retrain differ by 1, 1 and 2 points in each of the four metrics of the gap
    assert results.cell("one", "Retrain", "average_gap").values == pytest.approx((1.5, 1.0, 1.5))
    assert results.best("one", "agreement_forget") != "Retrain"
    text = markdown(results)
    assert "(×" in text
    assert "in the row of Retrain its seeds are compared with each other, and × says" in text
    assert 'class="gap">×' in render(results, {}, "x")


@pytest.mark.parametrize("why", ["split", "older", "single"])
def test_seeds_are_not_compared_where_that_means_nothing(tmp_path, why):
    def measure(job):
        found = recorded(job, str if why == "split" else "x")  # each seed divides the data in another way
        if why == "older":
            with np.load(job.folder / "evaluation.npz") as arrays:
                kept = {name: arrays[name] for name in arrays.files if name.startswith("confidence")}
            np.savez(job.folder / "evaluation.npz", **kept)
        return found

    results = collect(*make(tmp_path / "x", ONE | {"seeds": [0] if why == "single" else [0, 1]}, measure))
    assert not results.between_seeds
    assert results.cell("one", "Retrain", "agreement_forget") is None
    assert results.cell("one", "SFRon", "kl_to_reference").in_seed_distances is None
    assert "×" not in markdown(results)
    assert "compared with each other" not in caption(results)


def test_gaps_in_spreads_on_average(results):
    cell = results.cell("one", "SFRon", "average_gap_in_sigma")
    # forget +2, remain −1, test −1, attack +2, with σ = 1 over seeds 0, 1, 2; one of 40 forget samples weighs 2.5
    assert cell.values == pytest.approx(((2 / 2.5 + 1 / 1 + 1 / 1 + 2 / 2.5) / 4,))
    assert results.cell("one", "SFRon", "average_gap_of_means").mean == pytest.approx(1.5)
    assert results.cell("one", "Retrain", "average_gap_in_sigma") is None
    assert results.best("one", "average_gap_in_sigma") == "SFRon"
    assert "average_gap_in_sigma" in results.columns("one")
    assert "avg. gap in σ" in markdown(results)


def test_the_average_of_means_is_at_most_the_average(tmp_path):
    def measure(job):
        found = recorded(job)
        found["forget_accuracy"] += (-1) ** job.seed * 5 * (job.stage.name == "sfron")
        return found

    results = collect(*make(tmp_path / "x", ONE, measure))
    means, each = (results.cell("one", "SFRon", name).mean for name in ("average_gap_of_means", "average_gap"))
    assert means < each


def test_one_seed_has_no_spread_to_count_in(tmp_path):
    results = collect(*make(tmp_path / "x", ONE | {"seeds": [0]}, recorded))
    assert "average_gap" in results.metrics()
    assert not {"average_gap_in_sigma", "average_gap_of_means"} & set(results.metrics())
    assert results.cell("one", "SFRon", "forget_accuracy").interval is None


def test_the_csv_has_t_intervals_and_multiples(results):
    lines = list(csv.DictReader(io.StringIO(table_csv(results))))
    line = next(x for x in lines if (x["method"], x["metric"]) == ("SFRon", "forget_accuracy"))
    assert float(line["t_interval_95"]) == pytest.approx(4.302653 / 3**0.5)  # of 82, 83 and 84
    line = next(x for x in lines if (x["method"], x["metric"]) == ("SFRon", "kl_to_reference"))
    assert float(line["in_reference_seed_distances"]) > 0
    assert "95 % t-interval of the mean: 80.5 to 85.5" in render(results, {}, "x")


def test_what_only_the_others_measured_of_the_reference_is_in_its_row(tmp_path):
    def measure(job):
        more = {"sfron": {"relearning_steps": 10.0, "reference_relearning_steps": 40.0 + job.seed}}
        return recorded(job) | more.get(job.stage.name, {})

    results = collect(*make(tmp_path / "x", ONE, measure))
    assert results.cell("one", "Retrain", "relearning_steps").values == (40.0, 41.0, 42.0)
    assert results.cell("one", "Retrain", "relearning_ratio").values == (1.0, 1.0, 1.0)
    assert results.cell("one", "SFRon", "relearning_steps").gap == -31.0
    assert "| 10.0 ± 0.0 (−31.0, 31 σ) |" in markdown(results)
    assert results.cell("one", "Retrain", "forget_accuracy").values[0] == NUMBERS["retrain"][0]  # its own counts


def test_each_class_beside_retrain(results, tmp_path):
    changes = class_changes(results, "one", "SFRon", "test")
    np.testing.assert_allclose(changes, [-12.0, 0.0, 0.0, 0.0])
    assert np.isnan(class_changes(results, "one", "SFRon", "remain")[-1])
    panels = class_panels(results, "one")
    assert [panel.title for panel in panels] == ["Test set", "Remaining training set"]
    svg = inline(panels[0])
    assert ">(3)</text>" in svg  # to be forgotten
    assert ">−12</text>" in svg
    assert "full colour: 12 points" in svg
    html = render(results, {}, "x")
    assert "What each class lost" in html
    names = [path.name for path in write_figures(results, tmp_path / "figures")]
    assert {"classes.png", "classes.pdf"} <= set(names)


def test_of_many_classes_those_that_changed_most(tmp_path):
    results = collect(*make(tmp_path / "x", ONE, lambda job: recorded(job, classes=30)))
    (panel, _) = class_panels(results, "one")
    assert panel.title == "Test set: 20 of 30 classes"
    assert ">−12</text>" in inline(panel) or ">0</text>" in inline(panel)
    long = heat_map(["A method with a very long name"], ["aeroplane", "ship"], np.array([[np.nan, -3.0]]), 5.0, "x")
    assert "A method with a ver…" in inline(long)


def test_an_older_evaluation_has_no_classes_and_is_collected_all_the_same(tmp_path):
    results = collect(*make(tmp_path / "x", ONE))
    assert results.cell("one", "SFRon", "forget_accuracy").mean == 83.0
    assert class_panels(results, "one") == []
    assert "What each class lost" not in render(results, {}, "x")
    broken = tmp_path / "y"
    results = collect(*make(broken, ONE, lambda job: json.loads(json.dumps(recorded(job) | {"per_class": None}))))
    assert class_panels(results, "one") == []
