# ruff: noqa: E501
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
        "rows counted from 0": ("(m + 1).to(tl.uint64)", "m.to(tl.uint64)"),
        "seed ignored": ("z = seed.to(tl.uint64) + (m", "z = (seed * 0).to(tl.uint64) + (m"),
        "row key skips a round": ("z = (z ^ (z >> 27)) * 0x94D049BB133111EB", "z = z ^ (z >> 27)"),
        "row key's halves swapped": ("z.to(tl.uint32), (z >> 32).to(tl.uint32)", "(z >> 32).to(tl.uint32), z.to(tl.uint32)"),
        "high half of the row key dropped": ("((z ^ (z >> 15)) + hi[:, None])", "(z ^ (z >> 15))"),
        "first column ignored": ("(first_k // 2 + tl.arange(0, BLOCK_K // 2))", "(first_k * 0 + tl.arange(0, BLOCK_K // 2))"),
        "first column not halved": ("(first_k // 2 + ", "(first_k + "),
        "last shift dropped": ("    z = z ^ (z >> 16)\n", "    z = z ^ (z >> 17)\n"),
        "lanes swapped": ("tl.interleave(even, odd)", "tl.interleave(odd, even)"),
        "one lane for both": ("tl.interleave(even, odd)", "tl.interleave(odd, odd)"),
        "unsigned lane": ("odd = z.to(tl.int32, bitcast=True) >> 16", "odd = (z >> 16).to(tl.int32)"),
        "threshold off by one": (">= threshold - 32768", "> threshold - 32768"),
        "mask inverted": (">= threshold - 32768", "< threshold - 32768"),
        "probability cut, not rounded": ("min(round(dropout * 65536), 65535)", "min(int(dropout * 65536), 65535)"),
        "everything dropped near 1": ("min(round(dropout * 65536), 65535)", "round(dropout * 65536)"),
    },
    "fastpeft/reference/dropout.py": {
        "rows counted from 0": ("torch.arange(1, rows + 1,", "torch.arange(0, rows,"),
        "seed ignored": (".add_(seed.reshape(()))", ".add_(seed.reshape(()) * 0)"),
        "arithmetic shift": ("out=out).bitwise_and_((1 << (width - bits)) - 1)", "out=out)"),
        "halves of the row key swapped": ("lo, hi = row_keys", "hi, lo = row_keys"),
        "threshold off by one": ("torch.ge(lanes,", "torch.gt(lanes,"),
        "last column of an odd number lost": ("pairs = (columns + 1) // 2", "pairs = columns // 2 + columns % 2 * 0"),
        "probability cut, not rounded": ("min(round(dropout * LANES), LANES - 1)", "min(int(dropout * LANES), LANES - 1)"),
        "everything dropped near 1": ("min(round(dropout * LANES), LANES - 1)", "round(dropout * LANES)"),
        "divided by the probability asked for": ("LANES / (LANES - threshold(dropout))", "1 / (1 - dropout)"),
        "a mask of another dtype": ("keep = torch.empty(rows, columns, dtype=dtype,", "keep = torch.empty(rows, columns, dtype=torch.bool,"),
    },
}  # fmt: skip
