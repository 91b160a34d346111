"""Base models that the operator allows."""

from __future__ import annotations

from fastapi import APIRouter

from core import base_models
from core.reads import BaseModelRead, Page
from service.auth import Reader
from service.deps import ReadSession
from service.openapi import problems

router = APIRouter(prefix="/models", tags=["models"])


@router.get("", summary="List base models", responses=problems(401, 403))
def list_models(session: ReadSession, principal: Reader) -> Page[BaseModelRead]:
    """Return the base models that jobs may name and that answer without an adapter."""
    return Page(data=base_models.list_models(session))


@router.get("/{name}", summary="Read a base model", responses=problems(401, 403, 404))
def get_model(name: str, session: ReadSession, principal: Reader) -> BaseModelRead:
    """Return one base model."""
    return base_models.get(session, name)
