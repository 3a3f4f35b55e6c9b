"""Machines by name, for plans of a run on a machine that is not here: what is free on each."""

from __future__ import annotations

from dataclasses import dataclass

from lorakeet.config import RunConfig
from lorakeet.errors import ConfigError
from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.budget import Budget
from lorakeet.memory.cuda import CONTEXT
from lorakeet.memory.free import MARGIN, free_memory
from lorakeet.models.placement import planned_on

THIS = "this"
GPUS = {8: 8188, 12: 12044, 16: 15102, 24: 22731, 48: 46068, 80: 81038}  # GB as sold: MiB of the smallest such GPU
RUNNING = 600 << 20  # bytes of a GPU that a context, a desktop and its driver take before a run
COMPUTERS = (8, 16, 32, 64)  # GB of memory
USABLE = 0.75  # of a computer's memory, beside its system, a desktop and a browser


@dataclass(frozen=True)
class KnownMachine:
    """One entry of the list: the device of a run there, and what such a run may use, in bytes."""

    name: str
    words: str
    device: str
    free: int

    @property
    def memory(self) -> Budget:
        """What is free there, as the bound of a run without a budget."""
        return Budget(self.free, bytes_text(self.free), self.words)


def known_machines() -> tuple[KnownMachine, ...]:
    """All of them. Of a GPU the driver and a desktop take RUNNING, and MARGIN is left, as memory/free leaves it on a real one."""
    gpus = (
        KnownMachine(f"gpu-{size}", f"a GPU of {size} GB", "cuda:0", (mib << 20) - RUNNING + CONTEXT - MARGIN)
        for size, mib in GPUS.items()
    )
    computers = (
        KnownMachine(f"cpu-{size}", f"a computer with {size} GB and no GPU", "cpu", int(USABLE * (size << 30)))
        for size in COMPUTERS
    )
    return (*gpus, *computers)


def on_machine(config: RunConfig, name: str) -> tuple[RunConfig, Budget]:
    """The settings on the machine `name`, and what is free there; THIS is this one, as it is now.

    Raises ConfigError together with memory.budget, which is a bound of its own, and for an unknown name.
    """
    if config.memory.limit:
        raise ConfigError(f"--machine is {name}, but memory.budget is {config.memory.limit}; leave one of them out.")
    if name == THIS:
        return config, free_memory(planned_on(config.model.device))
    found = {machine.name: machine for machine in known_machines()}
    if name not in found:
        raise ConfigError(f"--machine is {name!r}; expected one of {THIS}, {', '.join(found)}.")
    return config.changed(model={"device": found[name].device}), found[name].memory
