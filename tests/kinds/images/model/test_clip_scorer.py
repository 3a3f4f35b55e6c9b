"""CLIP's vectors are the ones whose products the real model gives, whatever the batch; what is no CLIP is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.kinds.images.model.clip_scorer import AT_ONCE, load_scorer
from lorakeet.models.files.quiet import quiet_transformers
from tiny.pipelines import save_tiny_scorer


def test_cosines_are_those_of_the_model(tmp_path: Path) -> None:
    folder = save_tiny_scorer(tmp_path / "clip")
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8) for number in range(AT_ONCE + 1)]
    prompts = ["red box", "a blue disc", "x"]
    scorer = load_scorer(str(folder))
    found = scorer.pictures(pictures) @ scorer.prompts(prompts).T
    with quiet_transformers(), torch.no_grad():
        model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
        whole = model(**processor(text=prompts, images=pictures, return_tensors="pt", padding=True))
        wanted = (whole.logits_per_image / model.logit_scale.exp()).numpy()
    assert found.shape == (AT_ONCE + 1, 3) and np.abs(found - wanted).max() < 1e-5
    assert np.allclose(np.linalg.norm(scorer.pictures(pictures[:1]), axis=1), 1)


def test_a_long_prompt_is_cut_off(tmp_path: Path) -> None:
    scorer = load_scorer(str(save_tiny_scorer(tmp_path / "clip")))
    assert np.array_equal(scorer.prompts(["abcdefghijkl"]), scorer.prompts(["abcdefghijklmnop"]))


def test_what_is_no_clip_is_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a llama model; expected CLIP"):
        load_scorer(str(tiny_llama_folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(EnvironmentProblem, match=r"cannot be loaded.*leave it out"):
        load_scorer(str(tmp_path / "empty"))


def test_a_folder_that_lacks_weights_or_holds_a_cut_file_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_scorer(tmp_path / "clip")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    kept = {name: tensor for name, tensor in load_file(file).items() if "vision" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(EnvironmentProblem, match=r"it lacks \d+ of its weights \(vision_model"):
        load_scorer(str(folder))
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EnvironmentProblem, match="cannot be loaded"):
        load_scorer(str(folder))
