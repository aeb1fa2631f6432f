"""The benchmarks' own arithmetic, their command lines, and that what the README says is what was measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import harness, machine

harness.let_timm_import()

import timm  # noqa: E402
from benchmarks import cases, check, contenders, digits, gpu, instructions, memory, models, overhead, parity, passes, report, scaling, serving, units  # noqa: E402
from benchmarks.harness import OURS, Entry, Step  # noqa: E402

CPU = torch.device("cpu")
RESULTS = sorted((harness.ROOT / "results").glob("*/*.json"))


@pytest.fixture(autouse=True)
def one_thread():
    """The figures do not matter here; threads that wait for each other on a busy machine do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_ratios_are_taken_pair_by_pair():
    # The second round was slow for both.
    assert harness.ratios([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == [0.5, 0.5, 0.5]


def test_quartiles():
    assert harness.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == [2.0, 3.0, 4.0]
    assert harness.quartiles([7.0]) == [7.0, 7.0, 7.0]


def test_parity_rule():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    theirs, ulp = (exact + 1e-3).float(), torch.finfo(torch.float32).eps * 2
    assert harness.within_parity((exact + 2e-3).float(), theirs, exact)
    assert not harness.within_parity((exact + 2.1e-3).float(), theirs, exact)
    # Where theirs is exact a few ulp are allowed.
    assert harness.within_parity((exact + 4 * ulp).float(), exact.float(), exact)
    assert not harness.within_parity((exact + 8 * ulp).float(), exact.float(), exact)
    assert not harness.within_parity(torch.tensor([1.0, torch.nan]), theirs, exact)


def test_gate_lets_a_jump_at_a_kink_pass_and_nothing_else():
    exact = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    theirs, one, many, huge = exact + 1e-6, exact + 1e-6, exact + 1e-6, exact + 1e-6
    one[:5] += 0.05
    many[:20] += 0.05
    huge[0] += 0.5
    rule = [harness.parity_failures([ours], [theirs], [exact]) for ours in (one, many, huge, torch.where(exact > 0.99, torch.nan, exact))]
    assert [bool(failures) for failures in rule] == [False, True, True, True]


def test_floor_by_hand():
    case = cases.Case(dict(in_channels=64, groups=4, split_input=False), 8)
    branch, weights = 2 * 64 * 64, 64 * 9 * 16
    floor = case.floor(2, "eval")
    assert floor == (4 * (2 * branch + 2 * weights), 2 * 2 * branch * 9 * 16)
    train = case.floor(2, "train")
    # Written: both branches, v, dx, the weights' gradients; read: both branches, x twice, g, the weights twice.
    assert train == (4 * (9 * branch + 3 * 2 * weights), 3 * floor.flops)
    # Bound by the slower of the two.
    assert floor.ms({"copy_GBps": 1e-3, "matrix_GFLOPs": 1e9}) == pytest.approx(floor.bytes / 1e3)
    assert floor.ms({"copy_GBps": 1e9, "matrix_GFLOPs": 1e-3}) == pytest.approx(floor.flops / 1e3)


def test_units_are_those_of_the_networks():
    def signature(unit, size):
        conv = unit.paths[0].conv
        return unit.in_channels, unit.out_channels, conv.stride[0], conv.groups, unit.split_input, unit.attn.fc_reduce.out_channels, size

    found = set()

    def listen(module, inputs, output):
        found.add(signature(module, inputs[0].shape[-1]))

    for name in cases.NETWORKS:
        with torch.device("meta"):
            model = timm.create_model(name).eval()
            for module in model.modules():
                if isinstance(module, cases.SelectiveKernel):
                    module.register_forward_hook(listen)
            model(torch.empty(1, 3, 224, 224))
    assert {signature(case.unit(), case.size) for case in cases.UNITS.values()} == found


def _entries(**values: float | Exception) -> dict:
    def entry(side, value):
        def make():
            if isinstance(value, Exception):
                raise value
            return Step(lambda: torch.tensor([value]), lambda output: [output])

        return Entry(make, None if side == "other" else OURS)

    return {(side, "contiguous"): entry(side, value) for side, value in values.items()}


EXACT = [torch.tensor([1.0], dtype=torch.float64)]


def test_race_lists_what_cannot_run():
    record = harness.race(_entries(timm=1.0, sk_fused=1.0, broken=ImportError("no such peer"), other=5.0), EXACT, 0.0, CPU)
    assert record["broken"]["error"] == "ImportError: no such peer"
    assert record["timm"]["ratio"]["timm"] == [1.0, 1.0, 1.0]
    assert record["sk_fused"]["rounds"] == 5
    assert "median_ms" in record["other"] and "max_error" not in record["other"]


def test_race_does_not_time_what_failed_its_parity_check():
    record = harness.race(_entries(timm=1.0, sk_fused=1.1), EXACT, 0.0, CPU)
    assert "parity failed" in record["sk_fused"]["error"]
    assert "median_ms" not in record["sk_fused"] and "timm" not in record["sk_fused"]["ratio"]
    assert "median_ms" in record["timm"]
    assert harness.parity_failed([{"eval": record}])


def test_a_benchmark_that_breaks_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def rows(arguments):
        yield {"unit": "the first"}
        raise RuntimeError("an illegal access")

    monkeypatch.setattr(harness, "ceilings", lambda *_: {})
    with pytest.raises(RuntimeError, match="an illegal access"):
        harness.command(units.BENCHMARK._replace(rows=rows), ["--results", str(tmp_path)])
    (file,) = tmp_path.rglob("*.json")
    result = json.loads(file.read_text())
    assert result["rows"] == [{"unit": "the first"}] and result["settings"]["interrupted"] == "RuntimeError: an illegal access"


def test_race_fails_with_its_base():
    with pytest.raises(ImportError):
        harness.race(_entries(timm=ImportError("broken")), EXACT, 0.0, CPU)


def test_passes_count_branch_sized_tensors_once_each():
    x = torch.ones(2, 3, 4, 4)
    with harness.Passes(x.numel()) as counter:
        y = x * 2
        y.view(-1).sum()
    # Read x, write y; read y. The view is none.
    assert (counter.operators, counter.passes) == (2, 3)


def test_fused_unit_passes_and_keeps_less():
    case = cases.UNITS["64 ch 56², split"]
    x, g = case.tensors(2, CPU)
    settings, branch = contenders.Settings(CPU), 4 * case.branch_values(2)
    timm_kept, kept = (contenders.kept(contenders.CONTENDERS[side], case.unit(), x, settings) for side in ("timm", "sk_fused"))
    assert 2 * branch <= kept < 2.3 * branch and timm_kept > 6 * branch
    counts = {side: contenders.passes(contenders.CONTENDERS[side], case.unit(), x, g, "train", settings, branch // 4) for side in ("timm", "sk_fused")}
    assert counts["sk_fused"]["passes"] < counts["timm"]["passes"] / 2


def test_code_hash_is_of_the_code(tmp_path: Path):
    def of(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return machine.code_hash(tmp_path / name)

    assert of("a.py", '"""What."""\n\n# Why.\nx = 1\n') == of("b.py", "x = 1\n") != of("c.py", "x = 2\n")
    assert of("a.py", 'def f():\n    """What."""\n    return 1\n') == of("b.py", "def f():\n    return 1\n")
    assert of("a.cpp", "int x;  // why\n/* what\n */ int y;") == of("b.cpp", "int x;\nint y;\n") != of("c.cpp", "int x, y;")


@pytest.mark.parametrize("benchmark", report.BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_help(benchmark, capsys):
    with pytest.raises(SystemExit) as status:
        harness.command(benchmark, ["--help"])
    assert status.value.code == 0
    shown = capsys.readouterr().out
    assert benchmark.doc.strip().splitlines()[0] in shown and "--quick" in shown


def test_an_interrupted_run_keeps_what_it_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(arguments):
        yield {"row": 1}
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "ceilings", lambda *_: {})
    benchmark = harness.Benchmark("long", "Long: it takes long.", interrupted, lambda rows: (["row"], [[str(row["row"])] for row in rows]))
    result = json.loads(harness.command(benchmark, ["--results", str(tmp_path)]).read_text())
    assert result["rows"] == [{"row": 1}] and result["settings"]["interrupted"]


def test_tiny_run(tmp_path: Path):
    small = ["--quick", "--seconds", "0", "--contenders", "timm", "sk_fused", "convolutions", "--units", "512 ch 7², split"]
    path = harness.command(units.BENCHMARK, [*small, "--batch", "4", "--results", str(tmp_path)])
    assert path.name == "units-batch-4-quick.json" and path.with_suffix(".png").exists()
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    for mode in harness.MODES:
        assert row[mode]["sk_fused"]["max_error"] < 1e-4
        low, median, high = row[mode]["sk_fused"]["ratio"]["timm"]
        assert 0 < low <= median <= high
    assert report.stale(path) == []
    result["environment"]["kernels"]["sk_fused/functional.py"] = "another"
    path.write_text(json.dumps(result))
    assert report.stale(path) == ["sk_fused/functional.py"]
    # A quick run is not reported, a full one is.
    assert "units" not in report.device_report(path.parent)
    path.rename(path.with_name("units-batch-4.json"))
    text = report.device_report(path.parent)
    assert "## One SK unit, batch 4\n" in text and "| 512 ch 7², split | eval |" in text


def test_one_image_has_no_training_step(tmp_path: Path):
    path = harness.command(models.BENCHMARK, ["--quick", "--seconds", "0", "--batch", "1", "--results", str(tmp_path)])
    assert path.name == "models-batch-1-quick.json" and path.with_suffix(".png").exists()
    (row,) = json.loads(path.read_text())["rows"]
    (cells,) = models.table([row])[1]
    assert cells[4] == "–" and "→ " in cells[6] and cells[7] == "– → –"
    models.tax_figure({**json.loads(path.read_text()), "rows": [row]}, tmp_path / "tax.png")
    assert models.tax_table([row])[1][0][:2] == ["skresnet18", "eval"]


@pytest.mark.parametrize("side", ["timm:freezing", "sk_fused:freezing"])
def test_frozen_is_frozen(side: str):
    """The parameters are constants: Dynamo does not learn so from the options of torch.compile."""
    unit, x = cases.Case(dict(in_channels=8), 6).unit().eval(), torch.randn(2, 8, 6, 6)
    call = contenders.CONTENDERS[side].prepare(unit, x)
    with torch.inference_mode():
        before = call(x).clone()
    with torch.no_grad():
        unit.paths[0].conv.weight.zero_()
    with torch.inference_mode():
        assert torch.equal(call(x), before)


def test_serving_has_the_options_that_networks_read():
    """It runs the rows of models."""
    has, reads = (vars(harness.command_line(benchmark, [])[1]).keys() for benchmark in (serving.BENCHMARK, models.BENCHMARK))
    assert reads - has <= {"tax"}


def test_serving_table_takes_the_fastest_peer():
    def side(ms: float, **ratios: float) -> dict:
        return {"median_ms": ms, "ratio": {other: [0.9 * ratio, ratio, 1.1 * ratio] for other, ratio in ratios.items()}}

    peers = {"timm:compile": side(20.0), "timm:freezing": side(10.0, **{"plain:freezing": 1.25}), "openvino": {"error": "no such peer", "ratio": {}}}
    ratios = {"timm:compile": 0.4, "timm:freezing": 0.8, "plain:freezing": 1.0}
    row = {"model": "skresnet18", "eval": {**peers, "sk_fused:compile": side(9.0), "sk_fused:freezing": side(8.0, **ratios)}}
    (cells,) = serving.table([row])[1]
    assert cells == ["skresnet18", "20", "10", "–", "–", "9", "8", "0.80 (0.72–0.88), timm:freezing", "1.25 → 1.00"]


def test_passes_of_every_kernel(tmp_path: Path):
    path = harness.command(passes.BENCHMARK, ["--quick", "--seconds", "0", "--batch", "2", "--units", "512 ch 7², split", "--results", str(tmp_path)])
    result = json.loads(path.read_text())
    assert {row["pass"] for row in result["rows"]} == set(passes.PASSES)
    select = next(row for row in result["rows"] if row["pass"] == "select")
    assert select["bytes"] == 3 * 4 * cases.UNITS["512 ch 7², split"].branch_values(2)
    speed = select["speed"]["reference"]
    assert speed["GBps"] == pytest.approx(select["bytes"] / select["backends"]["sk_fused:reference"]["median_ms"] / 1e6)
    assert path.with_suffix(".png").exists()


def test_overhead_of_every_unit(tmp_path: Path):
    result = json.loads(harness.command(overhead.BENCHMARK, ["--quick", "--seconds", "0", "--results", str(tmp_path)]).read_text())
    assert len(result["rows"]) == len(overhead.UNITS)
    assert all(row[mode]["sk_fused"]["ratio"]["timm"][1] > 0 for row in result["rows"] for mode in harness.MODES)


def test_stages_on_a_gpu_go_on_where_one_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    slow = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
    scripts = {"good": "print('all well')", "bad": "raise SystemExit('no GPU')", "slow": slow, "last": "print('done')"}
    stages = [gpu.Stage(name, [sys.executable, "-c", script], 4 if name == "slow" else 60) for name, script in scripts.items()]
    monkeypatch.setattr(gpu, "stages", lambda results: [*stages, gpu.Stage("missing", "there is no such tool", 1)])
    monkeypatch.setattr(sys, "argv", ["gpu", "--logs", str(tmp_path / "logs")])
    with pytest.raises(SystemExit) as status:
        gpu.main()
    assert status.value.code == 1
    *verdicts, missing = (" ".join(line.split()[1:]) for line in capsys.readouterr().out.strip().splitlines()[-5:])
    assert [verdict.startswith(said) for verdict, said in zip(verdicts, ("passed", "failed (1)", "given up after 4 s", "passed"))] == [True] * 4
    assert missing == "not run: there is no such tool"
    assert (tmp_path / "logs" / "bad.log").read_text() == "no GPU\n"
    assert (tmp_path / "logs" / "slow.log").read_text() == "kept\n"


def test_stages_on_a_gpu_share_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    stages = [gpu.Stage(name, [sys.executable, "-c", "import time; time.sleep(60)"], 60) for name in ("first", "second")]
    monkeypatch.setattr(gpu, "stages", lambda results: [*stages, gpu.Stage("other", [sys.executable], 60)])
    monkeypatch.setattr(sys, "argv", ["gpu", "--logs", str(tmp_path), "--seconds", "1", "--stages", "first", "sec"])
    with pytest.raises(SystemExit):
        gpu.main()
    verdicts = capsys.readouterr().out.strip().splitlines()[-2:]
    assert "given up after 1 s" in verdicts[0] and "second" in verdicts[1] and "no time left" in verdicts[1]


def test_stages_on_a_gpu_are_commands_that_there_are(tmp_path: Path):
    """Their options, too."""
    for stage in gpu.stages(tmp_path):
        if "-m" in stage.command and (module := stage.command[2]).startswith("benchmarks."):
            _, arguments = harness.command_line(importlib.import_module(module).BENCHMARK, stage.command[3:])
            assert arguments.device.type == "cuda" and arguments.results == tmp_path
    named = {stage.name.partition(":")[0] for stage in gpu.stages(tmp_path)}
    assert named == {"build", "tests", "passes", "units", "overhead", "cold start", "models", "sanitizer"}


def test_every_native_operator_is_a_pass():
    from sk_fused.backends import native

    operators = {name for name, value in vars(native).items() if isinstance(value, torch._ops.OpOverload)}
    source = Path(passes.__file__).read_text()
    assert {name for name in operators if f"b.{name}(" not in source} == set()


def test_slope():
    assert scaling.slope("batch", [1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert scaling.slope("size", [7, 14], [1.0, 4.0]) == pytest.approx(1)
    assert scaling.slope("size", [7], [1.0]) is None


def test_largest_batch():
    # 10 bytes for each image and 5 beside, more where it does not fit in a cache.
    assert memory.largest_batch({4: 45, 8: 85}, lambda batch: 10 * batch + 5, 205) == (20, 205)
    assert memory.largest_batch({4: 45, 8: 85}, lambda batch: 12 * batch + 5, 205)[1] <= 205


def test_check_tells_noise_from_change():
    learnt = [{"what": "unit", "ratios": [1.0, 1.1, 1.2]}, {"what": "bytes", "exact": 8}, {"what": "gone", "exact": 1}]
    assert check.band([1.0, 1.1, 1.2]) == pytest.approx((0.9, 1.3))
    assert check.compare(learnt, [{"what": "unit", "ratios": [1.29]}, {"what": "bytes", "exact": 8}]) == ([], [])
    worse, notes = check.compare(learnt, [{"what": "unit", "ratios": [1.31]}, {"what": "bytes", "exact": 9}, {"what": "new", "exact": 1}])
    assert [line.split(":")[0] for line in worse] == ["slower", "more"] and "not in the committed" in notes[0]
    worse, notes = check.compare(learnt, [{"what": "unit", "ratios": [0.8]}, {"what": "bytes", "exact": 7}])
    assert not worse and [line.split(":")[0] for line in notes] == ["faster", "less"]


def test_instructions_of_one_library():
    lines = "ob=(1) /x/_C.so\nfn=(1) f\n10 100\n+1 5\ncob=(2) /lib/libc.so\ncfn=(2) g\ncalls=1 0\n11 7\n* 3\nob=(2)\nfn=(2)\n0 7\nob=(1)\n5 1\n"
    assert instructions.inside(lines.splitlines(), "_C.") == 109
    assert instructions.inside(lines.splitlines(), "libc") == 7


def test_tables_of_whole_networks():
    outputs, gradients = {"float32": 1e-6, "float64": 2e-15, "timm": 3e-6, "largest": 12.0}, {"float32": 1e-3, "float64": 4e-12, "timm": None}
    _, cells = parity.table([{"model": "skresnet18", "units": 8, "fused": 4, "outputs": outputs, "gradients": gradients}])
    assert cells == [["skresnet18", "4 of 8", "12.0", "1.0e-06 (3.0e-06)", "2.0e-15", "1.0e-03", "4.0e-12"]]
    rows = [{"seed": seed, "side": side, "losses": [4.0, 2.0, 1.0, 0.5], "top1": [50.0, 98.0 + seed]} for seed in (0, 1) for side in digits.FLAGS]
    assert digits.table(rows)[1] == [[side, "98.00, 99.00", "98.50", "0.7500"] for side in digits.FLAGS]


def test_published_ratios_are_of_the_networks():
    assert models.PUBLISHED.keys() == cases.NETWORKS.keys()


def test_readme_says_what_was_measured():
    text = report.README.read_text()
    assert report.readme(text) == text, "run `make report`"
    for path in (harness.ROOT / "results").glob("*/README.md"):
        assert report.device_report(path.parent) == path.read_text(), "run `make report`"


# Not everyone who changes a kernel has a GPU: its results may be older, and its report, which is held to them above, says so. So it
# does of what calls the kernels, Python and csrc/*.cpp, and has changed since: a mended error is not to wait for hours of measuring.
ON_CPU = [path for path in RESULTS if json.loads(path.read_text())["environment"]["device_type"] == "cpu"]


@pytest.mark.parametrize("path", ON_CPU, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_results_are_of_these_kernels(path: Path):
    older = [name for name in report.stale(path) if name.startswith("csrc/cpu/")]
    assert not older, f"{path.relative_to(harness.REPOSITORY)} is older than {', '.join(older)}: measure again, then `make report`"
