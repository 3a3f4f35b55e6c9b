"""Loads a text model and checks, on a few tokens, that Lorakeet computes the model's own logits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from lorakeet.data.pack import Batch
from lorakeet.errors import ConfigError, DataError, EnvironmentProblem, LorakeetError, is_of_the_device, one_message
from lorakeet.formats.files.json_object import read_object
from lorakeet.kernels.cpu import compile as native
from lorakeet.models.attention import VARLEN, register
from lorakeet.models.families import family_of_model
from lorakeet.models.files.dense import load_dense, take_generation_settings
from lorakeet.models.files.foreign_code import read_native
from lorakeet.models.files.quantized import load_quantised
from lorakeet.models.files.quiet import one_at_a_time, quiet_transformers
from lorakeet.models.files.source import find_source
from lorakeet.models.files.stored_tensors import stored_quantisation
from lorakeet.models.files.validate import first_line, require_architecture, require_sizes, require_text_model
from lorakeet.models.missing_libraries import missing_libraries
from lorakeet.models.modules import block_prefix, decoder_of
from lorakeet.models.placement import device_for, products_for, text_dtype_for
from lorakeet.models.row_rotary import choose_by_row
from lorakeet.models.spec import ModelSpec
from lorakeet.models.streaming.load import Changes, Residence, streamed_model
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.row_masks import masks_by_kind, recurrent_kinds
from lorakeet.quant.gptq_config import METHOD, OLD_CONFIG
from lorakeet.quant.int8 import enable_int8_products
from lorakeet.quant.packed import PackedBase
from lorakeet.quant.spec import QuantSpec
from lorakeet.quant.stack import PackedStack

CHECK_ROWS = (5, 3)  # tokens of the two rows of the check
_MOST_IDS = 1 << 31
HEAD_SIZES = (10.0, 100.0, 1000.0)  # the largest logit of the states on which the head is checked besides its own
HEAD_TOLERANCE = 8  # in units of the dtype's rounding: both sides multiply the same numbers
ATTENTION_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative to the largest logit


@dataclass(frozen=True)
class ReadBefore:
    """What was read of a model before its weights are: its folder, configuration and tokenizer; None what was not."""

    source: Path | None = None
    config: Any = None
    tokenizer: Any = None


@one_at_a_time
def load_text_model(
    spec: ModelSpec,
    *,
    say: Callable[[str], None] | None = None,
    store: Path | None = None,
    slots: int = 2,
    pinned: bool = False,
    ends: bool = False,
    changes: Changes | None = None,
    before: ReadBefore = ReadBefore(),
) -> TextModel:
    """Loads the model of `spec`, frozen and checked; what of it was read `before` is not read again.

    `say` gets messages for the user (default: the log). With a folder `store`, its blocks are streamed from a store there,
    `slots` of them on the device (models/streaming/model), with `changes` made to its weights; `pinned` keeps all of them in
    pinned host memory, for a CUDA device. With `ends` its embedding and its head are on the device too.
    Raises ConfigError or DataError for a wrong name or damaged files, EnvironmentProblem if the machine lacks something or
    the check of the head or of the attention fails.
    """
    say = say or logging.getLogger("lorakeet").info
    source, device = before.source or find_source(spec, say), device_for(spec.device)
    config = read_config(source) if before.config is None else before.config
    dtype, streamed = text_dtype_for(spec.dtype, device), None
    if store is None:
        model = _model(source, config, dtype, spec.quantize, say).to(device)
    else:
        model, streamed = streamed_model(
            source, config, dtype, quantize=spec.quantize, folder=store, changes=changes, say=say,
            residence=Residence(slots, device, pinned, ends),
        )
        take_generation_settings(model, source)
    _require_end_ids(model, source)
    choose_by_row(model)
    _multiply_in_int8(model, spec)
    text = TextModel(
        model=model,
        tokenizer=load_tokenizer(source) if before.tokenizer is None else before.tokenizer,
        name=spec.path,
        source=source,
        family=family_of_model(model.config),
        device=device,
        dtype=dtype,
        products=products_for(spec, dtype, device),
        streamed=streamed,
    )
    with torch.no_grad(), quiet_transformers():
        reference = _own_logits(text)
        _require_numbers(text, reference)
        check_head(text, reference)
        text = replace(text, why_not_varlen=_choose_attention(text, spec.attention, reference, say))
        text = _with_masks_by_kind(text, reference)
    for line in _what_is_slower(text, spec):
        say(line)
    return text


def _what_is_slower(text: TextModel, spec: ModelSpec) -> Iterator[str]:
    """Yields what runs by torch's operations since something is not installed."""
    if text.device.type == "cpu" and text.products == torch.bfloat16 and native.suits_machine() and (reason := native.why_not()):
        yield f"Attention and elementwise operations run by torch's own operations, which is slower: {reason}."
    yield from missing_libraries(text.device, spec.quantize)


def _multiply_in_int8(model: Any, spec: ModelSpec) -> None:
    """Lets the weights in int8 multiply so, where that is set. Raises ConfigError where there are none."""
    if spec.quantize.int8_products and not enable_int8_products(model):
        raise ConfigError(
            f"model.quantize.int8_products is true, but no weight of {spec.path} is in int8. Set model.quantize.method to "
            "int8."
        )


def _require_end_ids(model: Any, source: Path) -> None:
    """Raises DataError for ids of end tokens that are none: texts would never end, or generation would break."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for one in given if isinstance(given, (list, tuple)) else [] if given is None else [given]:
        if not isinstance(one, int) or isinstance(one, bool) or not -1 <= one < _MOST_IDS:  # -1: none, in older folders
            raise DataError(
                f"{source} has the eos_token_id {repr(given)[:80]}; expected the id of a token, or a list of ids. Correct "
                "generation_config.json there."
            )


def load_tokenizer(folder: Path) -> Any:
    """Loads the tokenizer in `folder`; DataError if it cannot be read."""
    with one_message(f"The tokenizer in {folder} cannot be loaded", "Fetch it again."), quiet_transformers():
        return read_native(AutoTokenizer, folder, local_files_only=True)


def _model(source: Path, config: Any, dtype: torch.dtype, quantize: QuantSpec, say: Callable[[str], None]) -> Any:
    """Loads the frozen model in eval mode, with eager attention, on the CPU; weights stay mapped files where possible."""
    if quantize.method != "none" or stored_quantisation(config):
        model = load_quantised(source, config, dtype, quantize, say)
        take_generation_settings(model, source)
        return model
    return load_dense(source, config, dtype)


def read_config(source: Path) -> Any:
    """Reads the configuration of a model folder; DataError if transformers does not know the model, or it writes no text."""
    require_architecture(source)
    with one_message(f"{source / 'config.json'} cannot be read by transformers", "Fetch it again."):
        with quiet_transformers():
            config = read_native(AutoConfig, source, local_files_only=True)
        if not stored_quantisation(config) and (source / OLD_CONFIG).is_file():  # GPTQ folders of before 2024
            config.quantization_config = {"quant_method": METHOD, **read_object(source / OLD_CONFIG, expected="settings of GPTQ")}
    require_text_model(source / "config.json", config)
    require_sizes(source / "config.json", config)
    return config


def _check_batch(text: TextModel) -> Batch:
    """Returns two rows of ordinary ids with the same first token, every position a target."""
    size = text.model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(sum(CHECK_ROWS)) * 7919 + 11) % size
    tokens[CHECK_ROWS[0]] = tokens[0]  # so that a shared prefix is checked too
    keys = tuple(map(str, range(len(CHECK_ROWS))))
    return Batch(tokens, CHECK_ROWS, torch.arange(len(tokens)), tokens, keys).to(text.device)


def _own_logits(text: TextModel) -> Tensor:
    """The logits of the check's rows (tokens, vocabulary) by the model's own code; EnvironmentProblem if that fails."""
    rows = _check_batch(text).ids.split(list(CHECK_ROWS))  # type: ignore[no-untyped-call]
    try:
        return torch.cat([text.model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
    except LorakeetError:
        raise
    except Exception as error:
        if is_of_the_device(error):
            raise
        raise EnvironmentProblem(
            f"'{text.model.config.model_type}' models cannot be used: the code of transformers {transformers.__version__} for "
            f"them fails on a row of {CHECK_ROWS[0]} tokens ({first_line(error)})."
        ) from error


def _require_numbers(text: TextModel, reference: Tensor) -> None:
    """Raises DataError if the model's own logits are not finite, with the first weight that is not."""
    if bool(reference.isfinite().all()):
        return
    worst = next((name for name, weight in _weights(text) if not bool(weight.isfinite().all())), None)
    what = f"{worst} has NaN or infinite values" if worst else f"its logits have NaN or infinite values in {text.dtype}"
    raise DataError(
        f"The model {text.name} cannot be used: {what}. Fetch it again{'' if worst else ', or set --model.dtype float32'}."
    )


def _weights(text: TextModel) -> Iterator[tuple[str, Tensor]]:
    """Yields every floating-point weight by name: packed ones dequantised, streamed ones read block by block."""
    yield from _numbers_in(text.model, "")
    if text.streamed is not None:
        prefix, count = block_prefix(text.model, text.family)
        for index in range(count):
            with text.streamed.present(index) as block:
                yield from _numbers_in(block, f"{prefix}.{index}.")


def _modules(text: TextModel) -> Iterator[nn.Module]:
    """Yields the model, and the first block of a streamed one with its weights loaded."""
    yield text.model
    if text.streamed is not None:
        with text.streamed.present(0) as block:
            yield block


def _numbers_in(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for path, part in module.named_modules():
        if isinstance(part, PackedBase):
            if part.device.type != "meta":
                yield f"{prefix}{path.removesuffix('.base')}.weight", part.dense()
            continue
        if isinstance(part, PackedStack):
            if part.device.type != "meta":
                yield from ((f"{prefix}{path}.{number}", part.matrix(number).dense()) for number in range(len(part)))
            continue
        for leaf, weight in part.named_parameters(recurse=False):
            if weight.is_floating_point() and not weight.is_meta:
                yield f"{prefix}{path}.{leaf}", weight


def check_head(text: TextModel, reference: Tensor) -> None:
    """Raises EnvironmentProblem unless `head(hidden)` gives the model's own logits `reference`, with the same attention.

    Also on states with which logits are as large as those of trained models: a cap or a factor shows there.
    """
    kind = text.model.config.model_type
    if text.model.get_output_embeddings() is None:
        raise EnvironmentProblem(
            f"Models of type '{kind}' have no output layer over the vocabulary that could be found. {_language_part(text.model)}"
        )
    rows = _check_batch(text).ids.split(list(CHECK_ROWS))  # type: ignore[no-untyped-call]
    states, output = zip(*(_states_and_output(text, row) for row in rows), strict=True)
    _require_same_head(text, torch.cat([text.head(part) for part in states]), reference)
    largest = max(float(reference.abs().max()), torch.finfo(torch.float32).tiny)
    for size in HEAD_SIZES if text.dtype != torch.float16 else HEAD_SIZES[:1]:  # larger ones may not be numbers in fp16
        factor = size / largest
        own = _own_head(text, output[0], states[0] * factor)
        _require_same_head(text, text.head(states[0] * factor), own)


def _language_part(model: nn.Module) -> str:
    """What to do with a wrapper that keeps its head to a part of it: that part is a language model."""
    for name, part in model.named_children():
        if isinstance(part, transformers.PreTrainedModel) and part.get_output_embeddings() is not None:
            return (
                f"Its part {name} has one: save that with the tokenizer (model.{name}.save_pretrained(FOLDER) in transformers), "
                "and name that folder."
            )
    return "Name another model."


def _states_and_output(text: TextModel, row: Tensor) -> tuple[Tensor, Any]:
    """The last hidden states (tokens, hidden) of one row, and the decoder's whole output for it."""
    found: list[Any] = []
    hook = decoder_of(text.model).register_forward_hook(lambda module, given, output: found.append(output))
    try:
        single = Batch(row, (len(row),), torch.arange(len(row), device=row.device), row, ("check",))
        return text.hidden(single), found[-1]
    finally:
        hook.remove()


def _own_head(text: TextModel, output: Any, states: Tensor) -> Tensor:
    """The logits (tokens, vocabulary) that the model's own code computes of `states` (tokens, hidden), without its decoder."""
    decoder = decoder_of(text.model)
    decoder.forward = lambda *_, **__: type(output)(**{**output, "last_hidden_state": states[None]})
    try:
        ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
        return cast(Tensor, text.model(input_ids=ids, use_cache=False).logits[0])
    finally:
        del decoder.forward


def _require_same_head(text: TextModel, logits: Tensor, own: Tensor) -> None:
    worst = float((logits.float() - own.float()).abs().max()) if logits.shape == own.shape else float("inf")
    allowed = HEAD_TOLERANCE * torch.finfo(text.dtype).eps * float(own.abs().max())
    if not worst <= allowed:
        raise EnvironmentProblem(
            f"The head of '{text.model.config.model_type}' models computes its logits in a way that Lorakeet does not know: on "
            f"{len(logits)} tokens the largest difference is {worst:.3g}, where rounding explains {allowed:.3g}. Models of this "
            "type cannot be used yet; please report it."
        )


def _choose_attention(text: TextModel, wanted: str, reference: Tensor, say: Callable[[str], None]) -> str:
    """Sets the first attention that gives the model's own logits; only the `wanted` one, unless that is auto.

    Returns why that is not varlen, where it was tried.
    """
    failures: list[str] = []
    for attention in ("varlen", "sdpa", "eager") if wanted == "auto" else (wanted,):
        failure = _try_attention(text, attention, reference)
        if failure is None:
            if failures:
                say(f"Attention: {attention}, as {'; '.join(failures)}.")
            return failures[0] if failures else ""
        failures.append(failure)
    raise EnvironmentProblem(f"model.attention {wanted} cannot be used: {'; '.join(failures)}. Use model.attention auto.")


def _try_attention(text: TextModel, attention: str, reference: Tensor) -> str | None:
    """Sets `attention` and returns None if the model still gives its own logits; else the reason."""
    kind = text.model.config.model_type
    if attention == "varlen" and (layers := recurrent_kinds(text.model.config)):  # what leaks into a row may look like rounding
        return f"'{kind}' models would pass states on from row to row (layers: {', '.join(layers)})"
    try:
        set_attention(text.model, attention)
        if text.attention != attention:
            return f"'{kind}' models cannot exchange their attention for {attention}"
        logits = text.head(text.hidden(_check_batch(text)))
    except EnvironmentProblem as error:
        return str(error).rstrip(".")
    except Exception as error:  # whatever the model's code raises where it does not know this attention
        if is_of_the_device(error):
            raise
        return f"'{kind}' models do not run with {attention} ({first_line(error)})"
    if attention == "varlen" and (window := _window_in_mask(text)):
        return f"'{kind}' models have a window of {window:,} tokens in their mask alone"
    worst = _away(logits, reference, text.dtype)
    return None if worst is None else f"{attention} gives other logits than the '{kind}' model's own code (by {worst:.3g})"


def _window_in_mask(text: TextModel) -> int | None:
    """The window of a model whose code does not pass it to its attention, nor lists kinds of layers (Moshi); None for others."""
    own = text.model.config.get_text_config()
    window = getattr(own, "sliding_window", None)
    if not window or getattr(own, "layer_types", None):
        return None
    own.sliding_window = 1  # shorter than the rows of the check, which packed attention refuses then
    try:
        text.hidden(_check_batch(text))
    except EnvironmentProblem:
        return int(window)
    finally:
        own.sliding_window = window
    return None


def _away(logits: Tensor, reference: Tensor, dtype: torch.dtype) -> float | None:
    """How far logits of the check are from the model's own; None where rounding to `dtype` explains it."""
    # The median over a row's tokens: rounding may send a single token of a mixture to another expert. The worst row counts:
    # nothing can leak into the first one.
    differences = (logits.float() - reference.float()).abs().amax(1)
    worst = max(float(row.median()) for row in torch.split(differences, list(CHECK_ROWS)))
    return None if worst <= ATTENTION_TOLERANCE[dtype] * float(reference.abs().max()) else worst


def _with_masks_by_kind(text: TextModel, reference: Tensor) -> TextModel:
    """The model with masks for each kind of layer, if its code takes them and gives its own logits with them."""
    batch, trial = _check_batch(text), replace(text, masks_by_kind=True)
    try:
        if masks_by_kind(text.model.config, batch.ids[None], text.dtype) is None:
            return text
        logits = trial.head(trial.hidden(batch))
    except Exception as error:  # whatever the model's code raises where it takes one mask
        if is_of_the_device(error):
            raise
        return text
    return trial if _away(logits, reference, text.dtype) is None else text


def set_attention(model: Any, attention: str) -> None:
    """Sets the model's attention to varlen, sdpa or eager, through transformers' own switch."""
    if attention == "varlen":
        register()
    with quiet_transformers():
        model.set_attn_implementation(VARLEN if attention == "varlen" else attention)
