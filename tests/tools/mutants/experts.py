"""Mutants of experts and of PEFT's layers around them, as run.py says."""

INTEGERS = "tests/ops/experts/test_experts.py::test_integers_are_exact"
ALONE = "tests/ops/experts/test_experts.py::test_every_expert_trains_as_if_alone"
CHOSEN = "tests/ops/experts/test_edges.py::test_who_is_chosen"
GUARDS = "tests/ops/experts/test_memory.py::test_nothing_is_read_or_written_outside"
KEPT = "tests/ops/experts/test_memory.py::test_what_is_kept_for_backward"
STRIDES = "tests/ops/experts/test_memory.py::test_any_strides"
OFFSETS = "tests/ops/experts/test_memory.py::test_offsets_are_64_bit[triton]"
PLANES = "tests/ops/experts/test_memory.py::test_sums_that_are_cut_along_k[triton]"
TRAINS = "tests/ops/experts/test_edges.py::test_an_activation_that_trains"
ZERO = "tests/ops/experts/test_edges.py::test_scale_0_is_no_adapter"
SEEDS = "tests/ops/experts/test_edges.py::test_seeds_are_drawn_where_none_are_given"
SECOND = "tests/ops/experts/test_edges.py::test_gradients_of_gradients_are_refused"
ONE = "tests/ops/experts/test_experts.py::test_one_expert_is_lora_linear"
FORMULA = "tests/ops/experts/test_experts.py::test_the_definition_is_the_formula"
SPLIT = "tests/ops/experts/test_memory.py::test_grouped_products_with_and_without_grouped_mm"
COLUMNS = "tests/integrations/peft/test_experts.py::test_an_expert_has_its_own_columns_of_b"
LLAMA4 = "tests/integrations/peft/test_experts.py::test_every_family_is_pefts[llama4]"
GPT_OSS = "tests/integrations/peft/test_experts.py::test_every_family_is_pefts[gpt_oss]"
QWEN3 = "tests/integrations/peft/test_experts.py::test_every_family_is_pefts[qwen3_moe]"
NEMOTRON = "tests/integrations/peft/test_experts.py::test_every_family_is_pefts[nemotron_h]"
ADAPTERS = "tests/integrations/peft/test_experts.py::test_two_active_adapters"
BIASES = "tests/integrations/peft/test_experts.py::test_biases_of_experts"
REASONS = "tests/integrations/peft/test_experts.py::test_what_peft_serves_itself"
STRICT = "tests/integrations/peft/test_experts.py::test_strict_names_what_is_not_fused"
RESTORE = "tests/integrations/peft/test_experts.py::test_restore_gives_pefts_own"
LIFE = "tests/methods/lora/test_experts.py::test_disabled_merged_and_detached"
DROPOUT = "tests/methods/lora/test_experts.py::test_dropout_is_the_definitions"
UNFUSED = "tests/methods/lora/test_experts.py::test_experts_on_their_own_path"
MERGED = "tests/methods/lora/test_experts.py::test_merged_is_the_sum"
NAMED = "tests/methods/lora/test_experts.py::test_what_targets_mean"
OURS = "tests/methods/lora/test_experts_peft.py::test_biases_and_the_router"

_OP = (
    GUARDS,
    CHOSEN,
    ONE,
    FORMULA,
    ZERO,
    TRAINS,
    SEEDS,
    SECOND,
    STRIDES,
    SPLIT,
    KEPT,
    ALONE,
    OFFSETS,
    PLANES,
    INTEGERS,
)
_MODELS = (COLUMNS, QWEN3, GPT_OSS, LLAMA4, NEMOTRON, ADAPTERS, BIASES, REASONS, STRICT, RESTORE)
_ATTACHED = (NAMED, LIFE, DROPOUT, UNFUSED, MERGED, OURS)
TESTS = (*_OP, *_MODELS, *_ATTACHED)

MUTANTS = {
    "kernels/experts.py": {
        "_combine_kernel": {
            "rows without an expert read": ("used = place < count", "used = place >= 0", GUARDS),
            "the router's weights left out": ("row *= w[:, None]", ""),
            "the last choice left out": ("range(0, CHOICES)", "range(0, CHOICES - 1)"),
            "columns past the last one": ("(t < T)[:, None] & (k < N)[None, :]", "(t < T)[:, None]", GUARDS),
        },
        "dlora_a": {"x not gathered": ("order=routing.tokens) if gather", "order=routing.rows.order) if gather")},
        "expand_": {"mask left out": ("1.0, dropout, seeds)", "1.0, 0.0, None)")},
        "shrink": {"one plane of several": ("reduce_partials(s, s.dtype)", "s[0]", PLANES)},
    },
    "fastpeft/reference/experts.py": {
        "shrink": {
            "no 1 / (1 - p)": (".mul_(scale * factor)", ".mul_(scale)"),
            "no scale": (".mul_(scale * factor)", ".mul_(factor)"),
        },
        "expand_": {"mask without 1 / (1 - p)": ("mask.mul_(factor)", "mask")},
        "combine": {"rows without an expert not emptied": ("rows[int(routing.rows.starts[-1]) :] = 0", "")},
        "_mask": {"rows counted over all experts": ("- routing.starts.long()[experts]", "")},
        "_projection": {"bias left out": ("lora_b[e], bias, scale", "lora_b[e], None, scale", FORMULA)},
    },
    "fastpeft/reference/experts_grouped.py": {
        "_dense": {"B taken for another layout": ("return copy if view is t else copy.mT", "return copy", STRIDES)},
        "laid_out_as": {"always contiguous": ("parameter.is_contiguous() or", "True or", STRIDES)},
        "_served": {"dtypes that grouped_mm refuses": ("and all(map(_aligned, operands))", "", SPLIT)},
    },
    "fastpeft/ops/experts_registered.py": {
        "_backward_implementation": {
            "bias not in the router's gradient": ("if bias.numel():", "if False:"),
            "low-rank term not in the router's gradient": ("if low_rank and scale:", "if False:"),
            "scale counted twice": (".div_(scale)", ""),
            "gradients of rows without an expert": ("torch.where(places < rows.starts[-1], of_row[places], 0)",
                                                    "of_row[places]", GUARDS),
            "dh without the router's weights": ("else dx.mul_(w.to(dx.dtype))", "else dx"),
        },
        "kept": {"x kept for B": ("x if need_dw or need_da", "x if need_db or need_dw or need_da", KEPT)},
    },
    "fastpeft/ops/experts.py": {
        "_OfActivation.backward": {
            "second gradients silently 0": ("registered.no_second_gradients(ctx, dy)", "pass", SECOND),
        },
        "experts": {
            "one seed for both": ("else seeds", "else (seeds[0], seeds[0])"),
            "an activation that trains is forgotten": ("if h is not None and not h.requires_grad:",
                                                       "if h is not None:", TRAINS),
        },
    },
    "fastpeft/ops/experts_arguments.py": {
        "routing": {
            "sentinels are experts": ("torch.where((index >= 0) & (index < experts), index, -1)",
                                      "index.clamp(0, experts - 1)", CHOSEN),
            "tokens are rows": ("order // top_k_index.shape[1]", "order"),
        },
    },
    "fastpeft/nn/experts_call.py": {
        "by_expert": {
            "B's slow index taken for the expert": (
                "lora_b.view(len(lora_b), -1, experts).permute(2, 0, 1)",
                "lora_b.view(len(lora_b), experts, -1).permute(1, 0, 2)",
                COLUMNS,
            ),
            "A's fast index taken for the expert": (
                "lora_a.view(experts, -1, lora_a.shape[1])",
                "lora_a.view(-1, experts, lora_a.shape[1]).transpose(0, 1)",
                QWEN3,
            ),
        },
        "_stacked": {
            "Llama 4 as the others": ("if term.swapped == transposed:", "if False:", LLAMA4),
            "the second adapter's scale": ("[b * term.scale for", "[b * terms[0].scale for", ADAPTERS),
        },
        "_projection": {
            "transposed weights taken as they are": ("weight.mT if layout.transposed else weight", "weight", GPT_OSS),
            "biases left out": ('_bias") if layout.bias else None', '_bias") if False else None', BIASES),
            "dropout of no adapter": ("layout.transposed), pairs[0].dropout)", "layout.transposed))", DROPOUT),
        },
        "_registered_layout": {
            "a gate where there is none": ('if module.has_gate else ("up_proj", module.act_fn)',
                                           "if True else None", NEMOTRON),
        },
    },
    "fastpeft/integrations/_experts.py": {
        "plan": {"hooks of inner wrappers skipped": ("map(_fusable._intercepted, nest[1:])", "()", REASONS)},
        "_terms": {"disabled adapters computed": ("if wrapper._disable_adapters:", "if False:", REASONS)},
    },
    "fastpeft/nn/lora_experts.py": {
        "LoraExperts.forward": {
            "disabled adapters act": ("self.disabled or self.merged", "self.merged", LIFE),
            "what is not fused drops nothing": ("if self.training and any(", "if False and any(", UNFUSED),
        },
        "LoraExperts._terms": {
            "dropout in evaluation": ("pair.dropout if self.training else 0.0", "pair.dropout", DROPOUT),
        },
        "LoraExperts.unmerge": {"merged for good": ("self._exchange(self._before_merge)", "pass", LIFE)},
    },
    "fastpeft/nn/experts_weights.py": {
        "composed": {"transposed terms": ("delta if term.swapped else delta.mT", "delta", UNFUSED)},
        "deltas": {"merged the other way round": ("yield delta.mT if turned else delta", "yield delta", MERGED)},
        "sizes": {"A and B of another width": ("(shape[0], shape[2], shape[1]) if swapped(base, parameter)",
                                               "(shape[0], shape[1], shape[2]) if swapped(base, parameter)", LIFE)},
    },
    "fastpeft/methods/lora/experts.py": {
        "keys_of": {"the first parameter outermost": ("(depth - i)", "i", OURS)},
        "_meant": {"excluded experts adapted": ("or excluded(path, config) or excluded(whole, config)", "", NAMED)},
        "adapt": {"one rank for all": ('config.rank_of(f"{path}.{parameter}")', "config.r", NAMED)},
    },
    "fastpeft/integrations/peft.py": {
        "restore": {"experts stay": ("_THEIRS.get(type(layer), type(layer))", "type(layer)", RESTORE)},
    },
}  # fmt: skip
