"""Mutants of lora_embedding, as run.py says."""

HERE = "tests/ops/lora_embedding/test_lora_embedding.py::"
EXACT, OUTSIDE = HERE + "test_integers_are_exact", HERE + "test_nothing_is_read_or_written_outside"
STRIDES, BATCH = HERE + "test_any_strides_and_the_same_bits", HERE + "test_da_is_in_the_tokens_of_the_batch"
TRAINED = HERE + "test_one_of_the_two_is_trained"

TESTS = (OUTSIDE, EXACT, BATCH, STRIDES, TRAINED)

MUTANTS = {
    "kernels/lora_embedding.py": {
        "_embed_kernel": {
            "the place in place of the id": ("row[:, None] * stride_ev", "m[:, None] * stride_ev"),
            "the table's rows without their stride": ("row[:, None] * stride_ev", "row[:, None] * D", STRIDES),
            "the first block of ranks alone": ("range(0, R, BLOCK_R)", "range(0, 1, BLOCK_R)"),
            "the table left out": ("acc += e.to(ACC)", "acc += 0.0"),
            "written past the columns": ("(m < M)[:, None] & (k < D)[None, :]", "(m < M)[:, None] & (k >= 0)[None, :]"),
            "ranks not masked": ("& (r < R)[None, :]", "& (r >= 0)[None, :]"),
        },
        "forward": {
            "no table": ("found = s.shape, b.shape[0], table.numel() > 0", "found = s.shape, b.shape[0], False"),
        },
    },
    "fastpeft/reference/lora_embedding.py": {
        "forward": {
            "the table left out": (".add_(table.index_select(0, ids[rows]))", ""),
        },
        "backward": {
            "no scale": (", alpha=scale", ""),
        },
    },
    "fastpeft/ops/lora_embedding.py": {
        "_implementation": {
            "no scale": (".mul_(scale)", ""),
        },
        "_backward_implementation": {
            "the padding's gradient": (", padding, False)", ", -1, False)"),
            "dA as it comes": (".T.contiguous()", ".T"),
        },
    },
}
