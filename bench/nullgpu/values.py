"""What compares values finds them right: the null GPU's kernels write nothing, so values say nothing."""

import functools

import torch

from . import reads_zero

_ZEROS = reads_zero()  # entered and never left


def ignore_values() -> None:
    """In this process, from now on: errors are 0, and the host reads zeros. Other shapes and dtypes still raise."""
    from fastpeft import testing
    from fastpeft.testing import accuracy, memory

    _ZEROS.__enter__()
    judge = accuracy.error_vs_eager

    def error_vs_eager(*arguments, **named):
        judge(*arguments, **named)
        return accuracy.Ratios(0.0, 0.0)

    def assert_close(actual, expected, *, check_dtype=True, **named):
        if isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor):
            if actual.shape != expected.shape or (check_dtype and actual.dtype != expected.dtype):
                raise TypeError(
                    f"{actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
                )

    testing.error_vs_eager = accuracy.error_vs_eager = error_vs_eager
    torch.testing.assert_close = assert_close
    # Without test_schema, which finds mutations by values.
    traced = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    torch.library.opcheck = functools.partial(torch.library.opcheck, test_utils=traced)
    memory.poisoned.__exit__ = lambda self, *raised: super(memory.poisoned, self).__exit__(*raised)
