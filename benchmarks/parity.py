"""Parity of whole networks: how far fusing moves the outputs and gradients of timm's networks, of timm's options and of a
segmentation network, on photographs. Outputs in eval; gradients, of all parameters as one vector, of a training step with random
gradients of the output, relative to the largest. In brackets how far timm's own float32 is from its float64."""

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import sk_fused

from . import harness
from .cases import NETWORKS
from .harness import Benchmark
from .models import photographs, settled

import timm  # noqa: E402
from timm.layers import BlurPool2d  # noqa: E402


def unet() -> nn.Module:
    from segmentation_models_pytorch import Unet

    return Unet("timm-skresnet34", encoder_weights=None)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: timm.create_model(name) for name in NETWORKS},
    "skresnet18, features, output_stride=8": lambda: timm.create_model("skresnet18", features_only=True, output_stride=8),
    "skresnet18, drop_block_rate=0.1": lambda: timm.create_model("skresnet18", drop_block_rate=0.1),
    "skresnet18, aa_layer=BlurPool2d": lambda: timm.create_model("skresnet18", aa_layer=BlurPool2d),
    "Unet, timm-skresnet34": unet,
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x)
    return torch.cat([each.flatten(1) for each in (result if isinstance(result, list) else [result])], 1)


def results(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    with torch.inference_mode():
        logits = outputs(model.eval(), x)
    torch.manual_seed(0)
    v = outputs(model.train(), x)
    v.backward(torch.randn(v.shape, generator=torch.Generator().manual_seed(0)).to(v) / len(x))
    return {"outputs": logits, "gradients": torch.cat([parameter.grad.flatten() for parameter in model.parameters()])}


def rows(arguments: Namespace) -> Iterator[dict]:
    x = photographs(arguments.batch, arguments.size).to(arguments.device)
    for name in harness.progress(arguments.models, "networks"):
        torch.manual_seed(0)
        model = settled(MODELS[name](), photographs(arguments.batch, arguments.size)).to(arguments.device)
        fused = copy.deepcopy(model)
        units = sk_fused.fuse(fused).units
        row = {"model": name, "units": len(units), "fused": sum(unit.fused and unit.reason is None for unit in units), "outputs": {}, "gradients": {}}
        theirs = {dtype: results(model, x, DTYPES[dtype]) for dtype in DTYPES}
        for dtype in DTYPES:
            for what, ours in results(fused, x, DTYPES[dtype]).items():
                right = theirs[dtype][what]
                unit = right.abs().max().item() if what == "gradients" else 1.0
                row[what][dtype] = harness.error_of(ours, right.double()) / unit
                row[what]["timm"] = harness.error_of(theirs["float32"][what], theirs["float64"][what]) / unit
        row["outputs"]["largest"] = theirs["float64"]["outputs"].abs().max().item()
        if "drop_block" in name:
            # What is dropped is drawn in the dtype of the network.
            row["gradients"]["timm"] = None
        yield row


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    header = ["network", "units fused wholly", "largest output", "max output difference, float32 (timm's error)", "float64"]
    cells = []
    for row in rows:
        of = [row["model"], f"{row['fused']} of {row['units']}", f"{row['outputs']['largest']:.1f}"]
        for what in ("outputs", "gradients"):
            timm_error = row[what]["timm"]
            of += [f"{row[what]['float32']:.1e}" + ("" if timm_error is None else f" ({timm_error:.1e})"), f"{row[what]['float64']:.1e}"]
        cells.append(of)
    return [*header, "max gradient difference ÷ largest, float32 (timm's error)", "float64"], cells


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help="default: %(default)s")
    parser.add_argument("--size", type=int, default=96, help="height and width of the images (default: %(default)s)")
    parser.set_defaults(batch=4)


BENCHMARK = Benchmark("parity", __doc__, rows, table, options=options, quick={"models": ["skresnet18"]})

if __name__ == "__main__":
    harness.command(BENCHMARK)
