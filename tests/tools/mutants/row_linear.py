"""Mutants of row_linear and of the modules made of it, as run.py says."""

GUARDS = "tests/ops/row_linear/test_row_linear.py::test_nothing_is_read_or_written_outside"
CUT = "tests/ops/row_linear/test_row_linear.py::test_integers_are_exact_where_sums_are_split"
OFFSETS = "tests/ops/row_linear/test_row_linear.py::test_offsets_are_64_bit[triton]"
STRIDES = "tests/ops/row_linear/test_row_linear.py::test_any_strides"
INDEX = "tests/ops/row_linear/test_row_linear.py::test_an_index_of_any_stride"
TRAINED = "tests/ops/row_linear/test_row_linear.py::test_what_is_trained"
KEPT = "tests/ops/row_linear/test_row_linear.py::test_what_is_kept_for_backward"
MASTERS = "tests/ops/row_linear/test_row_linear.py::test_fp32_masters_get_fp32_gradients"
BAD = "tests/ops/row_linear/test_torch.py::test_bad_calls"
NOTICED = "tests/ops/row_linear/test_torch.py::test_a_step_between_forward_and_backward_is_noticed"
DEFINITION = "tests/ops/row_linear/test_row_linear.py::test_the_definition_is_the_formula"

NO_ROW = "tests/ops/row_linear/test_row_linear.py::test_an_index_that_does_not_exist_reads_nothing"

MODULE = "tests/methods/selective/test_row_modules.py::"

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
        "rows not gathered": ("n = tl.load(index_ptr + r * stride_index, mask=r < R, other=0)", "n = r"),
        "stride of the index ignored": ("index_ptr + r * stride_index", "index_ptr + r", INDEX),
        "index read past its end": (
            "index_ptr + r * stride_index, mask=r < R, other=0)",
            "index_ptr + r * stride_index)",
            OFFSETS,
        ),
        "rows of dY not masked": ("mask=(m < M)[:, None] & n_ok[None, :]", "mask=n_ok[None, :]"),
        "columns of dY not masked": ("n_ok = (r < R) & (n >= 0) & (n < N)", "n_ok = r >= 0", OFFSETS),
        "an index past the last column read": (
            "n_ok = (r < R) & (n >= 0) & (n < N)",
            "n_ok = (r < R) & (n >= 0)",
            NO_ROW,
        ),
        "a negative index read": ("n_ok = (r < R) & (n >= 0) & (n < N)", "n_ok = (r < R) & (n < N)", NO_ROW),
        "rows of x not masked": ("mask=(m < M)[:, None] & (k < K)[None, :], other", "mask=(k < K)[None, :], other"),
        "columns of x not masked": ("mask=(m < M)[:, None] & (k < K)[None, :], other", "mask=(m < M)[:, None], other"),
        "rows of the gradient not masked": ("mask=(r < R)[:, None] & (k < K)[None, :])", "mask=(k < K)[None, :])"),
        "columns of the gradient not masked": ("mask=(r < R)[:, None] & (k < K)[None, :])", "mask=(r < R)[:, None])"),
        "last block of rows skipped": (
            "tl.minimum(first + SPAN, M), BLOCK_M):",
            "tl.minimum(first + SPAN, M) // BLOCK_M * BLOCK_M, BLOCK_M):",
        ),
        "parts overlap": (
            "for m0 in range(first, tl.minimum(first + SPAN, M), BLOCK_M):",
            "for m0 in range(first, M, BLOCK_M):",
            CUT,
        ),
        "every part the first": ("first = pid_p * SPAN", "first = 0", CUT),
        "parts in one place": ("g_tile = g_ptr + pid_p * stride_gp", "g_tile = g_ptr", CUT),
        "only the last block counts": (
            "acc = tl.dot(tl.trans(dy), x, acc,",
            "acc = tl.dot(tl.trans(dy), x, tl.zeros_like(acc),",
            "tests/ops/row_linear/test_row_linear.py::test_integers_are_exact",
        ),
        "offsets of rows are 32 bits": (
            "m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)",
            "m = m0.to(tl.int32) + tl.arange(0, BLOCK_M)",
            OFFSETS,
        ),
        "stride of x's columns ignored": ("+ k[None, :] * stride_xk", "+ k[None, :]", STRIDES),
        "stride of dY's columns ignored": ("+ n[None, :] * stride_yn", "+ n[None, :]", STRIDES),
        "programs swapped": (
            "k = pid_k * BLOCK_K",
            "k = pid_r * BLOCK_K",
            "tests/ops/row_linear/test_row_linear.py::test_how_many_are_chosen",
        ),
        "gradient in x's dtype": (
            "dtype=acc.torch if parts > 1 else dtype)",
            "dtype=acc.torch if parts > 1 else x.dtype)",
            MASTERS,
        ),
    },
    "fastpeft/reference/row_linear.py": {
        "the definition knows no columns": (
            "weight.index_copy(int(columns), index,",
            "weight.index_copy(0, index,",
            DEFINITION,
        ),
        "rows not chosen": ("dy.index_select(1, index).to(dtype)", "dy[:, : len(index)].to(dtype)"),
        "masters lose bits": ("return dy.to(dtype).T @ x.to(dtype)", "return (dy.T @ x).to(dtype)", MASTERS),
    },
    "fastpeft/ops/row_linear.py": {
        "no bias": ("F.linear(x, weight, bias if bias.numel() else None)", "F.linear(x, weight)"),
        "all of x kept for columns": ("saved_x = output[1] if columns else x\n", "saved_x = x\n", KEPT),
        "the optimizer's step not noticed": (
            "weight if ctx.needs[0] else absent, trained, index)",
            "weight if ctx.needs[0] else absent, trained.detach().clone(), index)",
            NOTICED,
        ),
        "no gradient of the bias": ("dy.sum(0) if need_db else None", "torch.zeros_like(dy[0]) if need_db else None"),
        "dX of the transposed weight": ("dy @ weight if need_dx", "dy @ weight * 2 if need_dx"),
        "a weight that trains is let through": ("if weight.requires_grad:", "if False:", BAD),
    },
    "fastpeft/nn/live_slice.py": {
        "what optimizers write through .data is not seen": (
            "            self._stale = True\n",
            "            pass\n",
            MODULE + "test_everybody_sees_the_trained_weight",
        ),
        "the counter is not looked at": (
            "moved = version is None or version != self._version",
            "moved = False",
            MODULE + "test_nothing_is_forgotten_between_evaluations",
        ),
        "always written": (
            "if weight.is_meta or not (moved or self._stale):",
            "if weight.is_meta:",
            MODULE + "test_nothing_is_written_where_nothing_changed",
        ),
        "every write is counted": (
            "self._matrix(weight if moved else weight.data)",
            "self._matrix(weight)",
            MODULE + "test_micro_batches_may_interleave",
        ),
        "the state dict may be old": (
            "        self.write()\n        super()._save",
            "        super()._save",
            MODULE + "test_everybody_sees_the_trained_weight",
        ),
        "a loaded weight keeps the old slice": (
            "                self.trained.copy_(",
            "                (",
            MODULE + "test_the_state_dict_is_the_base_layers",
        ),
        "columns written as rows": (
            "target.index_copy_(int(self.columns),",
            "target.index_copy_(0,",
            MODULE + "test_trains_as_the_whole_weight_would",
        ),
        "masters are dropped": (
            'if self.trained.dtype == self._parameters["weight"].dtype:',
            "if True:",
            MODULE + "test_the_state_dict_is_the_base_layers",
        ),
    },
    "fastpeft/nn/token_rows.py": {
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
        "gradient in the table's dtype": (
            "dy.to(trained.dtype), slots",
            "dy, slots",
            MODULE + "test_token_rows_of_a_16_bit_table_have_float32_masters",
        ),
        "the padding is trained": (
            "if base_layer.padding_idx in index.tolist():",
            "if False:",
            MODULE + "test_bad_calls",
        ),
    },
}
