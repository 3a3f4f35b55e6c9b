"""Writes docs/explain/speed.md and its drawings from the results in benchmarks/results: `make docs`.

A section stands where there is a result for it: no number of the page has another source, but for counts that follow from the
shape of the model. Of each claim and processor the newest result counts; those of --quick never do.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import speed_plots as plots
from speed_text import BLOCK_WEIGHTS, HEAD, TAIL, WHY

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
        other = f"; {row['trains_otherwise']}" if row.get("trains_otherwise") else ""
        memory = row["peak_bytes"]["median"] / 1e9
        lines.append(f"| {row['what']}{other} | {spread(row['tokens_per_second'], 0)} | {memory:.2f} | {ratio} |")
    lines += [f"| {name} | {why} | | |" for name, why in result["not_run"].items()]
    return "\n".join([*lines, "", agreement(result)])


def agreement(result: Result) -> str:
    """Whether the contenders learnt the same, and who was not asked."""
    rows = result["contenders"].values()
    gaps = [row["largest_loss_difference"] for row in rows if row["largest_loss_difference"] is not None]
    agreed, beyond = "Losses agree at every step", ""
    if not result["losses_agree"]:
        far = [row["what"] for row in rows if (row["largest_loss_difference"] or 0) > row["allowed_loss_difference"]]
        agreed, beyond = "**Losses do not agree at every step**", f"; more than is allowed: {'; '.join(far)}"
    said = f"{agreed} (largest gap to PEFT by hand in the same products: {max(gaps):.3f} nats{beyond})." if gaps else (
        "**Losses were not compared**, since PEFT by hand did not run."
    )
    others = [row["what"] for row in rows if row.get("trains_otherwise")]
    return f"{said} Those of {' and '.join(others)} are no part of that: something else is learnt there." if others else said


def compared(drawings: Drawings) -> Iterator[str]:
    """Tokens a second, order by order of the rows."""
    orders = {
        "finetune_vs_peft_shuffled": ("Rows of any length in a step", "As the documentation of TRL and unsloth has it."),
        "finetune_vs_peft": (
            "Rows of alike length in a step", "As Lorakeet orders them, which spares the others most of their padding."
        ),
        "finetune_vs_peft_instructed": ("Rows that share an instruction", "The same hundred words before every review."),
    }  # fmt: skip
    parts = []
    for claim, (title, what) in orders.items():
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
        "finetune_vs_peft_to_loss": "rows of alike length in a step",
        "finetune_vs_peft_to_loss_instructed": "rows that share an instruction",
    }
    for claim, title in titles.items():
        for number, result in enumerate(newest(claim)):
            found, settings = result["to_loss"], result["settings"]
            if number == 0:
                yield f"## Time to the same held-out loss: {title}"
                name = f"speed-{claim.removeprefix('finetune_vs_peft_').replace('_', '-')}.svg"
                drawings[name] = plots.to_loss(f"Held-out loss, nats a learnt token, over seconds of training: {title}", found)
                yield f"![Held-out loss over seconds of training]({name})"
            lines = [
                f"{source(result)}; {settings['steps']} steps of {settings['rows_a_step']} rows, {settings['training_rows']} "
                f"rows in all, judged on {settings['judged_rows']} held-out rows by transformers in fp32. The target, "
                f"{found['target']:.4f} nats, is the lowest loss that every contender reaches, but those whose line says what "
                "they do otherwise; seconds are those of training steps, the first ones included, read off between the judged "
                "points:",
                "",
                "| | seconds to it | steps | times Lorakeet's | lowest loss | peak memory, GB |",
                "| --- | ---: | ---: | ---: | ---: | ---: |",
            ]
            for name, row in found["contenders"].items():
                about = result["contenders"][name]
                took = "not reached" if row["seconds"] is None else spread(row["seconds"], 1)
                ratio = "" if row["over_lorakeet"] is None else spread(row["over_lorakeet"], 2)
                steps = "" if row["seconds"] is None else f"{statistics.median(each['step'] for each in row['rounds']):.1f}"
                lowest = min(each["lowest_loss"] for each in row["rounds"])
                other = f"; {about['trains_otherwise']}" if about["trains_otherwise"] else ""
                memory = about["peak_bytes"]["median"] / 1e9
                lines.append(f"| {about['what']}{other} | {took} | {steps} | {ratio} | {lowest:.4f} | {memory:.2f} |")
            yield "\n".join(lines)
            if settings["rounds"] > 1:
                yield _round_by_round(result)
            yield agreement(result)
            yield from _int8_beside(result)


def _round_by_round(result: Mapping[str, Any]) -> str:
    """The same with a target for every round, whose rows and start are its own."""
    found, contenders = result["to_loss"], result["contenders"]
    exact = [name for name in found["contenders"] if name in found["exact"]]
    curves = {name: [each["points"] for each in found["contenders"][name]["rounds"]] for name in exact}
    targets = [shared_target(of_round) for of_round in zip(*curves.values(), strict=True)]
    seconds = {
        name: [at_target(points, target)["seconds"] for points, target in zip(each, targets, strict=True)]
        for name, each in curves.items()
    }
    ours = seconds["lorakeet"]
    ratios = "; ".join(
        f"{contenders[name]['what']} {', '.join(f'{it / our:.1f}' for it, our in zip(took, ours, strict=True))}"
        for name, took in seconds.items()
        if name != "lorakeet"
    )
    losses = ", ".join(f"{target:.4f}" for target in targets)
    return f"Round by round, to the lowest loss that all of these reach in it ({losses} nats), times Lorakeet's: {ratios}."


STUDENT = {3: 4.303, 4: 3.182, 5: 2.776}  # of so many numbers: what holds 95 % of the t of their mean


def _int8_beside(result: Mapping[str, Any]) -> Iterator[str]:
    """What products in int8 end at, beside those in bf16 from the same start over the same rows, seed by seed."""
    runs = result["runs"]
    ours, rounded = (runs.get(name, []) for name in ("lorakeet", "lorakeet-int8"))
    gaps = [last(b) - last(a) for a, b in zip(ours, rounded, strict=False)]
    if len(gaps) in STUDENT:
        each, mean = ", ".join(signed(gap, 4) for gap in gaps), statistics.mean(gaps)
        far = STUDENT[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps))
        yield (
            f"With products in int8 the held-out loss after the last step is {each} nats away from that of bf16 in the same "
            f"round, {signed(mean, 4)} on average over {len(gaps)} seeds (95 % interval by Student's t: "
            f"{signed(mean - far, 4)} to {signed(mean + far, 4)})."
        )


def last(run: Mapping[str, Any]) -> float:
    """The held-out loss of the last adapter that was judged."""
    return float(list(run["held_out_losses"].values())[-1])


SMALL = "HuggingFaceTB/SmolLM2-135M"


def roofline(drawings: Drawings) -> Iterator[str]:
    """The share of the machine's rate."""
    for number, result in enumerate([*newest("roofline"), *newest("roofline_llama-3.2-1b")]):
        lines, model = result["lines"], result.get("model", SMALL)
        rate = statistics.median(one["rate"] for one in lines)
        if number == 0:
            yield "## Share of the machine's rate"
            title = f"Share of the rate of {result['products']} products, and what was asked: {result['machine']['cpu']}"
            drawings["speed-roofline.svg"] = plots.shares(title, lines)
            yield "![Share of the machine's rate, case by case](speed-roofline.svg)"
        at_floor = rate / (4 * result.get("block_weights", BLOCK_WEIGHTS))
        floor = f"{rate / 1e9:,.0f} GFLOP/s in the median, which would be {at_floor:,.0f} tokens/s at the floor"
        yield (
            f"{model}: {source(result)}. The rate is that of the fastest plain {result['products']} product, measured in the "
            f"same process: {floor}. FLOPs are those of all products and of the attention that ran; everything else counts as "
            f"lost. {result['tokens_a_step']:,} tokens a step, {result['micro_tokens']:,} of them at once:"
        )
        columns = ("base", "tokens a row", "learnt", "rows", "forward", "backward", "step", "asked", "tokens/s")
        head = [f"| {' | '.join(columns)} |", f"|{' --- |' * 4}{' ---: |' * 5}"]
        yield "\n".join([*head, *map(_share, lines)])


def _share(one: Mapping[str, Any]) -> str:
    case = [one["base"], f"{one['length']:,}", one["learnt"], one["layout"]]
    found = [f"{value:.2f}" for value in (*(one["shares"][phase] for phase in ("forward", "backward", "step")), one["asked"])]
    return f"| {' | '.join([*case, *found, format(one['tokens_per_second'], ',.0f')])} |"


def beginnings(drawings: Drawings) -> Iterator[str]:
    """Rows behind one prompt."""
    for number, result in enumerate(newest("shared_beginning")):
        if number == 0:
            yield "## Rows that begin with one prompt"
        yield (
            f"{result['rows']} rows of {result['own_tokens']} tokens of their own behind a prompt, {result['micro_tokens']:,} "
            f"tokens computed at once; the prompt computed once for the rows of a pass, by turns with the prompt in every row. "
            f"{result['model']}: {source(result)}."
        )
        head = ["| prompt | passes | tokens computed | seconds a step | faster | FLOPs fewer by |", f"|{' ---: |' * 6}"]
        yield "\n".join([*head, *(_beginning(one) for one in result["lines"])])


def _beginning(one: Mapping[str, Any]) -> str:
    ways = one["once"], one["each"]
    seconds = " for ".join(f"{statistics.median(way['seconds']):.2f}" for way in ways)
    counts = (" for ".join(f"{way[name]:,}" for way in ways) for name in ("passes", "computed"))
    return f"| {one['prompt']:,} | {' | '.join(counts)} | {seconds} | {spread(one['faster'], 2)} | {one['fewer_flops']:.2f} |"


def growth(drawings: Drawings) -> Iterator[str]:
    """Time a token over length, rank, adapters and size."""
    for result in newest("growth")[:1]:
        drawings["speed-growth.svg"] = plots.growth(result)
        slower = [
            f"{plots.TITLES[axis]} {one['at']}: {one['us'] / one['law_us']:.2f} times the law"
            for axis, points in result["axes"].items() for one in points if one["us"] > result["tolerance"] * one["law_us"]
        ]  # fmt: skip
        kept = f"Slower than {result['tolerance']:g} times that: {'; '.join(slower)}" if slower else (
            f"Every point is within {result['tolerance']:g} times that"
        )
        yield "## How it grows"
        yield "![Microseconds a token of a training step, and the law](speed-growth.svg)"
        law = "The law is the FLOPs that ran, at the rate of the point of each axis that takes the fewest a token"
        yield f"{source(result)}. {law}. {kept}."


def top_layers(drawings: Drawings) -> Iterator[str]:
    """Adapters in the top layers alone."""
    for number, result in enumerate(newest("frozen_prefix")):
        settings, faster = result["settings"], result["faster"]
        if number == 0:
            yield f"## Adapters in the top layers alone (`lora.layers: {settings['layers']}`)"
        top = settings["layers"]
        names = {"all layers": "all layers", "top": top, "kept": f"{top}, `train.keep_prefix_states`"}
        did = f"the quickstart's settings, {settings['limit']} rows, {settings['epochs']:g} epochs, held-out looks included"
        lines = [
            f"{source(result)}; {did}:",
            "",
            "| adapters in | seconds | of them for the states | parameters | held-out loss (base) | peak memory, GB |",
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
            f"With kept states it is {spread(faster['top'], 2)} times as fast as without and {spread(faster['all layers'], 2)} "
            f"times as fast as all layers; the held-out losses with and without differ by {result['loss_gap']:.5f} nats."
        )


def int8(drawings: Drawings) -> Iterator[str]:
    """Products in int8."""
    for number, result in enumerate(newest("int8_products")):
        if number == 0:
            yield "## Products in int8 (`model.quantize.int8_products`)"
            curve = {name: runs[0]["losses"] for name, runs in result["runs"].items()}
            drawings["speed-int8.svg"] = plots.curves("Training loss, nats a learnt token: weights in bf16 and in int8", curve)
            yield "![Training loss step by step, in bf16 and in int8](speed-int8.svg)"
        seeds = len(result["seeds"])
        yield (
            f"Over int8 weights, {source(result)}, {result['steps']} steps, {seeds} seed{'s' if seeds > 1 else ''}: "
            f"{spread(result['faster'], 2)} times as fast as training in bf16. An option, not a default. On the test rows, "
            "against that training:"
        )
        compared = [(name, one) for by_seed in result["comparisons"] for name, of in by_seed.items() for one in of]
        yield "\n".join([*HELD, *(_held(name, one) for name, one in compared)])


HELD = ("| | metric | difference (95 %) | rows | verdict |", "| --- | --- | ---: | ---: | --- |")


def _held(name: str, one: Mapping[str, Any]) -> str:
    """What other roundings change on rows that nobody trained on."""
    found = one["difference"]
    gap = f"{signed(found['value'], 4)} ({signed(found['low'], 4)} to {signed(found['high'], 4)})"
    return f"| {name} | {one['metric'].replace('_', '-')} | {gap} | {found['n']} | {one['verdict']} |"


SECTIONS: tuple[Callable[[Drawings], Iterator[str]], ...] = (compared, time_to_loss)
MEASURED: tuple[Callable[[Drawings], Iterator[str]], ...] = (roofline, beginnings, growth, top_layers, int8)


def page() -> tuple[str, Drawings]:
    """The whole page, and its drawings by their names."""
    drawings: Drawings = {}
    first = [part for section in SECTIONS for part in section(drawings)]
    then = [part for section in MEASURED for part in section(drawings)]
    return "\n\n".join(wrapped(part) for part in (HEAD, *first, WHY, *then, TAIL)) + "\n", drawings


def wrapped(part: str) -> str:
    """Markdown with its prose in lines of LINE: paragraphs and lists, but neither tables nor code."""
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
