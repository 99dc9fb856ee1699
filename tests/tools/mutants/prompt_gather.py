# ruff: noqa: E501
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
        "mask: last read only": ("first = tl.minimum(first, tl.min(tl.where(on, t, T), 0))", "first = tl.min(tl.where(on, t, T), 0)", LONG),
        "mask: end of the last read only": ("stop = tl.maximum(stop, tl.max(tl.where(on, t + 1, 0), 0))", "stop = tl.max(tl.where(on, t + 1, 0), 0)", LONG),
        "mask: past its end": ("+ t * stride_mt, mask=t < T, other=0) != 0", "+ t * stride_mt, mask=t < T + 1, other=0) != 0", GUARDS),
        "mask: the last token is not one": ("tl.max(tl.where(on, t + 1, 0), 0)", "tl.max(tl.where(on, t, 0), 0)"),
        "mask: holes filled": ("on = tl.where(inside, read.to(tl.int64), on)", "on = tl.where(inside, on, on)"),
        "mask: a row of padding alone": ("        first = tl.minimum(first, stop)\n", ""),
        "own padding kept": ("t = first + token", "t = token"),
        "prompts that do not exist": ("known = (p >= 0) & (p < N)", "known = p >= 0", EXISTS),
        "-1 is the last prompt": ("known = (p >= 0) & (p < N)", "known = p < N", EXISTS),
        "first prompt for all": ("start = tl.load(starts_ptr + p, mask=known, other=0)\n    size = tl.load(starts_ptr + p + 1, mask=known, other=0) - start\n    offset = tl.zeros", "start = tl.load(starts_ptr + p * 0, mask=known, other=0)\n    size = tl.load(starts_ptr + p + 1, mask=known, other=0) - tl.load(starts_ptr + p, mask=known, other=0)\n    offset = tl.zeros"),
        "left as right": ("        offset += W - size - count\n", "        offset += 0\n"),
        "left without the prompt": ("offset += W - size - count", "offset += W - count"),
        "rows: offset not kept": ("tl.store(rows_ptr + b * 4 + 1, offset)", "tl.store(rows_ptr + b * 4 + 1, offset * 0)"),
        "rows: written by nobody": ("if pid_m == 0:", "if pid_m == 1:", EXISTS),
        "positions without the prompt": ("tl.where(inside, number + size, ", "tl.where(inside, number, "),
        "positions of prompts": ("tl.where(prompted, place, 0))", "0)"),
        "positions given, not read": ("    if POSITIONS:\n        number", "    if POSITIONS and MASK and LEFT:\n        number", POSITIONS),
        "labels over prompts": ("tl.where(inside, label, IGNORE)", "label"),
        "labels of another row": ("labels_ptr + b * stride_lb", "labels_ptr + b * 0 * stride_lb"),
        "vocabulary has no end": ("found = inside & (at >= 0) & (at < V)", "found = inside & (at >= 0)", EXISTS),
        "negative tokens": ("found = inside & (at >= 0) & (at < V)", "found = inside & (at < V)", EXISTS),
        "a wrong token is padding": ("y = tl.where((inside & (found == 0))[:, None], float(\"nan\"), y).to(y.dtype)", "y = y.to(y.dtype)", EXISTS),
        "only the first block of columns": ("for k0 in range(0, D, BLOCK_K):", "for k0 in range(0, tl.minimum(D, BLOCK_K), BLOCK_K):", EDGES),
        "gather: columns past the end": ("ok = (k < D)[None, :]", "ok = (k < D + 8)[None, :]", GUARDS),
        "gather: places past the end": ("y, mask=(m < W)[:, None] & ok)", "y, mask=(m < W + 8)[:, None] & ok)", GUARDS),
        "gather: stride of the columns of the prompts": ("(start + place)[:, None] * stride_ps + k[None, :] * stride_pd", "(start + place)[:, None] * stride_ps + k[None, :]", OTHERS),
        "gather: stride of the columns of x": ("x_tile = x_ptr + b * stride_xb + at[:, None] * stride_xt + k[None, :] * stride_xd", "x_tile = x_ptr + b * stride_xb + at[:, None] * stride_xt + k[None, :]", OTHERS),
        "gather: stride of prompt_ids": ("prompt_ids_ptr + b * stride_prompt", "prompt_ids_ptr + b", OTHERS),
        "dprompt: rows of every prompt": ("rows = tl.where(tl.load(rows_ptr + b * 4) == p, size, 0)", "rows = size", EXACT),
        "dprompt: row's offset ignored": ("(offset + m)[:, None] * stride_ym", "m[:, None] * stride_ym", EXACT),
        "dprompt: parts overlap": ("range(first, tl.minimum(first + SPAN, B))", "range(first, B)", SHARED),
        "dprompt: last row of a part lost": ("range(first, tl.minimum(first + SPAN, B))", "range(first, tl.minimum(first + SPAN, B) - 1)", SHARED),
        "dprompt: only the first tile": ("m = pid_m % TILES * BLOCK_M + tl.arange(0, BLOCK_M)  # of the prompt", "m = pid_m % TILES * 0 + tl.arange(0, BLOCK_M)  # of the prompt"),
        "dprompt: sums in the gradient's dtype": ("acc += tl.load(dy_tile, mask=(m < rows)[:, None] & (k < D)[None, :], other=0.0).to(ACC)", "acc = (acc + tl.load(dy_tile, mask=(m < rows)[:, None] & (k < D)[None, :], other=0.0)).to(dy_ptr.dtype.element_ty).to(ACC)", "tests/ops/prompt_gather/test_prompt_gather.py::test_error_against_float64"),
        "dprompt: another prompt's rows written": ("tl.store(dp_tile, acc, mask=(m < size)[:, None] & (k < D)[None, :])", "tl.store(dp_tile, acc, mask=(m < BLOCK_M)[:, None] & (k < D)[None, :])", GUARDS),
        "dprompt: stride of the columns": ("dy_ptr + b * stride_yb + (offset + m)[:, None] * stride_ym + k[None, :] * stride_yk", "dy_ptr + b * stride_yb + (offset + m)[:, None] * stride_ym + k[None, :]", STRIDES),
        "dx: without the prompt": ("place = offset + size + m - first", "place = offset + m - first"),
        "dx: first token ignored": ("place = offset + size + m - first", "place = offset + size + m"),
        "dx: padding gets a gradient": ("inside = (m >= first) & (m < first + count)", "inside = m >= first"),
        "dx: past its end": ("dy, mask=(m < T)[:, None] & (k < D)[None, :])", "dy, mask=(m < T + 8)[:, None] & (k < D)[None, :])", GUARDS),
    },
    "fastpeft/reference/prompt_gather.py": {
        "definition: holes end a row": ("(on[0], on[-1] + 1) if on else (0, 0)", "(on[0], on[0] + len(on)) if on else (0, 0)"),
        "definition: padding in front always": ("torch.cat([padding, row] if left else [row, padding])", "torch.cat([padding, row])"),
        "definition: positions without the prompt": ("position_ids[b, first:stop] + length", "position_ids[b, first:stop]"),
        "steps: a row of padding alone": ("return torch.minimum(first, stop), (stop - first).clamp(min=0)", "return first, stop - first"),
        "steps: prompt of another length": ("size = torch.tensor([*lengths, 0], device=used.device)[used]", "size = torch.tensor([*lengths, 0], device=used.device)[used.clamp(min=0)]"),
        "steps: padding is not written": ("    y[(~(inside | prompted)).nonzero(as_tuple=True)] = 0\n", "", EXACT),
        "steps: prompts over padding in front": ("y[which, offset : offset + size]", "y[which, :size]", EXACT),
        "steps: the first row's tokens": ("at + torch.arange(b, device=at.device)[:, None] * source.shape[1]", "at", EXACT),
        "steps: all rows of a prompt": ("which = slice(None) if len(rows) == len(spans) else torch.tensor(rows, device=y.device)", "which = slice(None)", EXACT),
        "steps: one offset for all rows of a prompt": ("members.setdefault((p, offset), [])", "members.setdefault((p, 0), [])"),
        "steps: sums in the gradient's dtype": ("part.sum(0, dtype=wide)", "part.sum(0)", "tests/ops/prompt_gather/test_prompt_gather.py::test_error_against_float64"),
        "steps: dx where the prompt was": ("begin = offset + (lengths[p] if p >= 0 else 0)", "begin = offset"),
    },
    "fastpeft/ops/prompt_gather.py": {
        "no look at the prompts' numbers": ("_within(\"prompt_ids\", \"prompt\", prompt_ids, -1, len(lengths) - 1)", "_within(\"prompt_ids\", \"prompt\", prompt_ids, -9, len(lengths) - 1)", "tests/ops/prompt_gather/test_torch.py::test_what_does_not_exist"),
        "no look at the tokens": ("if ids.dim() == 2:\n            _within", "if ids.dim() == 3:\n            _within", "tests/ops/prompt_gather/test_torch.py::test_what_does_not_exist"),
        "a trained embedding is frozen": ("if inputs_embeds is None and source.requires_grad and torch.is_grad_enabled():", "if False:", "tests/ops/prompt_gather/test_prompt_gather.py::test_a_trained_embedding_gets_the_gradient_of_torch"),
        "dx always": ("ctx.needs = [prompts.requires_grad, source.requires_grad]", "ctx.needs = [prompts.requires_grad, False]"),
    },
    "fastpeft/ops/prompt_gather_arguments.py": {
        "width of the longest prompt of all": ("longest = max([0, *(lengths[p] for p in found if p >= 0)])", "longest = max([0, *lengths])", "tests/ops/prompt_gather/test_prompt_gather.py::test_a_row_gets_what_it_gets_alone"),
        "lengths do not add up": ("or sum(lengths) != prompts.shape[0]:", "or False:", BAD),
        "prompts of mixed dtypes": ("_check.dtype(\"prompt_gather\", f\"prompts[{i}]\", prompt, prompts[0].dtype)", "pass", BAD),
    },
}  # fmt: skip
