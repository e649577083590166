"""An endpoint that clients of OpenAI's API talk to: one request at a time on one base, each with the adapter it names.

The model runs in a thread of its own, so that a request that came in meanwhile is read, and a client that went away is
noticed: its answer ends with the token at work.
"""

import asyncio
import contextlib
import json
import secrets
import socket
import threading
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from lora_cli import console, openai_api
from lora_cli.errors import InputError, SurroundingsError, UserError, shown
from lora_cli.openai_api import BadRequest, Reply, Request
from lora_cli.speaker import Answer, Speaker

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request as Received
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as missing:
    raise SurroundingsError(
        f"lora serve needs {missing.name}, which is not installed: pip install 'lora-cli[serve]'.",
        state="No weights were read.",
    ) from None

Result = TypeVar("Result")

BASE = "base"  # the name of the model without any adapter
MOST_BYTES = 4 << 20  # of a request
_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_SECONDS_TO_END = 1  # in which answers under way end once the server is stopped


class Server:
    """Answers requests by the names of models."""

    def __init__(self, speaker: Speaker, names: Sequence[str], key: str | None, local: bool) -> None:
        """`local`: only requests to this machine's own names are taken, so that no web page reaches it by another."""
        self._speaker = speaker
        self._names = [*names, BASE]
        self._key = key
        self._local = local
        self._created = int(time.time())
        self._thread = ThreadPoolExecutor(1, "model")
        self._free = asyncio.Lock()  # the model is, for the next request

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/health", self._guarded(self._health), methods=["GET"]),
            Route("/v1/models", self._guarded(self._models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._guarded(self._model), methods=["GET"]),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
        ]

        async def refused(received: Received, exception: Exception) -> Response:
            assert isinstance(exception, HTTPException)
            known = ", ".join(route.path for route in routes)
            return _failed(f"{received.method} {shown(received.url.path)}: is not here; known: {known}.", 404)

        return Starlette(routes=routes, exception_handlers={404: refused, 405: refused})

    def _guarded(self, endpoint: Callable[[Received], Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
        """Return an endpoint that lets in only who may come in, and answers what is wrong as the API does."""

        async def guarded(received: Received) -> Response:
            host = received.headers.get("host", "")
            if self._local and host.rpartition(":")[0] not in _LOCAL and host not in _LOCAL:
                return _failed(f"Host {shown(host)}: only {', '.join(_LOCAL)} are answered.", 403)
            given = received.headers.get("authorization", "").removeprefix("Bearer ")
            if self._key is not None and not secrets.compare_digest(given.encode(), self._key.encode()):
                return _failed("The API key is missing or wrong.", 401, code="invalid_api_key")
            try:
                return await endpoint(received)
            except BadRequest as problem:
                return _failed(str(problem), problem.status, problem.param, problem.code)
            except InputError as problem:
                return _failed(" ".join(problem.problems), 400)
            except Exception as problem:
                return _failed(_explained(problem), 500)

        return guarded

    async def _health(self, received: Received) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, received: Received) -> Response:
        return JSONResponse(openai_api.models(self._names, self._created))

    async def _model(self, received: Received) -> Response:
        name = received.path_params["name"]
        self._voice(name)
        return JSONResponse(openai_api.model(name, self._created))

    async def _chat(self, received: Received) -> Response:
        return await self._answered(received, openai_api.parse(await _body(received), chat=True))

    async def _completions(self, received: Received) -> Response:
        return await self._answered(received, openai_api.parse(await _body(received), chat=False))

    def _voice(self, name: str) -> int:
        """Return the number of the result that answers by a name; the base's is the first. Raises BadRequest."""
        if name not in self._names:
            known = ", ".join(self._names)
            raise BadRequest(f"model: there is no {shown(name)}; known: {known}.", "model", 404, "model_not_found")
        return 0 if name == BASE else self._names.index(name)

    async def _answered(self, received: Received, request: Request) -> Response:
        voice = self._voice(request.model)
        manner = replace(request.manner, gain=0.0 if request.model == BASE else 1.0)
        answer = await self._in_thread(self._prepared, request, manner, voice)
        reply = Reply(request, int(time.time()))
        if request.stream:
            return StreamingResponse(self._events(answer, reply, request), media_type="text/event-stream")
        async with contextlib.aclosing(self._pieces(answer)) as pieces:
            async for _ in pieces:
                if await received.is_disconnected():
                    break
        self._note(request, answer)
        return JSONResponse(reply.whole(answer.said))

    def _prepared(self, request: Request, manner: Any, voice: int) -> Answer:
        if isinstance(request.asked, str):
            return self._speaker.go_on(request.asked, manner, voice)
        if not self._speaker.prompts[voice].templated:
            raise InputError(
                "this model was trained on plain text, or has no chat template: ask /v1/completions for it."
            )
        return self._speaker.answer(request.asked, manner, voice)

    async def _events(self, answer: Answer, reply: Reply, request: Request) -> AsyncIterator[str]:
        """Iterate over an answer's server-sent events."""
        try:
            if (first := reply.first()) is not None:
                yield _event(first)
            async with contextlib.aclosing(self._pieces(answer)) as pieces:
                async for piece in pieces:
                    yield _event(reply.piece(piece))
            for chunk in reply.last(answer.said):
                yield _event(chunk)
            yield "data: [DONE]\n\n"
            self._note(request, answer)
        except Exception as problem:  # the status was sent before the first piece
            yield _event(openai_api.error(_explained(problem), 500))

    async def _pieces(self, answer: Answer) -> AsyncGenerator[str, None]:
        """Iterate over an answer's text once the model is free. Closed early, it has the model stop."""
        async with self._free:
            gone = threading.Event()
            pieces = answer.pieces(gone.is_set)
            try:
                while (piece := await self._in_thread(next, pieces, None)) is not None:
                    yield piece
            finally:
                gone.set()
                self._thread.submit(pieces.close)  # behind the step at work, and before the next request's first

    async def _in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _note(self, request: Request, answer: Answer) -> None:
        said = answer.said
        speed = f", {said.tokens_per_second:.1f} tokens/s" if said.tokens_per_second else ""
        console.message(
            f"{request.model}: {said.prompt_tokens} + {said.tokens} tokens in {said.seconds:.1f} s{speed}, "
            f"{said.finish_reason}"
            + (f", the oldest {said.left_out_turns} turns left out" if said.left_out_turns else "")
        )


async def _body(received: Received) -> bytes:
    """Return a request's body. Raises BadRequest where it is no JSON by its header, or too large."""
    kind = received.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest(f"Content-Type: must be application/json, found {shown(kind, 40) or 'nothing'}.", status=415)
    body = bytearray()
    async for piece in received.stream():
        body += piece
        if len(body) > MOST_BYTES:
            raise BadRequest(f"The body has more than {MOST_BYTES >> 20} MiB.", status=413)
    return bytes(body)


def _explained(problem: Exception) -> str:
    """Return what to tell a client of an error that is not its own, and tell it on stderr."""
    if isinstance(problem, UserError):
        text = " ".join(problem.problems)
    else:
        text = f"a bug in lora ({type(problem).__name__}: {shown(problem, 200)})"
        console.message("".join(traceback.format_exception(problem)))
    console.message(f"error: {text}")
    return text


def _event(values: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"


def _failed(message: str, status: int, param: str | None = None, code: str | None = None) -> Response:
    return JSONResponse(openai_api.error(message, status, param, code), status)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; of port 0 a free one. Raises SurroundingsError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise SurroundingsError(
            f"--host {shown(host)} --port {port}: cannot be listened on: {error.strerror or error}.",
            "Where another program has the port, name another one; --port 0 takes a free one.",
            state="No weights were read.",
        ) from None


def serve(app: Starlette, listening: socket.socket) -> None:
    """Answer on a socket until SIGINT or SIGTERM; answers under way get a moment to end."""
    settings = uvicorn.Config(
        app, log_level="critical", access_log=False, lifespan="off", timeout_graceful_shutdown=_SECONDS_TO_END
    )
    uvicorn.Server(settings).run(sockets=[listening])
