"""Two processes on this machine against one: DistributedDataParallel, synchronised batch-norms, FSDP2.

The processes run every scenario once, and leave what they got in files; the tests hold that against timm's unit in this
process, on the joined batch."""

import copy
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import harness

harness.let_timm_import()

import timm.layers  # noqa: E402

import sk_fused  # noqa: E402

from .parity import assert_all_within, freeze, pair, step  # noqa: E402

RANKS = 2
# The two roads: convolutions of PyTorch's and of the package's own.
UNITS = {
    "split": dict(in_channels=16, act_layer=nn.SiLU, keep_3x3=False),
    "groups": dict(in_channels=16, groups=4, split_input=False),
}
CONVERTERS = {"torch": nn.SyncBatchNorm.convert_sync_batchnorm, "timm": timm.layers.convert_sync_batchnorm}
# Images on each of the two processes.
SIZES = {"equal": (4, 4), "unequal": (5, 2), "one image each": (1, 1), "none on one": (6, 0)}


def part(tensor: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    return tensor.split(sizes)[rank]


def data(batch: int, channels: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x and the gradient of the output. The images of x differ in contrast, as photographs do; were they alike, the batch-norm of
    the attention, over two of them, would blow up every rounding error."""
    torch.manual_seed(batch + 1000 * seed)
    contrast = torch.linspace(0.5, 2, batch)[:, None, None, None]
    return contrast * torch.randn(batch, channels, 7, 6), torch.randn(batch, channels, 7, 6)


def several(batch: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of as many steps: the error of one is one draw of chance, and one process against two of them is ours against ours, as
    exact."""
    return [data(batch, seed=seed) for seed in range(32)]


def assert_as_exact(ours: Sequence[dict[str, Tensor]], theirs: Sequence[dict[str, Tensor]], exact: Sequence[dict[str, Tensor]]) -> None:
    """The parity rule for what steps typically err, by the geometric mean of their errors. The largest error is that of the step
    that is conditioned worst, one draw again: of two such draws of ours one is often three times, and was six times, the other. Ten
    times is another step."""
    for one, other, right in zip(ours, theirs, exact, strict=True):
        assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in right.items()} and one.keys() == other.keys()
    for name in exact[0]:
        if not exact[0][name].is_floating_point():
            assert all(torch.equal(one[name], other[name]) for one, other in zip(ours, theirs, strict=True)), name
            continue
        ulp = [torch.finfo(torch.float32).eps * step[name].abs().max().item() for step in exact]
        errors = [
            [harness.error_of(step[name], right[name]) + size for step, right, size in zip(steps, exact, ulp, strict=True)] for steps in (ours, theirs)
        ]
        typical, largest = [statistics.geometric_mean(of) for of in errors], [max(of) for of in errors]
        assert typical[0] <= 2 * typical[1], f"{name}: typical error {typical[0]:.3g}, theirs {typical[1]:.3g}"
        assert largest[0] <= 10 * largest[1], f"{name}: largest error {largest[0]:.3g}, theirs {largest[1]:.3g}"


def scenarios(rank: int) -> dict[str, dict]:
    results = {}
    for name, arguments in UNITS.items():
        for mode in ("train", "frozen"):
            unit = pair(**arguments)[0]
            ddp = nn.parallel.DistributedDataParallel(freeze(unit) if mode == "frozen" else unit, broadcast_buffers=False)
            x, g = (part(tensor, SIZES["equal"], rank) for tensor in data(8))
            results[f"ddp {name} {mode}"] = step(ddp, x, g, torch.enable_grad())
        for converter, convert in CONVERTERS.items():
            for order in ("fused first", "converted first"):
                for batch, sizes in SIZES.items():
                    ours, theirs = pair(**arguments)
                    if order == "converted first":
                        unit = convert(theirs)
                        sk_fused.fuse(unit)
                    else:
                        unit = convert(ours)
                    with Collectives() as collectives:
                        steps = [step(unit, *(part(tensor, sizes, rank) for tensor in both), torch.enable_grad()) for both in several(sum(sizes))]
                    results[f"sync {name} {converter} {order} {batch}"] = {"collectives": collectives.names, "why_not": unit.why_not(), "steps": steps}
        compiled = CONVERTERS["timm"](pair(**arguments)[0])
        compiled.compile(fullgraph=True)
        results[f"compiled {name}"] = [
            step(compiled, *(part(tensor, SIZES["unequal"], rank) for tensor in both), torch.enable_grad()) for both in several(7)
        ]
    unit = sk_fused.FusedSelectiveKernelAttn(6, 2, 5)
    nn.init.normal_(unit.fc_select.weight, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(unit.fc_reduce.weight, generator=torch.Generator().manual_seed(1))
    u, g = part(data(7, 12)[0].view(7, 2, 6, 7, 6), SIZES["unequal"], rank), part(data(7, 12)[1][..., :1, :1].view(7, 2, 6, 1, 1), SIZES["unequal"], rank)
    results["sync attention"] = step(CONVERTERS["torch"](unit), u, g, torch.enable_grad())
    unit = CONVERTERS["timm"](pair(**UNITS["split"])[0])
    with pytest.raises(RuntimeError, match="use BatchNorm2d instead of SyncBatchNorm"):
        x = data(4)[0].requires_grad_()
        torch.autograd.grad(unit(x).sum(), x, create_graph=True)
    results["fsdp"] = fully_sharded(rank)
    return results


def network() -> nn.Sequential:
    """In eval, where the batch can be taken apart."""
    return nn.Sequential(nn.Conv2d(16, 16, 1), *(pair(**arguments)[1] for arguments in UNITS.values())).eval()


def fully_sharded(rank: int) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = network()
    sk_fused.fuse(model)
    mesh = init_device_mesh("cpu", (RANKS,))
    for unit in (*model[1:], model):
        fully_shard(unit, mesh=mesh)
    assert all(unit.why_not() is None for unit in model[1:])
    x, g = (part(tensor, SIZES["equal"], rank) for tensor in data(8))
    result = step(model, x, g, torch.enable_grad())
    return {key: value.full_tensor() if isinstance(value, torch.distributed.tensor.DTensor) else value for key, value in result.items()}


class Collectives:
    """What torch.distributed is asked for meanwhile."""

    def __enter__(self) -> "Collectives":
        self.names: list[str] = []
        self.originals = {name: getattr(dist, name) for name in ("all_gather_into_tensor", "all_gather", "all_reduce", "broadcast", "reduce_scatter_tensor")}
        for name, original in self.originals.items():
            setattr(dist, name, lambda *args, name=name, original=original, **kwargs: (self.names.append(name), original(*args, **kwargs))[1])
        return self

    def __exit__(self, *_) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.save(scenarios(rank), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (str(folder),), RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def alone(unit: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What the unit gives in one process, fused, and what timm's gives in float64, step by step. That one process is as exact
    as timm's is for tests/test_parity.py."""
    exact = copy.deepcopy(unit).double()
    sk_fused.fuse(unit)
    return [(step(unit, x, g, torch.enable_grad()), step(exact, x.double(), g.double(), torch.enable_grad())) for x, g in batches]


def single(unit: nn.Module, x: Tensor, g: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The only step of `alone`."""
    return alone(unit, [(x, g)])[0]


def joined(results: list[dict[str, Tensor]], factor: float = 1.0) -> dict[str, Tensor]:
    """The processes' outputs and input gradients one after the other, their parameters' gradients added up; buffers are
    the same in all of them."""
    together = {}
    for name, value in results[0].items():
        values = [result[name] for result in results]
        if name in ("output", "x.grad"):
            together[name] = torch.cat(values)
        elif name.endswith(".grad"):
            together[name] = factor * sum(values)
        else:
            assert all(torch.equal(value, other) for other in values), name
            together[name] = value
    return together


@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("name", UNITS)
def test_data_parallel(name: str, mode: str, ranks: list[dict[str, dict]]):
    """The mean of the two parts' gradients; where nothing looks at the batch as a whole, half of the joined batch's."""
    results = [{key.removeprefix("module."): value for key, value in rank[f"ddp {name} {mode}"].items()} for rank in ranks]
    for key in (key for key in results[0] if key.endswith(".grad") and key != "x.grad"):
        assert torch.equal(results[0][key], results[1][key])
    x, g = data(8)
    parts = [single(freeze(unit) if mode == "frozen" else unit, part(x, SIZES["equal"], rank), part(g, SIZES["equal"], rank))
             for rank, unit in enumerate(pair(**UNITS[name])[1] for _ in range(RANKS))]  # fmt: skip
    for rank, theirs in enumerate(parts):
        mean = [{key: sum(other[i][key] for other in parts) / RANKS if key.endswith("weight.grad") or key.endswith("bias.grad") else value
                 for key, value in theirs[i].items()} for i in range(2)]  # fmt: skip
        assert_all_within(results[rank], *mean)
    if mode == "frozen":
        theirs, exact = single(freeze(pair(**UNITS[name])[1]), x, g)
        assert_all_within(joined(results), theirs, exact)


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize("order", ["fused first", "converted first"])
@pytest.mark.parametrize("converter", CONVERTERS)
@pytest.mark.parametrize("name", UNITS)
def test_synchronised_batch_norms(name: str, converter: str, order: str, batch: str, ranks: list[dict[str, dict]]):
    """Fused, with timm's results on the joined batch, and two collectives forward and two backward: for the branches together,
    and for the attention, whose input depends on the branches' statistics."""
    results = [rank[f"sync {name} {converter} {order} {batch}"] for rank in ranks]
    steps = several(sum(SIZES[batch]))
    for result in results:
        assert result["why_not"] is None
        assert result["collectives"] == (["all_gather_into_tensor"] * 2 + ["all_reduce"] * 2) * len(steps)
    ours = [joined([*both]) for both in zip(*(result["steps"] for result in results))]
    assert_as_exact(ours, *zip(*alone(pair(**UNITS[name])[1], steps)))


@pytest.mark.parametrize("name", UNITS)
def test_synchronised_batch_norms_compiled(name: str, ranks: list[dict[str, dict]]):
    """In one graph, with the collectives in it."""
    ours = [joined([*both]) for both in zip(*(rank[f"compiled {name}"] for rank in ranks))]
    assert_as_exact(ours, *zip(*alone(pair(**UNITS[name])[1], several(7))))


def test_synchronised_attention(ranks: list[dict[str, dict]]):
    unit = timm.layers.selective_kernel.SelectiveKernelAttn(6, 2, 5)
    nn.init.normal_(unit.fc_select.weight, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(unit.fc_reduce.weight, generator=torch.Generator().manual_seed(1))
    u, g = data(7, 12)[0].view(7, 2, 6, 7, 6), data(7, 12)[1][..., :1, :1].view(7, 2, 6, 1, 1)
    assert_all_within(joined([rank["sync attention"] for rank in ranks]), *single(unit, u, g))


def test_fully_sharded(ranks: list[dict[str, dict]]):
    torch.manual_seed(0)
    theirs, exact = single(network(), *data(8))
    halves = [{key: value / RANKS if key.endswith("weight.grad") or key.endswith("bias.grad") else value for key, value in result.items()} for result in (theirs, exact)]
    results = [rank["fsdp"] for rank in ranks]
    # Every process has the whole mean, gathered.
    assert_all_within(joined(results, 1 / RANKS), *halves)


def test_one_process_alone_synchronises_nothing():
    ours, theirs = pair(**UNITS["split"])
    x, g = data(4)
    alone = step(timm.layers.convert_sync_batchnorm(ours), x, g, torch.enable_grad())
    for name, value in single(theirs, x, g)[0].items():
        assert torch.equal(alone[name], value), name
