"""A stream of a packed file that ends in one message, whatever its library raises, and at a stated size."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lorakeet.errors import DataError, LorakeetError, spelt, unreadable

MOST_UNPACKED = 1 << 30  # bytes
_PIECE = 1 << 16
_SAID = 300  # characters of a library's message


class GuardedStream(io.RawIOBase):
    """`stream` as it is read; DataError names `path` for damage, and for more than `most` bytes read in all."""

    def __init__(self, stream: IO[bytes], path: Path, most: int | None = None) -> None:
        self._stream, self._path, self._most, self._read = stream, path, most, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._stream.seekable()

    def readinto(self, buffer: Any) -> int:
        """Fills a part of `buffer`; 0 at the end."""
        with unpacking(self._path):
            piece = self._stream.read(min(len(buffer), _PIECE))
        self._read += len(piece)
        if self._most is not None and self._read > self._most:
            raise too_large(self._path, self._most)
        buffer[: len(piece)] = piece
        return len(piece)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any stream."""
        with unpacking(self._path):
            return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """As of any stream."""
        return self._stream.tell()


@contextmanager
def unpacking(path: Path) -> Iterator[None]:
    """A context in which whatever a library of packed files raises is a DataError that names `path`."""
    try:
        yield
    except LorakeetError:
        raise
    except NotImplementedError as error:
        raise DataError(f"{path} is packed in an unknown way ({error!s:.300}); pack it again, as zip or gz.") from error
    except OSError as error:
        if error.errno is not None:  # no permission, a folder, or a failing disk
            raise DataError(unreadable(path, error)) from error
        raise DataError(f"{path} is damaged ({error!s:.300}); fetch or pack it again.") from error
    except Exception as error:  # zlib's, lzma's, struct's: whatever the library did not foresee
        raise DataError(f"{path} is damaged ({_said(error)}); fetch or pack it again.") from error


def too_large(path: Path, most: int) -> DataError:
    """The error for a packed file that unpacks to more than `most` bytes."""
    return DataError(
        f"{path} unpacks to more than {most:,} bytes. If it is yours, unpack it and name the file, or raise "
        f"{spelt('data.largest_unpacked')} (in MiB)."
    )


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:_SAID]
