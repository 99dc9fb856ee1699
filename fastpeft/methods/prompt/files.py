"""Prompts on disk: PEFT's own files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..embeddings import token_table
from ..formats.files import write_json, write_tensors
from ..formats.peft_files import CONFIG, WEIGHTS
from ..formats.peft_prompts import EMBEDDINGS, check_fields, fields_of, read_embeddings
from ..method import Files
from ..row_method import RowMethod
from .config import PromptTuning


class PromptFiles(Files):
    """PEFT's PROMPT_TUNING."""

    method: RowMethod

    def recognises(self, fields: Mapping) -> bool:
        return fields.get("peft_type") == "PROMPT_TUNING"

    def read(self, op: str, model: nn.Module, directory: Path, fields: Mapping) -> tuple[Any, dict[str, Tensor]]:
        sides = {other.padding_side for other in self.method.configs(model).values()}
        config = PromptTuning(length=check_fields(op, fields), padding_side=sides.pop() if sides else None)
        return config, read_embeddings(op, directory)

    def write(self, op: str, model: nn.Module, name: str, tensors: dict[str, Tensor], directory: Path) -> None:
        length, columns = tensors[EMBEDDINGS].shape
        config = getattr(model, "config", None)
        sizes = getattr(config, "get_text_config", lambda: config)()
        fields = fields_of(
            model,
            "PROMPT_TUNING",
            length,
            token_dim=columns,
            num_layers=getattr(sizes, "num_hidden_layers", None),
            num_attention_heads=getattr(sizes, "num_attention_heads", None),
            prompt_tuning_init="RANDOM",
        )
        write_tensors(op, directory / WEIGHTS, tensors)
        write_json(directory / CONFIG, fields)

    def parameters(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        return {EMBEDDINGS: cast(nn.Parameter, self.method.adapters(model).parts[name])}

    def expected(self, model: nn.Module, config: PromptTuning, plan: Any) -> dict[str, tuple[int, ...]]:
        return {EMBEDDINGS: (config.length, token_table(model).shape[1])}
