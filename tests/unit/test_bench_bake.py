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


def test_at_the_crossing_both_take_as_long() -> None:
    rate = bake.crossing(MODEL, NODE)
    assert rate is not None
    there = replace(NODE, registry=rate)
    assert bake.seconds("bake", MODEL, there) == pytest.approx(bake.seconds("download", MODEL, there))
    faster = replace(NODE, registry=rate * 1.1)
    assert bake.seconds("bake", MODEL, faster) < bake.seconds("download", MODEL, faster)


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
    node = bake.rates_of(pulled(), weights=1000 * MB)
    assert (node.registry, node.unpack, node.disk) == pytest.approx((100 * MB, 200 * MB, 400 * MB))
    model = replace(MODEL, rest=bake.rest_of(pulled()))
    predicted = bake.seconds("bake", model, node)
    assert bake.error(predicted, [pulled()]) == pytest.approx(0.0)
    assert bake.error(predicted, [pulled(20.0)]) == pytest.approx(0.25)


def test_a_run_without_a_pull_gives_no_rates() -> None:
    run = pulled()
    with pytest.raises(ValueError, match="--pull"):
        bake.rates_of(run.model_copy(update={"phases": run.phases[2:]}), weights=1)


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


def test_the_first_pull_gives_the_rates_and_the_other_runs_check_them() -> None:
    first = pulled().model_copy(update={"state": State(pulled=True)})
    slow = first.model_copy(update={"total_seconds": 31.25, "index": 1, "order": 1})
    other = first.model_copy(update={"image": "b", "order": 2})
    node, (a, b) = bake.rows(result_of(first, slow, other), [1000 * MB, 1000 * MB], {"hub": 10.0 * MB})
    assert (node.registry, node.hub) == pytest.approx((100 * MB, 10 * MB))
    assert a.error == pytest.approx(-0.2)
    assert b.error == pytest.approx(0.0)
    assert a.best == "mount"
    assert a.seconds["bake"] == pytest.approx(25.0)


def test_the_command_says_what_is_soonest(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(result_of(pulled().model_copy(update={"state": State(pulled=True)})).model_dump_json())
    command = ["bench", "bake", str(file), "--weights", "1000", "--hub", "50", "--mount", "1"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "a: bake is soonest; bake 25.0 s, download 33.0 s" in shown.output
    assert "from 50 MB/s" in shown.output
    with pytest.raises(InputError, match="more than 0|not a size"):
        CliRunner().invoke(app, [*command, "--hub", "0"], catch_exceptions=False)


def test_a_result_without_pulls_is_told(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(result_of(pulled()).model_dump_json())
    with pytest.raises(InputError, match="--pull"):
        CliRunner().invoke(app, ["bench", "bake", str(file), "--weights", "1"], catch_exceptions=False)
