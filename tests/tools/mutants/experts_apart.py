"""Mutants of adapters of experts that were modules of their own."""

FILE = "tests/methods/lora/test_experts_apart.py"
LOADED, REFUSED = f"{FILE}::test_loaded_is_what_it_was", f"{FILE}::test_what_no_pair_can_say_is_refused"

TESTS = (f"{LOADED}[False-qwen3_moe]", f"{LOADED}[True-qwen3_moe]")
MUTANTS = {
    "fastpeft/methods/lora/experts_apart.py": {
        "_stack": {
            "the expert slow in B": ("b.permute(1, 2, 0)", "b.permute(1, 0, 2)"),
            "gate and up changed": ("for layer in layers], 1)", "for layer in layers[::-1]], 1)"),
            "alpha as it was": ("alpha *=", "share ="),
            "the root of the rank forgotten": ("math.sqrt(share) if config.rslora else share", "share"),
            "scales that differ": ("len(scales) > 1", "False", f"{REFUSED}[two scales]"),
            "an expert's own alpha": ("len(numbers) > 1", "False", f"{REFUSED}[an expert of its own]"),
        },
        "_parameters": {
            "experts too many": ("last >= count", "False", f"{FILE}::test_another_models_sizes_are_refused"),
        },
        "_now": {
            "a router stays where it was": (
                "if path and moved is not None",
                "if False",
                f"{FILE}::test_a_router_that_was_a_linear_layer[mixtral]",
            ),
        },
        "_is_router": {
            "no router": ("weight.dim() == 2", "False", f"{FILE}::test_a_router_that_was_a_linear_layer[qwen3_moe]"),
        },
        "_patterns": {
            "one rank for every layer": (
                "len(values[end]) == 1",
                "True",
                f"{FILE}::test_layers_of_the_stack_may_differ",
            ),
        },
    },
}
