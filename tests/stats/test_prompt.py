"""The prompt in a real pseudo-terminal."""

import fcntl
import os
import pty
import re
import select
import signal
import stat
import struct
import subprocess
import termios
import time

import pytest

from tests.conftest import LACY
from tests.stats.conftest import document, write


def interruptible() -> None:
    """Make Ctrl-C on the terminal a signal, also where pytest runs in the background and ignores it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Screen:
    """A terminal with the command in it: what is typed, and the text that comes back."""

    def __init__(self, dataset, state):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        environment = os.environ | {"TERM": "xterm", "XDG_STATE_HOME": str(state), "PROMPT_TOOLKIT_NO_CPR": "1"}
        self._process = subprocess.Popen(
            [LACY, "sql", dataset],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=interruptible,
        )
        os.close(theirs)
        self._terminal, self._seen = ours, ""

    def type(self, keys):
        os.write(self._terminal, keys.encode())

    def until(self, pattern, seconds=30):
        """The text up to what matches, without the terminal's own sequences; the next call goes on from there."""
        deadline = time.monotonic() + seconds
        while True:
            plain = re.sub(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|[()][A-Z0-9]|[=>78])", "", self._seen)
            if found := re.search(pattern, plain):
                self._seen = plain[found.end() :]
                return plain[: found.end()]
            assert time.monotonic() < deadline, f"no {pattern!r} in {plain!r}"
            if select.select([self._terminal], [], [], 0.2)[0]:
                try:
                    self._seen += os.read(self._terminal, 65536).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"ended before {pattern!r}: {plain!r}") from None

    def end(self):
        code = self._process.wait(30)
        os.close(self._terminal)
        return code

    def kill(self):
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()


@pytest.fixture
def screen(tmp_path):
    dataset = write(tmp_path / "d", [document("a", "One goose, two geese.")])
    opened = []

    def start():
        opened.append(Screen(dataset, tmp_path / "state"))
        opened[-1].until("sql >")
        return opened[-1]

    yield start
    for one in opened:
        one.kill()


def test_a_session(screen, tmp_path):
    terminal = screen()
    terminal.type("SELECT count(*) + 1000 AS n\r")  # goes on until a semicolon
    terminal.until(r"\.\.\.")
    terminal.type("FROM documents;\r")
    terminal.until(r"1001\s[\s\S]*sql >")

    terminal.type("SELEC 1;\r")
    said = terminal.until(r"(?i)syntax error[^\n]*\n[\s\S]*sql >")
    assert "Traceback" not in said and "LINE 1" not in said
    terminal.type("DROP VIEW tokens;\r")
    terminal.until(r"DROP is refused[\s\S]*sql >")

    terminal.type("SELECT garb\x03")  # Ctrl-C clears the line
    terminal.until("sql >")
    terminal.type("CREATE TEMP TABLE t AS SELECT 42 AS b;\r")
    terminal.until("sql >")
    terminal.type(".format json\r")
    terminal.until("sql >")
    terminal.type("SELECT b + 1 AS c FROM t; SELECT 'x' AS d;\r")
    terminal.until(r'\{"c": 43\}\s+\{"d": "x"\}[\s\S]*sql >')
    terminal.type(".nothing\r")
    terminal.until(r"\.nothing is unknown: \.help[\s\S]*sql >")
    terminal.type(".format xml\r")
    terminal.until(r"xml is unknown[\s\S]*sql >")
    terminal.type(".help\r")
    terminal.until(r"documents, tokens, labels, parts[\s\S]*sql >")

    terminal.type("SELECT max(student_n\t")  # Tab
    terminal.until("student_nll")
    terminal.type(") AS m FROM documents;\r")
    terminal.until(r'\{"m": [0-9.]+\}[\s\S]*sql >')
    terminal.type("\x04")  # Ctrl-D
    assert terminal.end() == 0

    history = tmp_path / "state" / "lacy" / "sql_history"
    assert "FROM documents;" in history.read_text() and stat.S_IMODE(history.stat().st_mode) == 0o600
    again = screen()
    again.type("\x1b[A")  # up
    again.until(r"max\(student_nll\)")
    again.type("\x03.quit\r")
    assert again.end() == 0


def test_a_query_can_be_stopped(screen):
    terminal = screen()
    terminal.type("SELECT count(*) FROM range(100000000000) AS a WHERE hash(range) = 1;\r")
    time.sleep(2)
    terminal.type("\x03")
    terminal.until("stopped[\\s\\S]*sql >", seconds=20)
    terminal.type("SELECT 6 * 7 AS n;\r")
    terminal.until(r"\b42\b[\s\S]*sql >")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_the_history_is_not_needed(screen, tmp_path):
    (tmp_path / "state").write_text("no folder")
    terminal = screen()
    terminal.type("SELECT 6 * 7 AS n;\r")
    terminal.until(r"\b42\b[\s\S]*sql >")
    terminal.type("\x04")
    assert terminal.end() == 0
