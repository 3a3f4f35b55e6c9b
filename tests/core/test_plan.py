"""The Plan: shapes and counts of its pairs, its table, and its way to disk and back."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from lorakeet.core.dora import DoraPair
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.plan import ExtraEntry, Plan, PlanEntry, path_range
from tiny.adapters import random_pair

ENTRIES = {
    "linear": PlanEntry("a", "linear", (7, 5), 4, 12.0),
    "conv1d": PlanEntry("a", "conv1d", (7, 5), 4, 12.0),
    "embedding": PlanEntry("a", "embedding", (9, 6), 4, 12.0),
    "conv2d": PlanEntry("a", "conv2d", (7, 5, 3, 2), 4, 12.0),
    "experts": PlanEntry("a", "experts", (3, 7, 5), 4, 12.0),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_shapes_and_counts_are_those_of_the_pair(kind: str) -> None:
    entry = ENTRIES[kind]
    pair = LoraPair(entry)
    assert (tuple(pair.A.shape), tuple(pair.B.shape)) == (entry.shape_a, entry.shape_b)
    assert entry.parameters == sum(p.numel() for p in pair.parameters())
    stored = torch.zeros(entry.shape[::-1] if kind == "conv1d" else entry.shape)
    value = random_pair(kind, stored)
    assert (tuple(value.A.shape), tuple(value.B.shape)) == (entry.shape_a, entry.shape_b)
    assert pair.delta().shape == stored.shape


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_dora_counts_its_magnitude(kind: str) -> None:
    entry = replace(ENTRIES[kind], variant="dora")
    assert entry.parameters == sum(p.numel() for p in DoraPair(entry).parameters()) == ENTRIES[kind].parameters + 7


def test_largest_rank() -> None:
    assert {kind: entry.largest_rank for kind, entry in ENTRIES.items()} == {
        "linear": 5, "conv1d": 5, "embedding": 6, "conv2d": 7, "experts": 5,
    }  # fmt: skip


def test_scale() -> None:
    assert ENTRIES["linear"].scale == 3
    assert replace(ENTRIES["linear"], scale_rule="alpha/sqrt(rank)").scale == 6


def plan() -> Plan:
    entries = [
        PlanEntry(f"model.layers.{i}.self_attn.{name}", "linear", (32, 32), 4, 12.0)
        for i in (0, 1, 2, 5)
        for name in ("q_proj", "k_proj")
    ]
    entries.append(PlanEntry("model.layers.3.self_attn.q_proj", "linear", (32, 32), 8, 12.0))
    entries.append(PlanEntry("lm_head", "linear", (96, 32), 4, 12.0, "alpha/sqrt(rank)", "dora", "pissa", 0.1))
    extras = (ExtraEntry("score", "module", (64,)), ExtraEntry("model.embed_tokens", "rows", (2, 32), ("<a>", "<b>"), "lm_head"))
    return Plan(tuple(entries), extras, 1_000_000)


def test_table_rows_stand_for_equal_entries() -> None:
    assert plan().rows() == [
        ("model.layers.[0-2,5].self_attn.q_proj", "32×32", "4", "3", "1,024"),
        ("model.layers.[0-2,5].self_attn.k_proj", "32×32", "4", "3", "1,024"),
        ("model.layers.3.self_attn.q_proj", "32×32", "8", "1.5", "512"),
        ("lm_head", "96×32", "4", "6", "608"),
        ("score (whole)", "64", "", "", "64"),
        ("model.embed_tokens (new rows)", "2×32", "", "", "64"),
    ]


def test_the_table_adds_up() -> None:
    counts = [int(row[4].replace(",", "")) for row in plan().rows()]
    assert sum(counts) == plan().parameters == 3296
    assert plan().summary() == "10 pairs, 2 extras, 3,296 trained parameters (0.33 % of 1,000,000)"
    assert replace(plan(), frozen_parameters=0).summary().endswith("3,296 trained parameters")


def test_ranges_of_paths() -> None:
    assert path_range(["a.0.b.3.c", "a.1.b.3.c"]) == "a.[0-1].b.3.c"
    assert path_range(["a.0.b.0.c", "a.0.b.1.c", "a.1.b.0.c", "a.1.b.1.c"]) == "a.[0-1].b.[0-1].c"
    assert path_range(["a.10.c", "a.9.c", "a.12.c"]) == "a.[9-10,12].c"
    assert path_range(["one"]) == "one"


def test_as_json() -> None:
    read = json.loads(json.dumps(plan().to_mapping()))
    assert [entry["path"] for entry in read["entries"]] == [entry.path for entry in plan().entries]
    assert read["entries"][0]["rank"] == plan().entries[0].rank and len(read["extras"]) == len(plan().extras)
    assert math.prod(plan().extras[1].shape) == plan().extras[1].parameters
