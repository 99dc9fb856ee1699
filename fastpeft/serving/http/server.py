"""A server on one machine that speaks OpenAI's completions and chat endpoints; ``model`` names the adapter.

    fastpeft serve MODEL --adapters DIR

Also vLLM's endpoints for loading and unloading adapters, /health (liveness), /ready and /metrics. Every other answer is
an error in OpenAI's form. One process, one model; the event loop speaks HTTP, the batcher's thread runs the model.
"""

import asyncio
import contextlib
import hashlib
import hmac
import signal
import socket
import sys
import threading
from collections.abc import Iterator

try:
    import uvicorn
    from fastapi import APIRouter, Depends, FastAPI, Request
    from fastapi.responses import PlainTextResponse, Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    from .answers import ApiError, log
    from .api import ChatRequest, CompletionRequest, LoadRequest, UnloadRequest, parse
    from .generation import Generation, body_of, error_response
    from .metrics import CONTENT_TYPE, DISCONNECTED
    from .service import Service
except ImportError as error:
    if error.name not in ("uvicorn", "fastapi", "starlette", "pydantic", "prometheus_client"):
        raise
    raise ImportError(f"serving needs {error.name}: pip install 'fastpeft[serve]'", name=error.name) from error

_KEEP_ALIVE = 75  # seconds: longer than clients keep idle connections, so that none is closed under a new request
_LOOPBACK = ("127.", "::1", "localhost")


def make_app(service: Service, api_key: str | None = None) -> FastAPI:
    """The ASGI application; its lifespan starts the batcher and stops the service."""

    @contextlib.asynccontextmanager
    async def lifespan(_):
        service.batcher.start()
        yield
        await asyncio.to_thread(service.stop)

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(title="fastpeft", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for kind in (ApiError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.include_router(_probes(service))
    app.include_router(_routes(service), dependencies=[Depends(_key_check(api_key))])
    return app


def _probes(service: Service) -> APIRouter:
    """For whoever watches over the process; without a key."""
    router = APIRouter()

    async def health() -> Response:
        """Liveness: 503 where only a new process helps."""
        problem = service.problem()
        return Response(status_code=200) if problem is None else PlainTextResponse(problem, 503)

    async def ready() -> Response:
        """Readiness: 503 also where requests would be refused for now."""
        problem = service.problem()
        if problem is None and service.batcher.waiting >= service.limits.queue:
            problem = "the queue is full"
        return Response(status_code=200) if problem is None else PlainTextResponse(problem, 503)

    async def version() -> dict[str, str]:
        from ... import __version__

        return {"version": __version__}

    for path, function in (("/health", health), ("/ping", health), ("/ready", ready), ("/version", version)):
        router.add_api_route(path, function, methods=["GET", "HEAD"])
    return router


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=DISCONNECTED)  # which nobody reads
    if isinstance(error, HTTPException):
        served = "served are /v1/completions, /v1/chat/completions and /v1/models"
        detail = f"There is no {request.url.path[:200]} here; {served}" if error.status_code == 404 else error.detail
        error = ApiError(error.status_code, str(detail))
    if not isinstance(error, ApiError):
        error = ApiError(500, "The request failed", code="internal_error")  # the log has it
    return error_response(error)


def _routes(service: Service) -> APIRouter:
    router = APIRouter()

    def in_thread(function, *arguments):
        return asyncio.get_running_loop().run_in_executor(service.loading, function, *arguments)

    @router.post("/v1/completions")
    async def completions(request: Request):
        return Generation(service, request, CompletionRequest)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        return Generation(service, request, ChatRequest)

    @router.get("/v1/models")
    async def models():
        cards = [_card(service, name) for name in (service.name, *service.bank.names())]
        return {"object": "list", "data": cards, "errors": service.folder.errors}

    @router.get("/v1/models/{name:path}")
    async def model(name: str):
        service.adapter(name)
        return _card(service, name)

    @router.post("/v1/load_lora_adapter")
    async def load(request: Request):
        asked = parse(LoadRequest, await body_of(request, service.limits.max_body_bytes))
        arguments = asked.lora_name, asked.lora_path, asked.load_inplace, asked.pin
        await in_thread(service.folder.load, *arguments)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload(request: Request):
        asked = parse(UnloadRequest, await body_of(request, service.limits.max_body_bytes))
        await in_thread(service.folder.unload, asked.lora_name)
        service.metrics.forget(asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    @router.get("/metrics")
    async def metrics():
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    return router


def _key_check(api_key: str | None):
    expected = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    async def check(request: Request) -> None:
        if expected is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        if not hmac.compare_digest(given, expected) or scheme.lower() != "bearer":
            raise ApiError(
                401, "Incorrect or missing API key, expected Authorization: Bearer KEY", code="invalid_api_key"
            )

    return check


def _card(service: Service, name: str) -> dict:
    base = name == service.name
    card = {"id": name, "object": "model", "created": service.folder.created.get(name, service.created)}
    return {**card, "owned_by": "fastpeft", "parent": None if base else service.name}


def run(service: Service, host: str = "127.0.0.1", port: int = 8000, api_key: str | None = None) -> int:
    """Serve until SIGTERM or SIGINT: then accept nothing new, finish what was accepted, and return 0.

    What has not ended ``limits.drain_seconds`` later is cut off.
    """
    if api_key is None and not host.startswith(_LOOPBACK):
        log.warning(
            "Bound to %s without an API key: whoever reaches this port can use the model and load adapters", host
        )
    with _listen(host, port) as sock:
        server = uvicorn.Server(_config(service, api_key))

        def stop(*_):
            server.should_exit = True

        # uvicorn raises the signal again when it has stopped; this is where it goes then, so the exit code is ours.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        address = f"[{host}]" if ":" in host else host
        print(
            f"fastpeft serves {service.name} on http://{address}:{sock.getsockname()[1]}", file=sys.stderr, flush=True
        )
        server.run(sockets=[sock])
    return 0 if server.started else 3


@contextlib.contextmanager
def background(service: Service, api_key: str | None = None) -> Iterator[str]:
    """Serve from a thread, on a free port of loopback, inside the ``with``; yields the address."""
    with _listen("127.0.0.1", 0) as sock:
        server = uvicorn.Server(_config(service, api_key))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="fastpeft-server")
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=512)


def _config(service: Service, api_key: str | None) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(service, api_key),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(service.limits.drain_seconds)),
    )
