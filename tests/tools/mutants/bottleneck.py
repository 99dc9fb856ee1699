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
        "rows_of": {
            "a row without mask": ("= m < M,", "= m <= M,", GUARDS),
            "the mask counts the batch's rows": ("m - tl.load(starts_ptr + slot)", "m", ALONE),
            "a slot runs into the next": ("= m < tl.", "= m <= tl.", WHO),
        },
        "activate": {
            "leaky_relu's slope": (", 0.01 * z", ", 0.02 * z", ACTIVATIONS),
        },
        "slope": {
            "silu's derivative": ("(1.0 + z * (1.0 - s))", "(1.0 + z * s)", ACTIVATIONS),
            "gelu's derivative without density": ("3989422804014327", "4989422804014327", GRADCHECK),
        },
        "tanh": {
            "tanh near 0 by exp alone": ("(z) < 0.625", "(z) < 0.0", NEAR),
        },
        "row_stats": {
            "a block's mean is forgotten": ("square += delta * delta * (k0 * share)", "", FAR),
            "an unscaled mean": ("delta * share", "delta", ACCURATE),
            "padding in the deviation": (
                "tl.where((k < K)[None, :], x - part[:, None], 0.0)",
                "x - part[:, None]",
                ACCURATE,
            ),
            "no eps": ("(square / K + eps)", "(square / K + eps * 100)", ACCURATE),
        },
        "project": {
            "the norm's bias is dropped": ("not None", "None", ACCURATE),
            "D's last columns": ("mask=k_ok[:, None]", "mask=(k <= K)[:, None]", GUARDS),
        },
        "finish": {
            "the residual is dropped too": ("u += tl.load(res_ptr", "u = tl.load(res_ptr", INTEGERS),
            "a 32-bit offset of the residual": (
                "row[:, None] * stride_res[0]",
                "(row[:, None] * stride_res[0]).to(tl.int32)",
                OFFSETS,
            ),
            "y's last column": ("& (n < N)", "& (n <= N)", GUARDS),
        },
    },
    "kernels/bottleneck.py": {
        "_fused_kernel": {
            "no bias in one kernel": ("activate(z, ACTIVATION)", "activate(z * 2, ACTIVATION)", ONE_KERNEL),
        },
        "_hidden_up_kernel": {
            "the last hidden block": ("range(0, R, BLOCK_R)", "range(0, R - BLOCK_R + 1, BLOCK_R)", WIDTHS),
            "slot 0's U for everyone": ("slot * stride_u[0] + r", "r", WHO),
        },
        "_hidden_kernel": {
            "statistics of the first program only in part": ("pid_r + pid_p == 0)", "pid_r + pid_p == 1)", ACCURATE),
        },
        "forward": {
            "rows without an adapter are 0": (
                "residual.clone(memory_format=torch.contiguous_format)",
                "torch.zeros_like(residual)",
                WHO,
            ),
        },
    },
    "kernels/bottleneck_parts.py": {
        "_finish_kernel": {
            "a part is skipped": ("range(0, parts)", "range(1, parts)", CUT),
        },
        "finish": {
            "hidden values are not activated": ("activate(z, ACTIVATION)", "z", ACCURATE),
            "the factor is forgotten in dz": ("tl.load(numbers_ptr + FACTOR) * slope", "slope", INTEGERS),
        },
    },
    "kernels/bottleneck_backward.py": {
        "_hidden_backward_kernel": {
            "the parts of dy overlap": ("tl.minimum(pid_p * SPAN + SPAN, N), BLOCK_K", "N, BLOCK_K", CUT),
            "the mask is forgotten in dz": ("drawn, n0, BLOCK_K), g, 0.0).", "drawn, n0, BLOCK_K), g, g).", INTEGERS),
            "the scale is forgotten in dz": ("not None", "None", INTEGERS),
        },
        "_dx_kernel": {
            "the mean is not taken out": ('= "layer":', '= "rms":', ACCURATE),
            "dx without the deviation": ("dx *= rstd[:, None]", "", ACCURATE),
            "dy is not added": (":\n        dx +=", ":\n        dx -=", INTEGERS),
        },
        "_weight_gradient_kernel": {
            "the factor is forgotten in d(up)": ("acc *= factor", "", INTEGERS),
            "the mask in d(up)": ("BLOCK_K, BLOCK_K), x, 0.0).", "BLOCK_K, BLOCK_K), x, x).", INTEGERS),
            "d(up)'s rows of all slots": ("(starts_ptr + pid_p)", "(starts_ptr)", WHO),
        },
        "run": {
            "the norm's bias in d(down)": (
                "ddown += total[..., None] * weights.norm_bias[..., None, :]",
                "pass",
                ACCURATE,
            ),
            "d(scale) without the bias": (
                "dscale if weights.up_bias is None else dscale + dup_bias * weights.up_bias",
                "dscale",
                INTEGERS,
            ),
        },
        "_hidden_backward": {
            "half of the means": ("means.sum(0)", "means[0]", ACCURATE),
        },
    },
    "fastpeft/reference/bottleneck.py": {
        "_branch": {
            "the mask is not scaled": (
                "mask * inverse_keep(settings.dropout)",
                "mask",
                "tests/ops/bottleneck/test_bottleneck.py::test_the_definition_element_by_element",
            ),
        },
        "needs_x": {
            "x is kept for nothing": ("need_down or need_norm or need_norm_bias or (norm and need_x)", "True", FROZEN),
        },
        "_forward": {
            "rounded twice at the residual": (".mul_(mask)", "", INTEGERS),
        },
    },
    "fastpeft/reference/bottleneck_backward.py": {
        "_dx": {
            "dx without dy": ("(dy, dz, down)", "(dy, dz, down, beta=0)", INTEGERS),
        },
        "run": {
            "dx of a norm without dy": ("(dx.add_(dy) if settings.own else dx)", "dx", ACCURATE),
        },
        "_through_norm": {
            "another norm's direction": (
                "(da * unit).mean(1, keepdim=True)",
                "(da * unit).sum(1, keepdim=True)",
                ACCURATE,
            ),
            "a norm's weight is left out": ("(unit.dtype) * given(norm_weight)", "(unit.dtype)", ACCURATE),
            "d(norm_weight) from x itself": ("dnorm = (da * unit)", "dnorm = (da * x)", ACCURATE),
        },
        "_sum_of_products": {
            "the last rows of d(up) under a learned scale": ("rows == len(g)", "True", INTEGERS),
        },
        "_derivative": {
            "leaky slope of 0": ("LEAKY_SLOPE", "0.0", ACCURATE),
        },
    },
    "fastpeft/ops/bottleneck.py": {
        "bottleneck": {
            "autocast narrows the residual": ("own and x.dtype == wanted", "own", AUTOCAST),
        },
        "_backward": {
            "the residual has no gradient": ("dy if ctx.need_residual else None", "None", INTEGERS),
        },
    },
    "fastpeft/ops/bottleneck_arguments.py": {
        "seed": {
            "one seed drawn for every slot": ("randint(1 << 62, (count,)", "zeros((count,)", SEEDS),
        },
        "weights": {
            "any number of scales": ('scale.shape[-1] not in (1, sizes["N"])', "False", CALLS),
        },
    },
    "fastpeft/nn/bottleneck.py": {
        "BottleneckAdapter.forward": {
            "the gate is not averaged": ("mean(1, keepdim=True).", "", FORMULA),
            "the residual goes after the norm": ("before = self", "before = not self", FORMULA),
            "dropout when evaluating": ("dropout if self.training else 0.0", "dropout", TRAINING),
            "a parallel adapter adds x": ("None and not self.parallel", "None", FORMULA),
        },
    },
}
