# ruff: noqa: E501
"""Mutants of select, Selective and LisaSchedule, and of where backward ends, as run.py says."""

FILES, LISA = "tests/methods/selective/test_files.py", "tests/methods/selective/test_lisa.py"
BACKWARD = "tests/methods/selective/test_backward.py"
ERRORS = "tests/methods/selective/test_errors.py"
FILE = "tests/methods/selective/test_selective.py"
PAIRS, INPLACE = "tests/methods/test_pairs.py", "tests/methods/test_in_place.py"
SELECTION = "tests/methods/selective/test_selection.py"
BACK = f"{FILE}::test_trains_what_was_chosen_and_reverts_bit_for_bit"
BLOCKS = f"{FILE}::test_exactly_the_blocks_that_were_named"
STACK = f"{FILE}::test_the_stack_is_the_longest_list_of_like_blocks"
SCOPE = f"{FILE}::test_layers_say_where_the_other_selectors_apply"
MISSING = f"{FILE}::test_missing_biases_are_those_of_all_linear_layers_but_the_head"
LOOKS = f"{FILE}::test_biases_and_norms_by_their_looks"
FRACTION = f"{SELECTION}::test_rows_by_fraction_are_the_same_every_time"
BAD = f"{ERRORS}::test_bad_input_changes_nothing"
TRUNK = f"{BACKWARD}::test_no_node_below_the_first_trained_block[llama-reentrant]"
ASKED = f"{BACKWARD}::test_what_checkpoints_ask_of_the_embedding_is_taken_back_and_restored"
HANDED = f"{BACKWARD}::test_blocks_that_are_handed_to_a_reentrant_checkpoint"
LEFT = f"{FILE}::test_revert_leaves_no_gradients_and_the_mode_the_model_has"
ONE = "tests/methods/selective/test_shared_embeddings.py::test_a_stack_of_one_block"
REENTRANT = "tests/methods/test_reentrant.py"
TIED = f"{SELECTION}::test_tokens_of_a_tied_model_train_both_sides"
GROUPS = f"{SELECTION}::test_param_groups"
SAVED = f"{FILES}::test_what_is_saved_is_what_is_loaded"
TWO = f"{FILES}::test_two_named_selections"
SHARED = f"{FILES}::test_selections_that_share_a_weight_cannot_act_together"
BESIDE = f"{FILES}::test_attached_beside_lora"
ACTIVE = f"{LISA}::test_only_active_blocks_and_the_head_train"
RESTING = f"{LISA}::test_the_state_of_resting_blocks"

TESTS = (FILE, SELECTION, BACKWARD, ERRORS, LISA, FILES)
MUTANTS = {
    "fastpeft/methods/selective/blocks.py": {
        "_one": {
            "one block more than last:k": ("count - k", "max(count - k - 1, 0)", BLOCKS),
            "one block more than first:k": ("paths[:k]", "paths[: k + 1]", BLOCKS),
            "a closed range": ("*(int(text) if text else None for text in part.groups())", "int(part[1] or 0), int(part[2] or count) + 1", BLOCKS),
            "block -1 is none": ("-count <", "0 <", BLOCKS),
            "block 1 is also block 11": ('f".{item}"', "item", BLOCKS),
        },
        "chosen": {
            "layers that match nothing": ("not found", "False", BAD),
        },
        "stacks": {
            "experts inside a block are a stack": ('path.startswith(tuple(f"{outer}." for outer in found))', "False", STACK),
            "a list of one that wraps a stack is one": ("lists[path] < 2", "0", ONE),
        },
        "_is_stack": {
            "modules of all sorts are a stack": ("len({type(block) for block in module}) == 1 and", "len(module) and", STACK),
        },
        "blocks_of": {
            "the shortest stack": ("max(map(len,", "min(map(len,", STACK),
            "the first of two stacks of one length": ("len(names) != 1", "not names", f"{FILE}::test_a_plain_model_and_blocks_named_by_the_user"),
        },
    },
    "fastpeft/methods/selective/plan.py": {
        "resolve": {
            "layers.1 is also layers.11": ('f"{path}." for path in paths', "paths", BLOCKS),
            "params everywhere": ("(word, parameters, modules) if in_scope(name)", "(word, parameters, modules)", SCOPE),
            "params that match nothing": ('not found and not (word == "bias" and config.add_missing_bias)', "False", BAD),
        },
        "_slices": {
            "rows everywhere": ('(p for p in modules if p)) if in_scope(f"{path}.")', "(p for p in modules if p))", SCOPE),
            "every layer draws the same rows": ('f"{seed} {path}"', "seed", FRACTION),
            "the seed is ignored": ('f"{seed} {path}"', "path", FRACTION),
            "a small fraction is none": ("max(1, round(part * size))", "round(part * size)", FRACTION),
            "Conv1D as nn.Linear": ('(kind == "columns") != is_conv1d(module)', 'kind == "columns"', f"{FILE}::test_rows_of_a_conv1d_are_output_features"),
        },
        "_add_biases": {
            "missing biases everywhere": ('[path for path in lacking if in_scope(f"{path}.")]', "lacking", SCOPE),
            "a named bias outside the layers": ('not in_scope(f"{path}.")', "False", SCOPE),
            "the head gets a bias": ("and m is not head and", "and", MISSING),
            "a bias in place of a bias": ("linears or linears[path].bias is not None", "linears", MISSING),
        },
        "_named": {
            "in_proj_bias is none": ('or name.endswith("_bias")]', "]", LOOKS),
        },
        "is_norm": {
            "a block is a norm": ("and not len(module._modules)", "", LOOKS),
            "a table is a norm": ("and all(p.dim() < 2 for p in own)", "", LOOKS),
        },
        "_add_modules": {
            "a tied module is not found": ("or id(p) in owned] if paths", "] if paths", f"{SELECTION}::test_a_tied_module_is_trained_once_and_said_to_be_tied"),
        },
        "_add_tokens": {
            "the tied output layer is forgotten": ('p for p, m in modules.items() if m is not module and getattr(m, "weight", None) is module.weight', "", TIED),
        },
        "_check_disjoint": {
            "rows of a tied weight": ('part.kind != "tokens" and sharers', "False", f"{SELECTION}::test_rows_of_a_tied_weight_are_refused"),
            "one weight selected twice": ("id(weight) in taken", "False", BAD),
        },
        "_input_embedding": {
            "the largest table is the input": ("table is not None and module is table", "False", f"{FILE}::test_tokens_are_those_of_the_input_embedding"),
            "the smallest table is the input": ("return max(tables,", "return min(tables,", f"{FILE}::test_tokens_are_those_of_the_input_embedding"),
        },
    },
    "fastpeft/methods/selective/selection.py": {
        "load_selective": {
            "a bad file leaves a selection": ("selection.revert()\n        raise", "raise", f"{FILES}::test_bad_files_change_nothing"),
        },
        "Selection.__init__": {
            "frozen parts stay trainable": ("model.requires_grad_(False)", "", BACK),
            "flags of a failure stay": (", parameter in model.named_parameters():", ", parameter in ():", f"{FILE}::test_a_failure_in_the_middle_changes_nothing"),
        },
        "Selection.revert": {
            "revert leaves hooks": ("self._entry.remove()", "", BACK),
            "revert leaves flags": ("parameter.requires_grad_(self._flags.get(name, parameter.requires_grad))", "pass", BACK),
            "revert goes half the way": ("since or not names.issuperset(self._flags)", "False", f"{SELECTION}::test_adapters_that_were_attached_since_come_off_first"),
            "a model around it is not seen": ("or not names.issuperset(self._flags):", ":", f"{SELECTION}::test_adapters_that_were_attached_since_come_off_first"),
        },
        "Selection.param_groups": {
            "norms at the biases' rate": ("norm_lr is None else norm_lr", "bias_lr is None else bias_lr", GROUPS),
            "norms are biases": ('norms" if name.rpartition(".")[0] in norms else "biases" if parameter.dim() < 2', 'biases" if parameter.dim() < 2 else "norms" if name.rpartition(".")[0] in norms', GROUPS),
            "token rows decay": ('"tokens" if name in tokens else kind', "kind", GROUPS),
            "biases decay": ('== "weights"', 'in ("weights", "biases")', GROUPS),
        },
        "Selection.__str__": {
            "slices count twice": ("if id(p) not in slices)", ")", f"{SELECTION}::test_the_table_counts"),
        },
        "_select": {
            "a part's adapters are not seen": ("model.named_modules()", '[("", model)]', f"{SELECTION}::test_a_part_that_has_adapters_or_a_selection_is_refused"),
        },
        "Selection._check_alive": {
            "usable after revert": ("selection_of(self.model) is not self", "False", f"{SELECTION}::test_one_selection_at_a_time"),
        },
    },
    "fastpeft/methods/selective/change.py": {
        "_cpu": {
            "what was there is no copy": (", copy=True", "", BACK),
        },
        "Change.leave": {
            "missing biases stay": ("_set_bias(model, path, None)", "pass", f"{BACK}[bitfit]"),
            "rows stay as trained": ("_put_rows(layer, self.rows[part.path])", "pass", BACK),
        },
        "Change.rest": {
            "gradients stay": ("own[name].grad = None", "pass", LEFT),
        },
        "Change.__init__": {
            "what is loaded overwrites the originals": ("value.clone()", "value", f"{PAIRS}::test_every_other_adapter_after_this_one[params]"),
        },
        "Change.enter": {
            "slices come back untrained": ("layer.write()", "pass", f"{INPLACE}::test_a_backward_may_come_after_a_block_that_disables"),
            "a backward of before the block raises": ("again and self._before", "False and self._before", f"{INPLACE}::test_a_backward_may_come_after_a_block_that_disables"),
        },
        "_set_bias": {
            "a sliced layer has no new bias": ('standing._parameters["bias"] = bias', "pass", f"{INPLACE}::test_a_bias_is_added_where_another_adapter_trains_rows"),
        },
        "_slice_layers": {
            "an embedding's hooks stop": ("for name in _SHARED", "for name in ()", f"{FILE}::test_hooks_of_an_embedding_go_on_while_its_tokens_train"),
        },
    },
    "fastpeft/methods/selective/changes.py": {
        "Changes.set_active": {
            "what is inactive is trained": ("self.of[name].rest(model)", "pass", TWO),
        },
        "Changes._sync": {
            "what is inactive acts": ("change.leave(model, for_a_while=name in self.wanted)", "pass", TWO),
            "disabled and yet there": ("self.lifted or self.disabled", "self.lifted", BESIDE),
        },
        "Changes.disable": {
            "disabled for good": ("self.disabled -= 1", "pass", BESIDE),
        },
        "Changes.drop": {
            "detach leaves what was trained": ("name in self.wanted:", "False:", BESIDE),
        },
    },
    "fastpeft/methods/selective/method.py": {
        "SelectiveMethod.lift": {
            "hooks pile up": ("record.entry.remove()", "pass", SHARED),
        },
        "SelectiveMethod.claims": {
            "two train one weight": ("plan.claims()", "Claims()", TWO),
        },
    },
    "fastpeft/methods/selective/files.py": {
        "SelectiveFiles.recognises": {
            "PEFT's norms are nobody's": (", NORMS", "", f"{FILES}::test_what_select_saved_is_an_adapter_too"),
        },
        "_as_peft": {
            "norms and more as norms alone": ("set(renamed) != set(plan.whole)", "not renamed", SAVED),
        },
        "": {
            "new biases are not written": (', "add_missing_bias"', "", f"{SAVED}[bitfit]"),
        },
        "_from_tokens": {
            "PEFT's tokens in an order of ours": ("[sorted(range(len(numbers)), key=numbers.__getitem__)]", "", f"{FILES}::test_we_read_pefts"),
        },
        "fill": {
            "keys that are missing": ("key not in tensors", "False", f"{FILES}::test_bad_files_change_nothing"),
            "keys of another model": ("key not in destinations", "False", f"{FILES}::test_bad_files_change_nothing"),
        },
        "check_fields": {
            "settings that are not served": ("value and name not in _WITHOUT_EFFECT", "False", f"{FILES}::test_bad_files_change_nothing"),
        },
    },
    "fastpeft/methods/selective/grad_entry.py": {
        "GradEntry.before_model": {
            "the embedding's output requires a gradient": ("self._silence(asker)", "pass", ASKED),
        },
        "GradEntry.remove": {
            "what transformers asked for is not put back": ("module._forward_hooks[key] = hook", "pass", ASKED),
            "revert leaves a checkpoint function": ("setattr(owner, _FUNCTION, owner.__dict__[_FUNCTION].function)", "pass", HANDED),
        },
        "GradEntry.before_block": {
            "no gradient enters": ("return opened(args)", "return None", TRUNK),
            "gradients enter at every block": ("(getattr(block, _FUNCTION, None)) and self.first_of(block) is block", "(getattr(block, _FUNCTION, None))", TRUNK),
        },
        "GradEntry.first_of": {
            "the first stack is everybody's": ("next(blocks for blocks in self.stacks if any(other is block for other in blocks))", "self.stacks[0]", f"{BACKWARD}::test_reentrant_checkpoints_of_two_stacks"),
        },
        "_Checkpoint.__call__": {
            "a block that is handed over gets no gradient": ("args = opened(args)", "pass", HANDED),
            "gradients enter at every block that is handed over": ("blocks and self.entry.first_of(block) is block", "blocks", HANDED),
        },
    },
    "fastpeft/methods/reentrant.py": {
        "is_reentrant": {
            "what PyTorch may do is not reentrant": ("not False", "True", HANDED),
        },
        "Checkpoint.__call__": {
            "frozen inputs give adapters no gradient": ("args = opened(args)", "pass", f"{REENTRANT}::test_adapters_get_the_gradients_without_checkpoints"),
            "gradients enter where nothing trains": ("any(parameter.requires_grad for parameter in module.parameters())", "True", f"{REENTRANT}::test_nothing_enters_where_nothing_trains"),
        },
        "close_checkpoints": {
            "detach leaves a checkpoint function": ("setattr(module, _FUNCTION, function.function)", "pass", f"{REENTRANT}::test_adapters_get_the_gradients_without_checkpoints"),
            "detach leaves hooks": ("del module._forward_pre_hooks[key]", "pass", f"{REENTRANT}::test_adapters_get_the_gradients_without_checkpoints"),
        },
    },
    "fastpeft/methods/selective/lisa.py": {
        "LisaSchedule.drawn": {
            "never another block": ("step // self.every", "0", ACTIVE),
            "other blocks at every step": ("step // self.every", "step", ACTIVE),
            "one block more": ("n_active", "n_active + 1", RESTING),
            "the seed is ignored": ("{self.seed} {step", "{step", f"{LISA}::test_every_block_gets_its_turn_and_resuming_draws_the_same"),
        },
        "LisaSchedule._activate": {
            "state of resting blocks is kept": ("optimizer is not None and not self.keep_state", "False", RESTING),
            "state is dropped in any case": ("None and not self.keep_state", "None", RESTING),
            "gradients of resting blocks are kept": ("parameter.grad = None  # or the optimizer would go on updating it", "", f"{LISA}::test_a_block_that_comes_to_rest_keeps_no_gradient"),
        },
        "LisaSchedule.__init__": {
            "blocks with nothing to train get a turn": ("[block for block in found if block]", "found", f"{LISA}::test_only_blocks_with_something_to_train_are_drawn"),
            "everything trains": ("self.model.requires_grad_(False)", "", f"{LISA}::test_backward_ends_at_the_lowest_active_block"),
            "an optimizer built before the first step knows nothing": ("parameter.requires_grad_(True)", "pass", f"{LISA}::test_as_a_callback_of_the_trainer"),
        },
        "LisaSchedule._ends": {
            "embedding and head swapped": ("(train_embeddings,", "(train_head,", f"{LISA}::test_the_ends_that_always_train"),
            "tied ends are two": ("list(dict.fromkeys(found))", "found", f"{LISA}::test_the_ends_that_always_train"),
        },
        "LisaSchedule.on_step_begin": {
            "the Trainer's count is ignored": ("self.steps = state.global_step", "", f"{LISA}::test_as_a_callback_of_the_trainer"),
        },
        "LisaSchedule.load_state_dict": {
            "a resumed run starts anew": ('state["steps"]', "0", f"{LISA}::test_every_block_gets_its_turn_and_resuming_draws_the_same"),
        },
        "LisaSchedule.close": {
            "close leaves hooks": ("self._entry.remove()", "pass", f"{LISA}::test_close_gives_the_flags_back"),
            "close leaves flags": ("parameter.requires_grad_(self._flags.get(name, parameter.requires_grad))", "pass", f"{LISA}::test_close_gives_the_flags_back"),
        },
    },
}  # fmt: skip
