"""python -m bench.nullgpu [-m MODULE | -c CODE | SCRIPT] arguments...: that program on a GPU that computes nothing."""

import os
import runpy
import sys

from . import is_loaded
from .build import LIBRARIES, build


def start(arguments: list[str]) -> None:
    """This process again with the null GPU's libraries loaded first; its children inherit them."""
    folder = build()
    os.environ["NULLGPU"] = os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["LD_PRELOAD"] = " ".join(str(folder / name) for name in LIBRARIES)
    os.environ["TRITON_PTXAS_PATH"] = str(folder / "ptxas")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")  # what is compiled here runs nowhere else
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.execv(sys.executable, [sys.executable, "-m", "bench.nullgpu", *arguments])


def run(arguments: list[str]) -> None:
    """The program, as the interpreter itself would run it."""
    import torch

    # cuDNN is not replaced: it would look for kernels on the device.
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    if os.environ.get("NULLGPU_VALUES") == "ignored":
        from .values import ignore_values

        ignore_values()
    first, rest = arguments[0], arguments[1:]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    run(sys.argv[1:]) if is_loaded() else start(sys.argv[1:])
