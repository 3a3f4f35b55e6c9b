"""Adapters over HTTP: vLLM's load and unload, llama.cpp's /lora-adapters, and our own upload, pin, show and certify."""

from __future__ import annotations

import asyncio
from typing import Any

from lorakeet.disk import create
from lorakeet.errors import ConfigError, DataError
from lorakeet.serve.access import Caller
from lorakeet.serve.adapter_store import AdapterStore
from lorakeet.serve.probe import extend_certificate
from lorakeet.serve.registry import Version
from lorakeet.serve.request_fields import Fields
from lorakeet.serve.routes.reply import HttpReply, Incoming, as_json, body_pieces
from lorakeet.serve.service import Service


class TooLarge(DataError):
    """A body or a file is larger than the server takes."""


async def load_adapter(service: Service, caller: Caller, request: Incoming, data: Any) -> HttpReply:
    """POST /v1/load_lora_adapter {"lora_name", "lora_path", "load_inplace", "pinned"}, as vLLM and SGLang have it."""
    caller.require_admin()
    fields = Fields(data)
    fields.refuse({"lora_name", "lora_path", "load_inplace", "pinned", "base_model_name"}, (), {"is_3d_lora_weight": False})
    name, given = fields.text("lora_name"), fields.text("lora_path")
    caller.require_admin(name)
    path = await asyncio.to_thread(service.places.find, caller, given)
    load_in_place, pinned = fields.flag("load_inplace"), fields.flag("pinned")
    await asyncio.to_thread(service.registry.load, name, path, replace=load_in_place, pinned=pinned)
    return HttpReply(f"Success: LoRA adapter '{name}' added successfully.")


async def unload(service: Service, caller: Caller, request: Incoming, data: Any) -> HttpReply:
    """POST /v1/unload_lora_adapter {"lora_name"}."""
    caller.require_admin()
    name = Fields(data).text("lora_name")
    caller.require_admin(name)
    await asyncio.to_thread(_drop, service, caller, name)
    return HttpReply(f"Success: LoRA adapter '{name}' removed successfully.")


async def scales(service: Service, caller: Caller) -> HttpReply:
    """GET /lora-adapters: every adapter with the scale of requests that name none."""
    found = [
        {
            "id": service.registry.number_of(version.name), "path": str(version.source.path),
            "scale": service.scales.get(version.name, 0.0), "task_name": version.name, "prompt_prefix": "",
        }
        for version in service.registry.versions
        if caller.sees(version.name)
    ]  # fmt: skip
    return as_json(found)


async def set_scales(service: Service, caller: Caller, request: Incoming, data: Any) -> HttpReply:
    """POST /lora-adapters [{"id", "scale"}]: sets the scales for requests to the base; unnamed adapters get 0, except for those
    that the caller may not see."""
    caller.require_admin()
    others = {name: scale for name, scale in service.scales.items() if not caller.sees(name)}
    service.scales = {**others, **service.by_number(caller, data)}
    return as_json({"success": True})


async def show(service: Service, caller: Caller, name: str) -> HttpReply:
    """GET /v1/adapters/NAME."""
    return as_json(_about(_seen(service, caller, name)))


async def pin(service: Service, caller: Caller, name: str, data: Any) -> HttpReply:
    """POST /v1/adapters/NAME/pin {"pinned": true}: a pinned adapter stays in memory."""
    caller.require_admin()
    _seen(service, caller, name)
    await asyncio.to_thread(service.registry.pin, name, Fields(data).flag("pinned", True))
    return as_json(_about(service.registry.get(name)))


async def certify(service: Service, caller: Caller, name: str) -> HttpReply:
    """POST /v1/adapters/NAME/certificate: adds to the adapter's certificate that it is served as verified."""
    caller.require_admin()
    version = _seen(service, caller, name)
    if version.certificate is None:
        raise DataError(f"There is no certificate.json beside '{name}' ({version.source.path}); a run folder or a merge has one.")
    probe = await asyncio.to_thread(service.registry.probe, name)
    tolerance = service.registry.prober.allowed(probe.effect)
    written = await asyncio.to_thread(extend_certificate, version.certificate, name, probe, tolerance)
    about = {"passed": written.passed, "artefacts": written.artefacts, "checks": [str(check) for check in written.checks]}
    return as_json({"path": str(version.certificate), **about})


async def receive(service: Service, caller: Caller, request: Incoming, name: str, file: str, upload: str) -> HttpReply:
    """PUT /v1/adapters/NAME/FILE[?upload=ID]: one file of an upload, in pieces; nothing is visible before it is accepted.

    Files of one key and one `upload` belong together.
    """
    caller.require_admin(name)
    limit, size, store = service.limits.upload, 0, _store(service)
    with store.incoming(name, file, _uploader(caller, upload)) as place, create(place) as target:
        await asyncio.to_thread(store.space.grow, place, 0)
        async for piece in body_pieces(request, service.limits.pause):
            size += len(piece)
            if size > limit:
                raise TooLarge(f"{file} is larger than the {limit:,} bytes that this server takes.")
            await asyncio.to_thread(store.space.grow, place, len(piece))
            await asyncio.to_thread(target.write, piece)
    return as_json({"name": name, "file": file, "bytes": size})


async def accept(service: Service, caller: Caller, name: str, data: Any, upload: str) -> HttpReply:
    """POST /v1/adapters/NAME[?upload=ID] {"sha256": {FILE: HEX}, "replace": false}: checks an upload, and only then serves it."""
    caller.require_admin(name)
    store, replace = _store(service), Fields(data).flag("replace")
    digests = data.get("sha256")
    if not isinstance(digests, dict):
        raise ConfigError('"sha256" is missing; expected the SHA-256 of each file of the upload by its name: {FILE: HEX}.')
    uploader = _uploader(caller, upload)
    await asyncio.to_thread(store.accept, name, service.registry, replace=replace, uploader=uploader, digests=digests)
    return as_json(_about(service.registry.get(name)))


async def remove(service: Service, caller: Caller, name: str) -> HttpReply:
    """DELETE /v1/adapters/NAME: unloads it and deletes its uploads."""
    caller.require_admin(name)
    await asyncio.to_thread(_drop, service, caller, name)
    return as_json({"name": name, "removed": True})


def _drop(service: Service, caller: Caller, name: str) -> None:
    """Unloads `name`, and removes its uploads; on a full disk they are removed before the list of names is written."""
    registry, store = service.registry, service.store
    if name not in registry.names:
        if store is not None and store.forget(name, registry):
            return
        raise service.unknown(caller, name)
    written = True
    try:
        registry.unload(name)
    except OSError:
        if store is None:
            raise
        written = False
    finally:
        service.scales.pop(name, None)  # at once: requests to the base must not use it, nor a new adapter of that name get it
    if store is not None:
        store.tidy(name, registry)
        if not written:
            store.remember(registry)


def _seen(service: Service, caller: Caller, name: str) -> Version:
    if not caller.sees(name) or name not in service.registry.names:
        raise service.unknown(caller, name)
    return service.registry.get(name)


def _uploader(caller: Caller, upload: str) -> str:
    return f"{caller.owner}\n{upload}"


def _store(service: Service) -> AdapterStore:
    if service.store is None:
        raise ConfigError("Uploads need a folder to keep them in; start the server with --adapters-dir DIR.")
    return service.store


def _about(version: Version) -> dict[str, Any]:
    probe = version.probe
    about = {
        "name": version.name, "path": str(version.source.path), "format": version.source.found.format,
        "digest": version.source.digest, "bytes": version.source.bytes, "ranks": list(version.source.ranks),
        "scales": list(version.source.scales), "loaded": version.loaded, "pinned": version.pinned, "users": version.users,
        "loads": version.loads, "load_seconds": round(version.load_seconds, 6),
    }  # fmt: skip
    return {**about, "effect": None if probe is None else round(probe.effect, 6)}
