"""Mutants of attach and its contract, of the bottleneck adapters' places and forms, and of their checkpoints."""

CONFIG = "tests/methods/bottleneck/test_config.py"
FAMILIES = "tests/methods/bottleneck/test_families.py"
RULES = "tests/methods/bottleneck/test_rules.py"
SETTINGS = "tests/methods/bottleneck/test_settings.py"
BESIDE = "tests/methods/bottleneck/test_together.py"
FORWARD = f"{FAMILIES}::TestFamilies::test_forward_backward_and_back_again"
BEFORE, AFTER = f"{FAMILIES}::test_formula_where_norms_come_before", f"{FAMILIES}::test_formula_where_norms_come_after"
RULE = f"{RULES}::TestByRule::test_follows_or_stands_beside"
TOGETHER = "tests/methods/test_attach_together.py::test_together[prompt, LoRA and bottleneck-llama]"
FAILURE = f"{BESIDE}::TestTogether::test_nothing_half_attached"
SAVED = f"{FAMILIES}::TestFamilies::test_save_and_load"
INSPECT, CONVERT = "tests/methods/test_inspect.py::TestInspect", "tests/methods/test_inspect.py::TestConvert"
IN_PLACE = "tests/methods/test_in_place.py"
HALF = f"{SETTINGS}::TestOtherSettings::test_half_precision"

TESTS = (BEFORE, AFTER, RULE, FAILURE, f"{SAVED}[double_seq_bn-llama]")
MUTANTS = {
    "fastpeft/methods/attach.py": {
        "apply_all": {
            "a failure leaves what was applied": ("take_back(model, name, flags)\n        raise", "raise", FAILURE),
            "a second adapter keeps what attaching left": (
                "_set_flags(flags)",
                "pass",
                "tests/methods/test_attach_together.py::test_a_second_adapter_leaves_what_the_first_trains",
            ),
            "hooks stay while modules are replaced": (
                "with lifted(model)",
                "if True",
                f"{SETTINGS}::TestOtherSettings::test_a_norm_that_is_copied_for_training",
            ),
        },
        "take_back": {
            "flags stay frozen after a failure": ("_set_flags(flags)", "pass", FAILURE),
        },
        "resolve_all": {
            "the same method twice": ("(method) > 1", "(method) > 2", f"{BESIDE}::TestTogether::test_bad_lists"),
        },
        "detach": {
            "flags of the original lost": (
                "state.flags.get(name, parameter.requires_grad)",
                "parameter.requires_grad",
                f"{FORWARD}[seq_bn-bert]",
            ),
        },
    },
    "fastpeft/methods/switch.py": {
        "merge": {
            "merge forgets what cannot be merged": (
                "not isinstance(method, Mergeable)",
                "False",
                f"{BESIDE}::TestTogether::test_merging_names_what_cannot_be",
            ),
        },
        "set_adapter": {
            "merged adapters are switched": (
                'refuse_merged("set_adapter", holder, state)',
                "",
                "tests/methods/test_switch.py::TestDisableAndMerge",
            ),
        },
    },
    "fastpeft/methods/attachment.py": {
        "original_name": {
            "a wrapper's own parts taken for the original's": (
                "wrappers.get(path) != part",
                "True",
                "tests/methods/test_attach.py::TestAttachAndDetach",
            ),
        },
    },
    "fastpeft/methods/targets.py": {
        "_walk": {
            "what was added is adapted": (
                "or is_added(module)",
                "",
                "tests/methods/test_attach_together.py::test_what_one_adds_is_none_of_another_s_targets",
            ),
        },
    },
    "fastpeft/methods/originals.py": {
        "disabled": {
            "disabled for good": ("stack.callback(method.disable(model))", "method.disable(model)", TOGETHER),
        },
    },
    "fastpeft/methods/claims.py": {
        "_shared": {
            "what is inside a copy is another's": (
                "claim in mine or (insides and claim.startswith(insides))",
                "claim in mine",
                f"{IN_PLACE}::test_one_adapter_trains_no_weight_twice",
            ),
        },
    },
    "fastpeft/methods/own.py": {
        "own_modules": {
            "what was added is the model's own": (
                "or is_added(standing)",
                "",
                "tests/methods/test_attach_together.py::test_what_one_adds_is_none_of_another_s_targets",
            ),
        },
        "place_of": {
            "rows stand in the place of what copies": (
                "original_child(module)",
                "None",
                f"{IN_PLACE}::test_tokens_of_an_embedding_that_another_adapter_copies",
            ),
        },
    },
    "fastpeft/methods/lora/record.py": {
        "trained_biases": {
            "biases of copies are trained twice": (
                "not name.startswith(copied) and",
                "",
                "tests/methods/test_attach.py::TestAttachAndDetach",
            ),
        },
    },
    "fastpeft/methods/lora/method.py": {
        "LoraMethod.set_active": {
            "biases of an inactive adapter act": (
                "record.biases.set_active(model, names, trainable)",
                "record.biases.set_active(model, list(record.biases.of), trainable)",
                "tests/methods/test_attach_together.py::test_biases_are_those_of_the_active_adapter",
            ),
        },
    },
    "fastpeft/methods/bottleneck/holder.py": {
        "_after_output": {
            "stream without X": ("z = h + x", "z = h"),
            "parallel is fed with h": ("x, _like(h, x)", "h, h"),
        },
        "Bottlenecks.serve": {
            "parallel by rule is fed with the output": ("args[0] if args else next(iter(kwargs.values()))", "h"),
            "the rest of a tuple is lost": (", *output[1:]", ",", f"{FORWARD}[double_seq_bn-llama]"),
            "disabled adapters act": ("self.disabled or not", "not", f"{FORWARD}[seq_bn-bert]"),
        },
        "_around_norm": {
            "the norm after is left out": ("norm.forward(s)", "s"),
            "after the norm it replaces z": ("adapter(z, z), s", "adapter(z, s), s"),
            "parallel beside a norm is fed with s": ("x, _like(s, x)", "s, s"),
        },
        "_release": {
            "hooks stay after detach": ("(_after if child == _CHILD else _before)", "None", f"{FORWARD}[seq_bn-llama]"),
        },
        "Tap.put": {
            "threads share the tap": ("threading.get_ident()", "0", BEFORE),
        },
        "form_at": {
            "Houlsby's comes after the norm": (
                'original_norm_before:\n        return "output", "output"\n    if not config.',
                "",
                AFTER,
            ),
        },
        "Bottlenecks.forward": {
            "a Sequential calls what is beside": ("return x", "return x + 1", RULE),
        },
    },
    "fastpeft/methods/bottleneck/sites.py": {
        "known_sites": {
            "layers counted from 1": (
                "(layers)",
                "(layers) + 1",
                f"{FAMILIES}::TestFamilies::test_leave_out_and_widths_by_layer",
            ),
        },
        "_layer_path": {
            "each T5 sub-layer is a layer": (
                "match[0] if match else path",
                "path",
                f"{FAMILIES}::TestFamilies::test_leave_out_and_widths_by_layer",
            ),
        },
        "sites": {
            "leave_out ignored": (
                "and site.layer not in config.leave_out",
                "",
                f"{FAMILIES}::TestFamilies::test_leave_out_and_widths_by_layer",
            ),
            "places ignored": ("site.place in places and", "", f"{FORWARD}[seq_bn-llama]"),
        },
        "_by_rule": {
            "a list that is never called": (
                "type(modules[path]).forward is nn.Module.forward",
                "False",
                f"{RULES}::TestByRule::test_bad_rules",
            ),
        },
    },
    "fastpeft/methods/bottleneck/method.py": {
        "_build": {
            "adapters in half precision": ("trained_dtype(dtype)", "dtype", HALF),
        },
        "BottleneckMethod.set_active": {
            "inactive adapters train": (
                "trainable and name in holder.active",
                "trainable",
                f"{FAMILIES}::TestFamilies::test_two_adapters",
            ),
        },
        "BottleneckMethod.apply": {
            "every holder takes the adapter": ("site.path == site.path and h.", ""),
        },
        "BottleneckMethod.settle": {
            "fused encoders pass by": (
                "isinstance(module, Bottlenecks)",
                "False",
                f"{RULES}::TestByRule::test_pytorch_s_fused_encoder_does_not_bypass_the_adapters",
            ),
        },
    },
    "fastpeft/methods/bottleneck/config.py": {
        "Bottleneck.size_of": {
            "width rounded up": ("features // factor", "-(-features // factor)", f"{CONFIG}::test_widths"),
            "no width below 1": (
                "max(1, int(features // factor))",
                "int(features // factor)",
                f"{CONFIG}::test_widths",
            ),
        },
    },
    "fastpeft/methods/formats/adapterhub_format.py": {
        "keys_to_hub": {
            "the projection stays at 0": (
                "down = 1 if",
                "down = 0 if",
                "tests/methods/test_inspect.py::test_adapterhub_s_keys",
            ),
        },
        "keys_from_hub": {
            "the norm taken for the projection": (
                "weight.dim() != 2",
                "False",
                "tests/methods/test_inspect.py::test_adapterhub_s_keys",
            ),
        },
        "_factor": {
            "the size's factor is inexact": (
                "(size + 0.5)",
                "size",
                f"{CONFIG}::test_every_width_has_a_reduction_factor",
            ),
        },
        "from_hub": {
            "Compacter taken for a bottleneck": (
                '("phm_layer", "Compacter"),',
                "",
                "tests/methods/test_inspect.py::test_adapterhub_configs_that_are_not_served",
            ),
        },
    },
    "fastpeft/methods/checkpoint.py": {
        "_same_methods": {
            "another method's checkpoint is read": (
                "here != there",
                "False",
                f"{BESIDE}::TestTogether::test_a_checkpoint_of_another_method",
            ),
        },
        "save": {
            "one folder for several methods": (
                "directory / part if len(parts) > 1 else directory",
                "directory",
                TOGETHER,
            ),
        },
    },
    "fastpeft/methods/formats/adapterhub_files.py": {
        "read_hub_tensors": {
            "unpickles anything": ("weights_only=True", "weights_only=False", f"{INSPECT}::test_nothing_is_unpickled"),
        },
    },
    "fastpeft/methods/formats/verdict.py": {
        "_judge_values": {
            "values are not looked at": ("not torch.isfinite(t).all()", "False", f"{INSPECT}::test_faults"),
        },
        "_judge_lora": {
            "an untrained adapter passes": ("and not any(", "and any(", f"{INSPECT}::test_faults"),
        },
    },
    "fastpeft/methods/formats/conversion.py": {
        "convert": {
            "overwrites a checkpoint": ("(destination / CONFIG).exists()", "False", f"{CONVERT}::test_bad_folders"),
        },
        "_lora_to_hub": {
            "layers that differ": ("other != parts", "False", f"{CONVERT}::test_what_cannot_be_said"),
        },
        "_lora_to_peft": {
            "alpha lost": ('["alpha"]', '["r"]', f"{CONVERT}::test_lora_there_and_back"),
        },
    },
}
