"""The fields of a JSON request with checked types; unknown fields are refused, never dropped."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lorakeet.errors import ConfigError, nearest

_SHOWN = 100  # characters


class Fields:
    """A JSON object; `where` names it in messages."""

    def __init__(self, data: Any, where: str = "the request") -> None:
        if not isinstance(data, dict):
            raise ConfigError(f"{where} must be a JSON object, not {_kind(data)}.")
        self.data: Mapping[str, Any] = data
        self.where = where

    def text(self, name: str, default: str | None = None) -> str:
        """A string; required if there is no default."""
        value = self.data.get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        return value

    def number(self, name: str, default: float) -> float:
        """A number; null means the default."""
        value = self.data.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(name, "a number", value)
        try:
            return float(value)
        except OverflowError as error:
            raise ConfigError(f"{name} in {self.where} is a number of {len(str(value))} digits, which is too large.") from error

    def whole(self, name: str, default: int | None = None) -> int | None:
        """A whole number; null means the default."""
        value = self.data.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "a whole number", value)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false; null means the default."""
        value = self.data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A string or a list of strings; null means none."""
        value = self.data.get(name)
        listed = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(part, str) for part in listed):
            raise self._wrong(name, "a string or a list of strings", value)
        return tuple(listed)

    def inner(self, name: str) -> Fields:
        """An object; null means an empty one."""
        value = self.data.get(name)
        return Fields({} if value is None else value, f"{name} of {self.where}")

    def refuse(self, known: Collection[str], without_effect: Collection[str], neutral: Mapping[str, Any]) -> None:
        """Raises ConfigError for unknown fields that would change the answer; `neutral` values change nothing."""
        for name, value in self.data.items():
            if name in known or name in without_effect or value is None:
                continue
            if name in neutral and value == neutral[name]:
                continue
            if name in neutral:
                raise ConfigError(f"{name} is {_shown(value)}, which this server does not support; leave it out.")
            raise ConfigError(f"{name[:_SHOWN]} in {self.where} is not known here.{nearest(name, known)} Leave it out.")

    def _wrong(self, name: str, expected: str, value: Any) -> ConfigError:
        if value is None:
            return ConfigError(f"{name} is missing in {self.where}; expected {expected}.")
        return ConfigError(f"{name} in {self.where} is {_kind(value)}; expected {expected}.")


def _shown(value: Any) -> str:
    """A value for a message, truncated."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
