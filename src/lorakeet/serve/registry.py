"""Adapters by name, with versions: thousands known, a few in memory, each checked before it can be requested.

A name points to one version. A new version replaces it in one assignment; running texts keep the old one until they end, and then
its memory is freed. In the model and the prefix cache an adapter is identified by name and content.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lorakeet.core.adapter import Adapter
from lorakeet.errors import ConfigError, EnvironmentProblem, VerificationFailed, nearest
from lorakeet.evaluate.wording import bytes_text
from lorakeet.formats.files.loaded_file import free_spare_memory
from lorakeet.formats.identity import AdapterFiles, find_certificate, require_base, require_certified
from lorakeet.models.text.serving import ServingModel
from lorakeet.serve.adapter_files import AdapterSource, inspect_adapter, read_stored_adapter
from lorakeet.serve.cache_slots import Key, prefix_key
from lorakeet.serve.engine import Engine
from lorakeet.serve.model_names import UnknownModel, check_name, parse_model
from lorakeet.serve.probe import Probe, Prober, compare_record, read_record

log = logging.getLogger("lorakeet.serve")


class AdapterMemoryFull(EnvironmentProblem):
    """The adapters in use fill the memory budget of adapters."""


@dataclass
class Version:
    """One content under one name."""

    name: str
    source: AdapterSource
    key: str = ""  # in the model; empty until the first load
    loaded: bool = False
    users: int = 0
    pinned: bool = False
    retired: bool = False  # its name was unloaded, or points to another version
    used: float = 0.0
    probe: Probe | None = None
    certificate: Path | None = None
    loads: int = 0
    load_seconds: float = 0.0  # the last load


@dataclass(frozen=True)
class Lease:
    """Versions that stay in memory until `Registry.release`; `adapters` are their weights by key."""

    versions: tuple[Version, ...] = ()
    adapters: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The names, for metrics and logs."""
        return "+".join(version.name for version in self.versions)


class Registry:
    """The adapters of one model. Methods may be called from any thread but the engine's, for which loading waits."""

    def __init__(
        self,
        live: ServingModel,
        engine: Engine,
        *,
        base: str,
        budget: int | None = None,
        changed: Callable[[], object] | None = None,
        uncertified: bool = False,
        stored_base: Callable[[], Mapping[str, str]] | None = None,
    ) -> None:
        """`budget`: bytes of adapters in memory and of the copies that texts use, of adapters and of mixes. `changed` is called
        after names are added, removed or replaced. `stored_base` says what the base holds (formats/identity); None: not compared.
        """
        self.live, self.engine, self.base, self.budget = live, engine, base, budget
        self._uncertified = uncertified  # serve adapters that are not what their certificates were made for
        self._stored_base = stored_base
        self.prober = Prober(live.text, live.selection)
        self._changed = changed or (lambda: None)
        self.loaded: Callable[[Version], object] = lambda _: None  # called with every version that was read into memory
        self.compared: Callable[[Version, str], object] = lambda *_: None  # called with same, different or unknown
        self._current: dict[str, Version] = {}
        self._resident: dict[str, Version] = {}  # by key
        self._mixes: Counter[Key] = Counter()  # the leased weighted mixes, which have copies of their own
        self._lock = threading.Lock()  # of the tables, never for long
        self._loading = threading.Lock()  # one load at a time
        self._numbers: dict[str, int] = {}
        self._serial = 0

    @property
    def names(self) -> tuple[str, ...]:
        """All names that can be requested."""
        return tuple(self._current)

    @property
    def versions(self) -> tuple[Version, ...]:
        """The version of each name."""
        return tuple(self._current.values())

    @property
    def resident_bytes(self) -> int:
        """The bytes of the adapters in memory."""
        with self._lock:
            return sum(version.source.bytes for version in self._resident.values())

    @property
    def resident(self) -> int:
        """The number of adapters in memory, including old versions in use."""
        return len(self._resident)

    def number_of(self, name: str) -> int:
        """The number of a name, for llama.cpp's API; it is never given to another name."""
        return self._numbers.setdefault(name, len(self._numbers))

    def get(self, name: str) -> Version:
        """The version that `name` points to; UnknownModel if there is none."""
        found = self._current.get(name)
        if found is None:
            raise UnknownModel(f"No adapter '{name}' is loaded.{nearest(name, self.names)}")
        return found

    def register(
        self, name: str, path: Path, *, pinned: bool = False, probe: Probe | None = None, digest: str = "", private: bool = False
    ) -> Version:
        """Registers an adapter by its header: names, shapes and scale are checked now, its numbers are read on the first request.

        `private`: only this server writes its files, so that they are mapped instead of copied.
        """
        check_name(name, self.base)
        source = inspect_adapter(path, self.live, digest, private=private)
        version = Version(name, source, pinned=pinned, probe=probe, certificate=find_certificate(path))
        with self._lock:
            if name in self._current:
                raise ConfigError(f"An adapter '{name}' is loaded already; unload it first, or load it in place.")
            self._current[name] = version
        self._changed()
        return version

    def load(self, name: str, path: Path, *, replace: bool = False, pinned: bool = False, private: bool = False) -> Version:
        """Reads, checks and probes an adapter; only then the name points to it, in one assignment.

        ConfigError: the name is taken and `replace` is False, or it does not fit; DataError: broken files;
        VerificationFailed: it does not compute what its certificate says; OSError: the change cannot be saved, and what was
        served before is still served.
        """
        check_name(name, self.base)
        source = inspect_adapter(path, self.live, private=private)  # without the lock: it takes longest for what is refused
        with self._loading:
            if name in self._current and not replace:
                raise ConfigError(f"An adapter '{name}' is loaded already; unload it first, or load it in place.")
            version = Version(name, source, pinned=pinned, certificate=find_certificate(path))
            self._bring_to_memory(version, record=True)
            with self._lock:
                old, self._current[name] = self._current.get(name), version
            try:
                self._changed()
            except BaseException:
                with self._lock:
                    if old is None:
                        del self._current[name]
                    else:
                        self._current[name] = old
                self._retire(version)
                raise
            self._retire(old)
        return version

    def unload(self, name: str) -> None:
        """Removes the name at once; the memory is freed when the last text that uses it has ended."""
        with self._loading:
            with self._lock:
                version = self._current.pop(name, None)
            if version is None:
                raise UnknownModel(f"No adapter '{name}' is loaded.{nearest(name, self.names)}")
            self._retire(version)
        free_spare_memory()
        self._changed()

    def pin(self, name: str, pinned: bool) -> None:
        """Pins or unpins an adapter. A pinned one is loaded and never evicted. Nothing changes if memory is full
        (AdapterMemoryFull) or the change cannot be saved (OSError)."""
        version = self.get(name)
        before, version.pinned = version.pinned, pinned
        try:
            if pinned:
                self.release(self.lease_of({name: 1.0}))
            self._changed()
        except BaseException:
            version.pinned = before
            raise

    def lease(self, model: str) -> Lease:
        """Leases the adapters of `model` (serve/model_names): they are in memory until the lease is released."""
        return self.lease_of(parse_model(model, base=(self.base,), known=self._current.keys()))

    def lease_of(self, weights: Mapping[str, float]) -> Lease:
        """As `lease`, for weights by name. AdapterMemoryFull if the adapters in use fill the memory."""
        versions: list[Version] = []
        try:
            for name in weights:
                versions.append(self._use(name))
            adapters = {version.key: weights[version.name] for version in versions}
            single = [version.name for version in versions if not self.live.mixes(version.key)]
            if single and (len(versions) > 1 or set(adapters.values()) != {1.0}):
                raise ConfigError(f"{', '.join(single)} has DoRA or biases, which cannot be mixed; request it alone.")
            self._count_mix(prefix_key(adapters))
            return Lease(tuple(versions), adapters)
        except BaseException:
            self._drop_users(versions)
            raise

    def release(self, lease: Lease) -> None:
        """Ends a lease; old versions without users are freed."""
        mix = prefix_key(lease.adapters)
        with self._lock:
            if _is_mix(mix):
                self._mixes[mix] -= 1
                self._mixes += Counter()  # drops mixes without users
        self._drop_users(list(lease.versions))

    def _count_mix(self, mix: Key) -> None:
        """Counts the copies of a weighted mix; AdapterMemoryFull if they do not fit."""
        if not _is_mix(mix) or self._add_mix_user(mix):
            return
        with self._loading:
            if not self._add_mix_user(mix):
                self._free_memory(0, mix)
                with self._lock:
                    self._mixes[mix] = 1

    def _add_mix_user(self, mix: Key) -> bool:
        """Adds a user to a mix; False if its copies are not counted yet."""
        with self._lock:
            known = mix in self._mixes
            if known:
                self._mixes[mix] += 1
            return known

    def _use(self, name: str) -> Version:
        with self._lock:
            version = self._current.get(name)
            if version is not None and version.loaded:
                version.users += 1
                version.used = time.monotonic()
                return version
        with self._loading:
            version = self.get(name)
            if not version.loaded:
                self._bring_to_memory(version)
            with self._lock:
                version.users += 1
                version.used = time.monotonic()
            return version

    def _drop_users(self, versions: list[Version]) -> None:
        idle = []
        with self._lock:
            for version in versions:
                version.users -= 1
                if version.retired and not version.users and version.loaded:
                    version.loaded = False
                    idle.append(version)
        for version in idle:
            self._evict(version)

    def _retire(self, version: Version | None) -> None:
        if version is None:
            return
        with self._lock:
            version.retired = True
            idle = version.loaded and not version.users
            version.loaded = version.loaded and not idle
        if idle:
            self._evict(version)

    def _bring_to_memory(self, version: Version, *, record: bool = False) -> None:
        """Reads the numbers and attaches them to the model. The first time they are probed if there is a record to compare with
        or one is to be made (`record`); later the files must be unchanged.

        Without a record a probe would show nothing, and delay other texts.
        """
        began = time.perf_counter()
        adapter = self._read_within_budget(version)
        if not version.key:
            self._serial += 1
            version.key = f"{version.name.replace('.', '%')}@{version.source.digest[:12]}-{self._serial}"
        self.live.attach(version.key, adapter)
        if not version.loads:
            try:
                self.compared(version, "same" if self._verify(version, record) else "unknown")
            except BaseException as error:
                self.live.detach(version.key)
                if isinstance(error, VerificationFailed):
                    self.compared(version, "different")
                raise
        with self._lock:
            version.loaded, version.used = True, time.monotonic()
            self._resident[version.key] = version
        version.loads += 1
        version.load_seconds = time.perf_counter() - began
        self.loaded(version)

    def _read_within_budget(self, version: Version) -> Adapter:
        """Reads the numbers once there is memory for them by the files' header, and for what reading holds beside them."""
        expected = version.source
        try:
            self._free_memory(expected.bytes, copied=expected.filled)
            if expected.beside:
                self._free_memory(expected.bytes, beside=expected.beside)
            compare = partial(self.require_certified, say=log.warning) if not version.loads else lambda *_: None
            adapter, version.source = read_stored_adapter(expected, version.name, self.live, compare)
            self._free_memory(version.source.bytes, copied=version.source.filled)  # the files may have changed since
        except BaseException:
            if self.budget is not None:
                self.engine.most_copies = self.budget - self.resident_bytes  # texts may use what was kept for it
            raise
        return adapter

    def require_certified(self, path: Path, read: AdapterFiles | None = None, *, say: Callable[[str], object]) -> None:
        """Compares an adapter and the base with its certificate. VerificationFailed if they differ, unless that is allowed."""
        require_certified(path, read=read, uncertified=self._uncertified, say=say)
        if self._stored_base is not None:
            require_base(path, self._stored_base, quantised=True, uncertified=self._uncertified, say=say)

    def most_alike(self, source: AdapterSource) -> int | None:
        """How many adapters of this size are in memory at once; None without a budget. The last is read beside the others."""
        if self.budget is None:
            return None
        count = 0
        while count < self.budget // max(1, source.bytes):
            stored, sizes = (count + 1) * source.bytes, [source.filled] * count
            peak = max(self._copies_of([*sizes, source.filled]), self._copies_of(sizes) + source.beside)
            if stored + peak > self.budget:
                break
            count += 1
        return count

    def _verify(self, version: Version, record: bool) -> bool:
        """Whether it was compared with a record of it, and is the same. VerificationFailed if it is not."""
        certified = None if version.certificate is None else read_record(version.certificate)
        if not record and certified is None and version.probe is None:
            return False
        found = self.engine.call(lambda: self.prober.probe(version.key)).result()
        same = False
        known = {"the server's record of it": version.probe, str(version.certificate): certified}
        for where, one in known.items():
            allowed = 0.0 if one is None else self.prober.allowed(one.effect)
            if one is None:
                continue
            if compare_record(version.name, found, one, allowed, where):
                same = True
            else:
                about = f"{one.base} in {one.precision}, here {found.base} in {found.precision}"
                log.warning("not compared adapter=%s record=%s reason=%s", version.name, json.dumps(where), json.dumps(about))
        version.probe = found
        return same

    def probe(self, name: str) -> Probe:
        """The probe of an adapter, made now if there is none."""
        lease = self.lease_of({name: 1.0})
        try:
            version = lease.versions[0]
            if version.probe is None:
                version.probe = self.engine.call(lambda: self.prober.probe(version.key)).result()
            return version.probe
        finally:
            self.release(lease)

    def _free_memory(self, needed: int, mix: Key = (), *, copied: int = 0, beside: int = 0) -> None:
        """Evicts the least recently used adapters until `needed` bytes fit the budget, with `beside` bytes of the file that is
        read, and with copies of adapters, one of `copied` bytes in fp32 among them, and of a new `mix`.

        If copies take more than texts can need, they are freed first: running texts copy theirs again.
        """
        while self.budget is not None:
            taken = self.live.table_bytes
            with self._lock:
                stored, copies = sum(version.source.bytes for version in self._resident.values()), self._copies(copied, mix)
                if stored + needed + beside + max(copies, taken) <= self.budget:
                    self.engine.most_copies = self.budget - stored - needed - beside
                    return
                oldest = None
                if taken <= copies:
                    idle = [v for v in self._resident.values() if v.loaded and not v.users and not v.pinned]
                    oldest = min(idle, key=lambda v: v.used, default=None)
                    if oldest is not None:
                        oldest.loaded = False
            if taken > copies:
                self.engine.call(self.live.selection.release).result()
                if self.live.table_bytes >= taken:  # running texts need as much
                    raise self._memory_full(needed, taken, stored, beside)
            elif oldest is None:
                raise self._memory_full(needed, copies, stored, beside)
            else:
                self._evict(oldest)

    def _memory_full(self, needed: int, copies: int, stored: int, beside: int) -> AdapterMemoryFull:
        more = f" and {beside:,} more while it is read" if beside else ""
        what = f"The adapter takes {needed:,} bytes{more}, and" if needed else "The mix needs"
        return AdapterMemoryFull(
            f"{what} copies of {copies:,} bytes for running texts; {stored:,} of {self.budget:,} are taken by adapters in use or "
            "pinned. Try again, unpin one, or start the server with more --memory."
        )

    def _copies(self, copied: int = 0, mix: Key = ()) -> int:
        """The most bytes that copies take (core/batched/mix_copies): one for each running text, of an adapter in memory or of a
        leased mix, which takes what its adapters take together; with a further one of `copied` bytes in fp32, and a `mix`."""
        sizes = {key: version.source.filled for key, version in self._resident.items()}
        mixes = [sum(sizes.get(key, 0) for key, _ in one) for one in (*self._mixes, mix)]
        return self._copies_of([*sizes.values(), *mixes, copied])

    def _copies_of(self, sizes: list[int]) -> int:
        """The bytes of the largest copies, one for each running text; `sizes` are in fp32."""
        largest = sorted(sizes, reverse=True)[: self.engine.cache.slots]
        return sum(largest) * self.live.text.products.itemsize // 4

    def _evict(self, version: Version) -> None:
        """Detaches an unused version from the model; the engine drops its prefixes from the cache after its step."""
        self.live.detach(version.key)
        with self._lock:
            self._resident.pop(version.key, None)
        self.engine.call(lambda: self.engine.slots.forget(version.key))


def _is_mix(adapters: Key) -> bool:
    """True for a weighted mix, whose texts have a copy of their own."""
    return len(adapters) > 1 or any(weight != 1.0 for _, weight in adapters)


def expert_capacity(registry: Registry) -> list[str]:
    """A sentence on how many adapters with pairs on experts are in memory at once; none where none is registered."""
    known = [version.source for version in registry.versions if version.source.of_experts]
    if not known:
        return []
    largest = max(known, key=lambda source: source.bytes + max(source.filled, source.beside))
    who, it = (f"{len(known):,} adapters have", "the largest") if len(known) > 1 else ("An adapter has", "it")
    said = f"{who} pairs on experts, and {it} takes {bytes_text(largest.bytes)} once it is read."
    count = registry.most_alike(largest)
    if count is None:
        return [f"{said} All requested ones stay in memory; --memory limits them."]
    if not count:
        return [f"{said} None of them fits --memory, so that requests for the largest are refused."]
    fit = "one fits" if count == 1 else f"{count:,} fit"
    return [f"{said} Of such, {fit} in memory at once (--memory); the others are read again on their next request."]
