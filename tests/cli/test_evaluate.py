"""Judging weights from elsewhere, with real runs on digits."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import small_network
from torchlethe._cli.judge import untrained
from torchlethe.cli import main
from torchlethe.metrics import METRIC_DEFINITIONS
from torchlethe.metrics.evaluation import DIVERGENCES, MEMBERSHIP

NETWORK = "--network SmallCNN --network.num_classes 10 --network.in_channels 1 --network.image_size 8"
DATA = "--data DigitsDataModule --data.eval_batch_size 600 --trainer.accelerator cpu"
FORGET = "--forget ForgetClasses --forget.classes [3]"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with the weights of three networks: a state dict, one with prefixes, a safetensors file."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(small_network(1).state_dict(), folder / "unlearned.pt")
    save_file(small_network(2).state_dict(), folder / "retrained.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in small_network(3).state_dict().items()}}, folder / "old.pth")
    return folder


@pytest.fixture(autouse=True)
def here(weights, monkeypatch):
    monkeypatch.chdir(weights)
    monkeypatch.delenv("LETHE_DEBUG", raising=False)


def evaluate(text):
    return main(["evaluate", *shlex.split(text)])


def test_every_metric_of_a_state_dict(capsys):
    others = "--reference retrained.safetensors --original old.pth"
    assert evaluate(f"unlearned.pt {others} {NETWORK} {DATA} {FORGET} --output all --report --relearning") == 0
    shown = capsys.readouterr().out
    found = json.loads(Path("all/evaluation.json").read_text())
    meta = found.pop("meta")
    expected = {f"mia_{name}" for name in MEMBERSHIP} | {"mia_simple_indiscernibility", "unlearning_accuracy", "zrf"}
    expected |= {f"{name}_to_reference" if name in ("kl", "js") else name for name in DIVERGENCES}
    expected |= {f"{name}_accuracy" for name in ("forget", "remain", "test", "test_forget", "test_remain")}
    expected |= {"average_gap", "tug_of_war", "tug_of_war_mia", "confidence_correlation", "over_forgetting"}
    expected |= {f"{x}_{name}" for x in ("agreement", "correctness_agreement") for name in ("forget", "remain", "test")}
    expected |= {f"{x}_{name}" for x in ("class_drop", "worst_class_drop") for name in ("remain", "test")}
    expected |= {"parameter_distance", "parameter_distance_relative", "relearning_steps", "relearning_ratio"}
    # no run was timed, digits has no validation set here, and sharpness is measured by a callback of its own
    others = {"run_seconds", "speed_up", "validation_accuracy", "validation_gap", "train_loss", "test_loss"}
    others |= {"hessian_trace", "hessian_top_eigenvalue", "m_sharpness"}
    # nor was anything protected or attacked
    others |= {"acc_last", "acc_max", "acc_worst_class", "drop", "gain_over_clean_part"}
    others |= {"test_fooling_ratio", "test_target_success", "test_dominance_1"}
    assert METRIC_DEFINITIONS.keys() - expected == others
    assert expected <= found.keys()
    both = ("zrf", "mia_simple", "test_forget_accuracy", "test_remain_accuracy")
    assert {f"{other}_{name}" for other in ("original", "reference") for name in both} <= found.keys()
    assert meta["weights"]["path"] == "unlearned.pt"
    assert meta["counts"]["forget"] == 122
    for words in ("unlearned.pt", "forget accuracy (%)", "Retrain", "Original", "difference", "all/evaluation.json"):
        assert words in shown

    with np.load("all/evaluation.npz") as arrays:
        assert {f"confidence_forget{x}" for x in ("", "_original", "_reference")} <= set(arrays.files)
    page = Path("all/report.html").read_text()
    assert "Evaluation of unlearned.pt" in page
    assert "Confidence on the forget set: unlearned.pt" in page
    assert "--reference retrained.safetensors" in page
    assert "What each class lost" in page
    assert meta["relearning"]["settings"]["margin"] == 5
    assert {len(values) for values in found["per_class"]["reference"].values()} == {10}
    assert {"table.tex", "figures", "config.yaml"} <= {path.name for path in Path("all").iterdir()}


def test_a_model_judged_as_its_own_reference_has_no_gap(capsys):
    line = f"retrained.safetensors --reference retrained.safetensors {NETWORK} {DATA} --forget 3 --membership headline"
    assert evaluate(f"{line} --output same") == 0
    found = json.loads(Path("same/evaluation.json").read_text())
    assert found["average_gap"] == found["js_to_reference"] == 0
    assert found["completeness"] == 100
    assert found["zrf"] == found["reference_zrf"] < 1
    assert not Path("same/report.html").exists()
    assert evaluate(f"{line} --output same") == 0  # the same weights again
    capsys.readouterr()
    assert evaluate(f"unlearned.pt {NETWORK} {DATA} --forget 3 --output same") == 2
    assert "holds another evaluation; choose another --output" in capsys.readouterr().err


def test_network_data_and_request_from_configurations():
    line = "unlearned.pt --config digits/forget_class.yaml --config digits/evaluate.yaml --membership simple"
    assert evaluate(line) == 0
    found = json.loads(Path("unlearned_evaluation/evaluation.json").read_text())
    assert found["meta"]["counts"]["forget"] == 121  # 15 % of the labels are wrong in this configuration
    assert "mia_simple" in found
    assert "mia_entropy_logistic" not in found
    assert evaluate(f"{line} --forget 3,4 --output two") == 0
    assert json.loads(Path("two/evaluation.json").read_text())["meta"]["counts"]["forget"] > 200


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "the weights to judge come first"),
        (f"{NETWORK} {DATA} {FORGET} unlearned.pt", "the weights to judge come first"),
        (f"gone.pt {NETWORK} {DATA} {FORGET}", "WEIGHTS: there is no file 'gone.pt'"),
        (f"unlearned.pt --reference gone.pt {NETWORK} {DATA} {FORGET}", "--reference: there is no file 'gone.pt'"),
        (f"unlearned.pt {DATA} {FORGET}", "give the name of a network with --network"),
        (f"unlearned.pt {NETWORK} {FORGET}", "give the name of a datamodule with --data"),
        (
            f"unlearned.pt {NETWORK} {DATA}",
            "is not divided: say what was to be forgotten with --forget",
        ),
        (f"unlearned.pt {NETWORK} {DATA} {FORGET} --relearning", "give --original"),
        (f"unlearned.pt {NETWORK} {DATA} --forget 12", "classes contains 12, but must hold numbers from 0 to 9"),
        (f"unlearned.pt {NETWORK} {DATA} --forget Classes", "--forget: there is no class 'Classes'"),
        (f"unlearned.pt {NETWORK} {DATA} {FORGET} --membership entropy_svm", "did you mean 'entropy_svc'"),
        (f"unlearned.pt {NETWORK} {DATA} {FORGET} --refrence old.pth", "unknown argument --refrence"),
        (f"unlearned.pt {NETWORK.replace('8', '16')} {DATA} {FORGET}", "do not fit SmallCNN"),
        (f"notes.txt {NETWORK} {DATA} {FORGET}", "weights 'notes.txt' have the suffix '.txt', allowed are"),
    ],
)
def test_what_is_wrong_is_one_sentence(line, sentence, capsys, tmp_path):
    Path("notes.txt").write_text("no weights")
    assert evaluate(f"{line} --output {tmp_path}/out" if line else line) == 2
    error = [text for text in capsys.readouterr().err.splitlines() if text.startswith("lethe evaluate: error: ")]
    assert len(error) == 1
    assert sentence in error[0]
    assert not list(tmp_path.rglob("evaluation.*"))


def test_an_output_that_is_a_file_is_refused_before_work(capsys):
    assert evaluate(f"unlearned.pt {NETWORK} {DATA} {FORGET} --output unlearned.pt") == 2
    assert "--output is 'unlearned.pt', which is a file; choose a folder" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = (
        "import sys; from torchlethe.cli import main;sys.exit(main(['evaluate', '--help']) or 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stderr
    assert "lethe evaluate WEIGHTS" in found.stdout


def test_an_untrained_network_is_the_same_every_time_and_leaves_the_generator_alone():
    trained = small_network(5)
    state = torch.get_rng_state()
    first, second = untrained(trained), untrained(small_network(6))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(next(iter(first.values())), next(iter(trained.state_dict().values())))
