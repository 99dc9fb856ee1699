# ruff: noqa: E501
"""Mutants of lora_linear, as run.py says."""

# What kills a few that outlive most tests.
OFFSETS = "tests/ops/lora_linear/test_memory.py::test_offsets_are_64_bit[triton]"
BIAS_STRIDES = "tests/ops/lora_linear/test_memory.py::test_any_strides[sliced-biases-triton-lora_linear]"
DY_STRIDES = "tests/ops/lora_linear/test_memory.py::test_any_strides[transposed-dys-triton-lora_linear]"
GRADIENT_STRIDES = "tests/ops/lora_linear/test_torch.py::test_opcheck[x lora_as lora_bs-(70,)-triton]"
PARTS = "tests/ops/lora_linear/test_lora_linear.py::test_parts_cover_the_loop"
NO_DROPOUT = (
    "tests/ops/lora_linear/test_lora_linear.py::test_integers_are_exact[reference-float32-0.0-lora_linear_shared]"
)
ONLY_WEIGHTS = "tests/ops/lora_linear/test_edges.py::test_what_is_trained[weights-reference]"
AUTOCAST = "tests/ops/lora_linear/test_edges.py::test_autocast_is_the_same_as_casting_by_hand"

TESTS = (
    # Guards around every operand and result come first: a write outside them ends at random, in a crash or a hang.
    "tests/ops/lora_linear/test_memory.py::test_nothing_is_read_or_written_outside",
    "tests/ops/lora_linear/test_lora_linear.py::test_the_definition_is_the_formula",
    "tests/ops/lora_linear/test_peers.py::test_first_branch_served_for_all",
    "tests/ops/test_dropout.py::test_every_seed_has_its_mask_in_the_shared_form",
    "tests/ops/lora_linear/test_peers.py::test_scale_negative_zero_and_large",
    "tests/ops/lora_linear/test_edges.py::test_leading_dimensions",
    "tests/ops/lora_linear/test_errors.py::test_rank_0",
    "tests/ops/lora_linear/test_torch.py::test_double_backward_is_a_clear_error",
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
        # down
        "down: no mask on columns": ("k_ok = k0 + tl.arange(0, BLOCK_K) < K", "k_ok = k0 + tl.arange(0, BLOCK_K) >= 0"),
        "down: last block skipped": ("for k0 in range(first, tl.minimum(first + SPAN, K), BLOCK_K):", "for k0 in range(first, tl.minimum(first + SPAN, K) // BLOCK_K * BLOCK_K, BLOCK_K):"),
        "down: parts overlap": ("for k0 in range(first, tl.minimum(first + SPAN, K), BLOCK_K):", "for k0 in range(first, K, BLOCK_K):"),
        "down: dropout not applied": ("acc = _dot(tl.where(keep, x, 0.0).to(x.dtype), a_p, acc, PRECISION)", "acc = _dot(x, a_p, acc, PRECISION)"),
        "down: one seed for all": ("keep_tile(tl.load(seed_ptr + p), tl.load(branch_ptr + p * 5 + 4).to(tl.int32), m, k0, BLOCK_K)", "keep_tile(tl.load(seed_ptr), tl.load(branch_ptr + p * 5 + 4).to(tl.int32), m, k0, BLOCK_K)"),
        "down: one probability for all": ("tl.load(branch_ptr + p * 5 + 4).to(tl.int32), m, k0, BLOCK_K)", "tl.load(branch_ptr + 4).to(tl.int32), m, k0, BLOCK_K)"),
        "down: mask of the first block everywhere": ("m, k0, BLOCK_K)\n", "m, first, BLOCK_K)\n"),
        "down: branches mixed": ("a_p = a if BRANCHES == 1 else tl.where(mine[None, :], a, 0.0).to(a.dtype)", "a_p = a"),
        "down: no 1 / (1 - p)": ("factor = tl.load(branch_ptr + p * 5 + 2) * tl.load(branch_ptr + p * 5 + 3)", "factor = tl.load(branch_ptr + p * 5 + 2)"),
        "down: no scale": ("factor = tl.load(branch_ptr + p * 5 + 2) * tl.load(branch_ptr + p * 5 + 3)", "factor = tl.load(branch_ptr + p * 5 + 3)"),
        "down: scale of the first branch": ("factor = tl.load(branch_ptr + p * 5 + 2) *", "factor = tl.load(branch_ptr + 2) *"),
        "down: x's pointer stands still": ("        x_tile += step * stride_xk\n", ""),
        "down: x's columns taken as adjacent": ("x_tile += step * stride_xk", "x_tile += BLOCK_K"),
        "down: 32-bit step": ("x_tile += step * stride_xk", "x_tile += BLOCK_K * stride_xk", OFFSETS),
        "down: A's columns taken as adjacent": ("a_tile = a_ptr + k[:, None] * stride_ak + r[None, :] * stride_ar", "a_tile = a_ptr + k[:, None] + r[None, :] * stride_ar"),
        "down: rank blocks swapped with row blocks": ("r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)\n    first = pid_p * SPAN\n    k = first", "r = pid_m * BLOCK_R + tl.arange(0, BLOCK_R)\n    first = pid_p * SPAN\n    k = first"),
        "down: stores past the last row": ("tl.store(s_tile, acc * scale[None, :], mask=(m < M)[:, None] & (r < R)[None, :])", "tl.store(s_tile, acc * scale[None, :], mask=(m <= M)[:, None] & (r < R)[None, :])"),
        "down: stores past the last rank": ("tl.store(s_tile, acc * scale[None, :], mask=(m < M)[:, None] & (r < R)[None, :])", "tl.store(s_tile, acc * scale[None, :], mask=(m < M)[:, None] & (r <= R)[None, :])"),
        "down: 32-bit row": ("pid_m, pid_r, pid_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)\n    m = pid_m", "pid_m, pid_r, pid_p = tl.program_id(0), tl.program_id(1), tl.program_id(2)\n    m = pid_m", OFFSETS),
        # up, and dX
        "up: no bias": ("    if BIAS:\n", "    if False:\n"),
        "up: bias's stride ignored": ("k * stride_bias", "k * 1", BIAS_STRIDES),
        "up: bias's last element lost": ("tl.load(bias_ptr + k * stride_bias, mask=k < K, other=0.0)", "tl.load(bias_ptr + k * stride_bias, mask=k < K - 1, other=0.0)"),
        "up: ranks of the next branch": ("start, stop = tl.load(branch_ptr + p * 5).to(tl.int32), tl.load(branch_ptr + p * 5 + 1).to(tl.int32)", "start, stop = tl.load(branch_ptr + p * 5).to(tl.int32), R"),
        "up: branch starts one late": ("start, stop = tl.load(branch_ptr + p * 5).to(tl.int32),", "start, stop = tl.load(branch_ptr + p * 5).to(tl.int32) + 1,"),
        "up: rank not bounded": ("s = tl.load(s_tile, mask=(m < M)[:, None] & (r < stop)[None, :], other=0.0)\n        ", "s = tl.load(s_tile, mask=(m < M)[:, None] & (r >= 0)[None, :], other=0.0)\n        "),
        "up: only the first ranks": ("for r0 in range(start, stop, BLOCK_R):", "for r0 in range(start, tl.minimum(start + BLOCK_R, stop), BLOCK_R):"),
        "up: B's stride ignored": ("b_tile = b_ptr + r[:, None] * stride_br + k[None, :] * stride_bk", "b_tile = b_ptr + r[:, None] + k[None, :] * stride_bk"),
        "dX: mask not applied": ("y += tl.where(keep, acc * tl.load(branch_ptr + p * 5 + 3), 0.0)", "y += acc * tl.load(branch_ptr + p * 5 + 3)"),
        "dX: no 1 / (1 - p)": ("y += tl.where(keep, acc * tl.load(branch_ptr + p * 5 + 3), 0.0)", "y += tl.where(keep, acc, 0.0)"),
        "dX: only the last branch": ("y += tl.where(keep, acc * tl.load(branch_ptr + p * 5 + 3), 0.0)", "y = tl.where(keep, acc * tl.load(branch_ptr + p * 5 + 3), 0.0)"),
        "dX: one seed for all": ("keep = keep_tile(tl.load(seed_ptr + p), threshold, m, pid_k * BLOCK_K, BLOCK_K)\n            y +=", "keep = keep_tile(tl.load(seed_ptr), threshold, m, pid_k * BLOCK_K, BLOCK_K)\n            y +="),
        "dX: mask of the first columns": ("m, pid_k * BLOCK_K, BLOCK_K)\n            y +=", "m, pid_k * 0, BLOCK_K)\n            y +="),
        "up: stores past the last column": ("tl.store(y_tile, y, mask=(m < M)[:, None] & (k < K)[None, :])", "tl.store(y_tile, y, mask=(m < M)[:, None] & (k <= K)[None, :])"),
        "up: program ids swapped": ("pid_m, pid_k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)", "pid_m, pid_k = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)"),
        # up_backward
        "dS: no scale": ("tl.zeros((BLOCK_M, BLOCK_R), ACC), PRECISION) * scale", "tl.zeros((BLOCK_M, BLOCK_R), ACC), PRECISION)"),
        "dB: only the last rows": ("db = _dot(tl.trans(dy), s, db, PRECISION)", "db = _dot(tl.trans(dy), s, tl.zeros((BLOCK_K, BLOCK_R), ACC), PRECISION)"),
        "dB, dS: last rows skipped": ("for m0 in range(first, tl.minimum(first + SPAN, M), BLOCK_M):\n        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)\n        dy_tile", "for m0 in range(first, tl.minimum(first + SPAN, M) // BLOCK_M * BLOCK_M, BLOCK_M):\n        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)\n        dy_tile"),
        "dB, dS: 32-bit row": ("m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)\n        dy_tile", "m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int32)\n        dy_tile", OFFSETS),
        "dB, dS: dY's stride ignored": ("m[:, None] * stride_ym + k[None, :] * stride_yk\n        dy =", "m[:, None] * stride_ym + k[None, :]\n        dy =", DY_STRIDES),
        "dS: partial of another block": ("ds_tile = ds_ptr + pid_k * stride_dsp", "ds_tile = ds_ptr + pid_p * stride_dsp"),
        "dB: no mask on columns": ("tl.store(db_tile, db, mask=(k < K)[:, None] & (r < R)[None, :])", "tl.store(db_tile, db, mask=(k >= 0)[:, None] & (r < R)[None, :])"),
        "dY: no mask on columns": ("dy = tl.load(dy_tile, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)", "dy = tl.load(dy_tile, mask=(m < M)[:, None] & (k >= 0)[None, :], other=0.0)"),
        # outer: dA
        "dA: mask not applied": ("acc = _dot(tl.trans(tl.where(keep, x, 0.0).to(x.dtype)), s_p, acc, PRECISION)", "acc = _dot(tl.trans(x), s_p, acc, PRECISION)"),
        "dA: branches mixed": ("s_p = s if BRANCHES == 1 else tl.where(mine[None, :], s, 0.0).to(s.dtype)", "s_p = s"),
        "dA: no 1 / (1 - p)": ("factor = tl.where(mine, tl.load(branch_ptr + p * 5 + 3), factor)", "factor = tl.where(mine, 1.0, factor)"),
        "dA: mask of the first columns": ("m, pid_k * BLOCK_K, BLOCK_K)\n                mine", "m, pid_k * 0, BLOCK_K)\n                mine"),
        "dA: last rows skipped": ("for m0 in range(first, tl.minimum(first + SPAN, M), BLOCK_M):\n        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)\n        x_tile", "for m0 in range(first, tl.minimum(first + SPAN, M) // BLOCK_M * BLOCK_M, BLOCK_M):\n        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)\n        x_tile"),
        "dA: parts overlap": ("for m0 in range(first, tl.minimum(first + SPAN, M), BLOCK_M):\n        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)\n        x_tile", "for m0 in range(first, M, BLOCK_M):\n        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)\n        x_tile"),
        "dA: rank blocks repeated": ("r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)\n    acc = tl.zeros((BLOCK_K, BLOCK_R), ACC)", "r = tl.arange(0, BLOCK_R)\n    acc = tl.zeros((BLOCK_K, BLOCK_R), ACC)"),
        "dA: rows not bounded": ("x = tl.load(x_tile, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)", "x = tl.load(x_tile, mask=(m >= 0)[:, None] & (k < K)[None, :], other=0.0)"),
        # launchers
        "sums in 16 bits": ("g = x.new_empty(parts, rank, k, dtype=acc.torch if parts > 1 else s.dtype)", "g = x.new_empty(parts, rank, k, dtype=torch.float16)"),
        "float32 adapters narrowed": ("return tl.dot(x.to(a.dtype), a, acc,", "return tl.dot(x, a.to(x.dtype), acc,"),
        "dB with the strides of its transpose": (".T.contiguous() if need_db else None", ".T if need_db else None", GRADIENT_STRIDES),
        "dA's are views of one buffer's rows, in the wrong order": (".split(ranks)]", ".split(ranks)[::-1]]"),
        "dS's scale dropped for large ranks": ("_project(dy, b.T, [rank], [scale], [0.0], None)", "_project(dy, b.T, [rank], [1.0], [0.0], None)"),
    },
    "kernels/launch.py": {
        "last part lost": ("return triton.cdiv(steps, span), span * block", "return max(1, steps // span), span * block", PARTS),
        "only the first partial result": ("partials.sum(0)).to(dtype)", "partials[0]).to(dtype)"),
        "branches all start at 0": ("rows.append([start, start + rank, scale,", "rows.append([0, start + rank, scale,"),
        "no scale in the table": ("rows.append([start, start + rank, scale,", "rows.append([start, start + rank, 1.0,"),
    },
    "fastpeft/reference/lora_linear.py": {
        "definition: dropout on the base path": ("y = F.linear(x, weight) + y", "y = F.linear(dropped, weight) + y"),
        "definition: no 1 / (1 - p)": ("dropped = x * mask.view(x.shape) * inverse_keep(dropout)", "dropped = x * mask.view(x.shape)"),
        "definition: bias scaled": ("        y = y + bias\n", "        y = y + scale * bias\n"),
        "down: one seed for all": ("mask = _mask(x, dropouts[p], seeds, p)", "mask = _mask(x, dropouts[p], seeds, 0)"),
        "down: first scale for all": ("alpha=scales[p] * inverse_keep(dropouts[p])", "alpha=scales[0] * inverse_keep(dropouts[p])"),
        "down: no scale without dropout": ("_stack(lora_as).T, scales[0])", "_stack(lora_as).T, 1.0)"),
        "down: one scale without dropout": ("len(set(scales)) == 1 and not any", "not any", NO_DROPOUT),
        "down: no 1 / (1 - p)": ("alpha=scales[p] * inverse_keep(dropouts[p])", "alpha=scales[p]"),
        "up: bias dropped": ("y = s @ b.T if bias is None else torch.addmm(bias.to(s.dtype), s, b.T)", "y = s @ b.T"),
        "dS: no scale": ("ds = _product(dy, b, scale) if need_ds else None", "ds = dy @ b if need_ds else None"),
        "dX: mask not applied": ("part if mask is None else part.mul_(mask)", "part"),
        "dX: no 1 / (1 - p)": ("part = _product(ds_p, a, factor)", "part = _product(ds_p, a, 1.0)"),
        "dX: one seed for all": ("mask = _mask(ds, dropouts[p], seeds, p,", "mask = _mask(ds, dropouts[p], seeds, 0,"),
        "dX: only the last branch": ("dx = part if dx is None else dx.add_(part)", "dx = part"),
        "dA: no 1 / (1 - p)": ("mask.mul_(x), factor)", "mask.mul_(x), 1.0)"),
        "dA: mask not applied": ("x.to(ds.dtype) if mask is None else mask.mul_(x)", "x.to(ds.dtype)"),
        "dX: written into dS": ("part = _product(ds_p, a, factor)", "part = _product(ds_p.mul_(2), a, factor / 2)"),
        "product: no factor": ("beta=0, alpha=factor)", "beta=0)"),
    },
    "fastpeft/ops/lora_linear.py": {
        "base GEMM left out": ("ys.append(y.addmm_(x, weight.T) if weight.numel() else y)", "ys.append(y)"),
        "y without its low-rank term": ("y.addmm_(x, weight.T) if", "y.addmm_(x, weight.T, beta=0) if"),
        "x kept though A is frozen": ("saved_x = x if need_da or need_dw else absent", "saved_x = x"),
        "S kept though B is frozen": ("saved_s = output[1] if need_db else absent", "saved_s = output[1]"),
        "x not kept for dW": ("saved_x = x if need_da or need_dw else absent", "saved_x = x if need_da else absent", ONLY_WEIGHTS),
        "dX without the base path": ("        if need_dx and weight.numel() and backend != \"cuda\":\n            dx.addmm_(dy, weight)", "        if False:\n            dx.addmm_(dy, weight)"),
        "dX of the last projection only": ("            dx.addmm_(dy, weight)", "            dx.addmm_(dy, weight, beta=0)"),
        "gradients of weight and A swapped": ("for i, need in enumerate(ctx.needs[1:])]", "for i, need in zip((1, 0, 2, 3), ctx.needs[1:])]"),
        "every projection gets the last S": ("zip(weights, lora_bs, biases, _split(s, lora_as), strict=True)", "zip(weights, lora_bs, biases, [_split(s, lora_as)[-1]] * len(weights), strict=True)"),
        "scale of dS off by the projection": ("for dy, s_p, b, scale in zip(dys, _split(s, lora_as) if need_db else absent, lora_bs, scales, strict=True)", "for dy, s_p, b, scale in zip(dys, _split(s, lora_as) if need_db else absent, lora_bs, scales[::-1], strict=True)"),
        "one seed for all": ("torch.cat(drawn)", "torch.cat(drawn[:1] * len(drawn))"),
        "autocast ignored": ("torch.is_autocast_enabled(device.type) and x.dtype != torch.float64", "False", AUTOCAST),
        "rank 0 accepted": ("if a.shape[0] == 0:", "if a.shape[0] < 0:"),
        "leading dimensions merged": ("y.reshape(*shape[:-1], y.shape[-1])", "y.reshape(-1, y.shape[-1])"),
        "x written": ("    s = impl.down(x, lora_as,", "    s = impl.down(x.mul_(1 + 2**-4), lora_as,"),
    },
    "fastpeft/_library.py": {
        "second gradient silently wrong": ("        @once_differentiable\n", ""),
        "gradients shifted by one argument": ("found, flat = backward(ctx, grads[:-1], grads[-1]), [None]\n", "found, flat = backward(ctx, grads[:-1], grads[-1]), []\n"),
    },
}  # fmt: skip
