"""`lorakeet chat`: talk to a run, an adapter, a model or a server in the terminal; base and adapter side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lorakeet.config import RunConfig, read_run
from lorakeet.core.adapter import Adapter
from lorakeet.data.spec import DataSpec
from lorakeet.errors import ConfigError, LorakeetError, visible
from lorakeet.formats.detect import read_certified
from lorakeet.formats.files.gguf_file import GgufFile
from lorakeet.formats.identity import require_base
from lorakeet.memory.spec import MemorySpec
from lorakeet.models.spec import ModelSpec
from lorakeet.quant.spec import QuantSpec
from lorakeet.replying.session import ChatSession
from lorakeet.replying.speakers import BASE, LocalSpeaker, ServerSpeaker, Speaker
from lorakeet.replying.texts import open_texts
from lorakeet.runs.certified import base_identity
from lorakeet.runs.open_adapter import require_text_run
from lorakeet.runs.trained_prompt import prompt_settings, unlabelled
from lorakeet.serve.sampling import Sampling
from lorakeet.train.run import RunFolder
from lorakeet.verbs.early.chat_options import is_server, require_chattable, target_name
from lorakeet.verbs.early.serving_options import named_paths
from lorakeet.verbs.options import ChatOptions

_ADAPTERS = ("adapter_config.json", "adapters.safetensors")  # in the folder of an adapter
SLOTS = 2  # base and adapter side by side


@dataclass(frozen=True)
class Chatted:
    """The conversation at its end."""

    messages: tuple[dict[str, str], ...]

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {"messages": list(self.messages)}


def chat(options: ChatOptions, *, console: Console) -> Chatted:
    """Answers each line of standard input until it ends, or until /quit.

    In a terminal the lines are one conversation. In a pipe each line is a prompt of its own, and only replies are printed.
    Raises ConfigError and DataError for what cannot be opened, EnvironmentProblem for a server that does not answer.
    """
    require_chattable(options)
    sampling = Sampling(options.max_tokens, options.temperature, options.top_p, seed=options.seed)
    sampling.check()
    speaker, choice, system = _opened(options, console)
    session = ChatSession(speaker, sampling, choice, options.system or system)
    talk = _talk if sys.stdin.isatty() else _answer_lines
    try:
        talk(session, console)
    finally:
        if isinstance(speaker, LocalSpeaker):
            speaker.source.close()
    return Chatted(tuple(session.messages))


def _opened(options: ChatOptions, console: Console) -> tuple[Speaker, str, str | None]:
    """Who answers, the choice to begin with, and the system prompt of the run's training."""
    if is_server(options.target):
        server, choice = ServerSpeaker.at(options.target)
        return server, choice, None
    path, paths = Path(options.target).expanduser(), named_paths(options.adapter)
    model = options.target
    if _is_adapter(path):
        model, paths = "", {target_name(path, paths): path, **paths}
    adapters: dict[str, Adapter] = {}
    settings: dict[str, RunConfig] = {}
    data: dict[str, DataSpec] = {}
    for name, path in paths.items():
        run = RunFolder.around(path)
        if run is not None:
            settings[name] = read_run(run.config)
            require_text_run(path, settings[name])
            data[name] = prompt_settings(settings[name].data, run)
            data[name] = unlabelled(data[name]) if options.plain else data[name]
        adapters[name], _ = read_certified(path, uncertified=options.uncertified, say=console.print)
    spec = _base(options, model, adapters, settings)
    for name, path in paths.items():
        otherwise = options.quantize is not None or name not in settings
        require_base(path, partial(base_identity, spec), quantised=otherwise, uncertified=options.uncertified, say=console.print)
    memory = MemorySpec(budget=options.memory or "")
    say = partial(console.print, markup=False, soft_wrap=True)
    first_adapter = next(iter(adapters.values()), None)
    source = open_texts(spec, memory, first_adapter, context=options.context, slots=SLOTS, say=say)
    first = next(iter(adapters), BASE)
    if sys.stdin.isatty() and (template := data.get(first, DataSpec()).template) != DataSpec.template:
        said = f"Each line is put into the template of the training rows, {template!r}; --plain leaves it as it is."
        console.print(said, style="dim", markup=False, soft_wrap=True)
    return LocalSpeaker(source, adapters, data), first, data.get(first, DataSpec()).system


def _is_adapter(path: Path) -> bool:
    """True for a run, a folder with an adapter, and an adapter's file."""
    if path.is_dir():
        return RunFolder.around(path) is not None or any((path / name).is_file() for name in _ADAPTERS)
    if path.suffix.lower() == ".gguf":
        return path.is_file() and GgufFile(path).is_adapter
    return path.suffix.lower() == ".safetensors" and path.is_file()


def _base(options: ChatOptions, model: str, adapters: dict[str, Adapter], settings: dict[str, RunConfig]) -> ModelSpec:
    """The model to load: --base, the target itself, or the base of the first adapter, quantised as its run was."""
    named = options.base or model
    quantize = None if options.quantize is None else QuantSpec(method=options.quantize)
    for name, adapter in adapters.items():
        trained = settings[name].model if name in settings else ModelSpec(path=adapter.named_base)
        if not named and not trained.path:
            raise ConfigError(f"The adapter {name} does not name its base. Give it with --base.")
        spec = replace(trained, device="auto", path=named or trained.path)
        return spec if quantize is None else replace(spec, quantize=quantize)
    return ModelSpec(path=named, quantize=quantize or QuantSpec())


def _talk(session: ChatSession, console: Console) -> None:
    """A conversation in a terminal."""
    import readline  # noqa: F401 - gives input() a history and keys

    console.print("/help lists commands; Ctrl-C stops a reply, Ctrl-D ends the chat.", style="dim")
    while not session.ended:
        try:
            line = input("> ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            continue
        if line:
            _answer(session, line, console)


def _answer(session: ChatSession, line: str, console: Console) -> None:
    """One line of a conversation; an error is printed, and the conversation goes on."""
    try:
        if line.startswith("/"):
            console.print(session.command(line), markup=False, highlight=False)
            return
        streams = session.replies(line)
        written = dict.fromkeys(streams, "")
        try:
            for choice, piece in _pieces(streams, written, console, side_by_side=session.both):
                written[choice] += piece
        except KeyboardInterrupt:
            console.print(" (stopped)", style="dim", end="")
        console.print()
        session.keep(line, list(written.values())[-1])
    except LorakeetError as error:
        console.print(Text(str(error), style="red"), soft_wrap=True)


def _pieces(
    streams: dict[str, Iterator[str]], written: dict[str, str], console: Console, *, side_by_side: bool
) -> Iterator[tuple[str, str]]:
    """The pieces of all streams, printed as they come: in columns, or one after the other."""
    if not side_by_side:
        for choice, stream in streams.items():
            for piece in stream:
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
                yield choice, piece
        return
    with Live(_columns(written), console=console, refresh_per_second=8) as live:
        left = dict(streams)
        while left:
            for choice, stream in list(left.items()):
                try:
                    yield choice, next(stream)
                except StopIteration:
                    del left[choice]
            live.update(_columns(written))


def _columns(written: dict[str, str]) -> Table:
    table = Table(show_lines=False, expand=True)
    for choice in written:
        table.add_column(Text(visible(choice)), ratio=1)
    table.add_row(*(Text(visible(text)) for text in written.values()))
    return table


def _answer_lines(session: ChatSession, console: Console) -> None:
    """Each line of a pipe is a prompt without a history; its reply is printed on standard output."""
    answered: list[dict[str, str]] = []
    for given in sys.stdin:
        line = given.strip()
        if line.startswith("/"):
            said = session.command(line)
            console.print(said, markup=False, highlight=False)
        elif line:
            replies = {choice: "".join(stream) for choice, stream in session.replies(line).items()}
            for choice, reply in replies.items():
                shown = f"{choice}: {reply}" if session.both else reply
                console.print(shown, markup=False, highlight=False, soft_wrap=True)
            session.keep(line, list(replies.values())[-1])
            answered += session.said
            session.said = []
        if session.ended:
            break
    session.said = answered  # for --json
