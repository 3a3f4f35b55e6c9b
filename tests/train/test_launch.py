"""What torchrun says in the environment, and what it means."""

from __future__ import annotations

from lorakeet.train.launch import Launch, launched

SAID = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_without_torchrun_it_is_alone() -> None:
    assert launched({}) == Launch(0, 1, 0, 1)
    for name in SAID:  # such as a scheduler that sets RANK for purposes of its own
        assert launched({key: value for key, value in SAID.items() if key != name}) == Launch()
    assert launched({**SAID, "RANK": "0", "WORLD_SIZE": "1"}) == Launch()
    assert Launch().first and Launch().command == "lorakeet"


def test_torchrun_says_who_is_who() -> None:
    launch = launched({**SAID, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
    assert launch == Launch(5, 8, 1, 4, "10.0.0.1") and not launch.first
    meet = "--rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29500"  # or each machine would take itself for the first
    assert launch.command == f"torchrun --nnodes 2 {meet} --nproc-per-node 4 -m lorakeet"
    assert launched({**SAID, "RANK": "0"}).first
    assert launched(SAID).command == "torchrun --nproc-per-node 8 -m lorakeet"
