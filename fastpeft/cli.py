"""fastpeft env | check | inspect | convert | serve | demo | bench.

Nothing is imported before a command needs it: ``env`` must say what is wrong with an installation, not fall over it.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent

_DEMOS = {"--serve": "serve", "--methods": "methods"}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from . import __version__

    parser = argparse.ArgumentParser(prog="fastpeft", description="Fused kernels for parameter-efficient fine-tuning.")
    parser.add_argument("--version", action="version", version=f"fastpeft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("env", help="versions, devices, backends, variables: paste it into a bug report")
    check = commands.add_parser("check", help="run every op on your device against the reference; exit code 1 on error")
    check.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    build = commands.add_parser("build", help="compile the extension that saves host time, for the torch that is here")
    build.add_argument("--verbose", action="store_true", help="show what the compiler is told")
    _add_checkpoints(commands)
    _add_serve(commands)
    demo = "fine-tune a small encoder with LoRA; --methods: with every method; --serve: serve several adapters"
    for name, what in (("demo", demo), ("bench", "time every op beside its peers")):
        commands.add_parser(name, add_help=False, help=f"{what} (from a source checkout; takes its own options)")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "demo":
        chosen = [word for word in rest if word in _DEMOS]
        example = _DEMOS[chosen[0]] if chosen else "finetune"
        return _from_checkout(f"examples/{example}.py", "{path}", *(word for word in rest if word not in _DEMOS))
    if arguments.command == "bench":
        return _from_checkout("bench", "-m", "pytest", "{path}", *rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "serve":
        return _serve(arguments)
    if arguments.command in ("inspect", "convert"):
        return _inspect(arguments.directory) if arguments.command == "inspect" else _convert(arguments)
    if arguments.command == "build":
        return _build(arguments.verbose)
    return _env() if arguments.command == "env" else _check(arguments.device)


def _build(verbose: bool) -> int:
    from . import _host

    try:
        print(f"fastpeft: built {_host.build(verbose)}")
    except (OSError, RuntimeError) as error:
        print(f"fastpeft build: {error}", file=sys.stderr)
        return 1
    return 0


def _from_checkout(part: str, *command: str) -> int:
    path = _CHECKOUT / part
    if not path.exists():
        print(
            f"fastpeft: {part} is in the source checkout only; clone the repository and run it there", file=sys.stderr
        )
        return 2
    return subprocess.call(
        [sys.executable, *(word.format(path=path) if "{path}" in word else word for word in command)]
    )


def _add_checkpoints(commands) -> None:
    what = "what an adapter's checkpoint is, what serves it, what is wrong with it; exit code 1 if something is"
    inspect = commands.add_parser("inspect", help=what, description=what[0].upper() + what[1:] + ".")
    inspect.add_argument("directory", metavar="DIR", help="a checkpoint of PEFT, AdapterHub or fastpeft, or several")
    what = "write an adapter's checkpoint in another library's format; no model is needed"
    convert = commands.add_parser("convert", help=what, description=what[0].upper() + what[1:] + ".")
    convert.add_argument("source", metavar="SRC")
    convert.add_argument("destination", metavar="DST", help="a folder without a checkpoint")
    convert.add_argument("--to", required=True, choices=("peft", "adapters", "fastpeft"))


def _inspect(directory: str) -> int:
    from .methods.formats.inspection import inspect_checkpoints

    try:
        found = inspect_checkpoints(directory)
    except (OSError, ValueError, ImportError) as error:
        print(f"fastpeft {error}", file=sys.stderr)
        return 2
    print("\n\n".join(map(str, found)))
    return 1 if any(inspection.problems for inspection in found) else 0


def _convert(options: argparse.Namespace) -> int:
    from .methods.formats.conversion import convert

    try:
        print(convert(options.source, options.destination, options.to))
    except (OSError, ValueError, ImportError) as error:
        print(f"fastpeft {error}", file=sys.stderr)
        return 2
    return 0


def _add_serve(commands) -> None:
    what = "serve a model and its adapters with OpenAI's HTTP API; model= names the adapter"
    serve = commands.add_parser("serve", help=what, description=what[0].upper() + what[1:] + ".")
    add = serve.add_argument
    add("model", metavar="MODEL", help="hub id or folder of a causal language model (safetensors)")
    add("--adapters", required=True, metavar="DIR", help="folder whose sub-folders are PEFT checkpoints")
    add("--served-model-name", metavar="NAME", help="the base model's name in requests (default: MODEL)")
    add("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    add("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    add("--api-key", metavar="KEY", help="clients must send it; rather set FASTPEFT_API_KEY, which ps does not show")
    add(
        "--admin-key",
        metavar="KEY",
        help="needed to load and unload; rather set FASTPEFT_ADMIN_KEY (default: --api-key)",
    )
    add("--cors-origin", metavar="ORIGIN", action="append", default=[], help="whose web pages may ask; * for all")
    add("--no-page", action="store_true", help="no page at /, which shows what /metrics says")
    add("--follow-links", metavar="ROOT", action="append", default=[], help="let links in DIR lead into this folder")
    add("--no-generation-config", action="store_true", help="do not take sampling defaults from the checkpoint")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="default: the checkpoint's")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    for name, default, what in (
        ("slots", 8, "adapters on the device at once, and the most in one batch"),
        ("max-rank", 64, "largest rank served"),
        ("max-rows", 32, "requests that run at once"),
        ("queue", 256, "requests that may wait; 429 beyond"),
        ("adapter-rows", None, "requests of one adapter that run at once (default: --max-rows)"),
        ("adapter-waiting", None, "requests of one adapter that may wait; 429 beyond (default: --queue)"),
        ("max-tokens", None, "prompt and completion of a request together; 400 beyond (default: the model's context)"),
        ("max-cached", None, "tokens that the cache holds (default: rows x max-tokens, or what memory holds)"),
        ("host-bytes", None, "of adapters in host memory (default: a quarter of what is free); the rest is read again"),
        ("max-body-bytes", 1 << 20, "size of a request; 413 beyond"),
        ("max-adapter-bytes", 1 << 30, "size of an adapter that is loaded from a request's body; 413 beyond"),
        ("max-connections", 1024, "connections at once; beyond, those without a request make room"),
        ("head-seconds", 20, "how long the head of a request may take"),
        ("drain-seconds", 30, "how long SIGTERM waits for requests to end"),
        ("stall-seconds", 120, "how long a step may take before /health says 503"),
    ):
        shown = "" if default is None else f" (default: {default})"
        add(f"--{name}", type=_positive, default=default, metavar="N", help=what + shown)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _serve(options: argparse.Namespace) -> int:
    try:
        from .serving.http import start
    except ImportError as error:
        print(f"fastpeft serve: {error}", file=sys.stderr)
        return 2
    return start.serve(options)


def _check(device: str | None) -> int:
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        print(f"fastpeft check: device {device}, but torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    from .testing import check_ops

    print("Error against float64, relative to plain PyTorch's at the same dtype (at most 2 for max, 1.2 for rms):")
    print(f"{'op':44} {'dtype':10} {'max':>6} {'rms':>6}")
    failed = checked = 0
    for name, dtype, ratio_max, ratio_rms, ok in check_ops(torch.device(device)):
        shown = str(dtype).removeprefix("torch.")
        print(f"{name:44} {shown:10} {ratio_max:6.2f} {ratio_rms:6.2f}  {'ok' if ok else 'FAILED'}", flush=True)
        checked += 1
        failed += not ok
    print(f"{checked - failed} passed, {failed} failed on {device}")
    return 1 if failed or not checked else 0


def _env() -> int:
    rows = [
        ("fastpeft", f"{_own_version()}  ({Path(__file__).parent})"),
        ("python", f"{platform.python_version()}  ({platform.platform()})"),
        *((name, _version(name)) for name in ("torch", "triton", "peft", "transformers", "numpy")),
        *_devices(),
        ("fastpeft._C", _extension()),
        ("host extension", _host_extension()),
        *_backends(),
        *_variables(),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")
    return 0


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed (pip install {distribution})"


def _own_version() -> str:
    from . import __version__

    try:
        importlib.metadata.version("fastpeft")
    except importlib.metadata.PackageNotFoundError:
        return f"{__version__}, a source checkout on the path"
    return __version__


def _devices() -> list[tuple[str, str]]:
    import torch

    rows = [("CUDA of torch", torch.version.cuda or (f"ROCm {torch.version.hip}" if torch.version.hip else "none"))]
    rows.append(("driver", _driver()))
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        gib = device.total_memory / 2**30
        rows.append((f"cuda:{index}", f"{device.name}, sm_{device.major}{device.minor}, {gib:.0f} GiB"))
    return rows


def _driver() -> str:
    """nvidia-smi's word, since it sees a GPU that torch cannot use: the commonest cause of a report."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "none found (no nvidia-smi)"
    return " ".join(sorted(set(done.stdout.split()))) or f"nvidia-smi: {(done.stderr or 'no output').strip()}"


def _extension() -> str:
    from . import _backend

    missing = _backend.cuda_missing()
    if missing is not None:
        return missing.removeprefix("fastpeft._C ").removeprefix("is ").removeprefix("was ")
    extension = importlib.import_module("fastpeft._C")
    devices, error = extension.devices()
    built = f"built for CUDA {extension.cuda // 1000}.{extension.cuda % 1000 // 10}  ({extension.__file__})"
    return f"{built}, sees {devices} devices{f': {error}' if error else ''}"


def _host_extension() -> str:
    from . import _host

    found = _host.load()
    return (
        f"serves  ({found.__file__})"
        if found is not None
        else f"{_host.missing()}; {_host.described().partition(',')[0]}"
    )


def _backends() -> list[tuple[str, str]]:
    import torch

    from . import _backend

    rows = []
    for device in [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]:
        cuda = _backend.cuda_missing() if device.type == "cuda" else "it serves CUDA tensors"
        for name, reason in (("cuda", cuda), ("triton", _backend.triton_reason(device)), ("reference", None)):
            rows.append((f"{name} on {device}", "serves" if reason is None else f"does not serve: {reason}"))
    return rows


def _variables() -> list[tuple[str, str]]:
    names = sorted(name for name in os.environ if name.startswith(("FASTPEFT_", "TRITON_", "CUDA_VISIBLE_")))
    return [(name, os.environ[name]) for name in names] or [("FASTPEFT_*, TRITON_*", "not set")]


if __name__ == "__main__":
    sys.exit(main())
