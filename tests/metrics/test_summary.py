import time

import pytest

from torchlethe.functional.summary import average_gap
from torchlethe.metrics import AverageGap, RuntimeMeter, TugOfWar

RUNS = [{"forget_accuracy": 98.0, "test_accuracy": 91.0}, {"forget_accuracy": 90.0, "test_accuracy": 95.0}]
RETRAIN = [{"forget_accuracy": 94.0, "test_accuracy": 94.0}, {"forget_accuracy": 95.0, "test_accuracy": 94.0}]
NAMES = ("forget_accuracy", "test_accuracy")


def feed(metric):
    for run, reference in zip(RUNS, RETRAIN, strict=True):
        metric.update(run, reference)
    return metric.compute().item()


def test_average_over_runs_and_of_means_differ():
    each = [average_gap(run, reference, NAMES) for run, reference in zip(RUNS, RETRAIN, strict=True)]
    assert feed(AverageGap(NAMES)) == sum(each) / 2 == (3.5 + 3.0) / 2
    assert feed(AverageGap(NAMES, over="means")) == (0.5 + 1.0) / 2


def test_tug_of_war_over_runs():
    assert feed(TugOfWar(NAMES)) == pytest.approx((0.96 * 0.97 + 0.95 * 0.99) / 2)


def test_a_missing_metric_is_named():
    with pytest.raises(ValueError, match="metrics lacks forget_accuracy"):
        AverageGap(NAMES).update({"test_accuracy": 1.0}, RETRAIN[0])


def test_laps_add_up_and_exclude_each_other():
    meter = RuntimeMeter()
    meter.start("prepare")
    time.sleep(0.02)
    meter.start("fit")
    assert meter.running == "fit"
    assert meter.stop() == "fit"
    first = meter.seconds
    time.sleep(0.02)
    meter.start("fit")
    time.sleep(0.02)
    assert meter.seconds["fit"] >= first["fit"] + 0.02  # the running lap counts
    meter.stop()
    assert meter.stop() is None
    assert first["prepare"] == meter.seconds["prepare"] >= 0.02
    assert meter.seconds["fit"] < 1


def test_a_meter_continues_from_saved_laps():
    meter = RuntimeMeter()
    meter.load({"fit": 100.0})
    meter.start("fit")
    meter.stop()
    assert 100.0 <= meter.seconds["fit"] < 101.0
