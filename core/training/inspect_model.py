"""Describe a base model directory without loading its weights.

Run as `python -m core.training.inspect_model PATH`; prints one line of JSON on stdout and noise on
stderr. On a deliberate error it exits with status 1 and prints the error instead.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from core.data.golden import golden_token_ids
from core.data.quiet import silence_libraries
from core.data.templates import fallback_of, own_template, template_sha256
from core.data.tokenizer import load_tokenizer, tokenizer_sha256
from core.errors import InvalidInput
from core.training.command import run_command


def inspect_model(path: Path) -> dict[str, Any]:
    """Return what the service needs to know of a base model.

    Returns:
        `architecture`, `parameters`, `context_length`, `vocab_size`, `dtype`, `linear_modules`,
        `auto_target_modules`, `chat_template` (it has its own), `template_sha256`,
        `fallback_template`, `tokenizer_sha256`, `golden_token_ids`, `eos_token_id` and `bytes`.

    Raises:
        InvalidInput: Code `model_unreadable`, `no_safetensors`, `quantised_model` or
            `tokenizer_unreadable`.
    """
    silence_libraries()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from core.causal_lm import linear_modules, unreadable
    from core.training.lora import auto_targets

    if not (path / "config.json").is_file():
        raise InvalidInput(
            f"{path} has no config.json",
            code="model_unreadable",
            hint="Give a directory as transformers saves it.",
        )
    if not list(path.glob("*.safetensors")):
        raise InvalidInput(
            f"{path} has no safetensors weights",
            code="no_safetensors",
            hint="Only safetensors are loaded; pickled weights can run code.",
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise unreadable(path, error) from error
    if getattr(config, "quantization_config", None):
        raise InvalidInput(
            f"the weights of {path} are quantised",
            code="quantised_model",
            hint="Use the unquantised model, or convert a GGUF file.",
        )
    tokenizer = load_tokenizer(path)
    modules = linear_modules(model)
    text_config = config.get_text_config()
    return {
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "context_length": getattr(text_config, "max_position_embeddings", None),
        "vocab_size": text_config.vocab_size,
        "dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "linear_modules": modules,
        "auto_target_modules": auto_targets(model.config.model_type, modules),
        "chat_template": own_template(tokenizer) is not None,
        "template_sha256": template_sha256(tokenizer),
        "fallback_template": fallback_of(tokenizer),
        "tokenizer_sha256": tokenizer_sha256(path),
        "golden_token_ids": golden_token_ids(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
    }


def main(arguments: list[str]) -> dict[str, Any]:
    """Describe the one directory that is named."""
    if len(arguments) != 1:
        raise InvalidInput(
            "one argument is needed",
            code="usage",
            hint="python -m core.training.inspect_model PATH",
        )
    return inspect_model(Path(arguments[0]).absolute())


if __name__ == "__main__":
    sys.exit(run_command(main))
