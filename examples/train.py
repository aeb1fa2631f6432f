"""Trains one of timm's networks, by default as the model card of skresnet18 has it: SGD with momentum 0.9, learning rate 0.1 on a
cosine, weight decay 4e-5, batches of 256, 100 epochs.

    python -m examples.train imagenet --output runs/skresnet18
    torchrun --nproc-per-node 8 -m examples.train imagenet --output runs/skresnet18 --precision bfloat16 --channels-last

After every epoch it writes OUTPUT/last.pth, OUTPUT/best.pth (by top-1) and OUTPUT/summary.csv. With --resume it goes on from last.pth,
as if it had not stopped: the same images in the same order, the same weights to the bit on the same machine."""

import csv
import os
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from . import common
from .common import Unusable
from .validate import validate

import timm  # noqa: E402  (common lets it import)
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402

# What a resumed run must have in common with the one that it goes on from.
RECIPE = ("model", "model_kwargs", "epochs", "lr", "momentum", "weight_decay", "batch_size", "world_size", "augment", "seed")


def parser() -> ArgumentParser:
    options = ArgumentParser(prog="python -m examples.train", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    common.add_options(options)
    options.add_argument("--output", type=Path, required=True, help="folder of the run")
    options.add_argument("--resume", action="store_true", help="go on from OUTPUT/last.pth")
    options.add_argument("--fused", action=BooleanOptionalAction, default=True, help="fuse the SK units (default), or leave them as timm has them")
    options.add_argument("--epochs", type=int, default=100)
    options.add_argument("--lr", type=float, default=0.1)
    options.add_argument("--momentum", type=float, default=0.9)
    options.add_argument("--weight-decay", type=float, default=4e-5)
    options.add_argument("--augment", action=BooleanOptionalAction, default=True, help="timm's random crops, flips and colours (default)")
    options.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="default: the network's own, 3 224 224")
    options.add_argument("--crop-pct", type=float, help="of the image, in validation (default: the network's own, 0.875)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--log-every", type=int, default=50, metavar="UPDATES", help="default: %(default)s")
    return options


def train(arguments: Namespace, on_update: Callable[[int, float, Tensor], None] = lambda update, lr, loss: None) -> list[dict]:
    """Trains to the last epoch and returns a row for each; `on_update` gets the number of every update, its learning rate and loss.

    Raises:
        Unusable: of the data or the checkpoint; nothing has been written.
    """
    device = timm.utils.init_distributed_device(arguments)
    last, best = arguments.output / "last.pth", arguments.output / "best.pth"
    first = arguments.rank == 0
    if last.exists() and not arguments.resume:
        raise Unusable(f"{last} is there already: --resume goes on from it")
    checkpoint = common.load_checkpoint(last) if arguments.resume else None
    classes = common.class_folders(arguments.data / "train")
    common.check_classes(arguments.data / "val", classes, str(arguments.data / "train"))

    timm.utils.random_seed(arguments.seed)
    precision, layout = arguments.precision, (arguments.precision, arguments.channels_last, device)
    model = common.create_network(arguments.model, len(classes), arguments.model_kwargs, *layout)
    config = common.data_config(model, arguments.input_size, arguments.crop_pct)
    recipe = {name: getattr(arguments, name) for name in RECIPE}
    if checkpoint:
        check_same(last, checkpoint, {**recipe, "classes": classes, "data_config": config})
        common.load_weights(model, checkpoint, last)
    say = print if first else lambda *_, **__: None
    if arguments.fused:
        say(common.fuse(model))
    loading = config, arguments.batch_size, arguments.workers, device, precision
    share = {"rank": arguments.rank, "world_size": arguments.world_size}
    training = common.loader(arguments.data / "train", *loading, training=True, augment=arguments.augment, **share)
    validation = common.loader(arguments.data / "val", *loading, **share)
    if len(training) == 0:
        raise Unusable(f"{arguments.data / 'train'} has fewer images than the batches of all processes")
    optimizer = create_optimizer_v2(model, "sgd", lr=arguments.lr, weight_decay=arguments.weight_decay, momentum=arguments.momentum)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=arguments.epochs, warmup_epochs=0, step_on_epochs=False, updates_per_epoch=len(training)
    )
    # float16's small gradients would vanish.
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    epoch, update, history = 0, 0, []
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        epoch, update, history = checkpoint["epoch"], checkpoint["updates"], checkpoint["history"]
        if update != epoch * len(training):
            raise Unusable(f"{last} has {update} updates in {epoch} epochs, {arguments.data / 'train'} has {len(training)} to an epoch")
    scheduler.step_update(update)
    distributed = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None) if arguments.distributed else model

    def save(path: Path) -> None:
        content = {"recipe": recipe, "classes": classes, "data_config": config, "epoch": epoch, "updates": update, "history": history}
        states = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        common.save_checkpoint(path, {**content, **states})

    if first and not checkpoint:
        arguments.output.mkdir(parents=True, exist_ok=True)
        # So that a run can be resumed from its first moment on.
        save(last)
    for epoch in range(epoch + 1, arguments.epochs + 1):
        # An epoch has its own seed, so that it is the same after a resume.
        timm.utils.random_seed(arguments.seed + 1000 * epoch, arguments.rank)
        if arguments.distributed:
            training.sampler.set_epoch(epoch)
        start, total = time.perf_counter(), torch.zeros((), device=device, dtype=torch.float64)
        distributed.train()
        for i, (images, targets) in enumerate(training, 1):
            if arguments.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with common.autocast(precision, device):
                loss = nn.functional.cross_entropy(distributed(images), targets)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            lr = optimizer.param_groups[0]["lr"]
            on_update(update, lr, loss.detach())
            total += loss.detach()
            update += 1
            scheduler.step_update(update)
            if i % arguments.log_every == 0 or i == len(training):
                speed = i * arguments.batch_size * arguments.world_size / (time.perf_counter() - start)
                say(f"epoch {epoch}, {i} of {len(training)} updates: loss {total.item() / i:.4f}, lr {lr:.5f}, {speed:.0f} images/s", flush=True)
        if arguments.distributed:
            # Every process has the running statistics of its own images.
            timm.utils.distribute_bn(model, arguments.world_size, reduce=True)
        result = validate([model], validation, device, precision, arguments.channels_last)
        row = {"epoch": epoch, "lr": lr, "loss": total.item() / len(training), "top1": result.top1[0], "top5": result.top5[0]}
        say(f"epoch {epoch}: top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} % of {result.images} images", flush=True)
        is_best = all(row["top1"] > other["top1"] for other in history)
        history.append(row)
        if first:
            if is_best:
                save(best)
            save(last)
            write_summary(arguments.output / "summary.csv", history)
    return history


def check_same(path: Path, checkpoint: dict, now: dict) -> None:
    """Raises an Unusable if the checkpoint is of another run than the one asked for."""
    then = {**checkpoint["recipe"], **{name: checkpoint[name] for name in ("classes", "data_config")}}
    for name, value in now.items():
        if then.get(name) != value:
            raise Unusable(f"{path} is of a run with {name} {then.get(name)}, not {value}")


def write_summary(path: Path, history: list[dict]) -> None:
    beside = path.with_name(f"{path.name}.part")
    with open(beside, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)
    os.replace(beside, path)


def main(argv: Sequence[str] | None = None) -> None:
    common.main(lambda: train(parser().parse_args(argv)))


if __name__ == "__main__":
    main()
