"""Who asks: from a request's credentials to the principal that the domain functions take.

Scopes: `read` looks, `train` changes data sets, jobs and adapters, `generate` asks for answers,
`admin` may do everything.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from core import auth
from core.errors import Unauthorized
from core.principal import LOCAL, Principal
from service.deps import Services, ServicesDep

Scope = Literal["read", "train", "generate", "admin"]

_bearer = HTTPBearer(
    auto_error=False,
    description="An API key `tsk_…`; not needed when the service runs without authentication.",
)


async def authenticate(
    services: ServicesDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Principal:
    """Return the caller.

    Raises:
        Unauthorized: Keys are required and no valid one came.
    """
    if services.settings.auth == "none":
        return LOCAL
    if credentials is None:
        raise Unauthorized(
            "this service needs an API key",
            hint="Send the header 'Authorization: Bearer tsk_…'.",
        )
    return await run_in_threadpool(_known_principal, services, credentials.credentials)


def _known_principal(services: Services, secret: str) -> Principal:
    with services.database.session() as session:
        return auth.authenticate(session, secret)


class _Requires:
    """A dependency that lets callers with one scope pass."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    async def __call__(self, principal: Annotated[Principal, Depends(authenticate)]) -> Principal:
        principal.require(self._scope)
        return principal


Reader = Annotated[Principal, Depends(_Requires("read"))]
Trainer = Annotated[Principal, Depends(_Requires("train"))]
Generator = Annotated[Principal, Depends(_Requires("generate"))]
Admin = Annotated[Principal, Depends(_Requires("admin"))]
