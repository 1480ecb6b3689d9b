"""Finds the commands in the fenced blocks of Markdown files."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# A block without one of these, as the first word of a line, holds no commands.
_PROGRAMS = "cd curl docker fastserve git kubectl make pip python ray serve source uv vllm"
PROGRAMS = frozenset(_PROGRAMS.split())
TEXT = frozenset(("text", "python", "json", "yaml", "toml", "markdown"))
SHELL = frozenset(("", "sh", "bash", "shell", "console"))
# Words of a heading, or of the paragraph before a block, that say which hardware it needs.
_HARDWARE = re.compile(r"\bGPUs?\b|\bKubernetes cluster\b|\bTPUs?\b")


class UnlabelledBlockError(ValueError):
    """A block that may or may not hold commands; the message says how to tell."""


@dataclass(frozen=True)
class Command:
    """A command of a document.

    Attributes:
        place: file and line.
        words: as the shell splits it, assignments and the comment left out.
        needs: the words before it that name the hardware it needs; empty: none.
    """

    place: str
    words: tuple[str, ...]
    needs: str

    @property
    def program(self) -> str:
        """The name of the program."""
        return Path(self.words[0]).name

    def __str__(self) -> str:
        return f"{self.place}: {' '.join(self.words)}"


def commands(path: Path) -> Iterator[Command]:
    """The commands of a file, in order.

    Raises:
        UnlabelledBlockError: a block without a language holds no known program, or other lines
            between commands.
    """
    for number, language, lines, before in _blocks(path.read_text(encoding="utf-8")):
        if language in TEXT:
            continue
        place = f"{path.name}:{number}"
        if language not in SHELL:
            raise UnlabelledBlockError(f"{place}: what is a block of {language!r}?")
        hardware = _HARDWARE.search(before)
        for words in _joined(lines):
            command = Command(place, words, hardware.group() if hardware else "")
            if command.program not in PROGRAMS:
                raise UnlabelledBlockError(
                    f"{command}: {command.program!r} is no known program; a block that holds no "
                    "commands begins with ```text"
                )
            yield command


def _blocks(text: str) -> Iterator[tuple[int, str, list[str], str]]:
    """(line, language, lines, heading and last paragraph) of each fenced block.

    What was said of one block does not hold for the next one.
    """
    heading, paragraph, block, language, start = "", [], None, "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            if block is None:
                block, language, start = [], line[3:].strip(), number
            else:
                yield start, language, block, f"{heading}\n{' '.join(paragraph)}"
                block, paragraph = None, []
        elif block is not None:
            block.append(line)
        elif line.startswith("#"):
            heading, paragraph = line, []
        elif line.strip():
            # A blank line between a paragraph and its block does not part them.
            paragraph = [*paragraph, line] if paragraph and paragraph[-1] else [line]
        elif paragraph and paragraph[-1]:
            paragraph = [*paragraph, ""]


def _joined(lines: list[str]) -> Iterator[tuple[str, ...]]:
    """The words of each command: continued lines joined, comments and assignments left out."""
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield tuple(words)
