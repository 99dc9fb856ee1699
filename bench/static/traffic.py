"""What each kernel does that its machine code does not say: how often its loops run, and what is read again."""

from dataclasses import dataclass

from .launches import Launch, size_of

# By kernel: the grid's axes over which an argument is read again. What is not named is read or written once.
AGAIN = {
    "_down_kernel": {"x_ptr": (1,), "a_ptr": (0,)},
    "_up_kernel": {"s_ptr": (1,), "b_ptr": (0,)},
    "_up_backward_kernel": {"s_ptr": (0,), "b_ptr": (1,)},
    "_outer_kernel": {"s_ptr": (0,), "x_ptr": (1,)},
    "_fused_kernel": {"d_ptr": (0,), "u_ptr": (0,)},
    "_hidden_kernel": {"x_ptr": (1,), "d_ptr": (0,)},
    "_hidden_up_kernel": {"h_ptr": (1,), "u_ptr": (0,)},
    "_hidden_backward_kernel": {"x_ptr": (1,), "dy_ptr": (1,), "d_ptr": (0,), "u_ptr": (0,)},
    "_dx_kernel": {"dz_ptr": (1,), "d_ptr": (0,)},
    "_weight_gradient_kernel": {"s_ptr": (0,), "x_ptr": (1,)},
    "_gathered_outer_kernel": {"dy_ptr": (0,), "x_ptr": (1,)},
    "_shrink_kernel": {"x_ptr": (1,)},
    "_expand_kernel": {"s_ptr": (1,)},
}
TILES = ("_shrink_kernel", "_expand_kernel")  # every tile of a slot's tokens reads the slot's matrices again
SECTOR = 32  # bytes that one number of a column costs
# Tables of a few numbers, which stay in the caches.
SMALL = ("branch_ptr", "seed_ptr", "bias_ptr")


@dataclass(frozen=True)
class Work:
    """What a launch does.

    Attributes:
        moved: bytes from and to device memory.
        read: bytes through the L2.
        trips: how often each outermost loop runs, in a program.
        tile: bytes that a loop's step loads; 0 where there is nothing to wait for.
        inner: how often a loop inside of another runs, in one step of that.
        chain: loads of which each waits for the one before, where little else is done.
    """

    moved: int
    read: int
    trips: tuple[int, ...] = (1,)
    tile: int = 0
    inner: int = 1
    chain: int = 0


def work(launch: Launch) -> Work:
    """What a launch does, from its grid, tensors and tile sizes."""
    again = AGAIN.get(launch.name, {})
    tensors = {name: t for name, t in launch.tensors.items() if name not in SMALL}
    if launch.name == "_column_kernel":
        wanted = min(size_of(tensors.pop("dy_ptr")), tensors["c_ptr"].numel() * SECTOR)
        moved = wanted + sum(map(size_of, tensors.values()))
        return Work(moved, moved)
    moved = sum(map(size_of, tensors.values()))
    read = 0
    for name, tensor in tensors.items():
        times = 1
        for axis in again.get(name, ()):
            times *= launch.grid[axis]
        if launch.name in TILES and name.startswith(("a_ptrs", "b_ptrs")):
            times *= max(1, launch.grid[0] // tensor.shape[0])
        read += times * size_of(tensor)
    if launch.name == "_expand_kernel" and not launch.constants["SUM"]:
        more = sum(size_of(tensor) for name, tensor in tensors.items() if name.startswith("y_ptrs"))  # read, too
        moved, read = moved + more, read + more
    return Work(moved, read, *_LOOPS.get(launch.name, _once)(launch))


def _once(launch: Launch):
    return (1,), 0


def _blocks(launch: Launch):
    return (launch.constants[name] for name in ("BLOCK_M", "BLOCK_K", "BLOCK_R"))


def _steps(size: int, block: int, parts: int) -> int:
    blocks = -(-size // block)
    return -(-blocks // parts)


def _down(launch: Launch):
    (m, k, r), x, a = _blocks(launch), launch.tensors["x_ptr"], launch.tensors["a_ptr"]
    return (_steps(x.shape[1], k, launch.grid[2]),), m * k * x.element_size() + k * r * a.element_size()


def _up(launch: Launch):
    (_, _, r), s = _blocks(launch), launch.tensors["s_ptr"]
    branches = launch.constants["BRANCHES"]
    steps = _steps(s.shape[1] // branches, r, 1)
    return ((branches,), 0, steps) if branches > 1 else ((steps,), 0)


def _up_backward(launch: Launch):
    (m, k, r), dy, s = _blocks(launch), launch.tensors["dy_ptr"], launch.tensors["s_ptr"]
    return (_steps(dy.shape[0], m, launch.grid[1]),), m * k * dy.element_size() + m * r * s.element_size()


def _outer(launch: Launch):
    (m, k, r), x, s = _blocks(launch), launch.tensors["x_ptr"], launch.tensors["s_ptr"]
    if "order_ptr" in launch.tensors:  # multi_lora's: a slot's tokens, as many of each
        return (_steps(x.shape[0], m, launch.grid[2]),), 0, 1, 3
    return (_steps(x.shape[0], m, launch.grid[2]),), m * k * x.element_size() + m * r * s.element_size()


def _sum(launch: Launch):
    return (-(-launch.tensors["p_ptr"].shape[0] // launch.constants["PARTS"]),), 0


def _rows_and_columns(launch: Launch, columns: int):
    """bottleneck's products: a norm's pass first, one loop over x's columns, in backward one over dY's."""
    (m, k, r), x = _blocks(launch), launch.tensors["x_ptr"]
    steps = _steps(x.shape[1], k, launch.grid[2] if len(launch.grid) > 2 else 1)
    norm = (-(-x.shape[1] // k),) if launch.constants["NORM"] and columns == 1 else ()
    weight = launch.tensors["d_ptr"].element_size()
    return (*norm, *[steps] * columns), m * k * x.element_size() + k * r * weight


def _fused(launch: Launch):
    trips, tile = _rows_and_columns(launch, 1)
    return (*trips, _steps(launch.tensors["y_ptr"].shape[1], launch.constants["BLOCK_K"], 1)), tile


def _over_ranks(launch: Launch):
    s = launch.tensors.get("h_ptr", launch.tensors.get("dz_ptr"))
    return (_steps(s.shape[-1], launch.constants["BLOCK_R"], 1),), 0


def _rows(launch: Launch):
    (m, k, r), x = _blocks(launch), launch.tensors["x_ptr"]
    s = launch.tensors.get("s_ptr", launch.tensors.get("dy_ptr"))
    return (_steps(x.shape[0], m, launch.grid[2]),), m * k * x.element_size() + m * r * s.element_size()


def _shrink(launch: Launch):
    (m, k, r), x, a = _blocks(launch), launch.tensors["x_ptr"], launch.tensors["a_ptrs.0"]
    tokens = min(m, -(-x.shape[0] // launch.grid[0]))  # of a tile; no others are read
    tile = tokens * k * x.element_size() + k * r * a.element_size()
    return (_steps(x.shape[1], k, launch.grid[2]),), tile, 1, 3


def _expand(launch: Launch):
    return (_steps(launch.tensors["b_ptrs.0"].shape[2], launch.constants["BLOCK_R"], 1),), 0, 1, 3


_LOOPS = {
    "_fused_kernel": _fused,
    "_hidden_kernel": lambda launch: _rows_and_columns(launch, 1),
    "_hidden_backward_kernel": lambda launch: _rows_and_columns(launch, 2),
    "_hidden_up_kernel": _over_ranks,
    "_dx_kernel": _over_ranks,
    "_weight_gradient_kernel": _rows,
    "_gathered_outer_kernel": _rows,
    "_finish_kernel": lambda launch: ((-(-launch.tensors["z_ptr"].shape[0] // 4),), 0),  # unrolled by four
    "_shrink_kernel": _shrink,
    "_expand_kernel": _expand,
    "_down_kernel": _down,
    "_up_kernel": _up,
    "_up_backward_kernel": _up_backward,
    "_outer_kernel": _outer,
    "_sum_kernel": _sum,
}
