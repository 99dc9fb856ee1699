"""Mutants of lora_linear, as run.py says."""

# What kills a few that outlive most tests.
OFFSETS = "tests/ops/lora_linear/test_memory.py::test_offsets_are_64_bit[triton]"
BIAS_STRIDES = "tests/ops/lora_linear/test_memory.py::test_any_strides[sliced-biases-triton-lora_linear]"
DY_STRIDES = "tests/ops/lora_linear/test_memory.py::test_any_strides[transposed-dys-triton-lora_linear]"
GRADIENT_STRIDES = "tests/ops/lora_linear/test_torch.py::test_opcheck[x lora_as lora_bs-(70,)-triton]"
PLANES = "tests/ops/lora_linear/test_planes.py"
ROWS = "tests/ops/lora_linear/test_lora_linear.py::test_integers_are_exact_where_a_cpu_casts_a_few_rows_at_a_time"
PARTS = "tests/ops/lora_linear/test_lora_linear.py::test_parts_cover_the_loop"
NO_DROPOUT = (
    "tests/ops/lora_linear/test_lora_linear.py::test_integers_are_exact[reference-float32-0.0-lora_linear_shared]"
)
ONLY_WEIGHTS = "tests/ops/lora_linear/test_edges.py::test_what_is_trained[weights-reference]"
AUTOCAST = "tests/ops/lora_linear/test_edges.py::test_autocast_is_the_same_as_casting_by_hand"

HESSIAN = "tests/ops/test_second_gradients.py::test_a_hessian_as_the_last_layer"

TESTS = (
    # Guards around every operand and result come first: a write outside them ends at random, in a crash or a hang.
    "tests/ops/lora_linear/test_memory.py::test_nothing_is_read_or_written_outside",
    "tests/ops/lora_linear/test_lora_linear.py::test_the_definition_is_the_formula",
    "tests/ops/lora_linear/test_peers.py::test_first_branch_served_for_all",
    "tests/ops/test_dropout.py::test_every_seed_has_its_mask_in_the_shared_form",
    "tests/ops/lora_linear/test_peers.py::test_scale_negative_zero_and_large",
    "tests/ops/lora_linear/test_edges.py::test_leading_dimensions",
    "tests/ops/lora_linear/test_errors.py::test_rank_0",
    "tests/ops/test_second_gradients.py::test_an_input_computed_from_another",
    "tests/ops/lora_linear/test_memory.py::test_only_x_and_s_are_kept_for_backward",
    "tests/ops/lora_linear/test_edges.py::test_fp32_adapters_are_used_in_fp32",
    "tests/ops/lora_linear/test_lora_linear.py::test_integers_are_exact_where_sums_are_split",
    "tests/ops/lora_linear/test_edges.py::test_what_is_trained",
    "tests/ops/test_dropout.py::test_every_backend_draws_the_reference_mask",
    "tests/ops/lora_linear/test_edges.py::test_ranks",
    "tests/ops/lora_linear/test_edges.py::test_ranks_of_projections_that_share_x",
    AUTOCAST,
    "tests/ops/lora_linear/test_memory.py::test_any_strides",
    "tests/ops/lora_linear/test_memory.py::test_offsets_are_64_bit",
    "tests/ops/lora_linear/test_torch.py::test_opcheck",
    "tests/ops/lora_linear/test_lora_linear.py::test_integers_are_exact",
    "tests/ops/lora_linear/test_lora_linear.py::test_no_less_accurate_than_pytorch",
)

MUTANTS = {
    "kernels/lora_linear.py": {
        "forward": {
            "base GEMM left out": (".addmm_(x, weight.T) if weight.numel() else y", ""),
            "y without its low-rank term": ("weight.T", "weight.T, beta=0"),
            "every projection gets the last S": (
                "s.split(ranks_of(lora_as), 1)",
                "[s.split(ranks_of(lora_as), 1)[-1]] * len(weights)",
            ),
            "x written": ("down(x,", "down(x.mul_(1 + 2**-4),"),
        },
    },
    "kernels/lora_linear_products.py": {
        "branch_table": {
            "branches all start at 0": ("([start, start + rank, scale,", "([0, start + rank, scale,"),
            "no scale in the table": ("+ rank, scale,", "+ rank, 1.0,"),
        },
        "_down_kernel": {
            "down: no mask on columns": ("(0, BLOCK_K) < K", "(0, BLOCK_K) >= 0"),
            "down: last block skipped": (
                "(first + SPAN, K), BLOCK_K",
                "(first + SPAN, K) // BLOCK_K * BLOCK_K, BLOCK_K",
            ),
            "down: parts overlap": ("tl.minimum(first + SPAN, K)", "K"),
            "down: dropout not applied": ("tl.where(keep, x, 0.0).to(x.dtype)", "x"),
            "down: one seed for all": ("seed_ptr + branch", "seed_ptr"),
            "down: one probability for all": ("branch * FIELDS + THRESHOLD", "THRESHOLD"),
            "down: mask of the first block everywhere": ("FIRST + k0", "FIRST + first"),
            "down: branches mixed": ("pid_r // blocks, pid_r % blocks", "pid_r % blocks, pid_r // blocks"),
            "down: the first branch's columns for all": ("bounds_of(branch_ptr, branch,", "bounds_of(branch_ptr, 0,"),
            "down: no 1 / (1 - p)": (
                "(branch_ptr + p * FIELDS + SCALE) * tl.load(branch_ptr + p * FIELDS + INVERSE_KEEP)",
                "(branch_ptr + p * FIELDS + SCALE)",
            ),
            "down: no scale": (
                "(branch_ptr + p * FIELDS + SCALE) * tl.load(branch_ptr + p * FIELDS + INVERSE_KEEP)",
                "(branch_ptr + p * FIELDS + INVERSE_KEEP)",
            ),
            "down: scale of the first branch": ("p * FIELDS + SCALE", "SCALE"),
            "down: x's pointer stands still": ("x_tile += step * stride_xk", ""),
            "down: x's columns taken as adjacent": ("step * stride_xk", "BLOCK_K"),
            "down: 32-bit step": ("+= step * stride_xk", "+= BLOCK_K * stride_xk", OFFSETS),
            "down: A's columns taken as adjacent": ("* stride_ak +", "+"),
            "down: rank blocks swapped with row blocks": ("r = start + pid_r *", "r = start + pid_m *"),
            "down: stores past the last row": ("[None, :], mask=(m < M)[:, None]", "[None, :], mask=(m <= M)[:, None]"),
            "down: stores past the last rank": (
                "(s_tile, acc * scale[None, :], mask=(m < M)[:, None] & (r < stop)[None, :])",
                "(s_tile, acc * scale[None, :], mask=(m < M)[:, None] & (r <= stop)[None, :])",
            ),
            "down: 32-bit row": (
                ".to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)",
                ", tl.program_id(1), tl.program_id(2)",
                OFFSETS,
            ),
        },
        "_up_kernel": {
            "up: no bias": ("if BIAS:", "if False:"),
            "up: bias's stride ignored": ("* stride_bias", "* 1", BIAS_STRIDES),
            "up: bias's last element lost": ("k < K, other", "k < K - 1, other"),
            "up: rank not bounded": ("& (r < stop)[None, :]", "& (r >= 0)[None, :]"),
            "up: only the first ranks": ("start, stop,", "start, tl.minimum(start + BLOCK_R, stop),"),
            "up: B's stride ignored": ("* stride_br +", "+"),
            "dX: mask not applied": (
                "tl.where(keep, acc * tl.load(branch_ptr + p * FIELDS + INVERSE_KEEP), 0.0)",
                "acc * tl.load(branch_ptr + p * FIELDS + INVERSE_KEEP)",
            ),
            "dX: no 1 / (1 - p)": ("acc * tl.load(branch_ptr + p * FIELDS + INVERSE_KEEP)", "acc"),
            "dX: only the last branch": ("y += tl.where", "y = tl.where"),
            "dX: one seed for all": ("seed_ptr + p", "seed_ptr"),
            "dX: mask of the first columns": ("* BLOCK_K,", "* 0,"),
            "up: stores past the last column": (
                "(y_tile, y, mask=(m < M)[:, None] & (k < K)[None, :])",
                "(y_tile, y, mask=(m < M)[:, None] & (k <= K)[None, :])",
            ),
            "up: program ids swapped": ("(0).to(tl.int64), tl.program_id(1)", "(1).to(tl.int64), tl.program_id(0)"),
        },
        "bounds_of": {
            "ranks of the next branch": ("tl.load(branch_ptr + p * FIELDS + STOP).to(tl.int64)", "stop"),
            "branch starts one late": ("FIELDS + START).to(tl.int64)", "FIELDS + START).to(tl.int64) + 1"),
        },
    },
    "kernels/planes.py": {
        "split_planes": {
            "the middle plane twice": ("low, _ = _upper(rest - wide)", "low = middle", PLANES),
            "no low plane": ("low, _ = _upper(rest - wide)", "low = middle * 0", PLANES),
            "the rest of nothing": ("rest = a - wide", "rest = a", PLANES),
        },
        "dot": {
            "float32 adapters narrowed": (".to(a.dtype), a", ", a.to(x.dtype)"),
            "planes: no low plane": ("acc = tl.dot(x, low, acc, out_dtype=acc.dtype)", "", PLANES),
            "pairs: the high planes alone": ("acc = tl.dot(x_high, low, acc, out_dtype=acc.dtype)", "", PLANES),
        },
        "_halves": {
            "halves: x's high plane alone": ("tl.dot(low, a, acc, out_dtype=acc.dtype)", "acc", PLANES),
            "halves: a's high plane alone": ("tl.dot(x, low, acc, out_dtype=acc.dtype)", "acc", PLANES),
        },
    },
    "kernels/lora_linear_backward.py": {
        "run": {
            "dX without the base path": ("if need_dx else", "if False else"),
            "dX of the last projection only": ("(dy, weight)", "(dy, weight, beta=0)"),
        },
        "ups_backward": {
            "scale of dS off by the projection": ("scales, columns", "scales[::-1], columns"),
        },
        "_up_backward_kernel": {
            "dS: no scale": (
                "tl.zeros((BLOCK_M, BLOCK_R), ACC), PRECISION) * scale",
                "tl.zeros((BLOCK_M, BLOCK_R), ACC), PRECISION)",
            ),
            "dB: only the last rows": (", s, db, PRECISION", ", s, tl.zeros((BLOCK_K, BLOCK_R), ACC), PRECISION"),
            "dB, dS: last rows skipped": (
                "(first + SPAN, M), BLOCK_M",
                "(first + SPAN, M) // BLOCK_M * BLOCK_M, BLOCK_M",
            ),
            "dB, dS: 32-bit row": ("(tl.int64)\n        dy_tile", "(tl.int32)\n        dy_tile", OFFSETS),
            "dB, dS: dY's stride ignored": ("[None, :] * stride_yk", "[None, :]", DY_STRIDES),
            "dS: partial of another block": ("ds_ptr + pid_k *", "ds_ptr + pid_p *"),
            "dB: no mask on columns": ("db, mask=(k < K)[:, None]", "db, mask=(k >= 0)[:, None]"),
            "dY: no mask on columns": ("& (k < K)[None, :]", "& (k >= 0)[None, :]"),
        },
        "_outer_kernel": {
            "dA: mask not applied": ("tl.where(keep, x, 0.0).to(x.dtype)", "x"),
            "dA: branches mixed": ("pid_r // blocks, pid_r % blocks", "pid_r % blocks, pid_r // blocks"),
            "dA: no 1 / (1 - p)": ("tl.load(branch_ptr + branch * FIELDS + INVERSE_KEEP)", "1.0"),
            "dA: mask of the first columns": ("* BLOCK_K,", "* 0,"),
            "dA: last rows skipped": ("(first + SPAN, M), BLOCK_M", "(first + SPAN, M) // BLOCK_M * BLOCK_M, BLOCK_M"),
            "dA: parts overlap": ("tl.minimum(first + SPAN, M)", "M"),
            "dA: rank blocks repeated": ("pid_r * BLOCK_R + tl", "tl"),
            "dA: rows not bounded": ("x_tile, mask=(m < M)[:, None]", "x_tile, mask=(m >= 0)[:, None]"),
        },
        "_outer": {
            "sums in 16 bits": ("acc.torch if parts > 1 else s.dtype", "torch.float16"),
        },
        "up_backward": {
            "dB with the strides of its transpose": ("None, transposed=True)", "None).T", GRADIENT_STRIDES),
            "dS's scale dropped for large ranks": (", [scale]", ", [1.0]"),
        },
        "down_backward": {
            "dA's are views of one buffer's rows, in the wrong order": (".split(ranks))", ".split(ranks)[::-1])"),
        },
    },
    "kernels/launch.py": {
        "split": {
            "last part lost": ("return cdiv(steps, span)", "return max(1, steps // span)", PARTS),
        },
    },
    "kernels/partials.py": {
        "_plane_sum": {
            "only the first partial results": ("range(0, parts, PARTS)", "range(0, 1, PARTS)"),
            "one partial result too many": ("(p < parts)", "(p <= parts)"),
        },
        "_sum_kernel": {
            "rows without their stride": ("(i // columns) * stride_y", "(i // columns) * columns"),
            "the second sum with the first's planes": ("q_ptr, j, q_parts", "q_ptr, j, parts"),
        },
    },
    "fastpeft/reference/lora_linear.py": {
        "forward": {
            "base GEMM left out": (".addmm_(x, weight.T) if weight.numel() else y", ""),
            "y without its low-rank term": ("weight.T", "weight.T, beta=0"),
            "every projection gets the last S": ("_split(s, lora_as)", "[_split(s, lora_as)[-1]] * len(weights)"),
            "x written": ("down(x,", "down(x.mul_(1 + 2**-4),"),
        },
        "backward": {
            "dX without the base path": ("if dx is not None", "if False"),
            "dX of the last projection only": ("(dy, weight)", "(dy, weight, beta=0)"),
        },
        "ups_backward": {
            "scale of dS off by the projection": ("scales[p]", "scales[-1 - p]"),
            "dS: no scale": ("wide, b, beta=0, alpha=scales[p]", "wide, b, beta=0"),
        },
        "lora_linear": {
            "definition: dropout on the base path": ("linear(x, weight)", "linear(dropped, weight)"),
            "definition: no 1 / (1 - p)": ("(x.shape) * inverse_keep(dropout)", "(x.shape)"),
            "definition: bias scaled": ("y + bias", "y + scale * bias"),
        },
        "down": {
            "down: one seed for all": ("seeds, p", "seeds, 0"),
            "down: first scale for all": ("scales[p]", "scales[0]"),
            "down: no scale without dropout": ("scales[0]", "1.0"),
            "down: one scale without dropout": ("len(set(scales)) == 1 and not", "not", NO_DROPOUT),
            "down: no 1 / (1 - p)": ("[p] * inverse_keep(dropouts[p])", "[p]"),
        },
        "up": {
            "up: bias dropped": ("wide = None if bias is None else bias.to(s.dtype)", "wide = None"),
            "up: S of the first rows": ("addmm(wide, s[rows], b.T", "addmm(wide, s[: rows.stop - rows.start], b.T"),
        },
        "down_backward": {
            "dX: mask not applied": ("part if mask is None else part.mul_(mask[rows])", "part"),
            "dX: no 1 / (1 - p)": ("(ds_p[rows], a, beta=0, alpha=factor)", "(ds_p[rows], a, beta=0)"),
            "dX: one seed for all": ("seeds, p", "seeds, 0"),
            "dX: only the last branch": ("part if p == 0 else part.add_(dx[rows])", "part"),
            "dA: no 1 / (1 - p)": ("(ds.dtype), alpha=factor)", "(ds.dtype))"),
            "dA: mask not applied": ("x[rows] if mask is None else mask[rows].mul_(x[rows])", "x[rows]"),
            "dX: written into dS": (
                "(ds_p[rows], a, beta=0, alpha=factor)",
                "(ds_p[rows].mul_(2), a, beta=0, alpha=factor / 2)",
            ),
        },
        "_add_down": {
            "down: no factor": (", alpha=factor", ""),
        },
        "row_blocks": {
            "the last part left out": ("range(0, rows, step)", "range(0, rows - step, step)", ROWS),
            "parts overlap": ("range(0, rows, step)", "range(0, rows, step // 2)", ROWS),
        },
    },
    "fastpeft/ops/lora_linear.py": {
        "_setup_context": {
            "x kept though A is frozen": ("x if need_da or need_dw else absent", "x"),
            "S kept though B is frozen": ("[1] if need_db else absent", "[1]"),
            "x not kept for dW": ("or need_dw else", "else", ONLY_WEIGHTS),
        },
        "_backward": {
            "gradients of weight and A swapped": ("enumerate(ctx.needs[1:])", "zip((1, 0, 2, 3), ctx.needs[1:])"),
        },
        "_call": {
            "autocast ignored": ("autocast_dtype(x)", "None", AUTOCAST),
        },
        "_planned": {
            "leading dimensions merged": ("*shape[:-1]", "-1"),
        },
    },
    "fastpeft/ops/lora_linear_arguments.py": {
        "seeds": {
            "one seed for all": ("cat(drawn)", "cat(drawn[:1] * len(drawn))"),
        },
        "_branch": {
            "rank 0 accepted": ("[0] == 0:", "[0] < 0:"),
        },
    },
    "fastpeft/_library.py": {
        "_eager_function": {
            "gradients shifted by one argument": (", [None]", ", []"),
        },
        "_differentiable": {
            "second gradient silently wrong": ("if not torch.is_grad_enabled():", "if True:", HESSIAN),
            "gradients of one input by way of another": ("t.view_as(t)", "t"),
        },
    },
}
