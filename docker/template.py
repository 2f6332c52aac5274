"""What a Dataflow Flex Template runs: `lacy label --on dataflow` with the template's parameters (docs/docker.md).

The launcher gives them as --name=value, and Dataflow's own options with them. What template.json names is an option of
`lacy label`; the rest goes behind its --.
"""

import json
import os
import sys
from pathlib import Path

SHARED = ("project", "region", "temp_location")  # Dataflow's, which `lacy label --on dataflow` reads too


def command(given: list[str]) -> list[str]:
    metadata = json.loads(Path(__file__).with_suffix(".json").read_text())
    kinds = {parameter["name"]: parameter["paramType"] for parameter in metadata["parameters"]}
    options, theirs = ["--on=dataflow", "--no-wait"], []
    corpus: list[str] = []
    for argument in given:
        name, _, value = argument.removeprefix("--").partition("=")
        option = f"--{name.replace('_', '-')}"
        if name == "corpus":
            corpus += value.split(",")
        elif kinds.get(name) == "BOOLEAN":
            options += [option] if value == "true" else []
        elif name in kinds:
            options.append(f"{option}={value}")
        else:
            theirs.append(argument)
            options += [f"{option}={value}"] if name in SHARED else []
    return ["label", *corpus, *options, "--", *theirs]


if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "lacy", *command(sys.argv[1:])])
