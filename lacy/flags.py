"""Flags of the command line, generated from pydantic option models.

    @command(app, extra="train", examples=["lacy train labelled --out run"])
    def train(config: Given[TrainConfig], resume: bool = False): ...

A parameter of a command whose type is an option model stands for a flag per field: the field gives its name, type,
bounds and default, and its description is the help. The command gets the model, built from the flags that the user
typed; with `Flags(Model)` in an annotation it gets only these flags, as a dict.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lacy import running
from lacy.running import known_errors

_TYPED = "COMMANDLINE"  # click's name for what stands on the command line


@dataclass(frozen=True)
class Flags:
    """Marks a dict parameter that holds those fields of a model that the user typed.

    Its required fields become optional flags.

    merged  the options are merged with those of a file, so a bool gets both its forms
    """

    model: type[BaseModel]
    leave_out: frozenset[str] = frozenset()
    merged: bool = False


def command(
    app: typer.Typer, name: str | None = None, *, extra: str = "", examples: Iterable[str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command.

    extra     the extra of the package that the command needs: named when an import fails
    examples  command lines for the end of --help
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        label = name or function.__name__
        group = f"{app.info.name} " if isinstance(app.info.name, str) else ""
        app.command(name, epilog="\n\n".join(["Examples:", *examples]))(_expanded(function, f"{group}{label}", extra))
        return function

    return register


def _expanded(function: Callable[..., None], label: str, extra: str) -> Callable[..., None]:
    """The function with a flag for each field of its option models, and with --debug."""
    plain: list[inspect.Parameter] = []
    models: dict[str, tuple[type[BaseModel] | Flags, dict[str, str]]] = {}  # parameter -> model, flag -> field
    hints = inspect.signature(function, eval_str=True).parameters
    taken = {name for name, parameter in hints.items() if _model(parameter.annotation) is None}
    for name, parameter in hints.items():
        model = _model(parameter.annotation)
        if model is None:
            plain.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        fields = {}
        for field, flag in _flags(model):
            if flag.name not in taken:
                taken.add(flag.name)
                plain.append(flag)
                fields[flag.name] = field
        models[name] = model, fields
    context = inspect.Parameter("_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' logs.")]
    plain.append(inspect.Parameter("_debug", inspect.Parameter.KEYWORD_ONLY, annotation=debug, default=False))
    for parameter in plain:
        if get_args(parameter.annotation)[:1] == (bool,):  # takes no value: --help shows no type
            parameter.annotation.__metadata__[0].metavar = ""

    @functools.wraps(function)
    def run(_context: typer.Context, _debug: bool, **values: Any) -> None:
        running.debug = running.debug or _debug
        with known_errors(label, extra):
            typed = {key for key in values if getattr(_context.get_parameter_source(key), "name", "") == _TYPED}
            arguments = {key: value for key, value in values.items() if key in hints}
            for name, (model, fields) in models.items():
                given = {field: values[flag] for flag, field in fields.items() if flag in typed}
                arguments[name] = given if isinstance(model, Flags) else model(**given)
            function(**arguments)

    run.__signature__ = inspect.Signature([context, *plain])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [context, *plain]}
    return run


def _model(annotation: Any) -> type[BaseModel] | Flags | None:
    marks = getattr(annotation, "__metadata__", ())
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((mark for mark in marks if isinstance(mark, Flags)), None)


def _flags(model: type[BaseModel] | Flags) -> Iterator[tuple[str, inspect.Parameter]]:
    """Name of each field that has a description, and the parameter that typer makes a flag of."""
    marked = model if isinstance(model, Flags) else None
    fields = marked.model.model_fields if marked else model.model_fields  # type: ignore[union-attr]
    panel = None
    for name, field in fields.items():
        extra: dict[str, Any] = dict(field.json_schema_extra) if isinstance(field.json_schema_extra, dict) else {}
        panel = extra.get("panel", panel)
        if field.description is None or (marked and name in marked.leave_out):
            continue
        kind, optional = _type(field)
        default = field.default
        if field.is_required():
            default = None if marked else inspect.Parameter.empty
        elif "unset" in extra or default == [] or default == {}:
            default = None
        if default is None and not optional:
            kind = kind | None
        flag = str(extra.get("flag", "--" + name.replace("_", "-")))
        info: dict[str, Any] = {"help": field.description, "metavar": extra.get("metavar")}
        info |= {"show_default": extra["unset"]} if "unset" in extra else {}
        info |= {"show_default": False} if kind is bool and default and not (marked and marked.merged) else {}
        info |= {"min": _bound(field, "ge"), "max": _bound(field, "le")}
        made: Any
        if extra.get("argument"):
            made = typer.Argument(**info)
        else:
            made = typer.Option(
                *_declarations(flag, kind, default, bool(marked and marked.merged)), rich_help_panel=panel, **info
            )
        name_of_flag = flag.removeprefix("--").replace("-", "_")
        yield (
            name,
            inspect.Parameter(
                name_of_flag, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made]
            ),
        )


def _declarations(flag: str, kind: Any, default: Any, merged: bool) -> list[str]:
    """A bool has only the form that changes its default; merged with a file, both."""
    if kind is not bool:
        return [flag]
    negative = "--no-" + flag.removeprefix("--")
    return [f"{flag}/{negative}"] if merged else [f" /{negative}"] if default else [flag]


def _type(field: FieldInfo) -> tuple[Any, bool]:
    """The type of a field's flag, and whether it has None as a value already."""
    kind: Any = field.annotation
    optional = False
    if get_origin(kind) in (Union, types.UnionType):
        members = [member for member in get_args(kind) if member is not type(None)]
        optional, kind = len(members) < len(get_args(kind)), members[0]
    if get_origin(kind) is dict:
        kind = list[str]  # KEY=VALUE, parsed by the model
    if kind is Path and any(type(mark).__name__ == "PlainValidator" for mark in field.metadata):
        kind = str  # a folder or a URL
    if get_origin(kind) not in (list, Literal, None):
        raise TypeError(f"no flag can be made of {field}")
    return (kind | None if optional else kind), optional


def _bound(field: FieldInfo, name: str) -> Any:
    return next((getattr(mark, name) for mark in field.metadata if hasattr(mark, name)), None)
