"""The exporter: a child of the light worker that makes one export and ends.

Run as `python -m core.training.export_process` by its parent, which speaks the protocol of
`core.child`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from core.child import Channel, serve
from core.data.quiet import silence_libraries


def main() -> None:
    """Report ready and serve tasks until the parent goes away."""
    silence_libraries()
    warnings.simplefilter("ignore")
    # Imported here, so that the libraries find their environment set.
    from core.training.merging import convert_to_gguf, merge, pack

    def handle(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
        work_dir = Path(task["work_dir"])
        base, adapter = Path(task["base_path"]), Path(task["adapter_path"])
        merged, dtype = work_dir / "merged", task["dtype"]
        if task["format"] == "merged":
            merge(base, adapter, merged, dtype)
            channel.check_stop()
            return {"path": str(pack(merged, work_dir / "merged.tar"))}
        # The converter rounds once, from the exact sum.
        merge(base, adapter, merged, "fp32")
        channel.check_stop()
        target = work_dir / "model.gguf"
        convert_to_gguf(Path(task["converter"]), merged, target, dtype)
        return {"path": str(target)}

    serve(handle)


if __name__ == "__main__":
    main()
