"""A client of an OpenAI server, as small as timing it needs: one connection a request, arrival times kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from socket import socket
from typing import Literal

from pydantic import BaseModel, Field

from benchmarks.schema import Workload
from builder.errors import VerifyError
from runtime.phases import now

_MAX_ANSWER_BYTES = 1 << 20
_QUOTE_CHARACTERS = 200


class _Model(BaseModel):
    id: str


class _ModelList(BaseModel):
    data: tuple[_Model, ...] = Field(min_length=1)


def model_name(body: bytes) -> str:
    try:
        return _ModelList.model_validate_json(body).data[0].id
    except ValueError as error:
        raise VerifyError(
            "GET /v1/models answered 200, but without a model list.",
            why=f"It answered {_quote(body)}.",
            fix="Check that the image serves the OpenAI API.",
        ) from error


class _Choice(BaseModel):
    text: str


class _Chunk(BaseModel):
    choices: tuple[_Choice, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """first_token_at: in epoch seconds; first_token_monotonic: the same moment by time.monotonic()."""

    first_token_at: float
    first_token_monotonic: float
    text: str


def complete(port: int, model: str, workload: Workload, deadline: float) -> Completion:
    """Streams one greedy completion to its end."""
    payload = _CompletionRequest(model=model, **workload.model_dump()).model_dump_json().encode()
    try:
        with _exchange(port, "POST", "/v1/completions", deadline, payload) as (status, blocks):
            if status != 200:
                raise ValueError(f"it answered {status}: {_quote(b''.join(blocks))}")
            return _read_tokens(blocks)
    except (OSError, HTTPException, ValueError) as error:
        raise VerifyError(
            "POST /v1/completions gave no complete answer.",
            why=f"{describe(error)}.",
            fix="Read the container's log.",
        ) from error


class _CompletionRequest(Workload):
    model: str
    stream: Literal[True] = True


def _read_tokens(blocks: Iterator[bytes]) -> Completion:
    """ValueError for anything but server-sent completion chunks, ConnectionError when [DONE] is missing."""
    first, texts = None, []
    for at, data in _event_data(blocks):
        if data == b"[DONE]":
            if first is None:
                raise ValueError("the stream ended without a token")
            return Completion(*first, "".join(texts))
        try:
            choices = _Chunk.model_validate_json(data).choices
        except ValueError:
            raise ValueError(f"the stream holds {_quote(data)}") from None
        if choices and first is None:
            # A token counts although its text may be empty so far: half a character, or a special token.
            first = at
        texts += [choice.text for choice in choices]
    raise ConnectionError("the stream ended early, without [DONE]")


def _event_data(blocks: Iterator[bytes]) -> Iterator[tuple[tuple[float, float], bytes]]:
    """(arrival by both clocks, payload) of each `data:` line. OpenAI servers put a payload on one line."""
    rest = b""
    for block in blocks:
        at = now(), time.monotonic()
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at, line.removeprefix(b"data:").strip()


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes
    at: float


def get(port: int, path: str, timeout: float) -> Reply:
    with _exchange(port, "GET", path, time.monotonic() + timeout) as (status, blocks):
        body = b"".join(blocks)
        return Reply(status, body, now())


@contextmanager
def _exchange(
    port: int, method: str, path: str, deadline: float, payload: bytes | None = None
) -> Iterator[tuple[int, Iterator[bytes]]]:
    """One request on a connection of its own: (status, body blocks as they arrive).

    A kept connection would stay with the process that accepted it, and the runtime hands its socket over.
    Raises OSError or HTTPException, TimeoutError once `deadline` (monotonic) is past.
    """
    connection = HTTPConnection("127.0.0.1", port, timeout=_left(deadline))
    try:
        connection.connect()
        # http.client forgets the socket once the response owns it.
        stream: socket = connection.sock
        headers = {"Connection": "close"} | ({"Content-Type": "application/json"} if payload else {})
        connection.request(method, path, body=payload, headers=headers)
        with connection.getresponse() as response:
            yield response.status, _blocks(response, stream, deadline)
    finally:
        connection.close()


def _blocks(response: HTTPResponse, stream: socket, deadline: float) -> Iterator[bytes]:
    size = 0
    while True:
        stream.settimeout(_left(deadline))
        block = response.read1(1 << 16)
        if not block:
            return
        size += len(block)
        if size > _MAX_ANSWER_BYTES:
            raise HTTPException(f"an answer of more than {_MAX_ANSWER_BYTES} bytes")
        yield block


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def describe(error: Exception) -> str:
    if isinstance(error, ValueError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _quote(body: bytes) -> str:
    return repr(body[:_QUOTE_CHARACTERS].decode(errors="replace"))
