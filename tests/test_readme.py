"""The script in the README runs as it stands."""

import re

import torch

from tests.conftest import ROOT


def test_the_script_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(script.strip().splitlines()) <= 11
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(script, "README.md", "exec"), names)
    network = names["network"]
    assert isinstance(network, torch.nn.Module)
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_local_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
