"""The report: tables, goals and pictures from results, and the committed results themselves."""

import json

import pytest

from bench import goals, plots, record, report, shapes

from .test_suite import STAMP


def results() -> list[dict]:
    stamp = {
        "device": "A",
        "torch": "2",
        "triton": "3",
        "date": "2026-01-02T03:04:05",
        "commit": "c",
        "group": "g",
    }
    about = {
        "kind": "loss",
        "shape": "tiny",
        "dtype": "bf16",
        "selection": "index",
        "n": 200,
        "d": 128,
        "m": 96,
        "z": 64,
        **stamp,
    }
    figures = {"q1_ms": 1.0, "q3_ms": 4.0, "tflops": 12.0}
    ours = {
        "peer": "ours-torch",
        "median_ms": 1.5,
        "peak_mib": 30.0,
        "returned_mib": 10.0,
        "error_ratio": 1.0,
    }
    eager = {
        "peer": "eager",
        "median_ms": 3.0,
        "peak_mib": 110.0,
        "returned_mib": 10.0,
        "error_ratio": 1.0,
    }
    return [
        {**about, **figures, **ours},
        {**about, **figures, **eager},
        {**about, **figures, "peer": "floor", "median_ms": 1.0},
        {**about, "peer": "ours-triton", "unavailable": "no GPU"},
    ]


def markers(name):
    return f"<!-- {name}:begin -->\nstale\n<!-- {name}:end -->"


def test_report_and_picture(tmp_path):
    file, readme, picture = tmp_path / "a.jsonl", tmp_path / "README.md", tmp_path / "speed.png"
    alone = {**results()[0], "median_ms": 77.0, "group": "later, without eager beside it"}
    for line in [
        {**results()[0], "median_ms": 99.0},
        *results(),
        alone,
    ]:  # the later of two lines of a key counts
        record.append(file, line)
    with file.open("a") as out:
        out.write('{"kind": "loss", "sha')  # cut short by a kill
    readme.write_text(
        "before\n"
        + "\nbetween\n".join(map(markers, ("bench", "goals")))
        + "\nafter\n"
        + "\n".join(map(markers, ("diagnostics", "fuzz", "mutation", "cpu-goals")))
        + "\n"
    )
    report.main([str(file), "--readme", str(readme), "--plot", str(picture)])
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:begin -->\n|")
    assert "<!-- bench:end -->\nbetween\n<!-- goals:begin -->\n| goal" in text
    assert "<!-- goals:end -->\nafter\n<!-- diagnostics:begin -->\nNot yet measured." in text
    assert "<!-- cpu-goals:begin -->\n| goal" in text
    assert "stale" not in text
    row = next(line for line in text.splitlines() if "ours-torch" in line)
    assert [cell.strip() for cell in row.split("|")[8:14]] == [
        "0.50",
        "1.50",
        "30",
        "0.27",
        "0.20",
        "1.00",
    ]
    assert "2026-01-02, commit c" in text
    assert picture.stat().st_size > 10_000


def test_rows_by_index_and_by_mask_are_kept_apart():
    index = results()
    mask = [{**one, "selection": "mask", "group": "m"} for one in index]
    unnamed = [{name: value for name, value in one.items() if name != "selection"} for one in mask]
    assert record.latest([*unnamed, *index, *mask]) == [*mask, *index]
    kinds = [
        row.split("|")[4].strip()
        for row in report.page(index + mask).splitlines()
        if "ours-torch" in row
    ]
    assert kinds == ["index", "mask"]


def test_readme_without_markers_is_an_error(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    with pytest.raises(ValueError, match=r"readme: .* lacks the lines <!-- bench:begin"):
        report.into_readme(readme, {"bench": "text"})


def gpu_results() -> list[dict]:
    """Of a GPU that meets each goal: every time is the floor's 2 ms × 1.05 for ours."""
    stamp = {
        "device": "G",
        "capability": "9.0",
        "torch": "2",
        "triton": "3",
        "date": "2026-01-02",
        "commit": "c",
    }
    lines = []

    def add(kind, **fields):
        lines.append({"kind": kind, "dtype": "bf16", "selection": "index", **stamp, **fields})

    def run(kind, shape, selection="index"):
        about = {"shape": shape.name, "n": shape.selected, "d": shape.d, "m": shape.m, "z": shape.z}
        times = {
            "floor": 2.0,
            "ours-blas": 2.1,
            "ours-triton": 2.2,
            "ours-fp8": 1.5,
            "eager": 4.0,
            "compile": 2.9,
        }
        times |= {"liger": 4.0, "viral": 7.0}
        for peer, ms in times.items():
            figures = {"median_ms": ms, "q1_ms": ms, "q3_ms": ms, "tflops": 1 / ms}
            figures |= (
                {"peak_mib": 300.0, "returned_mib": 100.0, "formula_mib": 210.0}
                if peer != "floor"
                else {}
            )
            group = f"{kind} {shape.name} {selection}"
            add(kind, peer=peer, **about, **figures, selection=selection, group=group)

    for shape in shapes.GPU:
        run("loss", shape)
    run("loss", shapes.BY_NAME[goals.MAIN], "mask")
    for n in (256, 131072):
        run("sweep", shapes.Shape(f"n{n}-m4096", 1, n * 5 // 4, n, 4096, 4096, 4096, ""))
    for mib, ratio in ((32, 1.2), (64, 1.1), (512, 1.01)):
        add("workspace", shape=goals.MAIN, peer="ours-blas", item=mib, over_floor=ratio)
    item = "mask, leading anchor"
    for kind, outcome in (
        ("sync", "no sync"),
        ("graph", "captured, same gradients"),
        ("fullgraph", "no break"),
    ):
        add(kind, shape=goals.MAIN, peer="ours-triton", item=item, outcome=outcome)
    add("step", shape=goals.SMALL, peer="ours-blas", launches=14.0)
    add("firstcall", peer="ours-blas", item="cold cache", seconds=20.0)
    add("firstcall", peer="ours-blas", item="warm cache", seconds=1.0)
    add("training", item="llava15-7b", time_ratio=1.004, memory_ratio=1.003)
    return lines


def goal_row(records, name):
    return next(row for row in goals.table(records) if row[0].startswith(name))


def test_goals():
    records = gpu_results()
    of_cpu = [
        {name: value for name, value in one.items() if name != "capability"} for one in records
    ]
    assert all(row[1:] == (goals.CARDS, goals.NO_GPU, "") for row in goals.table(of_cpu)[1:])
    for row in goals.table(records)[1:]:
        assert row[1] == "G"
        assert row[2].endswith(", met"), row
        assert "2026-01-02, commit c" in row[3]
    assert goal_row(records, "blas ÷ floor")[1:] == (
        "G",
        "1.05, met",
        "ours-blas; 2026-01-02, commit c",
    )
    assert goal_row(records, "triton ÷ floor")[2] == "1.1, met"
    assert goal_row(records, "time ÷ floor, workspace")[2] == "1.1, met"
    assert goal_row(records, "time ÷ the bf16 floor in fp8")[2] == "0.75, met"
    assert goal_row(records, "speed over VIRAL")[2] == "3.333, met"
    assert goal_row(records, "peak memory ÷ formula, N = 131,072")[2] == "0.9524, met"
    # each card has rows of its own, and one of which less is known says so
    other = [{**one, "device": "H"} for one in records if one["kind"] == "step"]
    cards = [
        row[1:3] for row in goals.table([*records, *other]) if row[0].startswith("blas ÷ floor")
    ]
    assert cards == [("G", "1.05, met"), ("H", "not yet measured")] * 2


def test_a_mask_counts_where_it_was_seen_to_need_no_wait():
    records = gpu_results()
    for one in records:
        if one["kind"] == "sync":
            one["outcome"] = "waits"
    assert goal_row(records, "triton ÷ floor")[2] == "not yet measured"


def test_times_of_two_processes_are_compared_by_the_floor_of_each():
    """The second had the card at half its clock."""
    run = {one["peer"]: one for one in results()}
    run["late"] = {**run["ours-torch"], "peer": "late", "median_ms": 3.0, "floor_ms": 2.0}
    assert report.ratios(run, "late") == report.ratios(run, "ours-torch")


def test_a_run_that_was_judged_but_never_timed_hides_no_figures():
    verdicts = [
        {k: v for k, v in one.items() if k != "median_ms"} | {"group": "late"} for one in results()
    ]
    assert record.latest([*results(), *verdicts]) == results()


@pytest.mark.parametrize(
    ("kind", "change", "name"),
    [
        ("loss", {"median_ms": 2.4}, "blas ÷ floor"),
        ("loss", {"median_ms": 2.4}, "time ÷ floor, every shape"),
        ("loss", {"peak_mib": 400.0}, "peak memory ÷ formula, N = 9,216"),
        ("sync", {"outcome": "called a synchronizing operation"}, "calls with a host sync"),
        ("step", {"launches": 17.0}, "launches"),
        ("training", {"memory_ratio": 1.006}, "training step of LLaVA-1.5-7B, memory"),
    ],
)
def test_a_goal_that_is_missed(kind, change, name):
    records = gpu_results()
    for one in records:
        if one["kind"] == kind and one.get("peer") in (None, "ours-blas", "ours-triton"):
            one |= change
    assert goal_row(records, name)[2].endswith(", missed")


def test_a_goal_over_every_shape_is_not_met_by_some():
    few = [one for one in gpu_results() if one.get("shape") in (goals.MAIN, goals.SMALL)]
    assert goal_row(few, "time ÷ floor, every shape")[2] == "1.05 so far"


def cpu_results() -> list[dict]:
    """Of a CPU that meets each goal."""
    stamp = {
        "device": "C",
        "threads": 2,
        "torch": "2",
        "triton": "3",
        "date": "2026-01-02",
        "commit": "c",
    }
    lines = []

    def add(kind, **fields):
        lines.append({"kind": kind, **stamp, **fields})

    def run(shape, dtype, selection, ours):
        times = {"ours-torch": ours, "eager": 4.0, "compile": 3.0, "compile-max": 2.5, "floor": 1.0}
        extras = {"ours-torch": 30.0, "eager": 100.0, "compile": 60.0, "compile-max": 50.0}
        for peer, ms in times.items():
            figures = {"median_ms": ms, "error_ratio": 1.0, "outside_rule": None}
            figures |= (
                {"peak_mib": 10.0 + extras[peer], "returned_mib": 10.0} if peer in extras else {}
            )
            about = {"shape": shape, "dtype": dtype, "selection": selection, "peer": peer}
            add("loss", **about, **figures, group=f"{shape} {dtype} {selection}")

    run("cpu-16k", "bf16", "index", 1.8)
    run("cpu-16k", "fp32", "index", 1.9)
    run("cpu-4k-encoder", "bf16", "index", 2.0)
    run("cpu-16k", "bf16", "mask", 2.25)
    run("cpu-16k", "fp16", "index", 3.0)
    run("cpu-small", "fp32", "index", 5.0)
    run("cpu-small", "bf16", "index", 5.2)
    for dtype in ("bf16", "fp32"):
        about = {
            "shape": "cpu-16k",
            "dtype": dtype,
            "selection": "index",
            "group": f"workspace {dtype}",
        }
        for item, ms, mib in ((2, 2.4, 12.0), (16, 1.8, 20.0), (256, 1.7, 250.0)):
            figures = {
                "median_ms": ms,
                "over_floor": ms,
                "peak_mib": 10.0 + mib,
                "returned_mib": 10.0,
            }
            add("workspace", peer="ours-torch", item=item, **about, **figures)
        for peer, ms, mib in (("eager", 4.0, 100.0), ("compile", 3.0, 60.0)):
            figures = {
                "median_ms": ms,
                "over_floor": ms,
                "peak_mib": 10.0 + mib,
                "returned_mib": 10.0,
            }
            add("workspace", peer=peer, **about, **figures)
        add("workspace", peer="floor", **about, median_ms=1.0, over_floor=1.0)
    add("training", item="smolvlm-256m", dtype="bf16", time_ratio=1.01, memory_ratio=1.015)
    return lines


def cpu_goal(records, name):
    (row,) = (row for row in goals.cpu_table(records) if row[0].startswith(name))
    return row


def test_goals_on_a_cpu():
    records = cpu_results()
    assert record.latest(records) == records
    for row in goals.cpu_table(records)[1:]:
        assert row[1] == "C"
        assert row[2].endswith(", met"), row
        assert "2026-01-02, commit c" in row[3]
    # the worst of three, ÷ the faster mode
    where = "cpu-16k bf16 mask, beside compile-max, the worst of 3; 2026-01-02, commit c"
    assert cpu_goal(records, "bf16: time ÷ the best of torch.compile")[2:] == ("0.9, met", where)
    assert cpu_goal(records, "fp32: time ÷ eager")[2] == "0.475, met"
    assert cpu_goal(records, "bf16: extra peak ÷ torch.compile")[2] == "0.6, met"
    where = "cpu-16k fp32, 2 MiB: 2.40 × the floor's time; 2026-01-02, commit c"
    assert cpu_goal(records, "fp32: extra peak ÷ eager's, a small")[2:] == ("0.12, met", where)
    assert cpu_goal(records, "fp16")[2] == "0.75, met"
    assert cpu_goal(records, "N = 64")[2] == "1.3, met"
    assert cpu_goal(records, "runs outside")[2] == "0 of 7 runs, met"
    # no record of a GPU, nor of another number of threads, is taken for this CPU's
    fuzzed = {"kind": "fuzz", "device": "C", "threads": 1, "date": "2026-01-03"}
    assert goals.cpu_table([*records, *gpu_results(), fuzzed]) == goals.cpu_table(records)
    older = [
        {**one, "threads": 1, "date": "2026-01-01", "median_ms": 99.0}
        for one in records
        if "median_ms" in one
    ]
    assert goals.cpu_table([*records, *older]) == goals.cpu_table(records)
    assert all(row[1:] == (goals.CARDS, goals.NO_GPU, "") for row in goals.table(records)[1:])


def test_goals_that_a_run_says_nothing_of():
    for records in ([], gpu_results()):
        assert all(
            row[1:] == (goals.A_CPU, "absent", "") for row in goals.cpu_table(records, "absent")[1:]
        )
    only = [one for one in cpu_results() if one.get("shape") == "cpu-16k" and one["kind"] == "loss"]
    alone = [one for one in only if one["peer"] == "ours-torch"]
    assert cpu_goal(only, "bf16: time ÷ eager")[2] == "0.5625, met"
    assert cpu_goal(only, "training step of SmolVLM-256M, time")[2] == "not yet measured"
    assert cpu_goal(alone, "bf16: time ÷ eager")[2] == "not yet measured"
    assert cpu_goal(alone, "runs outside")[2] == "0 of 4 runs, met"
    # eager of another run is nothing to be compared with
    apart = [
        {**one, "group": f"{one['group']} {one['peer']}"} for one in cpu_results() if "group" in one
    ]
    assert cpu_goal(apart, "bf16: time ÷ eager")[2] == "not yet measured"
    assert cpu_goal(apart, "bf16: extra peak ÷ eager's, a small")[2] == "not yet measured"


@pytest.mark.parametrize(
    ("kind", "change", "where", "name"),
    [
        ("loss", {"median_ms": 2.4}, {"dtype": "bf16"}, "bf16: time ÷ the best of torch.compile"),
        ("loss", {"median_ms": 2.45}, {"selection": "mask"}, "bf16: time ÷ eager"),
        ("loss", {"median_ms": 2.2}, {"dtype": "fp32"}, "fp32: time ÷ the best of torch.compile"),
        (
            "loss",
            {"peak_mib": 61.0},
            {"shape": "cpu-4k-encoder"},
            "bf16: extra peak ÷ torch.compile's",
        ),
        ("workspace", {"peak_mib": 31.0}, {}, "bf16: extra peak ÷ eager's, a small workspace"),
        ("loss", {"median_ms": 4.1}, {"dtype": "fp16"}, "fp16: time ÷ eager"),
        ("loss", {"median_ms": 6.1}, {"shape": "cpu-small", "dtype": "bf16"}, "N = 64"),
        ("loss", {"outside_rule": "dH: error"}, {"selection": "mask"}, "runs outside"),
        ("loss", {"failed": "error"}, {"selection": "mask"}, "runs outside"),
        ("training", {"time_ratio": 1.03}, {}, "training step of SmolVLM-256M, time"),
        ("training", {"memory_ratio": 1.03}, {}, "training step of SmolVLM-256M, memory"),
    ],
)
def test_a_goal_on_a_cpu_that_is_missed(kind, change, where, name):
    records = cpu_results()
    for one in records:
        about = {"kind": kind, "peer": "ours-torch", **where}
        if one["kind"] == "training" == kind or all(
            one.get(key) == value for key, value in about.items()
        ):
            one |= change
    assert cpu_goal(records, name)[2].endswith(", missed")


def test_curves_over_the_workspace_of_a_cpu(tmp_path):
    picture = tmp_path / "workspace.png"
    assert plots.workspaces(gpu_results(), picture) == []
    assert not picture.exists()
    titles = plots.workspaces([*cpu_results(), *gpu_results()], picture)
    assert [title.partition(":")[0] for title in titles] == ["bf16", "bf16", "fp32", "fp32"]
    assert picture.stat().st_size > 10_000
    without = [one for one in cpu_results() if one["dtype"] == "bf16"]
    for one in without:
        one.pop("peak_mib", None)  # a system that does not tell
    assert len(plots.workspaces(without, picture)) == 2
    swept = [one for one in cpu_results() if one["kind"] == "workspace"]
    assert plots.curves(swept, tmp_path / "curves.png") == ["time ÷ floor over the workspace"]


def test_curves(tmp_path):
    picture = tmp_path / "curves.png"
    assert plots.curves([], picture) == []
    assert not picture.exists()
    assert len(plots.curves(gpu_results() + results(), picture)) == len(plots.PANELS)
    assert picture.stat().st_size > 10_000
    without = [one for one in gpu_results() if one["kind"] != "workspace"]
    assert "time ÷ floor over the workspace" not in plots.curves(without, picture)
    square = {"n": 1 << 40, "d": 4096, "m": 4096, "z": 4096, "dtype": "bf16"}
    assert plots.intensity(square) == pytest.approx(12 * 4096**2 / (3 * 4096 * 2))


def test_committed_results_can_be_read():
    for file in record.RESULTS.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            assert json.loads(line).keys() >= STAMP, file
