"""Which of cuda, triton and reference serves a call, and why not the others.

Automatic choice takes the first backend without a reason against it. It depends on shapes, dtypes and the device's
capability alone, never on timing: where a CUDA kernel is worth taking unasked is a committed table of measurements. An
explicit request is served by that backend or raises with the reason.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from . import _check, _device, _host

ORDER = ("cuda", "triton", "reference")
UNASKED = "cuda, unasked"  # the reason against cuda where nobody asked for it
_FOLDERS = {"cuda": "fastpeft.cuda", "triton": "fastpeft.kernels", "reference": "fastpeft.reference"}
_NOTE = Path(__file__).parent / "without_C.txt"  # left by setup.py where it built no extension

Reasons = Mapping[str, Callable[..., str | None]]


def choose(op: str, requested: str | None, reasons: Reasons, *facts) -> str:
    """The backend that serves ``op`` for these facts.

    Args:
        op: the public name, for errors.
        requested: a backend's name, or None for ``FASTPEFT_BACKEND`` and then the automatic choice.
        reasons: for each backend the function that returns None, or why it cannot serve the facts; for ``UNASKED``
            one that returns None where cuda is to be taken without being asked for.
        facts: what the reasons look at; the first is the tensor whose device decides.

    Raises:
        ValueError: no such backend, or it cannot serve the call.
    """
    source = "backend"
    if requested is None:
        source, requested = "FASTPEFT_BACKEND", os.environ.get("FASTPEFT_BACKEND") or None
    if requested is None:
        # Triton's interpreter serves CPU tensors, but only those who ask for it: it proves kernels, slowly.
        if facts[0].device.type == "cpu":
            return "reference"
        return next(name for name in ORDER if _against(name, reasons, facts) is None)
    _check.one_of(op, source, requested, ORDER)
    reason = reasons[requested](*facts)
    if reason is not None:
        raise ValueError(f"{op}: backend={requested!r} cannot serve this call: {reason}")
    return requested


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and why not the others. ``str`` is all of it as text, a line for each fact.

    Attributes:
        op: the op's name, as in ``fastpeft.ops``.
        backend: which serves the call: "cuda", "triton" or "reference".
        configuration: a line for each kernel that the call runs, with its tile sizes; empty where PyTorch serves.
        reasons: for every other backend why it does not serve the call, or that it would if asked to.
        host: what runs such calls from the third on: the host extension, plans in Python, or nothing, and why; None for
            an op that is not planned.
    """

    op: str
    backend: str
    configuration: tuple[str, ...]
    reasons: Mapping[str, str]
    host: str | None

    def __str__(self) -> str:
        others = (f"{name}: {reason}" for name, reason in self.reasons.items())
        lines = [f"{self.op}: served by {self.backend}", *others, *self.configuration]
        return "\n  ".join(lines if self.host is None else [*lines, f"calls that repeat: {self.host}"])


def explain(op: str, page: str, requested: str | None, reasons: Reasons, *facts, planned: bool) -> Explanation:
    """The choice for these facts, its kernel configurations, and the reasons against the other backends.

    Args:
        op: a public name; page: the basename of the files that implement it.
        requested, reasons, facts: as in ``choose``.
        planned: whether calls of the op that repeat are planned.
    """
    chosen = choose(op, requested, reasons, *facts)
    against = {}
    for name in ORDER:
        if name != chosen:
            found = reasons[name](*facts)
            unasked = None if found else _against(name, reasons, facts)
            against[name] = f"{found or 'can serve this call'}{f', if asked to: {unasked}' if unasked else ''}"
    describe = getattr(load(page, chosen), "describe", None)
    configuration = tuple(describe(*facts)) if describe else ()
    return Explanation(op, chosen, configuration, against, _host.described() if planned else None)


def _against(name: str, reasons: Reasons, facts: tuple) -> str | None:
    """The reason against a backend that nobody asked for."""
    unasked = reasons.get(UNASKED) if name == "cuda" else None
    return (unasked and unasked(*facts)) or reasons[name](*facts)


def _constant(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result without importing dynamo, and with it Triton, at decoration."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


@functools.cache
def load(op: str, backend: str) -> ModuleType:
    """The module that implements ``op``: one op has one basename in every folder."""
    return importlib.import_module(f"{_FOLDERS[backend]}.{op}")


@_constant
def triton_missing() -> str | None:
    """None when Triton imports, else the reason."""
    error = _import_error("triton")
    return None if error is None else f"Triton does not import ({error})"


@_constant
def cuda_missing() -> str | None:
    """None when the compiled extension imports, else the reason."""
    error = _import_error("fastpeft._C")
    if error is None:
        return None
    if importlib.util.find_spec("fastpeft._C") is not None:
        return f"fastpeft._C is built, but does not load: {error}"
    if _NOTE.is_file():
        return f"fastpeft._C was not built: {_NOTE.read_text().strip()}"
    return "fastpeft._C is not built (in a checkout: python setup.py build_ext --inplace, which needs nvcc)"


@_constant
def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return importlib.import_module("triton").knobs.runtime.interpret


@_constant
def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device as one number: 80, 90, ..."""
    return _device.capability(device)


@functools.cache
def _import_error(module: str) -> ImportError | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return error
    return None


def triton_reason(device: torch.device, oldest: int = 80) -> str | None:
    """Why Triton cannot run on ``device`` at all, or None."""
    missing = triton_missing()
    if missing is not None:
        return missing
    if device.type == "cuda":
        found = capability(device)
        return f"sm_{found} < sm_{oldest}" if found < oldest else None
    if device.type == "cpu" and interpreting():
        return None
    return f"device {device.type} (on a CPU Triton runs only in its interpreter, TRITON_INTERPRET=1)"


def cuda_reason(x: torch.Tensor, capabilities: str, fits: Callable[[int], bool]) -> str | None:
    """Why no kernel of fastpeft._C runs where x is, or None; ``fits`` takes the capability, 80, 90, ..."""
    missing = cuda_missing()
    if missing is not None:
        return missing
    if x.device.type != "cuda":
        return f"device {x.device.type} (the kernels of fastpeft._C run on CUDA devices)"
    found = capability(x.device)
    if not fits(found):
        return f"sm_{found}, expected {capabilities}"
    return cuda_unusable()


def cuda_unasked(op: str, x: torch.Tensor, n: int, rank: int) -> str | None:
    """Why a kernel of fastpeft._C is not taken for x, N and R without being asked for; None where it was measured."""
    choice = importlib.import_module("fastpeft.cuda.choice")
    where = "fastpeft/cuda/choice.py"
    if not choice.TABLE:
        return f"no measurement says that it is faster ({where} is empty)"
    if not x.is_cuda or cuda_missing() is not None:
        return None  # there are better reasons
    found, k = capability(x.device), x.shape[-1]
    sizes = x.numel() // max(1, k), k, n, rank
    if choice.measured(op, found, *sizes) is None:
        return f"{where} has no measurement on sm_{found} for M, K, N, R = {sizes}"
    return None


@_constant
def cuda_unusable() -> str | None:
    """Why the extension's own CUDA runtime sees no device, or None: an older driver than it was built for, say."""
    return _unusable()


@functools.cache
def _unusable() -> str | None:
    count, error = importlib.import_module("fastpeft._C").devices()
    return None if count else f"fastpeft._C sees no device: {error or 'none is there'}"


def triton_lora_reason(x: torch.Tensor, adapter: torch.dtype, rank: int, largest: int) -> str | None:
    """Why Triton cannot multiply x with adapters of this dtype and rank where x is, or None."""
    reason = triton_reason(x.device)
    if reason is None and x.is_cuda and torch.float64 in (x.dtype, adapter):
        return "dtype float64"
    reason = reason or bfloat16_reason(x.device, x.dtype, adapter)
    return f"rank {rank} > {largest}" if reason is None and rank > largest else reason


# Set by whoever has corrected Triton's interpreter, as the tests do.
interprets_bfloat16 = False


def bfloat16_reason(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why Triton's interpreter cannot take these dtypes, or None; on a GPU it is not asked."""
    if device.type == "cuda" or interprets_bfloat16 or torch.bfloat16 not in dtypes:
        return None
    return "dtype bfloat16 (Triton's interpreter multiplies its bit patterns, and truncates where GPUs round)"
