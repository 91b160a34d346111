"""Describing model directories, and making one from a GGUF file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.data.rendering import encode_text
from core.data.tokenizer import load_tokenizer
from core.errors import InvalidInput
from core.training.convert_gguf import convert_gguf
from core.training.inspect_model import inspect_model
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_model import make_tiny_model


def run_module(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_model_is_described_on_one_line(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "tiny")
    done = run_module("core.training.inspect_model", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    description = json.loads(done.stdout)
    assert description["architecture"] == "LlamaForCausalLM"
    assert description["parameters"] == 98_624
    assert description["context_length"] == 512
    assert description["vocab_size"] == 384
    assert description["dtype"] == "float32"
    assert description["chat_template"] is True
    assert description["eos_token_id"] == 2
    assert len(description["linear_modules"]) == 14
    assert description["linear_modules"]["model.layers.1.self_attn.k_proj"] == [32, 64]
    assert 16 <= len(description["golden_token_ids"]) <= 64
    assert description["bytes"] == sum(file.stat().st_size for file in path.iterdir())


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        ("config.json", "model_unreadable"),
        ("model.safetensors", "no_safetensors"),
        ("tokenizer.json", "tokenizer_unreadable"),
    ],
)
def test_an_incomplete_directory_is_refused(tmp_path: Path, damage: str, code: str) -> None:
    path = make_tiny_model(tmp_path / "tiny")
    (path / damage).unlink()
    with pytest.raises(InvalidInput) as caught:
        inspect_model(path)
    assert caught.value.code == code


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "tiny")
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (path / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "executed"
    (path / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(InvalidInput) as caught:
        inspect_model(path)
    assert caught.value.code == "model_unreadable"
    assert not marker.exists()


def test_errors_are_one_line_of_json_and_status_1(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"no such thing")
    done = run_module("core.training.convert_gguf", wrong, tmp_path / "target")
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == "gguf_unreadable"
    assert not (tmp_path / "target").exists()


def test_a_gguf_file_becomes_the_same_model(tmp_path: Path) -> None:
    original = make_tiny_model(tmp_path / "tiny")
    source = write_tiny_gguf(original, tmp_path / "tiny.gguf")
    target = convert_gguf(source, tmp_path / "models" / "converted")
    assert [path.name for path in target.parent.iterdir()] == ["converted"]

    weights = load_file(target / "model.safetensors")
    expected = load_file(original / "model.safetensors")
    # Tied, so the head is stored once.
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)

    before, after = inspect_model(original), inspect_model(target)
    same = before.keys() - {"bytes", "tokenizer_sha256"}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    text = "<|im_start|>user\nThe caf\u00e9 is 12 km  away\n<|im_end|>"
    encode = [encode_text(text, load_tokenizer(path)).ids for path in (original, target)]
    assert encode[0] == encode[1]

    with pytest.raises(InvalidInput) as caught:
        convert_gguf(source, target)
    assert caught.value.code == "target_exists"


def test_a_gguf_file_that_would_lose_its_tokenizer_is_refused(tmp_path: Path) -> None:
    original = make_tiny_model(tmp_path / "tiny")
    source = write_tiny_gguf(original, tmp_path / "tiny.gguf", splitting="llama-bpe")
    with pytest.raises(InvalidInput) as caught:
        convert_gguf(source, tmp_path / "target")
    assert caught.value.code == "gguf_tokenizer_unsupported"

    source.write_bytes(source.read_bytes()[:500])
    with pytest.raises(InvalidInput) as caught:
        convert_gguf(source, tmp_path / "target")
    assert caught.value.code == "gguf_unreadable"
    assert not (tmp_path / "target").exists()
