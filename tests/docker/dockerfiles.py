"""Dockerfiles as their instructions, and locks as their pins."""

import re
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Keyword and argument of each, in order."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def arguments(dockerfile: Path) -> dict[str, str]:
    """The defaults of ARG, the first of each name, with those before filled in."""
    found: dict[str, str] = {}
    for keyword, text in instructions(dockerfile):
        if keyword == "ARG":
            name, _, value = text.partition("=")
            found.setdefault(name, re.sub(r"\$\{(\w+)\}", lambda match: found[match[1]], value))
    return found


def stages(dockerfile: Path) -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, by its name, with those of the stages that it is built on before its own."""
    found: dict[str, list[tuple[str, str]]] = {}
    own: list[tuple[str, str]] = []
    for keyword, text in instructions(dockerfile):
        if keyword == "FROM":
            base, _, name = text.partition(" AS ")
            own = list(found.get(base, []))
            found[name or dockerfile.stem] = own
        else:
            own.append((keyword, text))
    return found


def pins(name: str) -> dict[str, str]:
    """Names and versions of what a lock installs into this Python on this machine."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    wanted = [pin for pin in pinned if pin.marker is None or pin.marker.evaluate()]
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in wanted}
