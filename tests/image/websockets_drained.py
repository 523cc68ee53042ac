"""Runs in the base image: the server of the API process, around an app that echoes, stops under a WebSocket.

Prints one JSON object: what the client saw, where it leaves in time and where it does not.
"""

import asyncio
import json
import socket
import sys
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any

import websockets

sys.path.insert(0, "/packages")
from runtime import engine
from runtime.lifecycle import Lifecycle, State

ARGS = SimpleNamespace(
    uvicorn_log_level="warning",
    disable_uvicorn_access_log=True,
    log_config_file=None,
    disable_access_log_for_endpoints=None,
)


async def app(scope: Any, receive: Any, send: Any) -> None:
    await receive()  # websocket.connect
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})


async def stopped(seconds: float, *, leaves: bool) -> dict[str, Any]:
    lifecycle = Lifecycle(started=0.0)
    lifecycle.move(State.READY)
    requests = engine._Requests(app, lifecycle)
    channel, _other_end = Pipe()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)  # as PID 1 hands it over
    server = engine._server(ARGS, requests, requests, channel)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    async with websockets.connect(f"ws://127.0.0.1:{listener.getsockname()[1]}/v1/realtime") as client:
        await client.send("before")
        answers = [await client.recv()]
        server.stop(seconds)
        await asyncio.sleep(0.5)  # by then nothing more is accepted
        await client.send("after")
        answers.append(await client.recv())
        if leaves:
            await client.close()
        await client.wait_closed()
    await asyncio.wait_for(serving, 10)
    listener.close()
    return {"answers": answers, "code": client.close_code, "cut": requests.cut}


async def main() -> None:
    result = {"leaves": await stopped(600, leaves=True), "stays": await stopped(1.0, leaves=False)}
    print("RESULT " + json.dumps(result))


asyncio.run(main())
