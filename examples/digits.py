"""scikit-learn's handwritten digits as an ImageFolder, and a small SK network for them:

    python -m examples.digits runs/digits-data
    python -m examples.train runs/digits-data --output runs/digits OPTIONS

with the options that the first command prints."""

import sys
from pathlib import Path

import numpy
from PIL import Image
from sklearn.datasets import load_digits

# A skresnet18 with one block a stage and an eighth to a quarter of the channels, on images of 8 × 8 pixels, enlarged to 32 × 32.
OPTIONS = (
    *("--model-kwargs", "layers=[1,1,1,1]", "channels=[16,32,64,64]"),
    *("--input-size", "3", "32", "32", "--crop-pct", "1.0", "--no-augment"),
    *("--batch-size", "32", "--epochs", "6", "--lr", "0.05", "--workers", "0"),
)


def write(folder: Path, every: int = 1) -> None:
    """Every sixth image to val/, the others to train/; of all 1797 images, or of one in `every`."""
    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images[::every], digits.target[::every])):
        path = folder / ("train" if i % 6 else "val") / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numpy.round(image * (255 / 16)).astype(numpy.uint8)).save(path)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    print(*OPTIONS)
