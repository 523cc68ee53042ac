"""States that a run is made to find: caches, pulls; what they measure, and that nothing of them is left."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page_cache
from benchmarks.harness import Conditions
from benchmarks.pull import Pull
from benchmarks.schema import ImageFacts, Run, State
from builder.errors import BuildError, HostError, InputError
from runtime.phases import Phase, now
from tests.unit.test_bench_harness import Notes, StubContainer, StubHost, Watching, bench

ROOT = "VLLM_CACHE_ROOT"

# Page cache


@pytest.fixture
def folder() -> Iterator[Path]:
    # /tmp may be a tmpfs, whose pages cannot be dropped.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        (folder / "sub").mkdir()
        (folder / "big").write_bytes(os.urandom(3 << 20))
        (folder / "sub/small").write_bytes(b"x")
        (folder / "empty").touch()
        (folder / "link").symlink_to("big")
        yield folder


PAGES = (3 << 20) // mmap.PAGESIZE + 1


def test_files_are_dropped_and_primed_and_that_is_counted_page_by_page(folder: Path) -> None:
    assert page_cache.bring([folder], "cold") == page_cache.Residency(0, PAGES)
    with (folder / "big").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
        os.pread(file.fileno(), 10, 0)
    assert 0 < page_cache.residency([folder]).resident < PAGES
    assert page_cache.bring([folder], "warm") == page_cache.Residency(PAGES, PAGES)


def test_pages_that_another_process_holds_are_not_called_cold(folder: Path) -> None:
    with (folder / "big").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) > 0
        with pytest.raises(HostError, match="stay in the page cache"):
            page_cache.bring([folder], "cold")


def test_files_on_another_machine_are_told_before_anything_starts(tmp_path: Path) -> None:
    host = StubHost(ours={})
    host.folders = [tmp_path / "elsewhere"]
    with pytest.raises(HostError, match="cannot read the image's files"):
        bench(host, "ours", conditions=Conditions(page_cache="cold"))
    assert host.containers == []


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_the_page_cache_is_in_its_state_when_the_container_is_created(folder: Path, state: Any) -> None:
    found: list[float] = []

    def make(name: str, plan: dict[str, Any]) -> StubContainer:
        found.append(page_cache.residency([folder]).share)
        return StubContainer(name, plan)

    host = StubHost(make, ours={})
    host.folders = [folder]
    page_cache.bring([folder], "warm" if state == "cold" else "cold")
    (run,) = bench(host, "ours", conditions=Conditions(page_cache=state)).runs
    assert found == [1.0 if state == "warm" else 0.0]
    assert run.state == State(page_cache=state)


# Compile cache


def compile_runs(host: StubHost, state: Any, *, runs: int = 2) -> tuple[Run, ...]:
    found = bench(host, *host.plans, runs=runs, conditions=Conditions(compile_cache=state)).runs
    assert [volume.removed for volume in host.volumes] == [1] * len(host.volumes)
    assert {run.state for run in found} == {State(compile_cache=state)}
    return found


def test_a_cold_compile_cache_is_a_new_volume_for_each_run() -> None:
    host = StubHost(ours={})
    assert all(run.ok for run in compile_runs(host, "cold"))
    assert [list(mounts) for _, mounts in host.started] == [["volume-0"], ["volume-1"]]
    environment, mounts = host.started[0]
    assert environment["VLLM_CACHE_ROOT"].startswith(mounts["volume-0"])


def test_a_warm_compile_cache_is_filled_by_a_start_that_does_not_count() -> None:
    host = StubHost(ours={}, stock={})
    runs = compile_runs(host, "warm")
    assert len(runs) == 4
    assert len(host.started) == 6
    # ours is primed, ours; stock is primed, stock; then stock, ours again
    assert [next(iter(mounts)) for _, mounts in host.started] == [
        *["volume-0"] * 2,
        *["volume-1"] * 3,
        "volume-0",
    ]


def test_another_servers_arguments_get_a_warm_cache_of_their_own() -> None:
    """What they compile is other code."""
    host = StubHost(ours={})
    conditions = Conditions(compile_cache="warm", sample=False)
    assert all(run.ok for run in bench(host, "ours", "ours --dtype float32", conditions=conditions).runs)
    assert [next(iter(mounts)) for _, mounts in host.started] == [*["volume-0"] * 2, *["volume-1"] * 2]


def test_a_watcher_begins_anew_after_the_start_that_fills_a_cache() -> None:
    seen = Watching()
    conditions = Conditions(compile_cache="warm", sample=False)
    (run,) = bench(StubHost(ours={}), "ours", conditions=conditions, watcher=seen).runs
    assert [entry for entry in seen.all if not isinstance(entry, Phase)] == [
        *["ours", "answered"] * 2,
        run,
    ]


@pytest.mark.parametrize(
    ("plan", "stays_empty", "reason"),
    [({"ready_after": None, "die_after": 0.05}, False, "exited with code 3"), ({}, True, "wrote nothing")],
)
def test_a_cache_that_could_not_be_filled_fails_the_run(
    plan: dict[str, Any], stays_empty: bool, reason: str
) -> None:
    host = StubHost(ours=plan)
    host.volumes_stay_empty = stays_empty
    (run,) = compile_runs(host, "warm", runs=1)
    assert not run.ok
    assert "The start that fills the compile cache failed" in run.error
    assert reason in run.error


def test_ctrl_c_while_a_cache_is_filled_leaves_no_volume() -> None:
    def make(name: str, plan: dict[str, Any]) -> StubContainer:
        raise KeyboardInterrupt

    host = StubHost(make, ours={})
    with pytest.raises(KeyboardInterrupt):
        compile_runs(host, "warm")
    assert [volume.removed for volume in host.volumes] == [1]


class OursHost(StubHost):
    def image_facts(self, image: str) -> ImageFacts:
        found = super().image_facts(image)
        return replace(found, weights="bake") if image == "ours" else found


@pytest.mark.parametrize("given", [Conditions(compile_cache="warm"), Conditions(environment={ROOT: "/x"})])
def test_a_cache_that_hides_the_recording_of_an_image_of_ours_is_told(given: Conditions) -> None:
    ours, stock = bench(OursHost(ours={}, stock={}), "ours", "stock", conditions=given).runs
    (warning,) = (each for each in ours.warnings if ROOT in each)
    assert warning.endswith("a recording in the image is not used")
    assert not [each for each in stock.warnings if ROOT in each]


def test_an_image_of_ours_with_its_own_cache_has_no_warning() -> None:
    (run,) = bench(OursHost(ours={}), "ours", conditions=Conditions(sample=False)).runs
    assert run.warnings == ()


# Pull


def message(status: str, layer: str = "", **detail: int) -> Mapping[str, Any]:
    return {"status": status, "id": layer, "progressDetail": detail}


# As Docker Engine 20.10 sends them, seconds after the request.
MESSAGES = [
    (0.04, message("Pulling from team/image", "registry/team/image@sha256:1")),
    (0.05, message("Already exists", "base")),
    (0.05, message("Pulling fs layer", "a")),
    (0.05, message("Pulling fs layer", "b")),
    (0.10, message("Downloading", "a", current=100, total=8000)),
    (0.11, message("Downloading", "b", current=100, total=3000)),
    (0.20, message("Verifying Checksum", "b")),
    (0.20, message("Download complete", "b")),
    (0.25, message("Extracting", "b", current=100, total=3000)),
    (0.60, message("Download complete", "a")),
    (0.90, message("Extracting", "a", current=8000, total=8000)),
    (1.00, message("Pull complete", "a")),
    (1.10, message("Status: Downloaded newer image")),
]


def test_pulling_ends_with_the_last_byte_and_unpacking_begins_with_the_first_layer() -> None:
    pull = Pull(1000.0)
    pull.follow((1000.0 + at, each) for at, each in MESSAGES)
    fetch, unpack = pull.phases()
    assert (fetch.phase, fetch.start, fetch.end) == (Phase.IMAGE_PULL, 1000.0, 1000.6)
    assert (unpack.phase, unpack.start, unpack.end) == (Phase.IMAGE_UNPACK, 1000.25, 1001.1)
    assert fetch.detail == "2 layers fetched, 1 were here"
    assert fetch.resources is not None
    assert fetch.resources.net_bytes == pull.downloaded == 11000


class PullHost(StubHost):
    """The registry holds what it is told to; `answer` is what a pull does."""

    def __init__(self, messages: Any, **plans: dict[str, Any]) -> None:
        super().__init__(StubContainer, **plans)
        self.messages, self.removed = messages, list[str]()
        self.confirmed = True

    def registry_digest(self, reference: str) -> str:
        if not self.confirmed:
            raise InputError("the registry does not confirm it")
        return f"{reference}@sha256:1"

    def remove_image(self, reference: str) -> None:
        self.removed.append(reference)

    def pull(self, digest: str, tag: str, patience: float) -> Iterator[Mapping[str, Any]]:
        yield from self.messages()


def test_a_run_with_a_pull_begins_with_it() -> None:
    host = PullHost(lambda: (each for _, each in MESSAGES), ours={})
    (run,) = bench(host, "ours", conditions=Conditions(pull=True)).runs
    assert run.ok
    assert host.removed == ["ours@sha256:1", "ours"]
    first = run.phases[0]
    assert (first.phase, first.start) == (Phase.IMAGE_PULL, run.created_at)
    start = next(event for event in run.phases if event.phase == Phase.CONTAINER_START)
    assert start.start > first.end
    assert run.total_seconds is not None
    assert run.end == pytest.approx(run.phases[-1].end)


def test_an_image_that_the_registry_does_not_confirm_is_not_removed() -> None:
    host = PullHost(list, ours={})
    host.confirmed = False
    with pytest.raises(InputError):
        bench(host, "ours", conditions=Conditions(pull=True))
    assert host.removed == []


def test_a_pull_that_fails_is_a_failed_run_with_what_came_before() -> None:
    def broken() -> Iterator[Mapping[str, Any]]:
        yield from (each for _, each in MESSAGES[:6])
        raise BuildError("cannot pull it", why="connection reset")

    notes = Notes()
    (run,) = bench(PullHost(broken, ours={}), "ours", conditions=Conditions(pull=True), reporter=notes).runs
    assert run.error == "cannot pull it. connection reset."
    assert [event.phase for event in run.phases] == [Phase.IMAGE_PULL]
    assert "docker pull ours@sha256:1" in notes.notes[0]


def test_a_slow_pull_ends_at_the_timeout() -> None:
    def endless() -> Iterator[Mapping[str, Any]]:
        while True:
            yield message("Downloading", "a", current=1, total=8000)

    began = now()
    (run,) = bench(PullHost(endless, ours={}), "ours", conditions=Conditions(pull=True), timeout=0.2).runs
    assert "not pulled within 0.2 s" in run.error
    assert run.created_at >= began


def test_pull_and_page_cache_exclude_each_other() -> None:
    with pytest.raises(InputError, match="page cache"):
        bench(StubHost(ours={}), "ours", conditions=Conditions(pull=True, page_cache="cold"))
