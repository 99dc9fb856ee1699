"""What each kernel does that its machine code does not say: how often its loops run, and what is read again."""

from dataclasses import dataclass

from .launches import Launch, size_of

# By kernel: the grid's axes over which an argument is read again. What is not named is read or written once.
AGAIN = {
    "_down_kernel": {"x_ptr": (1,), "a_ptr": (0,)},
    "_up_kernel": {"s_ptr": (1,), "b_ptr": (0,)},
    "_up_backward_kernel": {"s_ptr": (0,), "b_ptr": (1,)},
    "_outer_kernel": {"s_ptr": (0,), "x_ptr": (1,)},
}
# Tables of a few numbers, which stay in the caches.
SMALL = ("branch_ptr", "seed_ptr", "bias_ptr")


@dataclass(frozen=True)
class Work:
    """What a launch does.

    Attributes:
        moved: bytes from and to device memory.
        read: bytes through the L2.
        trips: how often each outermost loop runs, in a program.
        inner: how often a loop inside of another runs, in one step of that.
        tile: bytes that a loop's step loads; 0 where there is nothing to wait for.
    """

    moved: int
    read: int
    trips: tuple[int, ...] = (1,)
    tile: int = 0
    inner: int = 1


def work(launch: Launch) -> Work:
    """What a launch does, from its grid, tensors and tile sizes."""
    again = AGAIN.get(launch.name, {})
    tensors = {name: t for name, t in launch.tensors.items() if name not in SMALL}
    moved = sum(map(size_of, tensors.values()))
    read = 0
    for name, tensor in tensors.items():
        times = 1
        for axis in again.get(name, ()):
            times *= launch.grid[axis]
        read += times * size_of(tensor)
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
    return (_steps(x.shape[0], m, launch.grid[2]),), m * k * x.element_size() + m * r * s.element_size()


def _sum(launch: Launch):
    return (-(-launch.tensors["p_ptr"].shape[0] // launch.constants["PARTS"]),), 0


_LOOPS = {
    "_down_kernel": _down,
    "_up_kernel": _up,
    "_up_backward_kernel": _up_backward,
    "_outer_kernel": _outer,
    "_sum_kernel": _sum,
}
