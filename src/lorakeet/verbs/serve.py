"""`lorakeet serve`: one base and many adapters over HTTP, or vLLM with the same adapters."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakeet.errors import ConfigError, EnvironmentProblem, LorakeetError, is_out_of_memory, visible
from lorakeet.memory.budget import larger_than_machine, parse_size
from lorakeet.memory.cuda import out_of_memory_text
from lorakeet.memory.onednn_code import SERVING, limit_code_cache
from lorakeet.models.servable import require_served
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import served_context_of
from lorakeet.models.text.serving import ServingModel
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.certified import base_identity
from lorakeet.runs.terminal import print_address
from lorakeet.serve.access import read_keys
from lorakeet.serve.adapter_store import AdapterStore
from lorakeet.serve.engine import Engine
from lorakeet.serve.free_cores import cores_for_the_engine, engine_cores
from lorakeet.serve.load_places import LoadPlaces
from lorakeet.serve.registry import Registry, expert_capacity
from lorakeet.serve.service import RequestLimits, Service
from lorakeet.verbs.early.serving_options import named_paths, require_servable
from lorakeet.verbs.options import ServeOptions
from lorakeet.verbs.vllm.gpu_memory import require_gpu_memory
from lorakeet.verbs.vllm.with_vllm import serve_with_vllm

CONTEXT = 2048  # default for the tokens of a prompt and its text


@dataclass(frozen=True)
class Served:
    """The adapters that were served, or vLLM's command for them."""

    adapters: tuple[str, ...] = ()
    command: str = ""

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {"adapters": list(self.adapters), "command": self.command}


def serve(options: ServeOptions, *, console: Console) -> Served:
    """Serves until SIGINT or SIGTERM; with engine vllm, starts vLLM (verbs/vllm).

    Raises ConfigError and DataError for what cannot be served, and EnvironmentProblem if a package or the port is missing.
    """
    adapters = named_paths(options.adapter)
    if options.engine == "vllm":
        started = serve_with_vllm(options, adapters, console)
        return Served(tuple(started.adapters), str(started))
    budget = require_servable(options)
    if warning := larger_than_machine(budget):
        console.print(warning, soft_wrap=True)
    from lorakeet.serve.routes.connections import ConnectionLimits  # whose packages are there
    from lorakeet.serve.routes.http import run_server

    limits = RequestLimits(timeout=options.timeout, upload=parse_size(options.upload_limit), stop=options.stop)
    connections = ConnectionLimits(options.connections, options.connections_per_address)
    access = None if options.keys is None else read_keys(options.keys)
    spec = ModelSpec(options.model, dtype=options.dtype, quantize=QuantSpec(method=options.quantize))
    before = require_served(spec, console.print)
    limit_code_cache(SERVING)
    if before.config is not None:
        require_gpu_memory(spec, before, options.slots, _context(options, served_context_of(before.config)), _smaller(options))
    with _on_its_device(options):
        live = ServingModel(text := load_text_model(spec, say=console.print, before=before))
        context = _context(options, served_context_of(text.model.config))
        runner = Engine(text, live.selection, slots=options.slots, context=context, waiting=options.queue, cores=engine_cores())
    store = None if options.adapters_dir is None else AdapterStore(options.adapters_dir, parse_size(options.uploads_total))

    def changed() -> None:
        if store is not None:
            store.remember(registry)

    def announce(port: int) -> None:
        known, where = len(registry.names), f"[{options.host}]" if ":" in options.host else options.host
        served = f"{known} adapter{'' if known == 1 else 's'}"
        lines = [*expert_capacity(registry), f"Serving {registry.base} with {served} at http://{where}:{port}/v1"]
        console.print("\n".join(lines), soft_wrap=True)
        print_address(console, f"http://{where}:{port}/v1", port)

    name = Path(options.model.rpartition(":")[2]).name or options.model  # the last part of its path or id
    registry = Registry(
        live, runner, base=name, budget=budget.limit, changed=changed, uncertified=options.uncertified,
        stored_base=partial(base_identity, spec),
    )  # fmt: skip
    for name, path in adapters.items():
        registry.require_certified(registry.register(name, path).source.path, say=console.print)
    if store is not None:
        store.restore(registry, console.print)
    places = LoadPlaces([*([] if store is None else [store.folder]), *options.lora_paths], adapters)
    service = Service(text, runner, registry, access=access, store=store, limits=limits, places=places)
    with cores_for_the_engine(), _logs(), existing_objects_frozen():
        runner.start()
        try:
            _load_pinned(registry, console)
            run_server(service, host=options.host, port=options.port, ready=announce, connections=connections)
        finally:
            runner.drain(timeout=0.0)
    return Served(registry.names)


def _load_pinned(registry: Registry, console: Console) -> None:
    """Loads the adapters that were pinned before a restart; requests for those that cannot be loaded are refused."""
    for version in registry.versions:
        try:
            if version.pinned:
                registry.release(registry.lease(version.name))
        except (LorakeetError, OSError) as error:
            console.print(f"'{version.name}' is pinned and cannot be loaded: {error}", soft_wrap=True, markup=False)


def _context(options: ServeOptions, most: int | None) -> int:
    """The tokens of the longest sequence. Raises ConfigError for more than the `most` that the model takes."""
    context = options.context
    if context is not None and most is not None and context > most:
        raise ConfigError(f"--context is {context}; {options.model} takes at most {most} tokens.")
    return context or min(CONTEXT, most or CONTEXT)


def _smaller(options: ServeOptions) -> str:
    """What takes less memory."""
    packed = "" if options.quantize == "nf4" else "take --quantize nf4, or "
    cache = f"fewer --slots ({options.slots} now) or a shorter --context ({options.context or CONTEXT:,} now)"
    return f"{packed}give {cache}, since keys and values of all slots lie there"


@contextmanager
def _on_its_device(options: ServeOptions) -> Iterator[None]:
    """A context that turns too little memory of a GPU for the model and its cache into EnvironmentProblem with the remedy."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise EnvironmentProblem(f"{options.model} cannot be served. {out_of_memory_text(error, _smaller(options))}") from error


@contextmanager
def existing_objects_frozen() -> Iterator[None]:
    """A context in which the garbage collector ignores all objects that exist now: a model, thousands of known adapters.

    Adapters that are loaded and unloaded trigger a collection, and a full one stopped the server for 0.3 s (docs/log).
    """
    others = gc.get_freeze_count()  # frozen by the caller; they stay frozen
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not others:
            gc.unfreeze()


_LINE_ENDS = {ord("\n"): "\\n", ord("\t"): "\\t", 0x2028: "\\u2028", 0x2029: "\\u2029"}


class _Line(logging.Formatter):
    """Formats an event as one line: time=… level=… and the message, which has key=value form."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        return f"time={moment} level={record.levelname.lower()} {visible(record.getMessage()).translate(_LINE_ENDS)}"


@contextmanager
def _logs() -> Iterator[None]:
    """A context in which the server logs to standard error."""
    logger, handler = logging.getLogger("lorakeet.serve"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    before, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.propagate = propagates
