"""Plain data, as JSON holds it -> a dataclass of ours, checked field by field by pydantic."""

import functools
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

T = TypeVar("T")

Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]  # as arrays of integers hold it
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Size = Annotated[int, Field(strict=True, ge=1)]
LONGEST = 200  # characters of a reason
EXACT = ConfigDict(extra="forbid")  # the `__pydantic_config__` of a dataclass without other fields


def parsed(kind: Callable[..., T], data: Any, called: str) -> T:
    """Return a dataclass, or another type, whose fields plain data has.

    Args:
        kind: Its annotations say what each field may be; `EXACT` refuses fields that it lacks.
        data: Tables, lists, numbers and texts.
        called: What it should be, for the message: `a model record`.

    Raises:
        ValueError: If a field is missing or is not what it may be; names the first.
    """
    try:
        found: T = _adapter(kind).validate_python(data)
        return found
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        said = str(first.get("ctx", {}).get("error", first["msg"]))
        reason = f"{place}: {said}" if place else said
        raise ValueError(f"not {called}: {reason}"[:LONGEST]) from error


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
