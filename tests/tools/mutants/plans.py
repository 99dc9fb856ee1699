# ruff: noqa: E501
"""Mutants of plans as Python runs them, and of what records them, as run.py says. The C++ of csrc/host/ has the same tests."""

CALLS, AUTOGRAD, GUARDS, LAUNCHES = (
    f"tests/plans/test_{name}.py" for name in ("calls", "autograd", "guards", "launches")
)
SEEN = f"{CALLS}::test_what_changes_between_two_calls_is_seen"
CHANGE = f"{GUARDS}::test_a_change_is_seen"
BITS = f"{CALLS}::test_a_plan_has_the_bits_of_python"
LAUNCHED = f"{LAUNCHES}::test_recorded_launches_on_new_tensors[python]"

TESTS = (CALLS, GUARDS, AUTOGRAD)
MUTANTS = {
    "fastpeft/_host_python/key.py": {
        "of_call": {
            "grad mode is no part of a key": ("torch.is_grad_enabled()", "True", f"{CALLS}::test_without_gradients"),
            "FASTPEFT_BACKEND is no part of a key": ('os.environ.get("FASTPEFT_BACKEND")', "None", f"{CALLS}::test_refusals_and_the_environment_are_seen"),
            "modes are not looked at": ("if not thread_is_plain():", "if False:", f"{AUTOGRAD}"),
        },
        "_of": {
            "alignment is no part of a key": ("address % 16 == 0", "True", LAUNCHED),
            "one tensor twice is no part of a key": ("len(set(addresses)) < len(addresses)", "False", f"{CALLS}::test_the_same_tensor_twice"),
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
    "fastpeft/_host_python/program.py": {
        "Ref.tensor": {"a view begins where its slot does": (" + self.offset)", ")", LAUNCHED)},
        "Program.launch": {
            "a parameter is where its slot begins": ("slots[slot].data_ptr() + offset", "slots[slot].data_ptr()", LAUNCHED),
            "numbers are not passed": ("0 if isinstance(word, Ref) else word", "0", LAUNCHED),
        },
        "Program.call": {
            "lists of tensors are those of the recorded call": ("for i, several in lists:", "for i, several in ():", f"{BITS}[Python-shared]"),
        },
        "Program.returns": {
            "constants are let go": ("own = self.inputs + len(self._constants)", "own = 0", BITS),
            "results are let go": ("slot not in kept", "True", BITS),
        },
        "Program.run": {"a program runs under autocast": ("if casts: # recorded", "if False: # recorded", f"{AUTOGRAD}")},
    },
    "fastpeft/_host_python/planned.py": {
        "_Backward.run": {
            "gradients of gradients are the kernels'": ("None if torch.is_grad_enabled() else ", "", f"{AUTOGRAD}::test_gradients_of_gradients_come_from_the_definition"),
        },
        "Planned.__call__": {
            "a plan never serves": ("if type(seen) is not tuple:", "if True:", f"{CALLS}::test_the_second_call_of_a_kind_is_planned"),
            "autograd is given arguments in their own shape": ("for i, sizes in plan.views:", "for i, sizes in ():", f"{BITS}[Python-of three dimensions]"),
        },
        "Planned._first": {"the first call is recorded": ("times + 1 < _FIRST_RECORDED", "False", f"{CALLS}::test_the_second_call_of_a_kind_is_planned")},
    },
    "fastpeft/_host_python/guards.py": {
        "Guards.is_": {"what was held is not held to": ("self._entries.append((dictionary, name, value))", "pass", CHANGE)},
        "Guards.absent": {"what was absent may come": ("self._entries.append((dictionary, name, _ABSENT))", "pass", CHANGE)},
        "Guards.empty": {"what was empty may be filled": ("self._empty.append(container)", "pass", CHANGE)},
        "Guards.items": {"the active adapters may change in place": ("list(sequence)", "sequence", CHANGE)},
        "Guards.tensor": {"dtypes of parameters may change": ("self._tensors.append((tensor, tensor.dtype, tensor.device))", "pass", f"{CHANGE}[Python-dtype of A]")},
        "Guards.__call__": {
            "autocast may change": ("!= casts", "is None", f"{GUARDS}::test_inputs_and_modes_are_seen"),
            "an input of any dtype": ("x.dtype is not dtype", "False", f"{GUARDS}::test_inputs_and_modes_are_seen"),
            "an input of any layout": ("or _unusual(x)", "", f"{GUARDS}::test_inputs_and_modes_are_seen"),
            "classes may change": ("type(object_) is not kind", "False", f"{CHANGE}[Python-base of another class]"),
        },
    },
    "fastpeft/nn/sharing.py": {
        "_Plan.holds": {
            "who leads may have changed": ("self.branches[me].unchanged(branch) and ", "", "tests/methods/lora/test_sharing_alone.py"),
            "siblings may have changed": ("and self.guards(x)", "", "tests/methods/lora/test_sharing_alone.py"),
        },
    },
}  # fmt: skip
