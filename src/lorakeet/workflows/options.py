"""The list of verbs, and the options of each beside those of the run file. Imports no torch: help and forms are made from it."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from lorakeet.memory.import_cost import without_triton

__all__ = ["VERBS", "Verb", "non_default"]


_RUN = {"help": "A run folder, or a folder with an adapter in PEFT's layout.", "positional": True}
RATES, RANKS, TARGETS = (0.25, 4.0), (4, 8, 16, 32), ("all-linear", "attention", "mlp")  # between which a search chooses
_MEMORY = {
    "help": "The most memory that this may take, such as 2GiB; weights that do not fit are streamed. Without it, memory.budget."
}


@dataclass(frozen=True)
class FinetuneOptions:
    """How a run is started."""

    resume: Path | None = field(default=None, metadata={"help": "Go on with this run folder from its last checkpoint."})
    dry_run: bool = field(default=False, metadata={"help": "Print the plan, parameters, tokens and steps, then stop."})
    budget: str | None = field(default=None, metadata={"help": "Short for --ranks.budget: of --ranks auto or prune."})
    quick: bool = field(
        default=False, metadata={"help": "Try 0.5, 1 and 2 times the learning rate first, also where the run file gives one."}
    )


@dataclass(frozen=True)
class PlanOptions:
    """Short names for the settings that decide how much memory a run takes."""

    rank: int | None = field(default=None, metadata={"help": "Wins over --lora.rank."})
    tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a row and a micro-batch; wins over --data.max_tokens, --train.micro_tokens."}
    )
    quantize: Literal["none", "nf4", "int8"] | None = field(default=None, metadata={"help": "Wins over --model.quantize."})


@dataclass(frozen=True)
class EvaluateOptions:
    """What is measured, and on which rows."""

    run_or_adapter: str = field(metadata=_RUN)
    data: str | None = field(
        default=None, metadata={"help": "File of rows to measure on; without it, the run's test rows, else its held-out rows."}
    )
    config: Path | None = field(
        default=None, metadata={"help": "Run file with the data and model settings; without it, the run's own."}
    )
    base: str | None = field(default=None, metadata={"help": "The base model; without it, the one that run or adapter names."})
    out: Path | None = field(default=None, metadata={"help": "Folder for a report of this measurement; nothing is written else."})
    memory: str | None = field(default=None, metadata=_MEMORY)


@dataclass(frozen=True)
class MergeOptions:
    """Which adapters are merged, how, and where the result goes."""

    runs_or_adapters: tuple[str, ...] = field(
        metadata={"help": "Run folders, or folders with an adapter in PEFT's layout: one or several.", "positional": True}
    )
    out: Path = field(metadata={"help": "Folder to write the merged model, or the combined adapter, to; it must not exist yet."})
    to: Literal["auto", "model", "adapter"] = field(
        default="auto", metadata={"help": "auto folds one adapter into its base and combines several into one adapter."}
    )
    method: Literal["linear", "cat", "svd", "magnitude", "ties", "dare", "della"] = field(
        default="linear",
        metadata={"help": "linear and cat are the exact weighted sum of the changes, svd is it compressed; the others prune."},
    )
    weights: tuple[float, ...] = field(default=(), metadata={"help": "One for each adapter, such as 0.7,0.3; without them 1/n."})
    rank: int | None = field(
        default=None,
        metadata={"help": "Rank of the combined pairs; without it exact sums stay exact, others get the largest one."},
    )
    density: float = field(default=0.5, metadata={"help": "Share of the entries that magnitude, ties, dare and della keep."})
    seed: int = field(default=0, metadata={"help": "What dare and della drop depends on it."})
    into: Literal["original", "dequantised", "auto", "packed"] = field(
        default="auto",
        metadata={"help": "Base of a run on a quantised one: auto measures both on the held-out rows. packed stays quantised."},
    )
    like: str | None = field(
        default=None,
        metadata={"help": "For packed: the GPTQ or NF4 folder or .gguf file whose layout is kept; without it the run's base."},
    )
    calibration_rows: int = field(default=64, metadata={"help": "For packed: training rows on which layers' inputs are seen."})
    finish_steps: int = field(default=0, metadata={"help": "For packed: steps that train the pairs through the quantiser."})
    keep: float = field(default=0.95, metadata={"help": "For packed: least share of the held-out gain that must survive."})
    base: str | None = field(default=None, metadata={"help": "The base model; without it, the one that run or adapter names."})
    dtype: Literal["same", "float32", "bfloat16", "float16"] = field(
        default="same", metadata={"help": "How the merged weights are stored; same keeps what each has in the base."}
    )
    memory: str | None = field(default=None, metadata=_MEMORY)


@dataclass(frozen=True)
class ExtractOptions:
    """Out of which tuned model an adapter is made, of which rank, and where it goes."""

    tuned: str = field(metadata={"help": "The fully tuned model: a folder, package:NAME or a hub id.", "positional": True})
    base: str = field(metadata={"help": "The model that it was tuned from.", "positional": True})
    out: Path = field(metadata={"help": "Folder to write the adapter to; it must not exist yet."})
    rank: int = field(default=16, metadata={"help": "Rank of every pair."})
    whole: Literal["all", "none"] = field(
        default="all",
        metadata={"help": "What no pair can hold (embeddings, head, norms) is kept whole where changed, or named as left out."},
    )
    data: str | None = field(
        default=None, metadata={"help": "File of rows to compare on; without it, texts that the tuned model samples."}
    )


@dataclass(frozen=True)
class QuantizeOptions:
    """Which model is packed, how, and where the result goes."""

    model: str = field(
        metadata={"help": "A model folder, a .gguf file, package:NAME or a hub id, unquantised.", "positional": True}
    )
    method: Literal["nf4", "int8", "gptq"] = field(
        metadata={"help": "nf4 and gptq (needs --calibration) are layouts that transformers loads; int8 only Lorakeet reads."}
    )
    out: Path = field(metadata={"help": "Folder to write the packed model to; it must not exist yet."})
    head: Literal["keep", "quantize"] = field(
        default="keep", metadata={"help": "Whether the output layer over the vocabulary is packed as well."}
    )
    bits: int = field(default=4, metadata={"help": "Bits a weight in gptq: 2, 3, 4 or 8."})
    group_size: int = field(default=128, metadata={"help": "Weights of a row that share a scale in gptq; -1 is the whole row."})
    desc_act: bool = field(default=False, metadata={"help": "Whether gptq makes groups in the order of the inputs' strength."})
    sym: bool = field(default=True, metadata={"help": "Whether gptq's ranges lie evenly around 0; if not, gptq_v2 is written."})
    calibration: str | None = field(default=None, metadata={"help": "File of rows on which gptq sees what each layer reads."})
    calibration_rows: int = field(default=128, metadata={"help": "So many rows of it at most, from the top."})
    calibration_tokens: int = field(default=2048, metadata={"help": "So many tokens of each row at most."})
    memory: str | None = field(
        default=None, metadata={"help": "The most memory the process may hold, such as 3GiB; what is written is the same."}
    )


@dataclass(frozen=True)
class ConvertOptions:
    """Which adapter becomes which format."""

    source: Path = field(metadata={"help": "An adapter: a file or folder of any format, or a run folder.", "positional": True})
    out: Path = field(
        metadata={"help": "File (kohya, diffusers, gguf) or folder (peft, mlx) to write; it must not exist.", "positional": True}
    )
    to: Literal["peft", "kohya", "diffusers", "gguf", "mlx"] = field(metadata={"help": "The format to write."})
    base: Path | None = field(
        default=None, metadata={"help": "The base's folder or config.json: gguf needs it, and the adapter is checked against it."}
    )
    rank: int | None = field(
        default=None, metadata={"help": "Compress what is no pair (LoHa, LoKr; DoRA in gguf) to this rank; its error is printed."}
    )
    error: float | None = field(
        default=None, metadata={"help": "Compress it to the smallest rank whose relative error is at most this, such as 0.01."}
    )


Quant = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "q3_k_l",
    "q3_k_m", "q3_k_s", "q2_k", "iq4_nl", "iq4_xs",
]  # fmt: skip


@dataclass(frozen=True)
class ExportOptions:
    """What is written for which program, and where."""

    run_or_adapter: str = field(metadata=_RUN)
    out: Path = field(metadata={"help": "File (gguf) or folder (ollama) to write; it must not exist yet."})
    to: Literal["gguf", "ollama"] = field(
        default="gguf", metadata={"help": "gguf: one file for llama.cpp and its relatives; ollama: a folder with a Modelfile."}
    )
    quant: Quant = field(
        default="f16", metadata={"help": "How the matrices are stored; all but the first four need llama.cpp (lorakeet[llama])."}
    )
    base: str | None = field(default=None, metadata={"help": "The base model; without it, the one that run or adapter names."})
    separate: bool = field(default=False, metadata={"help": "Keep base and adapter in two files (ollama) instead of merging."})
    push: bool = field(default=False, metadata={"help": "Make the model on a running Ollama server as well."})
    name: str | None = field(default=None, metadata={"help": "The model's name; without it, that of the run folder."})
    host: str = field(default="http://127.0.0.1:11434", metadata={"help": "Address of the Ollama server for --push."})
    memory: str | None = field(default=None, metadata=_MEMORY)


@dataclass(frozen=True)
class VerifyOptions:
    """What is compared with the live adapter, or where the adapter is to run."""

    run_or_adapter: str = field(metadata={**_RUN, "help": "A run folder or an adapter folder; with --deploy also a run file."})
    against: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Merged folder, .gguf model or adapter, Ollama folder, or http address (URL#NAME for one of several)."},
    )
    base: str | None = field(default=None, metadata={"help": "The base model; without it, the one that run or adapter names."})
    base_gguf: Path | None = field(default=None, metadata={"help": "The GGUF file of the base, for a GGUF adapter."})
    precision: Literal["auto", "float32", "float16", "bfloat16", "8-bit", "6-bit", "5-bit", "4-bit", "3-bit", "2-bit"] = field(
        default="auto", metadata={"help": "Which tolerances apply; auto reads it off the file, and takes float16 for a server."}
    )
    rows: int = field(default=16, metadata={"help": "How many held-out rows go through both sides."})
    deploy: Literal["vllm", "llama.cpp", "ollama", "peft"] | None = field(
        default=None, metadata={"help": "Compare nothing; say whether the adapter will load in this program."}
    )
    memory: str | None = field(default=None, metadata=_MEMORY)


@dataclass(frozen=True)
class GenerateOptions:
    """What is drawn, with which model and adapters, and where it goes."""

    prompt: tuple[str, ...] = field(metadata={"help": "What a picture shows; may be repeated.", "whole": True})
    out: Path = field(metadata={"help": "Folder to write the pictures to; it must not exist yet."})
    model: str | None = field(
        default=None,
        metadata={"help": "A folder saved by diffusers, a .safetensors file, or a hub id; without it, the adapter's own."},
    )
    config: str | None = field(
        default=None, metadata={"help": "For a single .safetensors file: the folder of its configurations and tokenizer."}
    )
    adapter: tuple[str, ...] = field(
        default=(), metadata={"help": "NAME=PATH of a run folder or an adapter of any format; may be repeated.", "whole": True}
    )
    weights: dict[str, float] = field(
        default_factory=dict, metadata={"help": "The mix of all pictures, such as a=0.7,b=0.3; one adapter alone counts fully."}
    )
    each: tuple[str, ...] = field(
        default=(), metadata={"help": "A mix for each prompt in turn: a name, base, or names with weights as in a=0.7+b=0.3."}
    )
    count: int = field(default=1, metadata={"help": "Pictures of each prompt."})
    seed: int = field(default=0, metadata={"help": "Of the first picture's noise; further pictures of a prompt count on."})
    steps: int = field(default=30, metadata={"help": "Steps of the model's own sampler."})
    guidance: float | None = field(
        default=None,
        metadata={"help": "How much further than without guidance a picture follows its prompt; 1 is off; else the kind's own."},
    )
    negative: str = field(default="", metadata={"help": "What guidance leads away from."})
    size: str | None = field(
        default=None, metadata={"help": "Width x height in pixels, such as 512x768; without it, the model's own."}
    )
    prediction: Literal["auto", "epsilon", "v_prediction", "flow"] = field(
        default="auto",
        metadata={"help": "What the model predicts; auto takes the word of the adapter's run on it, else of its scheduler."},
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(default="auto", metadata={"help": "Precision of the model."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, mps."})


@dataclass(frozen=True)
class TuneOptions:
    """How long is searched, and between what."""

    results: Path | None = field(default=None, metadata={"help": "Folder for the chosen settings and report; else OUT-tune."})
    minutes: float | None = field(
        default=None, metadata={"help": "The search ends after so many minutes, new seeds of the confirmation included."}
    )
    tokens: int | None = field(
        default=None, metadata={"help": "The search ends after so many trained tokens, new seeds of the confirmation included."}
    )
    quick: bool = field(default=False, metadata={"help": "Only three learning rates: half, once and twice the run file's."})
    together: int = field(default=4, metadata={"help": "Trials that are trained in one pass over the base."})
    rate_factors: tuple[float, ...] = field(
        default=RATES, metadata={"help": "Lowest and highest learning rate, as factors of the run file's."}
    )
    rank_choices: tuple[int, ...] = field(default=RANKS, metadata={"help": "Ranks to choose from."})
    target_choices: tuple[str, ...] = field(
        default=TARGETS, metadata={"help": "Targets to choose from, as in lora.target_modules."}
    )
    seeds: int | None = field(
        default=None,
        metadata={"help": "New seeds of the confirmation; left out, 3. 1 compares what the search trained, as --quick does."},
    )
    difference: float = field(default=0.05, metadata={"help": "Nats a token by which trials should be told apart."})


@dataclass(frozen=True)
class CompressOptions:
    """How far an adapter is cut, and on which rows that is weighed."""

    run: str = field(metadata=_RUN)
    out: Path = field(metadata={"help": "Run folder to write the cut adapter to; it must not exist yet."})
    to: str | None = field(
        default=None, metadata={"help": "Size: parameters such as 0.5M, or 'rank 8'; left out, the smallest within --tolerance."}
    )
    tolerance: str = field(default="1%", metadata={"help": "Share of the gain that may be lost, interval and all."})
    rows: int = field(default=256, metadata={"help": "So many training rows weigh what is cut."})
    weighting: Literal["loss", "activation", "none"] = field(
        default="loss", metadata={"help": "What weighs a cut: inputs and gradients (loss), inputs (activation), or nothing."}
    )
    base: str | None = field(default=None, metadata={"help": "The base model; without it, the one that run or adapter names."})
    config: Path | None = field(default=None, metadata={"help": "Run file with the data settings, for a bare adapter."})
    memory: str | None = field(
        default=None, metadata={"help": "The most memory that this may take, such as 2GiB, unstreamed; else memory.budget."}
    )


@dataclass(frozen=True)
class ServeOptions:
    """Which model and adapters are served, to whom, and what they may take."""

    model: str = field(metadata={"help": "The base: a folder, a .gguf file, package:NAME or a hub id."})
    adapter: tuple[str, ...] = field(default=(), metadata={"help": "name=PATH of an adapter of any format or a run; repeatable."})
    adapters_dir: Path | None = field(
        default=None, metadata={"help": "Folder for uploads and the list of names; adapters that lie in it are served too."}
    )
    memory: str | None = field(
        default=None, metadata={"help": "Memory that adapters may take, such as 2GiB; others wait on disk."}
    )
    slots: int = field(default=16, metadata={"help": "Texts that are written at once."})
    context: int | None = field(
        default=None, metadata={"help": "Most tokens of a text with its prompt; 2048, or fewer where the model takes fewer."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; others than this machine's own need --keys."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 takes a free one."})
    keys: Path | None = field(default=None, metadata={"help": "JSON file of API keys with the adapters that each may use."})
    queue: int = field(default=256, metadata={"help": "Requests that may wait; beyond them the answer is 429."})
    timeout: float = field(default=600.0, metadata={"help": "Seconds that one request may take."})
    upload_limit: str = field(default="1GiB", metadata={"help": "Largest file of an upload."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Precision of the base; auto takes bfloat16 where the processor has it."}
    )
    quantize: Literal["none", "nf4", "int8"] = field(default="none", metadata={"help": "How the base is kept in memory."})
    kernels: Literal["torch", "triton"] = field(
        default="torch", metadata={"help": "triton: kernels for a CUDA device, which were not run on one yet."}
    )
    engine: Literal["lorakeet", "vllm"] = field(
        default="lorakeet", metadata={"help": "vllm checks the adapters against its limits and prints its command."}
    )
    out: Path | None = field(default=None, metadata={"help": "For --engine vllm: folder for copies of what it would misread."})


@dataclass(frozen=True)
class DoctorOptions:
    """The check of the machine has nothing to set."""


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
    config: Literal["none", "file", "shipped"] = "none"  # does the function take a RunConfig first, and where does it come from
    function: str = ""
    reads_rows: bool = True  # without a run file, data.train must be named
    together: bool = False  # whether several processes may do it together
    ends_itself: bool = False  # whether it heeds SIGTERM: it serves until then

    def run(self, options: Any, *, config: Any = None, console: Any) -> Any:
        """Returns the result of the verb's function; imports the module that does the work only now."""
        module, _, name = (self.function or f"{self.name}:{self.name}").partition(":")
        with without_triton():
            function = getattr(import_module(f"lorakeet.workflows.{module}"), name)
            return function(options, console=console) if self.config == "none" else function(config, options, console=console)

    def shipped_config(self) -> Path:
        """Where the run file of this verb lies in the package."""
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
    Verb("finetune", "Train an adapter and prove it against its base.", FinetuneOptions, "file", together=True),
    Verb("plan", "Say how much memory a run will take, without its weights.", PlanOptions, "file", reads_rows=False),
    Verb("tune", "Choose learning rate, rank and targets on held-out rows.", TuneOptions, "file"),
    Verb("evaluate", "Measure a run or an adapter on rows of your own.", EvaluateOptions),
    Verb("merge", "Fold adapters into a model, or combine them; certified.", MergeOptions),
    Verb("compress", "Cut an adapter to the smallest size that shows no loss.", CompressOptions),
    Verb("extract", "Make an adapter out of a fully tuned model.", ExtractOptions),
    Verb("quantize", "Pack a model's linear layers in 4 or 8 bits, on disk.", QuantizeOptions),
    Verb("convert", "Write an adapter in another program's format, and check it.", ConvertOptions),
    Verb("export", "Write the merged model as GGUF or for Ollama, and check it.", ExportOptions),
    Verb("verify", "Prove that what was merged, exported or served is the model.", VerifyOptions),
    Verb("generate", "Draw pictures with an image model and its adapters.", GenerateOptions),
    Verb("serve", "Serve one base with many adapters over HTTP.", ServeOptions, ends_itself=True),
    Verb("doctor", "Check this machine; say what is missing and how to mend it.", DoctorOptions),
)
