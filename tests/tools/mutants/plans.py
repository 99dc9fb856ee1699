# ruff: noqa: E501
"""Mutants of plans as Python runs them, and of what records them, as run.py says. The C++ of csrc/host/ has the same tests."""

CALLS, AUTOGRAD, GUARDS, LAUNCHES, WRITTEN = (
    f"tests/plans/test_{name}.py" for name in ("calls", "autograd", "guards", "launches", "written_functions")
)
SEEN = f"{CALLS}::test_what_changes_between_two_calls_is_seen"
CHANGE = f"{GUARDS}::test_a_change_is_seen"
BITS = f"{CALLS}::test_a_plan_has_the_bits_of_python"
LAUNCHED = f"{LAUNCHES}::test_recorded_launches_on_new_tensors[python]"

TESTS = (CALLS, GUARDS, AUTOGRAD)
MUTANTS = {
    "fastpeft/_host_python/key.py": {
        "modes": {
            "grad mode is no part of a key": ("backend = _ENVIRONMENT.get(_BACKEND) if not _any_autocast(): return _grad_mode()", "backend = _ENVIRONMENT.get(_BACKEND)\n    if not _any_autocast():\n        return True", f"{CALLS}::test_without_gradients"),
            "FASTPEFT_BACKEND is no part of a key": ("_ENVIRONMENT.get(_BACKEND)", "None", f"{CALLS}::test_refusals_and_the_environment_are_seen"),
            "modes are not looked at": ("if not thread_is_plain():", "if False:", f"{AUTOGRAD}"),
        },
        "of_addresses": {
            "alignment is no part of a key": ("address % ALIGNED == 0", "True", f"{WRITTEN}::test_alignment_is_part_of_a_key"),
            "one tensor twice is no part of a key": ("len(set(addresses)) == len(addresses)", "True", f"{CALLS}::test_the_same_tensor_twice"),
        },
        "_add_tensor": {
            "shapes are no part of a key": ("tensor.shape, ", "", f"{SEEN}[Python-more rows]"),
            "strides are no part of a key": ("tensor.stride(), ", "", f"{SEEN}[Python-strides]"),
            "dtypes are no part of a key": ("tensor.dtype, ", "", f"{SEEN}[Python-all double]"),
            "who asks is no part of a key": ("tensor.requires_grad, ", "", f"{SEEN}[Python-a frozen A]"),
        },
        "_add": {
            "numbers are no part of a key": ("facts.append(argument.hex())", "pass", f"{SEEN}[Python-another scale]"),
        },
    },
    "fastpeft/_host_python/likeness.py": {
        "recogniser": {"one tensor twice is as two": ("if first != name:", "if False:", WRITTEN)},
        "_compare": {
            "tensors are not compared": ('names.known["alike"] = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check', 'names.known["alike"] = lambda *_: True', WRITTEN),
            "sizes are not compared": ("list(tensor.shape) for", "[None] * tensor.dim() for", WRITTEN),
            "strides are not compared": ("list(tensor.stride()) for", "[None] * tensor.dim() for", WRITTEN),
            "alignment is not compared": (" & {key.ALIGNED - 1}", " & 0", WRITTEN),
            "the same memory twice is as two": ('!= {len(addresses)}"', '> {len(addresses)}"', WRITTEN),
        },
        "_unpack": {
            "0.0 is -0.0": ("{own}.hex() == {names(item.hex())}", "{own} == {names(item)}", WRITTEN),
            "True is 1": ("or type({own}) is {names(kind)} and {own} == {names(item)})", "or {own} == {names(item)})", WRITTEN),
            "a list is a tuple": ("type({own}) is not {names(kind)} or ", "", WRITTEN),
        },
    },
    "fastpeft/_host_python/operators.py": {
        "_is_default": {"any number is a default": ("and value == argument.default_value", "", WRITTEN)},
    },
    "fastpeft/_host_python/program.py": {
        "_view": {"a view begins where its slot does": ("base.storage_offset() + offset // dtype.itemsize", "base.storage_offset()", WRITTEN)},
        "Program._word": {
            "a parameter is where its slot begins": (".data_ptr(){plus}", ".data_ptr()", LAUNCHED),
            "numbers are not passed": ("0 if isinstance(parameter, Ref) else parameter", "0", LAUNCHED),
        },
        "Program._tensor": {
            "a transpose is its tensor": ("== (ref.sizes, ref.strides)", "!= (ref.sizes, ref.strides)", WRITTEN),
        },
        "Program._function": {
            "constants are let go": ("slot >= self.inputs + len(self._constants) and ", "", WRITTEN),
            "results are let go": ("slot not in kept", "True", BITS),
        },
        "Program.run": {"a program runs under autocast": ("if _is_autocast_enabled(self._kind):", "if False:", f"{AUTOGRAD}")},
    },
    "fastpeft/_host_python/planned.py": {
        "_Backward.run": {
            "gradients of gradients are the kernels'": ("torch.is_grad_enabled() or ", "", f"{AUTOGRAD}::test_gradients_of_gradients_come_from_the_definition"),
        },
        "Planned._unknown": {
            "a plan never serves": ("if type(seen) is int:", "if True:", f"{CALLS}::test_the_second_call_of_a_kind_is_planned"),
        },
        "Planned._run": {
            "autograd is given arguments in their own shape": ("for i, sizes in plan.views:", "for i, sizes in ():", f"{BITS}[Python-of three dimensions]"),
        },
        "Planned._first": {"the first call is recorded": ("times + 1 < _FIRST_RECORDED", "False", f"{CALLS}::test_the_second_call_of_a_kind_is_planned")},
    },
    "fastpeft/_host_python/guards.py": {
        "Guards.is_": {"what was held is not held to": ('self._tell(f"{held}[{own}] is {self._names(value)}")', "pass", CHANGE)},
        "Guards.absent": {"what was absent may come": ('self._tell(f"{self._key(name)} not in {self._names(dictionary)}")', "pass", CHANGE)},
        "Guards.empty": {"what was empty may be filled": ('self._tell(f"not {self._names(container)}")', "pass", CHANGE)},
        "Guards.items": {"the active adapters may change in place": ("for i, item in enumerate(sequence):", "for i, item in ():", CHANGE)},
        "Guards.type": {"classes may change": ('self._tell(f"type({self._names(value)}) is {self._names(type(value))}")', "pass", f"{CHANGE}[Python-base of another class]")},
        "Guards.tensor": {"dtypes of parameters may change": ('self._tell(f"{own}.dtype is {self._names(tensor.dtype)}")', "pass", f"{CHANGE}[Python-dtype of A]")},
        "Guards.input": {
            "autocast may change": ("is {torch.is_autocast_enabled(kind)}", "is not None", f"{GUARDS}::test_inputs_and_modes_are_seen"),
            "an input of any dtype": ("or x.dtype is not {name(like.dtype)}", "", f"{GUARDS}::test_inputs_and_modes_are_seen"),
            "an input of any layout": ("x.layout is not strided or ", "", f"{GUARDS}::test_inputs_and_modes_are_seen"),
        },
    },
    "fastpeft/nn/sharing.py": {
        "_Plan.holds": {
            "who leads may have changed": ("self.branches[me].unchanged(branch) and ", "", "tests/methods/lora/test_sharing_alone.py"),
            "siblings may have changed": ("and self.guards(x)", "", "tests/methods/lora/test_sharing_alone.py"),
        },
    },
}  # fmt: skip
