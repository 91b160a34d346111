"""Random LoRA adapters for tests: saved by PEFT, completed as published artifacts."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core import artifacts
from core.inference.engine import BaseModelRef

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base_ref(model_dir: Path, name: str = "tiny") -> BaseModelRef:
    """Return the reference of a base model's directory."""
    digest = artifacts.tree_digest(model_dir)
    return BaseModelRef(name=name, digest=digest, path=str(model_dir))


class AdapterMaker:
    """Makes random adapters of one base model, which is read once.

    Args:
        model_dir: The base model.

    Attributes:
        model: It, without any adapter.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model_dir: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from core.causal_lm import linear_modules
        from core.data.golden import golden_token_ids
        from core.data.tokenizer import load_tokenizer

        self._model_dir = model_dir
        self._digest = artifacts.tree_digest(model_dir)
        self.tokenizer = load_tokenizer(model_dir)
        self._golden = golden_token_ids(self.tokenizer)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self.model.eval()
        self._shapes = linear_modules(self.model)

    def make(
        self,
        path: Path,
        *,
        r: int = 4,
        targets: Sequence[str] = ALL_LINEAR,
        seed: int = 0,
        scale: float = 0.3,
        use_rslora: bool = False,
        template: str | None = None,
        look: Callable[[Any], object] = lambda tuned: None,
    ) -> Path:
        """Save a random adapter as a complete artifact.

        Args:
            path: Directory, created where needed.
            r: Rank; alpha is twice that.
            targets: Module names, or ends of them.
            seed: Of the random matrices.
            scale: Standard deviation of both matrices; 0 makes an adapter without effect.
            use_rslora: Whether the scale is divided by the rank's square root, not the rank.
            template: Chat template instead of the base model's.
            look: Called with PEFT's model before it is forgotten.
        """
        import torch
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
        from safetensors.torch import save_file

        config = LoraConfig(
            r=r,
            lora_alpha=2 * r,
            use_rslora=use_rslora,
            target_modules=list(targets),
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            tuned = get_peft_model(self.model, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        # What PEFT's own `save_pretrained` writes, without a description for people.
        path.mkdir(parents=True, exist_ok=True)
        save_file(get_peft_model_state_dict(tuned), path / artifacts.WEIGHTS_FILE)
        tuned.peft_config["default"].save_pretrained(path)
        look(tuned.eval())
        self.take_back(tuned)
        for name in (artifacts.TOKENIZER_FILE, artifacts.TOKENIZER_CONFIG_FILE):
            shutil.copyfile(self._model_dir / name, path / name)
        template = self.tokenizer.chat_template if template is None else template
        if template is not None:
            (path / artifacts.TEMPLATE_FILE).write_text(template, "utf-8")
        artifacts.build_manifest(
            path,
            base_digest=self._digest,
            golden_token_ids=self._golden,
            linear_modules=self._shapes,
        )
        return path

    def take_back(self, tuned: Any) -> None:
        """Have the model without what PEFT has put into it."""
        self.model = tuned.unload()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config


def make_adapter(path: Path, model_dir: Path, **options: Any) -> Path:
    """Save a random adapter of a model as a complete artifact; see `AdapterMaker.make`."""
    return AdapterMaker(model_dir).make(path, **options)


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
