"""The HTTP client that huggingface_hub is given: one rule of retrying for every request and every download.

The library's own rules differ by request (none for metadata, 408 and 429 only for bodies), wait as long as a
Retry-After says, and take a reset connection for the end. Cut bodies it continues by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from time import sleep
from typing import Any

import httpx2

# Not ConnectError: a wrong address or no network does not pass, and its message should not wait.
_RETRIED_ERRORS = (httpx2.ReadError, httpx2.ReadTimeout, httpx2.RemoteProtocolError)
_OF_A_REPOSITORY = re.compile(r"/api/(?:models|datasets)/|/resolve/")
_TRIES = 6
_FIRST_WAIT = 1.0  # seconds; each next one is twice as long
_PATIENCE = 600.0  # seconds that one request may wait in all; the hub's rate limits reset within 300


class GaveUpError(Exception):
    """A request failed as often, or asks to wait as long, as is bearable. The text is a clause about it."""


class RetryingClient(httpx2.Client):
    """Retries what passes with time; note is told of every wait.

    Raises GaveUpError, which the library neither retries nor takes for something else.
    """

    def __init__(self, note: Callable[[str], None], **options: Any) -> None:
        super().__init__(**options)
        self._note = note

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        # The hub sends downloads on to other hosts, whose paths say nothing: what is streamed is a download.
        download = request.method == "GET" and options.get("stream")
        if not download and not _OF_A_REPOSITORY.search(request.url.path):
            return super().send(request, **options)  # the library asks for other things on the side
        waited, wait = 0.0, _FIRST_WAIT
        for tries in count(1):
            asked = None
            try:
                response = super().send(request, **options)
            except _RETRIED_ERRORS as error:
                problem = _told(error)
            else:
                if not _passes(response.status_code):
                    if options.get("stream"):
                        response.stream = _Body(response.stream, self._note)
                    return response
                problem = f"the hub answered {response.status_code}"
                asked = _asked_wait(response.headers)
                response.close()
            pause = wait if asked is None else asked
            if tries == _TRIES:
                raise GaveUpError(f"{problem}, at the last of {tries} tries")
            if waited + pause > _PATIENCE:
                raise GaveUpError(f"{problem} and asks to wait {pause:.0f} s")
            self._note(f"{problem}; trying again in {pause:.0f} s")
            sleep(pause)
            waited += pause
            wait *= 2
        raise AssertionError("the loop returns or raises")


class _Body(httpx2.SyncByteStream):
    """A body whose cuts all look like the one kind that the library continues from where it was."""

    def __init__(self, stream: Any, note: Callable[[str], None]) -> None:
        self._stream, self._note = stream, note

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._stream
        except _RETRIED_ERRORS as error:
            self._note(f"{_told(error)}; going on from there")
            raise httpx2.RemoteProtocolError(str(error)) from None

    def close(self) -> None:
        self._stream.close()


def _passes(status: int) -> bool:
    return status in (408, 429) or (status >= 500 and status != 501)


def _told(error: Exception) -> str:
    return "the hub fell silent" if isinstance(error, httpx2.ReadTimeout) else "the hub cut the connection"


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds until the next try is welcome: Retry-After, or the reset of a used up rate limit."""
    limit = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    if limit:
        return float(limit[1])
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        at = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
