"""Records that cannot be labelled: each becomes a dead letter with a code, to count by, and a reason, to read."""

from dataclasses import dataclass
from enum import StrEnum

MAX_RECORD_BYTES = 64 << 20


class Code(StrEnum):
    """Why a record cannot be labelled. Codes are part of the data format: do not rename them."""

    NOT_JSON = "not_json"
    NOT_AN_OBJECT = "not_an_object"
    NOT_UTF8 = "not_utf8"
    TOO_LONG = "too_long"
    BROKEN_STREAM = "broken_stream"
    UNREADABLE = "unreadable"
    NO_TEXT = "no_text"
    EMPTY = "empty"
    TEXT_OF_ANOTHER_TYPE = "text_of_another_type"
    BAD_ID = "bad_id"
    BAD_PAGE = "bad_page"
    DUPLICATE = "duplicate"
    NOT_SCORED = "not_scored"
    KILLS_ENGINE = "kills_engine"


REASONS = {  # {} stands for the details, which never hold text of the record
    Code.NOT_JSON: "not JSON: {}",
    Code.NOT_AN_OBJECT: "the line is {}, not an object",
    Code.NOT_UTF8: "not valid {}",
    Code.TOO_LONG: f"longer than {MAX_RECORD_BYTES >> 20} MiB",
    Code.BROKEN_STREAM: "{} stream breaks off: {}",
    Code.UNREADABLE: "cannot read: {}",
    Code.NO_TEXT: "no text",
    Code.EMPTY: "text is empty",
    Code.TEXT_OF_ANOTHER_TYPE: "text is {}, not a string",
    Code.BAD_ID: "id is {}",
    Code.BAD_PAGE: "{}",
    Code.DUPLICATE: "the id occurs before in the corpus",
    Code.NOT_SCORED: "{}",
    Code.KILLS_ENGINE: "{}",
}


@dataclass(frozen=True)
class Fault:
    """What is wrong with a record."""

    code: Code
    reason: str


def fault(code: Code, *details: object) -> Fault:
    return Fault(code, REASONS[code].format(*details))


@dataclass(frozen=True)
class DeadLetter:
    """A line of deadletter/*.jsonl. `position`: byte of the record in the source, or its row in a Parquet file."""

    source: str
    position: int
    reason: str
    doc_id: str = ""
    code: str = ""


def dead_letter(source: str, position: int, fault: Fault, doc_id: str = "") -> DeadLetter:
    return DeadLetter(source, position, fault.reason, doc_id, fault.code.value)


def location(source: str, position: int) -> str:
    """The column `source` of a document."""
    return f"{source}:{position}"


def position_of(location: str) -> int:
    return int(location.rpartition(":")[2])
