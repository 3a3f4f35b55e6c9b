"""The command `lorakeet`: parses the verb and its settings, runs it, prints the result or error, and returns the exit code.

Exit codes: 0 done, 2 an error that the user can fix, 3 a verification failed, 4 a run stopped early, 130 Ctrl-C, 143 SIGTERM,
129 SIGHUP.
Of several processes that torchrun started, only the first prints.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import click

from lorakeet import __version__
from lorakeet.disk import FULL
from lorakeet.errors import (
    ConfigError,
    EnvironmentProblem,
    LorakeetError,
    Remedy,
    RunStopped,
    is_device_fault,
    is_of_the_device,
    nearest,
    visible,
)
from lorakeet.train.interrupt import terminable
from lorakeet.train.launch import launched
from lorakeet.verbs.options import VERBS, Verb

__all__ = ["main"]

_SHELLS = ("bash", "zsh", "fish")
_CONTEXT = {"max_content_width": 110, "help_option_names": ["-h", "--help"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `lorakeet ARGUMENTS` (None: the arguments of this process), prints its output and returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    try:
        code = lorakeet.main(args=arguments, prog_name="lorakeet", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.ClickException as error:
        return _report(_usage(error), exit_code=error.exit_code, as_json=as_json)
    except LorakeetError as error:
        return _report(error, as_json=as_json, debug="--debug" in arguments)
    except OSError as error:
        if error.errno not in FULL:
            raise
        _drop_unwritten()
        said = f"The disk (or the quota) is full: {error}. Free some space and run it again; what was finished before is whole."
        return _report(EnvironmentProblem(said, code="disk-full"), error, as_json=as_json, debug="--debug" in arguments)
    except click.Abort as error:  # which is a RuntimeError too
        by = str(error.__cause__ or "") or "Ctrl-C"
        code = {"SIGTERM": 143, "SIGHUP": 129}.get(by, 130)
        stopped = RunStopped(f"Stopped by {by} before it finished.", code="stopped", values={"signal": by})
        return _report(stopped, exit_code=code, as_json=as_json)
    except RuntimeError as error:
        if not is_of_the_device(error):
            raise
        from lorakeet.memory.cuda import device_fault_text, out_of_memory_text

        if is_device_fault(error):
            problem = EnvironmentProblem(device_fault_text(error), code="device-failed")
        else:
            problem = EnvironmentProblem(out_of_memory_text(error), code="out-of-memory")
        return _report(problem, error, as_json=as_json, debug="--debug" in arguments)
    return code if isinstance(code, int) else 0


def _drop_unwritten() -> None:
    """Where standard output is on a full disk, drops what it holds: Python would try it again at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class _NoSuchVerb(click.UsageError):
    """A word that is no verb, and the verbs that there are."""

    def __init__(self, verb: str, known: list[str], ctx: click.Context) -> None:
        super().__init__(f"No such verb '{verb}'.{nearest(verb, known)} The verbs are {', '.join(known)}.", ctx)
        self.verb, self.known = verb, known


class _Verbs(click.Group):
    """Builds the command of a verb on demand, so that the list of verbs loads no settings, and no help loads torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*(verb.name for verb in VERBS), "completion"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = next((verb for verb in VERBS if verb.name == cmd_name), None)
        return _command(verb) if verb else self.commands.get(cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if not ctx.resilient_parsing and args and args[0] not in self.list_commands(ctx) and not args[0].startswith("-"):
            known = self.list_commands(ctx)
            raise _NoSuchVerb(args[0], known, ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(verb.name, verb.summary) for verb in VERBS]
        with formatter.section("Verbs"):
            formatter.write_dl([*rows, ("completion", "Print the completion script of a shell.")])


@click.group(cls=_Verbs, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="lorakeet")
def lorakeet() -> None:
    """From a pre-trained model to a verified LoRA adapter, on the hardware at hand."""


@lorakeet.command(context_settings=_CONTEXT)
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print the completion script of SHELL; load it with: eval "$(lorakeet completion bash)"."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:
        raise ConfigError(f"No completion for the shell '{shell}'; expected one of {', '.join(_SHELLS)}.")
    click.echo(found(lorakeet, {}, "lorakeet", "_LORAKEET_COMPLETE").source())


def _command(verb: Verb) -> click.Command:
    from lorakeet.cli.flags import SettingsCommand, option_flags, setting_flags

    own, arguments = option_flags(verb.options)
    params: list[click.Parameter] = []
    if verb.config == "file":
        meaning = "The run file (YAML); flags override it. Without it, the run is set by flags and defaults."
        arguments = {"CONFIG": meaning, **arguments}
        params.append(click.Argument(["config"], metavar="[CONFIG]", required=False))
    params += own
    params.append(click.Option(["--json"], is_flag=True, help="Print only the result, as JSON, on standard output."))
    params.append(click.Option(["--debug"], is_flag=True, help="Print the traceback of an error."))
    if verb.config != "none":
        from lorakeet.config import RunConfig

        params += setting_flags(RunConfig)

    def run(**values: Any) -> int:
        return _run(verb, command, values)

    command = SettingsCommand(
        verb.name, arguments=arguments, params=params, callback=run, help=verb.summary, context_settings=_CONTEXT
    )
    return command


def _run(verb: Verb, command: click.Command, values: dict[str, Any]) -> int:
    import dataclasses

    from lorakeet.cli.flags import SettingFlag, given_values
    from lorakeet.data.spec import NO_ROWS
    from lorakeet.runs.terminal import TerminalConsole, json_text
    from lorakeet.settings import load

    launch = launched()
    if launch.count > 1 and not verb.together:
        started = f"but torchrun started {launch.count}. Run it without torchrun."
        raise ConfigError(f"`lorakeet {verb.name}` runs in one process, {started}")
    specs = {spec.name: spec for spec in dataclasses.fields(verb.options)}
    given = given_values(command, values, lambda param: param.name in specs)
    flags_of = {name: f"flag --{name.replace('_', '-')}" for name in given if not specs[name].metadata.get("positional")}
    options = load(verb.options, given, where=f"the command lorakeet {verb.name}", origins=flags_of)
    config = None
    if verb.config != "none":
        flags = given_values(command, values, lambda param: isinstance(param, SettingFlag))
        if not verb.reads_rows and not values.get("config"):
            flags.setdefault("data.train", NO_ROWS)
        config = _config(verb, values.get("config"), getattr(options, "resume", None), flags)
    if verb.early_checks and launch.count == 1:  # of several processes the first alone decides
        from lorakeet.verbs.early.checks import check_early

        check_early(verb.early_checks, options, config)
    # names of files may hold [brackets]
    console = TerminalConsole(stderr=values["json"], markup=False, emoji=False, quiet=not launch.first)
    with nullcontext() if verb.ends_itself or launch.count > 1 else terminable():
        result = verb.run(options, config=config, console=console)
    if values["json"] and launch.first:
        click.echo(json_text(result.to_mapping(), indent=2))
    return int(getattr(result, "exit_code", 0))


def _config(verb: Verb, file: str | None, resume: Path | None, flags: dict[str, Any]) -> Any:
    """Returns the RunConfig of the command line; a resumed run keeps its own settings."""
    from lorakeet.config import read_run

    if resume is None:
        return read_run(verb.shipped_config() if verb.config == "shipped" else Path(file) if file else None, flags)
    if file or flags:
        extra = ", ".join([*([file] if file else []), *(f"--{path}" for path in flags)])
        saved = resume / "config.yaml"
        raise ConfigError(f"--resume takes every setting from {saved}. Leave out {extra}, or start a new run with them.")
    if not (resume / "config.yaml").is_file():
        said = f"--resume {resume}: this is no run folder (no config.yaml in it). Give the folder of a run."
        raise ConfigError(said, code="run-missing")
    return read_run(resume / "config.yaml")


def _usage(error: click.ClickException) -> ConfigError:
    """Click's error with a code, the nearest flag, and the command that lists all flags."""
    from lorakeet.cli.flags import nearest_flag, removed_flags

    context = getattr(error, "ctx", None)
    where = f" 'lorakeet {context.command.name} --help' lists all." if context and context.parent else ""
    if not isinstance(error, click.NoSuchOption) or not context:
        known = {"verb": error.verb, "known": error.known} if isinstance(error, _NoSuchVerb) else {}
        code = "verb-unknown" if known else "setting-refused"
        return ConfigError(f"{error.format_message().rstrip('.')}.{where}", code=code, values=known)
    name = error.option_name
    if removed := removed_flags(context.command).get(name):
        advice = f"Use --{removed.instead}" if removed.instead else "Leave it out"
        remedies = [Remedy(removed.instead, "true", advice)] if removed.instead else []
        said = f"{name} is gone. {removed.why} {advice}."
        return ConfigError(said, code="setting-removed", values={"setting": name}, remedies=remedies)
    near = nearest_flag(name, context.command)
    hint = f" Did you mean '{near}'?" if near else ""
    return ConfigError(f"No such flag '{name}'.{hint}{where}", code="setting-unknown", values={"setting": name, "nearest": near})


def _report(
    error: LorakeetError, cause: BaseException | None = None, *, exit_code: int | None = None, as_json: bool, debug: bool = False
) -> int:
    """Prints an error; as JSON on standard output, or as text on standard error. Returns the exit code."""
    from lorakeet.runs.terminal import TerminalConsole, json_text

    exit_code = error.exit_code if exit_code is None else exit_code
    if debug:
        click.echo(visible("".join(traceback.format_exception(cause or error))), err=True, nl=False)
    if not launched().first:  # an error that every process has; train/processes reports one of a single process
        return exit_code
    if as_json:
        with suppress(OSError):  # of a full disk
            click.echo(json_text({"error": error.to_mapping()}))
            return exit_code
    from rich.text import Text

    TerminalConsole(stderr=True, soft_wrap=True).print(Text("Error: ", "bold red") + Text(str(error), "default"))
    return exit_code
