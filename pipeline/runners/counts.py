"""What is counted while a run goes on."""

from dataclasses import dataclass


@dataclass
class Counts:
    """Progress of a run, over all workers."""

    documents: int = 0
    tokens: int = 0  # of finished parts
    scored: int = 0  # tokens of unfinished parts that have a score
    parts: int = 0
    bad: int = 0
    bytes: int = 0  # corpus bytes of finished parts
    planned_parts: int = 0  # parts of compressed files, as they are cut
    planned_bytes: int = 0
    restarts: int = 0  # of engines that died


@dataclass(frozen=True)
class PartCost:
    """What a finished part took."""

    bytes: int  # of the corpus
    documents: int
    tokens: int
    seconds: dict[str, float]  # stage -> seconds of work
