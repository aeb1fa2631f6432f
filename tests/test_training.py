"""examples/: training and validation on scikit-learn's digits, fused and unfused; what a kill leaves; what cannot be used."""

import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from benchmarks.harness import REPOSITORY
from examples import common, digits, train, validate

from .test_models import hub

HELD_OUT = 300


@pytest.fixture(scope="module")
def all_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    digits.write(folder)
    return folder


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every class in train/ and in val/."""
    folder = tmp_path_factory.mktemp("few")
    digits.write(folder, every=7)
    return folder


def arguments(data: Path, output: Path, *options: str) -> list[str]:
    return [str(data), "--output", str(output), *digits.OPTIONS, *options]


def run(data: Path, output: Path, *options: str, on_update: Callable = lambda *_: None) -> list[dict]:
    return train.train(train.parser().parse_args(arguments(data, output, *options)), on_update)


class Enough(Exception):
    pass


def first_losses(data: Path, output: Path, count: int, *options: str) -> list[float]:
    losses: list[float] = []

    def keep(update: int, lr: float, loss: torch.Tensor) -> None:
        losses.append(loss.item())
        if len(losses) == count:
            raise Enough

    with pytest.raises(Enough):
        run(data, output, *options, on_update=keep)
    return losses


def test_fused_and_unfused_agree_step_by_step(all_digits: Path, tmp_path: Path):
    """Every step carries on what the last one rounded, and adds to it."""
    fused, unfused = (first_losses(all_digits, tmp_path / flag, 20, f"--{flag}", "--precision", "float64") for flag in ("fused", "no-fused"))
    assert len(set(unfused)) == 20
    assert fused == pytest.approx(unfused, rel=1e-10, abs=0)


def test_digits(all_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    fused, unfused = (run(all_digits, tmp_path / flag, f"--{flag}") for flag in ("fused", "no-fused"))
    assert capsys.readouterr().out.startswith("4 of 4 SK units fused\nepoch 1, ")
    assert min(fused[-1]["top1"], unfused[-1]["top1"]) > 97
    # Three standard errors of the difference between two shares of the held-out digits.
    share = unfused[-1]["top1"] / 100
    assert abs(fused[-1]["top1"] - unfused[-1]["top1"]) <= 300 * math.sqrt(2 * share * (1 - share) / HELD_OUT)
    result = validate.run(validate.parser().parse_args([str(all_digits), "--checkpoint", str(tmp_path / "fused" / "last.pth"), "--workers", "0"]))
    assert result.images == HELD_OUT and result.changed == 0 and 0 < result.difference < 1e-3
    assert result.top1 == [fused[-1]["top1"]] * 2 and result.top5 == [fused[-1]["top5"]] * 2
    assert f"fused, 0 of {HELD_OUT} images are in another class" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_amp(few_digits: Path, tmp_path: Path, precision: str):
    history = run(few_digits, tmp_path, "--precision", precision, "--channels-last", "--epochs", "2")
    assert history[-1]["loss"] < history[0]["loss"]
    checkpoint = common.load_checkpoint(tmp_path / "last.pth")
    assert all(value.dtype == torch.float32 for value in checkpoint["state_dict"].values() if value.is_floating_point())
    assert bool(checkpoint["scaler"]) == (precision == "float16")


# A kill, and what comes after it.


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", *command], cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )


def epochs_done(output: Path) -> int:
    summary = output / "summary.csv"
    return len(summary.read_text().splitlines()) - 1 if summary.exists() else 0


def test_a_killed_run_goes_on_as_if_nothing_had_been(few_digits: Path, tmp_path: Path):
    rates: dict[str, list[float]] = {"whole": [], "resumed": []}
    whole = run(few_digits, tmp_path / "whole", "--epochs", "8", on_update=lambda update, lr, loss: rates["whole"].append(lr))
    killed, options = tmp_path / "killed", ["--epochs", "8"]
    for epochs in (1, 3):
        process = start(["examples.train", *arguments(few_digits, killed, *options)])
        while epochs_done(killed) < epochs:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        options = ["--epochs", "8", "--resume"]
    done = common.load_checkpoint(killed / "last.pth")["epoch"]
    assert 3 <= done < 8
    resumed = run(few_digits, killed, *options, on_update=lambda update, lr, loss: rates["resumed"].append(lr))
    assert resumed == whole
    assert rates["resumed"] == rates["whole"][done * len(rates["whole"]) // 8 :] and len(set(rates["whole"])) == len(rates["whole"])
    for name in ("last.pth", "best.pth"):
        ours, theirs = (common.load_checkpoint(tmp_path / folder / name) for folder in ("killed", "whole"))
        leaves = [torch.utils._pytree.tree_flatten(checkpoint) for checkpoint in (ours, theirs)]
        assert leaves[0][1] == leaves[1][1] and len(ours["optimizer"]["state"]) > 0
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(leaves[0][0], leaves[1][0]))


def test_a_kill_while_writing_leaves_the_last_whole_checkpoint(few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(few_digits, tmp_path, "--epochs", "2")
    before, save = (tmp_path / "last.pth").read_bytes(), torch.save

    def killed(content: dict, file) -> None:
        save(content, file)
        file.truncate(file.tell() // 2)
        raise Enough

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(Enough):
        common.save_checkpoint(tmp_path / "last.pth", {"epoch": 3})
    assert (tmp_path / "last.pth").read_bytes() == before and len((tmp_path / "last.pth.part").read_bytes()) > 0
    monkeypatch.undo()
    assert len(run(few_digits, tmp_path, "--epochs", "2", "--resume")) == 2


def test_a_run_does_not_write_over_another(few_digits: Path, tmp_path: Path):
    (tmp_path / "last.pth").write_bytes(b"mine")
    with pytest.raises(SystemExit, match=f"{tmp_path}/last.pth is there already: --resume goes on from it"):
        train.main(arguments(few_digits, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"] and (tmp_path / "last.pth").read_bytes() == b"mine"


def test_two_processes(few_digits: Path, tmp_path: Path):
    """By torchrun: half of the images each, one set of weights, all images validated once."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "examples.train"]
    assert start([*command, *arguments(few_digits, tmp_path, "--epochs", "2", "--batch-size", "16")]).wait() == 0
    checkpoint = common.load_checkpoint(tmp_path / "last.pth")
    held_out = sum(1 for _ in (few_digits / "val").glob("*/*.png"))
    assert held_out % 2 and checkpoint["epoch"] == 2 and checkpoint["recipe"]["world_size"] == 2
    right = [row["top1"] / 100 * held_out for row in checkpoint["history"]]
    assert right == pytest.approx([round(value) for value in right])
    result = validate.run(validate.parser().parse_args([str(few_digits), "--checkpoint", str(tmp_path / "last.pth"), "--workers", "0"]))
    assert result.images == held_out and result.top1[0] == pytest.approx(checkpoint["history"][-1]["top1"])


# What cannot be used.


def flip(path: Path) -> None:
    """One bit, in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def foreign(path: Path) -> None:
    torch.save(timm.create_model("skresnet18").state_dict(), path)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def reshaped(path: Path) -> None:
    checkpoint = torch.load(path)
    checkpoint["state_dict"]["fc.weight"] = torch.zeros(10, 3)
    torch.save(checkpoint, path)


@pytest.fixture(scope="module")
def finished(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch."""
    output = tmp_path_factory.mktemp("finished")
    run(few_digits, output, "--epochs", "1")
    return output


DAMAGES = {
    "flipped": (flip, "is damaged: .* does not have its checksum"),
    "truncated": (half, "is damaged, or no checkpoint: "),
    "empty": (lambda path: path.write_bytes(b""), "is damaged, or no checkpoint: "),
    "text": (lambda path: path.write_text("weights"), "is damaged, or no checkpoint: "),
    "foreign": (foreign, "is not a checkpoint of examples/train.py: it has no recipe"),
    "reshaped": (reshaped, "does not fit the network: .*fc.weight"),
    "gone": (Path.unlink, "is not there"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("script", ["train", "validate"])
def test_checkpoints_that_cannot_be_used(few_digits: Path, finished: Path, tmp_path: Path, damage: str, script: str):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    do, says = DAMAGES[damage]
    do(output / "last.pth")
    before = {path: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(SystemExit, match=f"^{output}/last.pth {says}[^\n]*$"):
        if script == "train":
            train.main(arguments(few_digits, output, "--epochs", "1", "--resume"))
        else:
            validate.main([str(few_digits), "--checkpoint", str(output / "last.pth"), "--workers", "0"])
    assert {path: path.read_bytes() for path in output.iterdir()} == before


@pytest.mark.parametrize("options", [["--model", "skresnet34"], ["--lr", "0.2"], ["--seed", "1"], ["--batch-size", "16"], ["--crop-pct", "0.9"]], ids=str)
def test_a_checkpoint_of_another_run(few_digits: Path, finished: Path, options: list[str]):
    before = (finished / "last.pth").read_bytes()
    name = options[0].removeprefix("--").replace("-", "_")
    with pytest.raises(SystemExit, match=f"^{finished}/last.pth is of a run with {'data_config' if name == 'crop_pct' else name} .*, not .*$"):
        train.main(arguments(few_digits, finished, "--epochs", "1", "--resume", *options))
    assert (finished / "last.pth").read_bytes() == before


def move_beside(data: Path) -> None:
    (data / "train/1/a.png").rename(data / "train/a.png")


def nest(data: Path) -> None:
    shutil.move(data / "train/1", data / "train/0/1")


FOLDERS = {
    "not there": (lambda data: shutil.rmtree(data / "train"), "/train is not there: the data folder needs train/ and val/"),
    "the split itself": (lambda data: (shutil.rmtree(data / "val"), nest(data)), "/train/0/1 is a folder inside a class folder"),
    "empty": (lambda data: [shutil.rmtree(data / "train" / name) for name in "01"], "/train is empty: it has no class folders"),
    "empty class": (lambda data: (data / "train/1/a.png").unlink(), "/train/1 is empty: it has no images "),
    "beside": (move_beside, "/train/a.png lies beside the class folders"),
    "nested": (nest, "/train/0/1 is a folder inside a class folder"),
    "class missing at validation": (lambda data: shutil.rmtree(data / "val/1"), "/val lacks the class folder 1, which .*/train has"),
    "unknown class at validation": (lambda data: shutil.copytree(data / "val/1", data / "val/2"), "/val/2 is a class that .*/train has not"),
    "too few": (lambda data: None, "/train has fewer images than the batches of all processes"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_cannot_be_used(tmp_path: Path, case: str):
    data, output = tmp_path / "data", tmp_path / "run"
    for split, name in itertools.product(("train", "val"), "01"):
        (data / split / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(data / split / name / "a.png")
    do, says = FOLDERS[case]
    do(data)
    with pytest.raises(SystemExit, match=f"^{data}{says}[^\n]*$"):
        train.main(arguments(data, output))
    assert not output.exists()


def test_a_class_missing_when_a_checkpoint_is_validated(few_digits: Path, finished: Path, tmp_path: Path):
    shutil.copytree(few_digits / "val", tmp_path / "val")
    shutil.rmtree(tmp_path / "val/7")
    with pytest.raises(SystemExit, match=f"^{tmp_path}/val lacks the class folder 7, which {finished}/last.pth has$"):
        validate.main([str(tmp_path), "--checkpoint", str(finished / "last.pth")])


def test_validation_of_timms_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Of a folder of 1000 classes; the hub's weights are random here, and four images are looked at."""
    for i in range(1000):
        (tmp_path / "val" / f"n{i:08}").mkdir(parents=True)
        Image.new("RGB", (8, 8), (i % 256, i // 4 % 256, 99)).save(tmp_path / "val" / f"n{i:08}" / "a.png")
    asked, loader = hub(monkeypatch, timm.create_model("skresnet18").state_dict()), common.loader
    monkeypatch.setattr(common, "loader", lambda *args: list(itertools.islice(loader(*args), 1)))
    options = ["--model", "skresnet18", "--workers", "0", "--batch-size", "4"]
    result = validate.run(validate.parser().parse_args([str(tmp_path), *options]))
    said = capsys.readouterr().out
    assert asked == ["timm/skresnet18.ra_in1k"] and result.images == 4 and result.difference < 1e-4
    assert "8 of 8 SK units fused" in said and "73.03" in said and "91.17" in said
    shutil.rmtree(tmp_path / "val/n00000000")
    with pytest.raises(SystemExit, match=f"^{tmp_path}/val has 999 class folders, timm's weights are of 1000 classes$"):
        validate.main([str(tmp_path), *options])
