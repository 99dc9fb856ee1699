"""Which backends serve a call of multi_lora: of every one the reason why not, or None."""

from torch import Tensor

from .. import _backend

MAX_RANK = 512


def _triton_reason(x, lora_as, *_):
    return _backend.triton_lora_reason(x, lora_as[0].dtype, max(a.shape[1] for a in lora_as), MAX_RANK)


def _cuda_reason(x, lora_as, lora_bs=(), ys=(), dropouts=None):
    found = _backend.cuda_reason(x, "sm_80 or later", lambda capability: capability >= 80)
    if found is not None:
        return found
    limits, k = _backend.load("multi_lora", "cuda"), max(1, x.shape[-1])
    if x.dtype not in limits.DTYPES or lora_as[0].dtype != x.dtype:
        return f"x in {x.dtype} and adapters in {lora_as[0].dtype}, expected both bfloat16 or both float16"
    if x.numel() > limits.MAX_TOKENS * k:
        return f"{x.numel() // k} tokens > {limits.MAX_TOKENS}"
    columns = sum(limits.columns_of(a.shape[1]) for a in lora_as)
    if columns > limits.MAX_COLUMNS:
        return f"ranks, each rounded up to 16, of {columns} > {limits.MAX_COLUMNS}"
    if dropouts is not None and any(dropouts):
        return "dropout (the kernel is for serving)"
    rows = [("x", x), *(("lora_a", a) for a in lora_as), *(("lora_b", b) for b in lora_bs), *(("y", y) for y in ys)]
    apart = next((name for name, t in rows if t is not None and t.shape[-1] > 1 and t.stride(-1) != 1), None)
    return None if apart is None else f"{apart}'s last dimension has gaps, expected adjacent elements"


def _cuda_unasked(x, lora_as, lora_bs=(), *_):
    sizes = sum(b.shape[1] for b in lora_bs), sum(a.shape[1] for a in lora_as)
    return _backend.cuda_unasked("multi_lora", x, *sizes)


REASONS = {
    "cuda": _cuda_reason,
    _backend.UNASKED: _cuda_unasked,
    "triton": _triton_reason,
    "reference": lambda *_: None,
}


def facts(given: dict) -> tuple:
    """What ``REASONS`` look at, of the arguments of ``multi_lora`` by name, in any of its forms."""
    if "lora_as" in given:
        lora_as, lora_bs, ys = given["lora_as"], given.get("lora_bs", ()), given.get("ys", ())
    else:  # in place, tensors or lists of them
        lists = (given["lora_a"], given.get("lora_b", ()), given.get("y", ()))
        lora_as, lora_bs, ys = ([found] if isinstance(found, Tensor) else found for found in lists)
    return given["x"], lora_as, lora_bs, ys, given.get("dropouts")
