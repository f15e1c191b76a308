"""The picture of MiniLM's heads: it is drawn, and one head is found that looks at the previous token."""

import re

import pytest
import torch

from custom_models.attention_map import draw_heads, setup
from workflows.errors import UserError


def test_the_heads_of_a_real_model(tmp_path, capsys):
    setup("The patient has a fever, but no cough.", out_file=tmp_path / "heads.png")
    said = capsys.readouterr().out
    assert "6 layers of 12 heads, 12 tokens" in said
    assert int(re.search(r"the previous token +layer \d, head \d+: (\d+)%", said)[1]) > 90
    assert (tmp_path / "heads.png").stat().st_size > 50_000


def test_one_square_for_each_head(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda self, image, **_: drawn.append(image))
    weights = torch.rand(2, 3, 4, 4)
    draw_heads(weights, list("abcd"), tmp_path / "heads.png", "title")
    assert len(drawn) == 6 and torch.equal(drawn[4], weights[1, 1])


def test_what_cannot_be_drawn_is_told(tmp_path):
    with pytest.raises(UserError, match="empty text"):
        setup(" ", out_file=tmp_path / "heads.png")
    with pytest.raises(UserError, match="202 tokens; a picture of the heads takes 64"):
        setup("fever " * 200, out_file=tmp_path / "heads.png")
