# ruff: noqa: E501
"""Mutants of select, Selective and LisaSchedule, and of where backward ends, as run.py says."""

FILE, FILES, LISA = (
    "tests/methods/selective/test_selective.py",
    "tests/methods/selective/test_files.py",
    "tests/methods/selective/test_lisa.py",
)
BACK = f"{FILE}::test_trains_what_was_chosen_and_reverts_bit_for_bit"
BLOCKS = f"{FILE}::test_exactly_the_blocks_that_were_named"
STACK = f"{FILE}::test_the_stack_is_the_longest_list_of_like_blocks"
SCOPE = f"{FILE}::test_layers_say_where_the_other_selectors_apply"
MISSING = f"{FILE}::test_missing_biases_are_those_of_all_linear_layers_but_the_head"
LOOKS = f"{FILE}::test_biases_and_norms_by_their_looks"
FRACTION = f"{FILE}::test_rows_by_fraction_are_the_same_every_time"
BAD = f"{FILE}::test_bad_input_changes_nothing"
TRUNK = f"{FILE}::test_no_node_below_the_first_trained_block[llama-reentrant]"
ASKED = f"{FILE}::test_what_checkpoints_ask_of_the_embedding_is_taken_back_and_restored"
HANDED = f"{FILE}::test_blocks_that_are_handed_to_a_reentrant_checkpoint"
LEFT = f"{FILE}::test_revert_leaves_no_gradients_and_the_mode_the_model_has"
TIED = f"{FILE}::test_tokens_of_a_tied_model_train_both_sides"
GROUPS = f"{FILE}::test_param_groups"
SAVED = f"{FILES}::test_what_is_saved_is_what_is_loaded"
TWO = f"{FILES}::test_two_named_selections"
SHARED = f"{FILES}::test_selections_that_share_a_weight_cannot_act_together"
BESIDE = f"{FILES}::test_attached_beside_lora"
ACTIVE = f"{LISA}::test_only_active_blocks_and_the_head_train"
RESTING = f"{LISA}::test_the_state_of_resting_blocks"

TESTS = (FILE, LISA, FILES)
MUTANTS = {
    "fastpeft/methods/selective/blocks.py": {
        "one block more than last:k": ('paths[count - k :] if ends[1] == "last"', 'paths[max(count - k - 1, 0) :] if ends[1] == "last"', BLOCKS),
        "one block more than first:k": ("else paths[:k]", "else paths[: k + 1]", BLOCKS),
        "a closed range": ("paths[slice(*(int(text) if text else None for text in part.groups()))]", "paths[slice(int(part[1] or 0), int(part[2] or count) + 1)]", BLOCKS),
        "block -1 is none": ("-count <= item < count", "0 <= item < count", BLOCKS),
        "block 1 is also block 11": ('path.endswith(f".{item}")', "path.endswith(item)", BLOCKS),
        "layers that match nothing": ("        if not found:\n", "        if False:\n", BAD),
        "experts inside a block are a stack": (' or path.startswith(tuple(f"{outer}." for outer in found)):', ":", STACK),
        "modules of all sorts are a stack": ("len(module) >= 2 and len(kinds) == 1 and", "len(module) >= 2 and", STACK),
        "the shortest stack": ("max(map(len,", "min(map(len,", STACK),
        "the first of two stacks of one length": ("if len(names) != 1:", "if not names:", f"{FILE}::test_a_plain_model_and_blocks_named_by_the_user"),
    },
    "fastpeft/methods/selective/plan.py": {
        "layers.1 is also layers.11": ('tuple(f"{path}." for path in paths)\n        if', "tuple(paths)\n        if", BLOCKS),
        "params everywhere": ("for name in _named(word, parameters, modules) if in_scope(name)]", "for name in _named(word, parameters, modules)]", SCOPE),
        "rows everywhere": ('(p for p in modules if p)) if in_scope(f"{path}.")]', "(p for p in modules if p))]", SCOPE),
        "missing biases everywhere": (' and m is not head and in_scope(f"{p}.")]', " and m is not head]", SCOPE),
        "a named bias outside the layers": ('        if not in_scope(f"{path}."):\n', "        if False:\n", SCOPE),
        "the head gets a bias": (" and m is not head and", " and", MISSING),
        "a bias in place of a bias": ("if path not in linears or linears[path].bias is not None:", "if path not in linears:", MISSING),
        "params that match nothing": ('if not found and not (word == "bias" and config.add_missing_bias):', "if False:", BAD),
        "in_proj_bias is none": (' or name.endswith("_bias")]', "]", LOOKS),
        "a block is a norm": ("        and not len(module._modules)\n", "", LOOKS),
        "a table is a norm": ("        and all(p.dim() < 2 for p in own)\n", "", LOOKS),
        "a tied module is not found": (" or id(p) in owned] if paths", "] if paths", f"{FILE}::test_a_tied_module_is_trained_once_and_said_to_be_tied"),
        "the tied output layer is forgotten": ('tied = [p for p, m in modules.items() if m is not module and getattr(m, "weight", None) is module.weight]', "tied = []", TIED),
        "rows of a tied weight": ('if part.kind != "tokens" and sharers:', "if False:", f"{FILE}::test_rows_of_a_tied_weight_are_refused"),
        "one weight selected twice": ("        if id(weight) in taken:\n", "        if False:\n", BAD),
        "every layer draws the same rows": ('random.Random(f"{seed} {path}")', "random.Random(seed)", FRACTION),
        "the seed is ignored": ('random.Random(f"{seed} {path}")', "random.Random(path)", FRACTION),
        "a small fraction is none": ("max(1, round(part * size))", "round(part * size)", FRACTION),
        "Conv1D as nn.Linear": ('(kind == "columns") != is_conv1d(module)', 'kind == "columns"', f"{FILE}::test_rows_of_a_conv1d_are_output_features"),
        "the largest table is the input": ("if table is not None and module is table:", "if False:", f"{FILE}::test_tokens_are_those_of_the_input_embedding"),
        "the smallest table is the input": ("return max(tables,", "return min(tables,", f"{FILE}::test_tokens_are_those_of_the_input_embedding"),
    },
    "fastpeft/methods/selective/selection.py": {
        "frozen parts stay trainable": ("        model.requires_grad_(False)\n", "", BACK),
        "flags of a failure stay": ("        finally:\n            for name, parameter in model.named_parameters():\n", "        finally:\n            for name, parameter in ():\n", f"{FILE}::test_a_failure_in_the_middle_changes_nothing"),
        "revert leaves hooks": ("        self._entry.remove()\n", "", BACK),
        "revert leaves flags": ("            parameter.requires_grad_(self._flags.get(name, parameter.requires_grad))\n", "            pass\n", BACK),
        "revert goes half the way": ("        if since or not names.issuperset(self._flags):", "        if False:", f"{FILE}::test_adapters_that_were_attached_since_come_off_first"),
        "a model around it is not seen": (" or not names.issuperset(self._flags):", ":", f"{FILE}::test_adapters_that_were_attached_since_come_off_first"),
        "norms at the biases' rate": ('rates["norms"] = lr if norm_lr is None else norm_lr', 'rates["norms"] = lr if bias_lr is None else bias_lr', GROUPS),
        "norms are biases": ('"norms" if name.rpartition(".")[0] in norms else "biases" if parameter.dim() < 2 else "weights"', '"biases" if parameter.dim() < 2 else "norms" if name.rpartition(".")[0] in norms else "weights"', GROUPS),
        "token rows decay": ('"tokens" if name in tokens else kind', "kind", GROUPS),
        "biases decay": ('weight_decay if kind == "weights" else 0.0', 'weight_decay if kind in ("weights", "biases") else 0.0', GROUPS),
        "slices count twice": (" if id(p) not in slices)", ")", f"{FILE}::test_the_table_counts"),
        "a part's adapters are not seen": ("for path, module in model.named_modules():\n        if attachment_of", 'for path, module in [("", model)]:\n        if attachment_of', f"{FILE}::test_a_part_that_has_adapters_or_a_selection_is_refused"),
        "usable after revert": ("if selection_of(self.model) is not self:", "if False:", f"{FILE}::test_one_selection_at_a_time"),
    },
    "fastpeft/methods/selective/change.py": {
        "what was there is no copy": ('.to("cpu", copy=True)', '.to("cpu")', BACK),
        "missing biases stay": ("            original_at(model, path).bias = None\n", "            pass\n", f"{BACK}[bitfit]"),
        "rows stay as trained": ("            weight.index_copy_(", "            (", BACK),
        "gradients stay": ("            own[name].grad = None\n", "", LEFT),
        "modules come back in an old mode": ("layer.base_layer.train(layer.training)", "layer.base_layer", LEFT),
        "a sliced layer has no new bias": ('            layer._parameters["bias"] = getattr(layer.base_layer, "bias", None)  # perhaps just added\n', "", f"{BACK}[all]"),
        "an embedding's hooks stop": ("            if name in base.__dict__:\n", "            if False:\n", f"{FILE}::test_hooks_of_an_embedding_go_on_while_its_tokens_train"),
        "slices come back untrained": ("            layer._stale = True\n", "", BESIDE),
        "slices clash with nothing": (', *(f"{p}.weight" for p in self.layers)}', "}", SHARED),
    },
    "fastpeft/methods/selective/method.py": {
        "what is inactive acts": ("                change.train(model, False)\n                change.leave(model)\n", "                change.train(model, False)\n", TWO),
        "what is inactive is trained": ("                change.train(model, False)\n", "", TWO),
        "two train one weight": ("                taken[weight] = name\n", "                pass\n", TWO),
        "hooks pile up": ("            record.entry.remove()\n        record.entry = GradEntry(model)", "            pass\n        record.entry = GradEntry(model)", SHARED),
        "detach leaves hooks": ("            record.entry.remove()\n            record.entry = None\n", "            record.entry = None\n", SHARED),
        "detach leaves what was trained": ("        if change is not None and change.active:\n", "        if False:\n", BESIDE),
        "disabled for good": ("                change.enter(model)\n                for", "                for", BESIDE),
        "PEFT's norms are nobody's": ("(files.OWN, files.TOKENS, files.NORMS)", "(files.OWN, files.TOKENS)", f"{FILES}::test_what_select_saved_is_an_adapter_too"),
    },
    "fastpeft/methods/selective/files.py": {
        "norms and more as norms alone": ("    if set(renamed) != set(plan.whole):\n", "    if not renamed:\n", SAVED),
        "new biases are not written": ('"rows", "columns", "add_missing_bias")', '"rows", "columns")', f"{SAVED}[bitfit]"),
        "PEFT's tokens in an order of ours": ("rows[sorted(range(len(numbers)), key=numbers.__getitem__)]", "rows", f"{FILES}::test_we_read_pefts"),
        "keys that are missing": ("if key not in tensors]", "if False]", f"{FILES}::test_bad_files_change_nothing"),
        "keys of another model": ("if key not in destinations]", "if False]", f"{FILES}::test_bad_files_change_nothing"),
        "a bad file leaves a selection": ("        selection.revert()\n        raise\n", "        raise\n", f"{FILES}::test_bad_files_change_nothing"),
        "settings that are not served": ("if value and name not in _WITHOUT_EFFECT and", "if False and", f"{FILES}::test_bad_files_change_nothing"),
    },
    "fastpeft/methods/selective/grad_entry.py": {
        "the embedding's output requires a gradient": ("            self._silence(asker)\n", "            pass\n", ASKED),
        "what transformers asked for is not put back": ("            module._forward_hooks[key] = hook\n", "            pass\n", ASKED),
        "no gradient enters": ("            return self.opened(args)\n        return None", "            return None\n        return None", TRUNK),
        "gradients enter at every block": ('_reentrant(getattr(block, _FUNCTION, None)) and self.first_of(block) is block:', "_reentrant(getattr(block, _FUNCTION, None)):", TRUNK),
        "the first stack is everybody's": ("next(blocks for blocks in self.stacks if any(other is block for other in blocks))", "self.stacks[0]", f"{FILE}::test_reentrant_checkpoints_of_two_stacks"),
        "a block that is handed over gets no gradient": ("            args = self.entry.opened(args)\n", "            pass\n", HANDED),
        "gradients enter at every block that is handed over": (" and block in self.entry.blocks and self.entry.first_of(block) is block:", " and block in self.entry.blocks:", HANDED),
        "what PyTorch may do is not reentrant": ('get("use_reentrant") is not False', 'get("use_reentrant") is True', HANDED),
        "revert leaves a checkpoint function": ("                setattr(owner, _FUNCTION, owner.__dict__[_FUNCTION].function)\n", "                pass\n", HANDED),
    },
    "fastpeft/methods/selective/lisa.py": {
        "never another block": ("step // self.every", "0", ACTIVE),
        "other blocks at every step": ("step // self.every", "step", ACTIVE),
        "one block more": ("range(len(self.blocks)), self.n_active)", "range(len(self.blocks)), self.n_active + 1)", RESTING),
        "the seed is ignored": ('random.Random(f"{self.seed} {step', 'random.Random(f"{step', f"{LISA}::test_every_block_gets_its_turn_and_resuming_draws_the_same"),
        "state of resting blocks is kept": ("if optimizer is not None and not self.keep_state:", "if False:", RESTING),
        "state is dropped in any case": ("if optimizer is not None and not self.keep_state:", "if optimizer is not None:", RESTING),
        "gradients of resting blocks are kept": ("                parameter.grad = None  # or the optimizer would go on updating it\n", "", f"{LISA}::test_a_block_that_comes_to_rest_keeps_no_gradient"),
        "blocks with nothing to train get a turn": ("[block for block in found if block]", "found", f"{LISA}::test_only_blocks_with_something_to_train_are_drawn"),
        "embedding and head swapped": ("for wanted, name in ((train_embeddings,", "for wanted, name in ((train_head,", f"{LISA}::test_the_ends_that_always_train"),
        "tied ends are two": ("return list(dict.fromkeys(found))", "return found", f"{LISA}::test_the_ends_that_always_train"),
        "everything trains": ("        self.model.requires_grad_(False)\n", "", f"{LISA}::test_backward_ends_at_the_lowest_active_block"),
        "an optimizer built before the first step knows nothing": ("            parameter.requires_grad_(True)\n", "            pass\n", f"{LISA}::test_as_a_callback_of_the_trainer"),
        "the Trainer's count is ignored": ("        self.steps = state.global_step\n", "", f"{LISA}::test_as_a_callback_of_the_trainer"),
        "a resumed run starts anew": ('self.steps = state["steps"]', "self.steps = 0", f"{LISA}::test_every_block_gets_its_turn_and_resuming_draws_the_same"),
        "close leaves hooks": ("            self._entry.remove()\n", "            pass\n", f"{LISA}::test_close_gives_the_flags_back"),
        "close leaves flags": ("            parameter.requires_grad_(self._flags.get(name, parameter.requires_grad))\n", "            pass\n", f"{LISA}::test_close_gives_the_flags_back"),
    },
}  # fmt: skip
