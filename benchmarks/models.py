"""Whole networks: timm's SK-ResNets as timm has them against the same with every SelectiveKernel fused, on photographs.

Parity of the logits and of the gradients is checked first, against timm in float64; a network that fails it gets no
figures. Then both run in both layouts, interleaved; each side is quoted in its faster layout."""

import argparse
import copy

import numpy
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from . import harness
from .harness import console

harness.let_timm_import()

import timm  # noqa: E402

import sk_fused  # noqa: E402

NAMES = ("skresnet18", "skresnet34", "skresnext50_32x4d")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def photographs(batch: int, size: int = 224) -> Tensor:
    """`batch` crops of scikit-learn's two sample photographs, normalized with ImageNet's mean and deviation."""
    generator = numpy.random.default_rng(0)
    mean, deviation = numpy.array([0.485, 0.456, 0.406]), numpy.array([0.229, 0.224, 0.225])
    crops = []
    for i in range(batch):
        image = load_sample_images().images[i % 2]
        top, left = (generator.integers(0, length - size + 1) for length in image.shape[:2])
        crops.append((image[top : top + size, left : left + size] / 255 - mean) / deviation)
    return torch.from_numpy(numpy.stack(crops)).permute(0, 3, 1, 2).float().contiguous()


def build(name: str) -> nn.Module:
    """timm's network with seeded weights, and running statistics that fit them: without any a random deep network's
    activations mean nothing."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model(photographs(4))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model.eval()


def parity(theirs: nn.Module, ours: nn.Module, x: Tensor) -> tuple[bool, float, float]:
    """Whether logits (eval) and the input's gradient (training) hold the parity rule; our and their logits' max error."""
    exact = copy.deepcopy(theirs).double()
    with torch.no_grad():
        logits = [model(x.to(dtype)) for model, dtype in ((ours, x.dtype), (theirs, x.dtype), (exact, torch.float64))]

    def gradient(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        model = copy.deepcopy(model).train()
        model(x).square().mean().backward()
        return torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in model.parameters())])

    few = x[:4]
    gradients = [gradient(ours, few), gradient(theirs, few), gradient(exact, few.double())]
    passed = harness.within_parity(*logits) and harness.within_parity(*gradients)
    return passed, harness.error(logits[0], logits[2]), harness.error(logits[1], logits[2])


def measure(name: str, batch: int, seconds: float) -> dict | None:
    theirs = build(name)
    ours = copy.deepcopy(theirs)
    report = sk_fused.fuse(ours)
    unfused = [unit for unit in report.units if not unit.fused or unit.reason]
    if unfused or not report.units:
        raise RuntimeError(f"{name} is not fused wholly:\n{report}")
    x = photographs(batch)
    passed, our_error, their_error = parity(theirs, ours, x)
    parameters = sum(p.numel() for p in theirs.parameters())
    row = {"model": name, "parameters": parameters, "parity": passed, "max_logits_error": our_error, "timm_max_logits_error": their_error}
    if not passed:
        return row
    runs = {"eval": {}, "train": {}}
    for side, model in (("timm", theirs), ("fused", ours)):
        for layout, memory_format in LAYOUTS.items():
            laid_out = copy.deepcopy(model).to(memory_format=memory_format)
            laid_out_x = x.to(memory_format=memory_format)
            runs["eval"][f"{side} {layout}"] = harness.evaluation(laid_out, laid_out_x)
            training = copy.deepcopy(laid_out).train()
            g = torch.full((batch, 1000), 1 / batch)
            runs["train"][f"{side} {layout}"] = harness.training_step(training, laid_out_x, g)
    for kind, contenders in runs.items():
        console.print(f"  {kind}: {', '.join(contenders)}, interleaved for about {seconds:.0f} s", style="dim")
        times = harness.interleaved(contenders, seconds)
        best = harness.fastest(times, "timm"), harness.fastest(times, "fused")
        row[kind] = {"timm": best[0], "fused": best[1], "ratio": harness.ratio(times, best[1], best[0])}
        row[kind]["contenders"] = {contender: harness.summary(values) for contender, values in times.items()}
    row["bytes_kept"] = {}
    for side, model in (("timm", theirs), ("fused", ours)):
        training = copy.deepcopy(model).train()
        row["bytes_kept"][side] = harness.bytes_kept(lambda: training(x), training, x)
    row["bytes_kept"]["ratio"] = row["bytes_kept"]["fused"] / row["bytes_kept"]["timm"]
    return row


HEADER = ["model", "parameters", "max logits error (timm's own)", "eval ms (ratio)", "training step ms (ratio)", "MB kept for backward (ratio)"]


def cells(row: dict) -> list[str]:
    """One row of the table: the fused network's figures, and the ratio to timm eager in its faster layout."""
    start = [row["model"], f"{row['parameters'] / 1e6:.1f} M", f"{row['max_logits_error']:.1e} ({row['timm_max_logits_error']:.1e})"]
    if not row["parity"]:
        return [*start, "parity failed", "", ""]
    for kind in ("eval", "train"):
        figures = row[kind]
        start.append(f"{figures['contenders'][figures['fused']]['median_ms']:.0f} ({figures['ratio']:.2f})")
    return [*start, f"{row['bytes_kept']['fused'] / 1e6:.0f} ({row['bytes_kept']['ratio']:.2f})"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images in a batch")
    parser.add_argument("--seconds", type=float, default=30, help="time for each of a network's two interleaved measurements")
    parser.add_argument("--models", nargs="+", default=list(NAMES), help="timm names")
    arguments = parser.parse_args()
    rows = []
    for i, name in enumerate(arguments.models, 1):
        console.print(f"{i}/{len(arguments.models)} {name}: parity, then timing")
        rows.append(measure(name, arguments.batch, arguments.seconds))
    harness.show(f"Fused SK networks, float32, batch {arguments.batch}, {harness.device_name()}; ratios to timm eager, lower is better", HEADER, [cells(row) for row in rows])
    path = harness.save("models", rows, batch=arguments.batch, seconds=arguments.seconds, dtype="float32")
    passed = [row for row in rows if row["parity"]]
    if passed:
        series = {
            "eval time": [row["eval"]["ratio"] for row in passed],
            "training step time": [row["train"]["ratio"] for row in passed],
            "bytes kept for the backward": [row["bytes_kept"]["ratio"] for row in passed],
        }
        title = f"sk_fused, ratio to timm eager (lower is better)\nfloat32, batch {arguments.batch}, {harness.device_name()}"
        harness.bar_chart(path.with_suffix(".png"), title, [row["model"] for row in passed], series, "ratio to timm eager")
    console.print(f"written: {path.relative_to(harness.ROOT.parent)}")
    if len(passed) < len(rows):
        raise SystemExit("parity failed: " + ", ".join(row["model"] for row in rows if not row["parity"]))


if __name__ == "__main__":
    main()
