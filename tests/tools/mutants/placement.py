# ruff: noqa: E501
"""Mutants of which module is attached to, inside which wrapper, and where adapters are made, as run.py says."""

WRAPPERS, OFFLOADED = "tests/methods/test_wrappers.py", "tests/methods/test_offloaded.py"
CLOSED = f"{WRAPPERS}::test_what_takes_no_more_parameters_is_refused"
TRAINS = f"{OFFLOADED}::test_adapters_are_where_layers_compute_and_train"
META = f"{OFFLOADED}::test_what_would_train_on_the_meta_device_is_refused"
EMPTY = f"{OFFLOADED}::test_load_into_an_empty_model"

TESTS = (WRAPPERS, OFFLOADED)
MUTANTS = {
    "fastpeft/methods/placement.py": {
        "": {"torch.compile's wrapper is the model": ('"OptimizedModule": "_orig_mod", ', "", f"{WRAPPERS}::test_a_selection_is_of_the_model_inside")},
        "model_inside": {"only the outermost module may be closed": ("kind is not None and", "kind is not None and module is model and", CLOSED)},
        "_check_one": {
            "offloaded weights are trained": ("offloaded and not added", "False", META),
            "a hook of a block knows adapters": ("whole is not None:\n        raise", "False:\n        raise", f"{OFFLOADED}::test_a_hook_that_brings_a_whole_block_is_refused"),
            "half a model is enough": ("not offloaded and not unfilled", "False", f"{OFFLOADED}::test_a_model_that_is_filled_in_part_is_refused"),
        },
        "put_beside": {"adapters stay on meta": ('device.type != "meta" and', "False and", f"{TRAINS}[lora-cpu]")},
        "in_memory": {"a checkpoint's values are lost": ("if tensor.is_meta:", "if False:", EMPTY)},
    },
    "fastpeft/methods/resizing.py": {
        "_Resize.__call__": {"token rows do not mind another size": (" or isinstance(end, LiveSlice)", "", "tests/methods/test_resizing.py::test_adapters_in_the_way_are_named")},
        "unwatch_sizes": {"detach leaves the watch": ("del module.__dict__[_ATTRIBUTE]", "pass", "tests/methods/test_resizing.py::test_others_do_not_mind")},
    },
    "fastpeft/methods/bottleneck/method.py": {
        "_build": {"bottleneck adapters stay on meta": ("= device_beside(module, model)", "= next(module.parameters()).device, next(module.parameters()).dtype", f"{TRAINS}[bottleneck-cpu]")},
    },
}  # fmt: skip
