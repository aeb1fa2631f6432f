"""What training and validation share: the data folders, the networks, the checkpoints. Whatever of these cannot be used is an
`Unusable`, a sentence that names the file."""

import os
import zipfile
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from benchmarks import harness

harness.let_timm_import()

import timm  # noqa: E402
from timm.data import create_dataset, create_loader  # noqa: E402
from timm.data.readers import get_img_extensions  # noqa: E402
from timm.utils import ParseKwargs  # noqa: E402

import sk_fused  # noqa: E402

PRECISIONS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Unusable(Exception):
    """A file or folder that cannot be used."""


def add_options(parser: ArgumentParser) -> None:
    """Those of both scripts."""
    parser.add_argument("data", type=Path, help="folder with train/ and val/, each with one folder of images for every class")
    parser.add_argument("--model", default="skresnet18", help="timm's name (default: %(default)s)")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="NAME=VALUE", help="more arguments for timm.create_model")
    parser.add_argument("--batch-size", type=int, default=256, help="images in a batch of one process (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="processes that load images (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="bfloat16 and float16 are by autocast (AMP); default: %(default)s")
    parser.add_argument("--channels-last", action="store_true", help="memory format of network and images")


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    half = precision in ("bfloat16", "float16")
    return torch.autocast(device.type, PRECISIONS[precision]) if half else nullcontext()


def stored(precision: str) -> torch.dtype:
    """The dtype of weights and images."""
    return torch.float64 if precision == "float64" else torch.float32


def main(run: Callable[[], object]) -> None:
    """`run`, with one sentence for what is unusable."""
    try:
        run()
    except Unusable as error:
        raise SystemExit(str(error)) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def class_folders(split: Path) -> list[str]:
    """The names of the class folders of `split`, in timm's order: that of the classes.

    Raises:
        Unusable: `split` is not there, is empty, or is anything but one level of folders, each with images.
    """
    if not split.is_dir():
        raise Unusable(f"{split} is not there: the data folder needs train/ and val/")
    extensions, folders = get_img_extensions(as_set=True), []
    for path in sorted(split.iterdir()):
        if path.is_dir():
            folders.append(path)
        elif path.suffix.lower() in extensions:
            raise Unusable(f"{path} lies beside the class folders, not in one of them")
    if not folders:
        raise Unusable(f"{split} is empty: it has no class folders")
    for folder in folders:
        has_images = False
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    raise Unusable(f"{entry.path} is a folder inside a class folder: a class has images only")
                has_images |= Path(entry.name).suffix.lower() in extensions
        if not has_images:
            raise Unusable(f"{folder} is empty: it has no images ({', '.join(sorted(extensions))})")
    return sorted((folder.name for folder in folders), key=timm.utils.natural_key)


def check_classes(split: Path, classes: Sequence[str], whose: str) -> None:
    """Raises an Unusable if the class folders of `split` are not these; timm would number what is there, and so other classes."""
    found = class_folders(split)
    for name in classes:
        if name not in found:
            raise Unusable(f"{split} lacks the class folder {name}, which {whose} has")
    for name in found:
        if name not in classes:
            raise Unusable(f"{split / name} is a class that {whose} has not")


def loader(
    split: Path,
    config: dict,
    batch_size: int,
    workers: int,
    device: torch.device,
    precision: str,
    training: bool = False,
    augment: bool = False,
    rank: int = 0,
    world_size: int = 1,
):
    """timm's, of one split. In validation each process has its share of the images, none of them twice."""
    dataset = create_dataset("", root=split)
    if not training:
        dataset.reader.samples = dataset.reader.samples[rank::world_size]
    return create_loader(
        dataset,
        batch_size=batch_size,
        is_training=training,
        no_aug=not augment,
        num_workers=workers,
        distributed=training and world_size > 1,
        device=device,
        img_dtype=stored(precision),
        pin_memory=device.type == "cuda",
        # Workers that stay would carry their random state from epoch to epoch, past what a checkpoint can bring back.
        persistent_workers=False,
        **config,
    )


def data_config(model: nn.Module, input_size: Sequence[int] | None, crop_pct: float | None) -> dict:
    """Input size, crop, interpolation, mean and deviation: the network's own, but for what is given."""
    config = timm.data.resolve_model_data_config(model, {"input_size": input_size, "crop_pct": crop_pct})
    return {name: config[name] for name in ("input_size", "crop_pct", "interpolation", "mean", "std")}


def create_network(name: str, classes: int, model_kwargs: dict, precision: str, channels_last: bool, device: torch.device, **arguments) -> nn.Module:
    model = timm.create_model(name, num_classes=classes, **arguments, **model_kwargs)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(device=device, dtype=stored(precision), memory_format=layout)


def fuse(model: nn.Module) -> str:
    """Fuses, and says how much of the network."""
    units = sk_fused.fuse(model).units
    return f"{sum(unit.fused for unit in units)} of {len(units)} SK units fused"


# Of a checkpoint: what it must have, and the type of each.
CONTENT = {
    "recipe": dict,
    "classes": list,
    "data_config": dict,
    "epoch": int,
    "updates": int,
    "state_dict": dict,
    "optimizer": dict,
    "scaler": dict,
    "history": list,
}


def save_checkpoint(path: Path, content: dict) -> None:
    """Written beside and renamed: whoever is killed here leaves the file as it was."""
    beside = path.with_name(f"{path.name}.part")
    with open(beside, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load_checkpoint(path: Path) -> dict:
    """On the CPU.

    Raises:
        Unusable: it is not there, damaged, truncated, or not a checkpoint of these scripts.
    """
    if not path.exists():
        raise Unusable(f"{path} is not there")
    try:
        # torch.load does not look at the checksums.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        content = None if broken else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # What a broken archive or pickle raises is anybody's guess.
        raise Unusable(f"{path} is damaged, or no checkpoint: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    if broken:
        raise Unusable(f"{path} is damaged: {broken} does not have its checksum")
    missing = [name for name, kind in CONTENT.items() if not isinstance(content, dict) or not isinstance(content.get(name), kind)]
    if missing:
        raise Unusable(f"{path} is not a checkpoint of examples/train.py: it has no {missing[0]}")
    return content


def load_weights(model: nn.Module, checkpoint: dict, path: Path) -> None:
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise Unusable(f"{path} does not fit the network: {' '.join(str(error).split())}") from error
