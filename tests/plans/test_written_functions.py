"""The functions that ``_host_python`` writes: what recognises a call, what runs a program, and operators' entries."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft import _host_python
from fastpeft._host_python import key, operators, planned
from fastpeft._host_python.likeness import recogniser
from tests.support.planned_calls import new, same


def arguments(**changes):
    x, w = new(4, 8), new(8, 8, grad=False)
    given = {"op": "lora", "x": x, "ws": [w, new(3, 8)], "scale": 0.5, "dropout": 0.0, "rank": 1, "none": None}
    given |= {"pair": (True, torch.float32), **changes}
    return list(given.values())


def test_a_call_that_looks_alike_is_recognised():
    tensors_of = recogniser(arguments())
    given = arguments(scale=float("0.5"), dropout=float("0"), x=new(4, 8, seed=3))
    assert [id(tensor) for tensor in tensors_of(given)] == [id(t) for t in (given[1], *given[2])]


def unaligned(*shape):
    count = torch.Size(shape).numel()
    return new(count + 1, grad=False)[1:].view(shape)


def halved(x):
    x.data = x.data.half()
    return x


class Own(torch.Tensor):
    pass


W = new(8, 8, grad=False)
CHANGES = {
    "another op": {"op": "dora"},
    "another scale": {"scale": 0.25},
    "an integer scale": {"scale": 1},
    "-0.0": {"dropout": -0.0},
    "True for 1": {"rank": True},
    "1.0 for 1": {"rank": 1.0},
    "a number for None": {"none": 0},
    "1 for True": {"pair": (1, torch.float32)},
    "another dtype": {"pair": (True, torch.float16)},
    "a list for a tuple": {"pair": [True, torch.float32]},
    "a tuple for a list": {"ws": (W, new(3, 8))},
    "fewer tensors": {"ws": [W]},
    "None for a tensor": {"ws": [W, None]},
    "another shape": {"x": new(5, 8)},
    "other strides": {"x": new(8, 4, grad=False).T.requires_grad_()},
    "a frozen x": {"x": new(4, 8, grad=False)},
    "doubles": {"x": new(4, 8, dtype=torch.float64)},
    "another dtype by .data": {"x": halved(new(4, 8))},
    "a parameter": {"x": torch.nn.Parameter(new(4, 8))},
    "a subclass": {"x": new(4, 8).as_subclass(Own)},
    "a meta tensor": {"x": new(4, 8).detach().to("meta").requires_grad_()},
    "a sparse tensor": {"x": new(4, 8).detach().to_sparse().requires_grad_()},
    "conjugate": {"x": torch.zeros(4, 8, dtype=torch.complex64).conj()},
    "unaligned": {"ws": [unaligned(8, 8), new(3, 8)]},
    "the same memory twice": {"ws": [W, W[:3].detach().requires_grad_()]},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_call_that_does_not_is_none(name):
    assert recogniser(arguments())(arguments(**CHANGES[name])) is None


def test_alignment_is_part_of_a_key():
    assert key.of_tensors([new(8, 8, grad=False)]) == key.of_tensors([new(8, 8, grad=False, seed=1)])
    assert key.of_tensors([new(8, 8, grad=False)]) != key.of_tensors([unaligned(8, 8)])


def test_one_tensor_twice_is_another_kind():
    w = new(8, 8)
    twice, apart = recogniser([w, w]), recogniser([w, new(8, 8)])
    alias = w.detach().requires_grad_()
    assert twice([w, w]) == [w, w]
    assert apart([w, new(8, 8)]) is not None
    assert [twice([w, new(8, 8)]), twice([w, alias]), apart([w, w]), apart([w, alias])] == [None] * 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_have_plans_of_their_own(mode):
    seen = []

    def op(x):
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        return [x * 2]

    call, x = planned.Planned(op, lambda arguments, tensors: (op(*arguments), None)), new(4, 8)
    for _ in range(3):
        call(x)
    outside = len(seen)
    with mode():
        call(x)
    assert seen[outside:] == [seen[outside]] != [seen[0]]


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def frozen(*shape):
    return new(*shape, grad=False)


# Operators that have an entry of their own, with arguments in the schema's order: defaults, and others.
QUICK = [
    ("aten::addmm_", lambda: [frozen(4, 3), frozen(4, 5), frozen(5, 3), 1, 1]),
    ("aten::addmm_", lambda: [frozen(4, 3), frozen(4, 5), frozen(5, 3), 0.5, 2.0]),
    ("aten::cat", lambda: [[frozen(2, 3), frozen(4, 3)], 0]),
    ("aten::cat", lambda: [[frozen(3, 2), frozen(3, 4)], 1]),
    ("aten::randint", lambda: [1 << 62, [1], 4, None, torch.device("cpu"), False]),
    ("aten::randint", lambda: [9, [2, 3], torch.int32, None, None, None]),
]


def test_every_entry_is_tested():
    assert {name for name, _ in QUICK} == set(operators._QUICK)


@pytest.mark.parametrize(("name", "arguments"), QUICK)
def test_an_entry_is_its_operator(name, arguments):
    given = arguments()
    op = getattr(torch.ops.aten, name.partition("::")[2]).default
    named = {a.name: value for a, value in zip(op._schema.arguments, given, strict=True) if a.kwarg_only}
    plain = [value.clone() if isinstance(value, torch.Tensor) else value for value in given[: len(given) - len(named)]]
    torch.manual_seed(3)
    wanted = op(*plain, **named)
    function, by_place, by_name = operators.called(name, "", given)
    torch.manual_seed(3)
    with _Seen() as seen:
        found = function(*by_place, **by_name)
    assert seen.calls == [op]
    assert same([wanted], [found])
    assert (found.dtype, found.stride()) == (wanted.dtype, wanted.stride())


def test_a_program_of_views_in_many_threads():
    """Slots by their views, transposes and other dtypes; first runs that meet write the function once."""
    program = _host_python.Program(2, [torch.ones(3)], torch.device("cpu"))
    ref, f32 = _host_python.Ref, torch.float32
    program.empty(3, (4, 3), (3, 1), f32, torch.device("cpu"))
    whole = [ref(slot, True, 0, (), (), f32) for slot in range(4)]
    program.call("aten::mm", "out", [whole[0], ref(1, False, 0, (5, 3), (1, 5), f32), whole[3]], [-1])
    program.call("aten::add_", "Tensor", [whole[3], whole[2], 1], [-1])
    program.call("aten::max", "dim", [whole[3], 1, False], [4, 5])
    part = ref(3, False, 12, (2, 3), (3, 1), f32)
    program.returns(
        [ref(4, True, 0, (), (), f32), None, ref(3, False, 12, (2, 3), (3, 1), torch.int32), whole[0], part]
    )
    wrong = []

    def work(seed):
        for i in range(30):
            x, w = new(4, 5, grad=False, seed=seed + i), new(3, 5, grad=False, seed=seed + i)
            y = x @ w.T + 1
            found = program.run([x, w])
            if not (torch.equal(found[0], y.max(1).values) and found[1] is None and found[3] is x):
                wrong.append(found)
            elif not (torch.equal(found[2].view(f32), y[1:3]) and torch.equal(found[4], y[1:3])):
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_has_no_plan_is_called():
    """A kind that cannot be recorded is tried once."""
    calls, recorded = [], []

    def op(x):
        calls.append(x)
        return [x]

    call = planned.Planned(op, lambda arguments, tensors: (recorded.append(1) or op(*arguments), None))
    for _ in range(5):
        call(torch.ones(3))
    assert (len(calls), len(recorded), call.plans) == (5, 1, 0)
