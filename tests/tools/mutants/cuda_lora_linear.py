"""Mutants of csrc/lora_linear, as run.py says. The emulator builds each one anew.

What no test here can see, and what would: an edit of the PTX in csrc/ptx.cuh or csrc/wgmma.cuh, beyond what
tests/cuda/lora_linear/test_sass.py reads; __threadfence removed (memory is sequentially consistent in the emulator):
repeated runs on a GPU.
"""

TESTS = (
    "tests/cuda/lora_linear/test_lora_linear.py::test_forward_exact",
    "tests/cuda/lora_linear/test_lora_linear.py::test_backward_exact",
    "tests/cuda/lora_linear/test_lora_linear.py::test_down_exact",
    "tests/cuda/lora_linear/test_edges.py::test_every_order_and_grid",
    "tests/cuda/lora_linear/test_edges.py::test_races",
)
FORWARD, BACKWARD, DOWN, _, RACES = TESTS
MASKED = "tests/cuda/lora_linear/test_lora_linear.py::test_backward_dropout_exact"
MASK = "tests/cuda/lora_linear/test_lora_linear.py::test_backward_mask"
THRESHOLD = "tests/cuda/lora_linear/test_lora_linear.py::test_an_element_at_the_threshold_is_kept"
DOWN_MASK = "tests/cuda/lora_linear/test_lora_linear.py::test_down_mask"
RESIDENT = "tests/cuda/lora_linear/test_edges.py::test_down_whoever_is_resident"
LONG = "tests/cuda/lora_linear/test_edges.py::test_long_work_has_more_clusters_than_fit"
REFUSED = "tests/cuda/lora_linear/test_edges.py::test_refusals"

MUTANTS = {
    "csrc/lora_linear_tiles.cuh": {
        "": {
            "too few bytes expected": ("+ BLOCK_N", "+ BLOCK_N / 2"),
        },
        "advance": {
            "parity is not turned": ("parity ^= 1;", ""),
        },
        "clusters": {
            "one schedule for all": ("1 + int64_t(waves)", "1 + 0 * int64_t(waves)", LONG),
        },
        "locate": {
            "raster skips tiles": ("/ height", "/ GROUP"),
            "raster of one height": ("min(GROUP, pairs - first)", "GROUP"),
        },
    },
    "csrc/lora_linear_produce.cuh": {
        "produce": {
            "k not restarted": ("(i - before)", "i"),
            "low-rank tiles first in forward too": ("FORM == Form::FORWARD ? i >= tiles.base : i", "i"),
            "w's halves in one place": ("[ring.stage] + half * BLOCK_K", "[ring.stage]"),
            "w sent to one block": ("k, n0 + half, 0b11)", "k, n0 + half, 1 << rank)"),
            "fills a stage before it is empty": ("ptx::mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);", ""),
            "S not waited for": ("if (i == tiles.base) wait_for_down(p, m0);", "", DOWN),
        },
    },
    "csrc/lora_linear_consume.cuh": {
        "descriptor": {
            "LBO and SBO swapped": (
                "(leading >> 4) << 16 |\n         static_cast<uint64_t>(stride >> 4)",
                "(stride >> 4) << 16 |\n         static_cast<uint64_t>(leading >> 4)",
            ),
        },
        "multiply": {
            "no fence between registers and wgmma": ("ptx::wgmma_fence();", ""),
            "x advances by half a step": ("step * (32 >> 4)", "step * (16 >> 4)"),
            "n-major w advances by half a step": ("N_MAJOR ? 16 *", "N_MAJOR ? 8 *", BACKWARD),
            "only the last step accumulates": ("accumulate || step > 0)", "accumulate || step > 1)"),
            "second consumer reads the first's rows": ("[ring.stage] + index * 64 * BLOCK_K", "[ring.stage]"),
        },
        "store": {
            "staging without its swizzle": ("(j * 2 + lane / 16) ^ (row & 7)", "(j * 2 + lane / 16)"),
            "staging overwritten before it is stored": ("bulk_wait_read<1", "bulk_wait_read<2"),
            "others do not wait for the staging buffer": ("it\n      ptx::barrier_sync(1 + index, 128);", "it", RACES),
            "stored before all have written": (";\n      ptx::barrier_sync(1 + index, 128);", ";"),
            "no proxy fence before the store": ("ptx::fence_async_shared();", ""),
        },
        "next_tile": {
            "the stage before is not released": ("if (previous >= 0) release(previous);", ""),
            "released while it is read": ("(previous)", "(ring.stage)", RACES),
            "waits for one product too few": ("wgmma_wait<1>", "wgmma_wait<2>", RACES),
            "multiplies a stage before it is full": ("ptx::mbarrier_wait(&shared.full[ring.stage], ring.parity);", ""),
        },
        "release": {
            "one warp releases for four": ("if (lane < CLUSTER)", "for (int i = 0; thread < CLUSTER && i < 4; ++i)"),
        },
        "finish_tiles": {
            "the last stage is not released": ("release(previous);\n    previous", "previous"),
            "last wgmma is not waited for": ("wgmma_wait<0>", "wgmma_wait<1>"),
        },
        "add_bias": {
            "bias in the wrong columns": ("half * 4 + thread", "half * 2 + thread"),
        },
        "load_bias": {
            "bias read past its end": ("&& c + 1 < p.N ?", "?"),
        },
        "short_tile": {
            "short tile too short": ("(columns > 32) {", "(columns > 33) {"),
        },
        "consume": {
            "leaves with stores unread": ("if (consumer.thread == 0) ptx::bulk_wait<0>();", ""),
            "base product forgets the low-rank one": (">(masked_first)", ">(false)", BACKWARD),
            "mask of the block's first columns": ("at.n0 + lane", "lane", MASKED),
            "the mask of the tile before": ("begin_mask(next)", "begin_mask(tile)", MASKED),
            "the mask is not drawn to its end": ("next < tiles.count()) mask", "next < 0) mask", MASKED),
        },
        "low_rank_backward": {
            "1 / (1 - p) dropped": ("[i] * p.inverse_keep", "[i]", MASKED),
            "a base tile under the mask": ("();\n#pragma", "();\n      next_tile<4>();\n#pragma", MASKED),
        },
    },
    "csrc/lora_linear_mask.cuh": {
        "draw": {
            "mask's bits overlap": ("< (2 * i);", "< i;", MASKED),
            "one row's mask for two": ("keys_[i % 2]", "keys_[0]", MASKED),
            "columns drawn twice": ("pair_ += 8;", "pair_ += 4;", MASKED),
            "words not pushed down": ("i + 1 < N / 64 ? words_[i + 1] : bits", "bits", MASKED),
        },
    },
    "csrc/lora_linear_down.cuh": {
        "wait_for_down": {
            "S used one unit early": ("(ready) <", "(ready) + 1 <", DOWN),
            "S's counter read without an order": ("ptx::load_acquire(ready);", "//", RACES),
            "S read without a proxy fence": ("ptx::fence_async_global();", "", DOWN),
        },
        "down": {
            "S stored without a proxy fence": ("ptx::fence_async_global();  /", "/", DOWN),
            "rows of S past the end": ("row < p.M && r", "r", DOWN),
            "ranks of S past the end": ("M && r < p.R", "M", DOWN),
            "S without its scale": ("= p.scale *", "=", DOWN),
            "S counted in the next tile": ("ready(m0 / BLOCK_M)", "ready((m0 + DOWN_ROWS) / BLOCK_M)", DOWN),
            "a block waits for one that has not begun": (
                "(;;) {\n    uint32_t unit = lane ? 0 : ptx::fetch_add(workspace.next(), 1);",
                "(uint32_t unit = blockIdx.x * 3 + threadIdx.x / 32 - 1;; unit += gridDim.x * 3) {",
                RESIDENT,
            ),
        },
        "reset_workspace": {
            "counters left as they are": ("words[i] = 0", "words[i] += 0", DOWN),
            "counters reset by the first to leave": ("+ 1 < gridDim.x", "> 0", DOWN),
        },
        "down_rows": {
            "A read past its ranks": ("min(i * 8 + q, p.R - 1)", "(i * 8 + q)", DOWN),
        },
        "load8": {
            "read past K": ("(k < K ? k : 0)", "k", DOWN),
            "no zeros past K": ("k < K ? loaded : make_uint4(0, 0, 0, 0)", "loaded", DOWN),
        },
        "drop": {
            "x's mask from another column": ("k / 2 + i", "k + i", DOWN_MASK),
            "x's mask keeps the pair's other half": ("keep & 1 ? 0x0000ffffu", "keep & 2 ? 0x0000ffffu", DOWN_MASK),
        },
    },
    "csrc/lora_linear.cuh": {
        "kernel": {
            "empty counts one block": ("CONSUMERS * CLUSTER", "CONSUMERS"),
            "leaves before its peer is done": (
                "ptx::cluster_sync();  // a block that leaves",
                "// a block that leaves",
                RACES,
            ),
            "more registers than there are": ("registers_increase<232", "registers_increase<240"),
            "fewer registers given back": ("registers_decrease<40", "registers_decrease<48"),
            "one thread gives registers back": (
                "if (!DOWN_RANKS) ptx::registers_decrease",
                "if (!threadIdx.x) ptx::registers_decrease",
            ),
            "one warp gives registers back": (
                "if (!DOWN_RANKS) ptx::registers_decrease",
                "if (threadIdx.x < 32) ptx::registers_decrease",
            ),
            "the producer's warp arrives in parts": ("__syncwarp();", ""),
            "barriers not shown to the other block": ("ptx::mbarrier_fence_init();", ""),
        },
    },
    "csrc/dropout.cuh": {
        "row_key": {
            "rows counted from 0": ("(row + 1)", "(row)", MASK),
        },
        "keep_pair": {
            "signed lane taken for unsigned": ("z ^= 0x80008000u;", "", MASK),
            "an element at the threshold is dropped": ("= threshold", "= (threshold + 1)", THRESHOLD),
            "lanes swapped": (
                "(z << 16 >= limit ? 1u : 0u) | (z >= limit ? 2u : 0u)",
                "(z << 16 >= limit ? 2u : 0u) | (z >= limit ? 1u : 0u)",
                MASK,
            ),
            "last shift dropped": ("(z >> 16);", "(z >> 17);", MASK),
        },
    },
    "csrc/lora_linear.cu": {
        "launch": {
            "box of w as high as the tile": ("BLOCK_N / 2 : 64", "BLOCK_N : 64"),
            "grid of half the clusters": ("tiles.clusters(clusters)", "(tiles.count() / 2)", FORWARD),
        },
        "fastpeft_lora_linear_backward": {
            "backward's sum not checked": (", R, N, 256", ", R, K, 256", REFUSED),
        },
        "check_sizes": {
            "rank not checked": ("0 || R > max_rank", "0", REFUSED),
        },
        "check": {
            "rows' stride not checked": (
                "m.stride % 8 || rein",
                "rein",
                "tests/cuda/lora_linear/test_edges.py::test_refuses_unaligned_rows",
            ),
        },
    },
}
