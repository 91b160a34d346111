"""The sample model and its adapters as llama.cpp wants them.

The model in Q8_0 is made from the very weights that all sides compute with: the sample's own file
has 4-bit weights, and the sample model is what those are in float32. Adapters stay in float32.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

from core.artifacts import CONFIG_FILE, WEIGHTS_FILE

_ARCHITECTURE: Final = "llama"
# Written by the writer itself, or of the old weights.
_NOT_COPIED = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
_MODULE = re.compile(
    r"layers\.(?P<layer>\d+)\.\w+\.(?P<name>\w+)_proj\.lora_(?P<side>[AB])\.weight$"
)
_NAMES: Final = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def make_q8(source: Path, target: Path) -> Path:
    """Write `source` with every matrix in Q8_0; return `target`."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, _ARCHITECTURE)
    for name, field in reader.fields.items():
        if not name.startswith(_NOT_COPIED):
            _copy(writer, name, field)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in reader.tensors:
        numbers = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if numbers.ndim == 2:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, numbers)
    return _finish(writer, target)


def make_adapter_file(adapter: Path, model_dir: Path, target: Path) -> Path:
    """Write a PEFT adapter as llama.cpp reads it; return `target`."""
    config = json.loads((model_dir / "config.json").read_text())
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    writer = GGUFWriter(target, _ARCHITECTURE)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    alpha = json.loads((adapter / CONFIG_FILE).read_text())["lora_alpha"]
    writer.add_float32("adapter.lora.alpha", float(alpha))
    for key, matrix in load_file(adapter / WEIGHTS_FILE).items():
        found = _MODULE.search(key)
        assert found is not None, key
        layer, name, side = found["layer"], found["name"], found["side"].lower()
        if side == "b" and name in heads:
            matrix = _pair_up(matrix, heads[name])
        writer.add_tensor(f"blk.{layer}.{_NAMES[name]}.weight.lora_{side}", matrix)
    return _finish(writer, target)


def _pair_up(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Put rows that are rotated together side by side, as llama.cpp has them in its products."""
    halves = matrix.reshape(heads, 2, -1, matrix.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(matrix.shape))


def _finish(writer: GGUFWriter, target: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _copy(writer: GGUFWriter, name: str, field: Any) -> None:
    kind = field.types[0]
    of_what = field.types[-1] if kind == GGUFValueType.ARRAY else None
    writer.add_key_value(name, field.contents(), kind, sub_type=of_what)
