"""The engine's decoder without anything around it.

`python -m benchmarks.decoder_run MODEL ADAPTER…` says in a line of JSON how large the parts of the
model are; then it reads a line for every batch and answers with the milliseconds of its steps.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from core.data.quiet import silence_libraries, spin_briefly

# As the engine's process does, before anything imports torch.
if __name__ == "__main__":
    spin_briefly()
    silence_libraries()

import torch

from benchmarks.decoder_process import Sizes
from core.artifacts import read_manifest
from core.causal_lm import load_causal_lm
from core.inference.lean.linear import offered_precisions
from core.inference.lean.model import LeanModel
from core.inference.model_runner import ModelRunner
from core.inference.rows import RowModel
from tests.support.adapters import base_ref


class _Decoder:
    """A base model with adapters, and the same with its first layer only."""

    def __init__(self, model_dir: Path, adapters: Sequence[Path]) -> None:
        runner = ModelRunner("cpu")
        base = base_ref(model_dir)
        loaded = runner.load_base(base)
        runner.bases[base.digest] = loaded
        self._digests = [read_manifest(path).digest for path in adapters]
        adapter_bytes = 0
        for path, digest in zip(adapters, self._digests, strict=True):
            prepared = runner.read_adapter(base.digest, digest, path)
            adapter_bytes = prepared.bytes
            loaded.insert(prepared)
        self._rows = loaded.rows
        model = load_causal_lm(model_dir, torch.float32)
        self.sizes = Sizes(
            precision=loaded.precision,
            layers=len(model.model.layers),
            layer_weights=sum(p.numel() for p in model.model.layers[0].parameters()),
            head_weights=model.get_output_embeddings().weight.numel(),
            adapter_bytes=adapter_bytes,
        )
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        self._one_layer = LeanModel(model, offered_precisions(model.device)[0])

    def steps_ms(
        self,
        adapters: Sequence[int | None],
        prompt_tokens: int,
        steps: int,
        *,
        one_layer: bool = False,
    ) -> list[float]:
        """Return how long greedy steps of some rows took, each behind a prompt of its own."""
        model: RowModel = self._one_layer if one_layer else self._rows
        rows = [
            model.open_row(
                None if adapter is None else self._digests[adapter],
                [100 + (number + position) % 1000 for position in range(prompt_tokens)],
            )
            for number, adapter in enumerate(adapters)
        ]
        best = [int(model.extend([row], [row.prompt_ids])[0].argmax()) for row in rows]
        took = []
        for _ in range(steps):
            started = time.perf_counter()
            best = model.extend(rows, [[token_id] for token_id in best]).argmax(-1).tolist()
            took.append(1000 * (time.perf_counter() - started))
        for row in rows:
            model.close_row(row)
        return took


def main() -> None:
    """Answer line by line until the input ends."""
    # What is logged must not come between the answers.
    with contextlib.redirect_stdout(sys.stderr):
        decoder = _Decoder(Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]])
    print(json.dumps(asdict(decoder.sizes)), flush=True)
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            took = decoder.steps_ms(**json.loads(line))
        print(json.dumps(took), flush=True)


if __name__ == "__main__":
    main()
