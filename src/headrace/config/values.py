"""What single values of the configuration may be: ranges, spans of tokens, names."""

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


def _check_span(value: int | str) -> int | str:
    if isinstance(value, str):
        number = value.removesuffix("%")
        if number == value or not number.replace(".", "", 1).isdigit() or not 0 <= float(number) <= 100:
            raise ValueError("give a number of tokens or a share of recipe.tokens such as '60%'")
    elif value < 0:
        raise ValueError("a number of tokens cannot be negative")
    return value


TokenSpan = Annotated[int | str, AfterValidator(_check_span)]
"""A number of tokens, or a share of `recipe.tokens` written as '60%'."""

OfflineTask = Literal["humaneval_likelihood", "reasoning_gym"]
"""A task whose items need no network (`evaluation.items`)."""

ScaleFormat = Literal["fp32", "power_of_two"]
Schedules = Literal["auto", "1f1b", "interleaved_1f1b", "zb1p", "zb_v", "dualpipe", "dualpipe_v"]
