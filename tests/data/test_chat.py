"""Ids and targets: the targets are the answer, and the prompt is what inference sees, for every kind of tokenizer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.data.chat import Encoder, encode_rows, show_example
from lorakeet.data.rows import Row, Turn
from lorakeet.data.shapes import shape_rows
from lorakeet.data.spec import DataSpec
from lorakeet.data.tables import FileRecord, RowProblems
from lorakeet.errors import ConfigError, DataError

LABELS = ("yes", "no", "not at all")


def spec(**settings_):
    return DataSpec(**{"train": "x", **settings_})


def labelled(spec_, *texts, label="no"):
    problems = RowProblems("bad")
    records = (FileRecord(f"f:{n}", {"text": text, "label": label}) for n, text in enumerate(texts, start=1))
    return list(shape_rows(records, "f", spec_, problems))


def pair(prompt, answer):
    return Row((Turn("user", prompt, False), Turn("assistant", answer, True)), None, None, "f:1")


def decoded(tokenizer, ids):
    return tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def targets_of(tokenizer, example):
    return decoded(tokenizer, example.ids[example.supervised])


def test_smollm2_learns_the_answer_and_its_end(smollm2):
    row = Row(
        (
            Turn("user", "Hi", False),
            Turn("assistant", "Hello there", True),
            Turn("user", "Bye", False),
            Turn("assistant", "Bye!", True),
        ),
        None,
        None,
        "f:1",
    )
    example = Encoder(smollm2, spec()).encode(row)
    assert targets_of(smollm2, example) == "Hello there<|im_end|>Bye!<|im_end|>"
    messages = [{"role": turn.role, "content": turn.text} for turn in row.turns]
    whole = smollm2.apply_chat_template(messages, tokenize=True, return_dict=False)
    # The line break after the last end of turn teaches nothing and is left out.
    assert example.ids.tolist() == whole[:-1]
    assert example.ids.dtype == np.int64 and example.supervised.dtype == bool and example.key == row.key


def test_prompt_is_what_inference_sees(smollm2):
    spec_ = spec(template="Is this good?\n{text}")
    (row,) = labelled(spec_, "The film was fine.")
    found = Encoder(smollm2, spec_, LABELS).candidates(row)
    message = [{"role": "user", "content": row.turns[0].text}]
    assert found.prompt.tolist() == smollm2.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert [decoded(smollm2, ids) for ids in found.completions] == [f"{label}<|im_end|>" for label in LABELS]


@pytest.mark.parametrize("template", ["on", "off"])
@pytest.mark.parametrize("supervise", ["completion", "all"])
@settings(max_examples=25, deadline=None)
@given(text=st.text(min_size=1, max_size=80).filter(str.strip), label=st.sampled_from(LABELS), room=st.integers(40, 90))
def test_example_is_prompt_and_candidate(byte_tokenizer, template, supervise, text, label, room):
    tokenizer = SHARED.setdefault("byte", byte_tokenizer())
    spec_ = spec(template="Review: {text} Answer:", chat_template=template, supervise=supervise, max_tokens=room)
    (row,) = labelled(spec_, text, label=label)
    encoder = Encoder(tokenizer, spec_, LABELS)
    example, found = encoder.encode(row), encoder.candidates(row)
    assert np.array_equal(example.ids, np.concatenate([found.prompt, found.completions[found.label]]))
    assert found.label == example.label == LABELS.index(label) and found.truncated == example.truncated
    assert max(len(found.prompt) + len(ids) for ids in found.completions) <= room
    if supervise == "completion":
        assert np.flatnonzero(example.supervised).tolist() == list(range(len(found.prompt), len(example.ids)))
    else:
        assert example.supervised[1:].all() and not example.supervised[0]


SHARED: dict = {}  # one tokenizer for all of hypothesis' examples


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.text(" \n1ab.", min_size=1, max_size=12).filter(str.strip),
    answer=st.text(" \n1ab.", min_size=1, max_size=12).filter(str.strip),
)
def test_no_token_reaches_over_the_border(byte_tokenizer, prompt, answer):
    tokenizer = SHARED.setdefault("byte", byte_tokenizer())
    example = Encoder(tokenizer, spec(chat_template="off", separator="")).encode(pair(prompt, answer))
    assert targets_of(tokenizer, example) == answer + "<|eos|>"
    assert example.ids[~example.supervised].tolist() == tokenizer.encode(prompt, add_special_tokens=False)


def test_a_merge_over_the_border_is_avoided(byte_tokenizer):
    tokenizer = byte_tokenizer()
    whole = tokenizer.encode("the film was good", add_special_tokens=False)
    alone = tokenizer.encode("the film was go", add_special_tokens=False)
    assert whole[: len(alone)] != alone  # else this test shows nothing
    example = Encoder(tokenizer, spec(chat_template="off", separator="")).encode(pair("the film was go", "od"))
    assert example.ids[: len(alone)].tolist() == alone and targets_of(tokenizer, example) == "od<|eos|>"


def test_sentencepiece_gets_no_space_of_its_own_inside_a_text(piece_tokenizer):
    encoder = Encoder(piece_tokenizer, spec(separator=""))
    for prompt, answer in (("the film was go", "od"), ("the film:\n", "good"), ("film", " good"), ("a\n", "\n\nb")):
        example = encoder.encode(pair(prompt, answer))
        assert decoded(piece_tokenizer, example.ids) == f"<s> {prompt}{answer}</s>"
        prompt_ids = piece_tokenizer.encode(prompt, add_special_tokens=True)
        assert example.ids[~example.supervised].tolist() == prompt_ids
        assert example.ids[-1] == piece_tokenizer.eos_token_id and example.supervised[-1]


def test_raw_text_has_one_begin_token_if_the_tokenizer_adds_one(piece_tokenizer, byte_tokenizer):
    text = Row((Turn("", "the film was good", True),), None, None, "f:1")
    example = Encoder(piece_tokenizer, spec()).encode(text)
    assert example.ids.tolist() == [*piece_tokenizer.encode("the film was good"), piece_tokenizer.eos_token_id]
    assert example.ids.tolist().count(piece_tokenizer.bos_token_id) == 1
    assert example.supervised.tolist() == [False] + [True] * (len(example.ids) - 1)
    plain = Encoder(byte_tokenizer(), spec()).encode(text)  # a chat template does not touch raw text
    assert plain.ids.tolist() == [*byte_tokenizer().encode("the film was good"), byte_tokenizer().eos_token_id]
    assert not plain.supervised[0] and plain.supervised[1:].all()


def test_template_that_writes_the_begin_token_gets_no_second_one(piece_tokenizer):
    piece_tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    example = Encoder(piece_tokenizer, spec()).encode(pair("the film", "good"))
    piece_tokenizer.chat_template = None
    assert example.ids.tolist().count(piece_tokenizer.bos_token_id) == 1 and example.ids[0] == piece_tokenizer.bos_token_id
    assert targets_of(piece_tokenizer, example).strip() == "good</s>"


def test_supervise_all_keeps_what_follows_the_last_answer(byte_tokenizer):
    tokenizer = byte_tokenizer()
    row = Row((Turn("user", "a", False), Turn("assistant", "b", True), Turn("user", "c", False)), None, None, "f:1")
    example = Encoder(tokenizer, spec(supervise="all")).encode(row)
    assert decoded(tokenizer, example.ids).endswith("<|start|>user\nc<|end|>\n") and example.supervised[1:].all()
    assert decoded(tokenizer, Encoder(tokenizer, spec()).encode(row).ids).endswith("b<|end|>")


def test_long_text_is_cut_and_template_and_answer_stay_whole(byte_tokenizer):
    tokenizer = byte_tokenizer()
    spec_ = spec(template="Review: {text} Answer:", max_tokens=60)
    short, long_ = labelled(spec_, "good film", "the film was good and " * 40)
    encoder = Encoder(tokenizer, spec_, LABELS)
    encoded = encode_rows([short, long_], encoder)
    assert [example.truncated for example in encoded.examples] == [False, True] and encoded.truncated == 1
    text = decoded(tokenizer, encoded.examples[1].ids)
    assert text.startswith("<|start|>user\nReview: the film was good and") and text.endswith(
        " Answer:<|end|>\n<|start|>assistant\nno<|end|>"
    )
    longest = max(len(ids) for ids in encoder.candidates(long_).completions)
    assert 60 - 4 <= len(encoder.candidates(long_).prompt) + longest <= 60
    assert encoded.examples[1].key == long_.key


def test_the_longest_turn_of_a_chat_is_cut_first(byte_tokenizer):
    tokenizer = byte_tokenizer()
    turns = (
        Turn("user", "good " * 5, False),
        Turn("assistant", "yes", True),
        Turn("user", "bad " * 90, False),
        Turn("assistant", "no", True),
    )
    example = Encoder(tokenizer, spec(max_tokens=80)).encode(Row(turns, None, None, "f:1"))
    assert "good " * 5 in decoded(tokenizer, example.ids) and targets_of(tokenizer, example) == "yes<|end|>no<|end|>"
    shorter = Encoder(tokenizer, spec(max_tokens=50)).encode(Row(turns, None, None, "f:1"))
    assert len(shorter.ids) <= 50 and targets_of(tokenizer, shorter) == "yes<|end|>no<|end|>"


def test_long_raw_text_is_cut_by_tokens_without_an_end(byte_tokenizer):
    tokenizer = byte_tokenizer()
    example = Encoder(tokenizer, spec(max_tokens=10)).encode(Row((Turn("", "good film " * 20, True),), None, None, "f:1"))
    assert len(example.ids) == 10 and example.truncated and tokenizer.eos_token_id not in example.ids


def test_long_rows_dropped_or_refused(byte_tokenizer):
    tokenizer = byte_tokenizer()
    rows = [pair("good", "yes"), pair("good film " * 50, "no")]
    encoded = encode_rows(rows, Encoder(tokenizer, spec(max_tokens=50, too_long="drop")))
    assert len(encoded.examples) == 1 and encoded.dropped == ("f:1",) and encoded.truncated == 0
    with pytest.raises(DataError, match=r"All 1 rows are longer than data.max_tokens \(50\)"):
        encode_rows(rows[1:], Encoder(tokenizer, spec(max_tokens=50, too_long="drop")))
    with pytest.raises(DataError, match=r"f:1: the row has \d+ tokens, and data.max_tokens is 50. .*--data.too_long"):
        encode_rows(rows, Encoder(tokenizer, spec(max_tokens=50, too_long="refuse")))


def test_an_answer_that_does_not_fit_is_refused(byte_tokenizer):
    with pytest.raises(DataError, match=r"even without the user's text the row has \d+ tokens, and data.max_tokens is 20"):
        Encoder(byte_tokenizer(), spec(max_tokens=20)).encode(pair("good film", "bad story " * 30))


def test_unseen_label_and_missing_labels(byte_tokenizer):
    tokenizer = byte_tokenizer()
    (row,) = labelled(spec(), "good", label="nope")
    with pytest.raises(
        DataError, match=r"f:1: the label 'nope' is unseen in training, which has 'yes', 'no'.* Did you mean 'no'"
    ):
        Encoder(tokenizer, spec(), LABELS).encode(row)
    with pytest.raises(DataError, match="needs labels"):
        Encoder(tokenizer, spec()).candidates(row)


def test_tokenizers_without_what_is_needed(byte_tokenizer):
    with pytest.raises(ConfigError, match="has no chat template"):
        Encoder(byte_tokenizer(None), spec(chat_template="on"))
    with pytest.raises(ConfigError, match="no end-of-text token"):
        Encoder(byte_tokenizer(None, eos_token=None), spec()).encode(pair("a", "b"))


def test_text_of_one_token_teaches_nothing(byte_tokenizer):
    with pytest.raises(DataError, match="no target token is left"):
        Encoder(byte_tokenizer(), spec(max_tokens=1)).encode(Row((Turn("", "good film", True),), None, None, "f:1"))


def test_shown_example_colours_exactly_the_targets(byte_tokenizer):
    tokenizer = byte_tokenizer()
    example = Encoder(tokenizer, spec()).encode(pair("how was it", "good"))
    text = show_example(example, tokenizer)
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert green == ["good<|end|>"] and text.plain.startswith("<|start|>user\nhow was it<|end|>")
    assert text.plain.endswith(f"[{len(example.ids)} tokens, {example.supervised.sum()} targets]")
