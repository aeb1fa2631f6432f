"""Whole networks: timm's SK-ResNets as timm has them, the same with every SelectiveKernel fused, and their plain ResNet
twins, on photographs, in eval and in a training step (forward and backward), each side in its faster layout. Parity of the
logits and of the gradients is checked first, against timm in float64; a network that fails it gets no figures.

--tax runs all five networks, eager and compiled, for the SK tax: how many times as long a network takes as its twin, which
has almost the same multiplications. What is compiled is in channels_last, the faster layout for a compiler. Kept apart, in
tax.json."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from . import figures, harness
from .cases import NETWORKS
from .contenders import CONTENDERS, TWINS, Contender, Settings, entries, exact, kept
from .harness import MODES, PAIR, Benchmark

import timm  # noqa: E402

SIDES = ("timm", "sk_fused", "timm:compile", "sk_fused:compile", "plain", "plain:compile")
MAIN = ("skresnet18", "skresnet34", "skresnext50_32x4d")

# The SK tax that timm's own result files show, eval: (images/s of the twin) ÷ (images/s of the network). From
# benchmark-infer-fp32-nchw-pt240-cpu-i9_10940x-dynamo.csv: torch.compile, float32, batch 1, on a desktop CPU.
PUBLISHED = {
    "skresnet18": 126.23 / 87.06,
    "skresnet34": 80.61 / 50.69,
    "skresnet50": 67.2 / 52.83,
    "skresnet50d": 64.83 / 51.66,
    "skresnext50_32x4d": 76.91 / 49.52,
}


def photographs(batch: int, size: int = 224) -> Tensor:
    """`batch` crops of scikit-learn's two sample photographs, normalized with ImageNet's mean and deviation."""
    generator = numpy.random.default_rng(0)
    mean, deviation = numpy.array([0.485, 0.456, 0.406]), numpy.array([0.229, 0.224, 0.225])
    images, crops = load_sample_images().images, []
    for i in range(batch):
        image = images[i % 2]
        top, left = (generator.integers(0, length - size + 1) for length in image.shape[:2])
        crops.append((image[top : top + size, left : left + size] / 255 - mean) / deviation)
    return torch.from_numpy(numpy.stack(crops)).permute(0, 3, 1, 2).float().contiguous()


def build(name: str) -> nn.Module:
    """timm's network with seeded weights."""
    torch.manual_seed(0)
    return settled(timm.create_model(name), photographs(4))


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """With running statistics of its own activations: without them a random deep network's outputs mean nothing."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        model(x)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def rows(arguments: Namespace) -> Iterator[dict]:
    settings = Settings(arguments.device, arguments.precision, network=True)
    x = photographs(arguments.batch).to(arguments.device)
    g = torch.randn(arguments.batch, 1000, generator=torch.Generator().manual_seed(0)).to(arguments.device) / arguments.batch
    # The attention's batch-norm cannot be trained on one image.
    modes = [mode for mode in arguments.modes if mode == "eval" or arguments.batch > 1]
    for name in harness.progress(arguments.models, "networks"):
        model, twin = (build(each).to(arguments.device) for each in (name, NETWORKS[name]))
        row = {"model": name, "parameters": sum(p.numel() for p in model.parameters())}
        for mode in modes:
            reference = exact(model, x, g, mode, settings)
            ours, theirs = (
                {side: _in_layout(known[side], side).in_layouts(arguments.layouts) for side in arguments.contenders if side in known} for known in (CONTENDERS, TWINS)
            )
            runs = entries(ours, model, x, g, mode, settings) | entries(theirs, twin, x, g, mode, settings)
            row[mode] = harness.race(runs, reference, arguments.seconds, arguments.device, against=arguments.contenders)
            if harness.parity_failed(row[mode]):
                break
        else:
            if "train" in modes:
                row["bytes_kept"] = {side: kept(CONTENDERS[side], model, x, settings) for side in PAIR}
        yield row


def _in_layout(contender: Contender, side: str) -> Contender:
    """Compiling a network takes minutes, so it is done in one layout."""
    return contender._replace(layouts=("channels_last",)) if side.endswith((":compile", ":freezing")) else contender


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """The fused network's figures, each with its ratio to timm eager, then the SK tax."""
    header = ["model", "parameters", "max logits error (timm's own)", "eval ms (ratio)", "training step ms (ratio)", "MB kept for backward (ratio)"]
    return [*header, "SK tax, eval: before → after", "training step"], [_cells(row) for row in rows]


def _cells(row: dict) -> list[str]:
    timm, ours = (row["eval"][side] for side in PAIR)
    errors = [max(layout.get("max_error", 0.0) for layout in side["layouts"].values()) for side in (ours, timm)]
    cells = [row["model"], f"{row['parameters'] / 1e6:.1f} M", f"{errors[0]:.1e} ({errors[1]:.1e})"]
    if harness.parity_failed(row):
        return [*cells, "parity failed", *[""] * 4]
    for mode in MODES:
        ratio = _ratio(row, mode)
        cells.append(f"{row[mode]['sk_fused']['median_ms']:.0f} ({ratio:.2f})" if ratio else "–")
    theirs, ours = row.get("bytes_kept", {}).values() or (None, None)
    cells.append(f"{ours / 1e6:.0f} ({ours / theirs:.2f})" if theirs else "–")
    return [*cells, *(f"{_tax(row, mode, 'timm')} → {_tax(row, mode, 'sk_fused')}" for mode in MODES)]


def _ratio(row: dict, mode: str) -> float | None:
    """sk_fused's time to timm's, if both were timed."""
    ratio = row.get(mode, {}).get("sk_fused", {}).get("ratio", {}).get("timm")
    return ratio and ratio[1]


def _tax(row: dict, mode: str, side: str) -> str:
    ratio = row.get(mode, {}).get(side, {}).get("ratio", {}).get(TWIN_OF.get(side, "plain"))
    return f"{ratio[1]:.2f}" if ratio else "–"


def milliseconds(figures: dict) -> str:
    return f"{figures['median_ms']:.0f}" if "median_ms" in figures else "–"


CHOICES = ("timm:compile", "sk_fused", "sk_fused:compile")
# What a compiled network is compared with is compiled.
TWIN_OF = {"timm:compile": "plain:compile", "sk_fused:compile": "plain:compile"}


def figure(result: dict, path: Path) -> None:
    """What fusing changes: the ratios to timm eager of time and memory."""
    rows = result["rows"]
    page, (axes,) = figures.page(height=4.0, width=max(7.5, 2.2 * len(rows)))
    series = {title: [_ratio(row, mode) for row in rows] for mode, title in MODES.items() if mode in rows[0]}
    if all("bytes_kept" in row for row in rows):
        series["bytes kept for the backward"] = [row["bytes_kept"]["sk_fused"] / row["bytes_kept"]["timm"] for row in rows]
    figures.bars(axes, [row["model"] for row in rows], series)
    axes.axhline(1, color="black", linewidth=0.9, linestyle="--")
    axes.set_ylabel("ratio to timm eager", fontsize=8.5)
    figures.finish(page, "sk_fused beside timm eager (= 1): time and memory, lower is better", harness.source(result), path, axes)


def tax_table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """The SK tax of every side, beside what timm published; and the milliseconds of what a user would choose between."""
    header = ["model", "mode", *(f"{side} ÷ {TWIN_OF.get(side, 'plain')}" for side in SIDES[:4]), "timm's own files, compiled, another CPU"]
    header += [f"{side}, ms" for side in CHOICES]
    published = [[f"{PUBLISHED[row['model']]:.2f}", "–"] for row in rows]
    return header, [
        [row["model"], title, *(_tax(row, mode, side) for side in SIDES[:4]), known, *(milliseconds(row[mode].get(side, {})) for side in CHOICES)]
        for row, values in zip(rows, published)
        for (mode, title), known in zip(MODES.items(), values)
        if mode in row
    ]


def tax_figure(result: dict, path: Path) -> None:
    """The SK tax before and after, eval above, training step below."""
    rows = result["rows"]
    modes = [mode for mode in MODES if mode in rows[0]]
    page, axes = figures.page(len(modes), height=0.8 + 2.7 * len(modes), width=max(7.5, 2.0 * len(rows)))
    for each, mode in zip(axes, modes):
        series = {
            side: [row[mode][side]["ratio"].get(TWIN_OF.get(side, "plain"), [None] * 2)[1] for row in rows]
            for side in SIDES[:4]
            if any(row[mode].get(side, {}).get("ratio") for row in rows)
        }
        figures.bars(each, [row["model"] for row in rows], series)
        each.axhline(1, color="black", linewidth=0.9, linestyle="--")
        each.set_ylabel(f"{MODES[mode]}: time ÷ that of\nthe plain ResNet twin", fontsize=8.5)
    figures.finish(page, "SK tax (1 = as fast as the plain ResNet, lower is better; compiled beside compiled)", harness.source(result), path, axes[0])


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(MAIN), help="timm's names")
    parser.add_argument("--contenders", nargs="+", choices=SIDES, default=["timm", "sk_fused", "plain"], help="who takes part (of %(choices)s; default: %(default)s); plain is the twin", metavar="SIDE")
    parser.add_argument("--layouts", nargs="+", choices=harness.LAYOUTS, default=list(harness.LAYOUTS), help="of the images (default: both)")
    parser.add_argument("--tax", action="store_true", help="all five networks and all contenders, unless others are named; writes tax.json")
    parser.set_defaults(seconds=30.0, modes=list(MODES))


QUICK = {"models": ["skresnet18"], "seconds": 5.0}
BENCHMARK = Benchmark("models", __doc__, rows, table, figure, options, QUICK)
TAX = BENCHMARK._replace(
    name="tax",
    doc="The SK tax: " + __doc__,
    table=tax_table,
    figure=tax_figure,
    quick={**QUICK, "contenders": ["timm", "sk_fused", "plain"]},
    options=lambda parser: (options(parser), parser.set_defaults(models=list(NETWORKS), contenders=list(SIDES), seconds=20.0)),
)

if __name__ == "__main__":
    import sys

    harness.command(TAX if "--tax" in sys.argv else BENCHMARK)
