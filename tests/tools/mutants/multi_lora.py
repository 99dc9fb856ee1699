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
        "_sort_kernel": {
            "ties in any order": ("[None, :] < m[:, None]", "[None, :] > m[:, None]"),
            "last block of tokens not counted": ("range(0, T, BLOCK_K)", "range(0, T // BLOCK_K * BLOCK_K, BLOCK_K)"),
            "last start not written": ("& (m <= T + SLOTS)", "& (m < T + SLOTS)"),
            "unused tiles not marked": ("tl.store(tiles_ptr + m, none, mask=m < TILES)", ""),
        },
        "_key": {
            "tokens without an adapter first": (
                "((slot >= 0) & (slot < SLOTS), slot, SLOTS)",
                "((slot >= 0) & (slot < SLOTS), slot, -1)",
            ),
            "slots that do not exist": ("(slot >= 0) & (slot < SLOTS)", "slot >= 0", NO_SLOT),
            "negative slots": (
                "(slot >= 0) & (slot < SLOTS), slot, SLOTS",
                "(slot == -1) | (slot >= SLOTS), SLOTS, slot",
                NO_SLOT,
            ),
            "stride of the slots ignored": (
                "(tl.int64) * stride",
                "(tl.int64)",
                "tests/ops/test_routing.py::test_any_integers_and_strides",
            ),
        },
        "_tile_kernel": {
            "every token starts a tile": ("within % TILE =", "within % 1 ="),
            "only full tiles": ("start + TILE - 1", "start"),
            "tiles of the slot itself counted": ("[None, :] < key", "[None, :] <= key"),
        },
    },
    "fastpeft/ops/routing.py": {
        "_implementation": {
            "no look at the slots": (
                "lowest < -1 or highest >= slots",
                "False",
                "tests/ops/test_routing.py::test_a_slot_that_does_not_exist",
            ),
        },
        "tile_of": {
            "always small tiles": (
                "tokens <= DECODE_TOKENS",
                "True",
                "tests/ops/test_routing.py::test_few_tokens_take_small_tiles",
            ),
        },
        "routed": {
            "routing of another batch": (
                "if found.slots",
                "if False and found.slots",
                "tests/ops/multi_lora/test_torch.py::test_a_routing_of_another_batch",
            ),
        },
    },
    "fastpeft/reference/routing.py": {
        "forward": {
            "unstable": ("torch.argsort(key, stable=True)", "len(key) - 1 - torch.argsort(key.flip(0), stable=True)"),
            "tiles of another slot": ("(ends, index, right=True)", "(ends, index, right=False)"),
        },
        "tile_count": {
            "too little room": ("used + (tokens - used) // tile", "max(1, tokens // tile)"),
        },
    },
    "kernels/multi_lora_products.py": {
        "_shrink_kernel": {
            "shrink: slot 0 for all": ("[0] + slot * strides_as", "[0] + 0 * strides_as"),
            "shrink: slot 0 for the other slices": ("[p] + slot * strides_as", "[p] + 0 * strides_as"),
            "shrink: rows taken as sorted": ("x_ptr + token[:, None]", "x_ptr + m[:, None]"),
            "shrink: columns of a slice one late": ("= column >= firsts[p]", "= column > firsts[p]"),
            "shrink: rank of the first slice": ("p * stride_rank + slot", "slot"),
            "shrink: true rank ignored": ("rank_of(rank_ptr, slot, sizes[0], RANKS)", "sizes[0]", WORK),
            "shrink: scale of the first slice": ("p * stride_scale + slot", "slot"),
            "shrink: no scale": ("acc * scale[None, :]", "acc"),
            "shrink: scale of slot 0": ("scale_ptr + slot", "scale_ptr"),
            "shrink: parts overlap": ("tl.minimum(first + SPAN, K)", "K", CUT),
            "shrink: last block skipped": (
                "(first + SPAN, K), BLOCK_K",
                "(first + SPAN, K) // BLOCK_K * BLOCK_K, BLOCK_K",
            ),
            "shrink: no mask on columns": ("(0, BLOCK_K) < K", "(0, BLOCK_K) >= 0"),
            "shrink: A's step of the first slice": ("tl.where(mine, block_k * strides_ak[p], step)", "step", SLICES),
            "shrink: 32-bit step": ("((BLOCK_R,), BLOCK_K, tl.int64)", "((BLOCK_R,), BLOCK_K, tl.int32)", OFFSETS),
            "shrink: x's 32-bit step": ("((), BLOCK_K, tl.int64) *", "((), BLOCK_K, tl.int32) *", OFFSETS),
            "shrink: mask counts all tokens": ("m - start", "m"),
            "shrink: dropout not applied": ("tl.where(keep, x, 0.0)", "x"),
            "shrink: one seed for all slices": ("p * stride_seed + slot", "slot"),
            "shrink: slices mixed": ("tl.where(mine[None, :], a, 0.0).to(a.dtype)", "a"),
            "shrink: no 1 / (1 - p)": ("scale * inverse_keep_of(threshold_ptr, slot, ACC)", "scale"),
            "shrink: columns of other slots written": (
                "m_ok[:, None] & r_ok[None, :]",
                "r_ok[None, :] & (m >= 0)[:, None]",
            ),
        },
        "rank_of": {
            "rank not bounded": (
                "minimum(tl.maximum(tl.load(rank_ptr + index), 0), largest)",
                "load(rank_ptr + index)",
                TRUE_RANKS,
            ),
        },
        "_expand_kernel": {
            "expand: slot 0 for all": ("[p] + slot * strides_bs[p]", "[p]"),
            "expand: S of the first slice": ("s_ptr + firsts[p] * stride_sr", "s_ptr"),
            "expand: y overwritten": ("y.to(ACC) + acc", "acc"),
            "expand: rows taken as sorted": ("[p] + token[:, None]", "[p] + m[:, None]"),
            "expand: tokens of the next slot written": ("y_ok = m_ok[:, None]", "y_ok = (m >= 0)[:, None]"),
            "expand: last columns written twice": (
                "(block >= 0) & (block * BLOCK_K < widths[p])",
                "block * BLOCK_K < widths[p]",
            ),
            "expand: width of the first slice": ("(k < widths[p])[None, :]", "(k < widths[0])[None, :]"),
            "expand: y's stride ignored": ("[None, :] * strides_yk[p]", "[None, :]", STRIDES),
            "dX: only the last slice": ("total +=", "total ="),
            "dX: mask not applied": (
                "tl.where(keep, acc * inverse_keep_of(threshold_ptr, slot, ACC), 0.0)",
                "acc * inverse_keep_of(threshold_ptr, slot, ACC)",
            ),
            "dX: no 1 / (1 - p)": ("acc * inverse_keep_of(threshold_ptr, slot, ACC)", "acc"),
            "dX: mask of the first columns": ("* BLOCK_K,", "* 0,"),
        },
        "_low_rank": {
            "expand: only the first ranks": ("0, rank,", "0, tl.minimum(rank, BLOCK_R),", RANKS),
            "expand: one plane": ("(1, PLANES)", "(1, 1)", CUT),
            "expand: what a load takes along of S": ("tl.where((r < rank)[None, :], s, 0.0)", "s", GUARDS),
            "expand: what a load takes along of B": ("tl.where((r < rank)[:, None], b, 0.0)", "b", GUARDS),
        },
    },
    "kernels/multi_lora_backward.py": {
        "shrink_backward": {
            "dX: base tokens not zero": ("zeros_like", "ones_like"),
        },
        "_outer_kernel": {
            "outer: another slot's tokens": ("(starts_ptr + slot)", "(starts_ptr)"),
            "outer: last block skipped": ("start, stop,", "start, stop - BLOCK_M + 1,"),
            "outer: rows taken as sorted": ("x_ptr + token[:, None]", "x_ptr + m[:, None]"),
            "outer: tokens of the next slot": (
                "x_tile, mask=(m < stop)[:, None]",
                "x_tile, mask=(m >= 0)[:, None]",
                NAN,
            ),
            "outer: mask not applied": ("x = tl.where(keep, x, 0.0).to(x.dtype)", ""),
            "outer: no 1 / (1 - p)": ("inverse_keep_of(threshold_ptr, slot, ACC)", "1.0"),
            "outer: rank blocks repeated": ("pid_r * BLOCK_R + tl", "tl", RANKS),
        },
        "expand_backward": {
            "dB: only the first plane": ("[0] if s.shape[0] == 1 else s.sum(0)", "[0]", CUT),
            "dS: dropout of x on dY": ("slots, ds, dbs = slots._replace(thresholds=None),", "ds, dbs ="),
            "dS: only the first plane": (
                "torch.sum(partial, 0, keepdim=True, out=ds_p)",
                "ds_p.copy_(partial[:1])",
                CUT,
            ),
        },
    },
    "fastpeft/reference/multi_lora.py": {
        "multi_lora": {
            "definition: no scale": (", scale,", ", 1.0,"),
            "definition: full rank": ("[1] if ranks is None else int(ranks[slot])", "[1]"),
        },
        "_project": {
            "shrink: scale of the first slots": ("[group.chosen]", "[: len(group.slots)]"),
        },
        "shrink": {
            "shrink: no dropout": ("None if of_p.thresholds is None else _drop(x_g, group, of_p)", "None"),
        },
        "add_": {
            "add_: x of the first group": (
                "gathered.get(id(group))",
                "next(iter(gathered.values()), None)",
                "tests/ops/multi_lora/test_edges.py::test_in_place",
            ),
        },
        "shrink_backward": {
            "dX: no 1 / (1 - p)": (".mul_(factor)", ""),
        },
        "_outer": {
            "outer: no 1 / (1 - p)": ("(s[rows, :rank].T @ x_s).mul_(factor)", "s[rows, :rank].T @ x_s"),
            "outer: mask not applied": ("[rows] if mask is None else mask.mul_(x[rows])", "[rows]"),
        },
    },
    "fastpeft/reference/slot_groups.py": {
        "Group.without_padding": {
            "padding taken for tokens": (".index_select(0, self.real)", "[: len(self.real)]"),
        },
        "_grouped": {
            "groups: ranks mixed": ("setdefault(rank, [])", "setdefault(largest, [])"),
        },
        "_group": {
            "groups: first slots": ("slots[0], slots[-1] + 1", "0, len(slots)"),
            "groups: slots between": ("slots[-1] - slots[0] == len(slots) - 1", "True"),
            "groups: no padding": ("min(start + i, stop - 1)", "start + i", FEWEST),
        },
    },
    "fastpeft/ops/multi_lora_registered.py": {
        "_implementation": {
            "y modified": (".clone(memory_format=torch.contiguous_format)", ""),
        },
        "_backward": {
            "y not differentiated": ("dys if need_dy else [None]", "[None]"),
        },
        "_prepare": {
            "ranks dropped": ("in (ranks, thresholds, seeds)", "in (ranks[:0], thresholds, seeds)"),
        },
        "_setup_context": {
            "x kept where it is not needed": ("x if need_da else absent", "absent"),
        },
    },
    "fastpeft/ops/multi_lora_arguments.py": {
        "inplace": {
            "gradient in place": ("torch.is_grad_enabled()", "False"),
        },
        "dropout": {
            "one seed for all slices": ("(slots,) if count == 1 else (count, slots)", "(slots,)", SEEDS),
        },
    },
}
