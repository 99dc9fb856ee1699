"""Mutants of dora_mlp and of what serves it, as run.py says; its kernels are dora_linear's and lora_mlp's."""

_OP = "tests/ops/dora_mlp/test_dora_mlp.py::"
_MEMORY = "tests/ops/dora_mlp/test_memory.py::"
_QUANTISED = "tests/ops/dora_mlp/test_quantised.py::"
_MODEL = "tests/integrations/peft/test_mlp_dora.py::"
KEPT = _MEMORY + "test_only_x_u_and_s_are_kept"
MASKS = _OP + "test_chunks_draw_the_masks_of_the_whole"
GRADCHECK = _OP + "test_gradcheck"
TRAINED = _OP + "test_what_is_trained"
ONE = _OP + "test_one_magnitude_is_trained"
MIXED = _OP + "test_some_projections_may_have_lora"
COLUMNS = _MEMORY + "test_the_mask_of_some_columns"
PARTS = _QUANTISED + "test_parts_are_the_whole"
ONCE = _OP + "test_the_norms_of_a_weight_are_made_once"
BAD = "tests/ops/dora_mlp/test_torch.py::test_bad_calls_name_what_is_wrong"
SEEN = _MODEL + "test_what_changes_is_seen_at_the_next_call"

TESTS = (MIXED, MASKS, TRAINED, GRADCHECK, KEPT, PARTS, BAD)

MUTANTS = {
    "kernels/dora_linear.py": {
        "_masked_kernel": {"masks of some columns from the first": ("FIRST + first", "first", COLUMNS)},
    },
    "fastpeft/reference/dora_linear.py": {
        "add_masked_": {"masks of some columns from the first": ("mask[:, first:]", "mask[:, : q.shape[1]]", COLUMNS)},
    },
    "fastpeft/reference/dora_mlp.py": {
        "dora_mlp": {"up twice": ("projection(x, 0)", "projection(x, 1)", _OP + "test_the_definition_is_the_formula")},
    },
    "fastpeft/ops/dora_mlp.py": {
        "_setup_context": {
            "x always kept": ("x if need_da else absent", "x", KEPT),
            "S always kept": ("s if need_dc or remade else absent", "s", KEPT),
            "S of down always kept": ("s_down if need_dc else absent", "s_down", KEPT),
        },
    },
    "fastpeft/ops/dora_mlp_arguments.py": {
        "tensors": {"a trained weight taken": ("weights[p].requires_grad", "False", BAD)},
    },
    "fastpeft/ops/dora_mlp_steps.py": {
        "Forward.run": {
            "gate and up always kept": ("given.drops(p) or not self.keeps[p]", "True", KEPT),
            "u always kept": ("u if self.keeps[p] else x.new_empty(0)", "u", KEPT),
        },
        "Forward._multiply": {
            "norms of each chunk": ("and self.norms[p].numel() == 0", "", ONCE),
            "dropped x not scaled": (", beta=0, alpha=inverse_keep(dropout)", ", beta=0", MASKS),
        },
        "Forward._gain": {"LoRA with gains": ("magnitude.new_ones(", "magnitude.new_zeros(", MIXED)},
        "Made.__call__": {"the bias left out": ("bias[part] if bias.numel() else None", "None", GRADCHECK)},
    },
    "fastpeft/ops/dora_mlp_gradients.py": {
        "Backward._trained": {
            "the magnitude without B": ("(dgain + through_b)", "dgain", TRAINED),
            "B without the gain": ("scaled_rows(dc, self.gains[p])", "dc", TRAINED),
        },
        "Backward._rows": {
            "dx of the last part": ("low.add_(dx)", "low", PARTS),
            "dS of the first part": ("torch.stack(summed[0]).sum(0)", "summed[0][0]", PARTS),
            "masks not drawn": ("self._add_masked_(p, low, q, drawn)", "pass", MASKS),
        },
        "Backward._between": {
            "masks of the first part": ("q, drawn, part.start)", "q, drawn, 0)", PARTS),
            "dA's masks of the first part": ("self.need_da, part.start", "self.need_da, 0", PARTS),
        },
        "Backward._through_base": {"dx without the gain": ("dora.scaled(d, gain), w)", "d, w)", TRAINED)},
        "Backward._wide": {"u of all columns": ("u[rows, part]", "u[rows, : d.shape[1]]", PARTS)},
    },
    "fastpeft/nn/lora_mlp.py": {
        "LoraMlp.forward": {"a trained weight not seen": ("plan.magnitudes and _trains(plan.branches)", "False", SEEN)},
    },
    "fastpeft/integrations/_dora.py": {
        "guard": {
            "another magnitude not seen": ('guard_child(guards, modules["lora_magnitude_vector"]', "bool((", SEEN),
        },
    },
}  # fmt: skip
