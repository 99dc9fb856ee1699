# ruff: noqa: E501
"""Mutants of attach and its contract, of the bottleneck adapters' places and forms, and of their checkpoints."""

FILE = "tests/methods/bottleneck/test_attach.py"
FORWARD = f"{FILE}::TestFamilies::test_forward_backward_and_back_again"
BEFORE, AFTER = f"{FILE}::test_formula_where_norms_come_before", f"{FILE}::test_formula_where_norms_come_after"
RULE = f"{FILE}::TestByRule::test_follows_or_stands_beside"
TOGETHER = "tests/methods/test_attach_together.py::test_together[prompt, LoRA and bottleneck-llama]"
FAILURE = f"{FILE}::TestTogether::test_nothing_half_attached"
SAVED = f"{FILE}::TestFamilies::test_save_and_load"
INSPECT, CONVERT = "tests/methods/test_inspect.py::TestInspect", "tests/methods/test_inspect.py::TestConvert"
HALF = f"{FILE}::TestOtherSettings::test_half_precision"

TESTS = (BEFORE, AFTER, RULE, FAILURE, f"{SAVED}[double_seq_bn-llama]")
MUTANTS = {
    "fastpeft/methods/attach.py": {
        "a failure leaves what was applied": ("        take_back(model, name, flags)\n        raise\n", "        raise\n", FAILURE),
        "flags stay frozen after a failure": ("            method.settle(model)\n    _set_flags(flags)\n", "            method.settle(model)\n", FAILURE),
        "a second adapter keeps what attaching left": ("        else:\n            _set_flags(flags)\n", "        else:\n            pass\n", "tests/methods/test_attach_together.py::test_a_second_adapter_leaves_what_the_first_trains"),
        "hooks stay while modules are replaced": ("        for method in methods_of(state):\n            method.lift(model)\n        for", "        for", f"{FILE}::TestOtherSettings::test_a_norm_that_is_copied_for_training"),
        "the same method twice": ("methods.count(method) > 1", "methods.count(method) > 2", f"{FILE}::TestTogether::test_bad_lists"),
        "flags of the original lost": ("state.flags.get(name, parameter.requires_grad)", "parameter.requires_grad", f"{FORWARD}[seq_bn-bert]"),
    },
    "fastpeft/methods/switch.py": {
        "merge forgets what cannot be merged": ("method.unmergeable is not None", "False", f"{FILE}::TestTogether::test_merging_names_what_cannot_be"),
        "disabled for good": ("stack.callback(method.disable(holder))", "method.disable(holder)", TOGETHER),
        "merged adapters are switched": ('    refuse_merged("set_adapter", holder, state)\n', "", "tests/methods/test_attach.py::TestDisableAndMerge"),
    },
    "fastpeft/methods/attachment.py": {
        "a wrapper's own parts taken for the original's": ("wrappers.get(path) != part", "True", "tests/methods/test_attach.py::TestAttachAndDetach"),
    },
    "fastpeft/methods/targets.py": {
        "what was added is adapted": ('getattr(type(module), "fastpeft_added", False)', "False", "tests/methods/test_attach_together.py::test_what_one_adds_is_none_of_another_s_targets"),
    },
    "fastpeft/methods/lora/record.py": {
        "biases of an inactive adapter act": ("trained == (record.trained is None)", "True", "tests/methods/test_attach_together.py::test_biases_are_those_of_the_active_adapter"),
    },
    "fastpeft/methods/lora/keys.py": {
        "others' biases are LoRA's": ("state is not None and original not in state.flags", "False", "tests/methods/test_attach_together.py::test_lora_is_loaded_beside_others"),
    },
    "fastpeft/methods/bottleneck/holder.py": {
        "stream without X": ("    z = h + x\n", "    z = h\n"),
        "parallel is fed with h": ("return adapter(x, _like(h, x))", "return adapter(h, h)"),
        "parallel by rule is fed with the output": ('x = args[0] if args else next(iter(kwargs.values()))\n                h', "x = h\n                h"),
        "the norm after is left out": ("return norm.forward(s), s", "return s, s"),
        "after the norm it replaces z": ("        return adapter(z, z), s\n", "        return adapter(z, s), s\n"),
        "parallel beside a norm is fed with s": ("        s = adapter(x, _like(s, x))\n", "        s = adapter(s, s)\n"),
        "the rest of a tuple is lost": ("(h, *output[1:])", "(h,)", f"{FORWARD}[double_seq_bn-llama]"),
        "disabled adapters act": ("if self.disabled or not self.active:\n            return output", "if not self.active:\n            return output", f"{FORWARD}[seq_bn-bert]"),
        "hooks stay after detach": ("is (_after if child == _CHILD else _before)", "is None", f"{FORWARD}[seq_bn-llama]"),
        "threads share the tap": ("self.values[threading.get_ident()] = value", "self.values[0] = value", BEFORE),
        "Houlsby's comes after the norm": ('    if not config.original_norm_before:\n        return "output", "output"\n    if not config.original_norm_after:', "    if not config.original_norm_after:", AFTER),
        "a Sequential calls what is beside": ("        return x\n\n    def serve", "        return x + 1\n\n    def serve", RULE),
    },
    "fastpeft/methods/bottleneck/sites.py": {
        "layers counted from 1": ("layers.setdefault(_layer_path(path), len(layers))", "layers.setdefault(_layer_path(path), len(layers) + 1)", f"{FILE}::TestFamilies::test_leave_out_and_widths_by_layer"),
        "each T5 sub-layer is a layer": ("return match[0] if match else path", "return path", f"{FILE}::TestFamilies::test_leave_out_and_widths_by_layer"),
        "leave_out ignored": ("and site.layer not in config.leave_out", "", f"{FILE}::TestFamilies::test_leave_out_and_widths_by_layer"),
        "places ignored": ("site.place in config.places and", "", f"{FORWARD}[seq_bn-llama]"),
        "a list that is never called": ("type(modules[path]).forward is nn.Module.forward", "False", f"{FILE}::TestByRule::test_bad_rules"),
    },
    "fastpeft/methods/bottleneck/method.py": {
        "adapters in half precision": ("torch.float32 if near.dtype in HALF else near.dtype", "near.dtype", HALF),
        "inactive adapters train": ("trainable and name in holder.active", "trainable", f"{FILE}::TestFamilies::test_two_adapters"),
        "every holder takes the adapter": ("h.site.path == site.path and h.kind == kind", "h.kind == kind"),
        "fused encoders pass by": ("isinstance(module, Bottlenecks))\n", "False)\n", f"{FILE}::TestByRule::test_pytorch_s_fused_encoder_does_not_bypass_the_adapters"),
    },
    "fastpeft/methods/bottleneck/config.py": {
        "width rounded up": ("max(1, int(features // factor))", "max(1, int(-(-features // factor)))", f"{FILE}::test_widths"),
        "no width below 1": ("max(1, int(features // factor))", "int(features // factor)", f"{FILE}::test_widths"),
    },
    "fastpeft/methods/formats/adapterhub_format.py": {
        "the projection stays at 0": ("down = 1 if", "down = 0 if", "tests/methods/test_inspect.py::test_adapterhub_s_keys"),
        "the norm taken for the projection": ("weight.dim() != 2", "False", "tests/methods/test_inspect.py::test_adapterhub_s_keys"),
        "the size's factor is inexact": ("factor = features / (size + 0.5)", "factor = features / size", f"{FILE}::test_every_width_has_a_reduction_factor"),
        "Compacter taken for a bottleneck": ('("phm_layer", "Compacter"), ', "", "tests/methods/test_inspect.py::test_adapterhub_configs_that_are_not_served"),
    },
    "fastpeft/methods/checkpoint.py": {
        "another method's checkpoint is read": ("    if here != there:", "    if False:", f"{FILE}::TestTogether::test_a_checkpoint_of_another_method"),
        "one folder for several methods": ("directory / method.name if len(parts) > 1 else directory", "directory", TOGETHER),
    },
    "fastpeft/methods/formats/adapterhub_files.py": {
        "unpickles anything": ("weights_only=True", "weights_only=False", f"{INSPECT}::test_nothing_is_unpickled"),
    },
    "fastpeft/methods/formats/inspection.py": {
        "values are not looked at": ("not torch.isfinite(t).all()", "False", f"{INSPECT}::test_faults"),
        "an untrained adapter passes": ("if downs and not any(", "if downs and any(", f"{INSPECT}::test_faults"),
    },
    "fastpeft/methods/formats/conversion.py": {
        "overwrites a checkpoint": ("if (destination / CONFIG).exists():", "if False:", f"{CONVERT}::test_bad_folders"),
        "layers that differ": ("any(other != parts for", "any(False for", f"{CONVERT}::test_what_cannot_be_said"),
        "alpha lost": ('"lora_alpha": inner["alpha"]', '"lora_alpha": inner["r"]', f"{CONVERT}::test_lora_there_and_back"),
    },
}  # fmt: skip
