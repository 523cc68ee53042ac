"""Bake, download or mount: the model's arithmetic, and that it reproduces the run its rates came from."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import bake
from benchmarks.schema import (
    BenchResult,
    ImageFacts,
    Machine,
    MeasuredPhase,
    Resources,
    Run,
    State,
    Way,
    Workload,
)
from builder.cli import app
from builder.errors import InputError
from runtime.phases import Phase

MB = 1_000_000
NODE = bake.Node(registry=100 * MB, hub=50 * MB, unpack=200 * MB, disk=400 * MB)
MODEL = bake.Model(weights=1000 * MB, packed=800 * MB, base=3000 * MB, rest=10.0)


@pytest.mark.parametrize(
    ("way", "expected"),
    [("bake", 8 + 4 + 10), ("download", 20 + 10), ("mount", 2.5 + 10)],
)
def test_seconds_of_each_way(way: Way, expected: float) -> None:
    assert bake.seconds(way, MODEL, NODE) == pytest.approx(expected)


def test_a_node_without_the_base_pulls_it_either_way() -> None:
    bare = replace(NODE, has="nothing")
    for way in ("bake", "download", "mount"):
        assert bake.seconds(way, MODEL, bare) - bake.seconds(way, MODEL, NODE) == pytest.approx(30 + 15)


def test_a_node_with_the_image_only_reads() -> None:
    there = replace(NODE, has="image")
    assert bake.seconds("bake", MODEL, there) == pytest.approx(2.5 + 10)
    assert bake.seconds("download", MODEL, there) == bake.seconds("download", MODEL, NODE)


def test_a_mount_reads_at_its_own_rate() -> None:
    assert bake.seconds("mount", MODEL, replace(NODE, mount=10 * MB)) == pytest.approx(110)
    assert bake.best(MODEL, NODE)[0] == "mount"
    assert bake.best(MODEL, replace(NODE, mount=10 * MB))[0] == "bake"


def test_imports_hide_a_download_as_long_as_they_take() -> None:
    model = replace(MODEL, imports=4.0)
    assert bake.seconds("download", model, NODE) == pytest.approx(20 - 4 + 10)
    assert bake.seconds("download", model, replace(NODE, hub=1000 * MB)) == pytest.approx(10)
    assert bake.seconds("bake", model, NODE) == bake.seconds("bake", MODEL, NODE)


@pytest.mark.parametrize("imports", [0.0, 4.0])
def test_at_the_crossing_both_take_as_long(imports: float) -> None:
    model = replace(MODEL, imports=imports)
    rate = bake.crossing(model, NODE)
    assert rate is not None
    there = replace(NODE, registry=rate)
    assert bake.seconds("bake", model, there) == pytest.approx(bake.seconds("download", model, there))
    faster = replace(NODE, registry=rate * 1.1)
    assert bake.seconds("bake", model, faster) < bake.seconds("download", model, faster)


def test_where_unpacking_alone_takes_longer_than_the_hub_there_is_no_crossing() -> None:
    assert bake.crossing(MODEL, replace(NODE, unpack=10 * MB)) is None


def test_quantizing_saves_transfer_and_may_cost_it_in_the_rest() -> None:
    small = bake.Model(weights=400 * MB, packed=350 * MB, base=3000 * MB, rest=11.0)
    assert bake.quantizing_saves(MODEL, small, "bake", NODE) == pytest.approx(4.5 + 2.25 - 1)
    assert bake.quantizing_saves(MODEL, replace(small, rest=30.0), "bake", NODE) < 0


def pulled(total: float = 25.0) -> Run:
    """800 MB pulled in [0, 8], unpacked in [1, 12]; started, weights in [14, 16.5]."""
    fetched = Resources(net_bytes=800 * MB)
    return Run(
        image="a",
        index=0,
        order=0,
        ok=True,
        created_at=1000.0,
        ready_seconds=total - 1,
        total_seconds=total,
        unattributed_seconds=0.0,
        phases=(
            MeasuredPhase(Phase.IMAGE_PULL, 1000, 1008, "engine", 1, resources=fetched),
            MeasuredPhase(Phase.IMAGE_UNPACK, 1001, 1012, "engine", 1),
            MeasuredPhase(Phase.WEIGHT_LOAD, 1014, 1016.5, "EngineCore", 1),
        ),
    )


def test_rates_of_a_run_reproduce_it() -> None:
    node = bake.rates_of(pulled())
    assert (node.registry, node.unpack, node.disk) == (100 * MB, 200 * MB, None)
    model = replace(MODEL, rest=bake.rest_of(pulled()))
    assert bake.seconds("bake", model, node) == pytest.approx(25.0)


def test_a_run_without_a_pull_gives_no_rates() -> None:
    run = pulled()
    with pytest.raises(ValueError, match="--pull"):
        bake.rates_of(run.model_copy(update={"phases": run.phases[2:]}))


def result_of(*runs: Run) -> BenchResult:
    names = dict.fromkeys(run.image for run in runs)
    return BenchResult(
        created=datetime(2026, 1, 2, tzinfo=UTC),
        machine=Machine(cpu_model="x", cores=1, memory=1, kernel="6", platform="Linux"),
        workload=Workload(),
        images=tuple(ImageFacts(name, f"sha256:{name}", 1) for name in names),
        runs_per_image=1,
        runs=runs,
    )


def first_pull() -> Run:
    return pulled().model_copy(update={"state": State(pulled=True)})


def test_the_first_pull_gives_the_rates_and_the_other_runs_check_them() -> None:
    first = first_pull()
    slow = first.model_copy(update={"total_seconds": 31.25, "index": 1, "order": 1})
    sizes = [1000 * MB]
    node, (a,) = bake.rows(result_of(first, slow), {"hub": 10.0 * MB}, weights=sizes)
    assert (node.registry, node.hub) == pytest.approx((100 * MB, 10 * MB))
    assert (a.way, a.measured) == ("bake", 31.25)
    assert a.predicted == pytest.approx(25.0)
    assert a.error == pytest.approx(-0.2)
    assert a.best == "bake"
    assert set(a.seconds) == {"bake", "download"}  # what was just pulled says nothing of a volume
    (_, (alone,)) = bake.rows(result_of(first), {"disk": 400.0 * MB}, weights=sizes)
    assert alone.best == "mount"
    assert (alone.measured, alone.error) == (None, None)


def three_ways(scale: float = 1.0) -> BenchResult:
    """Baked as `pulled`; downloaded at 50 MB/s beside 4 s of imports; mounted, and read at 100 MB/s.

    Each of these two pulls 8 MB of other layers. scale: of every total.
    """
    imports = MeasuredPhase(Phase.ENGINE_IMPORT, 1012, 1016, "template", 1)
    little = MeasuredPhase(
        Phase.IMAGE_PULL, 1000, 1000.08, "engine", 1, resources=Resources(net_bytes=8 * MB)
    )
    baked = first_pull()
    baked = baked.model_copy(update={"phases": (*baked.phases, imports), "total_seconds": 25.0 * scale})
    download = MeasuredPhase(Phase.MODEL_DOWNLOAD, 1001, 1021, "fetch", 1)
    reading = MeasuredPhase(Phase.WEIGHT_LOAD, 1005, 1017.5, "EngineCore", 1)
    others = [
        baked.model_copy(
            update={
                "image": name, "order": order, "phases": (little, event),
                "total_seconds": (0.12 + 13.0 + extra) * scale,
            }
        )
        for order, (name, event, extra) in enumerate(
            [("download", download, 20.0 - 4.0), ("mount", reading, 10.0)], start=1
        )
    ]  # fmt: skip
    again = [run.model_copy(update={"index": 1, "order": run.order + 3}) for run in (baked, *others)]
    ways: dict[str, Way] = {"a": "bake", "download": "download", "mount": "mount"}
    images = tuple(
        ImageFacts(name, f"sha256:{name}", 1, weights=way, weight_bytes=1000 * MB)
        for name, way in ways.items()
    )
    return result_of(baked, *others, *again).model_copy(update={"images": images})


def test_each_way_is_predicted_from_the_baked_run_and_its_own_rate() -> None:
    node, rows = bake.rows(three_ways(), {})
    assert (node.registry, node.hub, node.mount) == pytest.approx((100 * MB, 50 * MB, 100 * MB))
    assert [row.way for row in rows] == ["bake", "download", "mount"]
    assert [row.predicted for row in rows] == pytest.approx([25.0, 0.12 + 13 + 16, 0.12 + 13 + 10])
    assert [row.error for row in rows] == pytest.approx([0.0, 0.0, 0.0])
    assert {way: seconds for row in rows[:1] for way, seconds in row.seconds.items()} == pytest.approx(
        {"bake": 25.0, "download": 29.0, "mount": 23.0}
    )


def test_runs_at_other_rates_check_the_model_at_those() -> None:
    _, rows = bake.rows(three_ways(), {"registry": 50.0 * MB}, check=three_ways(1.25))
    # Twice as long to pull 800 MB, and 8 MB.
    assert [row.predicted for row in rows] == pytest.approx([33.0, 29.2, 23.2])
    assert rows[0].measured == pytest.approx(31.25)
    assert rows[0].error == pytest.approx(33.0 / 31.25 - 1)


def test_held_to_another_file_the_median_run_calibrates() -> None:
    """So that a first run that something disturbed decides nothing."""
    result = three_ways()
    slow = [run.model_copy(update={"total_seconds": 2 * (run.total_seconds or 0)}) for run in result.runs[:3]]
    again = [run.model_copy(update={"index": 2}) for run in result.runs[3:]]
    disturbed = result.model_copy(update={"runs": (*slow, *result.runs[3:], *again), "runs_per_image": 3})
    _, rows = bake.rows(disturbed, {}, check=result)
    assert [row.error for row in rows] == pytest.approx([0.0, 0.0, 0.0])
    _, alone = bake.rows(disturbed, {})
    assert alone[0].error == pytest.approx(1.0)


def test_without_a_baked_image_or_a_size_nothing_is_predicted() -> None:
    result = three_ways()
    with pytest.raises(ValueError, match="--weights"):
        bake.rows(result.model_copy(update={"images": (ImageFacts("a", "sha256:a", 1),)}), {})
    elsewhere = tuple(image for image in result.images if image.weights != "bake")
    with pytest.raises(ValueError, match="baked"):
        bake.rows(result.model_copy(update={"images": elsewhere}), {})


def test_the_command_says_what_is_soonest(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(result_of(pulled().model_copy(update={"state": State(pulled=True)})).model_dump_json())
    command = ["bench", "bake", str(file), "--weights", "1000", "--hub", "50", "--mount", "1"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "a: bake is soonest; bake 25.0 s, download 33.0 s" in shown.output
    assert "from 50 MB/s" in shown.output
    assert "not checked" in shown.output
    assert "nothing is said of mounting" not in shown.output
    untold = CliRunner().invoke(app, command[:-2])
    assert (
        "mount not known; the node has all but the weights\nnothing is said of mounting: give --mount"
        in untold.output
    )
    both = tmp_path / "three.json"
    both.write_text(three_ways().model_dump_json())
    checked = CliRunner().invoke(app, ["bench", "bake", str(both), "--check", str(both)])
    assert checked.exit_code == 0, checked.output
    assert "error of the model (download): 29.1 s predicted, 29.1 s measured, +0.0%" in checked.output
    with pytest.raises(InputError, match="more than 0|not a size"):
        CliRunner().invoke(app, [*command, "--hub", "0"], catch_exceptions=False)


def cold_starts(folder: Path) -> Path:
    """A result without a pull, whose imports read 800 MB in 2 s while the weights were hardly read at all."""
    reading = MeasuredPhase(
        Phase.ENGINE_IMPORT, 1000, 1002, "template", 1, resources=Resources(read_bytes=800 * MB)
    )
    little = MeasuredPhase(
        Phase.WEIGHT_LOAD, 1003, 1003.001, "EngineCore", 1, resources=Resources(read_bytes=1 * MB)
    )
    run = pulled().model_copy(update={"state": State(page_cache="cold"), "phases": (reading, little)})
    path = folder / "cold.json"
    path.write_text(result_of(run).model_dump_json())
    return path


def test_a_node_that_has_more_or_less_than_the_measured_one(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(three_ways().model_dump_json())
    command = ["bench", "bake", str(file)]
    nothing = CliRunner().invoke(app, [*command, "--node-has", "nothing", "--base", "3000"])
    assert nothing.exit_code == 0, nothing.output
    assert "the node has nothing" in nothing.output
    assert "bake 70.0 s, download 74.0 s, mount 68.0 s" in nothing.output  # 30 to pull, 15 to unpack
    assert "(bake): 25.0 s predicted, 25.0 s measured" in nothing.output  # by nodes that had the base
    there = CliRunner().invoke(app, [*command, "--node-has", "image", "--cold", str(cold_starts(tmp_path))])
    assert "disk 400," in there.output, there.output
    assert "bake 15.5 s" in there.output
    assert "of the registry on" not in there.output
    slow = CliRunner().invoke(app, [*command, "--unpack", "100"])
    assert "bake 29.0 s" in slow.output  # 800 MB take 8 s, not 4
    for wrong, words in (
        (["--base", "3000"], "go together"),
        (["--node-has", "nothing"], "go together"),
        (["--node-has", "image"], "does not tell"),
        (["--cold", str(file)], "does not tell"),
        (["--cold", str(file), "--disk", "1"], "both tell"),
    ):
        with pytest.raises(InputError, match=words):
            CliRunner().invoke(app, [*command, *wrong], catch_exceptions=False)


def test_what_smaller_weights_save_is_told_for_each_way(tmp_path: Path) -> None:
    first = first_pull()
    less = MeasuredPhase(Phase.IMAGE_PULL, 1000, 1004, "engine", 1, resources=Resources(net_bytes=400 * MB))
    small = first.model_copy(
        update={"image": "small", "order": 1, "phases": (less,), "total_seconds": 4.0 + 13.0}
    )
    file = tmp_path / "r.json"
    file.write_text(result_of(first, small).model_dump_json())
    command = [
        "bench",
        "bake",
        str(file),
        "--weights",
        "1000",
        "--weights",
        "500",
        "--hub",
        "50",
        "--mount",
        "100",
    ]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    # Of 400 MB less to pull and unpack, and 500 MB less to download or read.
    assert "small instead of a saves: bake +6.0 s, download +10.0 s, mount +5.0 s" in shown.output


def test_a_result_without_pulls_is_told(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(result_of(pulled()).model_dump_json())
    with pytest.raises(InputError, match="--pull"):
        CliRunner().invoke(app, ["bench", "bake", str(file), "--weights", "1"], catch_exceptions=False)
