"""What README.md claims and a machine can check quickly."""

import re
from pathlib import Path

import pytest
import timm
import torch

import sk_fused
from sk_fused import FusedSelectiveKernel

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """As it stands, but for the download of weights."""
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create_model(name))
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert any(isinstance(module, FusedSelectiveKernel) for module in names["model"].modules())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16 and all(line.split()[-1] == "fused" for line in lines)
    sk_fused.unfuse(names["model"])
    assert not any(isinstance(module, FusedSelectiveKernel) for module in names["model"].modules())


def test_files_and_commands_exist():
    paths = re.findall(r"`((?:sk_fused|csrc|benchmarks|tests)/[\w/.]*)`|\]\((?!http)([\w/.]+)\)", README)
    paths = [path for pair in paths for path in pair if path]
    assert len(paths) >= 8
    assert [path for path in paths if not (ROOT / path).exists()] == []
    targets = re.findall(r"^([\w ]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in re.findall(r"make (\w+)", README):
        assert any(command in target.split() for target in targets), command


def test_only_ours_keeps_channels_last():
    theirs = timm.layers.SelectiveKernel(8).to(memory_format=torch.channels_last)
    ours = FusedSelectiveKernel(8).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last)
    assert ours(x).is_contiguous(memory_format=torch.channels_last)
    assert not theirs(x).is_contiguous(memory_format=torch.channels_last)
