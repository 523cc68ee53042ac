"""What each quantization setting loses, on more than one model, and what quantizing takes.

    python -m benchmarks.quantization OUT.json --model NAME=FOLDER ... [--train STEPS] [--cost]
        [--method NAME ...] [--no-symmetric] [--runs N]

Every setting is compared with round-to-nearest at equal group size and symmetry. Finished runs are kept in
OUT.json and not repeated, so an interrupted study goes on where it was. `--train` adds a small model trained
here, which its name tells the steps of. `--cost` measures time and memory of the default settings instead, of
random Llamas of two sizes and of the named models; it prints the lines that builder/quantization_cost.py
keeps, which the random ones decide, and what was predicted of each run. Leave the machine alone meanwhile,
and start with an empty COLDSTART_CACHE.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from builder.build import cache_folder
from builder.calibration import Calibration
from builder.methods import METHODS
from builder.methods.awq import AWQ
from builder.methods.method import Modifier
from builder.models import ModelSnapshot, parse_ref, resolve
from builder.quantization_cost import GIB, Cost, predict
from builder.quantize import ensure_environment, job_environment, quantize
from builder.recipe import HELD_OUT_BLOCKS, Recipe, choose_recipe
from builder.report import SilentReporter

SMALL_MODELS = Path(__file__).with_name("small_models.py")
TRAINED = "stdlib-llama-5M"
# hidden size and layers: 53 and 172 million parameters
RANDOM = {"random-53M": (640, 9), "random-172M": (1024, 12)}
VARIANTS = {
    f"awq-duo-{value}": replace(AWQ, transforms=(Modifier(AWQ.transforms[0].name, {"duo_scaling": value}),))
    for value in (True, False)
}
# What differs from the recipe that `coldstart build` would choose: method, symmetry and group size in all
# combinations, each beside round-to-nearest, then what else decides.
GRID: tuple[Mapping[str, Any], ...] = tuple(
    {"method": method, "symmetric": symmetric, "group_size": group}
    for group in (64, 128, 32)
    for symmetric in (False, True)
    for method in ("rtn", "gptq", "awq-gptq", "awq")
)
# What 4-bit methods take; FP8 takes what rounding to nearest does.
_COST_METHODS = tuple(name for name, method in METHODS.items() if method.format == "int4")
CALIBRATION: tuple[Mapping[str, Any], ...] = (
    {"method": "awq", "calibration_samples": 64},
    {"method": "gptq", "calibration_samples": 64},
    {"method": "awq-duo-True"},
    {"method": "awq-duo-False"},
    {"method": "awq", "calibration_samples": 8, "calibration_tokens": 512},
)


def _small_model(folder: Path, *arguments: str) -> None:
    if (folder / "config.json").exists():
        return
    python = ensure_environment(cache_folder().absolute(), SilentReporter())
    folder.mkdir(parents=True, exist_ok=True)
    kind, *numbers = arguments
    subprocess.run(
        [python, "-I", SMALL_MODELS, kind, folder, *numbers],
        env=job_environment(os.environ, folder.parent),
        check=True,
    )


def _library_texts() -> Calibration:
    """What the trained model has not seen."""
    from benchmarks.small_models import held_out

    return Calibration(tuple(held_out()))


def _settings(models: Mapping[str, Path]) -> Iterator[tuple[str, Path, Mapping[str, Any]]]:
    """Setting by setting, so that an interrupted study has comparable runs of every model."""
    for setting in GRID + CALIBRATION:
        for name, folder in models.items():
            # SmolLM2 here was unpacked from groups of 32: nothing is lost on that grid by construction.
            if setting.get("group_size") != 32 or "SmolLM2" not in name:
                yield name, folder, setting


def _costs(models: Mapping[str, Path]) -> Iterator[tuple[str, Path, Mapping[str, Any]]]:
    for method in _COST_METHODS:
        yield from ((name, folder, {"method": method}) for name, folder in models.items())


def _recipe(
    snapshot: ModelSnapshot, setting: Mapping[str, Any], documents: Calibration | None
) -> Recipe | None:
    """None where the groups do not divide the model's layers."""
    chosen = choose_recipe(snapshot.config, method="awq", device="cpu", calibration=documents)
    largest, wanted = chosen.group_size or 0, setting.get("group_size", 0)
    return replace(chosen, **setting) if wanted <= largest else None


def _measure(
    snapshot: ModelSnapshot,
    name: str,
    recipe: Recipe,
    setting: Mapping[str, Any],
    documents: Calibration | None,
) -> dict[str, Any]:
    if not METHODS[recipe.method].calibrated:
        recipe = replace(recipe, calibration_samples=0)
    done = quantize(snapshot, recipe, cache=cache_folder(), reporter=SilentReporter(), calibration=documents)
    return {"model": name, "setting": dict(setting), **done.to_json()}


def _print_table(runs: list[dict[str, Any]]) -> None:
    print(
        "| model | method | group | symmetric | calibration | perplexity | increase | same next token | KL |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for run in runs:
        quality, samples = run["quality"], run["calibration_samples"]
        cells = (
            run["model"],
            run["method"],
            run["group_size"],
            "yes" if run["symmetric"] else "no",
            f"{samples} x {run['calibration_tokens']}" if samples else "none",
            f"{quality['perplexity_before']:.3f} -> {quality['perplexity_after']:.3f}",
            f"{quality['perplexity_increase']:+.2%}",
            f"{quality['top1_agreement']:.1%}",
            f"{quality['mean_kl']:.4f}",
        )
        print(f"| {' | '.join(map(str, cells))} |")


def fitted_costs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Cost]:
    """The line through the runs of the two random models, for each method that has both.

    Seconds that would be negative for a small model start at zero instead, and go through the larger one.
    """
    fitted = {}
    for method in _COST_METHODS:
        points = sorted(
            (run["parameters"], run["peak_memory_bytes"], run["seconds"], _tokens(run))
            for run in runs
            if run["model"] in RANDOM and run["method"] == method
        )
        if len(points) != len(RANDOM):
            continue
        (small, few, quick, tokens), (large, much, slow, _) = points
        memory, time = (much - few) / (large - small), (slow - quick) / (large - small)
        start = quick - time * small
        if start < 0:
            start, time = 0.0, slow / large
        fitted[method] = Cost(few - memory * small, memory, start, time / tokens)
    return fitted


def _tokens(run: Mapping[str, Any]) -> int:
    """Those calibrated on and those measured on."""
    return int((run["calibration_samples"] + HELD_OUT_BLOCKS) * run["calibration_tokens"])


def _print_cost(runs: list[dict[str, Any]]) -> None:
    """The lines for quantization_cost.py, and what it predicted of each run."""
    for method, cost in fitted_costs(runs).items():
        figures = ", ".join(f"{getattr(cost, field.name):.3g}" for field in fields(Cost))
        print(f'"{method}": Cost({figures}),')
    for run in runs:
        recipe = Recipe(**{field.name: run[field.name] for field in fields(Recipe)})
        expected = predict(run["parameters"], recipe)
        print(
            f"{run['model']} {run['method']}: predicted {expected.seconds} s and "
            f"{expected.memory_bytes / GIB:.2f} GiB, measured {run['seconds']:.0f} s "
            f"({expected.seconds / run['seconds'] - 1:+.0%}) and {run['peak_memory_bytes'] / GIB:.2f} GiB "
            f"({expected.memory_bytes / run['peak_memory_bytes'] - 1:+.0%})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what quantization settings lose.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--train", type=int, metavar="STEPS")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--method", action="append", choices=(*METHODS, *VARIANTS), help="only these")
    parser.add_argument(
        "--symmetric", action=argparse.BooleanOptionalAction, help="only these, or the others"
    )
    parser.add_argument("--runs", type=int, metavar="N", help="stop after so many new ones")
    chosen = parser.parse_args()
    folder = cache_folder().absolute() / "benchmark-models"
    models = {name: Path(path) for name, _, path in (pair.partition("=") for pair in chosen.model)}
    trained = f"{TRAINED}-{chosen.train}-steps"  # another number of them makes another model
    if chosen.cost:
        models = {name: folder / name for name in RANDOM} | models
    elif chosen.train:
        models[trained] = folder / trained
    METHODS.update(VARIANTS)  # type: ignore[attr-defined]
    runs: list[dict[str, Any]] = json.loads(chosen.out.read_text()) if chosen.out.exists() else []
    left = chosen.runs or -1
    for name, path, setting in _costs(models) if chosen.cost else _settings(models):
        if any(run["model"] == name and run["setting"] == setting for run in runs):
            continue
        if chosen.method and setting["method"] not in chosen.method:
            continue
        if chosen.symmetric is not None and setting.get("symmetric", False) != chosen.symmetric:
            continue
        if name == trained:
            _small_model(path, "train", str(chosen.train))
        elif name in RANDOM:
            _small_model(path, "random", *map(str, RANDOM[name]))
        snapshot = resolve(parse_ref(str(path)), SilentReporter())
        documents = _library_texts() if name == trained else None
        recipe = _recipe(snapshot, setting, documents)
        if recipe is None:
            continue
        if left == 0:
            break
        left -= 1
        runs.append(_measure(snapshot, name, recipe, setting, documents))
        chosen.out.write_text(json.dumps(runs, indent=1) + "\n")
    if chosen.cost:
        _print_cost(runs)
    else:
        _print_table(runs)


if __name__ == "__main__":
    main()
