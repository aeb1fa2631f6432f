"""What README.md claims and a machine can check quickly."""

import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sk_fused
from sk_fused import FusedSelectiveKernel

from .parity import assert_parity, batches

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FUSE, OWN = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """As it stands, but for the download of weights."""
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create_model(name))
    names: dict = {}
    exec(FUSE, names)
    assert any(isinstance(module, FusedSelectiveKernel) for module in names["model"].modules())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16 and all(line.split()[-1] == "fused" for line in lines)
    sk_fused.unfuse(names["model"])
    assert not any(isinstance(module, FusedSelectiveKernel) for module in names["model"].modules())


@pytest.mark.parametrize("mode", ["train", "eval", "momentum None"])
def test_the_unit_of_a_network_of_ones_own(mode: str):
    """Against the same layers, called one by one."""
    names: dict = {}
    exec(OWN, names)

    class Called(names["Unit"]):
        def forward(self, x: Tensor) -> Tensor:
            us = [F.silu(bn(conv(x))) for conv, bn in zip(self.convs, self.bns)]
            h = F.relu(self.attn_bn(self.reduce(sum(us).mean((2, 3)))))
            a = self.select(h).unflatten(1, (2, -1)).softmax(1)[..., None, None]
            return a[:, 0] * us[0] + a[:, 1] * us[1]

    ours = names["Unit"](8, 6)
    theirs = Called(8, 6)
    theirs.load_state_dict(ours.state_dict())
    for unit in (ours, theirs):
        for module in unit.modules():
            if mode == "momentum None" and isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.momentum = None
        unit.train(mode != "eval")
    assert_parity(ours, theirs, batches(3, (4, 8, 6, 5)))
    assert ours.attn_bn.num_batches_tracked == ours.bns[0].num_batches_tracked == (0 if mode == "eval" else 3)


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
