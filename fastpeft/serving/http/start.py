"""fastpeft serve: from the command line's options to a running server."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from . import server
from .service import Limits, Service


def serve(options: argparse.Namespace) -> int:
    """Load the model and its adapters, say which are served and which not, and serve; returns the exit code."""
    try:
        service = _service(options)
    except (ImportError, OSError, ValueError, RuntimeError) as error:  # no such model, no memory, no such device
        print(f"fastpeft serve: {error}", file=sys.stderr)
        return 1
    for name, reason in service.folder.errors.items():
        print(f"fastpeft serve: {name} is not served: {reason}", file=sys.stderr)
    print(f"fastpeft serve: adapters: {', '.join(service.bank.names()) or 'none'}", file=sys.stderr)
    print(f"fastpeft serve: {service.batcher.explain()}", file=sys.stderr)
    door = server.Door(
        api_key=options.api_key or os.environ.get("FASTPEFT_API_KEY") or None,
        admin_key=options.admin_key or os.environ.get("FASTPEFT_ADMIN_KEY") or None,
        origins=options.cors_origin,
        page=not options.no_page,
    )
    try:
        return server.run(service, options.host, options.port, door)
    except OSError as error:
        print(f"fastpeft serve: --host {options.host} --port {options.port}: {error}", file=sys.stderr)
        return 1


def _service(options: argparse.Namespace) -> Service:
    import transformers

    if not Path(options.adapters).is_dir():
        raise NotADirectoryError(f"--adapters {options.adapters}: no such folder")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    # safetensors only: nothing is unpickled, and no code of the checkpoint runs.
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, use_safetensors=True)
    name = options.served_model_name or base_name(options.model)
    limits = Limits(
        slots=options.slots,
        max_rank=options.max_rank,
        max_rows=options.max_rows,
        queue=options.queue,
        adapter_rows=options.adapter_rows,
        adapter_waiting=options.adapter_waiting,
        max_body_bytes=options.max_body_bytes,
        max_tokens=options.max_tokens,
        max_cached=options.max_cached,
        host_bytes=options.host_bytes,
        drain_seconds=options.drain_seconds,
        stall_seconds=options.stall_seconds,
        max_adapter_bytes=options.max_adapter_bytes,
        max_connections=options.max_connections,
        head_seconds=options.head_seconds,
        links=tuple(options.follow_links),
        generation_config=not options.no_generation_config,
    )
    return Service(model.to(device).eval(), tokenizer, options.adapters, name, limits)


def base_name(model: str) -> str:
    """What clients call the base model: its hub id, or a folder's name, not where it is.

    A snapshot in the hub's cache, models--ORG--NAME/snapshots/REVISION, is ORG/NAME.
    """
    if not Path(model).is_dir():
        return model
    folder = Path(model).resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return folder.name
