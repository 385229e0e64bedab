"""What is read back from a run's folder is what a run writes there: of the same keys, each of its kind."""

from __future__ import annotations

from dataclasses import MISSING, fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from secateur.deploy.timing.table import Latency
from secateur.engine.settings import Settings
from secateur.errors import UsageError
from secateur.graph.structure import Record, checked
from secateur.pruning.options import Options
from secateur.pruning.target import Target

if TYPE_CHECKING:
    from secateur.engine.state import State


class _Configuration(BaseModel):
    """``config.json``, as far as a run goes on by it."""

    model_config = ConfigDict(extra="ignore", strict=True)

    method: str
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    target: dict[str, Any] | None
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    options: dict[str, Any]
    settings: dict[str, Any]


def require_configuration(values: Any) -> None:
    """Refuse a configuration by which no run can go on.

    Raises:
        ValueError: If a key is missing, or its value can't be meant.
    """
    found = checked(_Configuration, values)
    try:
        if found.target is not None:
            checked(Target, found.target)
        Options.of(found.options)
        Settings.of(found.settings)
    except UsageError as error:
        raise ValueError(str(error)) from error


def plain_state(of: type[State], values: Any) -> dict[str, Any]:
    """Return the plain fields of a state, as it was stored.

    Raises:
        ValueError: If a field is unknown, or of another kind than the state's.
    """
    form = checked(_form(of), values)  # type: ignore[arg-type]
    plain: dict[str, Any] = {name: getattr(form, name) for name in form.model_fields_set}
    if plain.get("times") is not None:
        Latency.from_dict(plain["times"])
    return plain


@cache
def _form(of: type[State]) -> type[Record]:
    """Make the form of a state's plain fields; ``model``, ``accepted`` and ``training`` are none."""
    hints = get_type_hints(of)
    made: dict[str, Any] = {}
    for field in fields(of):
        if field.repr:
            default = field.default if field.default is not MISSING else Field(default_factory=field.default_factory)  # type: ignore[arg-type]
            made[field.name] = (hints[field.name], default)
    return create_model("StoredState", __base__=Record, **made)
