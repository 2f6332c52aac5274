"""Entry point of a Dataflow Flex Template: `lacy label --on dataflow` with its parameters (docs/docker.md).

The launcher passes --name=value, for parameters of the template and for Dataflow's own options. Names in template.json
are options of `lacy label`; the others go after its --.
"""

import json
import os
import sys
from pathlib import Path

SHARED = ("project", "region", "temp_location")  # Dataflow's options that `lacy label --on dataflow` reads too


def command(given: list[str]) -> list[str]:
    metadata = json.loads(Path(__file__).with_suffix(".json").read_text())
    kinds = {parameter["name"]: parameter["paramType"] for parameter in metadata["parameters"]}
    options, beam = ["--on=dataflow", "--no-wait"], []
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
            beam.append(argument)
            options += [f"{option}={value}"] if name in SHARED else []
    return ["label", *corpus, *options, "--", *beam]


if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "lacy", *command(sys.argv[1:])])
