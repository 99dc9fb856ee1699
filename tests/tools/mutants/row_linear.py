"""Mutants of row_linear and of the modules made of it, as run.py says."""

GUARDS = "tests/ops/row_linear/test_memory.py::test_nothing_is_read_or_written_outside"
CUT = "tests/ops/row_linear/test_row_linear.py::test_integers_are_exact_where_sums_are_split"
OFFSETS = "tests/ops/row_linear/test_memory.py::test_offsets_are_64_bit[triton]"
STRIDES = "tests/ops/row_linear/test_memory.py::test_any_strides"
INDEX = "tests/ops/row_linear/test_memory.py::test_an_index_of_any_stride"
TRAINED = "tests/ops/row_linear/test_row_linear.py::test_what_is_trained"
KEPT = "tests/ops/row_linear/test_memory.py::test_what_is_kept_for_backward"
MASTERS = "tests/ops/row_linear/test_row_linear.py::test_fp32_masters_get_fp32_gradients"
BAD = "tests/ops/row_linear/test_torch.py::test_bad_calls"
NOTICED = "tests/ops/row_linear/test_torch.py::test_a_step_between_forward_and_backward_is_noticed"
DEFINITION = "tests/ops/row_linear/test_row_linear.py::test_the_definition_is_the_formula"

NO_ROW = "tests/ops/row_linear/test_memory.py::test_an_index_that_does_not_exist_reads_nothing"

MODULE = "tests/methods/selective/test_row_modules.py::"
FOLLOW = "tests/methods/selective/test_kept_rows.py::"

TESTS = (
    GUARDS,
    TRAINED,
    "tests/ops/row_linear/test_row_linear.py::test_how_many_are_chosen",
    "tests/ops/row_linear/test_row_linear.py::test_shapes",
    STRIDES,
    CUT,
    BAD,
    OFFSETS,
)

MUTANTS = {
    "kernels/row_linear.py": {
        "_column_kernel": {
            "rows not gathered": ("tl.load(index_ptr + r * stride_index, mask=r < R, other=0)", "r"),
            "stride of the index ignored": ("r * stride_index", "r", INDEX),
            "index read past its end": (", mask=r < R, other=0", "", OFFSETS),
            "rows of dY not masked": ("(m < M)[:, None] & n_ok", "n_ok"),
            "columns of dY not masked": ("(r < R) & (n >= 0) & (n < N)", "r >= 0", OFFSETS),
            "an index past the last column read": ("(n >= 0) & (n < N)", "(n >= 0)", NO_ROW),
            "a negative index read": ("(n >= 0) & (n < N)", "(n < N)", NO_ROW),
            "stride of dY's columns ignored": ("[None, :] * stride_yn", "[None, :]", STRIDES),
        },
        "_gathered_outer_kernel": {
            "more columns than were gathered": (
                "dy_tile, mask=(m < M)[:, None] & (r < R)[None, :]",
                "dy_tile, mask=(m < M)[:, None]",
            ),
            "rows of x not masked": ("(m < M)[:, None] & (k < K)", "(k < K)"),
            "columns of x not masked": ("[:, None] & (k < K)[None, :],", "[:, None],"),
            "rows of the gradient not masked": ("(r < R)[:, None] & (k < K)", "(k < K)"),
            "columns of the gradient not masked": (
                "mask=(r < R)[:, None] & (k < K)[None, :])",
                "mask=(r < R)[:, None])",
            ),
            "last block of rows skipped": (
                "(first + SPAN, M), BLOCK_M",
                "(first + SPAN, M) // BLOCK_M * BLOCK_M, BLOCK_M",
            ),
            "parts overlap": ("tl.minimum(first + SPAN, M)", "M", CUT),
            "every part the first": ("pid_p * SPAN", "0", CUT),
            "parts in one place": ("g_ptr + pid_p * stride_gp", "g_ptr", CUT),
            "only the last block counts": (
                ", x, acc,",
                ", x, tl.zeros_like(acc),",
                "tests/ops/row_linear/test_row_linear.py::test_integers_are_exact",
            ),
            "offsets of rows are 32 bits": (
                "(m0 + tl.arange(0, BLOCK_M)).to(tl.int64)",
                "m0.to(tl.int32) + tl.arange(0, BLOCK_M)",
                OFFSETS,
            ),
            "stride of x's columns ignored": ("[None, :] * stride_xk", "[None, :]", STRIDES),
            "programs swapped": (
                "k = pid_k *",
                "k = pid_r *",
                "tests/ops/row_linear/test_row_linear.py::test_how_many_are_chosen",
            ),
        },
        "_outer": {
            "gradient in x's dtype": ("else dtype", "else x.dtype", MASTERS),
        },
    },
    "fastpeft/reference/row_linear.py": {
        "row_linear": {
            "the definition knows no columns": ("int(columns)", "0", DEFINITION),
        },
        "backward": {
            "rows not chosen": (".index_select(1, index)", "[:, : len(index)]"),
            "masters lose bits": ("chosen.to(dtype).T @ x.to(dtype)", "(chosen.T @ x).to(dtype)", MASTERS),
        },
    },
    "fastpeft/ops/row_linear.py": {
        "_implementation": {
            "no bias": (", bias if bias.numel() else None", ""),
        },
        "_setup_context": {
            "all of x kept for columns": ("output[1] if columns else x", "x", KEPT),
            "the optimizer's step not noticed": ("absent, trained,", "absent, trained.detach().clone(),", NOTICED),
        },
        "_backward_implementation": {
            "no gradient of the bias": ("dy.sum(0)", "torch.zeros_like(dy[0])"),
            "dX of the transposed weight": ("weight if", "weight * 2 if"),
        },
        "_check_operands": {
            "a weight that trains is let through": ("weight.requires_grad", "False", BAD),
        },
    },
    "fastpeft/nn/live_slice.py": {
        "LiveSlice.write": {
            "written where the counter moves": (
                "self._matrix(target).index_copy_(",
                "version == self._written or self._matrix(target).index_copy_(",
                FOLLOW + "test_rows_follow",
            ),
            "every write is counted": (
                "weight.detach() if version is None or version != self._written else weight.data",
                "weight.detach()",
                MODULE + "test_micro_batches_may_interleave",
            ),
            "columns written as rows": ("int(self.columns)", "0", MODULE + "test_trains_as_the_whole_weight_would"),
        },
        "LiveSlice._save_to_state_dict": {
            "the state dict may be old": (
                "self.write()\n        super",
                "super",
                MODULE + "test_everybody_sees_the_trained_weight",
            ),
            "masters are dropped": (
                "self.trained.dtype == self.stored.dtype",
                "True",
                MODULE + "test_the_state_dict_is_the_base_layers",
            ),
        },
        "LiveSlice._load_from_state_dict": {
            "a loaded weight keeps the old slice": (
                "self.trained.copy_",
                "",
                MODULE + "test_the_state_dict_is_the_base_layers",
            ),
        },
    },
    "fastpeft/nn/token_rows.py": {
        "_Lookup.forward": {
            "tokens that are not trained count too": (
                "torch.where(index[slots] == ids, slots, len(index))",
                "slots",
                MODULE + "test_token_rows_get_the_gradient_of_the_whole_table",
            ),
            "past the last token": (
                ".clamp_(max=len(index) - 1)",
                "",
                MODULE + "test_token_rows_get_the_gradient_of_the_whole_table",
            ),
        },
        "_Lookup.backward": {
            "gradient in the table's dtype": (
                ".to(trained.dtype)",
                "",
                MODULE + "test_token_rows_of_a_16_bit_table_have_float32_masters",
            ),
        },
        "TokenRows.__init__": {
            "the padding is trained": ("base_layer.padding_idx in index.tolist()", "False", MODULE + "test_bad_calls"),
        },
    },
}
