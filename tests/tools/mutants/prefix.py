# ruff: noqa: E501
"""Mutants of prefix attention and of the entries that give rows their prompts and prefixes, as run.py says."""

EQUAL = "tests/methods/prefix/test_attention.py::test_equals_a_prefix_in_front"
DROPOUT = "tests/methods/prefix/test_attention.py::test_dropout_near_0_is_none"
KEEPS = "tests/methods/prefix/test_attention.py::test_keeps_no_copy_of_the_prefix_and_no_scores"
WIDE = "tests/methods/prefix/test_attention_kernels.py::test_float32_equals_a_prefix_in_front"
BITS = "tests/methods/prefix/test_attention_kernels.py::test_error_of_16_bits_against_float64"
NOTHING = "tests/methods/prefix/test_attention_kernels.py::test_queries_that_see_nothing"
STRIDES = "tests/methods/prefix/test_attention_kernels.py::test_any_strides_and_offsets"
CHOICE = "tests/methods/prefix/test_attention_kernels.py::test_choice"
PEFT = "tests/methods/prefix/test_prefix_tuning.py::test_equals_peft"
ROWS = "tests/methods/prefix/test_rows.py::test_rows_equal_separate_runs"
GENERATE = "tests/methods/prefix/test_rows.py::test_generate[{}-llama]"
CHECKPOINTED = (
    "tests/methods/prefix/test_prefix_tuning.py::test_gradient_checkpointing_where_peft_raises[llama-projection]"
)
P_ROWS = "tests/methods/prompt/test_rows.py::test_rows_equal_separate_runs"
P_GENERATE = "tests/methods/prompt/test_rows.py::test_generate_by_row[{}-llama]"
P_CACHE = "tests/methods/prompt/test_rows.py::test_a_cache_that_goes_on"
P_HEADS = "tests/methods/prompt/test_rows.py::test_other_heads_by_row"
P_IN = "tests/methods/prompt/test_entries.py"
IN = "tests/methods/prefix/test_entries.py"
P_BAD = "tests/methods/prompt/test_errors.py::test_bad_calls_change_nothing"

TESTS = (EQUAL, DROPOUT, PEFT, ROWS, P_ROWS)

MUTANTS = {
    "fastpeft/nn/prefix_attention.py": {
        "_merged": {
            "prefix weighed the other way": ("part_lse - lse", "lse - part_lse", EQUAL),
            "L of the own keys alone": ("torch.logaddexp(lse, part_lse)", "lse", EQUAL),
            "16 bits: both parts weighed alike": ("lse - part_lse", "part_lse - lse", BITS),
        },
        "_PrefixAttention.forward": {
            "O of the own keys in backward": (", v, out, lse", ", v, kernels.choose(q, k, v, mask, causal).attend(q, k, v, mask, causal, scale)[0].to(q.dtype), lse", EQUAL),
            "one prefix for all rows": ("out.index_copy_(0, which, merged)", "torch.cat([merged, out])[: len(out)]", EQUAL),
            "L of rows without a prefix": (".index_copy_(0, which, total)", "", EQUAL),
            "NaN from queries that see nothing": ("masked_fill(lse == -torch.inf, 0)", "clone()", NOTHING),
        },
        "_PrefixAttention.backward": {
            "dq without the prefix": (".add_(part)", "", EQUAL),
        },
        "_explicit": {
            "dropout: rows without a prefix lost": ("rest[which]", "rest[:]", DROPOUT),
            "dropout: scores of the prefix not scaled": ("(scores.dtype) * scale", "(scores.dtype)", DROPOUT),
            "dropout: values of the prefix": ("@ value[None]", "@ key[None]", DROPOUT),
            "dropout: none": ("dropout, True", "dropout, False", "tests/methods/prefix/test_attention.py::test_dropout_drops_and_keeps_the_mean"),
        },
    },
    "fastpeft/nn/prefix_attention_kernels.py": {
        "packed": {
            "groups of heads mixed up": ("1, 2, 0, 3", "1, 0, 2, 3", EQUAL),
        },
        "_cpu_flash": {
            "blind queries see something": ("masked_fill((bias == -torch.inf).all(-1), -torch.inf)", "clone()", EQUAL),
        },
        "added": {
            "mask the other way": (".logical_not()", "", EQUAL),
        },
        "scores": {
            "scores: causal ignored": ("triu(1),", "triu(99),", EQUAL),
        },
        "_explicit_backward": {
            "scores: delta dropped": ("mT - delta", "mT", EQUAL),
        },
        "_summed": {
            "gradients of one head of a group": ("(grouped.sum(over).reshape", "(grouped[:, :, :1].sum(over).reshape", EQUAL),
            "prefix's gradient of the first row": ("grouped = grad.", "grouped = grad[: len(like)].", EQUAL),
        },
        "_wide": {
            "parts rounded on a CPU": ("torch.promote_types(t.dtype, torch.float32)", "t.dtype", "tests/methods/prefix/test_attention.py::test_error_against_float64"),
        },
        "_flash_reason": {
            "flash: causal from the last key on": ("causal and queries != keys", "False", "tests/methods/prefix/test_attention_kernels.py::test_causal_is_from_the_first_key_on"),
            "flash: a head size without backward": ("192 < d <= 224", "d < 0", CHOICE),
        },
        "_flash": {
            "flash: strides as they come": ("*map(_aligned, (q, *_expanded(q, k, v)))", "q, *_expanded(q, k, v)", STRIDES),
        },
        "_flash_backward": {
            "flash: sizes swapped": ("q.shape[2], k", "k.shape[2], q", BITS),
        },
        "_efficient": {
            "efficient: L of the filling": ("(2, 0, q.shape[2])", "(2, lse.shape[2] - q.shape[2], q.shape[2])", WIDE),
            "efficient: the lowest number is not -inf": ("> _LOWEST", "> -torch.inf", NOTHING),
            "efficient: O of blind queries": (".masked_fill(blind.unsqueeze(-1), 0)", "", NOTHING),
            "efficient: L of blind queries": (".masked_fill(blind, -torch.inf)", "", NOTHING),
        },
        "_efficient_backward": {
            "efficient: filled with what counts": ("torch.inf", "0.0", WIDE),
            "efficient: layout of O as it comes": ("heads_inside(dout), q, *wide, heads_inside(out)", "dout, q, *wide, out", WIDE),
        },
        "_efficient_reason": {
            "efficient: a wider mask rounded": ("not in (torch.bool, q.dtype)", "is None", CHOICE),
        },
        "_bias": {
            "efficient: rows of a mask not padded": ("F.pad(bias, (0, -keys % 16)) if keys % 16 else bias", "bias", WIDE),
            "efficient: a mask's strides as they come": ("_aligned(bias)", "bias", STRIDES),
        },
        "_no_gpu": {
            "an old device": ("major < 8 else", "major < 0 else", CHOICE),
        },
        "_unlike": {
            "two dtypes": ("not q.dtype == k.dtype == v.dtype", "False", CHOICE),
        },
    },
    "fastpeft/nn/prefix.py": {
        "Prefixes._positions": {
            "positions without the prefix": ("self.first + shift", "self.first", PEFT),
            "given positions without the prefix": ('["position_ids"] + shift', '["position_ids"]', GENERATE),
            "RoBERTa's positions": ("_past(given) + shift", "_past(given)", "tests/methods/prefix/test_prefix_tuning.py::test_equals_peft[sdpa-roberta-plain]"),
        },
        "Call.of": {
            "keys and values swapped": ("[layer, 0], values[layer, 1]", "[layer, 1], values[layer, 0]", PEFT),
        },
        "Prefixes.before": {
            "all rows have the first prefix": ("== len(members)", ">= 1", ROWS),
        },
        "Prefixes.after": {
            "nobody looks whether layers attended": ("not None", "None", "tests/methods/prefix/test_errors.py::test_a_model_that_does_not_hand_its_arguments_on"),
        },
        "Prefixes._refuse": {
            "reentrant checkpointing": ('on and getattr(function, "keywords", {}).get("use_reentrant", False)', "False", CHECKPOINTED),
        },
        "PrefixAdapter.flat": {
            "the projection for every row": ("(self.embedding)", "(self.embedding.repeat(2, 1))[: self.length]", "tests/methods/prefix/test_prefix_tuning.py::test_the_projection_is_evaluated_once_a_forward"),
        },
    },
    "fastpeft/nn/prefix_function.py": {
        "attention_beside": {
            "first layer's prefix for all": ("layer: Any = module.layer_idx", "layer = 0 * module.layer_idx", PEFT),
            "own scale ignored": ("if scale is None else scale", "* 1.01", PEFT),
            "dropout ignored": ('options.get("dropout") or 0', "0", "tests/methods/prefix/test_prefix_tuning.py::test_16_bit_model_and_dropout"),
            "encoders are causal": ('getattr(module, "is_causal", True) if causal is None else causal', "True", "tests/methods/prefix/test_prefix_tuning.py::test_equals_peft[sdpa-bert-plain]"),
            "windows and sinks are forgotten": ("any(options.get(name) is not None for name in SPECIAL)", "False", f"{IN}::test_in_a_window"),
        },
        "in_front": {
            "a prefix never moves out of sight": ("steps < window", "steps < window + 99", f"{IN}::test_in_a_window"),
            "padding of shorter prefixes is seen": ("steps < length[:, None]", "steps < longest + 0 * length[:, None]", f"{IN}::test_rows_in_a_window"),
        },
    },
    "fastpeft/methods/prefix/reasons.py": {
        "_reason": {
            "chunks are windows": ("- set(KINDS))", "- set(KINDS) - {'chunked_attention'})", f"{IN}::test_refused_by_name"),
        },
    },
    "fastpeft/nn/entry.py": {
        "entered": {
            "backbones are no way in": ("if _takes_tokens(module)", "if not _takes_tokens(module)", f"{P_IN}::test_every_way_in_sees_the_prompt"),
        },
        "Entry.__call__": {
            "bound twice": ("args and args[0] is self.module", "False", f"{P_IN}::test_forwards_of_others_and_signatures"),
            "three rows of positions at the outermost": ("self.innermost if self.gate.inner else outermost", "outermost", f"{P_IN}::test_positions_of_three_rows"),
        },
        "Entry.original": {
            "another library's forward is passed by": ("self.before is not None", "False", f"{P_IN}::test_forwards_of_others_and_signatures"),
        },
        "parts_of": {
            "prefixes first": ("part.order", "-part.order", "tests/methods/prefix/test_rows.py::test_beside_prompts_by_row"),
        },
    },
    "fastpeft/nn/cache.py": {
        "found": {
            "an emptied cache goes on": ("None if count is not None and count == 0 else note", "note", f"{P_IN}::test_an_emptied_cache_begins_anew"),
        },
        "make_room": {
            "no room for the prompt": ("if wanted != size", "if False", f"{P_IN}::test_an_emptied_cache_begins_anew"),
        },
    },
    "fastpeft/methods/prefix/method.py": {
        "PrefixMethod._of_text": {
            "another prefix in the text's": ("self.disable(model) if self.present(model) else lambda", "lambda", "tests/methods/prefix/test_rows.py::test_starts_as_a_text_in_front"),
        },
        "PrefixMethod.remove": {
            "attention stays": ("text_config(model)._attn_implementation = record", "record", "tests/methods/prefix/test_prefix_tuning.py::test_detach_leaves_the_model_as_it_was"),
        },
    },
    "fastpeft/methods/prefix/files.py": {
        "PrefixFiles.write": {
            "projection not kept": ("write_tensors(op, directory / RAW, tensors)", "", "tests/methods/prefix/test_prefix_tuning.py::test_training_goes_on_where_it_stopped"),
            "an old projection comes back": ("unlink(missing_ok=True)", "exists()", "tests/methods/prefix/test_prefix_tuning.py::test_training_goes_on_where_it_stopped"),
        },
    },
    "fastpeft/nn/prompt.py": {
        "Prompts.before": {
            "prompts in every step": ("caches.found(cache, KEY)", "None", P_CACHE),
            "an encoder's output knows nothing": ('{**given, "attention_mask": for_rows(done.mask, given)}', "given", "tests/methods/prompt/test_rows.py::test_encoder_decoder_by_row"),
        },
        "Prompts._continued": {
            "mask as the caller sees it": ("mask is not None or not done.alike", "False", P_CACHE),
            "positions as the caller sees them": ('found["position_ids"] = start + torch.arange(new, device=start.device)', "pass", P_CACHE),
        },
        "Prompts._prefilled": {
            "next position of the longest row": ("(1, keepdim=True) + 1", "() + 1 + 0 * batch.position_ids.amax(1, keepdim=True)", P_CACHE),
            "labels as they were": ('found["labels"] = self._unpredicted(batch, plan.side)', "pass", P_ROWS),
            "token types as they were": ("found[name] = padded.labels", "pass", P_HEADS),
        },
        "Prompts._unpredicted": {
            "padding predicts the first token": (".scatter(1, batch.attention_mask.argmax(1, keepdim=True), -100)", "", P_ROWS),
        },
        "Prompts.after": {
            "a cache that no output hands back": ("or before", "", f"{P_IN}::test_decoding_goes_on_after_the_prompt"),
        },
        "Prompts._side": {
            "padding side of the model": ("if self.padding_side is not None:\n            return self.padding_side", "", P_ROWS),
            "classifiers read padding": ('if self.reads_last:\n            return "left"', "", P_HEADS),
        },
        "Prompts._source": {
            "hooks of the embedding skipped": ("and not hooks and", "and", "tests/methods/prompt/test_prompt_tuning.py::test_a_trained_embedding_and_one_with_hooks"),
        },
    },
    "fastpeft/nn/prompt_plan.py": {
        "for_rows": {
            "beams unknown": ("repeat_interleave(batch // len(rows), 0)", "repeat(batch // len(rows), 1)", "tests/methods/prompt/test_rows.py::test_encoder_decoder_by_row"),
        },
        "Plan.planes": {
            "rows of positions without the prompt": ("self.gather(inputs_embeds=nothing, position_ids=p).position_ids for", "torch.nn.functional.pad(p, (3, 0)) for", f"{P_IN}::test_positions_of_three_rows"),
        },
    },
    "fastpeft/nn/rows.py": {
        "check_rows": {
            "unknown names pass": ("name is not None and name != BASE and name not in known", "False", P_BAD),
        },
        "RowAdapters.members": {
            "too few names": ("rows or batch % len(rows)", "rows", P_BAD),
            "beams in another order": ("name in rows for _ in range(batch // len(rows))", "_ in range(batch // len(rows)) for name in rows", "tests/methods/prompt/test_rows.py::test_generate_by_row[{'num_beams': 3}-llama]"),
            "disabled, yet there": ("self.disabled", "False", "tests/methods/prompt/test_prompt_tuning.py::test_disabled_and_copied"),
        },
    },
}  # fmt: skip
