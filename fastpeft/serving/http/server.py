"""A server on one machine that speaks OpenAI's completions and chat endpoints; ``model`` names the adapter.

    fastpeft serve MODEL --adapters DIR

Also vLLM's endpoints for loading and unloading adapters, /health (liveness), /ready, /metrics and a page of them.
Every other answer is an error in OpenAI's form. One process, one model; the event loop speaks HTTP, the batcher's
thread runs the model.
"""

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

try:
    import uvicorn
    from fastapi import APIRouter, Depends, FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import PlainTextResponse, Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    from ..errors import UnknownAdapter
    from .access import Access
    from .answers import ApiError, log
    from .api import ChatRequest, CompletionRequest, LoadRequest, UnloadRequest, parse
    from .bodies import body_of
    from .connections import bounded_protocol, drop_dead_peers
    from .generation import Generation, error_response
    from .metrics import DISCONNECTED
    from .probes import probes, views
    from .service import Service
except ImportError as error:
    if error.name not in ("uvicorn", "fastapi", "starlette", "pydantic", "prometheus_client"):
        raise
    raise ImportError(f"serving needs {error.name}: pip install 'fastpeft[serve]'", name=error.name) from error

_KEEP_ALIVE = 75  # seconds: longer than clients keep idle connections, so that none is closed under a new request
_ADAPTER_SECONDS, _UPLOADS = 600.0, 2  # for an adapter in a request's body; so many are in memory at once
_LOOPBACK = ("127.", "::1", "localhost")


@dataclass(frozen=True)
class Door:
    """Who comes in, and what they see.

    Args:
        api_key: that requests need, or None.
        admin_key: that loading and unloading need; None for ``api_key``.
        origins: of web pages that may ask, "*" for all.
        page: whether / shows how the server is.
    """

    api_key: str | None = None
    admin_key: str | None = None
    origins: Sequence[str] = ()
    page: bool = True


def make_app(service: Service, door: Door = Door()) -> FastAPI:
    """The ASGI application; its lifespan starts the batcher and stops the service."""

    @contextlib.asynccontextmanager
    async def lifespan(_):
        service.batcher.start()
        yield
        await asyncio.to_thread(service.stop)

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(title="fastpeft", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for kind in (ApiError, HTTPException, RequestValidationError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer_error)
    access = Access(door.api_key, door.admin_key)
    app.include_router(probes(service))
    app.include_router(views(service, access, door.page))
    app.include_router(_routes(service), dependencies=[Depends(access.request)])
    app.include_router(_changes(service), dependencies=[Depends(access.change)])
    if door.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(door.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=DISCONNECTED)  # which nobody reads
    if isinstance(error, HTTPException):
        served = "served are /v1/completions, /v1/chat/completions and /v1/models"
        detail = f"There is no {request.url.path[:200]} here; {served}" if error.status_code == 404 else error.detail
        allowed, error = error.headers or {}, ApiError(error.status_code, str(detail))
        error.headers.update(allowed)  # the methods that there are
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        error = ApiError(400, f"{first['loc'][-1]}: {first['msg']}", str(first["loc"][-1]))
    if not isinstance(error, ApiError):
        error = ApiError(500, "The request failed", code="internal_error")  # the log has it
    return error_response(error)


def _routes(service: Service) -> APIRouter:
    """What asks."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(request: Request):
        return Generation(service, request, CompletionRequest)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        return Generation(service, request, ChatRequest)

    @router.api_route("/v1/models", methods=["GET", "HEAD"])
    async def models():
        cards = [_card(service, name) for name in (service.name, *service.bank.names())]
        return {"object": "list", "data": [card for card in cards if card], "errors": service.folder.errors}

    @router.get("/v1/models/{name:path}")
    async def model(name: str):
        await service.adapter(name)
        return _card(service, name)

    return router


def _changes(service: Service) -> APIRouter:
    """What changes which adapters are served."""
    router, folder, limits = APIRouter(), service.folder, service.limits
    uploads = asyncio.Semaphore(_UPLOADS)

    @router.post("/v1/load_lora_adapter")
    async def load(request: Request):
        asked = parse(LoadRequest, await body_of(request, limits.max_body_bytes))
        await service.in_loading(folder.load, asked.lora_name, asked.lora_path, asked.load_inplace, asked.pin)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @router.post("/v1/load_lora_adapter_from_tensors")
    async def load_from_tensors(request: Request, lora_name: str, load_inplace: bool = False, pin: bool = False):
        kind = "application/octet-stream"
        async with uploads:
            weights = await body_of(request, limits.max_adapter_bytes, kind, _ADAPTER_SECONDS)
            await service.in_loading(folder.load_bytes, lora_name, weights, load_inplace, pin)
        return PlainTextResponse(f"Success: LoRA adapter '{lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload(request: Request):
        asked = parse(UnloadRequest, await body_of(request, limits.max_body_bytes))
        await service.in_loading(folder.unload, asked.lora_name)
        service.metrics.forget(asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    return router


def _card(service: Service, name: str) -> dict | None:
    """Of one model; None if it was unloaded just now."""
    base = name == service.name
    card = {"id": name, "object": "model", "created": service.folder.created.get(name, service.created)}
    try:
        version = None if base else service.bank.version(name)
    except UnknownAdapter:
        return None
    return {**card, "owned_by": "fastpeft", "parent": None if base else service.name, "version": version}


def run(service: Service, host: str = "127.0.0.1", port: int = 8000, door: Door = Door()) -> int:
    """Serve until SIGTERM or SIGINT: then accept nothing new, finish what was accepted, and return 0.

    What has not ended ``limits.drain_seconds`` later is cut off.
    """
    if door.api_key is None and not host.startswith(_LOOPBACK):
        log.warning(
            "Bound to %s without an API key: whoever reaches this port can use the model and load adapters", host
        )
    with _listen(host, port) as sock:
        server = uvicorn.Server(_config(service, door))

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
def background(service: Service, door: Door = Door()) -> Iterator[str]:
    """Serve from a thread, on a free port of loopback, inside the ``with``; yields the address."""
    with _listen("127.0.0.1", 0) as sock:
        server = uvicorn.Server(_config(service, door))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="fastpeft-server")
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=512)
    drop_dead_peers(listener)
    return listener


def _config(service: Service, door: Door) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(service, door),
        http=bounded_protocol(service.limits.max_connections, service.limits.head_seconds),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(service.limits.drain_seconds)),
    )
