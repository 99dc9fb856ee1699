# ruff: noqa: E501
"""Mutants of prefix attention and of the hooks that give rows their prompts and prefixes, as run.py says."""

EQUAL = "tests/methods/prefix/test_attention.py::test_equals_a_prefix_in_front"
DROPOUT = "tests/methods/prefix/test_attention.py::test_dropout_near_0_is_none"
KEEPS = "tests/methods/prefix/test_attention.py::test_keeps_no_copy_of_the_prefix_and_no_scores"
WIDE = "tests/methods/prefix/test_attention_kernels.py::test_float32_equals_a_prefix_in_front"
BITS = "tests/methods/prefix/test_attention_kernels.py::test_error_of_16_bits_against_float64"
NOTHING = "tests/methods/prefix/test_attention_kernels.py::test_queries_that_see_nothing"
STRIDES = "tests/methods/prefix/test_attention_kernels.py::test_any_strides_and_offsets"
CHOICE = "tests/methods/prefix/test_attention_kernels.py::test_choice"
PEFT = "tests/methods/prefix/test_prefix_tuning.py::test_equals_peft"
ROWS = "tests/methods/prefix/test_prefix_tuning.py::test_rows_equal_separate_runs"
GENERATE = "tests/methods/prefix/test_prefix_tuning.py::test_generate[{}-llama]"
CHECKPOINTED = (
    "tests/methods/prefix/test_prefix_tuning.py::test_gradient_checkpointing_where_peft_raises[llama-projection]"
)
P_ROWS = "tests/methods/prompt/test_prompt_tuning.py::test_rows_equal_separate_runs"
P_GENERATE = "tests/methods/prompt/test_prompt_tuning.py::test_generate_by_row[{}-llama]"
P_CACHE = "tests/methods/prompt/test_prompt_tuning.py::test_a_cache_that_goes_on"
P_HEADS = "tests/methods/prompt/test_prompt_tuning.py::test_other_heads_by_row"
P_BAD = "tests/methods/prompt/test_prompt_tuning.py::test_bad_calls_change_nothing"

TESTS = (EQUAL, DROPOUT, PEFT, ROWS, P_ROWS)

MUTANTS = {
    "fastpeft/nn/prefix_attention.py": {
        "prefix weighed the other way": ("torch.sigmoid(part_lse - lse)", "torch.sigmoid(lse - part_lse)", EQUAL),
        "L of the own keys alone": ("return out, torch.logaddexp(lse, part_lse)", "return out, lse", EQUAL),
        "O of the own keys in backward": ("ctx.save_for_backward(q, k, v, out, lse, *prefixes)", "ctx.save_for_backward(q, k, v, kernels.choose(q, k, v, mask, causal).attend(q, k, v, mask, causal, scale)[0].to(q.dtype), lse, *prefixes)", EQUAL),
        "dq without the prefix": ("part = _taken(dq, which).add_(part)", "part = _taken(dq, which)", EQUAL),
        "one prefix for all rows": ("else out.index_copy_(0, which, merged)", "else torch.cat([merged, out])[: len(out)]", EQUAL),
        "L of rows without a prefix": ("lse = total if which is None else lse.index_copy_(0, which, total)", "lse = total if which is None else lse", EQUAL),
        "16 bits: both parts weighed alike": ("torch.sigmoid(lse - part_lse).unsqueeze(-1), out=out)", "torch.sigmoid(part_lse - lse).unsqueeze(-1), out=out)", BITS),
        "NaN from queries that see nothing": ("lse = lse.masked_fill(lse == -torch.inf, 0)", "lse = lse.clone()", NOTHING),
        "dropout: rows without a prefix lost": ("rest[which] = False", "rest[:] = False", DROPOUT),
        "dropout: scores of the prefix not scaled": ("@ key[None].mT).to(scores.dtype) * scale", "@ key[None].mT).to(scores.dtype)", DROPOUT),
        "dropout: values of the prefix": ("kernels.packed(weights[..., k.shape[2] :], key[None]) @ value[None]", "kernels.packed(weights[..., k.shape[2] :], key[None]) @ key[None]", DROPOUT),
        "dropout: none": ("torch.dropout(torch.cat(parts, -1).softmax(-1), dropout, True)", "torch.dropout(torch.cat(parts, -1).softmax(-1), dropout, False)", "tests/methods/prefix/test_attention.py::test_dropout_drops_and_keeps_the_mean"),
    },
    "fastpeft/nn/prefix_attention_kernels.py": {
        "groups of heads mixed up": ("permute(1, 2, 0, 3, 4).reshape(1, heads, -1, d)", "permute(1, 0, 2, 3, 4).reshape(1, heads, -1, d)", EQUAL),
        "blind queries see something": ("lse = lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)", "lse = lse.clone()", EQUAL),
        "mask the other way": ("masked_fill_(mask.logical_not(), -torch.inf)", "masked_fill_(mask, -torch.inf)", EQUAL),
        "scores: causal ignored": (".triu(1), -torch.inf)", ".triu(99), -torch.inf)", EQUAL),
        "scores: delta dropped": ("ds = weights * (wide @ repeated(v, q).to(acc).mT - delta) * scale", "ds = weights * (wide @ repeated(v, q).to(acc).mT) * scale", EQUAL),
        "gradients of one head of a group": ("(grouped.sum(over).reshape", "(grouped[:, :, :1].sum(over).reshape", EQUAL),
        "prefix's gradient of the first row": ("grouped = grad.unflatten(", "grouped = grad[: len(like)].unflatten(", EQUAL),
        "parts rounded on a CPU": ("torch.promote_types(t.dtype, torch.float32)", "t.dtype", "tests/methods/prefix/test_attention.py::test_error_against_float64"),
        "flash: causal from the last key on": ("if causal and queries != keys:", "if False:", "tests/methods/prefix/test_attention_kernels.py::test_causal_is_from_the_first_key_on"),
        "flash: strides as they come": ("_FLASH(*map(_aligned, (q, *_expanded(q, k, v))), ", "_FLASH(q, *_expanded(q, k, v), ", STRIDES),
        "flash: sizes swapped": ("sizes = q.shape[2], k.shape[2]", "sizes = k.shape[2], q.shape[2]", BITS),
        "flash: a head size without backward": ("or 192 < d <= 224:", "or d < 0:", CHOICE),
        "efficient: L of the filling": ("lse.narrow(2, 0, q.shape[2])", "lse.narrow(2, lse.shape[2] - q.shape[2], q.shape[2])", WIDE),
        "efficient: filled with what counts": ("value=torch.inf).contiguous()", "value=0.0).contiguous()", WIDE),
        "efficient: a wider mask rounded": ("mask.dtype not in (torch.bool, q.dtype)", "mask.dtype is None", CHOICE),
        "efficient: the lowest number is not -inf": ("mask > _LOWEST", "mask > -torch.inf", NOTHING),
        "efficient: O of blind queries": ("out, lse = out.masked_fill(blind.unsqueeze(-1), 0), lse", "out, lse = out, lse", NOTHING),
        "efficient: L of blind queries": ("lse.masked_fill(blind, -torch.inf)\n", "lse\n", NOTHING),
        "efficient: rows of a mask not padded": ("bias = F.pad(bias, (0, -keys % 16)) if keys % 16 else bias", "bias = bias", WIDE),
        "efficient: a mask's strides as they come": ("_aligned(bias).narrow", "bias.narrow", STRIDES),
        "efficient: layout of O as it comes": ("(heads_inside(dout), q, *wide, heads_inside(out))", "(dout, q, *wide, out)", WIDE),
        "an old device": ("if major < 8 else None", "if major < 0 else None", CHOICE),
        "two dtypes": ("if not q.dtype == k.dtype == v.dtype:", "if False:", CHOICE),
    },
    "fastpeft/nn/prefix.py": {
        "positions without the prefix": ("torch.arange(past, past + tokens.shape[1], device=tokens.device)[None] + shift", "torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]", PEFT),
        "given positions without the prefix": ("return given[\"position_ids\"] + shift", "return given[\"position_ids\"]", GENERATE),
        "RoBERTa's positions": ("return on * (on.cumsum(1) + past + shift) + self.padding", "return on * (on.cumsum(1) + past) + self.padding", "tests/methods/prefix/test_prefix_tuning.py::test_equals_peft[sdpa-roberta-plain]"),
        "keys and values swapped": ("(values[layer, 0], values[layer, 1], rows)", "(values[layer, 1], values[layer, 0], rows)", PEFT),
        "first layer's prefix for all": ("call.of(module.layer_idx)", "call.of(0)", PEFT),
        "all rows have the first prefix": ("rows = None if len(which) == len(members)", "rows = None if len(which) >= 1", ROWS),
        "own scale ignored": ("query.shape[-1] ** -0.5 if scale is None else scale,", "query.shape[-1] ** -0.5 * 1.01,", PEFT),
        "dropout ignored": ("options.get(\"dropout\") or 0.0,", "0.0,", "tests/methods/prefix/test_prefix_tuning.py::test_16_bit_model_and_dropout"),
        "encoders are causal": ("getattr(module, \"is_causal\", True) if causal is None else causal", "True", "tests/methods/prefix/test_prefix_tuning.py::test_equals_peft[sdpa-bert-plain]"),
        "nobody looks whether layers attended": ("if call is not None and call.seen !=", "if call is None and call.seen !=", "tests/methods/prefix/test_prefix_tuning.py::test_a_model_that_does_not_hand_its_arguments_on"),
        "reentrant checkpointing": ("if on and getattr(function, \"keywords\", {}).get(\"use_reentrant\", False):", "if False:", CHECKPOINTED),
        "the projection for every row": ("return self.embedding if self.transform is None else self.transform(self.embedding)", "return self.embedding if self.transform is None else self.transform(self.embedding.repeat(2, 1))[: self.length]", "tests/methods/prefix/test_prefix_tuning.py::test_the_projection_is_evaluated_once_a_forward"),
    },
    "fastpeft/methods/prefix/method.py": {
        "another prefix in the text's": ("enable = disable(others) if others is not None else lambda: None", "enable = lambda: None", "tests/methods/prefix/test_prefix_tuning.py::test_starts_as_a_text_in_front"),
        "attention stays": ("model.config._attn_implementation = record.pop(\"attention\")", "record.pop(\"attention\")", "tests/methods/prefix/test_prefix_tuning.py::test_detach_leaves_the_model_as_it_was"),
        "projection not kept": ("            write_tensors(op, directory / RAW, tensors)\n", "", "tests/methods/prefix/test_prefix_tuning.py::test_training_goes_on_where_it_stopped"),
        "an old projection comes back": ("(directory / RAW).unlink(missing_ok=True)", "(directory / RAW).exists()", "tests/methods/prefix/test_prefix_tuning.py::test_training_goes_on_where_it_stopped"),
    },
    "fastpeft/nn/prompt.py": {
        "prompts in every step": ("if not self.encodes and hasattr(cache, \"get_seq_length\") and cache.get_seq_length() > 0:", "if False:", P_CACHE),
        "mask as the caller sees it": ("found = {**given, \"attention_mask\": torch.cat([before, generated.to(before.dtype)], 1)}", "found = {**given}", P_CACHE),
        "positions as the caller sees them": ("found[\"position_ids\"] = start + torch.arange(new, device=start.device)", "pass", P_CACHE),
        "next position of the longest row": ("last = batch.position_ids.amax(1, keepdim=True) + 1", "last = batch.position_ids.amax() + 1 + 0 * batch.position_ids.amax(1, keepdim=True)", P_CACHE),
        "beams unknown": ("rows.repeat_interleave(batch // len(rows), 0)", "rows.repeat(batch // len(rows), 1)", "tests/methods/prompt/test_prompt_tuning.py::test_encoder_decoder_by_row"),
        "labels as they were": ("            found[\"labels\"] = batch.labels\n", "            pass\n", P_ROWS),
        "padding predicts the first token": ("batch.labels.scatter(1, batch.attention_mask.argmax(1, keepdim=True), -100)", "batch.labels", P_ROWS),
        "padding side of the model": ("        if self.padding_side is not None:\n            return self.padding_side\n", "", P_ROWS),
        "classifiers read padding": ("        if self.reads_last:\n            return \"left\"\n", "", P_HEADS),
        "token types as they were": ("                found[name] = padded.labels\n", "                pass\n", P_HEADS),
        "hooks of the embedding skipped": ("if plain and not hooks and", "if plain and", "tests/methods/prompt/test_prompt_tuning.py::test_a_trained_embedding_and_one_with_hooks"),
        "an encoder's output knows nothing": ("{**given, \"attention_mask\": _repeat(done.mask, given)}", "given", "tests/methods/prompt/test_prompt_tuning.py::test_encoder_decoder_by_row"),
    },
    "fastpeft/nn/rows.py": {
        "unknown names pass": ("if name is not None and name != BASE and name not in known:", "if False:", P_BAD),
        "too few names": ("if not rows or batch % len(rows):", "if not rows:", P_BAD),
        "beams in another order": ("for name in rows for _ in range(batch // len(rows))]", "for _ in range(batch // len(rows)) for name in rows]", "tests/methods/prompt/test_prompt_tuning.py::test_generate_by_row[{'num_beams': 3}-llama]"),
        "disabled, yet there": ("if self.disabled:", "if False:", "tests/methods/prompt/test_prompt_tuning.py::test_disabled_and_copied"),
        "the first to ask takes the names": ("if parts[-1] is self else", "if True else", "tests/methods/prefix/test_prefix_tuning.py::test_beside_prompts_by_row"),
    },
}  # fmt: skip
