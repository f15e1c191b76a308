"""A student of a teacher's layers: they stay what they were, it is a checkpoint, wrong choices are refused."""

import json
import re

import litgpt
import pytest
import torch
import yaml
from litgpt.config import Config

from tests.conftest import convert, make_llama, make_qwen2
from workflows import shrink
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import check_checkpoint_dir, is_tied, load_config, load_weights
from workflows.errors import UserError
from workflows.training.batch import Tree, pack_row
from workflows.training.model import load_model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A Llama of six layers with tied embeddings."""
    folder = tmp_path_factory.mktemp("teacher")
    return convert(make_llama(folder / "six", num_hidden_layers=6), folder / "lit")


def test_kept_layers_are_the_teachers_bit_by_bit(teacher, tmp_path):
    shrink.setup(teacher, tmp_path, keep=[0, 2, 5])
    before, after = load_weights(teacher), load_weights(tmp_path / "final")
    for name, weight in after.items():
        number = re.search(r"\.h\.(\d+)\.", name)
        old = name if number is None else name.replace(number[0], f".h.{[0, 2, 5][int(number[1])]}.")
        assert torch.equal(weight, before[old]), name
    assert len([name for name in after if name.endswith("norm_1.weight")]) == 3
    assert is_tied(tmp_path / "final")
    assert after["lm_head.weight"].data_ptr() == after["transformer.wte.weight"].data_ptr()


def test_the_result_is_a_checkpoint_directory_that_litgpt_loads(teacher, tmp_path):
    shrink.setup(teacher, tmp_path, layers=3)
    student = tmp_path / "final"
    assert check_checkpoint_dir(student) == student
    assert ChatTemplate.from_checkpoint(student).source == ChatTemplate.from_checkpoint(teacher).source
    assert json.loads((student / "config.json").read_text())["num_hidden_layers"] == load_config(student).n_layer == 3
    provenance = json.loads((student / "provenance.json").read_text())
    assert provenance["step"] == "shrink" and set(provenance["files"]) == {"lit_model.pth"}
    made = json.loads((teacher / "provenance.json").read_text())
    assert provenance["sources"]["base"]["files"] == made["files"]
    assert yaml.safe_load((student / "hyperparameters.yaml").read_text())["keep"] == [0, 2, 5]
    metrics = {row["name"]: row["value"] for row in json.loads((student / "metrics.json").read_text())["metrics"]}
    ours = load_model(student)
    assert metrics["parameters"] == sum(p.numel() for p in ours.parameters())

    theirs = litgpt.GPT(Config.from_checkpoint(student))
    theirs.load_state_dict(load_weights(student))
    ids = list(range(20, 32))
    logits = theirs(torch.tensor([ids]))[0].log_softmax(-1)
    expected = logits[4:-1].gather(1, torch.tensor(ids[5:])[:, None])[:, 0]
    torch.testing.assert_close(ours(pack_row([Tree(ids[:5], [ids[5:]])])), expected, atol=1e-5, rtol=1e-5)


def test_an_untied_head_with_biases_and_layer_types(tmp_path):
    qwen = convert(make_qwen2(tmp_path / "qwen", num_hidden_layers=4), tmp_path / "lit")
    shrink.setup(qwen, tmp_path / "student")
    before, after = load_weights(qwen), load_weights(tmp_path / "student" / "final")
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert torch.equal(after["transformer.h.1.attn.qkv.bias"], before["transformer.h.3.attn.qkv.bias"])
    described = json.loads((tmp_path / "student" / "final" / "config.json").read_text())
    assert described["num_hidden_layers"] == 2 == len(described.get("layer_types", "12"))
    load_model(tmp_path / "student" / "final")


@pytest.mark.parametrize(
    ("count", "layers", "expected"),
    [
        (15, 30, [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29]),
        (3, 6, [0, 2, 5]),
        (1, 6, [0]),
        (4, 4, [0, 1, 2, 3]),
    ],
)
def test_even_spacing_keeps_both_ends(count, layers, expected):
    assert shrink.evenly_spaced(count, layers) == expected


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"keep": [0, 6]}, "the layers 0 to 5, not 6"),
        ({"keep": [-1, 2]}, "not -1"),
        ({"keep": [0, 2, 2]}, "no layer twice"),
        ({"keep": [3, 1]}, "must ascend"),
        ({"keep": []}, "names no layer"),
        ({"keep": [9, 2]}, "2 problems"),
        ({"layers": 7}, "from 1 to the model's 6, not 7"),
        ({"layers": 0}, "not 0"),
        ({"layers": 2, "keep": [0, 1]}, "give one of them"),
    ],
)
def test_layers_that_are_not_there_are_refused(teacher, tmp_path, choice, message):
    with pytest.raises(UserError, match=message):
        shrink.setup(teacher, tmp_path / "student", **choice)
    assert not (tmp_path / "student").exists()
