"""An adapter as a Python value: read from any format, looked into, written to another format."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from lorakeet.api.arguments import as_argument, python_call
from lorakeet.api.display import table_of
from lorakeet.core.adapter import Adapter, Pair
from lorakeet.errors import ConfigError, VerificationFailed, nearest
from lorakeet.formats.compare import compare_adapters
from lorakeet.formats.detect import read_certified
from lorakeet.formats.peft import peft
from lorakeet.merging.combine import CombineSpec, combination
from lorakeet.runs.output_paths import require_absent, temporary_folder
from lorakeet.runs.terminal import TerminalConsole
from lorakeet.settings import load as load_settings
from lorakeet.train.durable import new_folder
from lorakeet.verbs.convert import convert
from lorakeet.verbs.options import ConvertOptions

_SHOWN = 40  # pairs in a notebook


class AdapterValue(Adapter):
    """Named pairs of A and B. `adapter[path]` is a pair: its `A`, `B`, `alpha`, `rank`, `scale` and `delta()`."""

    @classmethod
    @python_call(as_argument)
    def read(cls, path: str | Path, *, quiet: bool = False, uncertified: bool = False) -> AdapterValue:
        """The adapter at `path`: a run folder, or a file or folder of PEFT, MLX, kohya, LyCORIS, diffusers or GGUF.

        What a reader assumes is printed, unless `quiet`. Raises DataError or ConfigError with everything that is wrong, and
        VerificationFailed for another content than its certificate was made for, unless `uncertified`.
        """
        say = (lambda _: None) if quiet else print
        return cls.of(read_certified(Path(path), uncertified=uncertified, say=say)[0])

    @classmethod
    def of(cls, adapter: Adapter) -> AdapterValue:
        """The same adapter with these methods."""
        return cls(**{field.name: getattr(adapter, field.name) for field in fields(Adapter)})

    @python_call(as_argument)
    def write(self, path: str | Path, *, format: str = "peft", base: str | Path | None = None, quiet: bool = True) -> Path:
        """Writes the adapter to the new file or folder `path`, reads it back and compares every ΔW; returns `path`.

        `format`: peft, kohya, diffusers, gguf or mlx; gguf needs `base`. ConfigError if the format cannot hold the adapter;
        VerificationFailed if what was read back differs.
        """
        path = Path(path)
        if format == "peft":
            require_absent(path)
            with new_folder(path) as folder:
                peft.write(self, folder)
                compared = compare_adapters(self, peft.read(folder))
                if not compared.equal:
                    why = "; ".join(compared.problems[:5])
                    raise VerificationFailed(f"What was written is not this adapter, so {path} was not kept: {why}.")
            return path
        source = path.with_name(f".{path.name}.source")
        with temporary_folder(source, f"The folder {source}", "Free some space."):
            peft.write(self, source)
            mapping = {"source": str(source), "out": str(path), "to": format, "base": None if base is None else str(base)}
            convert(load_settings(ConvertOptions, mapping, where="Adapter.write"), console=TerminalConsole(quiet=quiet))
        return path

    def __getitem__(self, path: str) -> Pair:
        if path not in self.pairs:
            raise KeyError(f"The adapter has no pair at {path!r}.{nearest(path, self.pairs)} It has {len(self.pairs)} pairs.")
        return self.pairs[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __contains__(self, path: object) -> bool:
        return path in self.pairs

    def __str__(self) -> str:
        ranks = sorted({pair.rank for pair in self.pairs.values()})
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no pairs"
        base = self.named_base or "no named base"
        return f"Adapter of {len(self.pairs)} pairs, {shown}, {self.parameters:,} parameters, for {base}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(path, "×".join(map(str, pair.weight_shape)), pair.rank, f"{pair.scale:g}") for path, pair in self.pairs.items()]
        more = f"<p>… and {len(rows) - _SHOWN:,} more</p>" if len(rows) > _SHOWN else ""
        return f"<p>{html.escape(str(self))}</p>{table_of([('weights', 'shape', 'rank', 'scale'), *rows[:_SHOWN]])}{more}"


@python_call(as_argument)
def combine(
    adapters: Mapping[str, Adapter],
    *,
    weights: Sequence[float] = (),
    method: str = "linear",
    rank: int | None = None,
    seed: int = 0,
) -> AdapterValue:
    """One adapter with the weighted sum of several ΔW, by name; weights are 1/n each if none are given.

    `method`: linear, cat, svd, magnitude, ties, dare or della; linear and cat are exact. Raises ConfigError for adapters that
    cannot be combined, and for a wrong number of weights.

    Examples:
        >>> import torch, lorakeet as lk
        >>> from lorakeet.core.adapter import Pair
        >>> pair = Pair(A=torch.ones(1, 3), B=torch.ones(2, 1), alpha=2.0)
        >>> mixed = lk.combine({"a": lk.Adapter({"q_proj": pair}), "b": lk.Adapter({"q_proj": pair})}, weights=(0.75, 0.25))
        >>> mixed["q_proj"].delta()
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
    """
    if not adapters:
        raise ConfigError("There is nothing to combine: adapters is empty. Give them by name, such as {'a': a, 'b': b}.")
    mapping = {"method": method, "weights": list(weights), "rank": rank, "seed": seed}
    return AdapterValue.of(combination(adapters, load_settings(CombineSpec, mapping, where="lk.combine")).combined().adapter)
