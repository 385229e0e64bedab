"""Files of unknown origin: whatever is malformed in one becomes one line of the error that its reader declares.

JSON is parsed by :func:`parsed`; what it holds is held against a form, a pydantic model or any other type, by
:func:`checked`, before anything is made of it.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

Form = TypeVar("Form")

Index = Annotated[int, Field(strict=True, ge=0, le=2**40)]
"""Place of something, or how many there are: a whole number that no index of a tensor exceeds."""


def _distinct(indices: list[int]) -> list[int]:
    if len(set(indices)) != len(indices):
        raise ValueError("an index stands twice")
    return indices


Indices = Annotated[list[Index], AfterValidator(_distinct)]
"""Places, each once, in any order."""


class Record(BaseModel):
    """A mapping of known keys, each of exactly its type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def parsed(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: If it is none, or nested deeper than Python's stack.
    """
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not text: byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} in line {error.lineno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


_adapter = lru_cache(maxsize=64)(TypeAdapter)


def checked(form: type[Form], value: Any) -> Form:
    """Return a value that has a form, converted as the form says.

    Args:
        form: A pydantic model, or any other type that pydantic knows.
        value: JSON data.

    Raises:
        ValueError: If it has another form; the message is one line, and names the first key at fault.
    """
    try:
        found: Form = _adapter(form).validate_python(value)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{key}: {finding(first)}" if key else finding(first)) from error
    return found


def finding(error: Mapping[str, Any]) -> str:
    """Put one of pydantic's findings in words: what was expected, and what was found."""
    if error["type"] == "missing":
        return "missing"
    if error["type"] == "extra_forbidden":
        return "no such key"
    if error["type"] == "value_error":
        return f"{error['ctx']['error']}"
    message = error["msg"].removeprefix("Input ")
    return f"{message[:1].lower()}{message[1:]}, found {shown(error['input'])}"


def shown(value: Any) -> str:
    """Return a value as Python writes it, shortened to a part of a line."""
    return " ".join(reprlib.repr(value).split())
