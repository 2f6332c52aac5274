"""Engines that work, die and are started again: real processes, real signals."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from lacy.labelers.llm import engines, load
from lacy.labelers.llm.engines import Died, Engines, EngineScorer, EngineSpec
from lacy.schemas.errors import ModelError

FACTORY = f"{__name__}:Doubler"


class Doubler:
    """A model for these tests: doubles numbers, and does to itself what real ones have done to them."""

    path = "doubled"

    def __init__(self, folder: str, fail: str = "") -> None:
        if fail:
            raise ModelError(fail)
        self.folder = Path(folder)

    def double(self, items: list[object], on_tokens: Callable[[int], None] | None = None, delay: float = 0) -> list:
        with open(self.folder / "calls", "a") as file:
            file.write(f"{items}\n")
        if "poison" in items:
            os.kill(os.getpid(), signal.SIGKILL)
        if "memory" in items:
            raise MemoryError("no room")
        once = self.folder / "once"
        if "once" in items and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(delay)
        if on_tokens:
            on_tokens(len(items))
        return [item if isinstance(item, str) else 2 * item for item in items]  # type: ignore[operator]

    def pid(self, items: list[object]) -> list[int]:
        return [os.getpid()] * len(items)

    def gpus(self, items: list[object], delay: float) -> list[str]:
        time.sleep(delay)
        return [os.environ["CUDA_VISIBLE_DEVICES"]] * len(items)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield (made := engines.run_folder(f"test-{os.getpid()}-{time.monotonic_ns()}"))
    engines.stop(made)


def spec(tmp_path: Path, **more: object) -> EngineSpec:
    fields = {"role": "reference", "factory": FACTORY, "arguments": {"folder": str(tmp_path)}} | more
    return EngineSpec(**fields)  # type: ignore[arg-type]


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def test_results_come_in_order_with_progress(tmp_path: Path, folder: Path) -> None:
    pool = Engines(spec(tmp_path), folder)
    told: list[int] = []
    assert pool.run("double", [1, 2, 3], on_tokens=told.append) == [2, 4, 6]
    assert (told, pool.greeting["path"]) == ([3], "doubled")
    assert pool.run("double", []) == []
    assert pool.seconds > 0


def test_workers_share_an_engine_that_outlives_them(tmp_path: Path, folder: Path) -> None:
    one, two = Engines(spec(tmp_path), folder), Engines(spec(tmp_path), folder)
    assert one.run("pid", [0]) == two.run("pid", [0])
    pid = one.run("pid", [0])[0]
    one.close()
    assert two.run("pid", [0]) == [pid] == one.run("pid", [0])
    engines.stop(folder)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert not folder.exists()


def test_several_engines_work_at_once_on_gpus_of_their_own(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pool = Engines(spec(tmp_path, count=2, gpus=2), folder)
    seen: list[str] = []
    threads = [threading.Thread(target=lambda: seen.extend(pool.run("gpus", [0], delay=1.5))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == ["0,1", "2,3"]


def test_a_killed_engine_is_started_again_and_the_slice_stays_whole(tmp_path: Path, folder: Path) -> None:
    restarts: list[int] = []
    pool = Engines(spec(tmp_path), folder, on_restart=lambda: restarts.append(1))
    assert pool.run("double", [1, "once", 3, 4]) == [2, "once", 6, 8]
    assert calls(tmp_path) == ["[1, 'once', 3, 4]"] * 2
    assert restarts == [1]


def test_killed_from_outside_in_mid_work(tmp_path: Path, folder: Path) -> None:
    pool = Engines(spec(tmp_path), folder)
    pid = pool.run("pid", [0])[0]
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    assert pool.run("double", [1, 2], delay=1.5) == [2, 4]
    assert pool.run("pid", [0]) != [pid]


def test_what_kills_an_engine_alone_is_given_up_and_spares_the_others(tmp_path: Path, folder: Path) -> None:
    pool = Engines(spec(tmp_path), folder)
    results = pool.run("double", [1, 2, 3, "poison", 5])
    assert isinstance(results[3], Died)
    assert results[3].reason == "the reference engine dies of it (it was killed)"
    assert results[:3] + results[4:] == [2, 4, 6, 10]
    assert calls(tmp_path).count("['poison']") == 2


def test_an_exception_is_a_death_with_a_reason(tmp_path: Path, folder: Path) -> None:
    pool = Engines(spec(tmp_path), folder)
    results = pool.run("double", ["memory", 2])
    assert results == [Died("the reference engine dies of it (MemoryError: no room)"), 4]


def test_a_request_that_was_waiting_is_not_blamed(tmp_path: Path, folder: Path) -> None:
    one, two = Engines(spec(tmp_path), folder), Engines(spec(tmp_path), folder)
    pid = one.run("pid", [0])[0]
    results: list[object] = []
    first = threading.Thread(target=lambda: results.append(one.run("double", [1], delay=1.5)))
    second = threading.Thread(target=lambda: results.append(two.run("double", [2, 3])))
    first.start()
    time.sleep(0.5)
    second.start()
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    first.join()
    second.join()
    assert sorted(map(str, results)) == ["[2]", "[4, 6]"]
    assert calls(tmp_path).count("[2, 3]") == 1  # it never began on the engine that died


def test_an_engine_that_dies_of_everything_ends_the_run(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "MAX_DEATHS", 3)
    pool = Engines(spec(tmp_path), folder)
    with pytest.raises(ModelError, match=r"the reference engine died 4 times in a row: MemoryError: no room"):
        pool.run("double", ["memory"] * 4)


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path, folder: Path) -> None:
    arguments = {"folder": str(tmp_path), "fail": "no such model"}
    with pytest.raises(ModelError, match=r"^the reference engine does not start: no such model$"):
        Engines(spec(tmp_path, arguments=arguments), folder)


def test_an_engine_ends_with_its_launcher(tmp_path: Path, folder: Path) -> None:
    import subprocess

    launcher = subprocess.Popen(["sleep", "60"])
    pid = Engines(spec(tmp_path), folder, launcher=launcher.pid).run("pid", [0])[0]
    launcher.kill()
    launcher.wait()
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_scorer_on_an_engine_is_the_scorer(folder: Path, small_model: Path) -> None:
    arguments = {"backend": "transformers", "model": str(small_model), "device": "cpu"}
    direct = load.scorer(**arguments)  # type: ignore[arg-type]
    pool = Engines(EngineSpec("reference", "lacy.labelers.llm.load:scorer", arguments), folder)
    scorer = EngineScorer(pool)
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 900, size).astype(np.int32) for size in (300, 1, 0, 40)]
    documents.append(np.array([5, 10**6], np.int32))
    for ours, theirs in zip(scorer.score(documents), direct.score(documents), strict=True):
        np.testing.assert_array_equal(ours.nll, theirs.nll)
        assert ours.error == theirs.error
    assert scorer.path == "transformers"
