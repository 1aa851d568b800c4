"""Distillation: losses by hand, budgets drawn and restored, resuming, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import midl
from midl.adaptation import distil, soft_cross_entropy, squared_error
from midl.errors import MIDLError


def pair():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    student = copy.deepcopy(teacher)
    midl.convert_(student, midl.MIDConfig(group_size=8, gate="light", interpolation="hard"), overrides={"4": None})
    return student, teacher


def data():
    return torch.randn(512, 16, generator=torch.Generator().manual_seed(1)).split(64)


def test_the_losses_by_hand():
    teacher = torch.tensor([[0.0, 2.0]])
    assert squared_error(torch.tensor([[1.0, 2.0]]), teacher).item() == pytest.approx(0.5)
    student = torch.tensor([[1.0, 0.0]])
    p, q = torch.tensor([0.0, 1.0]).softmax(0), torch.tensor([0.5, 0.0]).softmax(0)
    expected = 4 * (p * (p / q).log()).sum()
    assert soft_cross_entropy(2.0)(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("loss", [squared_error, soft_cross_entropy()])
def test_the_student_comes_closer_and_the_teacher_stays(loss):
    student, teacher = pair()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.train()
    losses = distil(student, teacher, data(), epochs=4, loss=loss)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert teacher.training
    assert not student.training


def test_layer_outputs_are_matched_when_asked():
    errors = []
    for match in ((), ("2",)):
        student, teacher = pair()
        distil(student, teacher, data(), epochs=3, match=match)
        x = torch.cat(data())
        with torch.no_grad():
            errors.append(squared_error(student[:3](x), teacher[:3](x)).item())
    assert errors[1] < errors[0]


def test_with_labels_the_student_becomes_better_than_its_teacher():
    inputs = torch.cat(data())
    labels = (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] > 0).long()  # of which the teacher knows nothing
    wrong = {}
    for shape, batches in (
        ("tuples", list(zip(inputs.split(64), labels.split(64), strict=True))),
        ("dicts", [{"input": x, "labels": y} for x, y in zip(inputs.split(64), labels.split(64), strict=True)]),
    ):
        student, teacher = pair()
        if shape == "dicts":
            student, teacher = Named(student), Named(teacher)
        choices = {"task_loss": nn.CrossEntropyLoss(), "kd_ratio": 0.1, "loss": soft_cross_entropy(), "lr": 1e-2}
        distil(student, teacher, batches, epochs=5, **choices)
        model, dense = (m.body if shape == "dicts" else m for m in (student, teacher))
        wrong[shape] = [(m(inputs).argmax(1) != labels).float().mean().item() for m in (model, dense)]
    for student, teacher in wrong.values():
        assert student < 0.5 * teacher
    assert wrong["tuples"] == wrong["dicts"]


def test_the_shares_of_teacher_and_labels_by_hand():
    student, teacher = pair()
    x, y = torch.cat(data()), torch.arange(512) % 4
    student.eval()
    with torch.no_grad():
        soft = squared_error(student(x), teacher(x)).item()
        hard = nn.functional.cross_entropy(student(x), y).item()
    for ratio in (0.0, 0.25, 1.0):
        losses = distil(
            copy.deepcopy(student), teacher, [(x, y)], task_loss=nn.CrossEntropyLoss(), kd_ratio=ratio
        )  # fmt: skip
        assert losses == pytest.approx([ratio * soft + (1 - ratio) * hard], rel=1e-5)


class Named(nn.Module):
    """Takes its input, and labels that it does not use, by name."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, input, labels):
        return self.body(input)


def test_elastic_draws_a_budget_every_step_and_restores_each_layers_own():
    student, teacher = pair()
    student[0].active, student[2].active = 0.2, 0.6
    seen = []
    student[0].register_forward_pre_hook(lambda m, args: seen.append((m.active, student[2].active)))
    distil(student, teacher, data(), epochs=2, elastic=(0.25, 0.9))
    assert len(seen) == 16
    means = [sum(pair) / 2 for pair in seen]
    low = [mean for mean in means if mean == pytest.approx(0.25)]
    assert 4 <= len(low) <= 12
    assert len(set(means)) >= 16 - len(low)
    assert all(0.25 - 1e-9 <= mean <= 0.9 for mean in means)
    odds = [(b / (1 - b)) / (a / (1 - a)) for a, b in seen]
    assert odds == pytest.approx([6.0] * 16)
    assert (student[0].active, student[2].active) == (0.2, 0.6)


def test_elastic_training_serves_low_budgets_better():
    x = torch.cat(data())
    errors = []
    for elastic in (None, (0.1, 0.5)):
        student, teacher = pair()
        distil(student, teacher, data(), epochs=6, elastic=elastic)
        midl.set_active(student, 0.125)
        with torch.no_grad():
            errors.append(squared_error(student(x), teacher(x)).item())
    assert errors[1] < errors[0]


def test_a_resumed_run_ends_with_the_same_weights():
    """Also through elastic draws; the optimizer's state is the caller's to keep."""
    ends = []
    for split in (None, 2):
        student, teacher = pair()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
        call = {"optimizer": optimizer, "elastic": (0.2, 0.8), "epochs": 4}
        if split:
            distil(student, teacher, data(), **{**call, "epochs": split})
        distil(student, teacher, data(), **call, first_epoch=split or 0)
        ends.append(student)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in ends), strict=True))


def test_mixed_precision_trains_float32_weights():
    student, teacher = pair()
    losses = distil(student, teacher, data(), epochs=3, autocast=torch.bfloat16)
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in student.parameters())


def test_torchs_random_state_is_left_as_it_was():
    student, teacher = pair()
    state = torch.get_rng_state()
    distil(student, teacher, data(), elastic=(0.2, 0.8))
    assert torch.equal(torch.get_rng_state(), state)


def light_alone():
    return nn.Sequential(midl.MIDLinear(16, 64, active=0, rank=2))


def test_what_does_not_fit_is_an_error():
    student, teacher = pair()
    for call, message in (
        ({"student": copy.deepcopy(teacher), "elastic": (0.1, 0.9)}, "the student, a Sequential, has no MID-L layers"),
        ({"teacher": student}, "teacher and student share parameters"),
        ({"match": ["9"]}, "match: the student has no submodule '9'"),
        ({"elastic": (0.9, 0.1)}, r"elastic=\(0.9, 0.1\), expected \(low, high\)"),
        ({"elastic": (0.0, 0.1)}, r"elastic: active=0.0"),
        ({"first_epoch": 3}, "first_epoch=3, expected 0 to epochs=1"),
        ({"epochs": -1}, "epochs=-1"),
        ({"lr": 0.0}, "lr=0.0, expected a number above 0"),
        ({"seed": 1.5}, "distil: seed=1.5, expected an int"),
        ({"loss": "mse"}, "distil: loss is a str, expected something to call"),
        ({"elastic": 0.5}, r"distil: elastic=0.5, expected \(low, high\)"),
        ({"student": light_alone(), "elastic": (0.3, 1)}, "has only MID-L layers that are their light path alone"),
        ({"kd_ratio": 1.5}, r"kd_ratio=1.5, expected a share in \[0, 1\]"),
        ({"task_loss": nn.CrossEntropyLoss()}, "data has a batch of type Tensor without labels"),
        ({"data": iter(data())}, "data has no length"),
        ({"data": []}, "data is empty in this epoch"),
    ):
        with pytest.raises(MIDLError, match=message):
            distil(**{"student": student, "teacher": teacher, "data": data(), **call})
    student.requires_grad_(False)
    with pytest.raises(MIDLError, match="every parameter of the student is frozen"):
        distil(student, teacher, data())
