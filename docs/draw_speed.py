"""Writes docs/explain/speed.md and its drawings from the results in benchmarks/results: `make docs`.

A section appears if there is a result for it. No number of the page has another source, except counts that follow from the shape
of the model. The newest result of each claim and processor counts; those of --quick never do.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import speed_plots as plots
from speed_text import BLOCK_WEIGHTS, HEAD, SHOWN, TAIL, WHY

from lorakeet.evaluate.wording import signed

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from harness.to_loss import at_target, shared_target

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"
EXPLAIN = DOCS / "explain"
LINE = 130
Result = Mapping[str, Any]
Drawings = dict[str, str]  # by the name of the file


def newest(claim: str) -> list[Result]:
    """The newest result of that claim on each processor, the newest first."""
    found: dict[str, tuple[Result, Path]] = {}
    for path in RESULTS.glob(f"{claim}.*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        cpu = result["machine"]["cpu"]
        if result["claim"] == claim and (cpu not in found or result["began"] > found[cpu][0]["began"]):
            found[cpu] = ({**result, "file": path.name}, path)
    return sorted((result for result, _ in found.values()), key=lambda result: str(result["began"]), reverse=True)


def shown(name: str) -> str:
    """A contender's name or note as the page says it."""
    return SHOWN.get(name, name)


def named(row: Mapping[str, Any]) -> str:
    """A contender, with what it trains otherwise."""
    return "; ".join(shown(part) for part in (row["what"], row.get("trains_otherwise")) if part)


def source(result: Result) -> str:
    """Where a table comes from, and how idle the machine was."""
    machine = result["machine"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average']:g} before the first run "
        f"([result](../../benchmarks/results/{result['file']}))"
    )


def spread(found: Mapping[str, Any], digits: int) -> str:
    """The median, and the lowest and highest round where there are several."""
    if found["n"] == 1:
        return f"{found['median']:,.{digits}f}"
    return f"{found['median']:,.{digits}f} ({found['min']:,.{digits}f} to {found['max']:,.{digits}f})"


def contenders(result: Result) -> str:
    """The table of benchmarks/finetune_vs_peft."""
    settings = result["settings"]
    counted = settings["tokens_a_step"][settings["not_counted"] :]
    rounds = f"{settings['rounds']} round{'s' if settings['rounds'] > 1 else ''} of {len(counted)} counted steps"
    lines = [
        f"{source(result)}; {rounds}, {sum(counted) / len(counted):,.0f} tokens a step on average, padding never counted:",
        "",
        "| | tokens/s | peak memory, GB | Lorakeet is faster by |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in result["contenders"].values():
        ratio = "" if row["lorakeet_over_it"] is None else f"{spread(row['lorakeet_over_it'], 2)}"
        memory = row["peak_bytes"]["median"] / 1e9
        lines.append(f"| {named(row)} | {spread(row['tokens_per_second'], 0)} | {memory:.2f} | {ratio} |")
    lines += [f"| {name} | {why} | | |" for name, why in result["not_run"].items()]
    return "\n".join([*lines, "", agreement(result)])


def agreement(result: Result) -> str:
    """Whether the contenders learned the same, and which were not compared."""
    rows = result["contenders"].values()
    gaps = [row["largest_loss_difference"] for row in rows if row["largest_loss_difference"] is not None]
    agreed, beyond = "Losses agree at every step", ""
    if not result["losses_agree"]:
        far = [shown(row["what"]) for row in rows if (row["largest_loss_difference"] or 0) > row["allowed_loss_difference"]]
        agreed, beyond = "**Losses do not agree at every step**", f"; more than is allowed: {'; '.join(far)}"
    said = f"{agreed} (largest gap to PEFT by hand in the same products: {max(gaps):.3f} nats{beyond})." if gaps else (
        "**Losses were not compared**, since PEFT by hand did not run."
    )
    others = [shown(row["what"]) for row in rows if row.get("trains_otherwise")]
    return f"{said} Not compared, since they train something else: {'; '.join(others)}." if others else said


ORDERS = {  # by claim: title, and what it means
    "finetune_vs_peft_shuffled": ("Rows of any length in a step", "The order of TRL's and unsloth's documentation."),
    "finetune_vs_peft": ("Rows of similar length in a step", "Lorakeet's order, which saves the others most of their padding."),
    "finetune_vs_peft_instructed": ("Rows that share an instruction", "The same hundred words precede every review."),
}
PEERS = {"trl": "TRL + PEFT", "unsloth": "unsloth", "peft-manual": "PEFT by hand"}  # by the beginning of a contender's name


def in_short(drawings: Drawings) -> Iterator[str]:
    """How many times as fast as its peers Lorakeet is, in the newest result of each order of the rows."""
    lines = []
    for claim, (title, _) in ORDERS.items():
        for result in newest(claim)[:1]:
            rows = result["contenders"]
            ratios = [
                [row["lorakeet_over_it"]["median"] for name, row in rows.items() if name.startswith(peer)] for peer in PEERS
            ]
            cells = (f"{min(each):.1f}" if each else "" for each in ratios)
            lines.append(f"| {title.lower()} | {result['machine']['cpu']} | {' | '.join(cells)} |")
    if lines:
        yield "## In short"
        yield "Lorakeet's tokens a second, as a multiple of the fastest run of each peer:"
        yield "\n".join([f"| rows | machine | {' | '.join(PEERS.values())} |", "| --- | --- | ---: | ---: | ---: |", *lines])
        yield "Each frozen weight costs it 4 FLOPs a token, the least that LoRA can do, and little else costs time: see below."


def compared(drawings: Drawings) -> Iterator[str]:
    """Tokens a second, order by order of the rows."""
    parts = []
    for claim, (title, what) in ORDERS.items():
        results = newest(claim)
        if not results:
            continue
        name = f"speed-{claim.removeprefix('finetune_vs_peft').strip('_') or 'alike'}.svg"
        machine = results[0]["machine"]
        drawings[name] = plots.speeds(f"{title}: {machine['cpu']}, {machine['cores']} cores", results[0]["contenders"])
        parts += [f"### {title}", what, f"![{title}: tokens a second]({name})", *map(contenders, results)]
    if parts:
        yield "## Against TRL, unsloth and PEFT"
        yield from parts


def time_to_loss(drawings: Drawings) -> Iterator[str]:
    """Seconds of training to the same held-out loss."""
    titles = {
        "finetune_vs_peft_to_loss_shuffled": "rows of any length in a step",
        "finetune_vs_peft_to_loss": "rows of similar length in a step",
        "finetune_vs_peft_to_loss_instructed": "rows that share an instruction",
    }
    for claim, title in titles.items():
        for number, result in enumerate(newest(claim)):
            found, settings = result["to_loss"], result["settings"]
            if number == 0:
                yield f"## Time to the same held-out loss: {title}"
                name = f"speed-{claim.removeprefix('finetune_vs_peft_').replace('_', '-')}.svg"
                drawings[name] = plots.to_loss(f"Held-out loss, nats a target token, over seconds of training: {title}", found)
                yield f"![Held-out loss over seconds of training]({name})"
            lines = [
                f"{source(result)}; {settings['steps']} steps of {settings['rows_a_step']} rows, {settings['training_rows']} "
                f"rows in all, evaluated on {settings['judged_rows']} held-out rows by transformers in fp32. The target is "
                f"{found['target']:.4f} nats: the lowest loss that every contender reaches, except those whose line says that "
                "they train otherwise. Seconds are those of training steps, the first ones included, interpolated between "
                "evaluations:",
                "",
                "| | seconds to the target | steps | times Lorakeet's | lowest loss | peak memory, GB |",
                "| --- | ---: | ---: | ---: | ---: | ---: |",
            ]
            for name, row in found["contenders"].items():
                about = result["contenders"][name]
                took = "not reached" if row["seconds"] is None else spread(row["seconds"], 1)
                ratio = "" if row["over_lorakeet"] is None else spread(row["over_lorakeet"], 2)
                steps = "" if row["seconds"] is None else f"{statistics.median(each['step'] for each in row['rounds']):.1f}"
                lowest = min(each["lowest_loss"] for each in row["rounds"])
                memory = about["peak_bytes"]["median"] / 1e9
                lines.append(f"| {named(about)} | {took} | {steps} | {ratio} | {lowest:.4f} | {memory:.2f} |")
            yield "\n".join(lines)
            if settings["rounds"] > 1:
                yield _round_by_round(result)
            yield agreement(result)
            yield from _int8_beside(result)


def _round_by_round(result: Mapping[str, Any]) -> str:
    """The same with a target for every round, which has its own rows and initial adapter."""
    found, contenders = result["to_loss"], result["contenders"]
    exact = [name for name in found["contenders"] if name in found["exact"]]
    curves = {name: [each["points"] for each in found["contenders"][name]["rounds"]] for name in exact}
    targets = [shared_target(of_round) for of_round in zip(*curves.values(), strict=True)]
    seconds = {
        name: [at_target(points, target)["seconds"] for points, target in zip(each, targets, strict=True)]
        for name, each in curves.items()
    }
    ours = seconds["lorakeet"]
    head = ["", *(f"round {number}: {target:.4f} nats" for number, target in enumerate(targets, 1))]
    lines = [[shown(contenders[name]["what"]), *(f"{it / our:.1f}" for it, our in zip(took, ours, strict=True))]
             for name, took in seconds.items() if name != "lorakeet"]  # fmt: skip
    table = [f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * len(targets)], *lines)]
    return "\n".join(["With a target for each round, times Lorakeet's seconds:", "", *table])


STUDENT = {3: 4.303, 4: 3.182, 5: 2.776}  # by number of seeds: the two-sided 95 % quantile of Student's t


def _int8_beside(result: Mapping[str, Any]) -> Iterator[str]:
    """The last losses with products in int8 and in bf16, from the same initial adapter over the same rows, seed by seed."""
    runs = result["runs"]
    ours, rounded = (runs.get(name, []) for name in ("lorakeet", "lorakeet-int8"))
    gaps = [last(b) - last(a) for a, b in zip(ours, rounded, strict=False)]
    if len(gaps) in STUDENT:
        each, mean = ", ".join(signed(gap, 4) for gap in gaps), statistics.mean(gaps)
        far = STUDENT[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps))
        yield (
            f"The last held-out loss with products in int8, minus that of bf16 in the same round: {each} nats. The mean over "
            f"{len(gaps)} seeds is {signed(mean, 4)} (95 % interval by Student's t: {signed(mean - far, 4)} to "
            f"{signed(mean + far, 4)})."
        )


def last(run: Mapping[str, Any]) -> float:
    """The held-out loss of the last adapter that was evaluated."""
    return float(list(run["held_out_losses"].values())[-1])


SMALL = "HuggingFaceTB/SmolLM2-135M"


def roofline(drawings: Drawings) -> Iterator[str]:
    """The share of the machine's rate."""
    for number, result in enumerate([*newest("roofline"), *newest("roofline_llama-3.2-1b")]):
        lines, model = result["lines"], result.get("model", SMALL)
        rate = statistics.median(one["rate"] for one in lines)
        if number == 0:
            yield "## Share of the machine's rate"
            title = f"Share of the rate of {result['products']} products, and the required share: {result['machine']['cpu']}"
            drawings["speed-roofline.svg"] = plots.shares(title, lines)
            yield "![Share of the machine's rate, case by case](speed-roofline.svg)"
        at_floor = rate / (4 * result.get("block_weights", BLOCK_WEIGHTS))
        floor = f"{rate / 1e9:,.0f} GFLOP/s in the median, or {at_floor:,.0f} tokens/s at the floor"
        yield (
            f"**{model}**: {source(result)}. {result['tokens_a_step']:,} tokens a step, {result['micro_tokens']:,} of them at "
            f"once. The rate is that of the fastest plain {result['products']} product, measured in the same process: {floor}. "
            "FLOPs are those of all products and of the attention that ran; everything else counts as lost. Each cell has the "
            "step's share of the rate, and its tokens/s; the result has the forward and backward pass too."
        )
        targets = list(dict.fromkeys(one["learnt"] for one in lines))
        columns = ("base", "tokens a row", "rows", "required", *(f"targets: {name}" for name in targets))
        head = [f"| {' | '.join(columns)} |", f"|{' --- |' * 3}{' ---: |' * (1 + len(targets))}"]
        yield "\n".join([*head, *_share(lines, targets)])


def _share(lines: Sequence[Mapping[str, Any]], targets: Sequence[str]) -> Iterator[str]:
    """A row for each base, length and layout: the step's share of the rate for each kind of targets."""
    cases: dict[tuple[str, ...], dict[str, str]] = {}
    for one in lines:
        case = (one["base"], f"{one['length']:,}", one["layout"], f"{one['asked']:.2f}")
        cases.setdefault(case, {})[one["learnt"]] = f"{one['shares']['step']:.2f} ({one['tokens_per_second']:,.0f})"
    for case, found in cases.items():
        yield f"| {' | '.join([*case, *(found.get(name, '') for name in targets)])} |"


def beginnings(drawings: Drawings) -> Iterator[str]:
    """Rows that share a prompt."""
    for number, result in enumerate(newest("shared_beginning")):
        if number == 0:
            yield "## Rows that share a prompt"
        yield (
            f"{result['rows']} rows of {result['own_tokens']} tokens of their own after a prompt, {result['micro_tokens']:,} "
            f"tokens computed at once. Shared prefixes alternate with the prompt computed in every row; cells have both, in this "
            f"order. {result['model']}: {source(result)}."
        )
        head = [
            "| prompt tokens | micro-batches | tokens computed | seconds a step | times faster | times fewer FLOPs |",
            f"|{' ---: |' * 6}",
        ]
        yield "\n".join([*head, *(_beginning(one) for one in result["lines"])])


def _beginning(one: Mapping[str, Any]) -> str:
    ways = one["once"], one["each"]
    seconds = " / ".join(f"{statistics.median(way['seconds']):.2f}" for way in ways)
    counts = (" / ".join(f"{way[name]:,}" for way in ways) for name in ("passes", "computed"))
    return f"| {one['prompt']:,} | {' | '.join(counts)} | {seconds} | {spread(one['faster'], 2)} | {one['fewer_flops']:.2f} |"


def growth(drawings: Drawings) -> Iterator[str]:
    """Time a token over length, rank, adapters and size."""
    for result in newest("growth")[:1]:
        drawings["speed-growth.svg"] = plots.growth(result)
        slower = [
            f"{plots.TITLES[axis]} {one['at']}: {one['us'] / one['law_us']:.2f} times the law"
            for axis, points in result["axes"].items() for one in points if one["us"] > result["tolerance"] * one["law_us"]
        ]  # fmt: skip
        kept = f"Above {result['tolerance']:g} times the law: {'; '.join(slower)}" if slower else (
            f"Every point is within {result['tolerance']:g} times the law"
        )
        yield "## How the time of a step grows"
        yield "![Microseconds a token of a training step, and the law](speed-growth.svg)"
        law = "The law is the time of the FLOPs that ran, at the rate of the point of each axis with the fewest FLOPs a token"
        yield f"{source(result)}. {law}. {kept}."


def top_layers(drawings: Drawings) -> Iterator[str]:
    """Adapters in the top layers alone."""
    for number, result in enumerate(newest("frozen_prefix")):
        settings, faster = result["settings"], result["faster"]
        if number == 0:
            yield f"## Adapters in the top layers alone (`lora.layers: {settings['layers']}`)"
        top = settings["layers"]
        names = {"all layers": "all layers", "top": top, "kept": f"{top}, `train.keep_prefix_states`"}
        did = f"the quickstart's settings, {settings['limit']} rows, {settings['epochs']:g} epochs, held-out evaluations included"
        lines = [
            f"{source(result)}; {did}:",
            "",
            "| adapters in | seconds | of these for the states | parameters | held-out loss (base) | peak memory, GB |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for way, runs in result["runs"].items():
            one, took = runs[0], statistics.median(each["seconds"] for each in runs)
            losses = " ".join(f"{loss:.4f}" for loss in dict.fromkeys(each["held_out_loss"] for each in runs))
            lines.append(
                f"| {names[way]} | {took:,.1f} | {one['of_them_filling']:.1f} | {one['trained_parameters']:,} | "
                f"{losses} ({one['base_loss']:.3f}) | {one['peak_bytes'] / 1e9:.2f} |"
            )
        yield "\n".join(lines)
        yield (
            f"With cached hidden states it is {spread(faster['top'], 2)} times as fast as without, and "
            f"{spread(faster['all layers'], 2)} times as fast as all layers. The held-out losses with and without them differ by "
            f"{result['loss_gap']:.5f} nats."
        )


def int8(drawings: Drawings) -> Iterator[str]:
    """Products in int8."""
    for number, result in enumerate(newest("int8_products")):
        if number == 0:
            yield "## Products in int8 (`model.quantize.int8_products`)"
            curve = {name: runs[0]["losses"] for name, runs in result["runs"].items()}
            drawings["speed-int8.svg"] = plots.curves("Training loss, nats a target token: weights in bf16 and in int8", curve)
            yield "![Training loss step by step, in bf16 and in int8](speed-int8.svg)"
        seeds = len(result["seeds"])
        yield (
            f"Training with int8 products is {spread(result['faster'], 2)} times as fast as in bf16, over {result['steps']} "
            f"steps and {seeds} seed{'s' if seeds > 1 else ''}: {source(result)}. It is an option, not the default. On the test "
            "rows, against the training in bf16:"
        )
        compared = [(name, one) for by_seed in result["comparisons"] for name, of in by_seed.items() for one in of]
        yield "\n".join([*INT8_HEAD, *(_int8_row(name, one) for name, one in compared)])


INT8_HEAD = ("| | metric | difference (95 %) | rows | verdict |", "| --- | --- | ---: | ---: | --- |")


def _int8_row(name: str, one: Mapping[str, Any]) -> str:
    """What the rounding changes on test rows."""
    found = one["difference"]
    gap = f"{signed(found['value'], 4)} ({signed(found['low'], 4)} to {signed(found['high'], 4)})"
    return f"| {shown(name)} | {one['metric'].replace('_', '-')} | {gap} | {found['n']} | {one['verdict']} |"


def attached(drawings: Drawings) -> Iterator[str]:
    """Pairs on a model of a trainer of one's own, against PEFT's layers."""
    for number, result in enumerate(newest("attach_vs_peft")):
        if number == 0:
            yield "## In a trainer of your own (`lk.attach`)"
        lines = result["lines"]
        gap = max(one["loss_gap"] for one in lines)
        agreed = "differ" if all(one["losses_agree"] for one in lines) else "**do not agree**: they differ"
        yield (
            f"SmolLM2-135M in fp32 as transformers loads it, rank {result['rank']} on all linear layers, one adapter file. A "
            f"step is transformers' forward pass and loss, the backward pass, and AdamW. Processes alternate, {result['steps']} "
            f"counted steps each: {source(result)}. Losses {agreed} by at most {gap:.0e} of themselves."
        )
        head = ["| a step | `lk.attach`, ms | PEFT's layers, ms | Lorakeet is faster by |", f"| --- |{' ---: |' * 3}"]
        yield "\n".join([*head, *(_attached(one) for one in lines)])


def _attached(one: Mapping[str, Any]) -> str:
    took = (spread(one["milliseconds"][name], 0) for name in ("lorakeet", "peft"))
    rows = f"{one['rows']} row{'s' if one['rows'] > 1 else ''} of {one['tokens']} tokens"
    return f"| {rows} | {' | '.join(took)} | {spread(one['faster'], 2)} |"


SECTIONS: tuple[Callable[[Drawings], Iterator[str]], ...] = (in_short, compared, time_to_loss)
MEASURED: tuple[Callable[[Drawings], Iterator[str]], ...] = (roofline, beginnings, growth, top_layers, int8, attached)


def page() -> tuple[str, Drawings]:
    """The whole page, and its drawings by their names."""
    drawings: Drawings = {}
    first = [part for section in SECTIONS for part in section(drawings)]
    then = [part for section in MEASURED for part in section(drawings)]
    return "\n\n".join(wrapped(part) for part in (HEAD, *first, WHY, *then, TAIL)) + "\n", drawings


def wrapped(part: str) -> str:
    """Markdown with its prose in lines of LINE; tables and code stay as they are."""
    blocks = []
    for block in part.strip("\n").split("\n\n"):
        if block.startswith(("|", "```", "#", "!")):
            blocks.append(block)
            continue
        items = block.replace("\n- ", "\n\n- ").split("\n\n")
        blocks.append("\n".join(_filled(item) for item in items))
    return "\n\n".join(blocks)


def _filled(item: str) -> str:
    hanging = "  " if item.startswith("- ") else ""
    words = " ".join(item.split())
    return textwrap.fill(words, LINE, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    written, drawings = page()
    for old in EXPLAIN.glob("speed*.svg"):
        old.unlink()
    for name, drawing in drawings.items():
        (EXPLAIN / name).write_text(drawing, encoding="utf-8")
    (EXPLAIN / "speed.md").write_text(written, encoding="utf-8")
    print(f"Written: {EXPLAIN / 'speed.md'} and {', '.join(drawings)}")


if __name__ == "__main__":
    main()
