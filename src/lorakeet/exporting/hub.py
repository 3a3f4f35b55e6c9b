"""Files to a repository of a model hub, in one commit, and read back from there, by huggingface_hub.

A commit is whole or not there. Large files are sent before it, by their SHA-256; after a failure those that arrived are not sent
again. Where the hub is, and the token, are huggingface_hub's settings: HF_ENDPOINT, HF_TOKEN, `hf auth login`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakeet.disk import open_buffered
from lorakeet.errors import ConfigError, EnvironmentProblem, VerificationFailed, reason_of
from lorakeet.formats.files.digest import sha256_of

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_ODD_ANSWER = (json.JSONDecodeError, LookupError, TypeError, AttributeError)  # of one that is no hub's
_AGAIN = "Run the same command again: files that arrived are not sent again, and the repository changes only when all are there."


@dataclass(frozen=True)
class Uploaded:
    """The commit of a push: its address, the files that it holds with their sizes, and other files of the repository."""

    url: str
    commit: str
    files: dict[str, int]
    private: bool
    others: tuple[str, ...] = ()


def require_repository_name(name: str) -> None:
    """Raises ConfigError unless `name` is OWNER/NAME as a hub takes it."""
    if not _NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith((".git", "-", ".")):
        raise ConfigError(f"'{name}' is no name of a repository; expected OWNER/NAME of letters, digits, '-', '_' and '.'.")


def upload(
    files: Mapping[str, Path | bytes], name: str, *, private: bool, message: str, say: Callable[[str], None], bars: bool = False
) -> Uploaded:
    """Puts `files` (by their path there) into the model repository `name`, made if missing, and compares what the hub then has.

    `private` is for a new repository; an existing public one is refused with it. `bars` shows progress.

    Raises EnvironmentProblem without a token or where the hub refuses, cannot be reached or fails; ConfigError for a public
    repository; VerificationFailed if the hub has other bytes than were sent.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    require_repository_name(name)
    if get_token() is None:
        raise EnvironmentProblem("There is no token for the hub. Log in with: hf auth login; or set HF_TOKEN.")
    if not bars:
        disable_progress_bars()
    api = HfApi()
    with _explained(name, "nothing was sent"):
        api.create_repo(name, private=private or None, repo_type="model", exist_ok=True)
        about = api.model_info(name)
    if private and not about.private:
        raise ConfigError(f"'{name}' exists and is public, so --private is refused. Change it on the hub, or give another name.")
    sizes = {path: len(file) if isinstance(file, bytes) else file.stat().st_size for path, file in files.items()}
    kind = "private" if about.private else "public"
    say(f"Sending {len(files)} files, {sum(sizes.values()) / 1e6:.1f} MB, to the {kind} repository {name}.")
    additions = [CommitOperationAdd(path, file if isinstance(file, bytes) else str(file)) for path, file in files.items()]
    with _explained(name, "the repository is as it was before"):
        made = api.create_commit(name, additions, commit_message=message, repo_type="model")
        held = api.get_paths_info(name, list(files), revision=made.oid, repo_type="model")
    _compare(files, held, name)
    others = tuple(sorted({one.rfilename for one in about.siblings or ()} - set(files) - {".gitattributes"}))
    return Uploaded(str(made.commit_url), str(made.oid), sizes, bool(about.private), others)


def _compare(files: Mapping[str, Path | bytes], held: list[Any], name: str) -> None:
    """Raises VerificationFailed unless the hub lists each file with the hash of what was sent."""
    found = {one.path: one.lfs.sha256 if getattr(one, "lfs", None) else one.blob_id for one in held}
    large = {one.path for one in held if getattr(one, "lfs", None)}
    sent = {path: _sha256(file) if path in large else _git_blob(file) for path, file in files.items()}
    wrong = [path for path, name_of_content in sent.items() if found.get(path) != name_of_content]
    if wrong:
        raise VerificationFailed(f"The hub has other bytes than were sent to {name}: {', '.join(wrong)}. Push again.")


def _sha256(file: Path | bytes) -> str:
    return hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else sha256_of(file)


def _git_blob(file: Path | bytes) -> str:
    """The name that git gives to a file's content."""
    content = file if isinstance(file, bytes) else open_buffered(file).read()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


@contextmanager
def _explained(name: str, state: str) -> Iterator[None]:
    """Errors of the hub as one message each, with what is there now and what to do."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    of_http = _http_errors()
    caught: tuple[type[Exception], ...] = (RuntimeError, ValueError, OSError, *_ODD_ANSWER, *of_http)
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise EnvironmentProblem("HF_HUB_OFFLINE is set, and a push needs the hub. Unset it.") from error
    except caught as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, of_http):
            cause = cause.__cause__
        from_hub = isinstance(error, (OSError, *_ODD_ANSWER)) or any(word in str(error) for word in ("Hub", "LFS", "server"))
        if cause is None and not from_hub:
            raise
        what = _words(cause or error, name)
        raise EnvironmentProblem(f"Pushing to {name} failed, {state}: {what}", code="server-refused") from error


def _http_errors() -> tuple[type[Exception], ...]:
    """The errors of the HTTP package that huggingface_hub uses: httpx, or one in its place."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind.__name__ == "HTTPError")


def _words(error: BaseException, name: str) -> str:
    """What the hub's answer means, and the remedy."""
    response = getattr(error, "response", None)
    code = getattr(response, "status_code", None)
    said = str(getattr(error, "server_message", "") or "").strip().rstrip(".")
    own = f" ({said})" if said else ""
    if code == 401:
        return f"the hub does not take the token{own}. Log in again with: hf auth login; or set HF_TOKEN."
    if code == 403:
        return f"the token may not write to {name}{own}. Take one with write access to {name.partition('/')[0]}."
    if code == 404:
        return f"the hub has no place for it{own}. Check that {name.partition('/')[0]} is your user or organisation."
    if code == 413:
        return f"a file is larger than the hub takes{own}. Push the adapter alone, or a smaller GGUF type."
    if code is not None:
        return f"the hub answered {code}{own}. {_AGAIN}"
    if isinstance(error, _ODD_ANSWER):
        return f"the hub gave an answer that cannot be read, {reason_of(error)}. Check HF_ENDPOINT."
    return f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. {_AGAIN}"
