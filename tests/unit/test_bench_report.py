"""What the reports say of a result with known numbers."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from benchmarks.report import comparison, markdown, phase_table
from benchmarks.schema import BenchResult, ImageFacts, MeasuredPhase, Run, State, Workload
from benchmarks.stats import Verdict
from benchmarks.summary import baseline_lines, decide, phase_rows, short_names, summary_lines, with_baseline
from runtime.phases import Phase


def known_run(image: str, order: int, total: float, *, runtime: bool = True, t0: float = 1000.0) -> Run:
    """Container start 1 s; import [1, 3]; weights [2, 4]; nothing [4, total - 0.5]; first token 0.5 s."""
    end = t0 + total
    events = [
        MeasuredPhase(Phase.READY, end - 0.5, end - 0.5, "client", 7),
        MeasuredPhase(Phase.FIRST_TOKEN, end - 0.5, end, "client", 7),
    ]
    if runtime:
        events = [
            MeasuredPhase(Phase.CONTAINER_START, t0, t0 + 1, "client", 7),
            MeasuredPhase(Phase.ENGINE_IMPORT, t0 + 1, t0 + 3, "api", 1),
            MeasuredPhase(Phase.WEIGHT_LOAD, t0 + 2, t0 + 4, "engine_core", 2),
            *events,
        ]
    return Run(
        image=image,
        index=order // 2,
        order=order,
        ok=True,
        created_at=t0,
        ready_seconds=total - 0.5,
        total_seconds=total,
        unattributed_seconds=total - (4.5 if runtime else 0.5),
        phases=tuple(events),
        phases_from="runtime" if runtime else "client",
        answer=" Paris.",
        exit_code=0,
    )


def known_result(*runs: Run, images: tuple[str, ...] = ("ours:awq", "stock[1]")) -> BenchResult:
    return BenchResult.model_validate(
        {
            "created": "2026-01-02T03:04:05Z",
            "machine": {
                "cpu_model": "Test CPU",
                "cores": 2,
                "memory": 24 << 30,
                "kernel": "6.1",
                "platform": "Linux x86_64",
                "docker_engine": "20.10",
            },
            "workload": Workload(),
            "images": [ImageFacts(image, "sha256:1", 1) for image in images],
            "runs_per_image": max(1, len(runs) // len(images)),
            "runs": runs,
        }
    )


def compared(runs: int) -> BenchResult:
    ours = [known_run("ours:awq", 2 * i, 5.0 + i) for i in range(runs)]
    stock = [known_run("stock[1]", 2 * i + 1, 10.0 + 2 * i, runtime=False) for i in range(runs)]
    return known_result(*ours, *stock)


def shown(renderable: object, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rows_are_phases_in_order_then_unattributed_and_totals() -> None:
    rows = {row.name: [cell and cell.median for cell in row.cells] for row in phase_rows(compared(3))}
    assert list(rows.items()) == [
        ("container_start", [1.0, None]),
        ("engine_import", [2.0, None]),
        ("weight_load", [2.0, None]),
        ("first_token", [0.5, 0.5]),
        ("unattributed", [1.5, 11.5]),
        ("ready (total)", [5.5, 11.5]),
        ("first token (total)", [6.0, 12.0]),
    ]


def test_a_phase_that_one_run_lacks_took_no_time_in_it() -> None:
    without = known_run("a", 2, 6.0)
    without = without.model_copy(
        update={"phases": tuple(e for e in without.phases if e.phase != Phase.WEIGHT_LOAD)}
    )
    rows = {r.name: r for r in phase_rows(known_result(known_run("a", 0, 6.0), without, images=("a",)))}
    assert rows["weight_load"].cells[0] is not None
    assert rows["weight_load"].cells[0].median == 1.0


def test_a_run_whose_phases_could_not_be_read_does_not_count_as_zero() -> None:
    blind = known_run("a", 2, 6.0, runtime=False)
    rows = {r.name: r for r in phase_rows(known_result(known_run("a", 0, 6.0), blind, images=("a",)))}
    assert rows["engine_import"].cells[0] is not None
    assert rows["engine_import"].cells[0].median == 2.0


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_table_shows_every_number_at_any_width(width: int) -> None:
    text = shown(phase_table(compared(3)), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert all(number in text for number in ("6.00", "(5.50-6.50)", "12.00", "(11.00-13.00)"))
    assert "overlap; they do not add up" in " ".join(text.split())
    assert "stock[1]" in text


def test_names_are_short_where_they_stay_distinct() -> None:
    apart = known_result(images=("reg:5000/team/a:1", "other/b:1"))
    alike = known_result(images=("reg:5000/a:1", "other/a:1"))
    assert list(short_names(apart).values()) == ["a:1", "b:1"]
    assert list(short_names(alike).values()) == ["reg:5000/a:1", "other/a:1"]


def ratio_line(runs: int) -> str:
    (line,) = (line for line in summary_lines(compared(runs)) if "times as long" in line)
    assert line.startswith("stock[1] takes 2.00 times as long as ours:awq to the first token (")
    return line


def test_six_runs_have_a_bootstrap_interval_and_three_say_that_they_are_few() -> None:
    assert "95% bootstrap interval" in ratio_line(6)
    assert "too few runs for a 95% interval" in ratio_line(3)


def test_two_runs_have_a_ratio_without_an_interval() -> None:
    (line,) = (line for line in summary_lines(compared(2)) if "times as long" in line)
    assert "would not be meaningful" in line


def test_the_summary_says_what_where_and_how_often() -> None:
    text = "\n".join(summary_lines(compared(3)))
    assert "Compared: ours:awq and stock[1], each started 3 times, in turn; none failed" in text
    assert "page cache not controlled" in text
    assert "Test CPU, 2 cores, 24 GiB, Linux x86_64, kernel 6.1, Docker Engine 20.10" in text
    assert "same answer" in text


def test_differing_answers_of_one_image_are_told() -> None:
    odd = known_run("a", 2, 6.0).model_copy(update={"answer": " Rome."})
    text = "\n".join(summary_lines(known_result(known_run("a", 0, 6.0), odd, images=("a",))))
    assert "differ between runs of a" in text


def test_the_waterfall_shows_the_median_run_with_every_event() -> None:
    text = shown(comparison(compared(3)), 80)
    assert "ours:awq, run 2 (the median): 6.00 s to the first token" in text
    bars = text.split("(the median)")[1]
    assert all(name in bars for name in ("container_start", "engine_import api", "weight_load engine_core"))
    assert "█" in bars
    assert "unattributed" in bars
    assert all(len(line) <= 80 for line in text.splitlines())


def test_failed_runs_are_reported_with_reason_and_log() -> None:
    failed = Run(
        image="a", index=1, order=1, ok=False, error="It [died].", created_at=1.0, log_tail="x\nlast [line]"
    )
    text = shown(comparison(known_result(known_run("a", 0, 6.0), failed, images=("a",))))
    assert "a, run 2 failed: It [died]." in text
    assert "last [line]" in text
    assert "1 of 2 runs failed" in text


def test_an_image_whose_runs_all_failed_still_has_a_report() -> None:
    failed = Run(image="b", index=0, order=1, ok=False, error="No.", created_at=1.0)
    result = known_result(known_run("a", 0, 6.0), failed, images=("a", "b"))
    assert "b: no run reached its first token." in shown(comparison(result))
    assert "| **first token (total)** | 6.00 | – |" in markdown(result)  # noqa: RUF001


def test_the_markdown_has_a_column_per_image() -> None:
    lines = markdown(compared(3)).splitlines()
    assert lines[0] == "| phase, seconds | `ours:awq` | `stock[1]` |"
    assert lines[1] == "|---|---:|---:|"
    assert "| **first token (total)** | 6.00 (5.50-6.50) | 12.00 (11.00-13.00) |" in lines
    assert any("Test CPU" in line for line in lines)


def test_the_first_run_reading_from_disk_is_pointed_out() -> None:
    totals = [30.0, 6.0, 6.1, 5.9]
    runs = [known_run("a", 2 * i, total) for i, total in enumerate(totals)]
    text = "\n".join(summary_lines(known_result(*runs, images=("a",))))
    assert "a: the first measured run took 30.00 s" in text


def test_the_verdict_names_what_dominates_the_critical_path() -> None:
    lines = summary_lines(compared(3))
    assert (
        "ours:awq: weight loading is 2.0 of 6.0 s (33%); "
        "next: time that no phase explains 1.5 s, container start 1.0 s." in lines
    )
    assert (
        "stock[1]: time that no phase explains is 11.5 of 12.0 s (96%); next: first token 0.5 s; "
        "the image reports no phases." in lines
    )


def test_scatter_is_told_with_a_remedy() -> None:
    runs = [known_run("a", 2 * i, total) for i, total in enumerate([5.0, 6.0, 7.0, 8.0])]
    assert "a: noisy: " in "\n".join(summary_lines(known_result(*runs, images=("a",))))


def slower(baseline: list[float], candidate: list[float]) -> BenchResult:
    runs = [known_run("old", 2 * i, total) for i, total in enumerate(baseline)]
    runs += [known_run("new", 2 * i + 1, total) for i, total in enumerate(candidate)]
    return known_result(*runs, images=("old", "new"))


@pytest.mark.parametrize(
    ("candidate", "verdict", "why"),
    [
        (
            [12.0, 12.1, 12.2],
            Verdict.REGRESSED,
            "REGRESSED: even the low end of the interval, 1.19,",
        ),
        (
            [10.0, 10.1, 10.2],
            Verdict.HELD,
            "no regression: the high end of the interval, 1.03,",
        ),
        (
            [10.0, 11.0, 12.0],
            Verdict.UNDECIDED,
            "not decided: the interval, 0.99 to 1.21,",
        ),
        ([12.0], Verdict.UNDECIDED, "not decided: once measured on one side"),
    ],
)
def test_a_regression_is_decided_by_the_interval_and_says_why(
    candidate: list[float], verdict: Verdict, why: str
) -> None:
    (decision,) = decide(slower([9.9, 10.0, 10.1], candidate), 0.10)
    assert (decision.image, decision.verdict) == ("new", verdict)
    assert decision.sentence.startswith(f"new: {why}")


def test_a_baseline_from_a_file_comes_first_and_says_that_it_ran_at_another_time() -> None:
    now, then = compared(3), compared(3)
    merged = with_baseline(now, then, "ours:awq")
    assert [image.reference for image in merged.images] == ["ours:awq (baseline)", "ours:awq", "stock[1]"]
    assert [len(merged.measured(image.reference)) for image in merged.images] == [3, 3, 3]
    assert "in turn" not in summary_lines(merged)[0]
    assert [d.verdict for d in decide(merged, 0.5)] == [Verdict.HELD, Verdict.UNDECIDED]
    assert baseline_lines(now, then, "a.json") == [
        "Baseline: a.json, measured 2026-01-02 03:04 UTC, not in turn."
    ]


def test_a_baseline_of_another_machine_is_told() -> None:
    now = compared(3)
    then = now.model_copy(update={"machine": now.machine.model_copy(update={"cores": 8})})
    assert "another machine (Test CPU, 8 cores" in baseline_lines(now, then, "a.json")[1]


def in_state(result: BenchResult, state: State) -> BenchResult:
    runs = tuple(run.model_copy(update={"state": state}) for run in result.runs)
    return result.model_copy(update={"runs": runs})


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        (
            State(page_cache="warm"),
            State(page_cache="cold"),
            "the baseline ran with page cache warm, compile cache not controlled, "
            "these starts with page cache cold, compile cache not controlled; "
            "measure both with the same --page-cache",
        ),
        (State(), State(compile_cache="cold"), "measure both with the same --compile-cache"),
        (State(compile_cache="warm"), State(pulled=True), "the same --compile-cache and --pull"),
    ],
)
def test_starts_in_another_state_than_the_baselines_decide_nothing(
    then: State, now: State, told: str
) -> None:
    result = slower([9.9, 10.0, 10.1], [20.0, 20.1, 20.2])
    old = result.model_copy(update={"images": result.images[:1], "runs": result.runs[:3]})
    new = result.model_copy(update={"images": result.images[1:], "runs": result.runs[3:]})
    old, new = in_state(old, then), in_state(new, now)
    (decision,) = decide(with_baseline(new, old, "old"), 0.10)
    assert decision.verdict is Verdict.UNDECIDED
    assert decision.sentence.startswith("new: not decided: the baseline ran with ")
    assert decision.sentence.endswith(f"{told}.")
    assert baseline_lines(new, old, "a.json")[-1].startswith("Not comparable: the baseline ran with ")


def test_starts_in_the_baselines_state_are_decided() -> None:
    result = in_state(slower([9.9, 10.0, 10.1], [20.0, 20.1, 20.2]), State(page_cache="cold"))
    assert [decision.verdict for decision in decide(result, 0.10)] == [Verdict.REGRESSED]
