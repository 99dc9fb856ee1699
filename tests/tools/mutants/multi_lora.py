# ruff: noqa: E501
"""Mutants of multi_lora and of routing, as run.py says."""

GUARDS = "tests/ops/multi_lora/test_memory.py::test_nothing_is_read_or_written_outside"
OFFSETS = "tests/ops/multi_lora/test_memory.py::test_offsets_are_64_bit[triton]"
STRIDES = "tests/ops/multi_lora/test_memory.py::test_any_strides"
CUT = "tests/ops/multi_lora/test_multi_lora.py::test_integers_are_exact_where_sums_are_cut"
RANKS = "tests/ops/multi_lora/test_edges.py::test_ranks"
TRUE_RANKS = "tests/ops/multi_lora/test_edges.py::test_true_ranks_from_0_to_all"
ROUTING = "tests/ops/test_routing.py::test_is_a_stable_sort_cut_into_tiles"
TABLES = "tests/ops/multi_lora/test_edges.py::test_shared_and_separate_tables_agree"
UNUSED = "tests/ops/multi_lora/test_edges.py::test_what_an_unused_slot_holds_does_not_leak"
ALONE = "tests/ops/multi_lora/test_multi_lora.py::test_every_adapter_trains_as_if_alone"
INTEGERS = "tests/ops/multi_lora/test_multi_lora.py::test_integers_are_exact"
SEEDS = "tests/ops/multi_lora/test_edges.py::test_seeds_are_drawn_where_none_are_given"
NAN = "tests/ops/multi_lora/test_edges.py::test_nan_of_one_adapter_harms_no_other"
WORK = "tests/ops/multi_lora/test_memory.py::test_work_ends_at_the_true_rank"
SLICES = "tests/ops/multi_lora/test_memory.py::test_slices_of_different_strides"
FEWEST = "tests/ops/multi_lora/test_edges.py::test_the_last_slot_has_the_fewest_tokens"
NO_SLOT = "tests/ops/test_routing.py::test_kernels_take_it_for_none"

TESTS = (
    GUARDS,
    ROUTING,
    "tests/ops/multi_lora/test_multi_lora.py::test_the_definition_is_the_formula",
    "tests/ops/multi_lora/test_edges.py::test_who_is_in_the_batch",
    "tests/ops/multi_lora/test_edges.py::test_hardly_a_batch",
    "tests/ops/multi_lora/test_edges.py::test_300_slots_and_only_some_used",
    "tests/ops/multi_lora/test_memory.py::test_in_place_writes_only_tokens_that_have_an_adapter",
    "tests/ops/multi_lora/test_edges.py::test_in_place",
    "tests/ops/multi_lora/test_edges.py::test_what_is_trained",
    "tests/ops/multi_lora/test_torch.py::test_bad_calls",
    "tests/ops/multi_lora/test_torch.py::test_a_bad_call_in_place_writes_nothing",
    TRUE_RANKS,
    TABLES,
    UNUSED,
    RANKS,
    CUT,
    ALONE,
    STRIDES,
    INTEGERS,
    OFFSETS,
)

MUTANTS = {
    "kernels/routing.py": {
        "ties in any order": ("(k[None, :] < m[:, None])", "(k[None, :] > m[:, None])"),
        "tokens without an adapter first": ("tl.where((slot >= 0) & (slot < SLOTS), slot, SLOTS)", "tl.where((slot >= 0) & (slot < SLOTS), slot, -1)"),
        "slots that do not exist": ("tl.where((slot >= 0) & (slot < SLOTS), slot, SLOTS)", "tl.where(slot >= 0, slot, SLOTS)", NO_SLOT),
        "negative slots": ("tl.where((slot >= 0) & (slot < SLOTS), slot, SLOTS)", "tl.where((slot == -1) | (slot >= SLOTS), SLOTS, slot)", NO_SLOT),
        "last block of tokens not counted": ("for k0 in range(0, T, BLOCK_K):", "for k0 in range(0, T // BLOCK_K * BLOCK_K, BLOCK_K):"),
        "last start not written": ("(m >= T) & (m <= T + SLOTS)", "(m >= T) & (m < T + SLOTS)"),
        "unused tiles not marked": ("    tl.store(tiles_ptr + m, none, mask=m < TILES)\n", ""),
        "every token starts a tile": ("(key < SLOTS) & (within % TILE == 0)", "(key < SLOTS) & (within % 1 == 0)"),
        "only full tiles": ("tiles = (stop - start + TILE - 1) // TILE", "tiles = (stop - start) // TILE"),
        "tiles of the slot itself counted": ("tl.where(k[None, :] < key[:, None], tiles[None, :], 0)", "tl.where(k[None, :] <= key[:, None], tiles[None, :], 0)"),
        "stride of the slots ignored": ("token_slots_ptr + k.to(tl.int64) * stride", "token_slots_ptr + k.to(tl.int64)", "tests/ops/test_routing.py::test_any_integers_and_strides"),
    },
    "fastpeft/ops/routing.py": {
        "no look at the slots": ("if lowest < -1 or highest >= slots:", "if False:", "tests/ops/test_routing.py::test_a_slot_that_does_not_exist"),
        "always small tiles": ("if token_slots.numel() <= DECODE_TOKENS else TILES[1]", "if True else TILES[1]", "tests/ops/test_routing.py::test_few_tokens_take_small_tiles"),
    },
    "fastpeft/reference/routing.py": {
        "unstable": ("torch.argsort(key, stable=True)", "len(key) - 1 - torch.argsort(key.flip(0), stable=True)"),
        "too little room": ("return used + (tokens - used) // tile", "return max(1, tokens // tile)"),
        "tiles of another slot": ("torch.searchsorted(ends, index, right=True)", "torch.searchsorted(ends, index, right=False)"),
    },
    "kernels/multi_lora.py": {
        # shrink
        "shrink: slot 0 for all": ("a_tile = a_ptrs[0] + slot * strides_as[0]", "a_tile = a_ptrs[0] + 0 * strides_as[0]"),
        "shrink: slot 0 for the other slices": ("other = a_ptrs[p] + slot * strides_as[p]", "other = a_ptrs[p] + 0 * strides_as[p]"),
        "shrink: rows taken as sorted": ("x_tile = x_ptr + token[:, None] * stride_xm + k[None, :] * stride_xk  #", "x_tile = x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk  #"),
        "shrink: columns of a slice one late": ("mine, r = column >= firsts[p], column - firsts[p]", "mine, r = column > firsts[p], column - firsts[p]"),
        "shrink: rank of the first slice": ("r < _rank(rank_ptr, p * stride_rank + slot, sizes[p], RANKS)", "r < _rank(rank_ptr, slot, sizes[p], RANKS)"),
        "shrink: true rank ignored": ("r_ok = column < _rank(rank_ptr, slot, sizes[0], RANKS)", "r_ok = column < sizes[0]", WORK),
        "shrink: scale of the first slice": ("tl.where(mine, tl.load(scale_ptr + p * stride_scale + slot), scale)", "tl.where(mine, tl.load(scale_ptr + slot), scale)"),
        "shrink: no scale": ("tl.store(s_tile, acc * scale[None, :],", "tl.store(s_tile, acc,"),
        "shrink: scale of slot 0": ("tl.full((BLOCK_R,), 1.0, ACC) * tl.load(scale_ptr + slot)", "tl.full((BLOCK_R,), 1.0, ACC) * tl.load(scale_ptr)"),
        "shrink: parts overlap": ("for k0 in range(first, tl.minimum(first + SPAN, K), BLOCK_K):", "for k0 in range(first, K, BLOCK_K):", CUT),
        "shrink: last block skipped": ("for k0 in range(first, tl.minimum(first + SPAN, K), BLOCK_K):", "for k0 in range(first, tl.minimum(first + SPAN, K) // BLOCK_K * BLOCK_K, BLOCK_K):"),
        "shrink: no mask on columns": ("k_ok = k0 + tl.arange(0, BLOCK_K) < K", "k_ok = k0 + tl.arange(0, BLOCK_K) >= 0"),
        "shrink: A's step of the first slice": ("step = tl.where(mine, block_k * strides_ak[p], step)", "step = step", SLICES),
        "shrink: 32-bit step": ("block_k = tl.full((BLOCK_R,), BLOCK_K, tl.int64)", "block_k = tl.full((BLOCK_R,), BLOCK_K, tl.int32)", OFFSETS),
        "shrink: x's 32-bit step": ("x_step = tl.full((), BLOCK_K, tl.int64) * stride_xk", "x_step = tl.full((), BLOCK_K, tl.int32) * stride_xk", OFFSETS),
        "shrink: mask counts all tokens": ("threshold, m - start, k0, BLOCK_K)", "threshold, m, k0, BLOCK_K)"),
        "shrink: dropout not applied": ("kept = tl.where(keep, x, 0.0).to(a.dtype)", "kept = x.to(a.dtype)"),
        "shrink: one seed for all slices": ("tl.load(seed_ptr + p * stride_seed + slot), threshold, m - start, k0", "tl.load(seed_ptr + slot), threshold, m - start, k0"),
        "shrink: slices mixed": ("a_p = tl.where(mine[None, :], a, 0.0).to(a.dtype)", "a_p = a"),
        "shrink: no 1 / (1 - p)": ("        scale = scale * _inverse_keep(threshold_ptr, slot, ACC)\n", "        scale = scale\n"),
        "shrink: columns of other slots written": ("mask=m_ok[:, None] & r_ok[None, :])\n\n\n@triton.jit\ndef _inverse_keep", "mask=r_ok[None, :] & (m >= 0)[:, None])\n\n\n@triton.jit\ndef _inverse_keep"),
        "rank not bounded": ("rank = tl.minimum(tl.maximum(tl.load(rank_ptr + index), 0), largest)", "rank = tl.load(rank_ptr + index)", TRUE_RANKS),
        # expand
        "expand: slot 0 for all": ("b_ptrs[p] + slot * strides_bs[p]", "b_ptrs[p]"),
        "expand: only the first ranks": ("for r0 in range(0, rank, BLOCK_R):", "for r0 in range(0, tl.minimum(rank, BLOCK_R), BLOCK_R):", RANKS),
        "expand: one plane": ("for plane in tl.static_range(1, PLANES):", "for plane in tl.static_range(1, 1):", CUT),
        "expand: S of the first slice": ("s_ptr + firsts[p] * stride_sr", "s_ptr"),
        "expand: y overwritten": ("tl.load(y_tile, mask=y_ok, other=0.0).to(ACC) + acc, mask=y_ok", "acc, mask=y_ok"),
        "expand: rows taken as sorted": ("y_tile = y_ptrs[p] + token[:, None] * strides_ym[p]", "y_tile = y_ptrs[p] + m[:, None] * strides_ym[p]"),
        "expand: tokens of the next slot written": ("y_ok = m_ok[:, None] & (k < widths[p])[None, :]", "y_ok = (m >= 0)[:, None] & (k < widths[p])[None, :]"),
        "expand: last columns written twice": ("if (block >= 0) & (block * BLOCK_K < widths[p]):", "if block * BLOCK_K < widths[p]:"),
        "expand: width of the first slice": ("y_ok = m_ok[:, None] & (k < widths[p])[None, :]", "y_ok = m_ok[:, None] & (k < widths[0])[None, :]"),
        "expand: y's stride ignored": ("token[:, None] * strides_ym[p] + k[None, :] * strides_yk[p]", "token[:, None] * strides_ym[p] + k[None, :]", STRIDES),
        # dX
        "dX: only the last slice": ("                total += acc\n", "                total = acc\n"),
        "dX: mask not applied": ("acc = tl.where(keep, acc * _inverse_keep(threshold_ptr, slot, ACC), 0.0)", "acc = acc * _inverse_keep(threshold_ptr, slot, ACC)"),
        "dX: no 1 / (1 - p)": ("acc = tl.where(keep, acc * _inverse_keep(threshold_ptr, slot, ACC), 0.0)", "acc = tl.where(keep, acc, 0.0)"),
        "dX: mask of the first columns": ("threshold, m - start, block * BLOCK_K, BLOCK_K)", "threshold, m - start, block * 0, BLOCK_K)"),
        "dX: base tokens not zero": ("torch.zeros_like(x, memory_format=torch.contiguous_format)", "torch.ones_like(x, memory_format=torch.contiguous_format)"),
        # dA, dB
        "outer: another slot's tokens": ("start, stop = tl.load(starts_ptr + slot), tl.load(starts_ptr + slot + 1)", "start, stop = tl.load(starts_ptr), tl.load(starts_ptr + slot + 1)"),
        "outer: last block skipped": ("for m0 in range(start, stop, BLOCK_M):", "for m0 in range(start, stop - BLOCK_M + 1, BLOCK_M):"),
        "outer: rows taken as sorted": ("x_tile = x_ptr + token[:, None] * stride_xm + k[None, :] * stride_xk\n        s_tile", "x_tile = x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk\n        s_tile"),
        "outer: tokens of the next slot": ("x = tl.load(x_tile, mask=(m < stop)[:, None] & (k < K)[None, :], other=0.0)", "x = tl.load(x_tile, mask=(m >= 0)[:, None] & (k < K)[None, :], other=0.0)", NAN),
        "outer: mask not applied": ("            x = tl.where(keep, x, 0.0)\n", ""),
        "outer: no 1 / (1 - p)": ("        acc = acc * _inverse_keep(threshold_ptr, slot, ACC)\n", "        acc = acc * 1.0\n"),
        "outer: rank blocks repeated": ("r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)\n    r_ok", "r = tl.arange(0, BLOCK_R)\n    r_ok", RANKS),
        # launchers
        "dB: only the first plane": ("s = s[0] if s.shape[0] == 1 else s.sum(0)", "s = s[0]", CUT),
        "dS: dropout of x on dY": ("    slots, ds, dbs = slots._replace(thresholds=None), None, None\n", "    ds, dbs = None, None\n"),
        "dS: only the first plane": ("torch.sum(partial, 0, keepdim=True, out=ds_p)", "ds_p.copy_(partial[:1])", CUT),
    },
    "fastpeft/reference/multi_lora.py": {
        "definition: no scale": ("lora_b[slot, :, :rank], None, scale, *drop)", "lora_b[slot, :, :rank], None, 1.0, *drop)"),
        "definition: full rank": ("rank = lora_a.shape[1] if ranks is None else int(ranks[slot])", "rank = lora_a.shape[1]"),
        "shrink: scale of the first slots": ("slots.scales[group.chosen].view(-1, 1, 1)", "slots.scales[: len(group.slots)].view(-1, 1, 1)"),
        "shrink: no dropout": ("None if of_p.thresholds is None else _drop(x_g, group, of_p)", "None"),
        "add_: x of the first group": ("gathered.get(id(group))", "next(iter(gathered.values()), None)", "tests/ops/multi_lora/test_edges.py::test_in_place"),
        "dX: no 1 / (1 - p)": (".to(ds.dtype)).mul_(factor)\n            total", ".to(ds.dtype))\n            total"),
        "outer: no 1 / (1 - p)": ("(s[rows, :rank].T @ x_s).mul_(factor)", "s[rows, :rank].T @ x_s"),
        "outer: mask not applied": ("        x_s = x[rows] if mask is None else mask.mul_(x[rows])\n        g[", "        x_s = x[rows]\n        g["),
    },
    "fastpeft/reference/slot_groups.py": {
        "padding taken for tokens": ("values.index_select(0, self.real)", "values[: len(self.real)]"),
        "groups: ranks mixed": ("by_rank.setdefault(rank, [])", "by_rank.setdefault(largest, [])"),
        "groups: first slots": ("chosen = slice(slots[0], slots[-1] + 1)", "chosen = slice(0, len(slots))"),
        "groups: slots between": ("if slots[-1] - slots[0] == len(slots) - 1:", "if True:"),
        "groups: no padding": ("min(start + i, stop - 1)", "start + i", FEWEST),
    },
    "fastpeft/ops/multi_lora.py": {
        "y modified": ("y.clone(memory_format=torch.contiguous_format) if y.dim() == 2", "y if y.dim() == 2"),
        "y not differentiated": ("dys if need_dy else [None] * count", "[None] * count"),
        "ranks dropped": ("(table if table.numel() else None for table in (ranks, thresholds, seeds))", "(table if table.numel() else None for table in (ranks[:0], thresholds, seeds))"),
        "x kept where it is not needed": ("ctx.save_for_backward(x if need_da else absent,", "ctx.save_for_backward(absent,"),
    },
    "fastpeft/ops/multi_lora_arguments.py": {
        "gradient in place": ("if torch.is_grad_enabled() and any(", "if False and any("),
        "routing of another batch": ("if routing.slots != slots or", "if False and routing.slots != slots or", "tests/ops/multi_lora/test_torch.py::test_a_routing_of_another_batch"),
        "one seed for all slices": ("shape = (slots,) if count == 1 else (count, slots)", "shape = (slots,)", SEEDS),
    },
}  # fmt: skip
