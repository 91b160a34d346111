"""Random LoRA adapters for tests: saved by PEFT, completed as published artifacts."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core import artifacts
from core.inference.engine import BaseModelRef

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base_ref(model_dir: Path, name: str = "tiny") -> BaseModelRef:
    """Return the reference of a base model's directory."""
    digest = artifacts.tree_digest(model_dir)
    return BaseModelRef(name=name, digest=digest, path=str(model_dir))


def make_adapter(
    path: Path,
    model_dir: Path,
    *,
    r: int = 4,
    targets: Sequence[str] = ALL_LINEAR,
    seed: int = 0,
    scale: float = 0.3,
    template: str | None = None,
) -> Path:
    """Save a random adapter of a model as a complete artifact.

    Args:
        path: Directory, created where needed.
        model_dir: The base model.
        r: Rank; alpha is twice that.
        targets: Module names, or ends of them.
        seed: Of the random matrices.
        scale: Standard deviation of both matrices; 0 makes an adapter without effect.
        template: Chat template instead of the base model's.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from core.causal_lm import linear_modules
    from core.data.golden import golden_token_ids
    from core.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    shapes = linear_modules(model)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    tuned.save_pretrained(path)
    (path / "README.md").unlink(missing_ok=True)
    if template is not None:
        tokenizer.chat_template = template
    for name in (artifacts.TOKENIZER_FILE, artifacts.TOKENIZER_CONFIG_FILE):
        shutil.copyfile(model_dir / name, path / name)
    if tokenizer.chat_template is not None:
        (path / artifacts.TEMPLATE_FILE).write_text(tokenizer.chat_template, "utf-8")
    artifacts.build_manifest(
        path,
        base_digest=artifacts.tree_digest(model_dir),
        golden_token_ids=golden_token_ids(load_tokenizer(model_dir)),
        linear_modules=shapes,
    )
    return path


def reseal(path: Path, **changes: Any) -> Path:
    """Give a tampered artifact a manifest that matches its files again, without any check.

    Args:
        path: The artifact's directory.
        changes: Members of the manifest to set besides.
    """
    manifest = json.loads((path / artifacts.MANIFEST_FILE).read_text())
    files = artifacts.describe_files(path, [file["path"] for file in manifest["files"]])
    manifest |= {
        "files": [file.model_dump() for file in files],
        "digest": artifacts.digest_of(files),
        **changes,
    }
    (path / artifacts.MANIFEST_FILE).write_text(json.dumps(manifest))
    return path
