"""TensorBoard's curves: every epoch once, also after a resumed training."""

from __future__ import annotations

from pathlib import Path

from midl.lab.reproduce.scalars import Scalars


def entry(epoch: int, loss: float) -> dict[str, float]:
    return {"epoch": epoch, "loss": loss, "lr": 0.1, "seconds": 1.0}


def read(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 3)) for event in events.Scalars("loss")]


def test_a_resumed_training_replaces_the_epochs_that_were_lost(tmp_path: Path) -> None:
    log = [entry(1, 1.0), entry(2, 0.5)]
    first = Scalars(tmp_path)
    first.write([])
    first.write(log[:1])
    first.write(log)  # killed now, before the checkpoint of epoch 2
    second = Scalars(tmp_path)
    second.write(log[:1])
    second.write([log[0], entry(2, 0.25)])
    second.write([log[0], entry(2, 0.25), entry(3, 0.125)])
    second.close()
    assert read(tmp_path) == [(1, 1.0), (2, 0.25), (3, 0.125)]
