# ruff: noqa: E501
"""Mutants of what finds layers whose weight is read past their forward, and of who asks it, as run.py says."""

FILE = "tests/methods/test_read_past.py"
PASSED = f"{FILE}::test_a_layer_that_is_passed_by_is_left_out_and_refused_by_name"
WHICH, SETTING = f"{FILE}::test_which_are_passed_by", f"{FILE}::test_a_setting_can_open_the_path"
TORCH = f"{FILE}::test_attention_of_pytorch"
PEFT = f"{FILE}::test_peft_s_layers_are_not_called_fused_there"
GRADIENT = f"{FILE}::test_a_report_after_backward_says_which_adapters_got_no_gradient"

TESTS = (FILE,)
MUTANTS = {
    "fastpeft/nn/read_past.py": {
        "read_past": {
            "the first module of a kind speaks for all": ("if reads[built]:", "if reads[built] and not found:", TORCH),
            "our own layers pass themselves by": ("original_child(module) is not None", "False", SETTING),
        },
        "_is_served": {"what has it call its layers is forgotten": ("served is not None and", "False and", TORCH)},
        "_forward": {"the class's forward though the instance has one": ('module.__dict__.get("forward", type(module).forward)', "type(module).forward", f"{FILE}::test_a_forward_on_the_instance_is_the_one_that_is_read")},
    },
    "fastpeft/nn/read_body.py": {
        "_Body.statement": {
            "a return that certainly comes is overlooked": ("return all(left)", "return False", WHICH),
        },
        "_Body.property": {"a property is not followed": ("isinstance(found, property)", "False", f"{PASSED}[InProperty]")},
        "_Body.weight_of": {"getattr is no reading": ('node.func.id == "getattr"', "False", f"{PASSED}[ByOtherName]")},
        "_Body.callee": {"super is not followed": ('node.value.func.id == "super"', "False", f"{PASSED}[OfBase]")},
        "_use": {"asking for a dtype is reading": ("return None if node.attr in _ASKED else", "return", WHICH)},
    },
    "fastpeft/nn/read_conditions.py": {
        "truth": {"what is unknown is False": ("None if None in known else not decides", "not decides", f"{PASSED}[InEvaluation]")},
        "_object": {"training is a setting": ('and node.attr != "training"', "", f"{PASSED}[InEvaluation]")},
    },
    "fastpeft/nn/read_code.py": {
        "reads_of_code": {"asking for a dtype is reading, in byte code": ("and attribute not in asked", "", f"{FILE}::test_classes_without_source")},
    },
    "fastpeft/methods/report.py": {
        "_row": {"a layer that is passed by is fused": ("if path in passed else", "if False else", PEFT)},
        "_without_gradient": {
            "all that train must have missed theirs": ("return row.fused and bool(trained) and", "return", GRADIENT),
        },
    },
}  # fmt: skip
