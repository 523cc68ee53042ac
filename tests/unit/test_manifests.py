"""Manifests of `coldstart manifest`: what they say, and that the schemas that packages carry accept it.

The files in examples/ are these manifests. COLDSTART_UPDATE_GOLDEN=1 writes them anew.
"""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from compose_spec import PyCompose

from builder import build
from builder.errors import InputError
from builder.manifests import GRACE_SECONDS, KINDS, Request, render
from builder.models import LockedFile
from builder.plan import make_plan
from builder.spec import ImageSpec, load_spec
from runtime import settings
from runtime.defaults import TEARDOWN_SECONDS
from runtime.lifecycle import Lifecycle
from tests import kserve_schema
from tests.kserve_schema import Schema
from tests.unit.test_plan import lock

EXAMPLES = Path(__file__).parents[2] / "examples"
KUBERNETES = "1.37"
GIB = 1 << 30


def manifest_of(spec: ImageSpec, *sizes: int, **more: Any) -> dict[str, Any]:
    """The manifest in the image of a model with shards of these sizes in bytes."""
    files = tuple(
        LockedFile(path=f"model-{i:05d}-of-{len(sizes):05d}.safetensors", size=size, sha256=f"{i:064d}")
        for i, size in enumerate(sizes, start=1)
    )
    found = lock(spec.model, files).model_copy(update={"quantization": spec.quantize})
    return {**make_plan(spec, found, build.guess_base(spec)).manifest, **more}


GPU = load_spec(EXAMPLES / "gpu-awq" / "coldstart.yaml", {})
CPU = load_spec(EXAMPLES / "cpu" / "coldstart.yaml", {})
LARGE = ImageSpec(
    model="Qwen/Qwen3-235B-A22B",
    tag="registry.example.com/models/qwen3-235b:bf16",
    base="registry.example.com/vllm-openai-ray:v0.32.0",
    engine_args=("--tensor-parallel-size", "8"),
)
IMAGES = {
    GPU.tag: manifest_of(GPU, 4_876_059_352, 1_244_659_840),
    CPU.tag: manifest_of(CPU, 269_060_552),
    LARGE.tag: manifest_of(LARGE, *[4_000_000_000] * 118),
}
COMMITTED: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "kubernetes/gpu.yaml": ("k8s", GPU.tag, {"api_key_secret": "qwen3-8b-api-key"}),
    "kubernetes/cpu.yaml": ("k8s", CPU.tag, {}),
    "keda/gpu.yaml": ("keda", GPU.tag, {"host": "qwen3-8b.example.com", "replicas": 4}),
    "kserve/gpu.yaml": ("kserve", GPU.tag, {}),
    "leaderworkerset/two-nodes.yaml": ("lws", LARGE.tag, {}),
    "compose/compose.yaml": ("compose", GPU.tag, {"api_key_secret": "api-key.txt"}),
    "compose/cpu.yaml": ("compose", CPU.tag, {}),
}


def text(path: str) -> str:
    kind, tag, options = COMMITTED[path]
    assert tag is not None
    return render(kind, Request(tag, **options), IMAGES[tag])


def documents(
    kind: str,
    manifest: dict[str, Any] = IMAGES[GPU.tag],
    /,
    image: str = "r.example.com/qwen:1",
    **options: Any,
) -> list[Any]:
    return list(yaml.safe_load_all(render(kind, Request(image, **options), manifest)))


def pods(found: list[Any]) -> Iterator[dict[str, Any]]:
    """Pod specs of Kubernetes documents; KServe spreads one over two objects."""
    by_kind = {document["kind"]: document["spec"] for document in found}
    if "Deployment" in by_kind:
        yield by_kind["Deployment"]["template"]["spec"]
    if "LeaderWorkerSet" in by_kind:
        group = by_kind["LeaderWorkerSet"]["leaderWorkerTemplate"]
        yield group["leaderTemplate"]["spec"]
        yield group["workerTemplate"]["spec"]
    if "ServingRuntime" in by_kind:
        runtime = {key: by_kind["ServingRuntime"][key] for key in ("containers", "volumes")}
        predictor = by_kind["InferenceService"]["predictor"]
        own = ("model", "minReplicas", "maxReplicas")
        yield {**runtime, **{key: value for key, value in predictor.items() if key not in own}}


def check_kubernetes(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def as_pod(spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}


@pytest.fixture(scope="session")
def kserve(tmp_path_factory: pytest.TempPathFactory) -> Schema:
    """Of KServe's package, which wants a hundred others that its schema does not need."""
    folder = tmp_path_factory.mktemp("kserve")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, f"kserve=={kserve_schema.RELEASE}"], check=True)
    return Schema(folder / "kserve")


def check_keda(document: dict[str, Any]) -> None:
    """The model drops fields that it does not know."""
    known = ScaledObject.model_validate(document).model_dump(by_alias=True, exclude_none=True)
    assert known == document


@pytest.mark.parametrize("path", COMMITTED)
def test_example_is_what_the_command_prints(path: str) -> None:
    if os.environ.get("COLDSTART_UPDATE_GOLDEN"):
        (EXAMPLES / path).parent.mkdir(exist_ok=True)
        (EXAMPLES / path).write_text(text(path))
    assert (EXAMPLES / path).read_text() == text(path)


def test_every_kind_has_an_example() -> None:
    assert {kind for kind, _, _ in COMMITTED.values()} == set(KINDS)
    on_disk = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.yaml")}
    assert {path for path in on_disk if not path.endswith("coldstart.yaml")} == set(COMMITTED)


# Schemas


@pytest.mark.parametrize("path", [p for p, (kind, _, _) in COMMITTED.items() if kind != "compose"])
def test_kubernetes_accepts_it(path: str) -> None:
    found = list(yaml.safe_load_all(text(path)))
    for document in found:
        if document["apiVersion"] in ("v1", "apps/v1"):
            check_kubernetes(document)
        if document["kind"] == "ScaledObject":
            check_keda(document)
    for pod in pods(found):
        check_kubernetes(as_pod(pod))


@pytest.mark.parametrize("options", [{}, {"replicas": 3, "gpus": 2, "api_key_secret": "key"}])
def test_kserve_accepts_it(kserve: Schema, options: dict[str, Any]) -> None:
    [runtime, service] = documents("kserve", **options)
    assert list(kserve.problems(runtime, "V1alpha1ServingRuntime")) == []
    assert list(kserve.problems(service, "V1beta1InferenceService")) == []
    predictor = service["spec"]["predictor"]
    predictor["minReplica"] = predictor.pop("minReplicas")
    predictor["model"] = {"runtime": 3}
    assert sorted(kserve.problems(service, "V1beta1InferenceService", "service")) == [
        "service.spec.predictor.minReplica is unknown",
        "service.spec.predictor.model.modelFormat is missing",
        "service.spec.predictor.model.runtime is no str",
    ]


@pytest.mark.parametrize("path", [p for p, (kind, _, _) in COMMITTED.items() if kind == "compose"])
def test_compose_accepts_it(path: str) -> None:
    PyCompose.from_yaml(text(path))


def test_schemas_refuse_a_wrong_field() -> None:
    [deployment, service] = documents("k8s")
    wrong = copy.deepcopy(deployment)
    wrong["spec"]["template"]["spec"]["containers"][0]["startupProbe"]["failureTreshold"] = 3
    with pytest.raises(kubernetes_validate.ValidationError, match="failureTreshold"):
        check_kubernetes(wrong)
    service["spec"]["ports"][0]["port"] = "http"
    with pytest.raises(kubernetes_validate.ValidationError, match="http"):
        check_kubernetes(service)
    [_, scaled] = documents("keda", host="a.example.com")
    scaled["spec"]["minReplicas"] = 0
    with pytest.raises(AssertionError):
        check_keda(scaled)
    with pytest.raises(ValueError, match="stop_grace"):
        PyCompose.from_yaml(text("compose/cpu.yaml").replace("stop_grace_period", "stop_grace"))


# What they say


@pytest.mark.parametrize("path", COMMITTED)
def test_pods_keep_the_restricted_policy(path: str) -> None:
    if COMMITTED[path][0] == "compose":
        [service] = yaml.safe_load(text(path))["services"].values()
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        return
    for pod in pods(list(yaml.safe_load_all(text(path)))):
        assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        assert not any("hostPath" in volume for volume in pod["volumes"])
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("kind", ["k8s", "kserve", "lws"])
def test_grace_period_covers_delay_drain_and_teardown(kind: str) -> None:
    for pod in pods(documents(kind)):
        for container in pod["containers"]:
            environ = {entry["name"]: entry.get("value", "") for entry in container["env"]}
            # The container's settings as the runtime itself reads them.
            baked = settings.Manifest("/models/m", "m", "cuda", ())
            stopping = settings.load([], environ, baked)
            needed = stopping.drain_delay + stopping.drain_timeout + TEARDOWN_SECONDS
            assert needed < pod["terminationGracePeriodSeconds"]
    assert documents("compose")[0]["services"]["qwen"]["stop_grace_period"] == f"{GRACE_SECONDS}s"


@pytest.mark.parametrize(
    ("gigabytes", "weights", "seconds"),
    [(0.27, "bake", 600), (15, "bake", 600), (16, "bake", 660), (470, "bake", 9720), (16, "download", 960)],
)
def test_startup_probe_covers_the_slowest_safe_start(gigabytes: float, weights: str, seconds: int) -> None:
    [deployment, _] = documents("k8s", manifest_of(GPU, int(gigabytes * 1e9), weights=weights))
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == seconds
    assert deployment["spec"]["progressDeadlineSeconds"] > seconds


def test_probes_ask_what_the_runtime_answers() -> None:
    [pod] = pods(documents("k8s"))
    [container] = pod["containers"]
    starting = Lifecycle(started=0.0)
    answers = {}
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        reply = starting.answer(container[name]["httpGet"]["path"])
        assert reply is not None
        answers[name] = int(reply.status)
    assert answers == {"startupProbe": 503, "livenessProbe": 200, "readinessProbe": 503}


@pytest.mark.parametrize(
    ("engine_args", "options", "gpus", "args"),
    [
        ((), {}, 1, None),
        (("--tensor-parallel-size", "4"), {}, 4, None),
        (("-tp=2", "--pipeline_parallel_size", "2"), {}, 4, None),
        (("-tp", "2", "-tp", "8"), {}, 8, None),
        ((), {"gpus": 2}, 2, ["--tensor-parallel-size", "2"]),
        (("-pp", "2"), {"gpus": 8}, 8, ["--tensor-parallel-size", "4"]),
    ],
)
def test_gpus_and_shared_memory_follow_the_parallelism(
    engine_args: tuple[str, ...], options: dict[str, Any], gpus: int, args: list[str] | None
) -> None:
    manifest = manifest_of(ImageSpec(model="org/m", engine_args=engine_args), GIB)
    [pod] = pods(documents("k8s", manifest, **options))
    [container] = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(gpus)
    assert container.get("args") == args
    [shm] = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{gpus}Gi"}
    [service] = documents("compose", manifest, **options)[0]["services"].values()
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == gpus
    assert service["shm_size"] == f"{gpus}gb"


@pytest.mark.parametrize(
    ("kv_cache", "gib"), [("2147483648", 9), ("3G", 10), ("2.5g", 10), ("0", 7), ("2147483649", 10)]
)
def test_memory_of_a_cpu_server_covers_weights_and_kv_cache(kv_cache: str, gib: int) -> None:
    spec = CPU.model_copy(update={"engine_args": (f"--kv-cache-memory-bytes={kv_cache}",)})
    [pod] = pods(documents("k8s", manifest_of(spec, GIB)))
    resources = pod["containers"][0]["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"] == f"{gib}Gi"
    assert "nvidia.com/gpu" not in resources["limits"]


def test_mounted_and_downloaded_weights_have_a_volume() -> None:
    mounted = manifest_of(GPU, GIB, weights="mount")
    for kind in ("k8s", "kserve", "lws"):
        for pod in pods(documents(kind, mounted, weights_claim="models")):
            check_kubernetes(as_pod(pod))
            claim = {"claimName": "models", "readOnly": True}
            assert {"name": "weights", "persistentVolumeClaim": claim} in pod["volumes"]
            mount = {"name": "weights", "mountPath": mounted["model"]["path"], "readOnly": True}
            assert mount in pod["containers"][0]["volumeMounts"]
    downloaded = manifest_of(GPU, GIB, weights="download")
    [pod] = pods(documents("k8s", downloaded, hf_token_secret="hub"))
    check_kubernetes(as_pod(pod))
    assert {"name": "weights", "mountPath": "/models"} in pod["containers"][0]["volumeMounts"]
    token = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "HF_TOKEN"}}}
    assert token in pod["containers"][0]["env"]
    PyCompose.from_yaml(render("compose", Request("r.example.com/m:1", weights_claim="v"), mounted))
    PyCompose.from_yaml(render("compose", Request("r.example.com/m:1", hf_token_secret="x"), downloaded))


def test_api_key_is_a_file_where_the_runtime_looks_and_workers_do_not_get_it() -> None:
    leader, worker = pods(documents("lws", api_key_secret="key"))
    [container] = leader["containers"]
    [path] = [e["value"] for e in container["env"] if e["name"] == "COLDSTART_API_KEY_FILE"]
    [mount] = [m for m in container["volumeMounts"] if m["name"] == "api-key"]
    assert path == f"{mount['mountPath']}/api-key"
    assert mount["readOnly"]
    assert "api-key" not in str(worker)
    [compose] = documents("compose", api_key_secret="./key.txt")
    assert compose["services"]["qwen"]["secrets"] == [{"source": "api-key", "target": path}]


def test_service_of_several_nodes_is_not_the_one_that_leaderworkerset_makes() -> None:
    workers, service = documents("lws", gpus=8, nodes=3)
    assert service["metadata"]["name"] != workers["metadata"]["name"]
    assert workers["spec"]["leaderWorkerTemplate"]["size"] == 3
    leader, _ = pods([workers])
    assert "--tensor-parallel-size 8 --pipeline-parallel-size 3" in leader["containers"][0]["command"][-1]


# What the shells of several nodes do, with a Ray and a Python that only say how they were called.


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """shell(role, ray) -> the running shell of "leader" or "worker"; ray: lines of sh that `ray` runs.

    `called` in tmp_path gets a line for each command.
    """
    started: list[subprocess.Popen[bytes]] = []

    def run(role: str, ray: str) -> subprocess.Popen[bytes]:
        for name, lines in (("ray", ray), ("python3", "exit 42")):
            (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/called\n{lines}\n')
            (tmp_path / name).chmod(0o755)
        leader, worker = pods(documents("lws", gpus=8, nodes=3))
        [container] = {"leader": leader, "worker": worker}[role]["containers"]
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LWS_LEADER_ADDRESS": "leader.example"}
        started.append(subprocess.Popen(container["command"], env=environment, start_new_session=True))
        return started[-1]

    yield run
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what `ray` left running
        process.wait()


def _called(folder: Path) -> list[str]:
    path = folder / "called"
    return path.read_text().splitlines() if path.exists() else []


def test_a_leader_starts_ray_then_becomes_the_server(shell: Callable[..., Any], tmp_path: Path) -> None:
    assert shell("leader", "exit 0").wait(10) == 42
    assert _called(tmp_path) == [
        "ray start --head --port 6379 --include-dashboard=false",
        "python3 -m runtime --distributed-executor-backend ray "
        "--tensor-parallel-size 8 --pipeline-parallel-size 3",
    ]


def test_a_leader_whose_ray_does_not_start_ends_with_its_code(
    shell: Callable[..., Any], tmp_path: Path
) -> None:
    assert shell("leader", "exit 3").wait(10) == 3
    assert len(_called(tmp_path)) == 1


def test_a_worker_joins_once_the_leader_answers(shell: Callable[..., Any], tmp_path: Path) -> None:
    joins = f'case $1 in health-check) [ "$(wc -l <{tmp_path}/called)" -gt 1 ];; *) exit 7;; esac'
    assert shell("worker", joins).wait(10) == 7
    check = "ray health-check --address leader.example:6379"
    assert _called(tmp_path) == [check, check, "ray start --address leader.example:6379 --block"]


@pytest.mark.parametrize(("role", "ray"), [("leader", "sleep 60"), ("worker", "exit 1")])
def test_sigterm_ends_a_node_that_waits_for_ray(
    role: str, ray: str, shell: Callable[..., Any], tmp_path: Path
) -> None:
    process = shell(role, ray)
    deadline = time.monotonic() + 10
    while not _called(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    assert process.wait(5) == 0
    assert not any(line.startswith("python3") for line in _called(tmp_path))


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("registry.example.com:5000/models/Qwen3_8B.awq:v1", "qwen3-8b-awq"),
        ("r.example.com/m@sha256:" + "0" * 64, "m"),
        ("3b", "model-3b"),
        ("x" * 80, "x" * 63),
    ],
)
def test_objects_are_named_after_the_image(image: str, name: str) -> None:
    found = documents("k8s", image=image)
    assert {document["metadata"]["name"] for document in found} == {name}


@pytest.mark.parametrize(
    ("kind", "spec", "weights", "options", "message"),
    [
        ("helm", GPU, "bake", {}, "not a kind"),
        ("k8s", GPU, "bake", {"host": "a"}, "--host does not apply to k8s"),
        ("compose", GPU, "bake", {"replicas": 2}, "--replicas does not apply"),
        ("k8s", GPU, "bake", {"name": "Qwen_3"}, "cannot name a Kubernetes Service"),
        ("keda", GPU, "bake", {}, "needs --host"),
        ("k8s", CPU, "bake", {"gpus": 1}, "serves on CPUs"),
        ("lws", CPU, "bake", {}, "serves on CPUs"),
        ("lws", GPU, "download", {}, "only the leader would have them"),
        ("k8s", GPU, "mount", {}, "--weights-claim"),
        ("k8s", GPU, "bake", {"weights_claim": "a"}, "not mounted"),
        ("k8s", GPU, "bake", {"hf_token_secret": "a"}, "does not download"),
        ("lws", GPU.model_copy(update={"engine_args": ("-dp", "2")}), "bake", {}, "data parallel"),
        ("k8s", GPU.model_copy(update={"engine_args": ("-pp", "2")}), "bake", {"gpus": 3}, "shared out"),
        ("k8s", GPU.model_copy(update={"engine_args": ("-tp", "two")}), "bake", {}, "not a number"),
    ],
)
def test_what_does_not_fit_is_told(
    kind: str, spec: ImageSpec, weights: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        documents(kind, manifest_of(spec, GIB, weights=weights), **options)
