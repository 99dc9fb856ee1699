"""Mutants of dora_linear, as run.py says."""

_OP = "tests/ops/dora_linear/test_dora_linear.py::"
_MEMORY = "tests/ops/dora_linear/test_memory.py::"
GUARDS = _MEMORY + "test_nothing_is_read_or_written_outside"
BETWEEN = _MEMORY + "test_any_strides_of_what_lies_between"
KEPT = _MEMORY + "test_only_x_s_and_u_are_kept"
DEFINITION = _OP + "test_the_definition_is_the_formula"
GRADIENTS = _OP + "test_gradients_are_those_of_the_definition"
NORM = _OP + "test_the_norm_is_that_of_the_sum"
CANCELS = _OP + "test_a_row_that_cancels_has_no_norm"
GIVEN = _OP + "test_a_norm_that_is_given_is_taken"
RANKS = _OP + "test_rows_and_leading_dimensions"
TRAINED = _OP + "test_what_is_trained"
FROZEN = _OP + "test_no_gradient_reaches_the_weight"
AUTOCAST = "tests/ops/dora_linear/test_torch.py::test_autocast_is_the_same_as_casting_by_hand"

_METHOD = "tests/methods/lora/test_dora.py::"
_BANK = "tests/serving/bank/test_dora.py::"
_PEFT = "tests/integrations/peft/test_dora.py::"
NUMBERS = _METHOD + "test_a_checkpoint_of_pefts_has_pefts_numbers"
MERGED = _METHOD + "test_merging_is_pefts"
SURROUNDED = _METHOD + "test_whatever_surrounds_the_layer"
SWITCHED = _METHOD + "test_adapters_are_switched_disabled_and_taken_off"
ROWS = _BANK + "test_rows_of_a_mixed_batch_are_pefts"
SLOTS = _BANK + "test_a_slot_is_given_to_others"
SEVERAL = _PEFT + "test_what_is_not_served_is_pefts"
SCALES = _PEFT + "test_scales_and_patterns"

TESTS = (GRADIENTS, DEFINITION, BETWEEN, GUARDS, NORM, KEPT, TRAINED)

MUTANTS = {
    "kernels/dora_linear.py": {
        "_masked_kernel": {
            "the mask is not drawn": ("tl.load(seed_ptr), threshold", "tl.load(seed_ptr), -32768"),
            "rows past the last written": ("(m < M)[:, None]", "(m < M + 1)[:, None]", GUARDS),
            "columns past the last written": ("& (k < K)[None, :]", "& (k < K + 1)[None, :]", GUARDS),
            "stride of x ignored": ("k[None, :] * stride_xk", "k[None, :]"),
        },
        "_scaled_kernel": {
            "scaled by nothing": ("x * tl.load(factor_ptr + k, mask=k < K, other=0.0).to(ACC)[None, :]", "x"),
            "stride of what is scaled ignored": ("k[None, :] * stride_xk", "k[None, :]"),
        },
        "_combined_kernel": {
            "u without its factor": ("factor * u.to(ACC)", "u.to(ACC)"),
            "what was there is lost": ("if ADD:", "if False:"),
            "the bias is lost": ("if BIAS:", "if False:"),
            "the last ranks left out": ("range(0, R, BLOCK_R)", "range(0, R - 1, BLOCK_R)", RANKS),
            "stride of the combined u ignored": ("k[None, :] * stride_uk", "k[None, :]"),
            "stride of y ignored": ("k[None, :] * stride_yk", "k[None, :]"),
        },
        "_gain_kernel": {
            "the last rows left out": ("part * SPAN + SPAN, M)", "part * SPAN + SPAN - BLOCK_M, M)"),
            "rows past the last summed": ("(m < M)[:, None]", "(m < M + 1)[:, None]", GUARDS),
            "stride of u ignored": ("k[None, :] * stride_uk", "k[None, :]"),
        },
    },
    "fastpeft/reference/dora_linear.py": {
        "dora_linear": {
            "the norm is differentiated": ("norm.detach()", "norm", TRAINED),
            "the base is not dropped": ("F.linear(dropped, weight)", "F.linear(x, weight)"),
            "the bias is scaled": ("y = y + bias", "y = y + gain * bias"),
            "the gain of W alone": (" + scale * (lora_b @ lora_a)", ""),
        },
        "masked": {"nothing of x is dropped": (".mul_(x)", ".fill_(1).mul_(x)")},
        "add_masked_": {"nothing is dropped": ("dx.addcmul_(q, mask[:, first:])", "dx.add_(q)")},
        "combined": {
            "u without its factor": ("total.addcmul_(u, factor)", "total.add_(u)"),
            "what was there is lost": (".add_(y)", ""),
        },
        "scaled": {"no factor": ("(dy * factor)", "dy.clone()")},
        "gain_gradient": {"without u": (" * u", "")},
    },
    "fastpeft/ops/dora_linear_norm.py": {
        "row_norms": {
            "the square of A left out": ("alpha=scale).mul_(b)", "alpha=0).mul_(b)", NORM),
            "the cross term once": (".mul_(2)", "", NORM),
            "roots of less than 0": (".clamp_(min=0)", "", CANCELS),
        },
    },
    "fastpeft/ops/dora_linear.py": {
        "_implementation": {
            "a norm that is given is not taken": ("norm.clone() if norm.numel()", "norm.clone() if False", GIVEN),
            "B without the gain": ("scaled_rows(lora_b, gain)", "lora_b"),
            "the gain twice": ("u, gain - 1,", "u, gain,"),
            "dropped x without its factor": ("inverse_keep(dropout)", "1.0"),
            "u always kept": ("u if keeps else x.new_empty(0)", "u", KEPT),
        },
        "_setup_context": {
            "x always kept": ("x if need_da else absent", "x", KEPT),
            "S always kept": ("s if need_db or need_dm else absent", "s", KEPT),
        },
        "_backward_implementation": {
            "dS of B without the gain": ("scaled_rows(lora_b, gain)", "lora_b"),
            "dB without the gain": ("scaled_rows(dc, gain)", "dc"),
            "the magnitude past B": (".add_(through_b)", ""),
            "the magnitude's gradient is the gain's": (".div_(norm)", ""),
            "dX past the base": ("dx.addmm_(dy, dense)", "pass"),
            "dX with the gain twice": ("gain - 1), dense", "gain), dense"),
        },
        "dora_linear": {
            "the bias is not cast": ("cast(bias, wanted)", "bias", AUTOCAST),
            "float32 magnitudes cast": ("cast(t, wanted, torch.float32)", "cast(t, wanted)", AUTOCAST),
        },
    },
    "fastpeft/integrations/_dora.py": {
        "planned": {
            "several adapters": ("if len(branches) > 1:", "if False:", SEVERAL),
            "a trained base": ("branch.weight.requires_grad", "False", SEVERAL),
        },
        "run": {"another scale": ("bias, scale, dropout)", "bias, 1.0, dropout)", SCALES)},
    },
    "fastpeft/nn/dora.py": {
        "initialise": {"no norms": ("adapter.lora_magnitude.copy_(", "(", _METHOD + "test_it_begins_as_lora")},
        "call": {"no dropout seen": ("if layer.training else 0.0", "if False else 0.0", _METHOD + "test_dropout_acts")},
        "added": {"the gain of W alone": ("vector_norm(total", "vector_norm(weight", MERGED)},
        "_beside": {
            "the gain twice": ("(gain - 1) * own", "gain * own", SURROUNDED),
            "the bias is scaled": ("y - base.bias", "y", SURROUNDED),
        },
    },
    "fastpeft/nn/lora.py": {
        "LoraLinear.forward": {"disabled is not seen": ("not (self.disabled or self.merged)", "True", SWITCHED)},
    },
    "fastpeft/serving/bank/dora.py": {
        "folded": {
            "B without the gain": ("b * gain[:, None]", "b", ROWS),
            "the gain twice": ("(gain - 1).cpu()", "gain.cpu()", ROWS),
        },
    },
    "fastpeft/serving/bank/sites.py": {
        "Site.called": {
            "the bias is scaled": ("y if bias is None else y - bias", "y", ROWS),
            "never": ("gain is not None", "False", ROWS),
        },
    },
    "fastpeft/serving/bank/columns.py": {
        "Columns.write": {"a gain stays in the slot": ("self.values[slot].zero_()", "pass", SLOTS)},
    },
    "fastpeft/ops/dora_linear_arguments.py": {
        "tensors": {"a trained weight not seen": ("weight.requires_grad", "False", FROZEN)},
    },
}  # fmt: skip
