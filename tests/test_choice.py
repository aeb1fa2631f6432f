"""Which road a case takes: sk_fused/kernels/choice.py, with made-up times."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sk_fused.kernels import choice

DEVICE = "Some GPU 80GB"
CASE = "branch, bfloat16"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory for what is measured, and nothing known from before."""
    monkeypatch.setenv("SK_FUSED_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SK_FUSED_MEASURE", raising=False)
    torch.use_deterministic_algorithms(False)
    another_process()
    return tmp_path / "cache"


def another_process() -> None:
    choice._measured.cache_clear()
    choice._kernels.cache_clear()


class Timer:
    """Says that roads take what they return."""

    def __init__(self):
        self.calls = 0

    def __call__(self, run) -> float:
        self.calls += 1
        return run()


def choose(timer: Timer, case: str = CASE, device: str | None = DEVICE, **times: float) -> str:
    roads = {name: lambda time=time: time for name, time in (times or {"slow": 3.0, "fast": 1.0, "middling": 2.0}).items()}
    return choice.choose(case, roads, "slow", device, timer)


def test_the_fastest_is_taken_and_measured_once(cache: Path):
    timer = Timer()
    assert [choose(timer) for _ in range(3)] == ["fast"] * 3
    assert timer.calls == 3
    another_process()
    assert choose(timer) == "fast" and timer.calls == 3
    assert choose(timer, "another case", slow=1.0, fast=2.0) == "slow" and timer.calls == 5
    another_process()
    assert choose(timer, "another case") == "slow" and choose(timer) == "fast" and timer.calls == 5
    (file,) = cache.iterdir()
    assert json.loads(file.read_text()) == {CASE: "fast", "another case": "slow"}


def test_a_file_for_each_device_version_and_text_of_the_kernels(cache: Path, monkeypatch: pytest.MonkeyPatch):
    timer = Timer()
    choose(timer)
    (first,) = cache.iterdir()
    assert "some-gpu-80gb" in first.name
    choose(timer, device="Another GPU")
    for module, attribute in ((torch, "__version__"), (choice.triton, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(module, attribute, "99.1")
            another_process()
            choose(timer)
    with monkeypatch.context() as patch:
        patch.setattr("sk_fused.__version__", "99.2")
        another_process()
        choose(timer)
    # A kernel that was changed.
    kernels = cache.with_name("kernels")
    shutil.copytree(Path(choice.__file__).parent, kernels)
    with (kernels / "branch.py").open("a") as file:
        file.write("# Changed.")
    monkeypatch.setattr(choice, "__file__", str(kernels / "choice.py"))
    another_process()
    choose(timer)
    assert timer.calls == 6 * 3 and len([*cache.iterdir()]) == 6


def test_without_sk_fused_cache_it_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SK_FUSED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choice._file(DEVICE).parent == tmp_path / "sk_fused"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choice._file(DEVICE).parent == tmp_path / ".cache" / "sk_fused"


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("SK_FUSED_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(choice.tempfile, "gettempdir", lambda: str(tmp_path))
    assert choice._file(DEVICE).parent == tmp_path / "sk_fused"


def test_the_table_comes_first(monkeypatch: pytest.MonkeyPatch):
    timer = Timer()
    choose(timer)
    monkeypatch.setitem(choice.TABLE, (DEVICE, CASE), "middling")
    assert choose(timer) == "middling"
    assert choose(timer, device="Another GPU") == "fast"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"branch, bfloat16": 3}', "\xff"])
def test_a_corrupt_file_is_named_and_written_anew(content: str, cache: Path):
    timer, file = Timer(), choice._file(DEVICE)
    cache.mkdir()
    file.write_bytes(content.encode("latin-1"))
    with pytest.warns(RuntimeWarning, match=file.name):
        assert choose(timer) == "fast"
    assert json.loads(file.read_text()) == {CASE: "fast"}
    another_process()
    assert choose(timer) == "fast" and timer.calls == 3


def test_a_road_that_is_no_more_is_measured_anew(cache: Path):
    timer = Timer()
    cache.mkdir()
    choice._file(DEVICE).write_text(json.dumps({CASE: "of an older version"}))
    assert choose(timer) == "fast" and timer.calls == 3


def test_the_file_is_written_beside_and_renamed(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """What is there is whole at every moment, and nothing is left beside it."""
    timer, seen, replace = Timer(), [], choice.os.replace

    def watched(beside, file):
        assert Path(beside).parent == Path(file).parent
        seen.append((json.loads(Path(beside).read_text()), Path(file).exists() and json.loads(Path(file).read_text())))
        replace(beside, file)

    monkeypatch.setattr(choice.os, "replace", watched)
    choose(timer)
    choose(timer, "another case")
    assert seen == [({CASE: "fast"}, False), ({CASE: "fast", "another case": "fast"}, {CASE: "fast"})]
    assert [*cache.iterdir()] == [choice._file(DEVICE)]


def test_what_other_processes_wrote_is_kept(cache: Path):
    timer = Timer()
    choose(timer)
    file = choice._file(DEVICE)
    file.write_text(json.dumps({**json.loads(file.read_text()), "of another process": "slow"}))
    choose(timer, "another case")
    assert json.loads(file.read_text()) == {CASE: "fast", "another case": "fast", "of another process": "slow"}


def test_a_place_that_cannot_be_written_is_named(cache: Path):
    cache.write_text("a file where the directory is to be")
    timer = Timer()
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        assert choose(timer) == "fast"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(timer) == "fast"
    assert timer.calls == 3


def test_measuring_is_switched_off(cache: Path, monkeypatch: pytest.MonkeyPatch):
    timer = Timer()
    choose(timer, "known")
    monkeypatch.setenv("SK_FUSED_MEASURE", "0")
    assert choose(timer) == "slow" and choose(timer, "known") == "fast" and timer.calls == 3


def test_nothing_is_measured_where_all_is_to_be_deterministic():
    """Nor does what is known change."""
    timer = Timer()
    choose(timer, "known")
    torch.use_deterministic_algorithms(True)
    assert choose(timer) == "slow" and choose(timer, "known") == "fast" and timer.calls == 3


@pytest.mark.parametrize("where", ["sk_fused.kernels.choice._is_capturing", "torch.compiler.is_compiling"])
def test_nothing_is_measured_while_a_graph_is_captured_or_traced(where: str, monkeypatch: pytest.MonkeyPatch):
    timer = Timer()
    with monkeypatch.context() as patch:
        patch.setattr(where, lambda: True)
        assert choose(timer) == "slow" and timer.calls == 0
    assert choose(timer) == "fast"


def test_nothing_is_measured_without_a_device_or_with_one_road():
    timer = Timer()
    assert choose(timer, device=None) == "slow"
    assert choose(timer, slow=1.0) == "slow" and timer.calls == 0


def test_a_road_without_memory_is_not_taken_and_nothing_kept(cache: Path):
    def fails() -> float:
        raise torch.OutOfMemoryError("for a test")

    def choose(roads: dict, case: str = CASE) -> str:
        return choice.choose(case, roads, "own", DEVICE, Timer())

    roads = {"library": fails, "own": lambda: 2.0, "twice": lambda: 1.0}
    assert choose(roads) == "twice" and not cache.exists()
    # It is known in this process.
    assert choose({**roads, "own": fails}) == "twice"
    another_process()
    assert choose(dict.fromkeys(roads, fails)) == "own" and not cache.exists()
    # Nor with another case.
    assert choose({"own": lambda: 2.0, "twice": lambda: 1.0}, "another case") == "twice"
    assert json.loads(choice._file(DEVICE).read_text()) == {"another case": "twice"}
    assert choose({**roads, "library": lambda: 0.0}) == "own"
