"""Mutants of dequantise and of what takes a quantised weight, as run.py says."""

FOUR = "tests/ops/dequantise/test_dequantise.py::test_four_bits_are_the_formats"
EIGHT = "tests/ops/dequantise/test_dequantise.py::test_eight_bits_are_the_formats"
OUTSIDE = "tests/ops/dequantise/test_dequantise.py::test_nothing_is_written_outside"
STEPS = "tests/ops/dequantise/test_dequantise.py::test_more_elements_than_a_step"
DTYPE = "tests/ops/dequantise/test_dequantise.py::test_one_rounding_to_the_dtype_asked_for"
BAD = "tests/ops/dequantise/test_dequantise.py::test_bad_bases"
DENSE = "tests/ops/lora_linear/test_quantised.py::test_bits_are_those_of_the_dense_call"
TWICE = "tests/ops/lora_linear/test_quantised.py::test_gradients_of_gradients"

KEPT = "tests/ops/lora_linear/test_quantised.py::test_a_cpus_buffer_grows_and_serves_second_gradients"

PARTS = "tests/ops/dequantise/test_dequantise.py::test_parts_are_those_of_the_whole"
SCRATCH = "tests/ops/dequantise/test_base_parts.py::test_the_scratch_is_as_large_as_it_has_to_be"
CUT = "tests/ops/dequantise/test_base_parts.py::test_parts_of_weights"
ASKED = "tests/ops/dequantise/test_base_parts.py::test_a_weight_of_another_library_is_asked_for_once"

TESTS = (FOUR, EIGHT)

MUTANTS = {
    "kernels/dequantise.py": {
        "_four_bit_kernel": {
            "the low half first": ("(byte >> 4, byte & 15)", "(byte & 15, byte >> 4)"),
            "the high half twice": ("byte & 15)", "byte >> 4)"),
            "scales of the next block": ("first // BLOCK +", "first // BLOCK + 1 +"),
            "scales of the first block": ("j = first // BLOCK + tl.arange(0, BLOCKS)", "j = tl.arange(0, BLOCKS)"),
            "no offset": ("scale = scale + tl.load(offset_ptr)", "scale = scale + 0.0"),
            "one scale for all scales": ("absmax2_ptr + j // BLOCK2", "absmax2_ptr + j * 0"),
            "scales not masked": ("j_ok = j * BLOCK < end", "j_ok = j >= 0", OUTSIDE),
            "written past the end": ("w, mask=i < WIDTH", "w, mask=i >= 0", OUTSIDE),
            "the last element left out": ("w, mask=i < WIDTH", "w, mask=i < WIDTH - 1"),
            "every row of a part the first": ("FIRST + row * STRIDE", "FIRST + row * 0", PARTS),
            "a part from the beginning": ("FIRST + row * STRIDE", "row * STRIDE", PARTS),
            "codes of the first program": ("first // 2 +", "pid * 0 +"),
        },
        "_eight_bit_kernel": {
            "a scale for each column": ("element // K", "element % K"),
            "int8 in 128 steps": ("* _INVERSE", "* (1.0 / 128.0)"),
            "int8 written past the end": ("scale, mask=i < WIDTH", "scale, mask=i >= 0", OUTSIDE),
        },
        "write": {
            "always nested": ("NESTED=absmax2.numel() > 0", "NESTED=True"),
        },
    },
    "fastpeft/reference/dequantise.py": {
        "define": {
            "the low half first": (
                "(code.repeat_interleave(16), code.repeat(16))",
                "(code.repeat(16), code.repeat_interleave(16))",
            ),
            "no offset": (" + offset", ""),
            "one scale for all scales": ("absmax2.repeat_interleave(block2)[: absmax.numel()]", "absmax2[0]"),
            "the part of a block left out": ("if whole < flat.numel():", "if False:"),
            "the part of a block by the first scale": ("absmax[-1]", "absmax[0]"),
            "scales of the first step": ("absmax[first // block : end", "absmax[0 : (end - first)", STEPS),
            "128 steps": ("1.0 / 127.0", "1.0 / 128.0"),
            "a part's codes from the beginning": ("codes[first // 2 :]", "codes", PARTS),
            "a part's scales from the beginning": ("absmax[first // block :]", "absmax", PARTS),
        },
    },
    "fastpeft/ops/base.py": {
        "four_bit": {
            "any block": ("block < 2 or block & (block - 1)", "False", BAD),
            "codes of any size": ("-(-n * k // 2))", "flat.numel())", BAD),
        },
        "Written.__iter__": {
            "tables of the first for all": ("tables = iter(self.tables)", "tables = iter(self.tables[:5] * 9)", DENSE),
        },
        "Written.apart": {
            "in one memory": ("w.clone()", "w", TWICE),
        },
    },
    "fastpeft/ops/base_scratch.py": {
        "Scratch.take": {"never larger": (" or len(self.memory) < n * k", "", SCRATCH)},
        "_taken": {"a kept buffer of any size": ("and len(found) >= count", "", KEPT)},
    },
    "fastpeft/ops/base_parts.py": {
        "Parts.part": {"columns from the first": ("top * shape[1] + left", "top * shape[1]", CUT)},
        "Parts._has_parts": {
            "blocks cut": ("and shape[1] % block == 0 and (not columns or wanted % block == 0)", "", CUT)
        },
        "Parts._whole": {"asked for at every part": ("self._opaque[0] != p", "True", ASKED)},
    },
    "fastpeft/ops/dequantise.py": {
        "dequantise": {
            "in the base's dtype": ('_check.dtype_or_none("dequantise", "dtype", dtype) or base', "base", DTYPE),
        },
    },
}
