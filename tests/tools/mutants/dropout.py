"""Mutants of the dropout mask, as run.py says."""

TESTS = (
    "tests/ops/test_dropout.py::test_bits_are_those_of_the_formula",
    "tests/ops/test_dropout.py::test_no_dropout",
    "tests/ops/test_dropout.py::test_dropout_near_1_keeps_one_lane_value",
    "tests/ops/test_dropout.py::test_dtype",
    "tests/ops/lora_linear/test_lora_linear.py::test_the_definition_is_the_formula",
    "tests/ops/lora_linear/test_peers.py::test_first_branch_served_for_all",
    "tests/ops/test_dropout.py::test_every_seed_has_its_mask_in_the_shared_form",
    "tests/ops/test_dropout.py::test_an_element_at_the_threshold_is_kept",
    "tests/ops/test_dropout.py::test_every_backend_draws_the_reference_mask",
)

MUTANTS = {
    "kernels/dropout.py": {
        "_row_keys": {
            "rows counted from 0": ("(m + 1).", "m."),
            "seed ignored": ("z = seed.", "z = (seed * 0)."),
            "row key skips a round": ("(z ^ (z >> _ROW_SHIFT_2)) * _ROW_FACTOR_2", "z ^ (z >> _ROW_SHIFT_2)"),
            "row key's halves swapped": ("z.to(tl.uint32), (z >> 32)", "(z >> 32).to(tl.uint32), z"),
        },
        "keep_tile": {
            "high half of the row key dropped": (
                "(z ^ (z >> _PAIR_SHIFT_1)) + hi[:, None]",
                "z ^ (z >> _PAIR_SHIFT_1)",
            ),
            "first column ignored": ("first_k // 2", "first_k * 0"),
            "first column not halved": ("first_k // 2 +", "first_k +"),
            "last shift dropped": ("(z >> _PAIR_SHIFT_2)", "(z >> 17)"),
            "lanes swapped": ("even, odd", "odd, even"),
            "one lane for both": ("interleave(even, odd)", "interleave(odd, odd)"),
            "unsigned lane": ("z.to(tl.int32, bitcast=True) >> 16", "(z >> 16).to(tl.int32)"),
            "threshold off by one": (">= threshold", "> threshold"),
            "mask inverted": (">= threshold", "< threshold"),
        },
    },
    "fastpeft/_mask.py": {
        "threshold": {
            "probability cut, not rounded": ("round(dropout * LANES)", "int(dropout * LANES)"),
            "everything dropped near 1": ("min(round(dropout * LANES), LANES - 1)", "round(dropout * LANES)"),
        },
        "inverse_keep": {
            "divided by the probability asked for": ("LANES / (LANES - threshold(dropout))", "1 / (1 - dropout)"),
        },
    },
    "fastpeft/reference/dropout.py": {
        "row_keys": {
            "rows counted from 0": ("1, rows + 1", "0, rows"),
            "seed ignored": ("add_(seed)", "add_(seed * 0)"),
        },
        "_shift_right": {
            "arithmetic shift": (".bitwise_and_((1 << (width - bits)) - 1)", ""),
        },
        "keep_mask": {
            "halves of the row key swapped": ("lo, hi =", "hi, lo ="),
            "threshold off by one": ("torch.ge", "torch.gt"),
            "last column of an odd number lost": ("(columns + 1) // 2", "columns // 2 + columns % 2 * 0"),
            "a mask of another dtype": ("dtype=dtype", "dtype=torch.bool"),
        },
    },
}
