"""Mutants of lora_mlp and of the modules that it is in, as run.py says."""

_OP = "tests/ops/lora_mlp/test_lora_mlp.py::"
_MEMORY = "tests/ops/lora_mlp/test_memory.py::"
_MODEL = "tests/integrations/peft/test_mlp.py::"
_UNUSUAL = "tests/integrations/peft/test_mlp_unusual.py::"
GUARDS = _MEMORY + "test_nothing_is_read_or_written_outside"
STRIDES = _MEMORY + "test_any_strides"
MOVED = _MEMORY + "test_any_strides_of_what_is_kept"
TWICE = _MEMORY + "test_a_second_backward_finds_everything_unchanged"
KEPT = _MEMORY + "test_only_x_gate_up_and_s_are_kept"
MASKS = _OP + "test_chunks_draw_the_masks_of_the_whole"
GRADCHECK = _OP + "test_gradcheck"
SUMMED = _OP + "test_no_less_accurate_than_pytorch[reference-bfloat16-50-silu]"
SIZES = _OP + "test_how_many_rows_a_chunk_has"
TRAINED = _OP + "test_what_is_trained"
BASE = _OP + "test_trained_weights_and_biases"
BAD = "tests/ops/lora_mlp/test_torch.py::test_bad_calls_name_what_is_wrong"
UNUSUAL = _UNUSUAL + "test_whatever_is_unusual_is_seen_at_the_next_call"
PATCHED = _UNUSUAL + "test_a_class_that_is_patched_is_seen"
FAMILIES = _MODEL + "test_the_activations_are_those_of_the_families"
SETTINGS = _MODEL + "test_restore_and_settings"
COPIES = _MODEL + "test_copies_and_pickles"
PARTS = "tests/ops/lora_mlp/test_quantised.py::test_parts_are_the_whole"
BESIDE = "tests/ops/lora_mlp/test_quantised.py::test_a_trained_weight_beside_quantised_ones"
_PROMISE = "tests/ops/lora_mlp/test_promise.py::"
_CHECKPOINTS = "tests/ops/lora_mlp/test_checkpoints.py::"
AGAIN = _PROMISE + "test_bits_of_what_is_computed_again"
AGAIN_CUT = _PROMISE + "test_chunks_and_parts_are_the_whole"
IN_PLACE = _PROMISE + "test_the_output_may_be_changed_in_place"
SECOND = _PROMISE + "test_gradients_of_gradients"
PAYS = _CHECKPOINTS + "test_when_it_pays"
MASKED = _CHECKPOINTS + "test_checkpoints_draw_the_same_masks"
FEW = "tests/integrations/peft/test_mlp_quantised.py::test_few_rows_and_another_dtype_are_the_layers_own"
AUTOCAST = "tests/integrations/peft/test_mlp_quantised.py::test_no_less_accurate_than_peft"

TESTS = (GUARDS, _OP + "test_the_definition_is_the_formula", MASKS, TRAINED, GRADCHECK, STRIDES, TWICE, KEPT, BAD)

MUTANTS = {
    "kernels/lora_mlp.py": {
        "chunk_rows": {
            "a GPU not filled": ("max(cdiv(rows, CHUNKS), cdiv(WAVE, max(1, columns)))", "cdiv(rows, CHUNKS)", SIZES),
            "more chunks": ("cdiv(rows, CHUNKS), ", "", SIZES),
        },
        "_gated_kernel": {
            "rows past the last written": ("(m < M)[:, None]", "(m < M + 1)[:, None]"),
            "columns past the last written": ("& (k < K)[None, :]", "& (k < K + 1)[None, :]"),
            "up left out": ("activate(gate, ACTIVATION) * up", "activate(gate, ACTIVATION)"),
            "stride of gate ignored": ("k[None, :] * stride_gk", "k[None, :]", MOVED),
        },
        "_gated_backward_kernel": {
            "the slope left out": ("dh * up * slope(gate, ACTIVATION)", "dh * up"),
            "dgate without up": ("dh * up * slope(gate, ACTIVATION)", "dh * slope(gate, ACTIVATION)"),
            "dup is dgate's": ("dh * activate(gate, ACTIVATION)", "dh * slope(gate, ACTIVATION)"),
            "gradients past the last column written": ("& (k < K)[None, :]", "& (k < K + 1)[None, :]"),
        },
    },
    "fastpeft/reference/lora_mlp.py": {
        "lora_mlp": {"up twice": ("activate(lora_linear(x, *gate), activation)", "lora_linear(x, *up)")},
        "chunk_rows": {"more chunks": ("-(-rows // _CHUNKS)", "rows // 9", SIZES)},
        "forward": {"up left out": (".mul_(up)", "")},
        "backward_": {
            "dgate without up": ("dgate = dh * up", "dgate = dh * 1"),
            "dup without the activation": ("dh.mul_(activate(gate, activation))", "dh"),
        },
    },
    "fastpeft/ops/lora_mlp_chunks.py": {
        "backward": {
            "weights' gradients of chunks": ("dy.shape[0] if need_dw or need_dbias else size", "size", BASE),
            "down's dW of gate": ("dy_c.T @ h if need_dw", "dy_c.T @ gate_c if need_dw"),
            "computed again with the first rows' masks": (
                "linear.forward(x_c, *_of(_FIRST, lists), drawn[_FIRST])",
                "linear.forward(x_c, *_of(_FIRST, lists), seeds[_FIRST])", AGAIN_CUT,
            ),
            "S of down again with gate's seed": ("dropouts[_DOWN], drawn[_DOWN]", "dropouts[_DOWN], drawn[:1]", AGAIN),
        },
        "chunks": {
            "every chunk draws the first's mask": ("shifted[i]", "shifted[0]"),
            "the last rows left out": ("range(count)", "range(count - 1)", _OP + "test_chunks_cover_the_rows_once"),
        },
        "Sums.add": {"the last chunk alone": ("total.add_(part)", "total.copy_(part)")},
        "Sums.totals": {"the first chunk alone": ("torch.stack([*parts]).sum(0)", "parts[0]", SUMMED)},
        "_offsets": {"a row too far": ("chunk * size * ROW_STEP", "chunk * (size + 1) * ROW_STEP")},
    },
    "fastpeft/ops/lora_mlp.py": {
        "_setup_context": {
            "x always kept": ("x if keeps_x else absent", "x"),
            "S always kept": ("s if need_db else absent", "s"),
            "x not kept beside a promise": ("or chunks.is_absent(gate)", "", _PROMISE + "test_what_is_trained"),
        },
        "_definition": {"biases left out": ("bias if bias.numel() else None", "None", SECOND)},
        "lora_mlp": {
            "other seeds than the promise's": ("drawn[0] if drawn else seeds", "seeds", MASKED),
        },
    },
    "fastpeft/ops/lora_mlp_promise.py": {
        "pays": {
            "any hooks": ('getattr(hooks[0], "__module__", None) in _DISCARDING', "True", PAYS),
        },
        "_Kept.forward": {"a view": ("compute().detach()", "compute()", IN_PLACE)},
    },
    "fastpeft/ops/lora_mlp_parts.py": {
        "Backward._first": {
            "dx of the last part": ("low.add_(self.dx)", "low", PARTS),
            "dS of the first part": ("torch.stack(self.ds).sum(0)", "self.ds[0]", PARTS),
            "low-rank term of the first part": ("if last and need_ds", "if need_ds", PARTS),
        },
        "Backward._gate_and_up": {
            "the first part's bias": ("self.biases[p][part]", "self.biases[p][: part.stop - part.start]", AGAIN_CUT),
            "the first part's B": ("b[part]", "b[: part.stop - part.start]", AGAIN_CUT),
        },
        "Backward.run": {"S of down of one part": ("torch.stack(self.s_downs).sum(0)", "self.s_downs[0]", AGAIN_CUT)},
        "Backward._between": {"masks of the first part": ("self.need_da, part.start", "self.need_da, 0", PARTS)},
        "Backward._weights": {"down's dW below one another": ("1 if p == 2 else 0", "0", BESIDE)},
    },
    "fastpeft/reference/lora_linear.py": {
        "down_backward": {"masks of a part from the first column": ("mask[:, first:]", "mask[:, :columns]", PARTS)},
        "down": {"masks of S from the first column": ("mask[:, first:]", "mask[:, : x.shape[1]]", AGAIN_CUT)},
    },
    "kernels/lora_linear_products.py": {
        "_down_kernel": {"masks of S from the first column": ("FIRST + k0", "k0", AGAIN_CUT)},
        "_up_kernel": {"masks of a part from the first column": ("FIRST + pid_k", "pid_k", PARTS)},
    },
    "kernels/lora_linear_backward.py": {
        "_outer_kernel": {"masks of a part from the first column": ("FIRST + pid_k", "pid_k", PARTS)},
    },
    "fastpeft/nn/lora_mlp.py": {
        "_plan": {
            "a patch not seen": ("module.fastpeft_plain.forward is not module.fastpeft_known", "False", PATCHED),
            "hooks on the activation not seen": ("own_path_reason(module.act_fn) is not None", "False", UNUSUAL),
        },
        "_called": {
            "few rows fused": ("x.numel() <= quantised.FEW_ROWS * x.shape[-1]", "False", FEW),
            "any dtype fused": ("weight.dtype not in (None, wanted)", "False", FEW),
        },
        "_run": {"autocast's dtype": ("quantised.as_given(y, weights[2], x)", "y", AUTOCAST)},
        "_projection": {"hooks on a projection not seen": ("reason is not None", "False", UNUSUAL)},
        "LoraMlp.fastpeft_guard": {
            "a projection's state not guarded": ("module.fastpeft_guard(guards)", "pass", UNUSUAL),
            "hooks not guarded": ("guard_call(guards, module)", "pass", UNUSUAL),
        },
        "unfuse_mlps": {"nothing taken back": ("module.__class__ = module.fastpeft_plain", "pass", SETTINGS)},
        "_rebuilt": {"copies are not fused": ("fused.__new__(fused)", "kind.__new__(kind)", COPIES)},
    },
    "fastpeft/nn/gated_mlps.py": {
        "form_reason": {"any forward": ("_shape(code) not in _forms()", "False", PATCHED)},
        "activation_of": {"erf for tanh": ('"tanh": "gelu_tanh"', '"tanh": "gelu"', _MODEL + "test_known_activations")},
    },
}  # fmt: skip
