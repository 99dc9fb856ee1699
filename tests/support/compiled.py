"""What Triton's launch returns, as far as a tape looks at it."""

from types import SimpleNamespace


def kernel_of(changed: dict | None):
    """A kernel of a pointer and a number, and what launching it returned; None: what the interpreter returns."""
    kernel = SimpleNamespace(arg_names=["x_ptr", "alpha"])
    if changed is None:
        return kernel, None
    facts = {"num_warps": 4, "warp_size": 32, "shared": 0, "num_ctas": 1, "name": "kernel"} | changed
    signature = {"x_ptr": "*fp32", "alpha": facts.pop("signature", "fp32")}
    source = SimpleNamespace(signature=signature)
    return kernel, SimpleNamespace(function=1, metadata=SimpleNamespace(**facts), src=source)
