"""A chat: what was said, who answers, and the commands that begin with a slash."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lorakeet.disk import write_new
from lorakeet.errors import ConfigError, LorakeetError, nearest
from lorakeet.replying.speakers import BASE, Speaker
from lorakeet.serve.sampling import Sampling

HELP = """\
/adapter [NAME]   answer with this adapter, or with the one before
/base             answer with the base alone
/both             base and adapter side by side, with the same seed
/adapters [MIX]   list the adapters, or mix them: /adapters a*0.7+b*0.3
/system [TEXT]    set or remove the system prompt; the conversation begins anew
/reset            forget the conversation
/save FILE        write the conversation as a training row (JSON lines)
/help  /quit"""


@dataclass
class ChatSession:
    """One conversation. `said` are its messages without the system prompt; `choice` is who answers (speakers.Speaker)."""

    speaker: Speaker
    sampling: Sampling
    choice: str
    system: str | None = None
    both: bool = False
    said: list[dict[str, str]] = field(default_factory=list)
    ended: bool = False

    def __post_init__(self) -> None:
        self._adapter = self.choice if self.choice != BASE else next(iter(self.speaker.names), BASE)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages with the system prompt."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.said]

    def replies(self, text: str) -> dict[str, Iterator[str]]:
        """The reply to `text` by the current choice, piece by piece: two under `both`. `keep` puts one into the conversation."""
        conversation = [*self.messages, {"role": "user", "content": text}]
        choices = [BASE, self._adapter] if self.both else [self.choice]
        return {choice: self.speaker.reply(conversation, choice, self.sampling) for choice in choices}

    def keep(self, text: str, reply: str) -> None:
        """Adds a message and its reply to the conversation."""
        self.said += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]

    def command(self, line: str) -> str:
        """Carries out a line that begins with a slash; returns what to print. Raises LorakeetError and changes nothing then."""
        name, _, rest = line[1:].partition(" ")
        known: dict[str, Callable[[str], str]] = {
            "adapter": self._use, "adapters": self._mix, "base": self._base, "both": self._both, "help": lambda _: HELP,
            "quit": self._quit, "exit": self._quit, "reset": self._reset, "save": self._save, "system": self._set_system,
        }  # fmt: skip
        if name not in known:
            raise ConfigError(f"There is no command /{name}.{nearest(name, known)} /help lists them.")
        return known[name](rest.strip())

    def _use(self, name: str) -> str:
        wanted = name or self._adapter
        if wanted == BASE:
            raise ConfigError("There is no adapter here. Start the chat with --adapter NAME=PATH.")
        self.speaker.check(wanted)
        self.choice, self._adapter, self.both = wanted, wanted, False
        return f"{wanted} answers."

    def _mix(self, mix: str) -> str:
        if mix:
            return self._use(mix.replace(" ", ""))
        listed = [f"{'*' if name == self._adapter else ' '} {name}" for name in self.speaker.names]
        return "\n".join(listed) or "There are no adapters here."

    def _base(self, _: str) -> str:
        self.choice, self.both = BASE, False
        return "The base answers."

    def _both(self, _: str) -> str:
        if self._adapter == BASE:
            raise ConfigError("There is no adapter to compare the base with. Start the chat with --adapter NAME=PATH.")
        self.choice, self.both = self._adapter, True
        return f"base and {self._adapter} answer side by side. The conversation goes on from {self._adapter}'s replies."

    def _set_system(self, text: str) -> str:
        self.system, self.said = text or None, []
        return "The system prompt is set; the conversation begins anew." if text else "There is no system prompt."

    def _reset(self, _: str) -> str:
        self.said = []
        return "The conversation is forgotten."

    def _save(self, name: str) -> str:
        if not name:
            raise ConfigError("/save needs the name of a new file, such as /save chat.jsonl.")
        if not self.said:
            raise ConfigError("Nothing was said yet.")
        try:
            write_new(Path(name).expanduser(), (json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise LorakeetError(f"{name} cannot be written: {error.strerror or error}. Give the name of a new file.") from error
        return f"{len(self.said)} messages are in {name}."

    def _quit(self, _: str) -> str:
        self.ended = True
        return ""
