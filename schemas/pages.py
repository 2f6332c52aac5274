"""Templates of HTML pages: whatever fills them is escaped, and a name that is not given is an error."""

from collections.abc import Callable
from importlib import resources

import jinja2


def template(package: str, name: str, **filters: Callable[..., object]) -> jinja2.Template:
    """A template that lies in a package, with more filters for it to use."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters
    return environment.from_string(source(package, name))


def source(package: str, name: str) -> str:
    """The text of a file in a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")
