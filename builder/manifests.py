"""Manifests for orchestrators from an image's own manifest, so that the two agree. Pure.

Documents are plain dicts, and YAML is written by a YAML writer.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from builder.errors import InputError
from builder.plan import MODELS_DIR, PORT
from runtime.defaults import (
    DRAIN_DELAY_SECONDS,
    DRAIN_TIMEOUT_SECONDS,
    PHASE_TIMEOUT_SECONDS,
    TEARDOWN_SECONDS,
)

Document = dict[str, Any]

# Delay, drain and teardown are the runtime's; the margin is for the kernel and a busy node.
_MARGIN_SECONDS = 10
GRACE_SECONDS = math.ceil(DRAIN_DELAY_SECONDS + DRAIN_TIMEOUT_SECONDS + TEARDOWN_SECONDS) + _MARGIN_SECONDS

# The slowest start that is still sound: weights from a slow network disk, imports and compilation on two
# busy cores (132 s were measured for a stock vLLM), and never less than ten minutes.
_SLOW_BYTES_PER_SECOND = 50_000_000
_SLOW_IMPORTS_SECONDS = 300
_LEAST_STARTUP_SECONDS = 600
# A Deployment is said to hang when pulling and scheduling take this long on top.
_PULL_SECONDS = 600

_GIB = 1 << 30
# Imports, buffers and activations of one process that holds the engine.
_PROCESS_BYTES = 4 * _GIB
# NCCL, vLLM's message queues and Ray share memory; a pod has 64 MiB unless told otherwise.
_SHM_BYTES_PER_WORKER = _GIB
# A pod needs these to start; more makes it start faster, so there is no limit.
_CPUS = {"cuda": 4, "cpu": 2}

_API_KEY_FOLDER = "/run/secrets/coldstart"
_API_KEY = "api-key"
_HF_TOKEN = "HF_TOKEN"  # noqa: S105 - its name
_RAY_PORT = 6379
_HTTP_SCALER = "keda-add-ons-http-external-scaler.keda:9090"

_COMMENT_WIDTH = 108
_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Request:
    """What is asked for; None is what the image says, or none.

    weights_claim: a PersistentVolumeClaim (in Compose: a volume) with the model's files.
    api_key_secret: a Secret with the key `api-key` (in Compose: a file).
    hf_token_secret: a Secret with the key `HF_TOKEN` (in Compose: taken from the shell).
    """

    image: str
    name: str | None = None
    replicas: int | None = None
    gpus: int | None = None
    nodes: int | None = None
    host: str | None = None
    api_key_secret: str | None = None
    weights_claim: str | None = None
    hf_token_secret: str | None = None


@dataclass(frozen=True)
class Server:
    """What one container of the image needs. arguments: on top of those in the image; memory in bytes."""

    request: Request
    name: str
    device: str
    gpus: int
    nodes: int
    arguments: tuple[str, ...]
    model_path: str
    weights: str
    weight_bytes: int
    concurrency: int | None
    memory_request: int
    memory_limit: int
    shm: int

    @property
    def startup_seconds(self) -> int:
        """What a startup probe must allow. Downloaded weights are written, then read."""
        passes = 2 if self.weights == "download" else 1
        slowest = _SLOW_IMPORTS_SECONDS + passes * self.weight_bytes / _SLOW_BYTES_PER_SECOND
        return max(_LEAST_STARTUP_SECONDS, 60 * math.ceil(slowest / 60))


def check_kind(kind: str) -> None:
    """Raises InputError."""
    if kind not in KINDS:
        raise InputError(f"{kind!r} is not a kind of manifest", fix=f"Give one of {', '.join(KINDS)}.")


def render(kind: str, request: Request, manifest: Mapping[str, Any]) -> str:
    """YAML of a kind in KINDS, a comment first. manifest: the image's. Raises InputError."""
    check_kind(kind)
    notes, make = KINDS[kind]
    for option, kinds in _OPTIONS.items():
        if getattr(request, option) is not None and kind not in kinds:
            raise InputError(
                f"--{option.replace('_', '-')} does not apply to {kind}",
                fix=f"It is for {', '.join(kinds)}.",
            )
    server = _server(kind, request, manifest)
    documents = make(server)
    paragraphs = [
        f"Made by `{_command(kind, request)}` from what the image says of itself.",
        f"Start-up may take {server.startup_seconds} s: {server.weight_bytes / 1e9:.1f} GB of weights at "
        f"{_SLOW_BYTES_PER_SECOND // 1_000_000} MB/s, {_SLOW_IMPORTS_SECONDS} s for the rest, "
        f"{_LEAST_STARTUP_SECONDS} s at least.",
        f"Stopping may take {GRACE_SECONDS} s: {DRAIN_DELAY_SECONDS:g} delay, {DRAIN_TIMEOUT_SECONDS:g} "
        f"drain, {TEARDOWN_SECONDS:g} teardown, {_MARGIN_SECONDS} margin.",
        *notes,
        *_prerequisites(kind, request),
    ]
    comment = "".join(f"# {line}\n" for text in paragraphs for line in textwrap.wrap(text, _COMMENT_WIDTH))
    body = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=math.inf)
    return comment + body


def _command(kind: str, request: Request) -> str:
    given = {option: getattr(request, option) for option in ("name", *_OPTIONS)}
    flags = [f"--{option.replace('_', '-')} {value}" for option, value in given.items() if value is not None]
    return " ".join(["coldstart manifest", kind, request.image, *flags])


def _prerequisites(kind: str, request: Request) -> list[str]:
    """What must exist before the manifest is applied."""
    if kind == "compose":
        return [f"The file {request.api_key_secret} holds the API key."] if request.api_key_secret else []
    secrets = ((request.api_key_secret, _API_KEY), (request.hf_token_secret, _HF_TOKEN))
    return [f"`kubectl create secret generic {s} --from-file={key}` comes first." for s, key in secrets if s]


class _Dumper(yaml.SafeDumper):
    """Anchors are for machines: what two documents share is written twice."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


# What the image and the request say


def _server(kind: str, request: Request, manifest: Mapping[str, Any]) -> Server:
    device, baked = manifest["device"], manifest["engine_args"]
    weights = manifest.get("weights", "bake")
    weight_bytes = sum(file["size"] for file in manifest["model"]["files"])
    if device == "cpu" and (request.gpus is not None or kind == "lws"):
        raise InputError(f"{request.image} serves on CPUs", fix="Build it on a GPU base.")
    if weights == "download" and kind == "lws":
        raise InputError(
            f"{request.image} downloads its weights, and only the leader would have them",
            fix="Build it with baked or mounted weights.",
        )
    if weights == "mount" and kind != "keda" and not request.weights_claim:
        raise InputError(
            f"{request.image} has no weights in it: they are mounted",
            fix="Say with --weights-claim where they are.",
        )
    if weights != "mount" and request.weights_claim:
        raise InputError(f"--weights-claim: the weights of {request.image} are not mounted")
    if weights != "download" and request.hf_token_secret:
        raise InputError(f"--hf-token-secret: {request.image} does not download its weights")
    if kind == "lws":
        workers, nodes, arguments = _over_nodes(request, baked)
    else:
        nodes = 1
        workers, arguments = _in_one_pod(request, baked)
    gpus = workers if device == "cuda" else 0
    shm = workers * _SHM_BYTES_PER_WORKER
    if device == "cuda":
        # The limit leaves room for the weights in the page cache, on their way to the GPU.
        memory_request = (1 + gpus) * _PROCESS_BYTES
        memory_limit = memory_request + weight_bytes + shm
    else:
        # Weights are held twice while they are repacked for the CPU's kernels.
        kv_cache = _integer(baked, "--kv-cache-memory-bytes") or 0
        memory_request = memory_limit = _PROCESS_BYTES + 2 * weight_bytes + kv_cache + shm
    return Server(
        request=request,
        name=_name(request),
        device=device,
        gpus=gpus,
        nodes=nodes,
        arguments=arguments,
        model_path=manifest["model"]["path"],
        weights=weights,
        weight_bytes=weight_bytes,
        concurrency=_integer(baked, "--max-num-seqs"),
        memory_request=memory_request,
        memory_limit=memory_limit,
        shm=shm,
    )


def _parallelism(baked: Sequence[str]) -> tuple[int, int, int]:
    """Tensor, pipeline and data parallelism of the image's engine arguments."""
    return (
        _integer(baked, "--tensor-parallel-size", "-tp") or 1,
        _integer(baked, "--pipeline-parallel-size", "-pp") or 1,
        _integer(baked, "--data-parallel-size", "-dp") or 1,
    )


def _in_one_pod(request: Request, baked: Sequence[str]) -> tuple[int, tuple[str, ...]]:
    """Engine workers, and the arguments that make vLLM have as many."""
    tensor, pipeline, data = _parallelism(baked)
    workers = tensor * pipeline * data
    if request.gpus is None or request.gpus == workers:
        return workers, ()
    tensor, rest = divmod(request.gpus, pipeline * data)
    if rest or not tensor:
        raise InputError(
            f"--gpus {request.gpus} cannot be shared out",
            why=f"Pipeline and data parallelism of {request.image} need a multiple of {pipeline * data}.",
        )
    return request.gpus, ("--tensor-parallel-size", str(tensor))


def _over_nodes(request: Request, baked: Sequence[str]) -> tuple[int, int, tuple[str, ...]]:
    """Engine workers of each node, nodes, and arguments: tensor parallel in a node, pipeline over nodes."""
    tensor, pipeline, data = _parallelism(baked)
    if data > 1:
        raise InputError(
            f"{request.image} is data parallel", fix="Use k8s with --replicas, or build it without."
        )
    tensor, nodes = request.gpus or tensor, request.nodes or max(2, pipeline)
    sizes = ("--tensor-parallel-size", str(tensor), "--pipeline-parallel-size", str(nodes))
    return tensor, nodes, ("--distributed-executor-backend", "ray", *sizes)


def _integer(arguments: Sequence[str], *names: str) -> int | None:
    """The last value of a flag, read as vLLM reads it: 2G is binary, 2g decimal. Raises InputError."""
    text = None
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag.replace("_", "-") in names:
            text = value if equals else "".join(arguments[index + 1 : index + 2])
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)|(\d+)([KMGT])", text.strip())
    if match is None:
        raise InputError(f"{names[0]} {text!r} in the image is not a number of a form that is known here")
    decimal, power, whole, binary_power = match.groups()
    if whole:
        return int(whole) << 10 * (1 + "KMGT".index(binary_power))
    return int(float(decimal) * 1000 ** ("kmgt".index(power) + 1 if power else 0))


def _name(request: Request) -> str:
    if request.name is not None:
        if not _LABEL.fullmatch(request.name):
            raise InputError(
                f"--name {request.name!r} cannot name a Kubernetes Service",
                fix="Use up to 63 small letters, digits and hyphens, a letter first and no hyphen last.",
            )
        return request.name
    repository = request.image.split("@")[0].rsplit("/", 1)[-1].split(":")[0]
    name = re.sub(r"[^a-z0-9]+", "-", repository.lower()).strip("-")
    return (name if name[:1].isalpha() else f"model-{name}")[:63].strip("-")


# The pod that Deployment, KServe and LeaderWorkerSet have in common


def _container(server: Server, name: str, command: Sequence[str] = ()) -> Document:
    """command: in place of the image's entrypoint and the server's arguments."""
    request = server.request
    environment: list[Document] = [
        {"name": key, "value": value} for key, value in _environment(server).items()
    ]
    if request.hf_token_secret:
        reference = {"name": request.hf_token_secret, "key": _HF_TOKEN}
        environment.append({"name": _HF_TOKEN, "valueFrom": {"secretKeyRef": reference}})
    requests = {"cpu": str(_CPUS[server.device]), "memory": _gib(server.memory_request)}
    if server.weights == "download":
        requests["ephemeral-storage"] = _gib(server.weight_bytes + _GIB)
    limits = {"memory": _gib(server.memory_limit)}
    if server.gpus:
        limits["nvidia.com/gpu"] = str(server.gpus)
    return {
        "name": name,
        "image": request.image,
        "imagePullPolicy": "IfNotPresent",
        **({"command": list(command)} if command else {}),
        **({"args": list(server.arguments)} if server.arguments and not command else {}),
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "env": environment,
        # Once a second, so that a ready server is not kept waiting by its probe.
        "startupProbe": _probe("/startup", period=1, failures=server.startup_seconds),
        "livenessProbe": _probe("/health", period=10, failures=3),
        "readinessProbe": _probe("/ready", period=2, failures=3),
        "resources": {"requests": requests, "limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": _mounts(server),
    }


def _environment(server: Server) -> dict[str, str]:
    """The drain is said again, so that it stands beside the grace period that has to cover it."""
    environment = {
        "COLDSTART_DRAIN_DELAY": f"{DRAIN_DELAY_SECONDS:g}",
        "COLDSTART_DRAIN_TIMEOUT": f"{DRAIN_TIMEOUT_SECONDS:g}",
    }
    if (
        server.startup_seconds > PHASE_TIMEOUT_SECONDS
    ):  # one phase may be silent, and may take nearly all of it
        environment["COLDSTART_PHASE_TIMEOUT"] = f"{server.startup_seconds}"
    if server.request.api_key_secret:
        environment["COLDSTART_API_KEY_FILE"] = f"{_API_KEY_FOLDER}/{_API_KEY}"
    return environment


def _probe(path: str, *, period: int, failures: int) -> Document:
    return {
        "httpGet": {"path": path, "port": PORT},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _mounts(server: Server) -> list[Document]:
    mounts: list[Document] = [
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the image's HOME
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
    ]
    if server.weights == "mount":
        mounts.append({"name": "weights", "mountPath": server.model_path, "readOnly": True})
    elif server.weights == "download":
        mounts.append({"name": "weights", "mountPath": MODELS_DIR})
    if server.request.api_key_secret:
        mounts.append({"name": _API_KEY, "mountPath": _API_KEY_FOLDER, "readOnly": True})
    return mounts


def _volumes(server: Server) -> list[Document]:
    request = server.request
    volumes: list[Document] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _gib(server.shm)}},
    ]
    if server.weights == "mount":
        claim = {"claimName": request.weights_claim, "readOnly": True}
        volumes.append({"name": "weights", "persistentVolumeClaim": claim})
    elif server.weights == "download":
        volumes.append({"name": "weights", "emptyDir": {}})
    if request.api_key_secret:
        items = [{"key": _API_KEY, "path": _API_KEY}]
        volumes.append({"name": _API_KEY, "secret": {"secretName": request.api_key_secret, "items": items}})
    return volumes


def _pod_settings() -> Document:
    """What holds for every container of the pod: Kubernetes' restricted policy. Any user ID will do."""
    return {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    }


def _pod(server: Server, container: Document) -> Document:
    return {**_pod_settings(), "containers": [container], "volumes": _volumes(server)}


def _metadata(server: Server) -> Document:
    return {"name": server.name, "labels": _labels(server)}


def _labels(server: Server) -> dict[str, str]:
    return {"app.kubernetes.io/name": server.name}


def _service(server: Server, selector: Mapping[str, str]) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(server),
        "spec": {
            "selector": dict(selector),
            "ports": [{"name": "http", "port": PORT, "targetPort": PORT, "protocol": "TCP"}],
        },
    }


def _gib(size: float) -> str:
    return f"{math.ceil(size / _GIB)}Gi"


# The kinds


def _kubernetes(server: Server) -> list[Document]:
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(server),
        "spec": {
            "replicas": _replicas(server),
            "progressDeadlineSeconds": server.startup_seconds + _PULL_SECONDS,
            "selector": {"matchLabels": _labels(server)},
            "template": {
                "metadata": {"labels": _labels(server)},
                "spec": _pod(server, _container(server, "server")),
            },
        },
    }
    return [deployment, _service(server, _labels(server))]


def _keda(server: Server) -> list[Document]:
    """With no pod there is no metric of vLLM's: what wakes it is a request, held by KEDA's HTTP add-on."""
    if not server.request.host:
        raise InputError(
            "keda needs --host", why="By the host the add-on knows whose request it is.", fix="Give one."
        )
    concurrency = {"targetValue": server.concurrency} if server.concurrency else {"targetValue": 100}
    route = {
        "apiVersion": "http.keda.sh/v1beta1",
        "kind": "InterceptorRoute",
        "metadata": _metadata(server),
        "spec": {
            "target": {"service": server.name, "port": PORT},
            "rules": [{"hosts": [server.request.host]}],
            "scalingMetric": {"concurrency": concurrency},
            # How long the request that wakes a server may wait for it.
            "timeouts": {"readiness": f"{server.startup_seconds + _PULL_SECONDS}s"},
        },
    }
    scaled = {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": _metadata(server),
        "spec": {
            "scaleTargetRef": {"name": server.name},
            "minReplicaCount": 0,
            "maxReplicaCount": max(1, _replicas(server)),
            "cooldownPeriod": 300,
            "triggers": [
                {
                    "type": "external-push",
                    "metadata": {"scalerAddress": _HTTP_SCALER, "interceptorRoute": server.name},
                }
            ],
        },
    }
    return [route, scaled]


def _kserve(server: Server) -> list[Document]:
    model_format = "coldstart"
    runtime = {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": _metadata(server),
        "spec": {
            "supportedModelFormats": [{"name": model_format, "version": "1"}],
            "containers": [_container(server, "kserve-container")],
            "volumes": _volumes(server),
        },
    }
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            **_metadata(server),
            "annotations": {"serving.kserve.io/deploymentMode": "Standard"},
        },
        "spec": {
            "predictor": {
                "minReplicas": _replicas(server),
                "maxReplicas": max(1, _replicas(server)),
                **_pod_settings(),
                "model": {"modelFormat": {"name": model_format}, "runtime": server.name},
            }
        },
    }
    return [runtime, service]


def _leader_worker_set(server: Server) -> list[Document]:
    """Ray's own commands: the head beside the server, a node in each worker. vLLM waits for its GPUs.

    A shell that is process 1 gets no signal that it has no trap for, and runs a trap only between commands:
    the leader's waits for a Ray that starts in the background.
    """
    stop = "trap 'exit 0' TERM"
    head = f'"$LWS_LEADER_ADDRESS:{_RAY_PORT}"'
    join = (
        f"{stop}; until ray health-check --address {head}; do sleep 1; done; "
        f"exec ray start --address {head} --block"
    )
    lead = (
        f"{stop}; ray start --head --port {_RAY_PORT} --include-dashboard=false & wait $! && "
        f"exec python3 -m runtime {' '.join(server.arguments)}"
    )
    leader = _container(server, "leader", ["sh", "-c", lead])
    without_key = replace(server, request=replace(server.request, api_key_secret=None))
    worker = _container(without_key, "worker", ["sh", "-c", join])
    for key in ("ports", "startupProbe", "livenessProbe", "readinessProbe"):
        del worker[key]
    for container in (leader, worker):
        container["env"] += [
            {"name": "VLLM_HOST_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
        ]
    leaders = {
        "leaderworkerset.sigs.k8s.io/name": server.name,
        "leaderworkerset.sigs.k8s.io/worker-index": "0",
    }
    workers = {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": _metadata(server),
        "spec": {
            "replicas": _replicas(server),
            "leaderWorkerTemplate": {
                "size": server.nodes,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": {
                    "metadata": {"labels": _labels(server)},
                    "spec": _pod(server, leader),
                },
                "workerTemplate": {
                    "metadata": {"labels": _labels(server)},
                    "spec": _pod(without_key, worker),
                },
            },
        },
    }
    # LeaderWorkerSet makes a headless Service of its own name.
    return [workers, _service(replace(server, name=f"{server.name}-leader"), leaders)]


def _compose(server: Server) -> list[Document]:
    request = server.request
    environment: dict[str, str | None] = dict(_environment(server))
    if request.hf_token_secret:
        environment[_HF_TOKEN] = None  # from the shell that runs Compose
    limits: Document = {"limits": {"memory": f"{math.ceil(server.memory_limit / _GIB)}gb"}}
    if server.gpus:
        devices = [{"driver": "nvidia", "count": server.gpus, "capabilities": ["gpu"]}]
        limits["reservations"] = {"devices": devices}
    service: Document = {
        "image": request.image,
        **({"command": list(server.arguments)} if server.arguments else {}),
        "ports": [f"{PORT}:{PORT}"],
        "environment": environment,
        "restart": "unless-stopped",
        "stop_grace_period": f"{GRACE_SECONDS}s",
        # The image's own check asks /ready.
        "healthcheck": {"start_period": f"{server.startup_seconds}s"},
        "read_only": True,
        "tmpfs": ["/tmp:exec"],  # noqa: S108 - compiled kernels are loaded from there
        "shm_size": f"{server.shm // _GIB}gb",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "deploy": {"resources": limits},
    }
    document: Document = {"services": {server.name: service}}
    if server.weights == "mount":
        weights = {"type": "volume", "source": "weights", "target": server.model_path, "read_only": True}
        service["volumes"] = [weights]
        document["volumes"] = {"weights": {"external": True, "name": request.weights_claim}}
    elif server.weights == "download":
        service["volumes"] = [{"type": "volume", "source": "weights", "target": MODELS_DIR}]
        document["volumes"] = {"weights": {}}
    if request.api_key_secret:
        service["secrets"] = [{"source": _API_KEY, "target": f"{_API_KEY_FOLDER}/{_API_KEY}"}]
        document["secrets"] = {_API_KEY: {"file": request.api_key_secret}}
    return [document]


def _replicas(server: Server) -> int:
    return 1 if server.request.replicas is None else server.request.replicas


_NO_CLUSTER = "No cluster has run it."
_PODS_CHECKED = "Its pods are checked against Kubernetes' schema in coldstart's tests; the fields around them"
KINDS: Mapping[str, tuple[Sequence[str], Callable[[Server], list[Document]]]] = {
    "k8s": (
        [f"Checked against Kubernetes' schemas in coldstart's tests. {_NO_CLUSTER}"],
        _kubernetes,
    ),
    "keda": (
        [
            "Needs KEDA with its HTTP add-on, 0.14 or newer, in the namespace keda, and Deployment and "
            "Service of `coldstart manifest k8s`. Send requests to the add-on's interceptor, with this host: "
            "it holds the request that wakes a server until that is ready. vLLM's own metrics could not wake "
            "one: with no pod there are none.",
            "ScaledObject is checked against KEDA's schema in coldstart's tests; InterceptorRoute is not, "
            f"for no package carries its schema. {_NO_CLUSTER}",
        ],
        _keda,
    ),
    "kserve": (
        [
            "Needs KServe in its Standard mode (RawDeployment in older releases).",
            f"{_PODS_CHECKED} against KServe's own. {_NO_CLUSTER}",
        ],
        _kserve,
    ),
    "compose": (["Checked against the Compose Specification in coldstart's tests."], _compose),
    "lws": (
        [
            "Needs LeaderWorkerSet, and Ray in the image: vLLM does not install it, so build on a base that "
            "does.",
            f"{_PODS_CHECKED} are not, for no package carries the schema. {_NO_CLUSTER}",
        ],
        _leader_worker_set,
    ),
}
_OPTIONS = {
    "replicas": ("k8s", "keda", "kserve", "lws"),
    "gpus": ("k8s", "kserve", "compose", "lws"),
    "nodes": ("lws",),
    "host": ("keda",),
    "api_key_secret": ("k8s", "kserve", "compose", "lws"),
    "weights_claim": ("k8s", "kserve", "compose", "lws"),
    "hf_token_secret": ("k8s", "kserve", "compose", "lws"),
}
