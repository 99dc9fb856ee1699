"""Prefixes on disk: PEFT's own files, and beside them what PEFT does not keep of a projection."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...nn.prefix import PrefixAdapter, Sizes
from ..formats.files import read_safetensors, write_json, write_tensors
from ..formats.peft_files import CONFIG, WEIGHTS
from ..formats.peft_prompts import EMBEDDINGS, check_fields, fields_of, read_embeddings
from ..method import Files
from ..row_method import RowMethod
from .config import PrefixTuning

RAW = "fastpeft_reparameterization.safetensors"


class PrefixFiles(Files):
    """PEFT's PREFIX_TUNING."""

    method: RowMethod

    def recognises(self, fields: Mapping) -> bool:
        return fields.get("peft_type") == "PREFIX_TUNING"

    def read(self, op: str, model: nn.Module, directory: Path, fields: Mapping) -> tuple[Any, dict[str, Tensor]]:
        """With the projection where we wrote it beside; PEFT keeps its result alone, which is trained directly then."""
        length, tensors = check_fields(op, fields), read_embeddings(op, directory)
        if not (directory / RAW).is_file():
            return PrefixTuning(length=length), tensors
        raw = read_safetensors(op, directory / RAW)
        hidden = raw.get("transform.0.bias")
        if hidden is None:
            raise ValueError(f"{op}: {directory / RAW} has no transform.0.bias, expected a projection's weights")
        return PrefixTuning(length=length, projection=len(hidden)), raw

    def write(self, op: str, model: nn.Module, name: str, tensors: dict[str, Tensor], directory: Path) -> None:
        adapter = self._adapter(model, name)
        layers, heads, width = adapter.sizes
        (directory / RAW).unlink(missing_ok=True)  # of another adapter, written here before
        if adapter.transform is not None:
            write_tensors(op, directory / RAW, tensors)
            own = {f"adapter.{key}": value for key, value in tensors.items()}
            with torch.no_grad():
                tensors = {EMBEDDINGS: torch.func.functional_call(_Flat(adapter), own, ()).contiguous()}
        fields = fields_of(
            model,
            "PREFIX_TUNING",
            adapter.length,
            token_dim=heads * width,
            num_layers=layers,
            num_attention_heads=heads,
            encoder_hidden_size=None if adapter.transform is None else adapter.transform[0].out_features,
            prefix_projection=adapter.transform is not None,
        )
        write_tensors(op, directory / WEIGHTS, tensors)
        write_json(directory / CONFIG, fields)

    def parameters(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        adapter = self._adapter(model, name)
        if adapter.transform is None:
            return {EMBEDDINGS: adapter.embedding}
        return dict(adapter.state_dict(keep_vars=True))

    def expected(
        self, model: nn.Module, config: PrefixTuning, plan: tuple[PrefixTuning, Sizes]
    ) -> dict[str, tuple[int, ...]]:
        sizes = plan[1]
        narrow, wide = sizes.heads * sizes.width, 2 * sizes.layers * sizes.heads * sizes.width
        if config.projection is None:
            return {EMBEDDINGS: (config.length, wide)}
        hidden = config.projection
        linears = {"0.weight": (hidden, narrow), "0.bias": (hidden,), "2.weight": (wide, hidden), "2.bias": (wide,)}
        return {"embedding": (config.length, narrow), **{f"transform.{key}": s for key, s in linears.items()}}

    def _adapter(self, model: nn.Module, name: str) -> PrefixAdapter:
        return cast(PrefixAdapter, self.method.adapters(model).parts[name])


class _Flat(nn.Module):
    """A prefix whose forward is ``flat``."""

    def __init__(self, adapter: PrefixAdapter):
        super().__init__()
        self.adapter = adapter

    def forward(self) -> Tensor:
        return self.adapter.flat()
