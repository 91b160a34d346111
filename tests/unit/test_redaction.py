from __future__ import annotations

from pathlib import Path

import pytest

from core.config import Settings
from core.redaction import Redactor


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("connecting to postgresql+psycopg://me:hunter2@db:5432/x", "hunter2"),
        ("redis://:hunter2@redis:6379/0 is away", "hunter2"),
        ("Authorization: Bearer abcdef.ghi-jkl", "abcdef.ghi-jkl"),
        ("{'authorization': 'Basic dXNlcjpwYXNz'}", "dXNlcjpwYXNz"),
        ("sent with bearer abcdefghijkl", "abcdefghijkl"),
        ("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI", "wJalrXUtnFEMI"),
        ("db_password: 'hunter2'", "hunter2"),
        ('{"api_key": "abc123"}', "abc123"),
        ("GET /o?X-Amz-Credential=me&X-Amz-Signature=0f9e8d HTTP/1.1", "0f9e8d"),
        (f"a key of ours is tsk_{'a' * 43}", "tsk_a"),
        ("no access for hf_abcdefghijklmnopqrst", "hf_abc"),
        ("AKIAIOSFODNN7EXAMPLE may not read", "AKIAIOSFODNN7EXAMPLE"),
    ],
)
def test_what_looks_like_a_credential_is_replaced(text: str, secret: str) -> None:
    shown = Redactor()(text)
    assert secret not in shown
    assert "[redacted]" in shown


@pytest.mark.parametrize(
    "text",
    [
        "Token indices sequence length is longer than 512 (900 > 512)",
        "pad_token: <pad>, eos_token=</s>, trained_tokens=812",
        "s3://bucket/adapters/0a1b and http://127.0.0.1:9000/readyz",
        '{"loss":1.92,"step":12,"event":"measured","attempt":2}',
        "secretary of the password committee",
    ],
)
def test_everything_else_stays(text: str) -> None:
    assert Redactor()(text) == text


def test_a_process_knows_its_own_secrets_wherever_they_appear(tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path,
        database_url="postgresql://me:p%40ssword-1@db/x",
        engine_secret="the engines secret",
    )
    environment = {
        "HF_TOKEN": "a token without form",
        "MY_SECRET_KEY": "key-of-mine",
        "MY_SECRET_KEY_2": "key-of-mine-and-more",
        "PLAIN": "plain value",
        "TOKENIZERS_PARALLELISM": "parallel",
        "SHORT_TOKEN": "true",
    }
    redact = Redactor.from_settings(settings, environment)
    said = "p%40ssword-1 p@ssword-1 the engines secret a token without form key-of-mine"
    assert redact(said).replace("[redacted]", "") == "    "
    assert redact("key-of-mine-and-more") == "[redacted]"
    assert redact("plain value, parallel, true") == "plain value, parallel, true"
