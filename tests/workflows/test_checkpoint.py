"""The checkpoint directory: what must be in it, and what is said when it is not."""

import math
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
    metric,
    plain,
    share_metric,
    write_hyperparameters,
    write_metrics,
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


def test_what_is_not_finite_loses_no_result(tmp_path, capsys):
    rows = [metric("kl", math.inf, n=3), metric("perplexity", 9.0, stderr=math.nan), metric("loss", 1.5)]
    gain = [{"metric": "reward", "difference": 0.5}, {"metric": "f1", "difference": -math.inf}]
    file = tmp_path / "metrics.json"
    write_metrics(file, rows, seconds=1.0, gain=gain, losses=[1.0, math.nan])
    found = read_json(file)
    assert [(row["name"], row["value"], row["stderr"]) for row in found["metrics"]] == [
        ("perplexity", 9.0, None),
        ("loss", 1.5, None),
    ]
    assert found["gain"] == gain[:1] and found["losses"] == [1.0, None]
    odd = {"metrics.kl.value": "inf", "metrics.perplexity.stderr": "nan"}
    odd |= {"gain.1.difference": "-inf", "losses.1": "nan"}
    assert found["not_finite"] == odd
    assert f"{file}: not finite, and left out: metrics.kl.value (inf), " in capsys.readouterr().out
    write_metrics(file, rows[2:], seconds=1.0)
    assert "not_finite" not in read_json(file)


def test_a_share_has_an_interval_and_no_false_error_of_zero():
    perfect = share_metric("accuracy", 1.0, 4)
    assert perfect["stderr"] is None and perfect["high"] == 1.0 and perfect["low"] == pytest.approx(0.5101, abs=1e-4)
    half = share_metric("accuracy", 0.5, 100)
    assert half["stderr"] == pytest.approx(0.05) and (half["n"], half["split"]) == (100, "test")
