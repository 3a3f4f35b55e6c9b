"""The verbs, and the options that each has beside the settings of the run file. Imports no torch, so that --help is quick."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from lorakeet.memory.import_cost import without_triton

__all__ = ["VERBS", "Verb", "non_default"]


_RUN = {"help": "A run folder, or a folder with an adapter in PEFT's layout.", "positional": True}
RATES, RANKS, TARGETS = (0.25, 4.0), (4, 8, 16, 32), ("all-linear", "attention", "mlp")  # that a search chooses from
_MEMORY = {"help": "Memory budget, such as 2GiB; weights that do not fit are streamed. Default: the run's memory.budget."}


@dataclass(frozen=True)
class FinetuneOptions:
    """How a run is started."""

    resume: Path | None = field(default=None, metadata={"help": "Resume this run folder from its last checkpoint."})
    dry_run: bool = field(default=False, metadata={"help": "Print the plan, parameters, tokens and steps, then stop."})
    budget: str | None = field(default=None, metadata={"help": "Short for --ranks.budget, for --ranks auto or prune."})
    quick: bool = field(
        default=False, metadata={"help": "First compare 0.5, 1 and 2 times the learning rate, even if the run file names one."}
    )


@dataclass(frozen=True)
class PlanOptions:
    """Short names of the settings that memory depends on most."""

    rank: int | None = field(default=None, metadata={"help": "Replaces --lora.rank."})
    tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens of a row and of a micro-batch; replaces --data.max_tokens and --train.micro_tokens."},
    )
    quantize: Literal["none", "nf4", "int8"] | None = field(default=None, metadata={"help": "Replaces --model.quantize."})


@dataclass(frozen=True)
class EvaluateOptions:
    """The adapter to evaluate, and the rows."""

    run_or_adapter: str = field(metadata=_RUN)
    data: str | None = field(
        default=None, metadata={"help": "File of rows to evaluate on. Default: the run's test rows, else its held-out rows."}
    )
    config: Path | None = field(
        default=None, metadata={"help": "Run file with the data and model settings. Default: the run's own."}
    )
    base: str | None = field(default=None, metadata={"help": "The base model. Default: the one that the run or adapter names."})
    out: Path | None = field(default=None, metadata={"help": "Folder for a report. Default: none is written."})
    memory: str | None = field(default=None, metadata=_MEMORY)


@dataclass(frozen=True)
class MergeOptions:
    """The adapters to merge, the method, and the output."""

    runs_or_adapters: tuple[str, ...] = field(
        metadata={"help": "Run folders, or folders with an adapter in PEFT's layout: one or several.", "positional": True}
    )
    out: Path = field(metadata={"help": "Folder to write the merged model, or the combined adapter, to; it must not exist yet."})
    to: Literal["auto", "model", "adapter"] = field(
        default="auto", metadata={"help": "auto: one adapter is merged into its base, several are combined into one adapter."}
    )
    method: Literal["linear", "cat", "svd", "magnitude", "ties", "dare", "della"] = field(
        default="linear",
        metadata={"help": "linear, cat: the exact weighted sum; svd: the sum, compressed; the others prune entries."},
    )
    weights: tuple[float, ...] = field(
        default=(), metadata={"help": "One weight for each adapter, such as 0.7,0.3. Default: 1/n each."}
    )
    rank: int | None = field(
        default=None,
        metadata={"help": "Rank of the combined pairs. Default: sums stay exact; the others take the largest rank."},
    )
    density: float = field(default=0.5, metadata={"help": "Share of the entries that magnitude, ties, dare and della keep."})
    seed: int = field(default=0, metadata={"help": "Random seed for dare and della."})
    into: Literal["original", "dequantised", "auto", "packed"] = field(
        default="auto",
        metadata={"help": "Base of a run on a quantised model: auto evaluates both on held-out rows; packed stays quantised."},
    )
    like: str | None = field(
        default=None,
        metadata={"help": "For packed: GPTQ or NF4 folder, or .gguf file, with the layout to use. Default: the run's base."},
    )
    calibration_rows: int = field(default=64, metadata={"help": "For packed: number of training rows for calibration."})
    finish_steps: int = field(default=0, metadata={"help": "For packed: steps of quantisation-aware training."})
    keep: float = field(default=0.95, metadata={"help": "For packed: smallest share of the held-out gain that must remain."})
    base: str | None = field(default=None, metadata={"help": "The base model. Default: the one that the run or adapter names."})
    dtype: Literal["same", "float32", "bfloat16", "float16"] = field(
        default="same", metadata={"help": "Dtype of the merged weights; same: that of each weight in the base."}
    )
    memory: str | None = field(default=None, metadata=_MEMORY)


@dataclass(frozen=True)
class ExtractOptions:
    """The fine-tuned model, its base, and the adapter to extract."""

    tuned: str = field(metadata={"help": "The fully tuned model: a folder, package:NAME or a hub id.", "positional": True})
    base: str = field(metadata={"help": "The model that it was fine-tuned from.", "positional": True})
    out: Path = field(metadata={"help": "Folder to write the adapter to; it must not exist yet."})
    rank: int = field(default=16, metadata={"help": "Rank of every pair."})
    whole: Literal["all", "none"] = field(
        default="all",
        metadata={"help": "Changed tensors that cannot be a pair (embeddings, head, norms): store them whole, or none."},
    )
    data: str | None = field(
        default=None, metadata={"help": "File of rows to compare on. Default: texts that the tuned model samples."}
    )


@dataclass(frozen=True)
class QuantizeOptions:
    """The model to quantise, the method, and the output."""

    model: str = field(
        metadata={"help": "A model folder, a .gguf file, package:NAME or a hub id, unquantised.", "positional": True}
    )
    method: Literal["nf4", "int8", "gptq"] = field(
        metadata={"help": "transformers loads nf4 and gptq (needs --calibration); only Lorakeet loads int8."}
    )
    out: Path = field(metadata={"help": "Folder to write the packed model to; it must not exist yet."})
    head: Literal["keep", "quantize"] = field(
        default="keep", metadata={"help": "Keep the output head as it is, or quantise it too."}
    )
    bits: int = field(default=4, metadata={"help": "Bits per weight in gptq: 2, 3, 4 or 8."})
    group_size: int = field(default=128, metadata={"help": "Weights of a row that share a scale in gptq; -1: the whole row."})
    desc_act: bool = field(default=False, metadata={"help": "gptq: quantise columns by decreasing activation (act-order)."})
    sym: bool = field(default=True, metadata={"help": "gptq: symmetric quantisation; false writes gptq_v2."})
    calibration: str | None = field(default=None, metadata={"help": "File of calibration rows for gptq."})
    calibration_rows: int = field(default=128, metadata={"help": "Use at most this many rows, from the top."})
    calibration_tokens: int = field(default=2048, metadata={"help": "Use at most this many tokens of each row."})
    memory: str | None = field(default=None, metadata={"help": "Memory budget, such as 3GiB; the output is the same."})


@dataclass(frozen=True)
class ConvertOptions:
    """The adapter to convert, and the format."""

    source: Path = field(metadata={"help": "An adapter: a file or folder of any format, or a run folder.", "positional": True})
    out: Path = field(
        metadata={"help": "File (kohya, diffusers, gguf) or folder (peft, mlx) to write; it must not exist.", "positional": True}
    )
    to: Literal["peft", "kohya", "diffusers", "gguf", "mlx"] = field(metadata={"help": "The format to write."})
    base: Path | None = field(
        default=None, metadata={"help": "The base's folder or config.json, to check the adapter against; required for gguf."}
    )
    rank: int | None = field(
        default=None, metadata={"help": "Compress LoHa, LoKr (and DoRA for gguf) to this rank; prints the error."}
    )
    error: float | None = field(
        default=None, metadata={"help": "Compress them to the smallest rank with at most this relative error, such as 0.01."}
    )


Quant = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "q3_k_l",
    "q3_k_m", "q3_k_s", "q2_k", "iq4_nl", "iq4_xs",
]  # fmt: skip


@dataclass(frozen=True)
class ExportOptions:
    """The files to write, and for which program."""

    run_or_adapter: str = field(metadata=_RUN)
    out: Path = field(metadata={"help": "File (gguf) or folder (ollama) to write; it must not exist yet."})
    to: Literal["gguf", "ollama"] = field(
        default="gguf", metadata={"help": "gguf: one file for llama.cpp and its relatives; ollama: a folder with a Modelfile."}
    )
    quant: Quant = field(
        default="f16", metadata={"help": "Type of the matrices; all but the first four need llama.cpp (lorakeet[llama])."}
    )
    base: str | None = field(default=None, metadata={"help": "The base model. Default: the one that the run or adapter names."})
    separate: bool = field(default=False, metadata={"help": "Keep base and adapter in two files (ollama) instead of merging."})
    push: bool = field(default=False, metadata={"help": "Also create the model on a running Ollama server."})
    name: str | None = field(default=None, metadata={"help": "Name of the model. Default: the run folder's."})
    host: str = field(default="http://127.0.0.1:11434", metadata={"help": "Address of the Ollama server for --push."})
    memory: str | None = field(default=None, metadata=_MEMORY)


@dataclass(frozen=True)
class VerifyOptions:
    """What to compare with the live adapter, or the program that is to load it."""

    run_or_adapter: str = field(metadata={**_RUN, "help": "A run folder or an adapter folder; with --deploy also a run file."})
    against: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Merged folder, .gguf model or adapter, Ollama folder, or http address (URL#NAME for one of several)."},
    )
    base: str | None = field(default=None, metadata={"help": "The base model. Default: the one that the run or adapter names."})
    base_gguf: Path | None = field(default=None, metadata={"help": "The GGUF file of the base, for a GGUF adapter."})
    precision: Literal["auto", "float32", "float16", "bfloat16", "8-bit", "6-bit", "5-bit", "4-bit", "3-bit", "2-bit"] = field(
        default="auto", metadata={"help": "Tolerances for this precision; auto: that of the file, and float16 for a server."}
    )
    rows: int = field(default=16, metadata={"help": "Number of held-out rows to compare on."})
    deploy: Literal["vllm", "llama.cpp", "ollama", "peft"] | None = field(
        default=None, metadata={"help": "Compare nothing; check if this program can load the adapter."}
    )
    memory: str | None = field(default=None, metadata=_MEMORY)


@dataclass(frozen=True)
class GenerateOptions:
    """The pictures to draw, and the model and adapters to draw with."""

    prompt: tuple[str, ...] = field(metadata={"help": "The prompt of a picture; may be repeated.", "whole": True})
    out: Path = field(metadata={"help": "Folder to write the pictures to; it must not exist yet."})
    model: str | None = field(
        default=None,
        metadata={"help": "A folder saved by diffusers, a .safetensors file, or a hub id. Default: the adapter's base."},
    )
    config: str | None = field(
        default=None, metadata={"help": "For a single .safetensors file: folder with its configs and tokenizer."}
    )
    adapter: tuple[str, ...] = field(
        default=(), metadata={"help": "NAME=PATH of a run folder or an adapter of any format; may be repeated.", "whole": True}
    )
    weights: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Weights of the adapters in all pictures, such as a=0.7,b=0.3. Default for one adapter: 1."},
    )
    each: tuple[str, ...] = field(
        default=(), metadata={"help": "One mix for each prompt: a name, base, or names with weights, as in a=0.7+b=0.3."}
    )
    count: int = field(default=1, metadata={"help": "Number of pictures for each prompt."})
    seed: int = field(default=0, metadata={"help": "Random seed of a prompt's first picture; each further picture adds 1."})
    steps: int = field(default=30, metadata={"help": "Steps of the model's sampler."})
    guidance: float | None = field(
        default=None,
        metadata={"help": "Classifier-free guidance scale; 1 turns it off. Default: that of the model's type."},
    )
    negative: str = field(default="", metadata={"help": "Negative prompt."})
    size: str | None = field(
        default=None, metadata={"help": "Width x height in pixels, such as 512x768. Default: the model's own."}
    )
    prediction: Literal["auto", "epsilon", "v_prediction", "flow"] = field(
        default="auto",
        metadata={"help": "What the model predicts; auto: as in the adapter's run, else as the model's scheduler says."},
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(default="auto", metadata={"help": "Precision of the model."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, mps."})


@dataclass(frozen=True)
class TuneOptions:
    """The budget of a search, and what it chooses from."""

    results: Path | None = field(
        default=None, metadata={"help": "Folder for the chosen settings and the report. Default: OUT-tune."}
    )
    minutes: float | None = field(default=None, metadata={"help": "Minutes that search and confirmation may take."})
    tokens: int | None = field(default=None, metadata={"help": "Tokens that search and confirmation may train on."})
    quick: bool = field(
        default=False, metadata={"help": "Compare three learning rates only: half, once and twice the run file's."}
    )
    together: int = field(default=4, metadata={"help": "Number of trials that are trained together over one base."})
    rate_factors: tuple[float, ...] = field(
        default=RATES, metadata={"help": "Lowest and highest learning rate, as factors of the run file's."}
    )
    rank_choices: tuple[int, ...] = field(default=RANKS, metadata={"help": "Ranks to choose from."})
    target_choices: tuple[str, ...] = field(
        default=TARGETS, metadata={"help": "Targets to choose from, as in lora.target_modules."}
    )
    seeds: int | None = field(
        default=None,
        metadata={"help": "New seeds for the confirmation. Default: 3; 1, as with --quick, compares the search's own adapters."},
    )
    difference: float = field(default=0.05, metadata={"help": "Smallest difference of interest, in nats per token."})


@dataclass(frozen=True)
class CompressOptions:
    """The size of the compressed adapter, and the rows that decide what is cut."""

    run: str = field(metadata=_RUN)
    out: Path = field(metadata={"help": "Run folder for the compressed adapter; it must not exist yet."})
    to: str | None = field(
        default=None, metadata={"help": "Size: parameters such as 0.5M, or 'rank 8'. Default: the smallest within --tolerance."}
    )
    tolerance: str = field(
        default="1%", metadata={"help": "Largest loss, as a share of the held-out gain; the whole interval must be below it."}
    )
    rows: int = field(default=256, metadata={"help": "Number of training rows to weigh the cut by."})
    weighting: Literal["loss", "activation", "none"] = field(
        default="loss",
        metadata={"help": "What a cut is weighed by: inputs and gradients (loss), inputs (activation), or nothing."},
    )
    base: str | None = field(default=None, metadata={"help": "The base model. Default: the one that the run or adapter names."})
    config: Path | None = field(default=None, metadata={"help": "Run file with the data settings, for a bare adapter."})
    memory: str | None = field(
        default=None, metadata={"help": "Memory budget, such as 2GiB; nothing is streamed. Default: the run's memory.budget."}
    )


@dataclass(frozen=True)
class ServeOptions:
    """The model and adapters to serve, and the limits of the server."""

    model: str = field(metadata={"help": "The base: a folder, a .gguf file, package:NAME or a hub id."})
    adapter: tuple[str, ...] = field(default=(), metadata={"help": "name=PATH of an adapter of any format or a run; repeatable."})
    adapters_dir: Path | None = field(
        default=None, metadata={"help": "Folder for uploads and the list of names; adapters in it are served too."}
    )
    memory: str | None = field(default=None, metadata={"help": "Memory budget for adapters, such as 2GiB; others stay on disk."})
    slots: int = field(default=16, metadata={"help": "Number of texts generated at once."})
    context: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a prompt and its text. Default: 2048, or the model's limit if that is less."},
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; any but this machine's own needs --keys."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 takes a free one."})
    keys: Path | None = field(default=None, metadata={"help": "JSON file with API keys and the adapters that each may use."})
    queue: int = field(default=256, metadata={"help": "Number of requests that may wait; more are answered with 429."})
    timeout: float = field(default=600.0, metadata={"help": "Seconds that one request may take."})
    upload_limit: str = field(default="1GiB", metadata={"help": "Largest file of an upload."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Precision of the base; auto: bfloat16 if the processor supports it."}
    )
    quantize: Literal["none", "nf4", "int8"] = field(default="none", metadata={"help": "Quantisation of the base in memory."})
    kernels: Literal["torch", "triton"] = field(
        default="torch", metadata={"help": "triton: kernels for a CUDA device; not yet run on one."}
    )
    engine: Literal["lorakeet", "vllm"] = field(
        default="lorakeet", metadata={"help": "vllm: check the adapters for vLLM and print its command."}
    )
    out: Path | None = field(
        default=None, metadata={"help": "For --engine vllm: folder for copies of adapters that it would misread."}
    )


@dataclass(frozen=True)
class DoctorOptions:
    """No options."""


def non_default(options: Any) -> dict[str, Any]:
    """Returns the names and values of the options that differ from their defaults; those without a default are always there."""
    found = {}
    for spec in fields(options):
        value = getattr(options, spec.name)
        default = spec.default_factory() if spec.default_factory is not MISSING else spec.default
        if value != default:
            found[spec.name] = value
    return found


@dataclass(frozen=True)
class Verb:
    """One verb: `run` calls the function of the same name in the module of the same name, unless `function` names another."""

    name: str
    summary: str
    options: type[Any]
    config: Literal["none", "file", "shipped"] = "none"  # where the RunConfig comes from, if the function takes one
    function: str = ""
    reads_rows: bool = True  # without a run file, data.train must be named
    together: bool = False  # can be started by torchrun
    ends_itself: bool = False  # handles SIGTERM itself: it serves until then

    def run(self, options: Any, *, config: Any = None, console: Any) -> Any:
        """Returns the result of the verb's function; imports the module that does the work only now."""
        module, _, name = (self.function or f"{self.name}:{self.name}").partition(":")
        with without_triton():
            function = getattr(import_module(f"lorakeet.workflows.{module}"), name)
            return function(options, console=console) if self.config == "none" else function(config, options, console=console)

    def shipped_config(self) -> Path:
        """The path of this verb's run file in the package."""
        path: Path = import_module(f"lorakeet.workflows.{self.name}").config_path()
        return path


VERBS = (
    Verb(
        "quickstart",
        "Fine-tune a small model on real reviews, start to end.",
        FinetuneOptions,
        "shipped",
        "finetune:finetune",
        together=True,
    ),
    Verb("finetune", "Train an adapter and evaluate it against its base.", FinetuneOptions, "file", together=True),
    Verb("plan", "Forecast the memory of a run, without its weights.", PlanOptions, "file", reads_rows=False),
    Verb("tune", "Choose learning rate, rank and targets on held-out rows.", TuneOptions, "file"),
    Verb("evaluate", "Evaluate a run or an adapter on rows of your own.", EvaluateOptions),
    Verb("merge", "Merge adapters into a model, or combine them; certified.", MergeOptions),
    Verb("compress", "Cut an adapter to the smallest size that shows no loss.", CompressOptions),
    Verb("extract", "Extract an adapter from a fully fine-tuned model.", ExtractOptions),
    Verb("quantize", "Quantise a model's linear layers to 4 or 8 bits, on disk.", QuantizeOptions),
    Verb("convert", "Write an adapter in another program's format, and check it.", ConvertOptions),
    Verb("export", "Write the merged model as GGUF or for Ollama, and check it.", ExportOptions),
    Verb("verify", "Prove that what was merged, exported or served is the model.", VerifyOptions),
    Verb("generate", "Draw pictures with an image model and its adapters.", GenerateOptions),
    Verb("serve", "Serve one base with many adapters over HTTP.", ServeOptions, ends_itself=True),
    Verb("doctor", "Check this machine: what is missing and how to install it.", DoctorOptions),
)
