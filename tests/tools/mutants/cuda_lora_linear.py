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
REFUSED = "tests/cuda/lora_linear/test_edges.py::test_refusals"

MUTANTS = {
    "csrc/lora_linear_tiles.cuh": {
        "too few bytes expected": ("(BLOCK_M + BLOCK_N) * BLOCK_K * 2", "(BLOCK_M + BLOCK_N / 2) * BLOCK_K * 2"),
        "parity is not turned": ("      parity ^= 1;\n", ""),
        "raster skips tiles": ("column = rest / height;", "column = rest / GROUP;"),
        "raster of one height": ("height = min(GROUP, pairs - first);", "height = GROUP;"),
    },
    "csrc/lora_linear_produce.cuh": {
        "k not restarted": ("const int k = (i - before) * BLOCK_K;", "const int k = i * BLOCK_K;"),
        "low-rank tiles first in forward too": (
            "FORM == Form::FORWARD ? i >= tiles.base : i < tiles.low",
            "i < tiles.low",
        ),
        "w's halves in one place": ("shared.w[ring.stage] + half * BLOCK_K, w", "shared.w[ring.stage], w"),
        "w sent to one block": ("k, n0 + half, 0b11)", "k, n0 + half, 1 << rank)"),
        "fills a stage before it is empty": (
            "      ptx::mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);\n",
            "",
        ),
        "S not waited for": ("        if (i == tiles.base) wait_for_down(p, m0);\n", "", DOWN),
    },
    "csrc/lora_linear_consume.cuh": {
        "LBO and SBO swapped": (
            "(leading >> 4) << 16 |\n         static_cast<uint64_t>(stride >> 4) << 32",
            "(stride >> 4) << 16 |\n         static_cast<uint64_t>(leading >> 4) << 32",
        ),
        "no fence between registers and wgmma": ("    ptx::wgmma_fence();\n", ""),
        "x advances by half a step": ("x + step * (32 >> 4)", "x + step * (16 >> 4)"),
        "n-major w advances by half a step": ("(N_MAJOR ? 16 * 128 : 32)", "(N_MAJOR ? 8 * 128 : 32)", BACKWARD),
        "only the last step accumulates": ("accumulate || step > 0)", "accumulate || step > 1)"),
        "staging without its swizzle": ("(j * 2 + lane / 16) ^ (row & 7)", "(j * 2 + lane / 16)"),
        "the stage before is not released": ("    if (previous >= 0) release(previous);\n", ""),
        "one warp releases for four": (
            "if (lane < CLUSTER) ptx::mbarrier_arrive",
            "for (int i = 0; thread < CLUSTER && i < 4; ++i) ptx::mbarrier_arrive",
        ),
        "released while it is read": (
            "if (previous >= 0) release(previous);",
            "if (previous >= 0) release(ring.stage);",
            RACES,
        ),
        "waits for one product too few": ("    ptx::wgmma_wait<1>();\n", "    ptx::wgmma_wait<2>();\n", RACES),
        "the last stage is not released": ("    release(previous);\n    previous = -1;\n", "    previous = -1;\n"),
        "multiplies a stage before it is full": (
            "    ptx::mbarrier_wait(&shared.full[ring.stage], ring.parity);\n",
            "",
        ),
        "last wgmma is not waited for": ("    ptx::wgmma_wait<0>();\n", "    ptx::wgmma_wait<1>();\n"),
        "bias in the wrong columns": ("j * 8 + half * 4 + thread % 4", "j * 8 + half * 2 + thread % 4"),
        "bias read past its end": ("bias && c + 1 < p.N ? bias[c + 1] : 0", "bias ? bias[c + 1] : 0"),
        "short tile too short": ("if (columns > 32) {", "if (columns > 33) {"),
        "staging overwritten before it is stored": (
            "if (thread == 0) ptx::bulk_wait_read<1>();",
            "if (thread == 0) ptx::bulk_wait_read<2>();",
        ),
        "others do not wait for the staging buffer": (
            "has read it\n      ptx::barrier_sync(1 + index, 128);\n",
            "has read it\n",
            RACES,
        ),
        "stored before all have written": (
            "      ptx::fence_async_shared();\n      ptx::barrier_sync(1 + index, 128);\n",
            "      ptx::fence_async_shared();\n",
        ),
        "no proxy fence before the store": ("      ptx::fence_async_shared();\n", ""),
        "leaves with stores unread": ("  if (consumer.thread == 0) ptx::bulk_wait<0>();\n", ""),
        "second consumer reads the first's rows": (
            "shared.x[ring.stage] + index * 64 * BLOCK_K",
            "shared.x[ring.stage]",
        ),
        "base product forgets the low-rank one": (
            "next_tile<BLOCK_K / 16>(masked_first);",
            "next_tile<BLOCK_K / 16>(false);",
            BACKWARD,
        ),
        "mask of the block's first columns": ("at.n0 + lane % 4 * 2", "lane % 4 * 2", MASKED),
        "the mask of the tile before": ("begin_mask(next);", "begin_mask(tile);", MASKED),
        "the mask is not drawn to its end": (
            "next < tiles.count()) mask.finish(p.mask.threshold);",
            "next < 0) mask.finish(p.mask.threshold);",
            MASKED,
        ),
        "1 / (1 - p) dropped": ("acc[i] * p.inverse_keep", "acc[i]", MASKED),
        "a base tile under the mask": (
            "finish_tiles();\n#pragma unroll",
            "finish_tiles();\n      next_tile<4>();\n#pragma unroll",
            MASKED,
        ),
    },
    "csrc/lora_linear_mask.cuh": {
        "mask's bits overlap": ("threshold) << (2 * i);", "threshold) << i;", MASKED),
        "one row's mask for two": ("keys_[i % 2]", "keys_[0]", MASKED),
        "columns drawn twice": ("pair_ += 8;", "pair_ += 4;", MASKED),
        "words not pushed down": ("i + 1 < N / 64 ? words_[i + 1] : bits", "bits", MASKED),
    },
    "csrc/lora_linear_down.cuh": {
        "S used one unit early": ("load_relaxed(ready) < units)", "load_relaxed(ready) + 1 < units)", DOWN),
        "S stored without a proxy fence": ("    ptx::fence_async_global();  // TMA will", "    // TMA will", DOWN),
        "S read without a proxy fence": (
            "  ptx::fence_async_global();\n}\n\n}  // namespace",
            "}\n\n}  // namespace",
            DOWN,
        ),
        "S's counter read without an order": ("  ptx::load_acquire(ready);", "  //", RACES),
        "counters left as they are": ("workspace.words[i] = 0;", "workspace.words[i] += 0;", DOWN),
        "counters reset by the first to leave": (
            "workspace.finished(), 1) + 1 < gridDim.x",
            "workspace.finished(), 1) > 0",
            DOWN,
        ),
        "rows of S past the end": ("if (row < p.M && r < p.R) rein", "if (r < p.R) rein", DOWN),
        "ranks of S past the end": ("if (row < p.M && r < p.R) rein", "if (row < p.M) rein", DOWN),
        "A read past its ranks": ("min(i * 8 + q, p.R - 1)", "(i * 8 + q)", DOWN),
        "read past K": ("row + (k < K ? k : 0)", "row + k", DOWN),
        "no zeros past K": ("return k < K ? loaded : make_uint4(0, 0, 0, 0);", "return loaded;", DOWN),
        "S without its scale": ("const float factor = p.scale *", "const float factor =", DOWN),
        "S counted in the next tile": (
            "ptx::add_release(workspace.ready(m0 / BLOCK_M), 1)",
            "ptx::add_release(workspace.ready((m0 + DOWN_ROWS) / BLOCK_M), 1)",
            DOWN,
        ),
        "x's mask from another column": (
            "keep_pair(key, k / 2 + i, threshold)",
            "keep_pair(key, k + i, threshold)",
            DOWN_MASK,
        ),
        "x's mask keeps the pair's other half": ("keep & 1 ? 0x0000ffffu", "keep & 2 ? 0x0000ffffu", DOWN_MASK),
        "a block waits for one that has not begun": (
            "  for (;;) {\n    uint32_t unit = lane ? 0 : ptx::fetch_add(workspace.next(), 1);\n",
            "  for (uint32_t unit = blockIdx.x * 3 + threadIdx.x / 32 - 1;; unit += gridDim.x * 3) {\n",
            RESIDENT,
        ),
    },
    "csrc/lora_linear.cuh": {
        "empty counts one block": ("empty[stage], 4 * CONSUMERS * CLUSTER)", "empty[stage], 4 * CONSUMERS)"),
        "leaves before its peer is done": (
            "  ptx::cluster_sync();  // a block that leaves",
            "  // a block that leaves",
            RACES,
        ),
        "more registers than there are": (
            "ptx::registers_increase<232>()",
            "ptx::registers_increase<240>()",
        ),
        "fewer registers given back": (
            "ptx::registers_decrease<40>()",
            "ptx::registers_decrease<48>()",
        ),
        "one thread gives registers back": (
            "if (!DOWN_RANKS) ptx::registers_decrease",
            "if (!threadIdx.x) ptx::registers_decrease",
        ),
        "one warp gives registers back": (
            "if (!DOWN_RANKS) ptx::registers_decrease",
            "if (threadIdx.x < 32) ptx::registers_decrease",
        ),
        "the producer's warp arrives in parts": ("  __syncwarp();\n", ""),
        "barriers not shown to the other block": ("    ptx::mbarrier_fence_init();\n", ""),
    },
    "csrc/dropout.cuh": {
        "rows counted from 0": ("static_cast<uint64_t>(row + 1)", "static_cast<uint64_t>(row)", MASK),
        "signed lane taken for unsigned": ("  z ^= 0x80008000u;\n", "", MASK),
        "an element at the threshold is dropped": (
            "limit = threshold << 16;",
            "limit = (threshold + 1) << 16;",
            THRESHOLD,
        ),
        "lanes swapped": (
            "(z << 16 >= limit ? 1u : 0u) | (z >= limit ? 2u : 0u)",
            "(z << 16 >= limit ? 2u : 0u) | (z >= limit ? 1u : 0u)",
            MASK,
        ),
        "last shift dropped": ("z = z ^ (z >> 16);", "z = z ^ (z >> 17);", MASK),
    },
    "csrc/lora_linear.cu": {
        "box of w as high as the tile": ("? Config::BLOCK_N / 2 : 64;", "? Config::BLOCK_N : 64;"),
        "grid of one block too many clusters": (
            "(clusters < tiles.count() ? clusters : tiles.count())",
            "tiles.count() / 2",
            FORWARD,
        ),
        "backward's sum not checked": ("check_sizes(M, N, K, R, N, 256)", "check_sizes(M, N, K, R, K, 256)", REFUSED),
        "rank not checked": ("if (R < 0 || R > max_rank) {", "if (R < 0) {", REFUSED),
        "rows' stride not checked": (
            "if (m.stride % 8 || rein",
            "if (rein",
            "tests/cuda/lora_linear/test_edges.py::test_refuses_unaligned_rows",
        ),
    },
}
