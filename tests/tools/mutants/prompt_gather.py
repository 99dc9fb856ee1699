"""Mutants of prompt_gather, as run.py says."""

EXACT = "tests/ops/prompt_gather/test_prompt_gather.py::test_integers_are_exact"
GUARDS = "tests/ops/prompt_gather/test_memory.py::test_nothing_is_read_or_written_outside"
STRIDES = "tests/ops/prompt_gather/test_memory.py::test_any_strides"
OTHERS = "tests/ops/prompt_gather/test_memory.py::test_any_strides_of_the_other_operands"
LONG = "tests/ops/prompt_gather/test_prompt_gather.py::test_a_mask_longer_than_one_read"
SHARED = "tests/ops/prompt_gather/test_prompt_gather.py::test_rows_that_share_a_prompt_add_up_in_their_order"
EXISTS = "tests/ops/prompt_gather/test_torch.py::test_kernels_keep_to_what_exists"
BAD = "tests/ops/prompt_gather/test_torch.py::test_bad_calls"
EDGES = "tests/ops/prompt_gather/test_prompt_gather.py::test_hardly_a_batch"
POSITIONS = "tests/ops/prompt_gather/test_prompt_gather.py::test_positions_that_are_given"
OFFSETS = "tests/ops/prompt_gather/test_memory.py::test_offsets_are_64_bit[triton]"

TESTS = (
    "tests/ops/prompt_gather/test_prompt_gather.py::test_the_definition_is_the_formula",
    EXACT,
    EXISTS,
    LONG,
    SHARED,
    POSITIONS,
    "tests/ops/prompt_gather/test_prompt_gather.py::test_integers_of_any_kind",
    "tests/ops/prompt_gather/test_prompt_gather.py::test_one_table_with_lengths",
    "tests/ops/prompt_gather/test_prompt_gather.py::test_error_against_float64",
    EDGES,
    GUARDS,
    BAD,
    OTHERS,
    STRIDES,
    "tests/ops/prompt_gather/test_memory.py::test_keeps_four_integers_a_row",
    "tests/ops/prompt_gather/test_prompt_gather.py::test_a_trained_embedding_gets_the_gradient_of_torch",
    "tests/ops/prompt_gather/test_torch.py::test_what_does_not_exist",
    "tests/ops/prompt_gather/test_torch.py::test_opcheck",
)

MUTANTS = {
    "kernels/prompt_gather.py": {
        "_gather_kernel": {
            "mask: last read only": (
                "minimum(first, tl.min(tl.where(on, t, T), 0))",
                "min(tl.where(on, t, T), 0)",
                LONG,
            ),
            "mask: end of the last read only": (
                "maximum(stop, tl.max(tl.where(on, t + 1, 0), 0))",
                "max(tl.where(on, t + 1, 0), 0)",
                LONG,
            ),
            "mask: past its end": ("=t < T, other", "=t < T + 1, other", GUARDS),
            "mask: the last token is not one": (", t + 1,", ", t,"),
            "mask: holes filled": ("read.to(tl.int64)", "on"),
            "mask: a row of padding alone": ("first = tl.minimum(first, stop)", ""),
            "own padding kept": ("first + token", "token"),
            "prompts that do not exist": ("(p >= 0) & (p < N)", "p >= 0", EXISTS),
            "-1 is the last prompt": ("(p >= 0) & (p < N)", "p < N", EXISTS),
            "first prompt for all": ("start = tl.load(starts_ptr + p,", "start = tl.load(starts_ptr + p * 0,"),
            "left as right": ("W - size - count", "0"),
            "left without the prompt": ("size - count", "count"),
            "rows: offset not kept": (", offset", ", offset * 0"),
            "rows: written by nobody": ("pid_m == 0:", "pid_m == 1:", EXISTS),
            "positions without the prompt": ("number + size", "number"),
            "positions of prompts": ("tl.where(prompted, place, 0)", "0"),
            "positions given, not read": ("if POSITIONS", "if POSITIONS and MASK and LEFT", POSITIONS),
            "labels over prompts": ("tl.where(inside, label, IGNORE)", "label"),
            "labels of another row": ("* stride_lb", "* 0 * stride_lb"),
            "vocabulary has no end": ("(at >= 0) & (at < V)", "(at >= 0)", EXISTS),
            "negative tokens": ("(at >= 0) & (at < V)", "(at < V)", EXISTS),
            "a wrong token is padding": ('tl.where((inside & (found == 0))[:, None], float("nan"), y)', "y", EXISTS),
            "only the first block of columns": (
                "range(0, D, BLOCK_K)",
                "range(0, tl.minimum(D, BLOCK_K), BLOCK_K)",
                EDGES,
            ),
            "gather: columns past the end": ("(k < D)[None, :]", "(k < D + 8)[None, :]", GUARDS),
            "gather: places past the end": ("(m < W)[:, None]", "(m < W + 8)[:, None]", GUARDS),
            "gather: stride of the columns of the prompts": ("[None, :] * stride_pd", "[None, :]", OTHERS),
            "gather: stride of the columns of x": (
                "stride_xb + at[:, None] * stride_xt + k[None, :] * stride_xd",
                "stride_xb + at[:, None] * stride_xt + k[None, :]",
                OTHERS,
            ),
            "gather: stride of prompt_ids": ("b * stride_prompt", "b", OTHERS),
        },
        "_prompt_backward_kernel": {
            "dprompt: rows of every prompt": (
                "tl.where(tl.load(rows_ptr + b * FIELDS + PROMPT) == p, size, 0)",
                "size",
                EXACT,
            ),
            "dprompt: row's offset ignored": ("(offset + m)", "m", EXACT),
            "dprompt: parts overlap": ("tl.minimum(first + SPAN, B)", "B", SHARED),
            "dprompt: last row of a part lost": (
                "(first, tl.minimum(first + SPAN, B))",
                "(first, tl.minimum(first + SPAN, B) - 1)",
                SHARED,
            ),
            "dprompt: only the first tile": ("* BLOCK_M", "* 0"),
            "dprompt: sums in the gradient's dtype": (
                "+= tl.load(dy_tile, mask=(m < rows)[:, None] & (k < D)[None, :], other=0.0)",
                "= (acc + tl.load(dy_tile, mask=(m < rows)[:, None] & (k < D)[None, :], other=0.0))"
                ".to(dy_ptr.dtype.element_ty)",
                "tests/ops/prompt_gather/test_prompt_gather.py::test_error_against_float64",
            ),
            "dprompt: another prompt's rows written": ("(m < size)", "(m < BLOCK_M)", GUARDS),
            "dprompt: stride of the columns": ("[None, :] * stride_yk", "[None, :]", STRIDES),
        },
        "_source_backward_kernel": {
            "dx: without the prompt": ("size + m", "m"),
            "dx: first token ignored": ("m - first", "m"),
            "dx: padding gets a gradient": ("(m >= first) & (m < first + count)", "m >= first"),
            "dx: past its end": ("(m < T)[:, None]", "(m < T + 8)[:, None]", GUARDS),
        },
    },
    "fastpeft/reference/prompt_gather.py": {
        "prompt_gather": {
            "definition: holes end a row": ("[-1] + 1", "[0] + len(on)"),
            "definition: positions without the prompt": ("[b, first:stop] + length", "[b, first:stop]"),
        },
        "_pad": {
            "definition: padding in front always": ("[padding, row] if left else [row, padding]", "[padding, row]"),
        },
        "_spans": {
            "steps: a row of padding alone": (
                "torch.minimum(first, stop), (stop - first).clamp(min=0)",
                "first, stop - first",
            ),
        },
        "forward": {
            "steps: prompt of another length": (
                "([*lengths, 0], device=used.device)[used]",
                "([*lengths, 0], device=used.device)[used.clamp(min=0)]",
            ),
            "steps: padding is not written": ("y[(~(inside | prompted)).nonzero(as_tuple=True)] = 0", "", EXACT),
        },
        "_put": {
            "steps: prompts over padding in front": ("offset : offset + size", ":size", EXACT),
            "steps: all rows of a prompt": (
                "(None) if len(rows) == len(spans) else torch.tensor(rows, device=y.device)",
                "(None)",
                EXACT,
            ),
        },
        "_look_up": {
            "steps: the first row's tokens": (
                "at + torch.arange(b, device=at.device)[:, None] * source.shape[1]",
                "at",
                EXACT,
            ),
        },
        "prompt_backward": {
            "steps: one offset for all rows of a prompt": ("(p, offset), []", "(p, 0), []"),
            "steps: sums in the gradient's dtype": (
                "0, dtype=wide",
                "0",
                "tests/ops/prompt_gather/test_prompt_gather.py::test_error_against_float64",
            ),
        },
        "source_backward": {
            "steps: dx where the prompt was": ("offset + (lengths[p] if p >= 0 else 0)", "offset"),
        },
    },
    "fastpeft/ops/prompt_gather.py": {
        "_implementation": {
            "no look at the prompts' numbers": (
                "prompt_ids, -1, len",
                "prompt_ids, -9, len",
                "tests/ops/prompt_gather/test_torch.py::test_what_does_not_exist",
            ),
            "no look at the tokens": (
                ") == 2:\n            _within",
                ") == 3:\n            _within",
                "tests/ops/prompt_gather/test_torch.py::test_what_does_not_exist",
            ),
        },
        "prompt_gather": {
            "a trained embedding is frozen": (
                "inputs_embeds is None and source.requires_grad and torch.is_grad_enabled()",
                "False",
                "tests/ops/prompt_gather/test_prompt_gather.py::test_a_trained_embedding_gets_the_gradient_of_torch",
            ),
        },
        "_setup_context": {
            "dx always": ("source.requires_grad", "False"),
        },
    },
    "fastpeft/ops/prompt_gather_arguments.py": {
        "rows": {
            "width of the longest prompt of all": (
                "(lengths[p] for p in found if p >= 0)",
                "lengths",
                "tests/ops/prompt_gather/test_prompt_gather.py::test_a_row_gets_what_it_gets_alone",
            ),
        },
        "table": {
            "lengths do not add up": ("sum(lengths) != prompts.shape[0]", "False", BAD),
            "prompts of mixed dtypes": (
                '_check.dtype("prompt_gather", f"prompts[{i}]", prompt, prompts[0].dtype)',
                "pass",
                BAD,
            ),
        },
    },
}
