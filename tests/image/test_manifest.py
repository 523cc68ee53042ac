"""A built image under exactly what `coldstart manifest k8s` asks a cluster for."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

from builder.docker_engine import CONTAINER_PREFIX, Container
from tests.image.conftest import coldstart, get, wait_until

KEY = "a-key-of-this-test"
# Any user will do, as OpenShift gives it; not the image's own 2000.
USER = "12345:0"


@pytest.fixture(scope="module")
def pod(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("manifest") / "k8s.yaml"
    done = coldstart("manifest", "k8s", plain["tag"], "--api-key-secret", "key", "-o", str(path))
    assert (done.code, done.out) == (0, ""), done.err
    [deployment, _] = yaml.safe_load_all(path.read_text())
    return deployment["spec"]["template"]["spec"]


@pytest.fixture
def container(pod: Any, tmp_path: Path) -> Iterator[Container]:
    """What a kubelet would start of it: the pod's security, memory, environment and volumes."""
    [server] = pod["containers"]
    security = server["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"]
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "api-key").write_text(KEY + "\n")
    folders = {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}
    assert set(folders) == {"tmp", "shm", "api-key"}
    [shm] = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
    client = docker.from_env()
    made = client.containers.create(
        server["image"],
        name=f"{CONTAINER_PREFIX}manifest-{time.time_ns()}",
        user=USER,
        read_only=security["readOnlyRootFilesystem"],
        cap_drop=security["capabilities"]["drop"],
        security_opt=[] if security["allowPrivilegeEscalation"] else ["no-new-privileges"],
        environment={entry["name"]: entry["value"] for entry in server["env"]},
        mem_limit=_docker_size(server["resources"]["limits"]["memory"]),
        shm_size=_docker_size(shm["sizeLimit"]),
        tmpfs={folders["tmp"]: "exec"},
        volumes={str(secret): {"bind": folders["api-key"], "mode": "ro"}},
        ports={f"{server['ports'][0]['containerPort']}/tcp": ("127.0.0.1", 0)},
    )
    found = Container(client, made.id or "", time.time())
    try:
        made.start()
        yield found
    finally:
        found.remove()


def _docker_size(quantity: str) -> str:
    return quantity.removesuffix("i").lower()  # Docker's g is Kubernetes' Gi


def _ask(container: Container, key: str | None) -> Any:
    body = {
        "model": "SmolLM2-135M-Instruct",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 30,
    }
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    url = f"http://127.0.0.1:{container.host_port()}/v1/chat/completions"
    with urllib.request.urlopen(
        urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=120
    ) as answer:
        return json.load(answer)


def test_restricted_pod_starts_answers_and_stops(pod: Any, container: Container) -> None:
    [server] = pod["containers"]

    def passes(probe: str) -> bool:
        try:
            return get(container, server[probe]["httpGet"]["path"]).status == 200
        except OSError:
            return False

    startup = server["startupProbe"]
    budget = startup["periodSeconds"] * startup["failureThreshold"]
    wait_until(lambda: passes("startupProbe"), container, seconds=budget)
    assert passes("livenessProbe")
    wait_until(lambda: passes("readinessProbe"), container, seconds=30)

    assert container.run(["id", "-u"]) == (0, "12345\n")
    assert container.run(["touch", "/models/x"])[0] != 0
    assert "Paris" in _ask(container, KEY)["choices"][0]["message"]["content"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        _ask(container, None)
    assert refused.value.code == 401
    # SIGKILL would follow the grace period, and give 137.
    assert container.stop(pod["terminationGracePeriodSeconds"]) == 0, container.logs()[-2000:]
    assert KEY not in container.logs()


@pytest.mark.parametrize(
    ("kind", "image", "environment", "code", "message"),
    [
        ("helm", "any", {}, 2, "not a kind of manifest"),
        ("k8s", "coldstart-test/not-here", {}, 2, "there is no image"),
        ("k8s", None, {}, 6, "was not made by coldstart"),
        ("k8s", "any", {"DOCKER_HOST": "unix:///no/engine.sock"}, 4, "no Docker Engine answers"),
    ],
)
def test_wrong_kind_image_or_engine_is_told(
    base: str, kind: str, image: str | None, environment: dict[str, str], code: int, message: str
) -> None:
    done = coldstart("manifest", kind, image or base, env=environment)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert "Traceback" not in done.err
