"""Losses of distillation are their formulas; a student is some of its teacher's layers."""

import pytest
import torch
import torch.nn.functional as F

from custom_models.distillation import cosine_loss, main, soft_target_loss, student_of
from custom_models.encoder import Encoder, bert
from workflows.errors import UserError


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_soft_targets_are_torchs_kl(temperature):
    g = torch.Generator().manual_seed(0)
    ours, theirs = (3 * torch.randn(8, 4, generator=g, dtype=torch.float64) for _ in range(2))
    expected = F.kl_div(
        F.log_softmax(ours / temperature, -1), F.softmax(theirs / temperature, -1), reduction="batchmean"
    )
    torch.testing.assert_close(soft_target_loss(ours, theirs, temperature), temperature**2 * expected)
    assert float(soft_target_loss(theirs, theirs, temperature)) == 0


def test_the_gradient_keeps_its_size_at_high_temperatures():
    theirs = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    sizes = []
    for temperature in (20.0, 40.0):
        ours = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        soft_target_loss(ours, theirs, temperature).backward()
        sizes.append(float(ours.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_directions_are_compared_on_real_tokens():
    states = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([3, 1])
    other = states.clone()
    other[1, 1:] = 7.0  # padding
    assert float(cosine_loss(states, 2 * other, lengths)) == pytest.approx(0, abs=1e-6)
    assert float(cosine_loss(states, -states)) == pytest.approx(2, abs=1e-6)


def test_a_student_has_every_other_layer():
    teacher = Encoder(bert(60, width=16, n_layer=6, n_head=2, inner_width=16))
    student = student_of(teacher)
    assert student.config.n_layer == 3
    for number, of_teacher in enumerate((0, 2, 4)):
        ours, theirs = student.layers[number].state_dict(), teacher.layers[of_teacher].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(student.tokens.weight, teacher.tokens.weight)
    whole = student_of(teacher, 6)
    ids = torch.tensor([[7, 8, 9]])
    assert torch.equal(whole.eval()(ids).last, teacher.eval()(ids).last)
    for number in (0, 7):
        with pytest.raises(UserError, match=f"from 1 to 6, not {number}"):
            student_of(teacher, number)


def test_the_files_command_shows_a_temperature_and_a_student(capsys):
    main()
    said = capsys.readouterr().out
    assert "temperature 5:  52.2%" in said and "student: 3 layers, 5." in said
