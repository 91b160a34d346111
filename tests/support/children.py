"""Small child programs that speak the frame protocol, to see a worker through every ending.

Run as `python -m tests.support.children MODE`; the modes are the functions below.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from core.child import Channel, serve
from core.errors import InvalidInput

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = "model.layers.0.mlp.up_proj"


def child_argv(mode: str) -> list[str]:
    """Return the command line of a child of this mode."""
    return [sys.executable, "-m", "tests.support.children", mode]


def environment() -> dict[str, str]:
    """Return the variables that let a child find this module from any directory."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def succeed(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Train in no time: report three steps and hand over an artifact."""
    print("a library's chatter on stdout")
    channel.send("log", type="chatter", data={"pid": os.getpid()})
    for step in (1, 2, 3):
        channel.send("metric", step=step, loss=1.0 / step)
        channel.send("progress", stage="train", step=step, total_steps=3)
    artifact = write_artifact(Path(task["work_dir"]) / "artifact", task["base"]["digest"])
    return {"artifact_dir": str(artifact), "report": {"samples": []}, "provenance": {"steps": 3}}


def validate(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Find nothing wrong with the rows."""
    return {"rows": len(Path(task["sources"][0]["path"]).read_bytes().splitlines())}


def echo(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Return the task, the process's id and its niceness; grow first if asked to."""
    channel.ballast = b"x" * task.get("grow_bytes", 0)  # type: ignore[attr-defined]
    group = Path("/proc/self/autogroup")
    return {
        "task": task,
        "pid": os.getpid(),
        "niceness": os.nice(0),
        "autogroup": group.read_text() if group.exists() else None,
        "cwd": os.getcwd(),
    }


def refuse(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Fail on purpose."""
    raise InvalidInput("row 3 has no answer", code="invalid_dataset", line=3)


def break_down(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Fail without meaning to, and tell what nobody should know."""
    print(f"my environment: {os.environ.get('SOME_SERVICE_TOKEN')}", file=sys.stderr)
    raise RuntimeError("a bug")


def run_out_of_memory(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Fail as torch does when an allocation fails."""
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def crash(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Die by SIGKILL, as the kernel's memory killer would have it."""
    channel.send("log", type="crashing", data={})
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def chatter_and_crash_once(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Print much, and die in the middle of a line at the first attempt to train."""
    if task["attempt"] > 2:
        return succeed(task, channel)
    sys.stderr.write("".join(f"line {number}\n" for number in range(100)))
    sys.stderr.write("the last words, without an end")
    sys.stderr.flush()
    return crash(task, channel)


def flood(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Print more than anybody will read, and train."""
    for number in range(30):
        os.write(2, f"{number:0>99}\n".encode() * 8000)
    os.write(2, b"the end\n")
    artifact = write_artifact(Path(task["work_dir"]) / "artifact", task["base"]["digest"])
    return {"artifact_dir": str(artifact), "report": {}, "provenance": {}}


def crash_once(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Die at the first attempt to train."""
    return crash(task, channel) if task["attempt"] <= 1 else succeed(task, channel)


def stop_slowly(task: dict[str, Any], channel: Channel) -> dict[str, Any] | None:
    """Work until asked to stop, then need a moment."""
    step = 0
    while not channel.should_stop():
        step += 1
        channel.send("progress", stage="train", step=step, total_steps=1_000_000)
        time.sleep(0.02)
    time.sleep(0.2)
    channel.check_stop()
    return None


def train_in_steps(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Count forty steps from the checkpoint on; make one every five steps or on request."""
    work_dir = Path(task["work_dir"])
    resume_dir = task["resume_dir"]
    steps = int((Path(resume_dir) / "step").read_text()) if resume_dir else 0
    while steps < 40:
        steps += 1
        channel.send("metric", step=steps, loss=1.0 / steps)
        channel.send("progress", stage="train", step=steps, total_steps=40)
        time.sleep(0.05)
        keeps = channel.stop_reason in {"pause", "shutdown", "time_limit"}
        if steps % 5 == 0 or keeps:
            directory = work_dir / f"checkpoint-{steps}"
            directory.mkdir()
            (directory / "step").write_text(str(steps))
            (directory / "nested").mkdir()
            (directory / "nested" / "weights").write_bytes(bytes(3_000_000))
            channel.send("checkpoint", step=steps, path=str(directory))
        channel.check_stop()
    artifact = write_artifact(work_dir / "artifact", task["base"]["digest"])
    return {"artifact_dir": str(artifact), "report": {}, "provenance": {"steps": steps}}


def train_and_crash_once(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Train, but die in the first attempt after the checkpoint of step 10 is on its way."""
    if not task["resume_dir"]:
        threading.Timer(0.05 * 12, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return train_in_steps(task, channel)


def fill_the_disk_once(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Find the disk full in the first attempt to train."""
    if task["attempt"] <= 2:
        raise OSError(28, "No space left on device")
    return succeed(task, channel)


def run_out_of_memory_above_rung_two(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Train only as far down the memory ladder as rung two."""
    if task["memory_rung"] < 2:
        run_out_of_memory(task, channel)
    return train_in_steps(task, channel)


def hang(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Work on, whatever one is asked."""
    print("hanging from now on")
    channel.send("progress", stage="train", step=1, total_steps=2)
    while True:
        time.sleep(60)


def hold_the_interpreter(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Stay in one C call that never releases the interpreter lock."""
    channel.send("progress", stage="train", step=1, total_steps=2)
    time.sleep(0.1)
    return {"sum": sum(range(10**15))}


def talk_nonsense(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Write what is no frame to the event pipe."""
    os.write(channel._events_fd, b"Traceback (most recent call last):\n")
    return hang(task, channel)


def write_artifact(directory: Path, base_digest: str) -> Path:
    """Write the smallest adapter that passes all checks."""
    from core import artifacts  # here, so that the other children start quickly

    directory.mkdir()
    shapes = {"lora_A": [1, 2], "lora_B": [2, 1]}
    header = {
        f"base_model.model.{MODULE}.{side}.weight": {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [8 * index, 8 * index + 8],
        }
        for index, (side, shape) in enumerate(shapes.items())
    }
    encoded = json.dumps(header).encode()
    (directory / artifacts.WEIGHTS_FILE).write_bytes(
        len(encoded).to_bytes(8, "little") + encoded + bytes(16)
    )
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": [MODULE]}
    (directory / artifacts.CONFIG_FILE).write_text(json.dumps(config))
    (directory / artifacts.TOKENIZER_FILE).write_text("{}")
    artifacts.build_manifest(
        directory,
        base_digest=base_digest,
        golden_token_ids=[1, 2],
        linear_modules={MODULE: [2, 2]},
    )
    return directory


if __name__ == "__main__":
    serve(globals()[sys.argv[1]])
