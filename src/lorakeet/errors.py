"""The errors that Lorakeet raises on purpose, and the small tools that word them.

    LorakeetError
    ├── ConfigError          fix your configuration                    exit code 2
    ├── DataError            fix your rows or files                    exit code 2
    ├── EnvironmentProblem   install, free or permit something         exit code 2
    ├── VerificationFailed   two things that must be equal are not     exit code 3
    └── RunStopped           the run ended early; what it saved is good  exit code 4

A message says what failed, the value, what was expected and what to do. Where several things are wrong at once,
collect them in `Problems` and raise once. Programs read an error's code, values and remedies, never its message.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
import shlex
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

LONGEST_MESSAGE = 2000  # characters; a file of a stranger can have names and values of any length
_LONGEST_LINE = 1000  # of one problem among several


def shortened(text: str, most: int = LONGEST_MESSAGE) -> str:
    """The text; if it is longer than `most`, its beginning and its end, with the number of characters between them."""
    if len(text) <= most:
        return text
    kept = max(most - 60, 0)
    end = kept // 4
    left_out = len(text) - kept
    return f"{text[: kept - end]} […, {left_out:,} characters, …] {text[len(text) - end :]}"


TURNING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # controls that show what follows in another order
_UNSEEN = [*range(9), *range(0xB, 0x20), *range(0x7F, 0xA0), *TURNING, *range(0xD800, 0xE000)]  # controls, halves of characters
_HALF = "\\u{:04x}"


@functools.cache
def _escapes(form: str) -> dict[int, str]:
    return {number: (form if number < 0x100 else _HALF).format(number) for number in _UNSEEN}


def visible(text: str, form: str = "\\x{:02x}") -> str:
    """The text with every control character but tab and line end as an escape, those of direction too: a terminal obeys none."""
    return text if text.isprintable() else text.translate(_escapes(form))


_OUT_OF_MEMORY = re.compile(
    r"\b(CUDA|HIP)( driver)? error: out of memory|Triton Error \[\w+\]: out of memory|STATUS_ALLOC_FAILED|MPS backend out of mem"
)


def percent(share: float, digits: int = 1) -> str:
    """A share from 0 to 1 as people read it. Values, settings and JSON stay shares."""
    return f"{100 * share:.{digits}f} %".replace("-", "−")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had too little memory. torch has an error for its tensors: contexts, kernels that are loaded, segments
    that grow and handles of libraries raise a RuntimeError that only says so."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


_DEVICE_FAULT = re.compile(  # those after which CUDA fails every call of the process (CUDA Runtime API, cudaError_t)
    r"(\b(CUDA|HIP)( driver)? error|Triton Error \[\w+\]): ("
    r"an illegal memory access|an illegal instruction|misaligned address|invalid program counter|hardware stack error|"
    r"operation not supported on global/shared address space|device-side assert triggered|tensor memory not completely freed|"
    r"unspecified launch failure|the launch timed out|uncorrectable (ECC|NVLink) error|Invalid access of peer GPU memory|"
    r"the MPS client has been terminated|an async error has occured|context is destroyed|unknown error|"
    r"CUBLAS_STATUS_EXECUTION_FAILED|CUDA-capable device\(s\) is/are busy or unavailable)"
)


def is_device_fault(error: BaseException) -> bool:
    """Whether a GPU failed so that this process can no longer use it: every later call gives the same error. What raises it may
    not be its cause, as the host goes on while a GPU computes."""
    return isinstance(error, RuntimeError) and _DEVICE_FAULT.search(str(error)) is not None


def is_of_the_device(error: BaseException) -> bool:
    """Whether an error says only something of the device, its memory or a fault, and nothing of what was computed on it."""
    return is_out_of_memory(error) or is_device_fault(error)


def _as_flag(setting: str, value: str | None) -> str:
    """A setting on the command line, as a shell takes it: "--data.encoding cp1252"."""
    if setting.startswith(COMMAND):
        return f"{setting}{value or ''}"
    quoted = "" if value is None else shlex.quote(value)
    sign = bool(quoted) and quoted == value and not any(map(str.isalnum, quoted))  # which would read as a part of the sentence
    return f"--{setting} {repr(quoted) if sign else quoted}".rstrip()


COMMAND = "lorakeet "  # which begins what is a command, and no setting
SPELLING: ContextVar[Callable[[str, str | None], str]] = ContextVar("SPELLING", default=_as_flag)
_VALUE = r"""'[^'\n]*'|"[^"\n]*"|[^\s,;:()'"`-](?:[^\s,;:()'"`]*[^\s,;:.()'"`])?"""
_NAMED = rf"--(?P<setting>[a-z](?:[\w.-]*\w)?)(?:[ =](?P<value>{_VALUE}))?"
_WORD = rf"--[a-z][\w.-]*(?: (?:{_VALUE}))?|[A-Z]{{2,}}\S*\b|…|\S*/\S*[\w/]"  # of a command
_WRITTEN = re.compile(rf"(?<![\w-])(?:{_NAMED}|(?P<verb>{COMMAND}[a-z]+\b)(?P<words>(?: (?:{_WORD})(?=\W|$))*))")
_ENDS = re.compile(r"$|[.,;:)]|\s*\n| (?:and|or|to)\b| \(")  # what comes after the value of a setting that is a plain word


def spelt(setting: str, value: str | None = None) -> str:
    """A setting, with its value where one is given, as the caller writes it: a flag, or what a context set as SPELLING.

    What that makes of "lorakeet VERB" with the words behind it is a command as the caller gives it.
    """
    return SPELLING.get()(setting, value)


@contextmanager
def spelling(spell: Callable[[str, str | None], str]) -> Iterator[None]:
    """A context in whose messages settings stand as `spell` writes them."""
    before = SPELLING.set(spell)
    try:
        yield
    finally:
        SPELLING.reset(before)


def respelt(message: str) -> str:
    """The message with the flags and commands that stand in it as the caller writes them (`spelling`)."""
    spell = SPELLING.get()

    def written(found: re.Match[str]) -> str:
        if found["verb"] is not None:
            return spell(found["verb"], found["words"])
        value, given = found["value"], found[0].partition(found["setting"])[2]
        if value is None:
            return spell(found["setting"], None)
        plain = value.isalpha() and not value.isupper()
        if plain and (value in ("and", "or", "to", "is") or not _ENDS.match(message, found.end())):
            return spell(found["setting"], None) + given
        bare = value[1:-1] if value[0] in "'\"" else value
        return spell(found["setting"], bare)

    return message if spell is _as_flag else _WRITTEN.sub(written, message)


CODES = {  # every code, and what it says: docs/reference/errors.md
    "setting-refused": "A setting, an option or an argument cannot be used as it is given, or not together with another one.",
    "setting-unknown": "No setting, flag or key has this name. `values`: setting, and nearest, the name that is most like it.",
    "setting-missing": "A setting that has no default is not given. `values`: setting, expected.",
    "setting-wrong-type": "A value cannot be read as what its setting takes. `values`: setting, value, expected.",
    "setting-out-of-range": "A section of the run file, or options, have a value that is not allowed. `values`: section.",
    "setting-removed": "A setting of an earlier version is gone, and its value would change results. `values`: setting, value.",
    "several-problems": "Several things of different codes are wrong. `values`: problems, each with its own code.",
    "kind-unknown": "No kind of run has this name. `values`: kind, known.",
    "kind-lacks": "This kind of run lacks what is requested. `values`: kind, what.",
    "kinds-collide": "Two packages register a kind of run under one name. `values`: kind, packages.",
    "verb-unknown": "No verb has this name. `values`: verb, known.",
    "output-exists": "Something is where the result would be written. `values`: path.",
    "run-missing": "There is no run of this name, or the folder is no run folder.",
    "does-not-fit": "The least memory that works is more than is allowed or free. `values`: needed and budget, in bytes.",
    "data-refused": "Rows, a data file, an adapter or a model file cannot be used as they are.",
    "file-missing": "There is no file or folder of this name. `values`: path.",
    "file-unreadable": "The system does not read a file. `values`: path.",
    "file-malformed": "A file is not of the format that it should have, or is damaged. `values`: path.",
    "rows-unusable": "Single rows cannot be used; others can.",
    "rows-leak": "Rows are equal or nearly equal to rows that are measured.",
    "row-too-long": "A row has more tokens than data.max_tokens. `values`: limit.",
    "encoding-wrong": "A file is not in the encoding that it is read in. `values`: file.",
    "columns-unclear": "It is not clear which column is the text or the label. `values`: file, and candidates of the label.",
    "environment-refused": "The machine refuses or lacks something: a permission, a device, a processor feature.",
    "package-missing": "A package is not installed. `values`: packages, by their names or as pip installs them.",
    "disk-full": "A disk or a quota is full, or too small for what would be written.",
    "out-of-memory": "A device, or the machine, ran out of memory.",
    "device-failed": "A GPU failed, and this process can no longer use it.",
    "port-in-use": "Nothing can listen at this address. `values`: host, port.",
    "server-refused": "A server or the hub refused a request, or does not answer as it should. `values`: status, if it answered.",
    "verification-failed": "Two things that must compute the same do not.",
    "content-differs-from-certificate": "An adapter is not what its certificate was made for. `values`: subject, differs.",
    "run-stopped": "A run ended before its last step. What it saved is good.",
    "stopped": "A signal or Ctrl-C ended the command. `values`: signal.",
}


@dataclass(frozen=True)
class Remedy:
    """One setting or one command that would mend what an error names.

    `setting` is its path, such as "data.encoding", `value` the text that its flag takes, `words` are for a button. A command has
    no setting.
    """

    setting: str
    value: str
    words: str
    command: str = ""

    @property
    def flag(self) -> str:
        """The setting as the caller writes it (`spelt`)."""
        return spelt(self.setting, self.value)

    def to_mapping(self) -> dict[str, str]:
        """Plain values for --json."""
        given = {"command": self.command} if self.command else {"setting": self.setting, "value": self.value}
        return {**given, "words": self.words}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Remedy:
        """What `to_mapping` has written."""
        setting, value, words, command = (str(mapping.get(name, "")) for name in ("setting", "value", "words", "command"))
        return cls(setting, value, words, command)


class LorakeetError(Exception):
    """Base of every error that a user can mend; `exit_code` is what the command line returns.

    A message is at most LONGEST_MESSAGE characters long. `code` is one of CODES, by default that of the class, and `values` are
    what the message names. `remedies` mend it: settings all together, a command alone. An error for several things has
    `problems`, an error for each.
    """

    exit_code = 2
    CODE = "setting-refused"

    def __init__(
        self,
        *details: object,
        code: str = "",
        values: Mapping[str, Any] | None = None,
        remedies: Iterable[Remedy] = (),
        problems: Iterable[LorakeetError] = (),
    ) -> None:
        super().__init__(*(shortened(respelt(one)) if isinstance(one, str) else one for one in details))
        self.code = code or self.CODE
        self.values = dict(values or {})
        self.remedies = tuple(remedies)
        self.problems = tuple(problems)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json: code, message, values (of several problems the mapping of each), remedies."""
        values = {**self.values, **({"problems": [one.to_mapping() for one in self.problems]} if self.problems else {})}
        remedies = [one.to_mapping() for one in self.remedies]
        return {"code": self.code, "message": str(self), "values": values, "remedies": remedies}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> LorakeetError:
        """An error of this class, of what `to_mapping` has written."""
        values = dict(mapping.get("values") or {})
        problems = [cls.from_mapping(one) for one in values.pop("problems", ())]
        remedies = [Remedy.from_mapping(one) for one in mapping.get("remedies", ())]
        return cls(mapping["message"], code=mapping.get("code", ""), values=values, remedies=remedies, problems=problems)

    def worded(self, message: str) -> LorakeetError:
        """The same error with another message."""
        found = type(self).__new__(type(self), message)
        found.__dict__.update(self.__dict__)
        return found


class ConfigError(LorakeetError):
    """A setting, flag or key is wrong."""


class DataError(LorakeetError):
    """A row, a data file or a model file is wrong."""

    CODE = "data-refused"


class EnvironmentProblem(LorakeetError):
    """The machine lacks something: a package, disk space, a permission, a processor feature."""

    CODE = "environment-refused"


class PackageMissing(EnvironmentProblem):
    """A package is not installed; `install` is what pip installs, such as "lorakeet[serve]"."""

    CODE = "package-missing"

    def __init__(self, need: str, install: str, packages: Iterable[str] = ()) -> None:
        command = f"pip install '{install}'"
        values = {"packages": [*packages] or [install]}
        super().__init__(f"{need}. Install it with: {command}", values=values, remedies=[Remedy("", "", "Install it", command)])


class VerificationFailed(LorakeetError):
    """An artefact does not compute the function that it should."""

    exit_code = 3
    CODE = "verification-failed"


class RunStopped(LorakeetError):
    """A run ended before its last step (NaN loss, Ctrl-C); the message says what is kept and how to go on."""

    exit_code = 4
    CODE = "run-stopped"


_LONGEST_NAME = 400


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The closest known name, or an empty string when none is close.

    What is longer than any name is not compared: a text of megabytes would take seconds.
    """
    if len(name) > _LONGEST_NAME:
        return ""
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return lowered[close[0]] if close else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence " Did you mean 'x'?" for the closest known name, or an empty string when none is close."""
    found = nearest_name(name, known)
    return f" Did you mean '{found}'?" if found else ""


def unreadable(path: Path, error: OSError) -> str:
    """The sentences for a file that the system will not read: which one, the reason that the system gives, and what to check."""
    return f"{path} cannot be read: {error.strerror or error}. Check the path, its permissions and the disk."


def require_path(path: object) -> None:
    """Raises ConfigError for what Python code gives in place of a path."""
    if not isinstance(path, (str, Path)):
        raise ConfigError(f"path is {path!r:.80} ({type(path).__name__}); expected a path.")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """A context in which a failure of the system to read `path` becomes a DataError (`unreadable`)."""
    try:
        yield
    except OSError as error:
        raise DataError(unreadable(path, error), code="file-unreadable", values={"path": str(path)}) from error


def require_regular(path: Path) -> None:
    """Raises DataError if a device, a pipe or a socket is at `path`: reading it may never end."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise DataError(
            f"{path} is {what}; expected a file. Check the path.", code="file-unreadable", values={"path": str(path)}
        )


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@contextmanager
def one_message(
    begin: str, advice: str, kind: type[LorakeetError] = DataError, *, passing: tuple[type[Exception], ...] = (), **about: Any
) -> Iterator[None]:
    """The boundary of a reader: whatever a library raises within becomes one `kind`, "BEGIN: reason. ADVICE".

    `begin` names the file; `about` are code, values and remedies. Errors of Lorakeet, those in `passing` and requests to stop
    pass. The reason says where the error was raised.
    """
    try:
        yield
    except LorakeetError:
        raise
    except passing:
        raise
    except MemoryError as error:
        raise EnvironmentProblem(f"{begin}: it needs more memory than there is. {advice}", code="out-of-memory") from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of libraries in Rust
            raise
        raise kind(f"{begin}: {reason_of(error)}. {advice}", **about) from error


def reason_of(error: BaseException) -> str:
    """The type and the text of a library's error in one line, and the line of code that raised it."""
    line = " ".join(str(error).split()).rstrip(".")
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if line else ''}{shortened(line, 400)}{place}"


def reader(what: str) -> Callable[
    [Callable[Concatenate[Path, _Arguments], _Result]], Callable[Concatenate[Path, _Arguments], _Result]
]:  # fmt: skip
    """Makes a function whose first argument is a path the reader of a file of that kind: a boundary as in `one_message`."""

    def bounded(read: Callable[Concatenate[Path, _Arguments], _Result]) -> Callable[Concatenate[Path, _Arguments], _Result]:
        @functools.wraps(read)
        def within(path: Path, /, *arguments: _Arguments.args, **more: _Arguments.kwargs) -> _Result:
            require_path(path)
            begin, advice = f"{path} cannot be read as {what}", "It may be damaged: fetch it again. If not, report this."
            with one_message(begin, advice, code="file-malformed", values={"path": str(path)}):
                return read(Path(path), *arguments, **more)  # a text is a path too

        return within

    return bounded


class Problems:
    """Collects problems and raises them together, so that a user mends everything in one go.

    A message that is added has the `code` and `values` given here.
    """

    def __init__(
        self,
        heading: str,
        kind: type[LorakeetError] = ConfigError,
        *,
        remedy: str = "",
        shown: int | None = None,
        remedies: Iterable[Remedy] = (),
        code: str = "",
        values: Mapping[str, Any] | None = None,
    ) -> None:
        self.heading = heading
        self.remedies = tuple(remedies)  # of the error
        self.kind = kind
        self.remedy = remedy  # the last sentence, where one thing mends them all
        self.shown = shown  # of many problems the first so many are named and the others counted
        self.code = code
        self.values = dict(values or {})
        self.errors: list[LorakeetError] = []
        self.others = 0  # problems that are counted and not kept

    @property
    def messages(self) -> list[str]:
        """The message of each problem."""
        return [str(one) for one in self.errors]

    def add(self, problem: str | LorakeetError, *, code: str = "", values: Mapping[str, Any] | None = None) -> None:
        """Adds a problem: a message, or an error as it is."""
        if isinstance(problem, LorakeetError):
            self.errors.append(problem.worded(shortened(str(problem), _LONGEST_LINE)))
        else:
            self.errors.append(self.kind(shortened(problem, _LONGEST_LINE), code=code or self.code, values=values or self.values))

    def locate(self, where: object) -> None:
        """Puts `where`, a file or folder, before each message so far that does not name it."""
        self.errors = [one if str(where) in str(one) else one.worded(f"{where}: {one}") for one in self.errors]

    def raise_if_any(self) -> None:
        """Raises `kind` with the heading and one line per problem; a single problem stands alone. The remedy comes last."""
        last = [self.remedy] if self.remedy else []
        remedies = self.remedies or tuple(dict.fromkeys(one for each in self.errors for one in each.remedies))
        if len(self.errors) == 1:
            (one,) = self.errors
            message = " ".join([str(one), *last])
            raise self.kind(message, code=one.code, values=one.values, remedies=remedies, problems=one.problems)
        if self.errors:
            named, count = self._fitting(), len(self.errors) + self.others
            lines = [f"{self.heading} ({count:,} problems):", *(f"  - {message}" for message in named)]
            if more := count - len(named):
                lines.append(f"  - and {more:,} more.")
            codes = {one.code for one in self.errors}
            code = self.errors[0].code if len(codes) == 1 else "several-problems"
            values = self.values if self.code else None
            raise self.kind("\n".join([*lines, *last]), code=code, values=values, remedies=remedies, problems=self.errors)

    def _fitting(self) -> list[str]:
        """The first messages that are shown: at most `shown`, and no more than fit into one message."""
        most = LONGEST_MESSAGE - len(self.heading) - len(self.remedy) - 100
        messages = self.messages
        lengths = itertools.accumulate(len(message) + 5 for message in messages)
        fitting = max(1, sum(length <= most for length in lengths))
        return messages[: fitting if self.shown is None else min(fitting, self.shown)]
