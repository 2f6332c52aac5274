"""The prompt of `lacy sql DATASET`, which answers each statement or refuses it in one line."""

import os
from pathlib import Path
from typing import Final, TextIO

import duckdb
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.lexers import PygmentsLexer
from pygments.lexers.sql import SqlLexer

from lacy.schemas.errors import SqlError, UsageError
from lacy.schemas.views import NAMES
from lacy.stats.answers import FORMATS, answer, require_format
from lacy.stats.connect import statements

HELP: Final = f"""\
SQL over the views {", ".join(NAMES)}; a statement ends with a semicolon.
DESCRIBE tokens;   columns of a view            .format NAME   {", ".join(FORMATS[:-1])}
Tab                completes a name             .help          this
Ctrl-C             clears the line, or stops    .quit          or Ctrl-D
"""


def prompt(connection: duckdb.DuckDBPyConnection, form: str, out: TextIO) -> None:
    """Read statements from the terminal and write their answers to `out`, until Ctrl-D."""
    session: PromptSession[str] = PromptSession(
        history=_history(),
        completer=WordCompleter(_words(connection), ignore_case=True),
        complete_while_typing=False,
        multiline=True,
        key_bindings=_keys(),
        lexer=PygmentsLexer(SqlLexer),
        prompt_continuation="  ... ",
    )
    out.write(".help for help, Ctrl-D to quit\n")
    while True:
        running = False
        try:
            out.flush()
            text = session.prompt("sql > ").strip()
            running = True
            if text in (".quit", ".exit", "quit", "exit"):
                return
            if text.startswith("."):
                form = _command(text, form, out)
            else:
                for statement in statements(text):
                    answer(connection, statement, form, out, session=True)
        except EOFError:
            return
        except KeyboardInterrupt:  # at the prompt it clears the line
            if running:
                out.write("stopped\n")
        except (SqlError, UsageError) as error:
            out.write(f"{error}\n")


def history_file() -> Path:
    """The path of the history: in the user's state folder, by the XDG rules."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return folder / "lacy" / "sql_history"


def _history() -> History:
    """Open the history, readable for the user only, or keep it in memory where the file cannot be written."""
    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def _words(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Words for completion: views, their columns and the keywords of SQL."""
    named = connection.execute("SELECT DISTINCT column_name FROM duckdb_columns() WHERE NOT internal").fetchall()
    keywords = connection.execute("SELECT upper(keyword_name) FROM duckdb_keywords()").fetchall()
    return [*NAMES, *sorted(name for (name,) in named), *sorted(word for (word,) in keywords)]


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @Condition
    def ended() -> bool:
        text = get_app().current_buffer.text.strip()
        return not text or text.endswith(";") or text.startswith(".") or text in ("quit", "exit")

    @keys.add("enter", filter=ended)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    return keys


def _command(text: str, form: str, out: TextIO) -> str:
    """Run a dot command and return the output format."""
    name, *arguments = text.split()
    if name == ".help":
        out.write(HELP)
    elif name == ".format" and len(arguments) == 1:
        require_format(arguments[0])
        return arguments[0]
    else:
        raise UsageError(f"{text} is unknown: .help lists the commands")
    return form
