"""The sums of a step's memory: what is chosen for which budget, and that a smaller budget never plans more."""

from __future__ import annotations

from dataclasses import replace

from lorakeet.memory.bound import Shapes, Step, choose, least, streamed, work

LLAMA_7B = Shapes(
    blocks=32, block_bytes=104 * 10**6, block_total=32 * 104 * 10**6, end_bytes=524 * 10**6, rest_bytes=8192,
    largest=11008 * 4096, hidden=4096, inner=11008, heads=32, vocabulary=32000, state=2, product=2,
)  # fmt: skip
STEP = Step(trained=39_976_960, tokens=2048, batches=4, head_chunk=256)
RUNTIME = 396 * 10**6


def test_one_block_of_llama_takes_what_was_measured_and_a_tenth() -> None:
    measured = 450 * 10**6 + LLAMA_7B.largest * 2
    assert measured <= work(LLAMA_7B, STEP) <= 1.15 * measured


def test_where_there_is_room_all_batches_pass_together_with_their_inputs_in_memory() -> None:
    choice = choose(LLAMA_7B, STEP, RUNTIME, 64 << 30)
    assert choice is not None and choice.together == STEP.batches and not choice.aside
    assert choice.planned == streamed(LLAMA_7B, STEP, RUNTIME, together=STEP.batches, aside=False)


def test_a_smaller_budget_puts_fewer_batches_together_then_inputs_aside_then_refuses() -> None:
    seen = []
    for budget in range(8 << 30, least(LLAMA_7B, STEP, RUNTIME) - 1, -(50 << 20)):
        choice = choose(LLAMA_7B, STEP, RUNTIME, budget)
        assert choice is not None and choice.planned <= budget
        seen.append(choice)
    assert seen[0].together == 4 and not seen[0].aside and seen[-1].aside
    assert [choice.together for choice in seen] == sorted((choice.together for choice in seen), reverse=True)
    assert choose(LLAMA_7B, STEP, RUNTIME, least(LLAMA_7B, STEP, RUNTIME) - 1) is None


def test_longer_batches_more_parameters_and_inputs_in_memory_take_more() -> None:
    plain = streamed(LLAMA_7B, STEP, RUNTIME, together=1, aside=True)
    assert streamed(LLAMA_7B, STEP, RUNTIME, together=2, aside=True) > plain
    assert streamed(LLAMA_7B, STEP, RUNTIME, together=1, aside=False) > plain
    assert streamed(LLAMA_7B, replace(STEP, trained=2 * STEP.trained), RUNTIME, together=1, aside=True) > plain
    assert streamed(LLAMA_7B, replace(STEP, tokens=4096), RUNTIME, together=1, aside=True) > plain


def test_llama_7b_at_2048_tokens_fits_into_two_gibibytes() -> None:
    choice = choose(LLAMA_7B, replace(STEP, batches=1), RUNTIME, 2 << 30)
    assert choice is not None and choice.aside
