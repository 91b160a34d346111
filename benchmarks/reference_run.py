"""transformers + PEFT, as a user would call them.

`python -m benchmarks.reference_run MODEL ADAPTER…` reads a line of JSON for every static batch and
answers with the times at which its tokens came; a mixed batch is PEFT's `adapter_names`.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class _Reference:
    def __init__(self, model_dir: str, adapters: Sequence[str]) -> None:
        self._paths = adapters
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self._model = PeftModel.from_pretrained(base, adapters[0], adapter_name="0")
        for number, path in enumerate(adapters[1:], start=1):
            self._model.load_adapter(path, str(number))
        self._model.eval()

    def load(self, adapter: int) -> list[float]:
        """Load one adapter more and forget it; return the milliseconds."""
        started = time.monotonic()
        self._model.load_adapter(self._paths[adapter], "again")
        took = time.monotonic() - started
        self._model.delete_adapter("again")
        return [1000 * took]

    def generate(
        self, rows: list[list[int]], adapters: list[int | None], new_tokens: int
    ) -> list[float]:
        """Return when each step's tokens were there."""
        longest = max(map(len, rows))
        # Padded on the left; what is there does not matter.
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        times: list[float] = []

        def note(ids: Any, scores: Any) -> Any:
            times.append(time.monotonic())
            return scores

        names = [str(number) for number in adapters]
        arguments: dict[str, Any] = {}
        if adapters[0] is not None and len(set(adapters)) > 1:
            arguments["adapter_names"] = names
        elif adapters[0] is not None:
            self._model.set_adapter(names[0])
        without = self._model.disable_adapter() if adapters[0] is None else nullcontext()
        with torch.inference_mode(), without:
            self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                pad_token_id=0,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                logits_processor=[note],
                **arguments,
            )
        return times


def main() -> None:
    """Answer line by line until the input ends."""
    warnings.simplefilter("ignore")
    # What the libraries print must not come between the answers.
    with redirect_stdout(sys.stderr):
        reference = _Reference(sys.argv[1], sys.argv[2:])
    for line in sys.stdin:
        message = json.loads(line)
        with redirect_stdout(sys.stderr):
            if "load" in message:
                times = reference.load(message["load"])
            else:
                times = reference.generate(**message)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
