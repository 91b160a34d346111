from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from core import artifacts
from core.errors import Conflict, InvalidInput, TooLarge
from core.imports import prepare_import, unpack_archive
from core.storage import LocalStore
from tests.support.factories import (
    BASE_DIGEST,
    TEMPLATE,
    TOKENIZER,
    describe_base,
    make_adapter_directory,
    make_artifact,
    make_base_directory,
)

Member = tuple[str, bytes] | tarfile.TarInfo


def _archive(*members: Member, format: int = tarfile.PAX_FORMAT) -> io.BytesIO:  # noqa: A002
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    buffer.seek(0)
    return buffer


def _directory_archive(directory: Path, prefix: str = "") -> io.BytesIO:
    return _archive(*((prefix + path.name, path.read_bytes()) for path in directory.iterdir()))


def _special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def _pax_bomb() -> io.BytesIO:
    """An extended header that claims to hold a gigabyte, and starts to."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 2**30
    return io.BytesIO(gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + b"0" * 2**20))


def _header_chain() -> io.BytesIO:
    """Two thousand extended headers, each of which describes the next."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 0
    return io.BytesIO(gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) * 2000))


def _slow_headers() -> io.BytesIO:
    """As many headers as are read, each as long as allowed and as slow to parse as can be."""
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 1024
    member = tarfile.TarInfo("readme.md").tobuf(tarfile.USTAR_FORMAT)
    slow = header.tobuf(tarfile.USTAR_FORMAT) + b"0" * 1024 + member
    return io.BytesIO(gzip.compress(slow * 201))


def _sparse_bomb() -> io.BytesIO:
    """A member of a few bytes that stands for a terabyte of zeros."""
    info = tarfile.TarInfo("adapter_config.json")
    info.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,1",
        "GNU.sparse.size": str(2**40),
    }
    info.size = 1
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"x"))
    return io.BytesIO(buffer.getvalue())


@pytest.mark.parametrize("prefix", ["", "./", "adapter/", "./adapter-v1/"])
def test_an_adapter_is_unpacked_from_the_top_or_from_one_folder(
    tmp_path: Path, prefix: str
) -> None:
    source = make_adapter_directory(tmp_path / "source")
    (source / "README.md").write_text("hi")
    (source / "special_tokens_map.json").write_text("{}")
    target = tmp_path / "target"
    target.mkdir()
    unpack_archive(_directory_archive(source, prefix), target, 10**6)
    names = {path.name for path in target.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    for name in names:
        assert (target / name).read_bytes() == (source / name).read_bytes()


ATTACKS: dict[str, tuple[Callable[[], io.BytesIO], str]] = {
    "parent": (lambda: _archive(("../adapter_config.json", b"{}")), "unsafe_archive"),
    "inner parent": (lambda: _archive(("a/../../adapter_config.json", b"")), "unsafe_archive"),
    "absolute": (lambda: _archive(("/tmp/adapter_config.json", b"{}")), "unsafe_archive"),
    "drive": (lambda: _archive(("C:adapter_config.json", b"{}")), "unsafe_archive"),
    "backslash": (lambda: _archive(("..\\adapter_config.json", b"{}")), "unsafe_archive"),
    "control": (lambda: _archive(("a\n/adapter_config.json", b"{}")), "unsafe_archive"),
    "symlink": (
        lambda: _archive(_special("adapter_config.json", tarfile.SYMTYPE, "/etc/passwd")),
        "unsafe_archive",
    ),
    "directory symlink": (
        lambda: _archive(_special("a", tarfile.SYMTYPE, "/tmp"), ("a/adapter_config.json", b"{}")),
        "unsafe_archive",
    ),
    "hard link": (
        lambda: _archive(_special("adapter_config.json", tarfile.LNKTYPE, "/etc/passwd")),
        "unsafe_archive",
    ),
    "device": (
        lambda: _archive(_special("adapter_config.json", tarfile.CHRTYPE)),
        "unsafe_archive",
    ),
    "fifo": (lambda: _archive(_special("adapter_config.json", tarfile.FIFOTYPE)), "unsafe_archive"),
    "twice": (
        lambda: _archive(("adapter_config.json", b"{}"), ("adapter_config.json", b"[]")),
        "unsafe_archive",
    ),
    "header bomb": (_pax_bomb, "unsafe_archive"),
    "header chain": (_header_chain, "invalid_archive"),
    "slow headers": (_slow_headers, "unsafe_archive"),
    "sparse bomb": (_sparse_bomb, "unsafe_archive"),
    "many members": (
        lambda: _archive(*((f"{i}.md", b"") for i in range(201))),
        "unsafe_archive",
    ),
    "pickle": (lambda: _archive(("adapter_model.bin", b"")), "pickle_refused"),
    "deep pickle": (lambda: _archive(("a/checkpoint-1/Optimizer.PT", b"")), "pickle_refused"),
    "foreign": (lambda: _archive(("run.py", b"")), "unexpected_file"),
    "two folders": (
        lambda: _archive(("a/adapter_config.json", b""), ("b/adapter_model.safetensors", b"")),
        "unexpected_file",
    ),
    "deep": (lambda: _archive(("a/b/adapter_config.json", b"")), "unexpected_file"),
    "no archive": (lambda: io.BytesIO(b"hello"), "invalid_archive"),
    "empty": (lambda: io.BytesIO(b""), "invalid_archive"),
    "no tar": (lambda: io.BytesIO(gzip.compress(b"x" * 1000)), "invalid_archive"),
    "cut off": (
        lambda: io.BytesIO(_archive(("adapter_config.json", bytes(range(256)) * 99)).read()[:-300]),
        "invalid_archive",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_bad_archive_is_refused_and_leaves_nothing_outside(tmp_path: Path, attack: str) -> None:
    make, code = ATTACKS[attack]
    target = tmp_path / "inside" / "target"
    target.mkdir(parents=True)
    with pytest.raises(InvalidInput) as caught:
        unpack_archive(make(), target, 10**6)
    assert caught.value.code == code
    assert [path.name for path in (tmp_path / "inside").iterdir()] == ["target"]
    assert all(path.is_file() and not path.is_symlink() for path in target.iterdir())


def test_sizes_are_limited_by_the_header_and_by_what_comes(tmp_path: Path) -> None:
    for number, archive in enumerate(
        (
            _archive(("adapter_config.json", b"0" * 2000)),
            _archive(("readme.md", b"0" * 20_000_000)),
        )
    ):
        target = tmp_path / str(number)
        target.mkdir()
        with pytest.raises(TooLarge):
            unpack_archive(archive, target, 1000)
        assert sum(path.stat().st_size for path in target.iterdir()) <= 1000


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.lists(
                st.sampled_from(
                    [
                        "..",
                        ".",
                        "",
                        "a",
                        "~",
                        "adapter_config.json",
                        "chat_template.jinja",
                        "\\",
                        "x.pt",
                    ]
                ),
                min_size=1,
                max_size=4,
            ).map("/".join),
            st.binary(max_size=8),
        ),
        max_size=4,
    )
)
def test_no_name_leaves_the_directory(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes]]
) -> None:
    root = tmp_path_factory.mktemp("names")
    target = root / "a" / "b"
    target.mkdir(parents=True)
    try:
        unpack_archive(_archive(*members), target, 10**6)
    except InvalidInput as error:
        assert error.code in {  # noqa: PT017
            "unsafe_archive",
            "unexpected_file",
            "pickle_refused",
            "invalid_archive",
        }
    written = {path for path in root.rglob("*") if path.is_file()}
    assert {path.parent for path in written} <= {target}
    assert {path.name for path in written} <= artifacts.ARTIFACT_FILES


def _prepare(directory: Path, base: Path) -> artifacts.Manifest:
    return prepare_import(
        directory, description=describe_base(), base_digest=BASE_DIGEST, base_path=base
    )


def test_an_import_takes_tokenizer_and_template_of_the_base(
    tmp_path: Path, store: LocalStore
) -> None:
    base = make_base_directory(tmp_path / "base")
    directory = make_adapter_directory(tmp_path / "adapter")
    (directory / "tokenizer_config.json").write_text('{"auto_map": "evil"}')
    manifest = _prepare(directory, base)
    assert (directory / "tokenizer_config.json").read_bytes() == (
        base / "tokenizer_config.json"
    ).read_bytes()
    assert (directory / "chat_template.jinja").read_bytes() == TEMPLATE.encode()
    assert manifest.base_digest == BASE_DIGEST
    assert manifest.template_sha256 == artifacts.sha256_text(TEMPLATE)
    assert store.publish_adapter(directory).digest == manifest.digest


def test_our_own_download_imports_as_the_same_adapter(tmp_path: Path) -> None:
    base = make_base_directory(tmp_path / "base")
    original = make_artifact(tmp_path / "own")
    target = tmp_path / "target"
    target.mkdir()
    unpack_archive(_directory_archive(tmp_path / "own", "bot-v1/"), target, 10**6)
    assert _prepare(target, base).digest == original.digest


def test_an_adapter_of_a_base_without_template_gets_the_one_that_serves_it(
    tmp_path: Path,
) -> None:
    fallback = "{{ 'ChatML' }}"
    known = describe_base() | {"template_sha256": None, "fallback_template": fallback}
    base = make_base_directory(tmp_path / "base")
    (base / "chat_template.jinja").unlink()

    def complete(name: str, template: str | None) -> artifacts.Manifest:
        directory = make_adapter_directory(tmp_path / name)
        if template is not None:
            (directory / "chat_template.jinja").write_text(template)
        return prepare_import(directory, description=known, base_digest=BASE_DIGEST, base_path=base)

    assert complete("without", None).template_sha256 == artifacts.sha256_text(fallback)
    assert complete("ours", fallback).template_sha256 == artifacts.sha256_text(fallback)
    with pytest.raises(InvalidInput) as caught:
        complete("other", TEMPLATE)
    assert caught.value.code == "template_mismatch"


@pytest.mark.parametrize("where", ["jinja", "config", "named"])
def test_an_equal_template_is_accepted_wherever_it_stands(tmp_path: Path, where: str) -> None:
    base = make_base_directory(tmp_path / "base")
    directory = make_adapter_directory(tmp_path / "adapter")
    for path in (base, directory):
        (path / "chat_template.jinja").unlink(missing_ok=True)
        (path / "tokenizer.json").write_text(TOKENIZER)
        if where == "jinja":
            (path / "chat_template.jinja").write_text(TEMPLATE)
            continue
        template: object = TEMPLATE
        if where == "named":
            template = [
                {"name": "tool", "template": "x"},
                {"name": "default", "template": TEMPLATE},
            ]
        (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert _prepare(directory, base).template_sha256 == artifacts.sha256_text(TEMPLATE)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("tokenizer.json", "{}", "tokenizer_mismatch"),
        ("chat_template.jinja", "{{ other }}", "template_mismatch"),
        ("tokenizer_config.json", '{"chat_template": "{{ other }}"}', "template_mismatch"),
        ("tokenizer_config.json", "[" * 100_000, "invalid_adapter_file"),
        ("tokenizer_config.json", "[]", "invalid_adapter_file"),
        ("base_model.json", '{"digest": "0"}', "base_mismatch"),
        ("adapter_config.json", '{"peft_type": "IA3"}', "invalid_adapter_config"),
        ("adapter_model.safetensors", "", "invalid_adapter_weights"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(
    tmp_path: Path, name: str, content: str, code: str
) -> None:
    base = make_base_directory(tmp_path / "base")
    directory = make_adapter_directory(tmp_path / "adapter")
    (directory / name).write_text(content)
    with pytest.raises(InvalidInput) as caught:
        _prepare(directory, base)
    assert caught.value.code == code


def test_a_base_that_changed_after_it_was_added_takes_no_imports(tmp_path: Path) -> None:
    for number, name in enumerate(("tokenizer.json", "chat_template.jinja")):
        base = make_base_directory(tmp_path / f"base{number}")
        (base / name).write_text("{}")
        directory = make_adapter_directory(tmp_path / f"adapter{number}")
        with pytest.raises(Conflict) as caught:
            _prepare(directory, base)
        assert caught.value.code == "base_model_changed"
