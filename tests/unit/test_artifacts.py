from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from core import artifacts
from core.errors import InvalidInput

LINEAR = {"model.layers.0.self_attn.q_proj": [6, 4], "model.layers.0.mlp.up_proj": [8, 4]}
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "up_proj"],
    "base_model_name_or_path": "base",
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "use_dora": False,
}


def lora_weights(rank: int = 2) -> dict[str, np.ndarray]:
    weights = {}
    for module, (rows, columns) in LINEAR.items():
        weights[f"base_model.model.{module}.lora_A.weight"] = np.ones((rank, columns), np.float32)
        weights[f"base_model.model.{module}.lora_B.weight"] = np.ones((rows, rank), np.float32)
    return weights


def write_artifact(directory: Path, **config: Any) -> Path:
    directory.mkdir()
    save_file(lora_weights(), directory / artifacts.WEIGHTS_FILE)
    (directory / artifacts.CONFIG_FILE).write_text(json.dumps(CONFIG | config))
    (directory / artifacts.TOKENIZER_FILE).write_text("{}")
    (directory / artifacts.TEMPLATE_FILE).write_text("{{ messages }}")
    return directory


def build(directory: Path, base_digest: str = "a" * 64) -> artifacts.Manifest:
    return artifacts.build_manifest(
        directory, base_digest=base_digest, golden_token_ids=[1, 2], linear_modules=LINEAR
    )


def test_a_manifest_describes_the_directory_and_reads_back(tmp_path: Path) -> None:
    directory = write_artifact(tmp_path / "a")
    manifest = build(directory)
    assert artifacts.read_manifest(directory) == manifest
    assert manifest.target_modules == sorted(LINEAR)
    assert manifest.template_sha256 == artifacts.sha256_text("{{ messages }}")
    artifacts.verify_files(directory, manifest)


def test_the_digest_depends_on_content_and_base_and_on_nothing_else(tmp_path: Path) -> None:
    first = build(write_artifact(tmp_path / "a"))
    again = build(write_artifact(tmp_path / "b"))
    other_base = build(write_artifact(tmp_path / "c"), base_digest="b" * 64)
    other_alpha = build(write_artifact(tmp_path / "d", lora_alpha=8))
    assert first.digest == again.digest
    assert len({first.digest, other_base.digest, other_alpha.digest}) == 3


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    directory = write_artifact(tmp_path / "a")
    manifest = build(directory)
    weights = directory / artifacts.WEIGHTS_FILE
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InvalidInput) as caught:
        artifacts.verify_files(directory, manifest)
    assert caught.value.code == "digest_mismatch"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 0}, "r"),
        ({"r": 100_000}, "r"),
        ({"r": True}, "r"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"target_modules": ".*proj"}, "target_modules"),
        ({"target_modules": ["q_proj|k_proj"]}, "target_modules"),
        ({"auto_mapping": {"parent_library": "os"}}, "auto_mapping"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"megatron_core": "os"}, "megatron_core"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"rank_pattern": {"q": 4}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"some_new_feature": "on"}, "some_new_feature"),
    ],
)
def test_foreign_config_fields_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        build(write_artifact(tmp_path / "a", **change))
    assert (caught.value.code, caught.value.field) == ("invalid_adapter_config", field)


def test_the_published_config_names_modules_in_full_and_keeps_no_foreign_field(
    tmp_path: Path,
) -> None:
    directory = write_artifact(tmp_path / "a")
    build(directory)
    config = json.loads((directory / artifacts.CONFIG_FILE).read_text())
    assert config["target_modules"] == sorted(LINEAR)
    assert "megatron_core" not in config


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"base_model.model.other.lora_A.weight": np.ones((2, 4), np.float32)}, "shape"),
        ({"base_model.model.lm_head.weight": np.ones((2, 4), np.float32)}, "weights"),
        (
            {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": np.ones((2, 5), "f4")},
            "shape",
        ),
        (
            {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": np.ones((2, 4), "f8")},
            "weights",
        ),
        ({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": None}, "shape"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path: Path, change: dict[str, Any], code: str) -> None:
    directory = write_artifact(tmp_path / "a")
    weights = lora_weights() | change
    save_file(
        {name: value for name, value in weights.items() if value is not None},
        directory / artifacts.WEIGHTS_FILE,
    )
    with pytest.raises(InvalidInput) as caught:
        build(directory)
    expected = {"shape": "adapter_shape_mismatch", "weights": "invalid_adapter_weights"}
    assert caught.value.code == expected[code]


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_never_taken_for_weights(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidInput) as caught:
        artifacts.read_lora_tensors(path)
    assert caught.value.code == "invalid_adapter_weights"


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "base_model.model.m.lora_A.weight": {
                "dtype": "F32",
                "shape": [2, 1 << 40],
                "data_offsets": [0, 8 << 40],
            }
        }
    ).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    with pytest.raises(InvalidInput, match="does not fit"):
        artifacts.read_lora_tensors(path)
