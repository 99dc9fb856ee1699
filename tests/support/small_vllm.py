"""Stand-ins for the classes of vLLM that the plug-in meets, with their shapes (read in vLLM 0.33.0)."""

import types

import torch
from torch import nn

SLOTS, RANK, K = 4, 8, 24


class PunicaWrapperCPU:
    """vLLM's wrapper, as far as the plug-in sees it; ``mapping`` is the slots themselves."""

    def __init__(self, max_num_batched_tokens, max_batches, device, **kwargs):
        self._token_lora_indices = torch.empty(max_num_batched_tokens, dtype=torch.long)

    @property
    def token_lora_indices(self):
        return self._token_lora_indices[: self.tokens]

    def update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs):
        self.tokens = len(mapping)
        self._token_lora_indices[: self.tokens] = torch.tensor(mapping)

    def add_lora_linear(
        self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, **kwargs
    ) -> str:
        return "vLLM's own"


class PunicaWrapperGPU(PunicaWrapperCPU):
    """It also knows its slots, and whether a step has an adapter."""

    def __init__(self, max_num_batched_tokens, max_batches, device, **kwargs):
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.max_loras = kwargs["lora_config"].max_loras
        self.token_mapping_meta = types.SimpleNamespace(no_lora_flag_cpu=torch.tensor([False], device="cpu"))

    def update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs):
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.token_mapping_meta.no_lora_flag_cpu[0] = all(slot < 0 for slot in mapping)


class BaseLinearLayerWithLoRA(nn.Module):
    """vLLM's layer with one slice: its stacked weights, ``reset_lora`` and ``set_lora``."""

    def __init__(self, output_slices=(16,), dtype=torch.float32):
        super().__init__()
        self.output_slices, self.n_slices = output_slices, len(output_slices)
        self.lora_a_stacked = tuple(torch.zeros(SLOTS, 1, RANK, K, dtype=dtype) for _ in output_slices)
        self.lora_b_stacked = tuple(torch.zeros(SLOTS, 1, n, RANK, dtype=dtype) for n in output_slices)

    def reset_lora(self, index):
        for s_index in range(self.n_slices):
            self.lora_a_stacked[s_index][index] = 0
            self.lora_b_stacked[s_index][index] = 0

    def set_lora(self, index, lora_a, lora_b):
        self.reset_lora(index)
        self.lora_a_stacked[0][index, 0, : lora_a.shape[0], : lora_a.shape[1]].copy_(lora_a)
        self.lora_b_stacked[0][index, 0, : lora_b.shape[0], : lora_b.shape[1]].copy_(lora_b)


class MergedColumnParallelLinearWithLoRA(BaseLinearLayerWithLoRA):
    """vLLM's layer with packed slices; a slice without an adapter is None."""

    def set_lora(self, index, lora_a, lora_b):
        self.reset_lora(index)
        for i in range(self.n_slices):
            if (a := lora_a[i]) is not None:
                self.lora_a_stacked[i][index, 0, : a.shape[0], : a.shape[1]].copy_(a)
            if (b := lora_b[i]) is not None:
                self.lora_b_stacked[i][index, 0, : b.shape[0], : b.shape[1]].copy_(b)
