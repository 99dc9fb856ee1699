# ruff: noqa: E501
"""Mutants of what attached layers compute under torch.func, forward mode and torch.jit.trace, as run.py says."""

FILE = "tests/methods/test_transforms.py"

TESTS = (FILE,)
MUTANTS = {
    "fastpeft/nn/plain.py": {
        "transform": {
            "torch.func sees an op": ("torch._C._functorch.peek_interpreter_stack() is not None", "False", f"{FILE}::test_grad"),
            "forward mode sees an op": ("forward_ad._current_level >= 0", "False", f"{FILE}::test_forward_mode"),
            "a trace sees an op": ("torch._C._is_tracing()", "False", f"{FILE}::test_trace"),
        },
        "bottleneck": {"no residual in plain PyTorch": ("(residual + u)", "u", f"{FILE}::test_vmap")},
    },
    "fastpeft/nn/live_slice.py": {
        "LiveSlice.written": {"the trained part gets no gradient through a transform": ("self.trained.to(", "self.trained.detach().to(", f"{FILE}::test_grad")},
    },
}  # fmt: skip
