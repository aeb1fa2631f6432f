"""Mixed precision: autocast with GradScaler, parameters in half precision, and parameters of mixed precision."""

import pytest
import torch
from torch import Tensor, nn

from .parity import LAYOUTS, assert_all_within, assert_parity, batches, pair

HALF = [torch.bfloat16, torch.float16]


def steps(unit: nn.Module, xs: list[Tensor], dtype: torch.dtype, enabled: bool = True) -> tuple[dict[str, Tensor], list[float]]:
    """Parameters and buffers after training by SGD on xs with a GradScaler, and the scale after every step."""
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
    scales = []
    for x in xs:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = unit(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return {name: value.clone() for name, value in unit.state_dict().items()}, scales


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_training_under_autocast_with_a_grad_scaler(dtype: torch.dtype, backend: str):
    ours, theirs = pair(in_channels=16)
    exact = pair(in_channels=16)[1].double()
    xs = batches(3, (4, 16, 9, 8))
    results = [steps(ours, xs, dtype), steps(theirs, xs, dtype), steps(exact, [x.double() for x in xs], dtype, enabled=False)]
    assert results[0][1] == results[1][1]
    assert_all_within(*(state for state, _ in results))


@pytest.mark.parametrize("groups", [1, 4])
def test_an_infinite_gradient_reaches_the_scaler(groups: int, backend: str):
    """The scale is halved and the step skipped, as with timm."""
    arguments = dict(in_channels=16, groups=groups, split_input=groups == 1)
    for unit in pair(**arguments):
        before = {name: value.clone() for name, value in unit.named_parameters()}
        x = torch.randn(4, 16, 6, 6)
        optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        with torch.autocast("cpu", dtype=torch.float16):
            v = unit(x)
        g = torch.ones_like(v)
        g[1, 2, 3, 3] = float("inf")
        (scaler.scale(v.float().mul(0).sum()) + (v * g).float().sum()).backward()
        assert any(not p.grad.isfinite().all() for p in unit.parameters())
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**9
        assert all(torch.equal(value, before[name]) for name, value in unit.named_parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norms_in_float32_beside_convolutions_in_half_precision(mode: str, dtype: torch.dtype, layout: str, backend: str):
    """What timm accepts: the branches' batch-norms in float32, everything else in half precision."""
    units = pair(dtype, layout, in_channels=16)
    for unit in units:
        unit.train(mode == "train")
        for path in unit.paths:
            path.bn.float()
    assert_parity(*units, batches(2, (4, 16, 7, 6), dtype, layout))


def test_dtypes_that_timm_refuses_are_refused_by_name():
    ours, _ = pair(in_channels=16)
    with pytest.raises(TypeError, match="x: expected torch.float32, the dtype of the weights, got torch.bfloat16"):
        ours(torch.randn(2, 16, 5, 5, dtype=torch.bfloat16))


def test_half_and_back():
    ours, theirs = pair(in_channels=16)
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        cast(ours), cast(theirs)
        dtype = next(ours.parameters()).dtype
        assert_parity(ours.eval(), theirs.eval(), batches(1, (2, 16, 5, 5), dtype))


def test_output_under_autocast_has_its_dtype():
    ours, _ = pair(in_channels=16)
    for dtype in HALF:
        with torch.autocast("cpu", dtype=dtype):
            assert ours(torch.randn(2, 16, 5, 5)).dtype == dtype
