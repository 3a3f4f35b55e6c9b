"""Ways in which the files of a run are another content than its certificate's, and what the refusal names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from lorakeet.evaluate.certificate import Certificate, read_certificate

Damage = Callable[[Path], None]


def tensors(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(run: Path) -> None:
        file = run / "adapter" / "adapter_model.safetensors"
        found = load_file(file)
        change(found)
        save_file(found, file, metadata={"format": "pt"})

    return damage


def edited(name: str, **changes: Any) -> Damage:
    def damage(run: Path) -> None:
        path = run / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def scaled(found: dict[str, Any], part: str, by: float, most: int = 10**6) -> None:
    for name in [name for name in sorted(found) if part in name][:most]:
        found[name] = found[name] * by


def swapped(found: dict[str, Any]) -> None:
    one, two = sorted(name for name in found if "q_proj.lora_A" in name)[:2]
    found[one], found[two] = found[two].clone(), found[one].clone()


def without_pair(found: dict[str, Any]) -> None:
    path = sorted(found)[0].partition(".lora_")[0]
    for name in [name for name in found if name.startswith(path)]:
        del found[name]


def cut(run: Path) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def halved(found: dict[str, Any]) -> None:
    found.update({name: tensor.bfloat16() for name, tensor in found.items()})


def tokenizer(run: Path) -> None:
    (run / "adapter" / "chat_template.jinja").write_text("{{ messages }}")


def more_templates(run: Path) -> None:
    (run / "adapter" / "additional_chat_templates").mkdir()
    (run / "adapter" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")


def prompts(run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("  template: '{text}'", "  template: '{text}!'", 1))


def verdict(run: Path) -> None:
    path = run / "certificate.json"
    path.write_text(path.read_text().replace('"subject": "', '"subject": "Another: ', 1))


def without_digest(run: Path) -> None:
    told = json.loads((run / "certificate.json").read_text())
    del told["sha256"]
    (run / "certificate.json").write_text(json.dumps(told))


def of_another_run(run: Path) -> None:
    found = read_certificate(run / "certificate.json")
    others = {name: "0" * 64 if name.startswith("tensor ") else value for name, value in found.identity.items()}
    Certificate("Another run", found.checks, identity=others).write(run / "certificate.json")


DAMAGES: dict[str, tuple[Damage, str]] = {
    "one tensor x 1.01": (tensors(lambda found: scaled(found, "lora_B", 1.01, 1)), "lora_B.weight has changed"),
    "A of two layers swapped": (tensors(swapped), "q_proj.lora_A.weight has changed"),
    "B x 3": (tensors(lambda found: scaled(found, "lora_B", 3.0)), "lora_B.weight has changed"),
    "alpha x 2": (edited("adapter/adapter_config.json", lora_alpha=24.0), "config lora_alpha has changed (12"),
    "all B zero": (tensors(lambda found: scaled(found, "lora_B", 0.0)), "lora_B.weight has changed"),
    "cut in half": (cut, ""),
    "a pair deleted": (tensors(without_pair), "is missing"),
    "saved in bf16": (tensors(halved), "has changed"),
    "rank_pattern": (edited("adapter/adapter_config.json", rank_pattern={"q_proj": 2}), "config rank_pattern has changed"),
    "chat template": (tokenizer, "tokenizer chat_template.jinja is new"),
    "additional chat template": (more_templates, "tokenizer additional_chat_templates/tool_use.jinja is new"),
    "prompts made otherwise": (prompts, "setting data.template has changed"),
    "certificate edited": (verdict, "was edited"),
    "certificate without its digest": (without_digest, "was edited"),
    "certificate of another run": (of_another_run, "has changed"),
}
SEVEN = list(DAMAGES)[:7]  # of issue 56, each of which `check` called "pass" on 2b423591
