"""Two small trainings: balancing evens the experts' load, the picture shows it, and bad settings are told."""

import re

import pytest
import torch

from custom_models import expert_load
from custom_models.expert_load import draw_loads, setup
from workflows.errors import UserError


@pytest.fixture
def text(english, tmp_path):
    (tmp_path / "text.txt").write_text(english[:60_000], encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.mark.long
def test_balancing_evens_the_load_of_a_training(text, tmp_path, capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr(expert_load, "draw_loads", lambda loads, file: (drawn.update(loads), draw_loads(loads, file)))
    setup(steps=40, speed=0.01, file=text, out_file=tmp_path / "out" / "load.png")
    said = capsys.readouterr().out
    (off, on) = (re.search(rf"^{name} +([\d.]+) +([\d.]+) +([\d.]+)$", said, re.M) for name in ("off", "on"))
    assert float(off[1]) > 2 > 1 > float(on[1]) and float(off[2]) > 2 > 1 > float(on[2])
    assert float(off[3]) < 6.2 and float(on[3]) < 6.2  # ln 512 is 6.24
    for loads in drawn.values():
        assert loads.shape == (40, 2, 16) and (loads.sum(-1) == 16 * 64 * 2).all()
    assert torch.equal(drawn["off"][0], drawn["on"][0])  # the same weights and batches
    assert (tmp_path / "out" / "load.png").stat().st_size > 20_000


def test_a_line_for_each_expert(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, x, y, **_: drawn.append((x, y)))
    loads = torch.arange(25)[:, None, None] * torch.tensor([[[1, 3]]]) + 1
    draw_loads({"off": loads, "on": loads.flip(-1)}, tmp_path / "load.png")
    (x, off), (_, on) = drawn
    assert x == [10, 20, 25]
    torch.testing.assert_close(off, on.flip(-1))
    torch.testing.assert_close(off.sum(-1), torch.full((3,), 100.0))
    assert float(off[2, 0]) == pytest.approx(100 * (22 * 5 + 5) / (22 * 5 * 4 + 10))


def test_what_makes_no_sense_is_told(english, tmp_path):
    with pytest.raises(UserError, match="2 problems"):
        setup(steps=0, speed=0)
    (tmp_path / "short.txt").write_text(english[:2000], encoding="utf-8")
    with pytest.raises(UserError, match="tokens; at least 704 are needed"):
        setup(file=tmp_path / "short.txt")
    with pytest.raises(UserError, match="does not exist"):
        setup(file=tmp_path / "none.txt")
