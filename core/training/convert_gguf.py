"""Turn a GGUF file of a Llama-like model into a plain safetensors directory.

Run as `python -m core.training.convert_gguf GGUF_PATH TARGET_DIR`. Weights are dequantised to
float32, once, so that training and serving start from the same numbers. On a deliberate error it
exits with status 1 and one line of JSON on stdout.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from core.artifacts import TEMPLATE_FILE
from core.data.quiet import silence_libraries
from core.errors import InvalidInput
from core.ids import new_id
from core.training.command import run_command

_KNOWN_SPLITTINGS = ("gpt-2", "smollm")


def convert_gguf(source: Path, target: Path) -> Path:
    """Write `source` as a float32 model directory and return its path.

    The directory appears complete or not at all: it is written beside `target` and renamed.

    Raises:
        InvalidInput: Code `gguf_unreadable`, `gguf_tokenizer_unsupported` or `target_exists`.
    """
    silence_libraries()
    if not source.is_file():
        raise InvalidInput(
            f"there is no file {source}",
            code="gguf_unreadable",
            hint="Give the path of a .gguf file.",
        )
    with source.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InvalidInput(f"{source.name} is not a GGUF file", code="gguf_unreadable")
    if target.exists():
        raise InvalidInput(
            f"{target} exists already",
            code="target_exists",
            hint="Remove it or choose another directory.",
        )

    _check_tokenizer(source)
    model, tokenizer = _load(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f".{new_id('gguf')}"
    try:
        aside.mkdir()
        _plain_copy(model, tokenizer).save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        template = tokenizer.chat_template
        if template and not (aside / TEMPLATE_FILE).is_file():
            (aside / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        for file in aside.iterdir():
            file.chmod(0o644)  # safetensors are written for their owner only
        os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _check_tokenizer(source: Path) -> None:
    """Refuse a tokenizer that would be converted with the wrong splitting of text.

    transformers gives every byte-level tokenizer of the llama family GPT-2's splitting, whatever
    the file says, and a model reads noise through a wrong one. SmolLM's differs in digits only,
    which its merges never join.
    """
    from gguf import GGUFReader

    try:
        fields = GGUFReader(source).fields
        values = {
            name: fields[name].contents() if name in fields else None
            for name in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
        }
    except Exception as error:
        # The reader fails on a damaged file with whatever it stumbles over.
        raise _unreadable(source, error) from error
    architecture, kind, splitting = values.values()
    if (architecture, kind) == ("llama", "gpt2") and splitting not in _KNOWN_SPLITTINGS:
        raise InvalidInput(
            f"the tokenizer of {source.name} splits text as {splitting!r}, which would be lost",
            code="gguf_tokenizer_unsupported",
            hint="Use the model's safetensors directory instead.",
        )


def _unreadable(source: Path, error: Exception) -> InvalidInput:
    return InvalidInput(
        f"{source.name} cannot be converted: {error}",
        code="gguf_unreadable",
        hint="The file may be incomplete or of an architecture that transformers cannot read.",
    )


def _load(source: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(
            source.parent, gguf_file=source.name, trust_remote_code=False
        )
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        raise _unreadable(source, error) from error
    return model, tokenizer


def _plain_copy(model: Any, tokenizer: Any) -> Any:
    """Return the model without the marks of its quantised origin, which refuse to be saved."""
    config_values = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype"):
        config_values.pop(name, None)
    config = type(model.config).from_dict(config_values)
    config.name_or_path = ""
    # The file's metadata may name another end token than the one its tokenizer ends turns with.
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), strict=True)
    plain.tie_weights()
    plain.generation_config.bos_token_id = config.bos_token_id
    plain.generation_config.eos_token_id = config.eos_token_id
    plain.generation_config.pad_token_id = config.pad_token_id
    return plain.eval()


def main(arguments: list[str]) -> dict[str, Any]:
    """Convert and return where the result is."""
    if len(arguments) != 2:
        raise InvalidInput(
            "two arguments are needed",
            code="usage",
            hint="python -m core.training.convert_gguf GGUF_PATH TARGET_DIR",
        )
    target = convert_gguf(Path(arguments[0]).absolute(), Path(arguments[1]).absolute())
    return {"path": str(target)}


if __name__ == "__main__":
    sys.exit(run_command(main))
