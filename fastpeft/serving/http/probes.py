"""What tells how the server is, to people and to whoever watches over the process."""

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from .access import Access
from .metrics import CONTENT_TYPE
from .openapi import document
from .page import HEADERS, HTML
from .service import Service


def probes(service: Service) -> APIRouter:
    """/health, /ping, /ready, /version, /openapi.json: without a key, and nothing in them needs one."""
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
        return {"version": _version()}

    async def openapi() -> Response:
        return JSONResponse(document(_version()))

    for path, function in (
        ("/health", health),
        ("/ping", health),
        ("/ready", ready),
        ("/version", version),
        ("/openapi.json", openapi),
    ):
        router.add_api_route(path, function, methods=["GET", "HEAD"])
    return router


def views(service: Service, access: Access, page: bool) -> APIRouter:
    """/metrics, and the page that shows them; a browser may send the key as a password."""
    router = APIRouter(dependencies=[Depends(access.page)])

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    async def front(_: Request) -> Response:
        return HTMLResponse(HTML, headers=HEADERS)

    router.add_api_route("/metrics", metrics, methods=["GET", "HEAD"])
    if page:
        router.add_api_route("/", front, methods=["GET", "HEAD"])
    return router


def _version() -> str:
    from ... import __version__

    return __version__
