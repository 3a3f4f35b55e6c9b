"""The verbs and their options: each class is the parameter of its verb's function. Imports no torch."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

from lorakeet.errors import ConfigError
from lorakeet.memory.import_cost import without_triton
from lorakeet.registry import declarations
from lorakeet.setting import Removed, setting

__all__ = ["VERBS", "Verb", "non_default"]

RATES, RANKS, TARGETS = (0.25, 4.0), (4, 8, 16, 32), ("all-linear", "attention", "mlp")  # the space of a search
_RUN = "A run folder, or an adapter folder in PEFT's layout."
_BASE = "The base model; the default is the one that the run or adapter names."
_UNCERTIFIED = "Use an adapter whose content is not that of its certificate; results say so."
_MEMORY = "Memory budget, such as 2GiB (default: memory.budget); weights that do not fit are streamed from disk."

_QUICK = Removed((), "Its name did not say what it does.", "try-rates")


def _help(text: str, *, positional: bool = False, whole: bool = False) -> dict[str, Any]:
    """The metadata of an option: its help, whether it has no flag, and whether a comma is part of its text."""
    return {"help": text, "positional": positional, "whole": whole}


@dataclass(frozen=True)
class FinetuneOptions:
    """Options of `lorakeet finetune`."""

    REMOVED: ClassVar[Mapping[str, Removed]] = {"quick": _QUICK}

    resume: Path | None = setting(None, "Resume the run in this folder from its last checkpoint.")
    dry_run: bool = setting(False, "Print the plan, parameters, tokens and steps, then stop.")
    budget: str | None = setting(None, "Same as --ranks.budget: the parameters that --ranks auto or prune may use.")
    seeds: int = setting(1, "Train so many seeds, from train.seed on, and report the spread; the first one's adapter is kept.")
    try_rates: bool = setting(False, "Try 0.5, 1 and 2 times the learning rate first, even if the run file gives one.")


@dataclass(frozen=True)
class QuickstartOptions(FinetuneOptions):
    """Options of `lorakeet quickstart`."""

    yes: bool = setting(False, "Fetch the packages that are missing without a question; without a terminal it is needed.")


MachineName = Literal["this", "gpu-8", "gpu-12", "gpu-16", "gpu-24", "gpu-48", "gpu-80", "cpu-8", "cpu-16", "cpu-32", "cpu-64"]


@dataclass(frozen=True)
class PlanOptions:
    """Options of `lorakeet plan`: short names for settings that decide a run's memory."""

    rank: int | None = setting(None, "Overrides --lora.rank.")
    tokens: int | None = setting(
        None, "Tokens per row and per micro-batch, whatever rows are given; overrides --data.max_tokens and --train.micro_tokens."
    )
    quantize: Literal["none", "nf4", "int8"] | None = setting(None, "Overrides --model.quantize.")
    machine: MachineName | None = setting(
        None, "Machine that the run is planned for: this one as it is now, a GPU, or a computer without one, by its GB of memory."
    )


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `lorakeet evaluate`."""

    run_or_adapter: str = field(metadata=_help(_RUN, positional=True))
    data: str | None = setting(None, "File of rows to evaluate on; the default is the run's test rows, else its held-out rows.")
    config: Path | None = setting(None, "Run file with the data and model settings; the default is the run's own.")
    base: str | None = setting(None, _BASE)
    out: Path | None = setting(None, "Folder for a report; without it no report is written.")
    metric: str | None = setting(None, "Own metric of replies, such as my.py:score; that of the run's settings is not computed.")
    judge: str | None = setting(None, "Model that compares the replies, URL#MODEL; it gets prompts, references and replies.")
    tasks: tuple[str, ...] = setting((), "Tasks of lm-evaluation-harness, such as arc_easy,gsm8k, in place of rows.")
    task_folder: Path | None = setting(None, "Folder with task files of your own (.yaml) for --tasks.")
    task_rows: int | None = setting(None, "Rows of each task; the default is all.")
    task_examples: int | None = setting(None, "Examples before each prompt of a task; the default is the task's own number.")
    task_chat: bool = setting(False, "Send prompts of tasks through the model's chat template.")
    memory: str | None = setting(None, _MEMORY)
    uncertified: bool = setting(False, _UNCERTIFIED)


@dataclass(frozen=True)
class PredictOptions:
    """Options of `lorakeet predict`."""

    run_or_adapter: str = field(metadata=_help(_RUN, positional=True))
    data: str = field(metadata=_help("File of rows to answer, of any format that training reads; labels are not needed."))
    out: Path = field(metadata=_help("File for the rows with their answers: .csv, .tsv, .xlsx or .jsonl; it must not exist yet."))
    column: str | None = setting(None, "Name of the new column; the default is the label column of the training, or answer.")
    text_column: str | None = setting(None, "Column of the text, if it has another name than in training.")
    encoding: str | None = setting(None, "Encoding of the file, such as cp1252; the default is that of the training file.")
    delimiter: str | None = setting(None, "Separator of columns, such as ';'; the default is that of the training file.")
    review: float = setting(0.8, "Mark rows for review whose label has a lower probability, or was measured right less often.")
    max_tokens: int = setting(256, "Longest answer to a prompt in tokens; labels need none.")
    config: Path | None = setting(None, "Run file with the data and model settings; the default is the run's own.")
    base: str | None = setting(None, _BASE)
    memory: str | None = setting(None, _MEMORY)
    uncertified: bool = setting(False, _UNCERTIFIED)


@dataclass(frozen=True)
class MergeOptions:
    """Options of `lorakeet merge`."""

    runs_or_adapters: tuple[str, ...] = field(
        metadata=_help("One or more run folders, or adapter folders in PEFT's layout.", positional=True)
    )
    out: Path = field(metadata=_help("Folder for the merged model or the combined adapter; it must not exist yet."))
    to: Literal["auto", "model", "adapter"] = setting(
        "auto", "auto merges one adapter into its base, and combines several into one adapter."
    )
    method: Literal["linear", "cat", "svd", "magnitude", "ties", "dare", "della"] = setting(
        "linear", "linear and cat are the exact weighted sum, svd a low-rank approximation; the others prune first."
    )
    weights: tuple[float, ...] = setting((), "One weight per adapter, such as 0.7,0.3; the default is 1/n each.")
    rank: int | None = setting(
        None, "Rank of the combined adapter; by default exact sums stay exact, others use the largest rank given."
    )
    density: float = setting(0.5, "Share of the entries that magnitude, ties, dare and della keep.")
    seed: int = setting(0, "Random seed for dare and della.")
    into: Literal["original", "dequantised", "auto", "packed"] = setting(
        "auto", "Base of a quantised run's merge: auto measures both on held-out rows; packed stays quantised."
    )
    like: str | None = setting(
        None, "For packed: the GPTQ or NF4 folder or .gguf file whose layout is used; the default is the run's base."
    )
    calibration_rows: int = setting(64, "For packed: number of training rows used for calibration.")
    finish_steps: int = setting(0, "For packed: steps of quantisation-aware training of the adapter.")
    keep: float = setting(0.95, "For packed: smallest share of the held-out gain that must survive.")
    base: str | None = setting(None, _BASE)
    dtype: Literal["same", "float32", "bfloat16", "float16"] = setting(
        "same", "Dtype of the merged weights; same keeps the dtype of each base weight."
    )
    memory: str | None = setting(None, _MEMORY)
    uncertified: bool = setting(False, _UNCERTIFIED)


@dataclass(frozen=True)
class ExtractOptions:
    """Options of `lorakeet extract`."""

    tuned: str = field(metadata=_help("The fully fine-tuned model: a folder, package:NAME or a hub id.", positional=True))
    base: str = field(metadata=_help("The model that it was fine-tuned from.", positional=True))
    out: Path = field(metadata=_help("Folder for the adapter; it must not exist yet."))
    rank: int = setting(16, "Rank of every pair.")
    whole: Literal["all", "none"] = setting(
        "all", "Store changed embeddings, head and norms, which no low-rank pair can represent, whole or not at all."
    )
    data: str | None = setting(None, "File of rows to compare on; by default texts are sampled from the fine-tuned model.")


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of `lorakeet quantize`."""

    model: str = field(metadata=_help("An unquantised model: a folder, a .gguf file, package:NAME or a hub id.", positional=True))
    method: Literal["nf4", "int8", "gptq"] = field(
        metadata=_help("nf4 and gptq (needs --calibration) are layouts that transformers loads; int8 is read by Lorakeet only.")
    )
    out: Path = field(metadata=_help("Folder for the quantised model; it must not exist yet."))
    head: Literal["keep", "quantize"] = setting("keep", "Keep the output layer (lm_head) as it is, or quantise it too.")
    bits: int = setting(4, "Bits per weight for gptq: 2, 3, 4 or 8.")
    group_size: int = setting(128, "Weights of a row that share a scale in gptq; -1 is the whole row.")
    desc_act: bool = setting(False, "Whether gptq quantises and groups columns in order of decreasing activation (act-order).")
    sym: bool = setting(True, "Whether gptq uses ranges symmetric around 0; if not, format gptq_v2 is written.")
    calibration: str | None = setting(None, "File of calibration rows for gptq.")
    calibration_rows: int = setting(128, "Use at most this many rows.")
    calibration_tokens: int = setting(2048, "Use at most this many tokens of each row.")
    memory: str | None = setting(None, "Memory budget of the process, such as 3GiB; the result is the same.")


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `lorakeet convert`."""

    source: Path = field(metadata=_help("An adapter file or folder of any format, or a run folder.", positional=True))
    out: Path = field(
        metadata=_help("File (kohya, diffusers, gguf) or folder (peft, mlx) to write; it must not exist yet.", positional=True)
    )
    to: Literal["peft", "kohya", "diffusers", "gguf", "mlx"] = field(metadata=_help("The format to write."))
    base: Path | None = setting(
        None, "The base model's folder or config.json, against which the adapter is checked; gguf needs it, except for a run."
    )
    rank: int | None = setting(
        None, "Compress changes that are not low-rank pairs (LoHa, LoKr; DoRA in gguf) to this rank; the error is printed."
    )
    error: float | None = setting(None, "Compress them to the smallest rank whose relative error is at most this, such as 0.01.")
    uncertified: bool = setting(False, _UNCERTIFIED)


Quant = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "q3_k_l",
    "q3_k_m", "q3_k_s", "q2_k", "iq4_nl", "iq4_xs",
]  # fmt: skip


@dataclass(frozen=True)
class ExportOptions:
    """Options of `lorakeet export`."""

    run_or_adapter: str = field(metadata=_help(_RUN, positional=True))
    out: Path = field(metadata=_help("File (gguf) or folder (ollama) to write; it must not exist yet."))
    to: Literal["gguf", "ollama"] = setting(
        "gguf", "gguf: one file for llama.cpp and programs built on it; ollama: a folder with a Modelfile."
    )
    quant: Quant = setting("f16", "Quantisation type of the matrices; all but the first four need llama.cpp (lorakeet[llama]).")
    base: str | None = setting(None, _BASE)
    separate: bool = setting(False, "Write base and adapter as two files instead of merging them (ollama before 0.34.1 only).")
    push: bool = setting(False, "Also create the model on a running Ollama server.")
    name: str | None = setting(None, "Name of the model; the default is that of the run folder.")
    host: str = setting("http://127.0.0.1:11434", "Address of the Ollama server for --push.")
    memory: str | None = setting(None, _MEMORY)
    uncertified: bool = setting(False, _UNCERTIFIED)


@dataclass(frozen=True)
class VerifyOptions:
    """Options of `lorakeet verify`."""

    run_or_adapter: str = field(
        metadata=_help(
            "A run folder or an adapter folder; with --deploy also a run file; for all adapters of a server, a folder of runs.",
            positional=True,
        )
    )
    against: tuple[str, ...] = setting(
        (), "Merged folder, .gguf model or adapter, Ollama folder, or http address (URL#NAME selects one of its models)."
    )
    base: str | None = setting(None, _BASE)
    base_gguf: Path | None = setting(None, "GGUF file of the base, for a GGUF adapter.")
    precision: Literal["auto", "float32", "float16", "bfloat16", "8-bit", "6-bit", "5-bit", "4-bit", "3-bit", "2-bit"] = setting(
        "auto", "Which tolerances apply; auto reads them from the file, and of a server takes what it says, or what is measured."
    )
    rows: int | None = setting(
        None, "Number of held-out rows to compare; the default is 16, and of a server as many more as its proof needs."
    )
    modules: bool = setting(True, "For a server: whether to test that each block and kind of module is applied there.")
    minutes: float = setting(
        1.5, "For a server: minutes of one processor in which that is tested; single modules only if they fit as well."
    )
    deploy: Literal["vllm", "llama.cpp", "ollama", "peft"] | None = setting(
        None, "Only check whether the adapter will load in this program; nothing is compared."
    )
    watch: str | None = setting(
        None, "Address of a running server: compare it again and again, with few rows, and end with exit code 3 when it differs."
    )
    every: str = setting("1h", "Time between two rounds of --watch, such as 30m, 1h or 1d.")
    rounds: int = setting(0, "Number of rounds of --watch; 0: until it differs.")
    metrics: Path | None = setting(None, "File for the metrics of --watch in Prometheus' text format, written after each round.")
    memory: str | None = setting(None, _MEMORY)
    uncertified: bool = setting(False, _UNCERTIFIED)


@dataclass(frozen=True)
class TuneOptions:
    """Options of `lorakeet tune`."""

    REMOVED: ClassVar[Mapping[str, Removed]] = {"quick": _QUICK}

    results: Path | None = setting(None, "Folder for the chosen settings and the report; the default is OUT-tune.")
    minutes: float | None = setting(None, "Stop the search after this many minutes, its confirmation included.")
    tokens: int | None = setting(None, "Stop the search after this many training tokens, its confirmation included.")
    try_rates: bool = setting(False, "Try only three learning rates: half, once and twice the run file's.")
    together: int = setting(4, "Number of trials trained in one pass over the base.")
    rate_factors: tuple[float, ...] = setting(RATES, "Lowest and highest learning rate, as factors of the run file's.")
    rank_choices: tuple[int, ...] = setting(RANKS, "Ranks to choose from.")
    target_choices: tuple[str, ...] = setting(TARGETS, "Targets to choose from, as in lora.target_modules.")
    beta_choices: tuple[float, ...] = setting((), "Values of the loss's beta to choose from, where it has one (dpo and others).")
    seeds: int | None = setting(
        None, "Number of new seeds for the confirmation (default 3); 1 reuses the trials of the search, as --try-rates does."
    )
    difference: float = setting(0.05, "Difference in nats per token that the comparison of trials should detect.")

    def folder(self, out: str) -> Path:
        """The folder of the results of a search from a run file whose `out` is given."""
        return Path(f"{out}-tune") if self.results is None else self.results


@dataclass(frozen=True)
class CompressOptions:
    """Options of `lorakeet compress`."""

    run: str = field(metadata=_help(_RUN, positional=True))
    out: Path = field(metadata=_help("Run folder for the compressed adapter; it must not exist yet."))
    to: str | None = setting(
        None, "Size: parameters such as 0.5M, or 'rank 8'; the default is the smallest that is shown to be as good."
    )
    tolerance: str = setting("2%", "How much held-out loss may grow, as a share of the uncut adapter's, interval included.")
    metric_tolerance: str = setting(
        "2%", "How much accuracy, or the main metric of replies, may fall, in points of 100, interval included."
    )
    rows: int = setting(256, "Number of training rows used to weight the truncation.")
    weighting: Literal["loss", "activation", "none"] = setting(
        "loss", "What weights the truncation: inputs and gradients (loss), inputs (activation), or nothing."
    )
    base: str | None = setting(None, _BASE)
    config: Path | None = setting(None, "Run file with the data settings, for a bare adapter.")
    memory: str | None = setting(None, "Memory budget, such as 2GiB (default: memory.budget); weights are not streamed.")
    uncertified: bool = setting(False, _UNCERTIFIED)


@dataclass(frozen=True)
class ServeOptions:
    """Options of `lorakeet serve`."""

    model: str = field(metadata=_help("The base model: a folder, a .gguf file, package:NAME or a hub id."))
    adapter: tuple[str, ...] = setting((), "NAME=PATH of an adapter of any format or a run folder; may be repeated.")
    adapters_dir: Path | None = setting(
        None, "Folder for uploaded adapters and the list of names; adapters already in it are served too."
    )
    lora_paths: tuple[Path, ...] = setting(
        (), "Folders of adapters from which /v1/load_lora_adapter may load too; it may from --adapters-dir."
    )
    memory: str | None = setting(None, "Memory budget of the adapters, such as 2GiB; the others wait on disk.")
    slots: int = setting(16, "Number of sequences generated at once.")
    context: int | None = setting(
        None, "Longest sequence in tokens, prompt included; the default is 2048, or less if the model takes less."
    )
    host: str = setting("127.0.0.1", "Address to listen on; any but this machine's own requires --keys.")
    port: int = setting(8000, "Port to listen on; 0 picks a free one.")
    keys: Path | None = setting(None, "JSON file of API keys, with the adapters that each may use.")
    queue: int = setting(256, "Number of requests that may wait; further requests are answered with 429.")
    timeout: float = setting(600.0, "Seconds that one request may take.")
    upload_limit: str = setting("1GiB", "Largest file that may be uploaded.")
    uploads_total: str = setting("64GiB", "Most bytes of all uploads on the disk; a further one is answered with 507.")
    stop: float = setting(5.0, "Seconds from SIGTERM or Ctrl-C to the end; texts may end in half of them, then they are cut.")
    connections: int | None = setting(None, "Open connections at once; the default is what open files allow, at most 1,000.")
    connections_per_address: int | None = setting(
        None, "Open connections of one other address (IPv6: of one /64 network); the default is half of all."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Dtype of the base; auto uses bfloat16 if the processor supports it."
    )
    quantize: Literal["none", "nf4", "int8"] = setting("none", "Quantisation of the base in memory.")
    engine: Literal["lorakeet", "vllm"] = setting(
        "lorakeet", "vllm checks the adapters against vLLM's limits, starts vLLM where it is installed, and verifies them there."
    )
    command_only: bool = setting(False, "For --engine vllm: print vLLM's command and start nothing.")
    out: Path | None = setting(None, "For --engine vllm: folder for corrected copies of adapters that vLLM would misread.")
    uncertified: bool = setting(False, _UNCERTIFIED)


@dataclass(frozen=True)
class ChatOptions:
    """Options of `lorakeet chat`."""

    target: str = field(
        metadata=_help(
            "A run, an adapter, a model (folder, .gguf, package:NAME, hub id), or a server's address: URL or URL#MODEL.",
            positional=True,
        )
    )
    adapter: tuple[str, ...] = setting((), "NAME=PATH of a further adapter of any format or a run; may be repeated.")
    base: str | None = setting(None, _BASE)
    system: str | None = setting(None, "System prompt; the default is that of the run's training.")
    plain: bool = setting(False, "Leave each line as it is; else it goes into data.template of a run on labelled texts.")
    max_tokens: int = setting(512, "Most tokens of a reply.")
    temperature: float = setting(0.7, "Sampling temperature; 0 takes the likeliest token.")
    top_p: float = setting(0.95, "Sample among the likeliest tokens that have this probability together.")
    seed: int = setting(0, "Random seed of each reply.")
    context: int = setting(4096, "Longest conversation in tokens.")
    quantize: Literal["none", "nf4", "int8"] | None = setting(
        None, "Quantisation of the base in memory; the default is that of the run's training."
    )
    memory: str | None = setting(None, "Memory budget, such as 2GiB; weights that do not fit are streamed from disk.")
    uncertified: bool = setting(False, _UNCERTIFIED)


@dataclass(frozen=True)
class StudioOptions:
    """Options of `lorakeet studio`."""

    runs: Path = setting(Path("runs"), "Folder of the runs that the page lists, and where it puts new ones.")
    folder: tuple[Path, ...] = setting(
        (), "Folder from which models and rows may be chosen; may be repeated; the default is this folder."
    )
    port: int = setting(8017, "Port to listen on, on this machine's own address alone; 0 picks a free one.")


@dataclass(frozen=True)
class CheckOptions:
    """Options of `lorakeet check`."""

    run: str = field(metadata=_help("A run folder.", positional=True))
    accuracy: str | None = setting(None, "Bound of the accuracy, such as '>=0.75'; it holds at the worse end of the interval.")
    loss: str | None = setting(None, "Bound of the loss in nats a token, such as '<=0.9', or '<=0.9 at value'.")
    drift: str | None = setting(None, "Bound of the drift from the base in nats a token, such as '<=2'.")
    require: tuple[str, ...] = field(
        default=(), metadata=_help("Bound of any metric of the report, such as 'exact_match >=0.5'; may be repeated.", whole=True)
    )
    beats: tuple[str, ...] = field(
        default=(), metadata=_help("A system that the adapter must be shown to be better than, such as base.", whole=True)
    )
    certificate: Literal["passed", "served", "any"] = setting(
        "passed",
        "passed: nothing in its certificate has failed; served: also a server was verified, and each is proved; any: it is not "
        "looked at.",
    )
    uncertified: bool = setting(False, _UNCERTIFIED)


@dataclass(frozen=True)
class PushOptions:
    """Options of `lorakeet push`."""

    run: str = field(metadata=_help("A finished run folder.", positional=True))
    name: str = field(metadata=_help("The repository on the hub, as OWNER/NAME; it is made if it is missing.", positional=True))
    private: bool = setting(False, "Make the repository private; an existing public one is refused.")
    merged: Path | None = setting(None, "Folder that `lorakeet merge` wrote, sent in place of the adapter.")
    gguf: Path | None = setting(None, "File that `lorakeet export` wrote, sent as well.")
    base: str | None = setting(None, "Id of the base model on the hub, for a base that the run names by a path of this machine.")
    report: bool = setting(True, "Send report.html as well, which shows rows of the data.")
    uncertified: bool = setting(False, _UNCERTIFIED)


@dataclass(frozen=True)
class DoctorOptions:
    """`lorakeet doctor` has no options."""


def non_default(options: Any) -> dict[str, Any]:
    """Returns the names and values of the options that differ from their defaults; those without a default are always there."""
    found = {}
    for spec in fields(options):
        value = getattr(options, spec.name)
        default = spec.default_factory() if spec.default_factory is not MISSING else spec.default
        if value != default:
            found[spec.name] = value
    return found


def require_only(options: Any, taken: Sequence[str], kind: str) -> None:
    """Raises ConfigError for options other than those `taken`, which runs of `kind` have no use for."""
    others = [f"--{name.replace('_', '-')}" for name in non_default(options) if name not in taken]
    if others:
        raise ConfigError(f"This is a run of kind {kind}, to which {', '.join(others)} means nothing. Leave it out.")


@dataclass(frozen=True)
class Verb:
    """One verb: `run` calls the function of the same name in the module of the same name, unless `function` names another.

    A module without a dot is one of `verbs`; the studio stands above them.
    """

    name: str
    summary: str
    options: type[Any]
    config: Literal["none", "file", "shipped"] = "none"  # whether the function takes a RunConfig first, and from where
    function: str = ""
    reads_rows: bool = True  # without a run file, data.train must be named
    together: bool = False  # whether torchrun may start it in several processes
    ends_itself: bool = False  # whether it handles SIGTERM itself
    checks: str | None = None  # "module:function" of its early checks; None: those of its name in verbs/early; empty: none

    @property
    def place(self) -> tuple[str, str]:
        """The module of the verb's function, and its name."""
        module, _, name = (self.function or f"{self.name}:{self.name}").partition(":")
        return module if "." in module else f"lorakeet.verbs.{module}", name

    def run(self, options: Any, *, config: Any = None, console: Any) -> Any:
        """Returns the result of the verb's function; imports the module that does the work only now."""
        module, name = self.place
        with without_triton():
            function = getattr(_imported(module), name)
            return function(options, console=console) if self.config == "none" else function(config, options, console=console)

    @property
    def early_checks(self) -> str:
        """What verbs/early/checks has its early checks by; empty for none."""
        return self.name if self.checks is None else self.checks

    def shipped_config(self) -> Path:
        """Returns the path of the verb's run file in the package."""
        return Path(import_module(f"lorakeet.verbs.{self.name}").config_path())


def _imported(module: str) -> ModuleType:
    """The module, without searches for cycles meanwhile: imports leave none, and the searches took a fifth of the time."""
    searched = gc.isenabled()
    gc.disable()
    try:
        return import_module(module)
    finally:
        if searched:
            gc.enable()


VERBS = (
    Verb("quickstart", "Fine-tune a small model on real reviews, start to end.", QuickstartOptions, "shipped", together=True),
    Verb("finetune", "Train an adapter and prove it against its base.", FinetuneOptions, "file", together=True),
    Verb("plan", "Estimate the memory and time of a run, without its weights.", PlanOptions, "file", reads_rows=False),
    Verb("tune", "Choose learning rate, rank, targets and beta on held-out rows.", TuneOptions, "file"),
    Verb("evaluate", "Measure a run or an adapter on rows of your own.", EvaluateOptions),
    Verb("predict", "Answer the rows of a file, and write it with the answers.", PredictOptions),
    Verb("merge", "Merge adapters into a model, or combine them; certified.", MergeOptions),
    Verb("compress", "Compress an adapter to the smallest size shown to be as good.", CompressOptions),
    Verb("extract", "Extract an adapter from a fully fine-tuned model.", ExtractOptions),
    Verb("quantize", "Quantise a model's linear layers to 4 or 8 bits, on disk.", QuantizeOptions),
    Verb("convert", "Write an adapter in another program's format, and check it.", ConvertOptions),
    Verb("export", "Write the merged model as GGUF or for Ollama, and check it.", ExportOptions),
    Verb("verify", "Verify that what was merged, exported or served is the model.", VerifyOptions),
    Verb("check", "Hold a run against requirements, for a pipeline.", CheckOptions, checks=""),
    *(
        Verb(verb.name, verb.summary, verb.options, function=verb.function, checks=verb.checks)
        for kind in declarations().values() for verb in kind.verbs
    ),
    Verb("chat", "Talk to a run, an adapter, a model or a server in the terminal.", ChatOptions),
    Verb("serve", "Serve one base with many adapters over HTTP.", ServeOptions, ends_itself=True),
    Verb("studio", "Do it all in the browser.", StudioOptions, function="lorakeet.studio.start:studio"),
    Verb("push", "Share a run on a model hub, with its certificate.", PushOptions, function="push:push_run"),
    Verb("doctor", "Check this machine: what is missing, and how to install it.", DoctorOptions, checks=""),
)
