"""Each kernel: the time of every operator of every backend on branches that the others have pushed out of the caches, its
GB/s from the bytes that it must move, how that compares with a copy of as many bytes that takes its turn among them, and its
place under the roofline. Checked first against the plain PyTorch backend in float64."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sk_fused.backends import BACKENDS, use_backend

from . import figures, harness
from .cases import MAIN, UNITS, Case
from .harness import LAYOUTS, OURS, Benchmark, Entry, Step


class Inputs:
    """What a unit's operators get, by the names that the backends use."""

    def __init__(self, case: Case, batch: int, device: torch.device, dtype: torch.dtype, layout: str):
        generator = torch.Generator().manual_seed(0)
        like = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}

        def draw(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
            return (low + (high - low) * torch.rand(shape, generator=generator)).to(**like)

        unit = case.unit()
        self.convolutions = nn.ModuleList(path.conv for path in unit.paths).to(device, dtype, memory_format=LAYOUTS[layout]).requires_grad_(False)
        self.M, self.C, D, size = len(unit.paths), case.channels[1], unit.attn.fc_reduce.out_channels, case.out_size
        self.B, self.D, M, C = batch, D, self.M, self.C
        x, g = (t.to(dtype=dtype, memory_format=LAYOUTS[layout]) for t in case.tensors(batch, device))
        self.xs, self.g = x.split(x.shape[1] // M, 1) if unit.split_input else [x] * M, g
        first = self.convolutions[0]
        self.convolved = x, [conv.weight for conv in self.convolutions], first.stride[0], [conv.dilation[0] for conv in self.convolutions], first.groups
        # Their mean is not near 0: it is checked by its own size.
        self.ys = [draw(batch, C, size, size, low=-1, high=3).to(dtype=dtype, memory_format=LAYOUTS[layout]) for _ in range(M)]
        self.mean, self.bias, self.p, self.q = (draw(M, C, low=-0.1, high=0.1) for _ in range(4))
        self.scale, self.a = draw(M, C, low=0.5), draw(batch, M, C, low=0.1)
        self.s, self.t, self.reduced, self.da = draw(batch, C), draw(batch, C), draw(batch, D), draw(batch, M, C)
        self.fc_reduce, self.fc_select, self.weight, self.shift = draw(D, C), draw(M * C, D), draw(D, low=0.5), draw(D)
        self.running_mean, self.running_var = draw(D), draw(D, low=0.5)
        self.K1, self.K2, self.R1, self.R2 = (draw(batch, M, C, low=0) for _ in range(4))
        self.pixels, self.branch = size * size, (self.mean, self.scale, self.bias)
        self.norms = [*self.scale], [*self.bias], [*self.mean], [*draw(M, C, low=0.5)], 1e-5
        self.attention = self.fc_reduce, self.weight, self.shift, self.running_mean, self.running_var, 1e-5
        self.act = "relu", 0.0


def tensors(result: object) -> list[Tensor]:
    return [tensor for each in result for tensor in tensors(each)] if isinstance(result, (list, tuple)) else [result]


def _squeezed(result: tuple) -> list[Tensor]:
    """Of how many parts the pooled sums are is the backend's choice."""
    *folded, pooled, K = result
    return [*folded, pooled.sum(1), *K]


class Pass(NamedTuple):
    """An operator: how a backend is called; branch-sized tensors read and written; flops for a value of one branch; how
    often it goes over x (or dx), and computes all convolutions. The attention has no branch-sized data: `small` gives its
    values moved and its flops. `collect` takes what is compared out of a result."""

    call: Callable[[ModuleType, Inputs], object]
    traffic: Callable[[int], int] = lambda M: 0
    flops: int = 0
    inputs: int = 0
    convolutions: int = 0
    small: Callable[[Inputs], tuple[int, int]] = lambda i: (0, 0)
    backends: tuple[str, ...] = tuple(BACKENDS)
    collect: Callable[[object], list[Tensor]] = tensors


def _attention(passes: int) -> Callable[[Inputs], tuple[int, int]]:
    return lambda i: (i.D * i.C * (1 + i.M) * passes + i.B * i.C * (1 + i.M), 2 * i.B * i.D * i.C * (1 + i.M) * passes)


# A new operator of the backends is a new line here.
PASSES: dict[str, Pass] = {
    "branch_statistics": Pass(lambda b, i: b.branch_statistics(i.ys), lambda M: M, 4),
    "squeeze, eval": Pass(lambda b, i: b.squeeze(i.ys, *i.norms, *i.act, 1), lambda M: M, 5, collect=_squeezed),
    "squeeze, training": Pass(lambda b, i: b.squeeze(i.ys, *i.norms, *i.act, 3), lambda M: M, 8, collect=_squeezed),
    "attend": Pass(
        lambda b, i: b.attend(i.K1, i.pixels, *i.attention, *i.act, i.fc_select, None), small=_attention(1)
    ),
    "select": Pass(lambda b, i: b.select(i.ys, *i.branch, i.a, *i.act), lambda M: M + 1, 6),
    "select_backward_sums": Pass(lambda b, i: b.select_backward_sums(i.g, i.ys, *i.branch, *i.act), lambda M: M + 1, 10),
    "attend_backward": Pass(
        lambda b, i: b.attend_backward(i.da, i.a, i.s, i.reduced, *i.attention, True, *i.act, i.fc_select), small=_attention(2)
    ),
    "fold_backward": Pass(
        lambda b, i: b.fold_backward(i.a, i.s, i.pixels, i.R1, i.R2, i.K1, i.K2, i.scale, i.scale, i.B * i.pixels),
        small=lambda i: (5 * i.B * i.M * i.C + 2 * i.B * i.C, 8 * i.B * i.M * i.C),
    ),
    "select_backward": Pass(lambda b, i: b.select_backward(i.g, i.ys, *i.branch, i.a, i.t, i.p, i.q, *i.act), lambda M: 2 * M + 1, 11),
    "convolutions": Pass(lambda b, i: [conv(x) for conv, x in zip(i.convolutions, i.xs)], lambda M: M, 0, 1, 1, backends=("reference",)),
    "branch": Pass(lambda b, i: b.branch(*i.convolved), lambda M: M, 4, 1, 1),
    "branch_backward": Pass(
        lambda b, i: b.branch_backward(i.g, *i.convolved, i.ys, *i.branch, i.a, i.t, i.p, i.q, *i.act, (True, True)), lambda M: M + 1, 11, 2, 2
    ),
    "unit": Pass(
        lambda b, i: b.unit(*i.convolved, *i.norms, *i.attention, i.fc_select, *i.act), lambda M: 1, 11, 1, 1
    ),
}


def rows(arguments: Namespace) -> Iterator[dict]:
    dtype = torch.bfloat16 if arguments.precision == "bfloat16" else torch.float32
    for name in harness.progress(arguments.units, "units"):
        case, device = UNITS[name], arguments.device
        inputs = {layout: Inputs(case, arguments.batch, device, dtype, layout) for layout in LAYOUTS}
        exact_inputs = Inputs(case, arguments.batch, device, torch.float64, "contiguous")
        # Both start from the values that the smaller dtype can hold.
        exact_inputs.convolved[0].copy_(inputs["contiguous"].convolved[0])
        exact_inputs.convolutions.load_state_dict(inputs["contiguous"].convolutions.state_dict())
        exact_inputs.ys, exact_inputs.g = [y.double() for y in inputs["contiguous"].ys], inputs["contiguous"].g.double()
        values, x_values = case.branch_values(arguments.batch), exact_inputs.convolved[0].numel()
        for title, operator in PASSES.items():
            exact = operator.collect(operator.call(BACKENDS["reference"], exact_inputs))
            small_values, small_flops = operator.small(exact_inputs)
            moved = (operator.traffic(exact_inputs.M) * values + operator.inputs * x_values) * dtype.itemsize + 4 * small_values
            runs = {
                (side, layout): Entry(lambda side=side, layout=layout: _step(operator, side, inputs[layout]), OURS)
                for side in operator.backends
                for layout in LAYOUTS
            }
            runs["copy", "contiguous"] = Entry(lambda: _copy(moved, device), None)
            race = harness.race(runs, exact, arguments.seconds, device, base="reference", against=("reference", "copy"), of="kernels")
            copy = race.pop("copy")
            flops = operator.flops * exact_inputs.M * values + small_flops + operator.convolutions * case.floor(arguments.batch, "eval").flops
            figures = {side: {"GBps": moved / f["median_ms"] / 1e6, "GFLOPs": flops / f["median_ms"] / 1e6} for side, f in race.items() if "median_ms" in f}
            for side, each in figures.items():
                each["share_of_copy"] = 1 / race[side]["ratio"]["copy"][1]
            yield {"unit": name, "pass": title, "bytes": moved, "flops": flops, "copy_ms": copy.get("median_ms"), "speed": figures, "backends": _ours(race)}


def _step(operator: Pass, side: str, inputs: Inputs) -> Step:
    backend = BACKENDS[side]
    with use_backend(side):
        reason = backend.why_not(inputs.ys)
        if operator.convolutions and not reason:
            x, weights, *rest = inputs.convolved
            reason = backend.why_not_convolve(x.shape, x.dtype, [w.shape for w in weights], *rest, x.is_cuda, False)
    if reason:
        raise RuntimeError(reason)

    def run() -> object:
        with torch.inference_mode():
            return operator.call(backend, inputs)

    return Step(run, operator.collect)


def _copy(moved: int, device: torch.device) -> Step:
    """What reads and writes as many bytes in all."""
    source = torch.zeros(max(1, moved // 2), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return Step(lambda: target.copy_(source), tensors)


def _ours(race: dict) -> dict:
    """A backend's failed check is a failure of sk_fused."""
    return {f"sk_fused:{side}": figures for side, figures in race.items()}


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Of every backend that was timed: milliseconds in its faster layout, GB/s, and their share of what a copy reaches."""
    sides = list(dict.fromkeys(side for row in rows for side, figures in row["backends"].items() if "median_ms" in figures))
    header = ["unit", "pass", "MB moved", "flops ÷ byte", *(f"{side.split(':')[1]}: ms, GB/s (share of copy)" for side in sides)]
    cells = []
    for row in rows:
        cells.append([row["unit"], row["pass"], f"{row['bytes'] / 1e6:.1f}", f"{row['flops'] / row['bytes']:.1f}"])
        for side in sides:
            figures, speed = row["backends"].get(side, {}), row["speed"].get(side.split(":")[1])
            cells[-1].append(f"{figures['median_ms']:.2f}, {speed['GBps']:.1f} ({speed['share_of_copy']:.0%})" if speed else figures.get("error", ""))
    return header, cells


def figure(result: dict, path: Path) -> None:
    """The roofline: flops per byte against GFLOP/s, under what was measured to be the device's copy and matrix speed."""
    rows, ceilings = result["rows"], result["ceilings"]
    units = list(dict.fromkeys(row["unit"] for row in rows))
    page, axes = figures.page(1, len(units), height=5.0)
    copy, matrix = ceilings["copy_GBps"], ceilings["matrix_GFLOPs"]
    intensities = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 2, 3 * max(*intensities, matrix / copy)
    for each, unit in zip(axes, units):
        each.loglog([low, matrix / copy, high], [low * copy, matrix, matrix], color="black", linewidth=1.2)
        each.sharey(axes[0])
        for row, marker in zip((row for row in rows if row["unit"] == unit), figures.MARKERS):
            x = row["flops"] / row["bytes"]
            for backend, speed in row["speed"].items():
                face = figures.STYLE["timm" if backend == "reference" else "sk_fused"][0]
                label = row["pass"] if backend == next(iter(row["speed"])) else None
                filled = face if backend != "reference" else "white"
                each.plot(x, speed["GFLOPs"], marker, markersize=7, markerfacecolor=filled, markeredgecolor="black" if filled == face else face, label=label)
        each.set_title(f"{unit}\nroof: copy {copy:.0f} GB/s, matrix units {matrix:.0f} GFLOP/s", fontsize=9)
        each.set_xlabel("flops per byte", fontsize=8.5)
        each.set_ylabel("GFLOP/s", fontsize=8.5)
        each.grid(which="major", color="#e5e5e5", linewidth=0.6)
    title = "Every kernel under the roofline (filled: sk_fused's kernels; open: plain PyTorch)"
    figures.finish(page, title, harness.source(result), path, axes[0])


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--units", nargs="+", choices=UNITS, default=[MAIN[0], MAIN[4]], metavar="UNIT", help="whose branches (default: %(default)s)")
    # A branch is below 32 MiB: of what is larger glibc gives new pages to every call, and the pass would be a small part of it.
    parser.set_defaults(batch=16, seconds=2.0)


BENCHMARK = Benchmark("passes", __doc__, rows, table, figure, options, {"units": [MAIN[0]], "seconds": 0.5})

if __name__ == "__main__":
    harness.command(BENCHMARK)
