"""The checkpoint directory: what must be in it, and what is said when it is not."""

import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from workflows.checkpoint import (
    check_checkpoint_dir,
    copy_companions,
    describe_source,
    load_config,
    load_weights,
    plain,
    write_hyperparameters,
    write_provenance,
)
from workflows.errors import UserError
from workflows.files import read_json, sha256


def test_hugging_face_folder_is_sent_to_download(tiny_llama_hf):
    with pytest.raises(UserError, match=r"Hugging Face's form.*make download MODEL="):
        check_checkpoint_dir(_with_config(tiny_llama_hf))


def _with_config(directory):
    if not (directory / "model_config.yaml").is_file():  # so that only the weights are missing
        (directory / "model_config.yaml").write_text("name: x\n")
    return directory


def test_half_a_checkpoint_names_what_is_missing(tiny_llama, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(tiny_llama, half)
    (half / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"lacks tokenizer\.json"):
        check_checkpoint_dir(half)


def test_malformed_model_config_is_explained(tiny_llama, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    for text in ("n_layer: [", "no_such_field: 1", "n_head: three"):
        (broken / "model_config.yaml").write_text(text)
        with pytest.raises(UserError, match="not a LitGPT model configuration"):
            load_config(broken)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_pickle_with_a_payload_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("lit_model.pth", "wb") as f:
        pickle.dump(Payload(), f)
    with pytest.raises(UserError, match="more than tensors"):
        load_weights(tmp_path)
    torch.save({"a": torch.ones(2), "b": Payload()}, "lit_model.pth")
    with pytest.raises(UserError, match="more than tensors"):
        load_weights(tmp_path)
    assert not Path("pwned").exists()


def test_weights_are_mapped_from_the_file(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "lit_model.pth")
    assert load_weights(tmp_path)["a"].tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="does not exist"):
        load_weights(tmp_path, "other.pth")


@dataclass
class Nested:
    path: Path
    values: tuple[int, ...]


def test_settings_become_plain_values(tmp_path):
    assert plain({"a": Nested(Path("x/y"), (1, 2)), "b": None, "c": True}) == {
        "a": {"path": "x/y", "values": [1, 2]},
        "b": None,
        "c": True,
    }
    write_hyperparameters(tmp_path, {"lora_r": 4, "train": Nested(Path("z"), (3,))})
    assert "lora_r: 4" in (tmp_path / "hyperparameters.yaml").read_text()


def test_provenance_hashes_the_weights_and_names_versions(tiny_llama, tmp_path):
    copy_companions(tiny_llama, tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "lit_model.pth")
    write_provenance(tmp_path, "test", {"base": describe_source(tiny_llama)}, {"rate": 1e-3})
    provenance = read_json(tmp_path / "provenance.json")
    assert provenance["files"] == {"lit_model.pth": sha256(tmp_path / "lit_model.pth")}
    assert provenance["sources"]["base"]["files"] == read_json(tiny_llama / "provenance.json")["files"]
    assert {"python", "torch", "litgpt"} <= set(provenance["versions"])
    assert (tmp_path / "chat_template.jinja").is_file()
