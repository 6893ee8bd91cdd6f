"""`finetune chat`: a conversation in the terminal, with a tuned model or with it and its base side by side."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from finetune_api.scalars import printable

from .gateway import ChatError, Gateway, Message

_FRAMES = 10
"""Times a second that two columns are drawn."""
_FRAME_LINES = 5
"""Lines around the answers in columns."""


@dataclass
class Talk:
    """With one model: what was said, and the answer that is coming."""

    model: str
    messages: list[Message] = field(default_factory=list)
    answer: str = ""
    failure: ChatError | None = None

    def listen(self, gateway: Gateway, question: str, options: dict[str, Any]) -> Iterator[str]:
        """The pieces of the answer, which then is a part of what was said. After a failure the question is not."""
        self.answer = ""
        asked = [*self.messages, {"role": "user", "content": question}]
        for piece in gateway.ask(self.model, asked, options):
            self.answer += printable(piece)
            yield printable(piece)
        self.messages = [*asked, {"role": "assistant", "content": self.answer}]


class Chat:
    """Asks all of its talks the same, and shows what they answer."""

    def __init__(self, gateway: Gateway, talks: list[Talk], options: dict[str, Any], console: Console) -> None:
        self.gateway, self.talks, self.options, self.console = gateway, talks, options, console

    def ask(self, question: str) -> None:
        """One question. Raises ChatError."""
        if len(self.talks) == 1:
            for piece in self.talks[0].listen(self.gateway, question, self.options):
                sys.stdout.write(piece)
                sys.stdout.flush()
            print()
            return
        threads = [threading.Thread(target=self._listen, args=(talk, question), daemon=True) for talk in self.talks]
        for thread in threads:
            thread.start()
        if self.console.is_terminal:
            with Live(console=self.console, refresh_per_second=_FRAMES, transient=True, get_renderable=lambda: self._columns(tail=True)):
                _joined(threads)
            self.console.print(self._columns())
        else:
            _joined(threads)
            for talk in self.talks:
                print(f"{talk.model}:\n{talk.answer}\n")
        for talk in self.talks:
            if talk.failure is not None:
                raise ChatError(f"{talk.model}: {talk.failure}", talk.failure.code, final=talk.failure.final)

    def _listen(self, talk: Talk, question: str) -> None:
        talk.failure = None
        try:
            for _ in talk.listen(self.gateway, question, self.options):
                pass
        except ChatError as failure:
            talk.failure = failure

    def _columns(self, *, tail: bool = False) -> Table:
        """Answers beside each other; of those that are being made, what fits on the screen: their ends."""
        found = Table(expand=True, header_style="bold")
        for talk in self.talks:
            found.add_column(talk.model, ratio=1, overflow="fold")
        answers = [Text(talk.answer) for talk in self.talks]
        if tail:
            width = max(1, (self.console.width - 1) // len(answers) - 3)
            lines = [answer.wrap(self.console, width) for answer in answers]
            answers = [Text("\n").join(some[-max(1, self.console.height - _FRAME_LINES) :]) for some in lines]
        found.add_row(*answers)
        return found

    def converse(self) -> int:
        """Questions of the terminal until it ends. Returns the exit code."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrow keys and history for input()
        self.console.print("Ctrl-D ends it; /new begins anew.", style="dim")
        begin = [list(talk.messages) for talk in self.talks]
        while True:
            try:
                question = input("> ").strip()
            except EOFError:
                print()
                return 0
            if question == "/new":
                for talk, messages in zip(self.talks, begin, strict=True):
                    talk.messages = list(messages)
            elif question:
                try:
                    self.ask(question)
                except ChatError as failure:
                    print(failure, file=sys.stderr)
                    if failure.final:
                        return failure.code
                except KeyboardInterrupt:  # of an answer that is too long: the talk goes on without it, and whoever still listens is left
                    self.talks = [Talk(talk.model, talk.messages) for talk in self.talks]
                    print()


def _joined(threads: list[threading.Thread]) -> None:
    for thread in threads:
        while thread.is_alive():  # in slices, so that Ctrl-C is heard
            thread.join(0.2)
