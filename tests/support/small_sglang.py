"""Stand-ins for the classes of SGLang that the plug-in meets, with their shapes (read in SGLang 0.5.23)."""

import types

import torch

SLOTS, RANK, K = 4, 8, 24


class ChunkedSgmvLoRABackend:
    """SGLang's backend, as far as the plug-in sees it; a forward batch is its requests' lengths."""

    name = "csgmv"

    def __init__(self, max_loras_per_batch, device, server_args):
        self.max_loras_per_batch, self.device = max_loras_per_batch, device

    def init_decode_cuda_graph_batch_info(self, max_bs_in_cuda_graph, num_tokens_per_req):
        self.cuda_graph_batch_info = self._info()

    def init_prefill_cuda_graph_batch_info(self, max_num_tokens, max_num_requests=None):
        self.prefill_cuda_graph_batch_info = self._info()

    def _info(self):
        tables = torch.zeros(self.max_loras_per_batch, dtype=torch.int32), torch.zeros(self.max_loras_per_batch)
        return types.SimpleNamespace(lora_ranks=tables[0], scalings=tables[1])

    def prepare_lora_batch(
        self, forward_batch, weight_indices, lora_ranks, scalings, use_cuda_graph, use_prefill_cuda_graph=False
    ):
        self.batch_info = self._info()
        if use_cuda_graph or use_prefill_cuda_graph:
            own = self.cuda_graph_batch_info, self.prefill_cuda_graph_batch_info
            self.batch_info = own[use_prefill_cuda_graph]
        self.batch_info.lora_ranks.copy_(torch.tensor(lora_ranks))
        self.batch_info.scalings.copy_(torch.tensor(scalings))

    def forward_with_base(
        self, layer, x, base_fn, lora_a, lora_b, output_offset, offsets, *, all_reduce=None, kind="linear",
        pruned_batch_info=None,
    ) -> str:  # fmt: skip
        return "SGLang's own"

    def run_lora_a_sgemm(self, x, weights, pruned_batch_info=None, stack_num=1, *args, **kwargs) -> str:
        return "SGLang's own"

    def run_qkv_lora(
        self, x, qkv_lora_a, qkv_lora_b, output_offset, max_qkv_out_dim, base_output=None, n_slices=3, *args, **kwargs
    ):
        raise NotImplementedError

    def run_gate_up_lora(self, x, gate_up_lora_a, gate_up_lora_b, output_offset, base_output=None, *args, **kwargs):
        raise NotImplementedError


class Layer:
    """A LoRA layer: ``A [slots, slices · R, K]``, ``B [slots, N, R]``, where the slices begin in the output."""

    def __init__(self, lora_backend, widths, dtype=torch.float32):
        self.lora_backend = lora_backend
        self.lora_a = torch.zeros(SLOTS, len(widths) * RANK, K, dtype=dtype)
        self.lora_b = torch.zeros(SLOTS, sum(widths), RANK, dtype=dtype)
        self.lora_offsets = tuple(sum(widths[:i]) for i in range(len(widths) + 1))

    def apply_lora(self, base_output, x):
        raise NotImplementedError


class LoRAMemoryPool:
    """SGLang's pool loads an adapter into a slot: A's slices one after the other, each of the adapter's own rank."""

    def load_lora_weight_to_buffer(
        self, uid, buffer_id, lora_adapter, lora_modules, lora_embed_tokens_module, lora_lm_head_module
    ):
        for layer_modules in lora_modules:
            for name, module in layer_modules.items():
                if uid is None:
                    module.lora_a[buffer_id].zero_()
                    module.lora_b[buffer_id].zero_()
                else:
                    lora_a, lora_b = lora_adapter.weights[name]
                    module.lora_a[buffer_id, : lora_a.shape[0]].copy_(lora_a)
                    module.lora_b[buffer_id, :, : lora_b.shape[1]].copy_(lora_b)
