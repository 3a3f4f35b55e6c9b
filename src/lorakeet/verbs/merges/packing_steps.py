"""The steps of a merge into packed layers: the live run, rounding to the nearest, error feedback and a finish, each measured."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from torch import nn

from lorakeet.data.chat import Encoder, Example
from lorakeet.data.prepare import Dataset
from lorakeet.errors import ConfigError
from lorakeet.evaluate.compare import Scores, surviving_share
from lorakeet.evaluate.intervals import Estimate
from lorakeet.kinds.terminal import progress_line
from lorakeet.kinds.text.evaluate import TextEvaluator
from lorakeet.kinds.text.reply import ADAPTER, BASE
from lorakeet.merging.requantise import Requantised, round_to_nearest, round_with_feedback
from lorakeet.models.fuse import unfuse
from lorakeet.models.generate.score import row_losses
from lorakeet.models.inject import use_products
from lorakeet.models.modules import block_prefix, find, original_modules
from lorakeet.models.modules import replace as put
from lorakeet.models.streaming.model import StreamedBlocks
from lorakeet.models.text.folded_weights import fold_layers
from lorakeet.models.text.gptq_blocks import LayerSource, pack_blocks, weight_of
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.packed_layout import PackedLayout
from lorakeet.models.text.packed_store import open_packed, write_packed
from lorakeet.planning.packed_merge import calibration, products_of
from lorakeet.quant.construct import meta_base
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.runs.open_adapter import NAME, Opened
from lorakeet.runs.residency import require_planned_attention, stream_closed
from lorakeet.train.text.quantisation_aware import quantisation_aware_finish
from lorakeet.verbs.options import MergeOptions

MICRO_TOKENS = 4096  # through the model at once, without gradients; every packed layer is unpacked once for them
NEAREST, FEEDBACK, FINISHED, WRITTEN = "rounded to the nearest", "error feedback", "error feedback, finished", "written"


@dataclass(frozen=True)
class Merging:
    """The steps of one merge into packed layers; models come and go with what each method returns."""

    opened: Opened
    dataset: Dataset
    layout: PackedLayout
    options: MergeOptions
    console: Console
    scores: dict[str, Scores] = field(default_factory=dict)  # of each system on the held-out rows

    def live(self) -> TextModel:
        gc.collect()  # a model before this one, whose parts know each other
        return self.opened.text_model(self.console, dtype="float32")

    def measure_live(self) -> None:
        """The run's base and its adapter, in fp32."""
        text = self.live()
        with stream_closed(text):
            require_planned_attention(self.opened.residency, text, self.opened.config.model.attention)
            for system in (BASE, ADAPTER):
                self.scores[system] = self._scores(text, system)

    def measure(self, text: TextModel, system: str) -> None:
        self.scores[system] = replace(self._scores(text, BASE), system=system)

    def share(self, system: str) -> Estimate:
        """The share of the held-out gain that a system keeps."""
        scores = self.scores
        return surviving_share(scores[BASE], scores[ADAPTER], scores[system], self.opened.config.evaluate)

    def _scores(self, text: TextModel, system: str) -> Scores:
        use_products(text.model, products_of(self.opened.config.model))
        encoder = Encoder(text.tokenizer, self.opened.config.data, self.dataset.labels)
        evaluated = self.dataset.test or self.dataset.held_out
        config = self.opened.config.changed(train={"micro_tokens": MICRO_TOKENS})
        evaluator = TextEvaluator(config, text, encoder, evaluated, self.console, NAME)
        return evaluator.scores(evaluator.fitting(), system)

    @staticmethod
    def _folded(text: TextModel, path: str) -> nn.Module:
        """That layer with the adapter folded in, plain numbers in fp32 in its place."""
        fold_layers(text.model, NAME, [path])
        return cast(nn.Module, find(text.model, path))

    def rounded(self) -> TextModel:
        """Every layer rounded to the nearest, with scales fitted to it; one at a time is plain numbers."""
        text = self.live()
        if text.streamed is not None:
            return self._repacked(text, self._nearest(text, text.streamed), "nearest")
        for path, read in self.layout.layers.items():
            layer = self._folded(text, path)
            put(text.model, path, PackedLinear(round_to_nearest(read(), weight_of(layer)), layer.bias))  # type: ignore[arg-type]
        return text

    def _nearest(self, text: TextModel, streamed: StreamedBlocks) -> Iterator[dict[str, PackedBase]]:
        """The layers of each block, rounded to the nearest while it is in memory."""
        _require_in_blocks(text, self.layout)
        prefix, count = block_prefix(text.model, text.family)
        for number in range(count):
            found: dict[str, PackedBase] = {}
            with torch.no_grad(), streamed.present(number, then=number):
                for path in self._of_block(f"{prefix}.{number}"):
                    standing = cast(nn.Module, find(text.model, path))
                    layer = self._folded(text, path)
                    found[path] = round_to_nearest(self.layout.layers[path](), weight_of(layer))
                    put(text.model, path, standing)
                    del layer
            text.release()
            yield found

    def _of_block(self, block: str) -> list[str]:
        return [path for path in self.layout.layers if path.startswith(f"{block}.")]

    def _repacked(self, text: TextModel, blocks: Iterator[Mapping[str, PackedBase]], name: str) -> TextModel:
        """The model that streams the packed `blocks` from a store of their own, in place of the streamed `text`."""
        path = cast(Path, self.opened.residency.store) / f"{name}.safetensors"
        with stream_closed(text):
            write_packed(text, blocks, path)
            return open_packed(text, path)

    def with_feedback(self) -> tuple[TextModel, dict[str, Requantised]]:
        """The model with every layer packed by error feedback on the calibration rows, and how each was.

        The packed weights are in the model; of one that streams they are in its store alone.
        """
        text = self.live()
        with stream_closed(text):
            return self._with_feedback(text)

    def _with_feedback(self, text: TextModel) -> tuple[TextModel, dict[str, Requantised]]:
        unfuse(text.model)
        _require_in_blocks(text, self.layout)
        rows, _ = calibration(self.opened, self.dataset, text.tokenizer, self.options.calibration_rows, self._finishes)
        solved: dict[str, Requantised] = {}

        def pack(path: str, *given: object) -> PackedBase:
            latent = self._finishes and path in self.opened.adapter.pairs
            found = round_with_feedback(self.layout.layers[path](), *given, latent=latent)  # type: ignore[arg-type]
            solved[path] = found if text.streamed is None else replace(found, base=meta_base(found.base))
            return found.base

        def layers_of(block: str) -> dict[str, nn.Module]:
            return {path: cast(nn.Module, find(text.model, path)) for path in self._of_block(block)}

        def packed() -> Iterator[dict[str, PackedBase]]:
            layers = LayerSource(layers_of, partial(self._folded, text))
            spill = partial(self.opened.residency.spilled_states, text)
            for block in pack_blocks(text, rows, pack, layers, keep=True, spill=spill):
                step(block.number + 1, block.count, "")
                yield block.layers

        with progress_line(self.console, f"error feedback on {len(rows)} rows") as step:
            if text.streamed is not None:
                return self._repacked(text, packed(), "packed"), solved
            for _ in packed():
                pass
        return text, solved

    @property
    def _finishes(self) -> bool:
        return self.options.finish_steps > 0

    def finished(self, text: TextModel, solved: dict[str, Requantised]) -> Mapping[str, PackedBase]:
        """The layers after the finish where it lowers the loss on the calibration rows, which it does not train on; else none."""
        evaluated, rows = calibration(self.opened, self.dataset, text.tokenizer, self.options.calibration_rows, self._finishes)
        before = self._loss(text, evaluated)
        steps = self.options.finish_steps
        with progress_line(self.console, "finishing,") as progress:
            bases = quantisation_aware_finish(
                text,
                solved,
                self.opened.adapter,
                rows,
                steps=steps,
                spec=self.opened.config.train,
                products=products_of(self.opened.config.model),
                on_step=lambda step, loss: progress(step, steps, f"loss {loss:.4f}"),
            )
        after = self._loss(text, evaluated)
        self.measure(text, FINISHED)
        self.console.print(
            f"{steps} steps through the quantiser moved the loss on {len(evaluated)} calibration rows from "
            f"{before:.4f} to {after:.4f}; {'they are kept' if after < before else 'error feedback alone is kept'}.",
            soft_wrap=True,
        )
        return bases if after < before else {}

    def _loss(self, text: TextModel, rows: Sequence[Example]) -> float:
        use_products(text.model, products_of(self.opened.config.model))  # layers that were packed since then are new
        losses, targets = row_losses(text, rows, micro_tokens=MICRO_TOKENS)
        return float(losses.sum() / targets.sum())


def drop_store(text: TextModel) -> None:
    """Removes the store of a streamed model that was closed."""
    if text.store is not None:
        text.store.path.unlink()


def _require_in_blocks(text: TextModel, layout: PackedLayout) -> None:
    """Raises ConfigError for packed layers outside of the blocks, or where the model has none."""
    prefix, _ = block_prefix(text.model, text.family)
    known = {path for path, _ in original_modules(text.model)}
    outside = sorted(path for path in layout.layers if not path.startswith(f"{prefix}.") or path not in known)
    if outside:
        raise ConfigError(f"Packed layers outside of the blocks cannot be calibrated: {', '.join(outside[:8])}.")
