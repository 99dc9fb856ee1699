"""Mutants of the vLLM plug-in, on stand-ins for its classes, as run.py says."""

LAYERS = "tests/integrations/vllm/test_layers.py"
PLUGIN = "tests/integrations/vllm/test_plugin.py"

TESTS = (
    LAYERS,
    f"{PLUGIN}::test_vllm_builds_the_wrapper_of_cpus",
    f"{PLUGIN}::test_a_build_for_cpus_that_differs_is_left_alone",
    f"{PLUGIN}::test_what_differs_is_said_and_vllm_left_alone",
)

MUTANTS = {
    "fastpeft/integrations/_vllm_ranks.py": {
        "_filled": {
            "the number of rows that are not 0": (
                "rows * torch.arange(1, len(rows) + 1, device=rows.device)).amax()",
                "rows).sum()",
            ),
            "one slice for all": ("ranks[p, index] =", "ranks[:, index] ="),
        },
        "_emptied": {
            "a slot keeps its rank": ("0 if known else", "layer.lora_a_stacked[0].shape[2] if known else"),
            "nobody else's adapter": ("0 if known else layer.lora_a_stacked[0].shape[2]", "0"),
        },
        "_table": {
            "made in a step": ("with torch.inference_mode(False):", "if True:"),
        },
    },
    "fastpeft/integrations/vllm.py": {
        "_Fast.add_lora_linear": {
            "nothing starts from 0": ("y.zero_()", "pass"),
            "no scale": ("self.fastpeft_scales * scale", "self.fastpeft_scales"),
        },
        "_FastCPU.fastpeft_launches": {
            "launches always": ("bool((self.token_lora_indices >= 0).any())", "True"),
            "never": ("bool((self.token_lora_indices >= 0).any())", "False"),
        },
        "_reasons": {
            "any wrapper": ("if name != expected:", "if False:"),
            "a CPU's interface is not looked at": (
                "expected, interface = REPLACED_CPU, CPU_INTERFACE",
                "expected, interface = REPLACED_CPU, {}",
            ),
        },
    },
}
