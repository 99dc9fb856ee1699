# ruff: noqa: E501
"""Mutants of bottleneck and of the adapter module, as run.py says."""

INTEGERS = "tests/ops/bottleneck/test_bottleneck.py::test_integers_are_exact"
ONE_KERNEL = "tests/ops/bottleneck/test_bottleneck.py::test_integers_are_exact_in_one_kernel"
ACCURATE = "tests/ops/bottleneck/test_bottleneck.py::test_no_worse_than_eager"
GRADCHECK = "tests/ops/bottleneck/test_bottleneck.py::test_gradients_of_the_kernels_themselves"
ACTIVATIONS = "tests/ops/bottleneck/test_bottleneck.py::test_activations"
SLOTS = "tests/ops/bottleneck/test_bottleneck.py::test_slots_are_no_worse_than_eager"
NEAR = "tests/ops/bottleneck/test_bottleneck.py::test_tanh_near_zero"
FAR = "tests/ops/bottleneck/test_bottleneck.py::test_rows_far_from_zero"
ALONE = "tests/ops/bottleneck/test_bottleneck.py::test_every_adapter_trains_as_if_alone"
WHO = "tests/ops/bottleneck/test_edges.py::test_who_is_in_the_batch"
CUT = "tests/ops/bottleneck/test_edges.py::test_sums_cut_along_k"
WIDTHS = "tests/ops/bottleneck/test_edges.py::test_widths"
SEEDS = "tests/ops/bottleneck/test_edges.py::test_seeds_are_drawn_where_none_are_given"
TRAINED = "tests/ops/bottleneck/test_edges.py::test_what_is_trained"
AUTOCAST = "tests/ops/bottleneck/test_edges.py::test_autocast_is_the_same_as_casting_by_hand"
MASK = "tests/ops/bottleneck/test_edges.py::test_the_mask_is_the_projects"
GUARDS = "tests/ops/bottleneck/test_memory.py::test_nothing_is_read_or_written_outside"
OFFSETS = "tests/ops/bottleneck/test_memory.py::test_offsets_are_64_bit"
KEPT = "tests/ops/bottleneck/test_memory.py::test_what_is_kept_for_backward"
FROZEN = "tests/ops/bottleneck/test_memory.py::test_a_frozen_adapter_keeps_no_x"
FORMULA = "tests/ops/bottleneck/test_torch.py::test_the_module_is_the_formula"
CALLS = "tests/ops/bottleneck/test_torch.py::test_bad_calls_name_what_is_wrong"
TRAINING = "tests/ops/bottleneck/test_torch.py::test_dropout_and_stochastic_depth_in_training_only"

TESTS = (
    INTEGERS,
    FORMULA,
    WHO,
    GUARDS,
    CUT,
    "tests/ops/bottleneck/test_bottleneck.py::test_the_definition_element_by_element",
    ACTIVATIONS,
    GRADCHECK,
    ACCURATE,
    TRAINED,
)

MUTANTS = {
    "kernels/bottleneck_tiles.py": {
        "a row without mask": ("m_ok, row, drawn = m < M, m, m", "m_ok, row, drawn = m <= M, m, m", GUARDS),
        "the mask counts the batch's rows": ("        drawn = m - tl.load(starts_ptr + slot)\n", "        drawn = m\n", ALONE),
        "a slot runs into the next": ("m_ok = m < tl.load(starts_ptr + slot + 1)", "m_ok = m <= tl.load(starts_ptr + slot + 1)", WHO),
        "leaky_relu's slope": ("h = tl.where(z > 0, z, 0.01 * z)", "h = tl.where(z > 0, z, 0.02 * z)", ACTIVATIONS),
        "silu's derivative": ("d = s * (1.0 + z * (1.0 - s))", "d = s * (1.0 + z * s)", ACTIVATIONS),
        "gelu's derivative without density": ("* 0.3989422804014327", "* 0.4989422804014327", GRADCHECK),
        "tanh near 0 by exp alone": ("tl.abs(z) < 0.625", "tl.abs(z) < 0.0", NEAR),
        "a block's mean is forgotten": ("            square += delta * delta * (k0 * share)\n", "", FAR),
        "an unscaled mean": ("            mean += delta * share\n", "            mean += delta\n", ACCURATE),
        "padding in the deviation": ("x = tl.where((k < K)[None, :], x - part[:, None], 0.0)", "x = x - part[:, None]", ACCURATE),
        "no eps": ("tl.sqrt(square / K + eps)", "tl.sqrt(square / K + eps * 100)", ACCURATE),
        "the norm's bias is dropped": ("            if nb_ptr is not None:\n", "            if nb_ptr is None:\n", ACCURATE),
        "D's last columns": ("mask=k_ok[:, None] & (r < R)[None, :], other=0.0)\n        if NORM", "mask=(k <= K)[:, None] & (r < R)[None, :], other=0.0)\n        if NORM", GUARDS),
        "the residual is dropped too": ("        u += tl.load(res_ptr", "        u = tl.load(res_ptr", INTEGERS),
        "a 32-bit offset of the residual": ("tl.load(res_ptr + row[:, None] * stride_res[0]", "tl.load(res_ptr + (row[:, None] * stride_res[0]).to(tl.int32)", OFFSETS),
        "y's last column": ("    y_ok = m_ok[:, None] & (n < N)[None, :]\n", "    y_ok = m_ok[:, None] & (n <= N)[None, :]\n", GUARDS),
    },
    "kernels/bottleneck.py": {
        "no bias in one kernel": ("    h = activate(z, ACTIVATION).to(d_ptr.dtype.element_ty)", "    h = activate(z * 2, ACTIVATION).to(d_ptr.dtype.element_ty)", ONE_KERNEL),
        "a plane is skipped": ("for plane in tl.static_range(1, PLANES):", "for plane in tl.static_range(2, PLANES):", CUT),
        "a cut sum is not activated": ("            h = activate(h, ACTIVATION)\n", "", CUT),
        "statistics of the first program only in part": ("pid_r + pid_p == 0)", "pid_r + pid_p == 1)", ACCURATE),
        "rows without an adapter are 0": ("residual.clone(memory_format=torch.contiguous_format)\n", "torch.zeros_like(residual)\n", WHO),
        "the last hidden block": ("for r0 in range(0, R, BLOCK_R):", "for r0 in range(0, R - BLOCK_R + 1, BLOCK_R):", WIDTHS),
        "slot 0's U for everyone": ("u_tile = u_ptr + slot * stride_u[0] + r[:, None] * stride_u[2] + n[None, :] * stride_u[1]\n        u = tl.load(u_tile, mask=(r < R)[:, None] & (n < N)[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]\n        acc", "u_tile = u_ptr + r[:, None] * stride_u[2] + n[None, :] * stride_u[1]\n        u = tl.load(u_tile, mask=(r < R)[:, None] & (n < N)[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]\n        acc", WHO),
    },
    "kernels/bottleneck_backward.py": {
        "the mask is forgotten in dz": ("drawn, n0, BLOCK_K), g, 0.0).to(g.dtype)", "drawn, n0, BLOCK_K), g, g).to(g.dtype)", INTEGERS),
        "the scale is forgotten in dz": ("        if scale_ptr is not None:\n", "        if scale_ptr is None:\n", INTEGERS),
        "the factor is forgotten in dz": ("dz = dh * tl.load(numbers_ptr) * slope", "dz = dh * slope", INTEGERS),
        "the mean is not taken out": ('        if NORM == "layer":\n            dx -=', '        if NORM == "rms":\n            dx -=', ACCURATE),
        "dx without the deviation": ("        dx *= rstd[:, None]\n", "", ACCURATE),
        "dy is not added": ("    if dy_ptr is not None:\n        dx += tl.load(", "    if dy_ptr is not None:\n        dx -= tl.load(", INTEGERS),
        "the mask in d(up)": ("BLOCK_K, BLOCK_K), x, 0.0).to(x.dtype)", "BLOCK_K, BLOCK_K), x, x).to(x.dtype)", INTEGERS),
        "d(up)'s rows of all slots": ("        start = tl.load(starts_ptr + pid_p).to(tl.int64)\n", "        start = tl.load(starts_ptr).to(tl.int64)\n", WHO),
        "the norm's bias in d(down)": ("                ddown += total[..., None] * weights.norm_bias[..., None, :]\n", "                pass\n", ACCURATE),
        "d(scale) without the bias": ("dscale if weights.up_bias is None else dscale + dup_bias * weights.up_bias", "dscale", INTEGERS),
        "half of the means": ("means.sum(0).div_(k)", "means[0].div_(k)", ACCURATE),
    },
    "fastpeft/reference/bottleneck.py": {
        "the mask is not scaled": ("return u if mask is None else u * mask * inverse_keep(settings.dropout)", "return u if mask is None else u * mask", "tests/ops/bottleneck/test_bottleneck.py::test_the_definition_element_by_element"),
        "x is kept for nothing": ("    return need_down or need_norm or need_norm_bias or (norm and need_x)\n", "    return True\n", FROZEN),
        "rounded twice at the residual": ("    u = u if mask is None else u.mul_(mask)\n", "    u = u if mask is None else u\n", INTEGERS),
    },
    "fastpeft/reference/bottleneck_backward.py": {
        "dx without dy": ("return torch.addmm(dy, dz, down)", "return torch.addmm(dy, dz, down, beta=0)", INTEGERS),
        "dx of a norm without dy": ("(dx.add_(dy) if settings.own else dx).to(x.dtype)", "dx.to(x.dtype)", ACCURATE),
        "another norm's direction": ("along = (da * unit).mean(1, keepdim=True)", "along = (da * unit).sum(1, keepdim=True)", ACCURATE),
        "a norm's weight is left out": ("da = da.to(unit.dtype) * norm_weight", "da = da.to(unit.dtype)", ACCURATE),
        "d(norm_weight) from x itself": ("dnorm = (da * unit)", "dnorm = (da * x)", ACCURATE),
        "the last rows of d(up) under a learned scale": ("return total if rows == len(g) else", "return total if True else", INTEGERS),
        "leaky slope of 0": ("aten.leaky_relu_backward(dh, z, LEAKY_SLOPE, False)", "aten.leaky_relu_backward(dh, z, 0.0, False)", ACCURATE),
    },
    "fastpeft/ops/bottleneck.py": {
        "autocast narrows the residual": ("own and x.dtype == wanted, x.to(wanted)", "own, x.to(wanted)", AUTOCAST),
        "the residual has no gradient": ("dy if ctx.need_residual else None", "None", INTEGERS),
    },
    "fastpeft/ops/bottleneck_arguments.py": {
        "one seed drawn for every slot": ("torch.randint(1 << 62, (count,)", "torch.zeros((count,)", SEEDS),
        "any number of scales": ("if scale.shape[-1] not in (1, sizes[\"N\"]):", "if False:", CALLS),
    },
    "fastpeft/nn/bottleneck.py": {
        "the gate is not averaged": ("y * gate.mean(1, keepdim=True).to(y.dtype)", "y * gate.to(y.dtype)", FORMULA),
        "the residual goes after the norm": ("before = self.residual_first and not self.parallel", "before = not self.residual_first and not self.parallel", FORMULA),
        "dropout when evaluating": ("dropout = self.dropout if self.training else 0.0", "dropout = self.dropout", TRAINING),
        "a parallel adapter adds x": ("if residual is None and not self.parallel:", "if residual is None:", FORMULA),
    },
}  # fmt: skip
