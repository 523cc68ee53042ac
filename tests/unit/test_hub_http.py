"""The schedule of retries, without its waits."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx2
import pytest

from builder.hub_http import GaveUpError, RetryingClient
from tests.hub import Hub, serve

PATH = "/api/models/org/model"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "config.json").write_text("{}")
    with serve("org/model", tmp_path) as served:
        yield served


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("builder.hub_http.sleep", waited.append)
    return waited


def _get(hub: Hub) -> httpx2.Response:
    with RetryingClient(lambda _: None) as client:
        return client.get(hub.url + PATH)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_waits_double_until_the_hub_is_back(hub: Hub, waits: list[float], status: int) -> None:
    hub.refuse("/", status, times=3, headers={})
    assert _get(hub).status_code == 200
    assert waits == [1, 2, 4]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 416, 501])
def test_what_does_not_pass_is_not_retried(hub: Hub, waits: list[float], status: int) -> None:
    hub.refuse("/", status)
    assert _get(hub).status_code == status
    assert (waits, len(hub.requests)) == ([], 1)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"RateLimit": '"api";r=0;t=55', "Retry-After": "7"}, 55),
        ({"RateLimit": '"api";r=3;t=55'}, 1),
        ({"Retry-After": "soon"}, 1),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
    ],
)
def test_hub_says_when(hub: Hub, waits: list[float], headers: dict[str, str], seconds: float) -> None:
    hub.refuse("/", 429, times=1, headers=headers)
    assert _get(hub).status_code == 200
    assert waits == [seconds]


def test_hub_names_a_date(hub: Hub, waits: list[float]) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    hub.refuse("/", 429, times=1, headers={"Retry-After": date})
    assert _get(hub).status_code == 200
    assert 0 < waits[0] <= 100


def test_tries_and_waits_are_bounded(hub: Hub, waits: list[float]) -> None:
    hub.refuse("/", 502, headers={})
    with pytest.raises(GaveUpError, match="the hub answered 502, at the last of 6 tries"):
        _get(hub)
    assert waits == [1, 2, 4, 8, 16]
    waits.clear()
    hub.refusals.clear()
    hub.refuse("/", 429, headers={"Retry-After": "250"})
    with pytest.raises(GaveUpError, match="asks to wait 250 s"):
        _get(hub)
    assert waits == [250, 250]


@pytest.mark.parametrize(
    "value", ["9" * 500, "Wed, 21 Oct 9999 07:28:00 -9999", "Wed, 21 Oct 2015 07:28:00 +" + "9" * 30, "\xb2"]
)
def test_odd_times_are_bounded(hub: Hub, waits: list[float], value: str) -> None:
    hub.refuse("/", 429, times=1, headers={"Retry-After": value})
    try:
        assert _get(hub).status_code == 200
    except GaveUpError as error:
        assert "asks to wait" in str(error)  # noqa: PT017 - either will do
    assert all(wait <= 600 for wait in waits)


def test_what_is_streamed_is_retried_wherever_it_is(hub: Hub, waits: list[float]) -> None:
    hub.refuse("/elsewhere", 503, times=2, headers={})
    with RetryingClient(lambda _: None) as client:
        with client.stream("GET", hub.url + "/elsewhere") as response:
            assert response.status_code == 401  # the hub's answer to what it does not have
        assert waits == [1, 2]
        hub.refuse("/elsewhere", 503, times=1, headers={})
        assert client.get(hub.url + "/elsewhere").status_code == 503
    assert waits == [1, 2]


def test_nobody_there_is_told_at_once(waits: list[float]) -> None:
    with RetryingClient(lambda _: None) as client, pytest.raises(httpx2.ConnectError):
        client.get("http://127.0.0.1:1/")
    assert waits == []
