"""Base models, shared by all projects."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, exists, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from core.db.models import AdapterVersion, BaseModel, Job
from core.db.repositories.dialect import is_key
from core.errors import NotFound
from core.job_status import UNFINISHED


class BaseModelRepository:
    """The base models that the operator allows."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def get(self, name: str, *, lock: bool = False) -> BaseModel:
        """Return a base model.

        Args:
            lock: Let nobody else remove or use it until the transaction ends.

        Raises:
            NotFound: Code `unknown_base_model`.
        """
        model = self.find(name, lock=lock)
        if model is None:
            raise NotFound(
                f"no base model {name!r}",
                code="unknown_base_model",
                field="base_model",
                hint="GET /models lists the base models.",
            )
        return model

    def find(self, name: str, *, lock: bool = False, keep: bool = False) -> BaseModel | None:
        """Return a base model by name.

        Args:
            lock: Let nobody else remove or use it until the transaction ends.
            keep: Let nobody remove it until the transaction ends.
        """
        if not is_key(name):
            return None
        query = select(BaseModel).where(BaseModel.name == name)
        if lock or keep:
            query = query.with_for_update(read=not lock)
        return self._session.scalars(query).one_or_none()

    def find_by_digest(self, digest: str) -> BaseModel | None:
        """Return a base model with these weights."""
        query = select(BaseModel).where(BaseModel.digest == digest).order_by(BaseModel.name)
        return self._session.scalars(query.limit(1)).one_or_none()

    def add(self, model: BaseModel) -> bool:
        """Insert a base model; False when the name is taken."""
        try:
            with self._session.begin_nested():
                self._session.add(model)
        except IntegrityError:
            return False
        return True

    def delete(self, model: BaseModel) -> None:
        """Remove a base model's row."""
        self._session.execute(delete(BaseModel).where(BaseModel.name == model.name))

    def is_needed(self, model: BaseModel) -> bool:
        """Tell whether an unfinished job or an adapter version needs the base model."""
        job = exists().where(Job.base_model == model.name, Job.status.in_(UNFINISHED))
        version = exists().where(AdapterVersion.base_digest == model.digest)
        return bool(self._session.scalar(select(or_(job, version))))

    def list_paths(self) -> dict[str, str]:
        """Return name → path of all base models, without what is known of them."""
        return {
            row[0]: row[1] for row in self._session.execute(select(BaseModel.name, BaseModel.path))
        }

    def list(self) -> Sequence[BaseModel]:
        """Return all base models by name."""
        return self._session.scalars(select(BaseModel).order_by(BaseModel.name)).all()
