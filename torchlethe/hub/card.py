"""The model card: what the weights are, how they were made, what was measured, how to load them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from torchlethe import __version__
from torchlethe._cli.catalog import entries
from torchlethe.metrics.definitions import define_metric

TEMPLATE = Path(__file__).with_name("card.md.j2")
OTHERS = ("original", "reference")


@dataclass
class Facts:
    """What is known about the weights; whatever is missing is left out of the card.

    Attributes:
        title: the name of the model.
        licence: as the Hub names it.
        repository: where on the Hub, or empty.
        tensors: the weights by name.
        config: of the run, as LightningCLI writes it.
        command: of the run, when it was the stage of a study.
        evaluation: the content of its ``evaluation.json``.
        report: the name of the study's report, or empty.
        table: the study's table in Markdown.
    """

    title: str
    licence: str
    repository: str = ""
    tensors: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    report: str = ""
    table: str = ""


def card(facts: Facts) -> str:
    """Write the model card.

    Args:
        facts: what is known.

    Returns:
        Markdown with the Hub's YAML header.
    """
    model = _mapping(facts.config.get("model"))
    arguments = _mapping(model.get("init_args"))
    data, request = data_and_request(facts.config)
    method = _name(model)
    results = metric_rows(facts.evaluation)
    tags = ["lethe", *(["machine-unlearning"] if request else [])]
    header = ModelCardData(
        license=facts.licence,
        library_name="torchlethe",
        pipeline_tag="image-classification" if arguments.get("num_classes") else None,
        tags=tags,
        model_name=facts.title,
        eval_results=_model_index(facts, data, request) or None,
    )
    meta = _mapping(facts.evaluation.get("meta"))
    summary = next((entry.summary for entry in entries("modules") if entry.name == method), "")
    content = ModelCard.from_template(
        header,
        template_path=str(TEMPLATE),
        facts=facts,
        version=__version__,
        method=method,
        what=f"{summary[:1].lower()}{summary[1:]}",
        arguments=arguments,
        network=_name(_mapping(arguments.get("network"))),
        parameters=sum(value.numel() for value in facts.tensors.values()),
        names=[name for name in facts.tensors if name.endswith("weight")][:3] or list(facts.tensors)[:3],
        normalised=any(name.rpartition(".")[2] == "mean" for name in facts.tensors),
        loading=loading_code(arguments.get("network")),
        data=_text(data),
        request=_text(request),
        meta=meta,
        seconds=_mapping(meta.get("seconds")),
        counts=", ".join(f"{number} {name}" for name, number in _mapping(meta.get("counts")).items()),
        results=results,
        others=[other for other in OTHERS if any(row[other] for row in results)],
    )
    return str(content)


def data_and_request(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The data and the forget request of a configuration, each as ``class_path`` and ``init_args``, or empty.

    Args:
        config: of a run.

    Example:
        >>> data_and_request({"data": {"class_path": "DigitsDataModule"}})
        ({'class_path': 'DigitsDataModule'}, {})
    """
    outer = _mapping(config.get("data"))
    arguments = _mapping(outer.get("init_args"))
    inner = _mapping(arguments.get("data"))
    return (inner, _mapping(arguments.get("forget"))) if inner else (outer, {})


def metric_rows(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """The lines of the table of results.

    Args:
        evaluation: the content of an ``evaluation.json``.

    Returns:
        Texts by the names ``title``, ``value``, ``original``, ``reference`` and ``meaning``.

    Example:
        >>> metric_rows({"test_accuracy": 97.25, "reference_test_accuracy": 98})[0]["reference"]
        '98'
    """
    rows = []
    for name in evaluation:
        if name.startswith(tuple(f"{other}_" for other in OTHERS)) or not _is_number(evaluation[name]):
            continue
        definition = define_metric(name)
        unit = f" ({definition.unit})" if definition and definition.unit else ""
        row = {"title": (definition.title if definition else name) + unit, "value": f"{evaluation[name]:.4g}"}
        for other in OTHERS:
            value = evaluation.get(f"{other}_{name}")
            row[other] = f"{value:.4g}" if _is_number(value) else ""
        rows.append(row | {"meaning": definition.definition if definition else ""})
    return rows


def loading_code(network: Any) -> str:
    """Python that builds the network of a configuration and loads the weights; empty when that is unknown.

    Args:
        network: ``class_path`` and ``init_args``, nested.

    Example:
        >>> print(loading_code({"class_path": "torchlethe.models.MLP", "init_args": {"num_classes": 10}}))
        from torchlethe.io import load_weights
        from torchlethe.models import MLP
        <BLANKLINE>
        network = MLP(num_classes=10)
        load_weights(network, "model.safetensors").eval()
    """
    if "class_path" not in _mapping(network):
        return ""
    names: dict[str, str] = {"load_weights": "torchlethe.io"}
    expression = _expression(network, names)
    lines = [f"from {module} import {name}" for name, module in names.items() if module]
    return "\n".join(
        [*sorted(lines), "", f"network = {expression}", 'load_weights(network, "model.safetensors").eval()']
    )


def _expression(value: Any, names: dict[str, str]) -> str:
    """A value as Python writes it; classes and factories become calls, whose imports are collected."""
    if isinstance(value, Mapping) and "class_path" in value:
        module, _, name = str(value["class_path"]).rpartition(".")
        if names.setdefault(name, module) != module:  # another class of this name is imported already
            names[module] = ""
            name = f'__import__("{module}", fromlist=["{name}"]).{name}'
        arguments = dict(_mapping(value.get("init_args")))
        if "pretrained" in arguments:
            arguments["pretrained"] = False  # its own weights are loaded next
        return f"{name}({', '.join(f'{key}={_expression(item, names)}' for key, item in arguments.items())})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_expression(item, names)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_expression(item, names) for item in value) + "]"
    return repr(value)


def _model_index(facts: Facts, data: Mapping[str, Any], request: Mapping[str, Any]) -> list[EvalResult]:
    """The metrics of the model itself, in the form in which the Hub shows and searches them."""
    name = _name(data).removesuffix("DataModule") or "unknown"
    arguments = {"forget": request or None, "split_hash": _mapping(facts.evaluation.get("meta")).get("split_hash")}
    arguments = {key: value for key, value in arguments.items() if value}
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=name.lower(),
            dataset_name=name,
            dataset_args=arguments or None,
            metric_type=key,
            metric_name=definition.title if (definition := define_metric(key)) else key,
            metric_value=round(float(value), 6),
        )
        for key, value in facts.evaluation.items()
        if _is_number(value) and not key.startswith(tuple(f"{other}_" for other in OTHERS))
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _name(spec: Mapping[str, Any]) -> str:
    return str(spec.get("class_path", "")).rpartition(".")[2]


def _text(value: Mapping[str, Any]) -> str:
    """YAML without what is not set."""
    return yaml.safe_dump(_set(value), sort_keys=False).strip() if value else ""


def _set(value: Any) -> Any:
    return {key: _set(item) for key, item in value.items() if item is not None} if isinstance(value, Mapping) else value
