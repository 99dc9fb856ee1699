"""Mutants of csrc/multi_lora, as run.py says. The emulator builds each one anew.

What no test here can see, and what would: an edit of the PTX itself, beyond what tests/cuda/multi_lora/test_sass.py
reads; a prefetch of the wrong bytes, which is only slower, or the cluster's second barrier kept whole where it is
split: the benchmark.
"""

EXACT = "tests/cuda/multi_lora/test_multi_lora.py::test_integers_are_exact"
RANKS = "tests/cuda/multi_lora/test_multi_lora.py::test_true_ranks_from_0_to_all"
BATCH = "tests/cuda/multi_lora/test_multi_lora.py::test_who_is_in_the_batch"
GUARDS = "tests/cuda/multi_lora/test_multi_lora.py::test_nothing_is_read_or_written_outside"
WALL = "tests/cuda/multi_lora/test_multi_lora.py::test_nothing_is_read_past_the_last_row_and_rank"
INFINITE = "tests/cuda/multi_lora/test_multi_lora.py::test_an_infinite_s_is_no_nan"
SCALE = "tests/cuda/multi_lora/test_multi_lora.py::test_an_infinite_scale_stays_with_its_slot"
TILES = "tests/cuda/multi_lora/test_multi_lora.py::test_tiles_of_any_size"
FULL = "tests/cuda/multi_lora/test_multi_lora.py::test_a_bank_full_to_its_ranks"
AHEAD = "tests/cuda/multi_lora/test_multi_lora.py::test_what_the_kernel_ahead_writes_is_waited_for"
WAITS = "tests/cuda/multi_lora/test_multi_lora.py::test_every_grid_waits_for_the_kernel_ahead"
GRADIENTS = "tests/cuda/multi_lora/test_op.py::test_gradients"
FLOAT = "tests/cuda/multi_lora/test_multi_lora.py::test_s_keeps_float"
ORDERS = "tests/cuda/multi_lora/test_multi_lora.py::test_both_paths_and_every_order_of_events_give_the_same_bits"
RACES = "tests/cuda/multi_lora/test_multi_lora.py::test_races"

TESTS = (EXACT, RANKS, FULL, GUARDS, WALL, BATCH, ORDERS)

MUTANTS = {
    "csrc/multi_lora_item.cuh": {
        "true_rank": {
            "a rank is believed": ("min(max(slice.ranks[slot], 0), slice.rank)", "slice.ranks[slot]", RANKS),
        },
        "find_item": {
            "tokens of the next slot": ("[slot + 1] - first", "[slot + 1]"),
            "tiles of one item only": ("+ index % (p.tile / TOKENS) * TOKENS", "", TILES),
        },
        "load8": {
            "x past K": ("(i < left)", "(i < 8)", GUARDS),
        },
        "k_begin": {
            "columns of x left out": (
                "((p.k + 32 * BLOCKS - 1) / (32 * BLOCKS) * 32)",
                "((p.k + 32 * BLOCKS - 1) / (32 * BLOCKS) * 24)",
            ),
        },
        "n_begin": {
            "last columns of y nobody's": ("(slice.width + 16 * BLOCKS - 1)", "slice.width"),
        },
    },
    "csrc/multi_lora_shrink.cuh": {
        "shrink": {
            "true rank ignored": ("min(c.rank, c.of - 1)", "c.rank", WALL),
            "slot 0 for all": ("item.slot * slice.stride_as + min", "min"),
            "rows taken as sorted": ("p.order[item.first + token]", "(item.first + token)"),
            "only eight tokens": ("q + 8 * i", "q"),
            "tokens that there are not": ("min(q + 8 * i, item.count - 1)", "q + 8 * i", WALL),
            "steps past the last": ("if (step + j * STRIDE < whole) multiply", "multiply"),
            "a warp left out": ("w < WARPS;", "w < WARPS - 1;"),
            "scratch read before it is written": ("__syncthreads();\n    const", "const", RACES),
        },
        "gather": {
            "a block left out": ("< BLOCKS;", "< BLOCKS - 1;"),
            "no scale": ("sum * p.slices[c.slice].scales[item.slot]", "sum"),
            "scale times padding": (
                "= real ? sum * p.slices[c.slice].scales[item.slot] : 0.f",
                "*= p.slices[c.slice].scales[item.slot]",
                SCALE,
            ),
            "S kept in the wrong column": ("p.slices[j].rank", "up16(p.slices[j].rank)", GRADIENTS),
        },
    },
    "csrc/multi_lora_expand.cuh": {
        "load_chunk": {
            "slot 0 for all": ("item.slot * slice.stride_bs + c", "c"),
            "columns past the true rank": ("max(0, min(c.rank - r, 8))", "8"),
            "too few bytes announced": ("(barrier, bytes)", "(barrier, bytes / 2)", FULL),
        },
        "in_one_piece": {
            "whole rows in one piece": ("stride_bn =", "stride_bn >"),
        },
        "expand": {
            "no proxy fence before a bulk copy": ("if (BULK) ptx::fence_async_shared();", "//", RACES),
            "parity never turns": ("phases ^= 1u << i % 2;", "", FULL),
            "copies not waited for": ("ptx::copy_async_wait();", ""),
            "a stage refilled while it is read": ("__syncthreads();\n      load", "load", RACES),
        },
        "begin": {
            "barriers not shown to copies": ("ptx::mbarrier_fence_init();", ""),
        },
        "Terms": {
            "one TF32 term": ("high[i] == values[i] ? 0.f : values[i] - high[i]", "0.f", FLOAT),
            "the rest of infinity": ("high[i] == values[i] ? 0.f : values", "values", INFINITE),
        },
        "multiply_chunk": {
            "y overwritten": ("sum.x + add[0], sum.y +", "add[0],"),
            "y of the wrong token": ("2 * t + i % 2", "t + i % 2 * 4"),
            "y past N": (
                "left > 1, slice.aligned_y);\n      }\n    }\n  }",
                "true, slice.aligned_y);\n      }\n    }\n  }",
                GUARDS,
            ),
        },
    },
    "csrc/multi_lora.cuh": {
        "multi_lora_cluster": {
            "idle grids do not wait": (
                "ptx::dependency_wait();\n  ptx::dependents_launch();\n  if (item.count == 0) return;",
                "if (item.count == 0) return;\n  ptx::dependency_wait();\n  ptx::dependents_launch();",
                WAITS,
            ),
            "x before the wait": ("ptx::dependency_wait();", "", AHEAD),
            "partial sums read too early": ("ptx::cluster_sync();", "", RACES),
            "a block leaves before it was read": ("ptx::cluster_wait();", "", ORDERS),
        },
        "multi_lora_expand": {
            "planes of another item": ("planes + int64_t(index) * p.columns * TOKENS", "planes"),
        },
    },
    "csrc/multi_lora.h": {
        "complete": {
            "aligned whatever the stride": ("(p->x, 16) && p->stride_xm % 8 == 0", "(p->x, 16)"),
            "pairs of y anywhere": ("multiple(slice.y, 4) && slice.stride_ym % 2 == 0", "1", GUARDS),
            "B aligned whatever the stride": (
                "(slice.b, 16) && slice.stride_bn % 8 == 0 && slice.stride_bs % 8 == 0",
                "(slice.b, 16)",
            ),
        },
    },
    "fastpeft/cuda/multi_lora.py": {
        "reading_ahead": {
            "the promise is forgotten": ("_reading_ahead, True", "_reading_ahead, False", AHEAD),
        },
        "_run": {
            "no room for the planes": (
                "_BLOCKS * items",
                "items",
                "tests/cuda/multi_lora/test_op.py::test_gradients",
            ),
        },
    },
    "fastpeft/ops/multi_lora_backends.py": {
        "_cuda_reason": {
            "any number of tokens": (
                "x.numel() > limits.MAX_TOKENS * k",
                "False",
                "tests/cuda/multi_lora/test_op.py::test_what_it_does_not_serve",
            ),
            "dropout unseen": (
                "dropouts is not None and any(dropouts)",
                "False",
                "tests/cuda/multi_lora/test_op.py::test_what_it_does_not_serve",
            ),
        },
    },
}
