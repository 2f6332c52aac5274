"""Fields of the option models, from which the flags of the command and their help are generated (lacy/flags.py).

A field states once what both need: its type, default, bounds, and the description that --help prints.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def option(
    default: Any = ...,
    description: str = "",
    *,
    panel: str = "",
    metavar: str = "",
    unset: str = "",
    argument: bool = False,
    flag: str = "",
    **checks: Any,
) -> Any:
    """A pydantic field.

    panel     heading in --help of this field and of those after it, up to the next with a panel
    metavar   placeholder of the value in --help
    unset     what the default None, or an empty list, stands for
    flag      name on the command line, where it is not the field's
    argument  positional on the command line, not a flag
    checks    passed on to `pydantic.Field`: ge, le, min_length, ...
    """
    extra: dict[str, Any] = {"panel": panel, "metavar": metavar, "unset": unset, "argument": argument, "flag": flag}
    return Field(default, description=description, json_schema_extra={k: v for k, v in extra.items() if v}, **checks)


class Options(BaseModel):
    """Base of the option models. What validates a model is built when it is first used, which --help never does."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
