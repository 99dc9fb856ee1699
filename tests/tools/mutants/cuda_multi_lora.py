# ruff: noqa: E501
"""Mutants of csrc/multi_lora, as run.py says. The emulator builds each one anew.

What no test here can see, and what would: an edit of the PTX itself, beyond what test_cuda_multi_lora_sass.py reads;
a prefetch of the wrong bytes, which is only slower: the benchmark;
the cluster's second barrier kept whole where it is split: the benchmark.
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
GRADIENTS = "tests/cuda/multi_lora/test_multi_lora.py::test_gradients"
FLOAT = "tests/cuda/multi_lora/test_multi_lora.py::test_s_keeps_float"
ORDERS = "tests/cuda/multi_lora/test_multi_lora.py::test_both_paths_and_every_order_of_events_give_the_same_bits"
RACES = "tests/cuda/multi_lora/test_multi_lora.py::test_races"

TESTS = (EXACT, RANKS, FULL, GUARDS, WALL, BATCH, ORDERS)

MUTANTS = {
    "csrc/multi_lora_item.cuh": {
        "a rank is believed": ("min(max(slice.ranks[slot], 0), slice.rank)", "slice.ranks[slot]", RANKS),
        "tokens of the next slot": ("p.starts[slot + 1] - first", "p.starts[slot + 1]"),
        "tiles of one item only": ("+ index % (p.tile / TOKENS) * TOKENS", "", TILES),
        "x past K": ("if (i < left) word", "if (i < 8) word", GUARDS),
        "columns of x left out": ("part * ((p.k + 32 * BLOCKS - 1) / (32 * BLOCKS) * 32)", "part * ((p.k + 32 * BLOCKS - 1) / (32 * BLOCKS) * 24)"),
        "last columns of y nobody's": ("part * ((slice.width + 16 * BLOCKS - 1) / (16 * BLOCKS) * 16)", "part * (slice.width / (16 * BLOCKS) * 16)"),
    },
    "csrc/multi_lora_shrink.cuh": {
        "true rank ignored": ("min(c.rank, c.of - 1) * slice.stride_ar", "c.rank * slice.stride_ar", WALL),
        "slot 0 for all": ("item.slot * slice.stride_as + min(c.rank", "min(c.rank"),
        "rows taken as sorted": ("p.order[item.first + token] * p.stride_xm", "(item.first + token) * p.stride_xm"),
        "only eight tokens": ("q + 8 * i, item.count - 1", "q, item.count - 1"),
        "tokens that there are not": ("min(q + 8 * i, item.count - 1)", "q + 8 * i", WALL),
        "steps past the last": ("if (step + j * STRIDE < whole) multiply", "multiply"),
        "a warp left out": ("for (int w = 1; w < WARPS; ++w)", "for (int w = 1; w < WARPS - 1; ++w)"),
        "a block left out": ("for (int block = 1; block < BLOCKS; ++block)", "for (int block = 1; block < BLOCKS - 1; ++block)"),
        "no scale": ("sum * p.slices[c.slice].scales[item.slot]", "sum"),
        "scale times padding": ("sum = real ? sum * p.slices[c.slice].scales[item.slot] : 0.f;", "sum *= p.slices[c.slice].scales[item.slot];", SCALE),
        "scratch read before it is written": ("    __syncthreads();\n    const int size", "    const int size", RACES),
        "S kept in the wrong column": ("before += p.slices[j].rank;", "before += up16(p.slices[j].rank);", GRADIENTS),
    },
    "csrc/multi_lora_expand.cuh": {
        "slot 0 for all": ("static_cast<const T*>(slice.b) + item.slot * slice.stride_bs + c.n * slice.stride_bn;\n  if", "static_cast<const T*>(slice.b) + c.n * slice.stride_bn;\n  if"),
        "columns past the true rank": ("left = max(0, min(c.rank - r, 8))", "left = 8"),
        "whole rows in one piece": ("slice.stride_bn == rank", "slice.stride_bn >= rank"),
        "no proxy fence before a bulk copy": ("      if (BULK) ptx::fence_async_shared();", "      //"),
        "barriers not shown to copies": ("      ptx::mbarrier_fence_init();\n", ""),
        "too few bytes announced": ("ptx::mbarrier_arrive_expect(barrier, bytes);", "ptx::mbarrier_arrive_expect(barrier, bytes / 2);", FULL),
        "parity never turns": ("        phases ^= 1u << i % 2;\n", "", FULL),
        "copies not waited for": ("        ptx::copy_async_wait();\n", ""),
        "a stage refilled while it is read": ("      __syncthreads();\n      load(p, item, part, i + 2);", "      load(p, item, part, i + 2);", RACES),
        "one TF32 term": ("low[i] = high[i] == values[i] ? 0.f : values[i] - high[i];", "low[i] = 0.f;", FLOAT),
        "the rest of infinity": ("low[i] = high[i] == values[i] ? 0.f : values[i] - high[i];", "low[i] = values[i] - high[i];", INFINITE),
        "y overwritten": ("ptx::pack<T>(sum.x + add[0], sum.y + add[2])", "ptx::pack<T>(add[0], add[2])"),
        "y of the wrong token": ("const int token = i / 2 * 8 + 2 * t + i % 2;", "const int token = i / 2 * 8 + t + i % 2 * 4;"),
        "y past N": ("left > 1, slice.aligned_y);\n      }\n    }\n  }\n}", "true, slice.aligned_y);\n      }\n    }\n  }\n}", GUARDS),
    },
    "csrc/multi_lora.cuh": {
        "idle grids do not wait": ("  ptx::dependency_wait();\n  ptx::dependents_launch();\n  if (item.count == 0) return;  // all eight blocks\n", "  if (item.count == 0) return;\n  ptx::dependency_wait();\n  ptx::dependents_launch();\n", WAITS),
        "x before the wait": ("  ptx::dependency_wait();\n", "", AHEAD),
        "partial sums read too early": ("  ptx::cluster_sync();\n", "", RACES),
        "a block leaves before it was read": ("  ptx::cluster_wait();\n", "", ORDERS),
        "planes of another item": ("p.planes + int64_t(index) * p.columns * TOKENS;", "p.planes;"),
    },
    "csrc/multi_lora.h": {
        "aligned whatever the stride": ("p->aligned_k = multiple(p->x, 16) && p->stride_xm % 8 == 0;", "p->aligned_k = multiple(p->x, 16);"),
        "pairs of y anywhere": ("multiple(slice.y, 4) && slice.stride_ym % 2 == 0", "1", GUARDS),
        "B aligned whatever the stride": ("multiple(slice.b, 16) && slice.stride_bn % 8 == 0 && slice.stride_bs % 8 == 0", "multiple(slice.b, 16)"),
    },
    "fastpeft/cuda/multi_lora.py": {
        "the promise is forgotten": ("before, _reading_ahead = _reading_ahead, True", "before, _reading_ahead = _reading_ahead, False", AHEAD),
        "no room for the planes": ("_BLOCKS * items * columns * _TOKENS", "items * columns * _TOKENS", "tests/cuda/multi_lora/test_multi_lora.py::test_gradients"),
    },
    "fastpeft/ops/multi_lora_backends.py": {
        "any number of tokens": ("if x.numel() > limits.MAX_TOKENS * k:", "if False:", "tests/cuda/multi_lora/test_multi_lora.py::test_what_it_does_not_serve"),
        "dropout unseen": ("if dropouts is not None and any(dropouts):", "if False:", "tests/cuda/multi_lora/test_multi_lora.py::test_what_it_does_not_serve"),
    },
}  # fmt: skip
