import pytest

from torchlethe.functional.summary import average_gap, metric_gaps, speed_up, tug_of_war

RETRAIN = {"forget_accuracy": 94.0, "remain_accuracy": 100.0, "test_accuracy": 94.0, "mia_entropy_logistic": 76.0}
RUN = {"forget_accuracy": 98.0, "remain_accuracy": 99.0, "test_accuracy": 95.0, "mia_entropy_logistic": 86.0}


def test_average_gap_is_the_mean_of_absolute_differences():
    assert average_gap(RUN, RETRAIN) == (4 + 1 + 1 + 10) / 4
    assert average_gap(RETRAIN, RETRAIN) == 0.0
    assert metric_gaps(RUN, RETRAIN, ["test_accuracy"]) == {"test_accuracy": 1.0}


def test_forget_and_unlearning_accuracy_give_the_same_gap():
    complement = [{"ua": 100 - m["forget_accuracy"]} for m in (RUN, RETRAIN)]
    assert average_gap(*complement, names=["ua"]) == average_gap(RUN, RETRAIN, names=["forget_accuracy"])


def test_tug_of_war_multiplies():
    assert tug_of_war(RUN, RETRAIN) == pytest.approx(0.96 * 0.99 * 0.99)
    assert tug_of_war(RETRAIN, RETRAIN) == 1.0


def test_missing_metrics_are_named():
    with pytest.raises(ValueError, match="reference lacks mia_entropy_logistic"):
        average_gap(RUN, {k: v for k, v in RETRAIN.items() if not k.startswith("mia")})
    with pytest.raises(ValueError, match="names is empty"):
        average_gap(RUN, RETRAIN, names=[])


def test_speed_up_needs_times():
    assert speed_up(2.0, 60.0) == 30.0
    with pytest.raises(ValueError, match=r"seconds is 0\.0, it must be above 0"):
        speed_up(0.0, 60.0)
