"""Top-1 and top-5 of a network on an ImageFolder's val/, as timm has it and fused, beside what timm published, and the difference
that fusing makes: none is expected.

    python -m examples.validate imagenet --model skresnet34
    python -m examples.validate imagenet --checkpoint runs/skresnet18/best.pth

Without a checkpoint the weights are timm's, from the hub."""

import copy
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import nn

from benchmarks.harness import console, progress

from . import common
from .common import Unusable

# Top-1 and top-5 on ImageNet at 224², crop 0.875, bicubic: timm's model cards.
PUBLISHED = {"skresnet18": (73.03, 91.17), "skresnet34": (76.93, 93.32)}
IMAGENET_CLASSES = 1000


class Result(NamedTuple):
    """Of several networks on the same images: percent, one for each; how many images the last one puts into another class than the
    first, and how far its logits are from the first one's at most."""

    images: int
    top1: list[float]
    top5: list[float]
    changed: int
    difference: float


@torch.inference_mode()
def validate(models: Sequence[nn.Module], loader, device: torch.device, precision: str, channels_last: bool) -> Result:
    """On all processes' images together."""
    correct = torch.zeros(2, len(models), dtype=torch.int64, device=device)
    changed, images = torch.zeros(2, dtype=torch.int64, device=device)
    difference = torch.zeros((), dtype=torch.float64, device=device)
    for model in models:
        model.eval()
    for x, targets in loader:
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with common.autocast(precision, device):
            outputs = [model(x) for model in models]
        for i, logits in enumerate(outputs):
            hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            correct[:, i] += torch.stack([hits[:, 0].sum(), hits.sum()])
        images += len(targets)
        changed += (outputs[0].argmax(1) != outputs[-1].argmax(1)).sum()
        difference = torch.maximum(difference, (outputs[0].double() - outputs[-1].double()).abs().max())
    if torch.distributed.is_initialized():
        for value in (correct, changed, images):
            torch.distributed.all_reduce(value)
        torch.distributed.all_reduce(difference, torch.distributed.ReduceOp.MAX)
    top1, top5 = (100 * correct.double() / images).tolist()
    return Result(images.item(), top1, top5, changed.item(), difference.item())


def parser() -> ArgumentParser:
    options = ArgumentParser(prog="python -m examples.validate", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    common.add_options(options)
    options.add_argument("--checkpoint", type=Path, help="of examples/train.py; it says what network it is of")
    return options


def networks(arguments: Namespace, device: torch.device) -> tuple[list[nn.Module], dict, str]:
    """timm's and the fused one, the configuration of their data, and timm's name for them.

    Raises:
        Unusable: of the checkpoint or the class folders.
    """
    layout, split = (arguments.precision, arguments.channels_last, device), arguments.data / "val"
    if arguments.checkpoint:
        checkpoint = common.load_checkpoint(arguments.checkpoint)
        name, config = checkpoint["recipe"]["model"], checkpoint["data_config"]
        common.check_classes(split, checkpoint["classes"], str(arguments.checkpoint))
        model = common.create_network(name, len(checkpoint["classes"]), checkpoint["recipe"]["model_kwargs"], *layout)
        common.load_weights(model, checkpoint, arguments.checkpoint)
    else:
        name, found = arguments.model, len(common.class_folders(split))
        if found != IMAGENET_CLASSES:
            raise Unusable(f"{split} has {found} class folders, timm's weights are of {IMAGENET_CLASSES} classes")
        model = common.create_network(name, IMAGENET_CLASSES, arguments.model_kwargs, *layout, pretrained=True)
        config = common.data_config(model, None, None)
    fused = copy.deepcopy(model)
    console.print(common.fuse(fused))
    return [model, fused], config, name


def run(arguments: Namespace) -> Result:
    device = torch.device(arguments.device)
    models, config, name = networks(arguments, device)
    loader = common.loader(arguments.data / "val", config, arguments.batch_size, arguments.workers, device, arguments.precision)
    result = validate(models, progress(loader, "validating"), device, arguments.precision, arguments.channels_last)
    table = Table("", "top-1, %", "top-5, %", title=f"{name}, {result.images} images, {arguments.precision}", title_justify="left")
    for side, top1, top5 in zip(("timm", "sk_fused"), result.top1, result.top5):
        table.add_row(side, f"{top1:.2f}", f"{top5:.2f}")
    if name in PUBLISHED and not arguments.checkpoint:
        table.add_row("published", *(f"{value:.2f}" for value in PUBLISHED[name]))
    console.print(table)
    console.print(f"fused, {result.changed} of {result.images} images are in another class; the logits differ by at most {result.difference:.1e}")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    common.main(lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    main()
