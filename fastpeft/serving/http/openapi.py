"""/openapi.json: the requests as the server reads them, from the models that read them."""

from typing import Any

from pydantic.json_schema import models_json_schema

from .api import ChatRequest, CompletionRequest, LoadRequest, UnloadRequest

_TEMPLATE = "#/components/schemas/{model}"
_POSTS = {
    "/v1/completions": (CompletionRequest, "Complete prompts; with stream, as server-sent events"),
    "/v1/chat/completions": (ChatRequest, "Answer a chat; with stream, as server-sent events"),
    "/v1/load_lora_adapter": (LoadRequest, "Load an adapter from the served folder, or replace one"),
    "/v1/unload_lora_adapter": (UnloadRequest, "Unload an adapter"),
}
_GETS = {
    "/v1/models": ("The base model and its adapters", "application/json"),
    "/health": ("Liveness", None),
    "/ping": ("Liveness", None),
    "/ready": ("Readiness", None),
    "/version": ("The version", "application/json"),
    "/metrics": ("Prometheus' text format", "text/plain"),
}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_ERRORS = (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503)


def document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1."""
    models: Any = [(model, "validation") for model, _ in _POSTS.values()]
    _, schemas = models_json_schema(models, ref_template=_TEMPLATE)
    paths: dict[str, Any] = {}
    for path, (model, summary) in _POSTS.items():
        schema = {"$ref": _TEMPLATE.format(model=model.__name__)}
        kinds = ["text/plain"] if "lora_adapter" in path else ["application/json", "text/event-stream"]
        paths[path] = {"post": _operation(summary, kinds, {"application/json": {"schema": schema}})}
    binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    from_tensors = _operation("Load an adapter from a safetensors file in the body", ["text/plain"], binary)
    from_tensors["parameters"] = [
        _query("lora_name", "string", True),
        *(_query(name, "boolean", False) for name in ("load_inplace", "pin")),
    ]
    paths["/v1/load_lora_adapter_from_tensors"] = {"post": from_tensors}
    for path, (summary, kind) in _GETS.items():
        paths[path] = {"get": _operation(summary, [kind] if kind else [])}
    bearer = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "fastpeft", "version": version},
        "paths": paths,
        "components": {"schemas": {**schemas.get("$defs", {}), "Error": _ERROR}, "securitySchemes": bearer},
        "security": [{}, {"bearer": []}],
    }


def _operation(summary: str, kinds: list[str], body: dict[str, Any] | None = None) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": _TEMPLATE.format(model="Error")}}, "text/plain": {}}
    responses: dict[str, Any] = {str(code): {"description": "An error", "content": error} for code in _ERRORS}
    responses["200"] = {"description": "Success", **({"content": {kind: {} for kind in kinds}} if kinds else {})}
    made: dict[str, Any] = {"summary": summary, "responses": responses}
    return made if body is None else {**made, "requestBody": {"required": True, "content": body}}


def _query(name: str, kind: str, required: bool) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": required, "schema": {"type": kind}}
