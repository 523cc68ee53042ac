"""The command line. The only module that prints, prompts or exits; imports stay lazy for a quick --help."""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from builder import __version__
from builder.errors import (
    BuildError,
    ColdstartError,
    HostError,
    InputError,
    RegressionError,
    VerifyError,
)
from builder.methods import METHODS

if TYPE_CHECKING:
    from benchmarks.outputs import FileBaseline, Outputs
    from benchmarks.schema import BenchResult
    from builder.console import ConsoleReporter
    from builder.plan import BuildPlan
    from builder.spec import ImageSpec

EXIT_INTERRUPTED = 130
_MAX_RUNS = 30

app = typer.Typer(
    name="coldstart",
    help="Turn a model name into a container image that serves it with vLLM and starts fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
base_app = typer.Typer(help="Make base images.", no_args_is_help=True)
app.add_typer(base_app, name="base")


class _RunByDefault(typer.core.TyperGroup):
    """`bench IMAGE` is `bench run IMAGE`: what is no command's name is the first one's argument."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])


bench_app = typer.Typer(help="Start images in turn and time every phase.", cls=_RunByDefault)
app.add_typer(bench_app, name="bench")

ModelArgument = Annotated[
    str | None, typer.Argument(help="A folder, or a hub name such as Qwen/Qwen3-8B[@revision].")
]
EngineArguments = Annotated[
    list[str] | None,
    typer.Argument(help="vLLM's own arguments, after `--`.", metavar="[-- ENGINE ARGUMENTS]"),
]
Quantize = Annotated[str | None, typer.Option(help=f"Quantize the weights: {', '.join(METHODS)}.")]
MaxPerplexityIncrease = Annotated[
    str | None,
    typer.Option(help="Refuse a quantization that raises held-out perplexity by more, e.g. 5% or 0.05."),
]
Weights = Annotated[
    str | None,
    typer.Option(help="bake (default), download from the hub at the start, or mount; see docs/models.md."),
]
Optimize = Annotated[
    str | None,
    typer.Option(
        help="startup, balanced (default) or throughput: what the recorded way of running gives priority to."
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Text to calibrate on: a .jsonl, .json, .txt or .parquet file, or "
        "hf://datasets/ORG/NAME[@REVISION][/PATH]; default: the model's answers."
    ),
]
CalibrationSamples = Annotated[int | None, typer.Option(help="Blocks of calibration text [16].")]
CalibrationTokens = Annotated[int | None, typer.Option(help="Tokens in each block [256].")]
Tag = Annotated[str | None, typer.Option("--tag", "-t", help="Name of the image.")]
Base = Annotated[str | None, typer.Option(help="Base image with vLLM; default vllm/vllm-openai, pinned.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Platform = Annotated[str | None, typer.Option(help="Target platform, e.g. linux/amd64.")]
Include = Annotated[
    list[str] | None, typer.Option(help="Take only files that match; may be repeated, e.g. 'model-*'.")
]
Exclude = Annotated[list[str] | None, typer.Option(help="Leave out files that match; may be repeated.")]
ServedName = Annotated[str | None, typer.Option("--served-model-name", help="Name that clients use.")]
RemoteCode = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", help="Take the repository's own Python too; it runs in the image."),
]
MaxShardSize = Annotated[
    str | None, typer.Option(help="Split the weights into shards of at most this, e.g. 500MiB.")
]
SpecFile = Annotated[Path | None, typer.Option("--file", "-f", help="coldstart.yaml; flags win over it.")]
CacheState = Annotated[str, typer.Option(metavar="cold|warm", help="Empty or fill it first [as it is].")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def _request(
    model: ModelArgument = None,
    engine_args: EngineArguments = None,
    quantize: Quantize = None,
    max_perplexity_increase: MaxPerplexityIncrease = None,
    weights: Weights = None,
    optimize: Optimize = None,
    calibration: Calibration = None,
    calibration_samples: CalibrationSamples = None,
    calibration_tokens: CalibrationTokens = None,
    tag: Tag = None,
    base: Base = None,
    revision: Revision = None,
    platform: Platform = None,
    include: Include = None,
    exclude: Exclude = None,
    served_model_name: ServedName = None,
    trust_remote_code: RemoteCode = None,
    max_shard_size: MaxShardSize = None,
    file: SpecFile = None,
) -> tuple[ImageSpec, Path | None]:
    """What build, plan and render are asked for, alike in all three."""
    from builder.spec import load_spec

    flags = {
        "model": model,
        "engine_args": tuple(engine_args or ()),
        "quantize": quantize,
        "max_perplexity_increase": max_perplexity_increase,
        "weights": weights,
        "optimize": optimize,
        "calibration": calibration,
        "calibration_samples": calibration_samples,
        "calibration_tokens": calibration_tokens,
        "tag": tag,
        "base": base,
        "revision": revision,
        "platform": platform,
        "include": tuple(include or ()),
        "exclude": tuple(exclude or ()),
        "served_model_name": served_model_name,
        "trust_remote_code": trust_remote_code,
        "max_shard_size": max_shard_size,
    }
    return load_spec(file, flags), file


def _takes_a_spec(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `_request`'s parameters in place of its own `spec` and `file`."""
    hints = {**_hints(command), **_hints(_request)}
    shared = inspect.signature(_request).parameters
    own = [p for p in inspect.signature(command).parameters.values() if p.name not in ("spec", "file")]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        spec, file = _request(**{name: values.pop(name) for name in shared})
        command(spec, file, **values)

    parameters = [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in (*shared.values(), *own)
    ]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Parameter annotations, evaluated; without ImageSpec, which is imported only where it is needed."""
    wanted = {name: hint for name, hint in function.__annotations__.items() if name not in ("spec", "return")}
    return {name: eval(hint, globals()) for name, hint in wanted.items()}  # noqa: S307 - our own annotations


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        typer.echo(f"coldstart {__version__}")
        raise typer.Exit
    if debug:
        os.environ["COLDSTART_DEBUG"] = "1"


@app.command()
@_takes_a_spec
def build(
    spec: ImageSpec,
    file: Path | None,
    push: Annotated[bool, typer.Option("--push", help="Push the image when it is built.")] = False,
    locked: Annotated[
        bool, typer.Option("--locked", help="Refuse what is not as in coldstart.lock.")
    ] = False,
    prewarm: Annotated[
        bool, typer.Option(help="Start the image once here, and add what that start recorded.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Build the image of a model."""
    if push and not spec.tag:
        raise InputError("--push needs a tag", fix="Give -t REGISTRY/NAME:TAG.")
    from builder import build as pipeline
    from builder import lockfile
    from builder.docker_engine import DockerEngine

    built = pipeline.build(
        spec,
        DockerEngine(),
        _reporter(),
        push=push,
        lock_path=lockfile.beside(file),
        locked=locked,
        prewarmed=prewarm,
    )
    if as_json:
        typer.echo(json.dumps(built.to_json()))
    else:
        typer.echo(f"{built.tag} {built.digest or built.id}")


@app.command()
@_takes_a_spec
def plan(
    spec: ImageSpec,
    file: Path | None,
    as_json: Json = False,
) -> None:
    """Show what would be in the image. Nothing is built; needs no Docker Engine."""
    made = _plan_without_building(spec, file, _reporter())
    if as_json:
        typer.echo(json.dumps(_plan_json(made)))
        return
    _print_plan(made)


@app.command()
@_takes_a_spec
def render(
    spec: ImageSpec,
    file: Path | None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")],
) -> None:
    """Write the Dockerfiles and their contexts, for plain `docker build`."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is not an empty folder", fix="Give a new folder.")
    from builder import build as pipeline
    from builder import lockfile
    from builder.plan import make_plan
    from builder.rendered_folder import write

    reporter = _reporter()
    base = _known_base(spec, reporter)
    snapshot = pipeline.resolve_model(spec, reporter, base=base, lock_path=lockfile.beside(file))
    snapshot, quantized = pipeline.prepare_model(spec, snapshot, base, reporter)
    made = make_plan(spec, snapshot.lock, base, quantized.to_json() if quantized else None)
    write(made, snapshot.root, output)
    platform_flag = f"--platform {spec.platform} " if spec.platform else ""
    for tag, folder in ((made.weights.tag, "weights"), (made.tag, "image"))[0 if made.baked else 1 :]:
        typer.echo(f"docker build {platform_flag}-t {tag} {shlex.quote(str(output / folder))}")


Mount = Annotated[
    Path | None,
    typer.Option(
        file_okay=False, exists=True, help="The model's folder, for images built with --weights mount."
    ),
]


@app.command()
def prewarm(
    image: Annotated[str, typer.Argument(help="An image that coldstart built.")],
    recorded: Annotated[
        Path | None,
        typer.Option("--from", help="Folder that `python3 -m runtime warm` wrote, instead of a start here."),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="How to run the engine (eager, compiled, …) if it answers right; else as --optimize chooses."
        ),
    ] = None,
    loaders: Annotated[
        bool,
        typer.Option(
            "--loaders",
            help="Try vLLM's ways of loading weights too, from a cold page cache, and bake the quickest.",
        ),
    ] = False,
    mount: Mount = None,
) -> None:
    """Start an image once and add what that start recorded, so that the next ones are faster."""
    from builder import build as pipeline
    from builder import prewarm as prewarming
    from builder.docker_engine import DockerEngine
    from builder.verify import read_manifest

    engine, reporter = DockerEngine(), _reporter()
    manifest = read_manifest(engine, image)
    label = f"dev.coldstart.model.digest=sha256:{manifest['model']['lock_digest']}"
    if recorded:
        made = prewarming.add_state(engine, image, recorded, label=label, reporter=reporter)
    elif why_not := prewarming.obstacle(engine, manifest, mount):
        raise HostError(
            f"{image} cannot be started here: {why_not}",
            fix="Run its `python3 -m runtime warm --output DIR` where it can, and give --from DIR here.",
        )
    else:
        made = prewarming.prewarm(
            engine,
            image,
            label=label,
            cache=pipeline.cache_folder(),
            reporter=reporter,
            mode=mode,
            loaders=loaders,
            mount=mount,
        )
    typer.echo(f"{image} {made.id}")


@app.command()
def verify(
    image: Annotated[str, typer.Argument(help="An image that coldstart built.")],
    start: Annotated[bool, typer.Option(help="Start it too, where this host can.")] = True,
    mount: Mount = None,
    as_json: Json = False,
) -> None:
    """Check labels, digests, user, modes, that no token is in it; that it starts as recorded and answers."""
    from builder.docker_engine import DockerEngine
    from builder.verify import verify as run_checks
    from builder.verify_start import verify_start

    engine, reporter = DockerEngine(), _reporter()
    checks = run_checks(engine, image)
    if start:
        checks += verify_start(engine, image, reporter, mount)
    failed = [check.name for check in checks if not check.ok]
    if as_json:
        rows = [{"name": c.name, "ok": c.ok, "found": c.found} for c in checks]
        typer.echo(json.dumps({"image": image, "ok": not failed, "checks": rows}))
    else:
        for check in checks:
            typer.echo(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.found}")
    if failed:
        raise VerifyError(f"{image} does not hold: {', '.join(failed)}", fix="Build it again.")


def _share(text: str) -> float:
    """5% -> 0.05"""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not text.endswith("%") or not 0 < share < math.inf:
        raise InputError(f"{text} is not a percentage", fix="Give one such as 5%.")
    return share


JsonFile = Annotated[Path | None, typer.Option("--json", help="Write raw samples to this file.")]
HtmlFile = Annotated[Path | None, typer.Option("--html", help="Write an interactive page to this file.")]
SvgFile = Annotated[Path | None, typer.Option("--svg", help="Write the drawing to this file.")]
PngFile = Annotated[
    Path | None, typer.Option("--png", help="Write the drawing to this file; needs coldstart[png].")
]
MarkdownFile = Annotated[Path | None, typer.Option("--markdown", help="Write tables for a README.")]
Timeout = Annotated[float, typer.Option(help="Seconds that a run may take to its whole answer.")]
Env = Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the containers; may be repeated.")]
Baseline = Annotated[
    str | None, typer.Option(help="Compare with this image, or with a file that --json wrote.")
]
MaxRegression = Annotated[
    float | None,
    typer.Option(
        parser=_share, metavar="PERCENT", help="Exit with 7 if surely slower than --baseline by more."
    ),
]


@bench_app.command("run")
def bench(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help='Images to start, each with its server\'s arguments if quoted: "IMAGE --model X" '
            "[the one built last]."
        ),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Starts of each image, at least.")] = 3,
    until: Annotated[
        float | None,
        typer.Option(
            parser=_share, metavar="PERCENT", help="Go on until the interval is this narrow to either side."
        ),
    ] = None,
    max_runs: Annotated[
        int | None, typer.Option(min=1, help="Starts of each image, at most, with --until [30].")
    ] = None,
    baseline: Baseline = None,
    max_regression: MaxRegression = None,
    json_file: JsonFile = None,
    html: HtmlFile = None,
    svg: SvgFile = None,
    png: PngFile = None,
    markdown: MarkdownFile = None,
    page_cache: CacheState = "as_is",
    compile_cache: CacheState = "as_is",
    pull: Annotated[
        bool, typer.Option("--pull", help="Remove and pull each image, if its registry confirms to have it.")
    ] = False,
    timeout: Timeout = 600,
    no_sampler: Annotated[bool, typer.Option("--no-sampler", help="Do not sample resources.")] = False,
    mount: Mount = None,
    env: Env = None,
) -> None:
    """Start images in turn and time every phase, to the first token.

    Also: `coldstart bench report FILE` shows a file that --json wrote; `coldstart bench history FOLDER` shows
    several over time.
    """
    from benchmarks.harness import Conditions
    from benchmarks.outputs import Outputs, file_baseline
    from benchmarks.stats import precise_enough
    from benchmarks.summary import estimates
    from builder import build as pipeline

    chosen = images or [tag for tag in (pipeline.last_built(),) if tag]
    if not chosen:
        raise InputError("no image given, and none was built here yet", fix="Name an image.")
    outputs = Outputs(html, svg, png, markdown)
    earlier = file_baseline(Path(baseline), chosen) if baseline and Path(baseline).is_file() else None
    if baseline and not earlier:
        chosen = [baseline, *(image for image in chosen if image != baseline)]
    _check_regression(max_regression, baseline, len(chosen) + bool(earlier))
    _check_until(until, max_runs, earlier)
    conditions = Conditions(
        page_cache=_cache_state("--page-cache", page_cache),
        compile_cache=_cache_state("--compile-cache", compile_cache),
        pull=pull,
        sample=not no_sampler,
        mount=mount.absolute() if mount else None,
        environment=_environment(env or ()),
    )

    def enough(result: BenchResult) -> bool:
        shown = earlier.put_first(result) if earlier else result
        return until is not None and precise_enough(estimates(shown), until)

    result = _measure(
        chosen,
        runs,
        json_file=json_file,
        outputs=outputs,
        until=until,
        max_runs=(max_runs or max(runs, _MAX_RUNS)) if until else None,
        enough=enough,
        timeout=timeout,
        conditions=conditions,
    )
    _conclude(result, earlier, max_regression, outputs, json_file)


@bench_app.command("ablate")
def bench_ablate(
    image: Annotated[
        str | None, typer.Argument(help="An image that coldstart built; default: the last.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Leave out this optimisation; may be repeated [each].")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Starts in each way.")] = 6,
    json_file: JsonFile = None,
    html: HtmlFile = None,
    svg: SvgFile = None,
    png: PngFile = None,
    markdown: MarkdownFile = None,
    page_cache: CacheState = "as_is",
    timeout: Timeout = 600,
    mount: Mount = None,
    env: Env = None,
) -> None:
    """What each optimisation saves: start an image in turn with all of them and without each.

    The image itself tells which it has: `docker run IMAGE switches`.
    """
    from benchmarks.docker_host import DockerHost
    from benchmarks.harness import Conditions
    from benchmarks.outputs import Outputs
    from builder import build as pipeline
    from builder.docker_engine import DockerEngine

    chosen = image or pipeline.last_built()
    if not chosen:
        raise InputError("no image given, and none was built here yet", fix="Name an image.")
    switches = DockerHost(DockerEngine()).switches(chosen)
    for name in only or ():
        if name not in switches:
            raise InputError(f"{chosen} has no optimisation {name}", fix=f"It has {', '.join(switches)}.")
    outputs = Outputs(html, svg, png, markdown)
    conditions = Conditions(
        page_cache=_cache_state("--page-cache", page_cache),
        mount=mount.absolute() if mount else None,
        environment=_environment(env or ()),
    )
    result = _measure(
        [chosen],
        runs,
        json_file=json_file,
        outputs=outputs,
        timeout=timeout,
        conditions=conditions,
        ablate=list(dict.fromkeys(only or switches)),
    )
    _conclude(result, None, None, outputs, json_file)


def _measure(
    images: list[str], runs: int, *, json_file: Path | None, outputs: Outputs, **options: Any
) -> BenchResult:
    """Run the benchmark, live on a terminal; raw samples go to `json_file` after each run."""
    from benchmarks.docker_host import DockerHost
    from benchmarks.harness import run_benchmark
    from benchmarks.live import LiveView
    from benchmarks.outputs import check_folder, write_whole
    from builder.console import terminal
    from builder.docker_engine import DockerEngine

    outputs.check()
    if json_file:
        check_folder(json_file)
    engine = DockerEngine()
    live = LiveView(console) if (console := terminal(stderr=True)).is_terminal else None

    def save(result: BenchResult) -> None:
        if json_file:
            write_whole(json_file, (result.model_dump_json(indent=1) + "\n").encode())

    return run_benchmark(
        DockerHost(engine),
        images,
        runs,
        reporter=live or _reporter(),
        save=save,
        watcher=live,
        engine_version=engine.version,
        **options,
    )


@bench_app.command("report")
def bench_report(
    file: Annotated[Path, typer.Argument(help="What `coldstart bench --json` wrote.")],
    baseline: Annotated[str | None, typer.Option(help="Compare with this file.")] = None,
    max_regression: MaxRegression = None,
    html: HtmlFile = None,
    svg: SvgFile = None,
    png: PngFile = None,
    markdown: MarkdownFile = None,
) -> None:
    """Show a result again, in any form, without starting anything."""
    from benchmarks.outputs import Outputs, file_baseline
    from benchmarks.schema import read_result

    outputs = Outputs(html, svg, png, markdown)
    outputs.check()
    result = read_result(file)
    references = [image.reference for image in result.images]
    earlier = file_baseline(Path(baseline), references) if baseline else None
    _check_regression(max_regression, baseline, len(references) + bool(earlier))
    _conclude(result, earlier, max_regression, outputs)


@bench_app.command("bake")
def bench_bake(
    file: Annotated[Path, typer.Argument(help="What `coldstart bench --pull --json` wrote.")],
    check: Annotated[
        Path | None, typer.Option(help="Runs of the same images at the rates given, to check with.")
    ] = None,
    weights: Annotated[
        list[float] | None, typer.Option(help="MB of each image's weights; repeat it for each [known].")
    ] = None,
    registry: Annotated[float | None, typer.Option(help="MB/s from the registry [measured].")] = None,
    hub: Annotated[float | None, typer.Option(help="MB/s from the model hub [the registry's].")] = None,
    cold: Annotated[
        Path | None, typer.Option(help="Runs with --page-cache cold: they tell the disk's rate.")
    ] = None,
    disk: Annotated[float | None, typer.Option(help="MB/s of cold reads [of --cold].")] = None,
    mount: Annotated[float | None, typer.Option(help="MB/s of a mounted volume [the disk's].")] = None,
    unpack: Annotated[
        float | None, typer.Option(help="MB/s of compressed layers put on disk [measured].")
    ] = None,
    node_has: Annotated[
        Literal["nothing", "base", "image"],
        typer.Option(help="What such a node has already: base is all but the weights."),
    ] = "base",
    base: Annotated[
        float | None, typer.Option(help="MB that the registry sends for all but the weights.")
    ] = None,
) -> None:
    """Bake, download or mount the weights: what reaches the first token sooner on such a node."""
    from benchmarks import bake
    from benchmarks.schema import read_result

    rates = {"registry": registry, "hub": hub, "unpack": unpack, "disk": disk, "mount": mount}
    for name, rate in (*rates.items(), ("base", base), *(("weights", size) for size in weights or ())):
        if rate is not None and rate <= 0:
            raise InputError(f"--{name} {rate:g} is not a size or a rate", fix="Give more than 0.")
    if (node_has == "nothing") != (base is not None):
        raise InputError(
            "--node-has nothing and --base go together",
            why="How long the other layers take follows from their size, and matters to no other node.",
            fix="Give both: `docker manifest inspect` shows the sizes of an image's layers.",
        )
    given = {name: rate * 1e6 for name, rate in rates.items() if rate is not None}
    if cold and disk:
        raise InputError("--cold and --disk both tell the disk's rate", fix="Give one of them.")
    sizes = [round(size * 1e6) for size in weights or ()]
    checking = read_result(check) if check else None
    try:
        if cold:
            given["disk"] = bake.disk_of(read_result(cold))
        node, rows = bake.rows(
            read_result(file), given, checking, sizes, has=node_has, base=round((base or 0) * 1e6)
        )
    except ValueError as error:
        raise InputError(f"{file} does not tell whether to bake", why=f"{error}.") from None
    typer.echo(
        f"MB/s: registry {node.registry / 1e6:.0f}, unpacking {node.unpack / 1e6:.0f}, "
        f"hub {node.hub / 1e6:.0f}, disk {_rate(node.disk)}, mount {_rate(node.mount or node.disk)}; "
        f"the node has {_NODE_HAS[node.has]}"
    )
    if "mount" not in bake.ways(node):
        typer.echo(
            "nothing is said of mounting: give --mount, --disk or --cold, or measure one with a mount too"
        )
    for row in rows:
        ways = ", ".join(f"{way} {took:.1f} s" for way, took in row.seconds.items())
        typer.echo(f"{row.image}: {row.best} is soonest; {ways}")
        if node.has == "image":  # the registry sends nothing
            pass
        elif row.crossing is None:
            typer.echo("  downloading is sooner at any rate of the registry")
        else:
            typer.echo(
                f"  baking is sooner than downloading from {row.crossing / 1e6:.0f} MB/s of the registry on"
            )
        checked = "not checked, by want of another run"
        if row.measured is not None:
            checked = f"{row.predicted:.1f} s predicted, {row.measured:.1f} s measured, {row.error:+.1%}"
        typer.echo(f"  error of the model ({row.way}): {checked}")
    baked = [row for row in rows if row.way == "bake"]
    for row in baked[1:]:
        saved = ", ".join(
            f"{way} {bake.quantizing_saves(baked[0].model, row.model, way, node):+.1f} s"
            for way in bake.ways(node)
        )
        typer.echo(f"{row.image} instead of {baked[0].image} saves: {saved}")


@bench_app.command("history")
def bench_history(
    folder: Annotated[Path, typer.Argument(help="A folder of files that `coldstart bench --json` wrote.")],
    max_regression: Annotated[
        float | None,
        typer.Option(parser=_share, metavar="PERCENT", help="Mark what is surely slower by more [5%]."),
    ] = None,
    html: HtmlFile = None,
    svg: SvgFile = None,
    png: PngFile = None,
) -> None:
    """Show results over time; mark where an image got slower."""
    from benchmarks import history
    from benchmarks.outputs import Outputs, write_whole
    from benchmarks.svg import png as draw_png
    from builder.console import terminal

    outputs = Outputs(html, svg, png)
    outputs.check()
    results, skipped = history.read_folder(folder)
    lines = history.series(results, max_regression or history.ALLOWED)
    if not lines:
        raise InputError(
            f"{folder} has no result with a start that succeeded", fix="Measure one with --json."
        )
    terminal(stderr=False).print(history.table(lines))
    for name in skipped:
        typer.echo(f"{name} is not a result of coldstart bench")
    if html:
        write_whole(html, history.page(lines, skipped).encode())
    if svg or png:
        drawing = history.svg(lines)
        if svg:
            write_whole(svg, drawing.encode())
        if png:
            write_whole(png, draw_png(drawing))


_NODE_HAS = {"nothing": "nothing", "base": "all but the weights", "image": "the whole image"}


def _rate(rate: float | None) -> str:
    return "not known" if rate is None else f"{rate / 1e6:.0f}"


def _check_until(until: float | None, max_runs: int | None, earlier: FileBaseline | None) -> None:
    """Refuses what could only end at --max-runs, after all of it."""
    from benchmarks.stats import MIN_SAMPLES_FOR_95_PERCENT as NEEDED

    if until is None:
        if max_runs is not None:
            raise InputError("--max-runs is for --until", fix="Give --runs, or both.")
        return
    for source, runs in (
        ("--max-runs allows", max_runs),
        ("the baseline holds", earlier.runs if earlier else None),
    ):
        if runs is not None and runs < NEEDED:
            raise InputError(
                f"--until cannot be reached: {source} {runs} runs",
                why=f"An interval needs {NEEDED} on each side.",
                fix="Allow more runs, give --baseline the image, or leave out --until.",
            )


def _check_regression(allowed: float | None, baseline: str | None, images: int) -> None:
    if allowed is not None and (not baseline or images < 2):
        raise InputError(
            "--max-regression has nothing to compare",
            fix="Give --baseline an image, or a file that --json wrote, and another image.",
        )


def _conclude(
    result: BenchResult,
    earlier: FileBaseline | None,
    allowed: float | None,
    outputs: Outputs,
    json_file: Path | None = None,
) -> None:
    """Show and write a result. Raises where a start failed, or got slower than `allowed`."""
    from benchmarks.report import comparison
    from benchmarks.stats import Verdict
    from benchmarks.summary import decide
    from builder.console import terminal

    shown = earlier.put_first(result) if earlier else result
    notes = earlier.lines(result) if earlier else []
    decisions = decide(shown, allowed) if allowed is not None else []
    notes += [decision.sentence for decision in decisions]
    terminal(stderr=False).print(comparison(shown, notes))
    for path in outputs.write(shown, notes):
        typer.echo(f"written: {path}")
    if json_file:
        typer.echo(f"raw samples: {json_file}")
    if any(not run.ok for run in result.runs):
        raise VerifyError("some starts failed", fix="Their reasons stand above and in the raw samples.")
    worse = [d.sentence for d in decisions if d.verdict is Verdict.REGRESSED]
    if worse:
        raise RegressionError(
            "starts got slower", why=" ".join(worse), fix="Compare the phases above with the baseline's."
        )


@app.command()
def manifest(
    kind: Annotated[str, typer.Argument(help="k8s, keda, kserve, compose or lws.", metavar="KIND")],
    image: Annotated[str, typer.Argument(help="An image that coldstart built.")],
    name: Annotated[str | None, typer.Option(help="Name of the objects; default: the image's.")] = None,
    replicas: Annotated[
        int | None, typer.Option(min=0, help="Servers [1]; with keda the most of them.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of each pod; default: what the image is built for.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=2, help="lws: nodes of each server.")] = None,
    host: Annotated[str | None, typer.Option(help="keda: the host that requests are sent to.")] = None,
    api_key_secret: Annotated[
        str | None, typer.Option(help="Secret with the key `api-key`; with compose a file.")
    ] = None,
    weights_claim: Annotated[
        str | None, typer.Option(help="PersistentVolumeClaim of mounted weights; with compose a volume.")
    ] = None,
    hf_token_secret: Annotated[
        str | None, typer.Option(help="Secret with the key `HF_TOKEN`, for downloaded weights.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write.")] = None,
) -> None:
    """Print a manifest that runs the image: Kubernetes, KEDA, KServe, Compose or LeaderWorkerSet."""
    from builder import manifests
    from builder.docker_engine import DockerEngine
    from builder.verify import read_manifest

    manifests.check_kind(kind)
    request = manifests.Request(
        image, name, replicas, gpus, nodes, host, api_key_secret, weights_claim, hf_token_secret
    )
    text = manifests.render(kind, request, read_manifest(DockerEngine(), image))
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text)


def _cache_state(flag: str, state: str) -> Any:
    if state not in ("cold", "warm", "as_is"):
        raise InputError(f"{flag} {state} is unknown", fix="Give cold or warm, or leave it out.")
    return state


def _environment(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if not pair.partition("=")[0] or "=" not in pair:
            raise InputError(f"--env {pair!r} is not NAME=VALUE", fix="Give a name and a value.")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


@base_app.command("cpu")
def base_cpu(
    from_image: Annotated[
        str, typer.Option("--from", help="A Debian or python image, e.g. python:3.11-slim.")
    ],
    tag: Tag = None,
    wheels: Annotated[Path | None, typer.Option(help="Folder of extra wheels that pip may use.")] = None,
    ca: Annotated[
        Path | None, typer.Option(help="CA bundle for pip, behind a proxy; not kept in the image.")
    ] = None,
) -> None:
    """Make the CPU base image: vLLM built for CPUs on top of a Debian or python image."""
    from builder.base_cpu import build_base_cpu
    from builder.docker_engine import DockerEngine
    from builder.spec import CPU_BASE

    name = tag or CPU_BASE
    image = build_base_cpu(DockerEngine(), from_image, name, wheels=wheels, ca=ca, reporter=_reporter())
    typer.echo(f"{name} {image}")


def _known_base(spec: ImageSpec, reporter: ConsoleReporter) -> Any:
    """The base as an engine that answers and has it sees it, else as its name suggests."""
    from builder import build as pipeline
    from builder.docker_engine import DockerEngine

    try:
        engine = DockerEngine()
    except HostError:
        reporter.note("No Docker Engine answers; the base is taken by its name.")
        return pipeline.guess_base(spec)
    if engine.image(spec.base) is None:
        reporter.note(f"{spec.base} is not here; it is taken by its name.")
        return pipeline.guess_base(spec)
    return pipeline.inspect_base(spec, engine, reporter)


@dataclass(frozen=True)
class _Planned:
    """A plan; what quantization would still change about it (planning does not quantize); and the drift."""

    plan: BuildPlan
    quantize_first: str | None
    drift: str | None


def _plan_without_building(spec: ImageSpec, file: Path | None, reporter: ConsoleReporter) -> _Planned:
    from builder import build as pipeline
    from builder import lockfile, models
    from builder.plan import make_plan

    base = _known_base(spec, reporter)
    snapshot = pipeline.resolve_model(spec, reporter, base=base)
    path = lockfile.beside(file)
    drift = (
        lockfile.drift(spec, lockfile.read(path), snapshot.lock, snapshot.calibration).value if path else None
    )
    later = done = None
    if spec.quantize:
        from builder.quantization_cost import predict, require_memory
        from builder.quantize import finished_result

        recipe, _ = pipeline.choose_quantization(spec, snapshot, base, reporter)
        done = finished_result(snapshot, recipe, cache=pipeline.cache_folder())
        if done:
            snapshot = models.snapshot_of_folder(done.folder, snapshot.lock, reporter)
        else:
            require_memory(snapshot.lock, recipe)
            later = recipe.describe()
            if snapshot.lock.parameters is not None:
                later += f"; takes {predict(snapshot.lock.parameters, recipe).describe()}"
    made = make_plan(spec, snapshot.lock, base, done.to_json() if done else None)
    return _Planned(made, later, drift)


def _plan_json(planned: _Planned) -> dict[str, Any]:
    made = planned.plan
    return {
        "tag": made.tag,
        "weights_image": made.weights.tag if made.baked and not planned.quantize_first else None,
        "quantize_first": planned.quantize_first,
        "drift": planned.drift,
        "layers": [
            {"target": layer.target, "bytes": layer.bytes, "files": [f.path for f in layer.files]}
            for layer in made.weights.layers
        ],
        "disk_bytes": made.disk_bytes,
        "environment": dict(made.environment),
        "labels": dict(made.labels),
        "manifest": made.manifest,
    }


def _print_plan(planned: _Planned) -> None:
    made, quantized_later = planned.plan, planned.quantize_first
    from rich.filesize import decimal as size

    typer.echo(f"image            {made.tag}")
    typer.echo(
        f"base             {made.base.reference} ({made.base.device}, vLLM {made.base.vllm_version or '?'})"
    )
    typer.echo(f"model            {made.lock.name} from {made.lock.source}, sha256:{made.lock.digest[:16]}")
    if planned.drift:
        typer.echo(f"coldstart.lock   {planned.drift}")
    typer.echo(f"served as        {made.served_model_name}")
    typer.echo(f"quantization     {made.lock.quantization or 'none'}")
    if quantized_later:
        typer.echo(
            f"                 would be quantized first: {quantized_later}; sizes below are of the original"
        )
    if made.quantization:
        typer.echo(f"                 {made.quantization['description']}")
        rise = made.quantization["quality"]["perplexity_increase"]
        typer.echo(f"                 perplexity increase {rise:+.2%} on held-out text")
    typer.echo(f"engine arguments {' '.join(made.engine_args) or 'none'}")
    typer.echo(f"disk needed      {size(made.disk_bytes)} in Docker Engine's data root")
    for number, layer in enumerate(made.weights.layers):
        typer.echo(f"layer {number:<2}         {size(layer.bytes)} in {layer.target}")
        for entry in layer.files:
            typer.echo(f"                 {entry.path} {size(entry.size)}")
    if not made.baked:
        verb = "downloaded to" if made.spec.weights == "download" else "mounted at"
        typer.echo(f"weights          {size(made.lock.total_bytes)}, {verb} {made.model_path} at the start")
    typer.echo("on top           runtime, manifest, labels, user " + made.user)


def _reporter() -> ConsoleReporter:
    from builder.console import ConsoleReporter, terminal

    return ConsoleReporter(terminal(stderr=True))


def _show(error: ColdstartError) -> None:
    if isinstance(error, BuildError) and error.log:
        print(error.log, file=sys.stderr)
    print(f"error: {error.what}", file=sys.stderr)
    for part in (error.why, error.fix):
        if part:
            print(f"  {part}", file=sys.stderr)


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM. Not KeyboardInterrupt, which the CLI library turns into exit code 1."""


def _interrupt(*_: object) -> None:
    # The first one cleans up; who cannot wait for that sends another.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(EXIT_INTERRUPTED))
    raise _Interrupted


def _unexpected(error: Exception) -> ColdstartError:
    if isinstance(error, OSError):
        return ColdstartError(f"cannot go on: {error}", fix="Check the path, its mode and the disk.")
    return ColdstartError(
        f"this should not happen: {type(error).__name__}: {error}",
        fix="Run `coldstart --debug …` for the traceback, and report it.",
    )


def main() -> None:
    """Entry point: one handler for every error, so that nobody sees a traceback without asking."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app(standalone_mode=True)
    except ColdstartError as error:
        if os.environ.get("COLDSTART_DEBUG"):
            raise
        _show(error)
        sys.exit(error.exit_code)
    except Exception as error:
        if os.environ.get("COLDSTART_DEBUG"):
            raise
        _show(_unexpected(error))
        sys.exit(1)
    except _Interrupted:
        print("interrupted; what was finished is kept for the next time", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)  # a download's threads would finish their files first


if __name__ == "__main__":
    main()
