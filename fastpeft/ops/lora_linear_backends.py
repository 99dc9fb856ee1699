"""Which backends serve a call of lora_linear: of every one the reason why not, or None."""

from .. import _backend
from .base import Base

MAX_RANK = 512


def _triton_reason(x, lora_as, *_):
    return _backend.triton_lora_reason(x, lora_as[0].dtype, sum(a.shape[0] for a in lora_as), MAX_RANK)


def _cuda_reason(x, lora_as, weights=(), lora_bs=()):
    found = _backend.cuda_reason(x, "sm_90 (wgmma)", lambda capability: capability == 90) or _triton_reason(x, lora_as)
    if found is not None:
        return found
    impl, ranks = _backend.load("lora_linear", "cuda"), [a.shape[0] for a in lora_as]
    if x.dtype not in impl.DTYPES or lora_as[0].dtype != x.dtype:
        return f"x in {x.dtype} and adapters in {lora_as[0].dtype}, expected both bfloat16 or both float16"
    if sum(ranks) > impl.MAX_RANK or any(rank % 8 for rank in ranks):
        return f"ranks {ranks}, expected multiples of 8 that add up to {impl.MAX_RANK} at most"
    base = [weight for weight in weights if weight is not None]
    if not all(weight.is_floating_point() for weight in base):
        return "the weight is quantised, expected a dense one"
    if weights and not base:
        return "no weight, so no GEMM to compute the low-rank term in"
    if any(size % 8 for weight in base for size in weight.shape):
        return f"weight has shape {[list(weight.shape) for weight in base]}, expected multiples of 8"
    read = [("weight", weight) for weight in base] + [("lora_b", b) for b in lora_bs]
    read.append(("x", x if x.dim() == 2 else x.reshape(-1, x.shape[-1])))
    return next(filter(None, (impl.unfit(name, t) for name, t in read)), None)


def _cuda_unasked(x, lora_as, weights=(), lora_bs=()):
    widest = max((weight.shape[0] for weight in weights if weight is not None), default=0)
    return _backend.cuda_unasked("lora_linear", x, widest, sum(a.shape[0] for a in lora_as))


REASONS = {
    "cuda": _cuda_reason,
    _backend.UNASKED: _cuda_unasked,
    "triton": _triton_reason,
    "reference": lambda *_: None,
}


def facts(given: dict) -> tuple:
    """What ``REASONS`` look at, of the arguments of ``lora_linear`` or ``lora_linear_shared`` by name."""
    if "lora_as" in given:
        weights = [w.codes if isinstance(w, Base) else w for w in given.get("weights", ())]
        return given["x"], given["lora_as"], weights, given.get("lora_bs", ())
    weights = [given["weight"]] if "weight" in given else []
    weights = [w.codes if isinstance(w, Base) else w for w in weights]
    return given["x"], [given["lora_a"]], weights, [given["lora_b"]] if "lora_b" in given else ()
