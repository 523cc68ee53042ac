"""The README says what the committed results say."""

from __future__ import annotations

from pathlib import Path

from benchmarks import readme
from benchmarks.schema import read_result

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_figures_are_those_of_the_newest_results() -> None:
    for line in readme.tables().splitlines():
        assert line in README, "python -m benchmarks.readme prints what belongs there"


def test_the_newest_results_are_of_one_run_of_the_suite() -> None:
    """One machine, one day, the same images: else the tables would compare what was never compared."""
    paths = [readme.newest(kind, cache) for kind in ("smollm2", "default") for cache in ("warm", "cold")]
    results = [read_result(path) for path in paths]
    assert len({result.machine for result in results}) == 1
    ids = [{image.reference: image.id for image in result.images} for result in results]
    for one in ids:
        assert {name: one[name] for name in one if name in ids[0]}.items() <= ids[0].items()
    assert readme.newest("smollm2", "warm").with_suffix(".svg").name in README
