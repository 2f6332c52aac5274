"""The command `lacy` in forks of one process that has imported the libraries already."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LLAMA = "transformers.models.llama.modeling_llama"
CASCADE = (
    "lm_eval.evaluator", "sklearn.metrics", "lacy.cascade.evaluation.compare", "lacy.cascade.evaluation.leakage",
    "lacy.cascade.evaluation.nlu", "lacy.cascade.evaluation.run", "lacy.api", "lacy.tables", "lacy.trainer.train",
    "transformers.models.gpt2.modeling_gpt2", LLAMA,
)  # fmt: skip
LABEL = (
    "lacy.pipeline.label",
    "lacy.pipeline.decide",
    "lacy.pipeline.check",
    "lacy.labelers.grammar",
    "lacy.stats.compute",
    "lacy.api",
    "lacy.tables",
    LLAMA,
)
FORKS = """
import gc, importlib, json, os, signal, sys
from lacy.running import quiet
quiet(None)
for name in sys.argv[1:]:
    importlib.import_module(name)
from lacy.cli import main
gc.freeze()
for line in sys.stdin:
    arguments, files, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(200)
        os.chdir(folder)
        for number, (path, flags) in enumerate(zip(files, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT | os.O_TRUNC] * 2))):
            os.dup2(os.open(path, flags | os.O_NOCTTY), number)
        sys.stdin, sys.argv = open(0), ["lacy", *arguments]
        try:
            main()
        except SystemExit as end:  # skip the seconds that cleaning up takes
            sys.stdout.flush()
            os._exit(end.code or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Runs commands as `tests.conftest.run_lacy` does, without the seconds that imports take."""

    def __init__(self, folder: Path, imports: Sequence[str]):
        """imports: modules that the forks share. Output passes through files in `folder`."""
        self._files = folder / "stdout", folder / "stderr"
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets"), "COLUMNS": "100",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKS, *imports],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def __call__(
        self, *arguments: object, stdin: str = os.devnull, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`stdin` is a path."""
        assert self._process.stdin and self._process.stdout
        files = [stdin, *map(str, self._files)]
        asked = [[*map(str, arguments)], files, str(cwd or Path.cwd())]
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        out, error = (path.read_text() for path in self._files)
        return subprocess.CompletedProcess(list(arguments), code, out, error)

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()
