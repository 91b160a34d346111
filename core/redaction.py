"""Secrets out of texts that others will read.

Owns what counts as a secret: the values of settings and of variables that are named like one, and
whatever looks like a credential of a known kind. It cannot know others; a program should not print
those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from core.config import Settings

REDACTED = "[redacted]"

_SECRET_NAME = re.compile(
    r"(?:^|_)(?:SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS|(?:API|ACCESS|PRIVATE)_?KEY)(?:_|$)",
    re.IGNORECASE,
)
# Shorter values, such as `1` or `false`, are parts of innocent words.
_SHORTEST = 8

# A pattern's first group is kept.
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        # The password in a URL.
        r"(\b[a-z][a-z0-9+.-]{1,30}://[^\s:/@]{0,256}:)[^\s@/]{1,1024}(?=@)",
        r"(?i)(\bauthorization\W{1,4}(?:bearer\s|basic\s)?)[^\s\"',]+",
        r"(?i)(\bbearer\s)[A-Za-z0-9._~+/=-]{8,}",
        r"(?i)(\b(?:[a-z]+[_-])*(?:password|passwd|secret|api[_-]?key|access[_-]?key|auth[_-]?token"
        r"|access[_-]?token|session[_-]?token)\"?'?\s?[:=]\s?[\"']?)[^\s\"',;}&]+",
        # Signed addresses of object stores.
        r"(?i)(\bX-Amz-(?:Signature|Credential|Security-Token)=)[^\s&\"']+",
        r"()\btsk_[A-Za-z0-9_-]{43}",
        r"()\bhf_[A-Za-z0-9]{16,}",
        r"()\bsk-[A-Za-z0-9_-]{16,}",
        r"()\bgh[oprsu]_[A-Za-z0-9]{20,}",
        r"()\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    )
)


class Redactor:
    """Replaces secrets in texts.

    Args:
        known: Values that are secret.
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        # The longest first: one may be part of another.
        values = sorted({value for value in known if len(value) >= _SHORTEST}, key=len)[::-1]
        self._known = re.compile("|".join(map(re.escape, values))) if values else None

    @classmethod
    def from_settings(cls, settings: Settings, environment: Mapping[str, str]) -> Redactor:
        """Return one that knows the secrets of a process: its settings' and its variables'."""
        known = [value for name, value in environment.items() if _SECRET_NAME.search(name)]
        for name in type(settings).model_fields:
            value = getattr(settings, name)
            if isinstance(value, SecretStr):
                known.append(value.get_secret_value())
            elif isinstance(value, str) and "://" in value:
                known += _passwords(value)
        return cls(known)

    def __call__(self, text: str) -> str:
        """Return a text with its secrets replaced."""
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        for pattern in _PATTERNS:
            text = pattern.sub(rf"\1{REDACTED}", text)
        return text


def _passwords(url: str) -> list[str]:
    try:
        password = urlsplit(url).password
    except ValueError:
        return []
    return [password, unquote(password)] if password else []
