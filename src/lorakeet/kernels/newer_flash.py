"""FlashAttention 3 and 4 in place of torch's own flash kernel, where they are installed. **Not run on a GPU yet.**

torch registers them for its own operators, so that what calls these stays as it is. One is turned on for the whole process before
the first heads are proved (kernels/flash_varlen), and off again, with a warning, where it does not load or a proof fails.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch.nn import attention

PACKAGES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}
FIRST = {9: ("FA3", "FA4"), 10: ("FA4",)}  # by the GPU's major compute capability: Hopper, Blackwell; torch refuses others
_LEFT: set[str] = set()  # those that were turned off


def newer_flash(device: torch.device) -> str:
    """The name of the implementation that computes flash attention on `device` from now on; empty for torch's own.

    One that the user has turned on stays.
    """
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return ""
    name = _installed(torch.cuda.get_device_capability(device)[0])
    if not name or name in _LEFT or attention.current_flash_attention_impl() not in (None, name):
        return ""
    if attention.current_flash_attention_impl() is None:
        try:
            attention.activate_flash_attention_impl(name)
        except Exception as error:  # a package of another version may raise anything
            leave_newer_flash(name, f"cannot be loaded ({type(error).__name__}: {error})")
            return ""
    return name


def implementation() -> str:
    """The name of the implementation that is turned on; empty for torch's own."""
    current = getattr(attention, "current_flash_attention_impl", None)
    return (current() if current is not None else None) or ""


def newer_flash_in_words(capability: tuple[int, int]) -> str:
    """Says of FlashAttention 3 and 4, where installed, whether a GPU of that compute capability uses them; empty for neither."""
    here = [name for name, package in PACKAGES.items() if _is_here(package)]
    used = _installed(capability[0])
    uses = {name: "is used" if name == used else "is not used" for name in here}
    return "; ".join(f"{_title(name)} {words}: {_why(name, used, capability)}" for name, words in uses.items())


def _why(name: str, used: str, capability: tuple[int, int]) -> str:
    if name == used:
        return "in place of torch's own flash kernel, once it has proved right as a model is loaded"
    if name not in FIRST.get(capability[0], ()):
        for_them = " and ".join(f"{major}.x" for major, names in FIRST.items() if name in names)
        return f"it is for GPUs of compute capability {for_them}, and this one has {capability[0]}.{capability[1]}"
    return f"{_title(used)} comes first" if used else f"torch {torch.__version__} does not know it"


def _title(name: str) -> str:
    return f"FlashAttention {name.removeprefix('FA')} ({PACKAGES[name]})"


def leave_newer_flash(name: str, why: str) -> None:
    """Turns an implementation off for good, and says why."""
    if attention.current_flash_attention_impl() == name:
        attention.restore_flash_attention_impl()
    _LEFT.add(name)
    logging.getLogger("lorakeet").warning(
        "%s %s. Torch's own flash kernel computes attention. Please report it.", _title(name), why
    )


@functools.cache
def _installed(major: int) -> str:
    """The first implementation for GPUs of that compute capability whose package is here; empty if there is none."""
    known = attention.list_flash_attention_impls() if hasattr(attention, "list_flash_attention_impls") else []
    return next((name for name in FIRST.get(major, ()) if name in known and _is_here(PACKAGES[name])), "")


def _is_here(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # the package around it is not here
        return False
    except Exception:  # it is, but does not load: turning it on says why
        return True
