"""R1 from three places: a stand-in for the registry, a folder in the Hub's form, and GGUF files on a real server."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import gguf
import pytest
import yaml

from tests.conftest import convert
from tests.workflows.fake_ollama import Handler, fake_ollama
from tests.workflows.r1_models import make_r1
from workflows import export, plan
from workflows.__main__ import main
from workflows.deepseek import setup
from workflows.errors import UserError
from workflows.ollama.client import connect, require_ours
from workflows.ollama.gguf_writer import write_gguf
from workflows.ollama.server import Endpoint, OllamaServer

# ---- pulled ----


class Registry:
    """Ollama before a registry that a test fills, or cuts off."""

    def __init__(self, known: tuple[str, ...] = ("deepseek-r1:1.5b",), error: str | None = None) -> None:
        self.known, self.error, self.installed = known, error, dict[str, str | None]()
        self.created: list[dict] = []

    def list(self, handler: Handler) -> None:
        models = [{"model": name, "digest": name} for name in self.installed]
        handler.send_json({"version": "0"} if handler.path == "/api/version" else {"models": models})

    def show(self, handler: Handler, body: dict) -> None:
        if (name := body["model"]) not in self.installed:
            return handler.send_json({"error": f"model '{name}' not found"}, 404)
        handler.send_json({"details": {"parent_model": self.installed[name]}, "model_info": {}, "modelfile": "FROM x"})

    def pull(self, handler: Handler, body: dict) -> None:
        handler.begin_stream()
        if self.error or body["model"] not in self.known:
            handler.send_part({"error": self.error or "pull model manifest: file does not exist"})
        else:
            for completed in (10, 100):
                handler.send_part({"status": "pulling", "digest": "sha256:abc", "total": 100, "completed": completed})
            handler.send_part({"status": "success"})
            self.installed[body["model"]] = None
        handler.end_stream()

    def create(self, handler: Handler, body: dict) -> None:
        self.created.append(body)
        self.installed[body["model"]] = body["from"]
        handler.send_json({"status": "success"})


@contextmanager
def served(registry: Registry, monkeypatch) -> Iterator[list]:
    monkeypatch.setattr(Handler, "do_GET", lambda handler: registry.list(handler))
    replies = {"/api/show": registry.show, "/api/pull": registry.pull, "/api/create": registry.create}
    with fake_ollama(replies) as (url, requests):
        monkeypatch.setenv("OLLAMA_HOST", url)
        yield requests


RECIPE = Path("workflows/recipes/default/deepseek.yaml")


def test_a_pulled_model_gets_the_recipes_sampling_and_no_system_message(monkeypatch, capsys) -> None:
    registry = Registry()
    with served(registry, monkeypatch) as requests:
        assert main(["deepseek", "--config", str(RECIPE), "--num_thread", "2"]) == 0
        assert main(["deepseek", "--config", str(RECIPE), "--num_thread", "2"]) == 0  # there already, made anew
    assert [path for path, _ in requests].count("/api/pull") == 1
    created = registry.created[-1]
    assert (created["model"], created["from"]) == ("deepseek", "deepseek-r1:1.5b") and not created.get("system")
    assert created["parameters"] == {
        "temperature": 0.6,
        "top_p": 0.95,
        "num_ctx": 32768,
        "num_predict": 32768,
        "num_thread": 2,
    }
    out = capsys.readouterr().out
    assert "not verified" in out and "make chat NAME=deepseek" in out


def test_recipes_of_r1_models_agree(monkeypatch) -> None:
    wanted = yaml.safe_load(RECIPE.read_text())
    for file in Path("workflows/recipes").glob("deepseek-r1-*/export.yaml"):
        recipe = yaml.safe_load(file.read_text())
        assert {name: recipe[name] for name in ("temperature", "top_p", "num_ctx")} == {
            name: wanted[name] for name in ("temperature", "top_p", "num_ctx")
        }


@pytest.mark.parametrize("model", ["deepseek-r1:1.6b", "deepsek-r1:1.5b", "Deepseek-R1:1,5b"])
def test_a_misspelt_name_is_told_with_the_nearest(model: str, monkeypatch, capsys) -> None:
    with served(Registry(), monkeypatch):
        assert main(["deepseek", "--model", model]) == 1
    error = capsys.readouterr().err
    assert repr(model) in error and "Did you mean deepseek-r1:1.5b" in error and "Traceback" not in error


@pytest.mark.parametrize("model", ["out/r1/grpo/final", "./r1", "../models/r1", "/models/r1", "models/r1/"])
def test_a_misspelt_path_is_not_looked_for_elsewhere(model: str, monkeypatch, capsys) -> None:
    with served(Registry(), monkeypatch) as requests:
        assert main(["deepseek", "--model", model]) == 1
    assert f"error: There is no folder {Path(model)}." in capsys.readouterr().err and requests == []


@pytest.mark.parametrize("model", ["hf.co/org/name-GGUF", "registry.ollama.ai/library/r1"])
def test_a_name_with_its_registry_is_pulled(model: str, monkeypatch) -> None:
    with served(Registry(known=(model,)), monkeypatch) as requests:
        setup(model, num_thread=2)
    assert ("/api/pull", model) in [(path, body.get("model")) for path, body in requests]


def test_a_registry_out_of_reach_is_told_with_the_other_ways(monkeypatch, capsys) -> None:
    reason = 'pull model manifest: Get "https://registry/v2/": dial tcp: lookup registry: no such host'
    registry = Registry(error=reason)
    with served(registry, monkeypatch):
        assert main(["deepseek"]) == 1
    error = capsys.readouterr().err
    for part in (reason, "make deepseek MODEL=deepseek-r1-distill-qwen-1.5b", "MODEL=path/to/file.gguf", "is kept"):
        assert part in error
    assert registry.created == [] and "Did you mean" not in error


def test_another_model_of_that_name_is_left_alone(monkeypatch, capsys) -> None:
    registry = Registry()
    registry.installed["deepseek"] = "somebody/elses"
    with served(registry, monkeypatch):
        assert main(["deepseek"]) == 1
    assert "it is left alone" in capsys.readouterr().err and registry.created == []


@pytest.mark.parametrize(
    ("parent", "modelfile", "is_ours"),
    [
        ("deepseek-r1:1.5b", "FROM /blobs/sha256-1", True),
        ("", "FROM /blobs/sha256-abc", True),
        ("other", "FROM other\nSYSTEM you are not deepseek-r1:1.5b", False),
        ("", '# abc\nFROM /blobs/sha256-1\nSYSTEM """\nFROM /blobs/sha256-abc\n"""', False),
        ("", "FROM /blobs/sha256-1abc", False),
    ],
)
def test_a_copy_is_known_by_what_it_is_made_from_and_not_by_its_text(parent, modelfile, is_ours, monkeypatch) -> None:
    reply = {"details": {"parent_model": parent}, "model_info": {}, "modelfile": modelfile}
    with fake_ollama({"/api/show": lambda handler, _: handler.send_json(reply)}) as (url, _):
        server = OllamaServer(Endpoint(url, "0"))
        made_from = "abc" if "sha256" in modelfile and not parent else "deepseek-r1:1.5b"
        with nullcontext() if is_ours else pytest.raises(UserError, match="it is left alone"):
            require_ours(server, "mine", made_from)


def test_wrong_arguments_are_all_reported(capsys) -> None:
    wrong = ["--temperature", "-1", "--top_p", "2", "--num_ctx", "3", "--num_thread", "-3", "--port", "99999"]
    assert main(["deepseek", *wrong, "--model", " ", "--name", ""]) == 1
    error = capsys.readouterr().err
    names = ("--temperature", "--top_p", "--num_ctx", "--num_thread", "--port", "--model ' ' is", "--name ''")
    for part in ("7 problems", *names):
        assert part in error
    assert main(["deepseek", "--model", "a", "--name", "a"]) == 1
    assert "is the model's own name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (["export", "--checkpoint_dir", "{checkpoint}", "--create", "false", "--temperature", "11"], "--temperature"),
        (["chat", "--prompt", "x", "--num_ctx", "63"], "--num_ctx must be from 64"),
        (["ask", "--file", "q.jsonl", "--model", ""], "--model '' is no name"),
        (["evaluate-ollama", "--model", "", "--tasks", "[]"], "--model '' is no name"),
    ],
)
def test_all_steps_take_the_same_options(step: list[str], told: str, tiny_llama: Path, capsys) -> None:
    assert main([part.format(checkpoint=tiny_llama) for part in step]) == 1
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error


def test_an_export_for_which_there_is_no_room_is_refused_before_it_begins(
    tiny_llama: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    began: list[Path] = []
    monkeypatch.setattr(plan, "memory_here", lambda _: 10**6)
    export_setup = export.setup
    monkeypatch.setattr(export, "setup", functools.wraps(export_setup)(lambda *_, **given: began.append(given)))
    command = ["deepseek", "--model", str(tiny_llama), "--out_dir", str(tmp_path / "out")]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert "The memory is too little: export needs" in told and "--ignore_plan true" in told and began == []
    assert main([*command, "--ignore_plan", "true", "--verify_precision", "bf16-true"]) == 0
    assert [(given["checkpoint_dir"], given["verify_precision"]) for given in began] == [(tiny_llama, "bf16-true")]


# ---- on a real server ----


@pytest.fixture
def to_it(ollama_server: OllamaServer, monkeypatch) -> OllamaServer:
    @contextmanager
    def shared(port: int | None = None) -> Iterator[OllamaServer]:
        yield ollama_server

    for module in ("deepseek", "export"):
        monkeypatch.setattr(f"workflows.{module}.open_server", shared)
    return ollama_server


@pytest.mark.ollama
def test_a_model_in_the_hubs_form_is_converted_exported_and_verified(to_it, tmp_path: Path, capsys) -> None:
    folder = make_r1(tmp_path / "r1-distill-tiny", "qwen2")
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": [{"role": "user", "content": f"What is finding {i}?"}]} for i in range(4)]
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoints, out = tmp_path / "checkpoints", tmp_path / "out"
    setup(
        str(folder), "tiny-hub", quantize="f32", data=data, verify_prompts=4, checkpoints_dir=checkpoints, out_dir=out
    )
    found = json.loads((out / "verification.json").read_text())
    assert found["prompt_ids_equal"] is True and found["chat_prompts_equal"] is True
    shown = connect(to_it).show("tiny-hub")
    for line in ("temperature 0.6", "top_p 0.95", "num_ctx 512"):  # the model's own context is the limit
        assert line in " ".join((shown.parameters or "").split())
    # A checkpoint of ours is taken as it is.
    setup(str(checkpoints / "local" / folder.name), "tiny-hub", 0.5, data=data, verify_prompts=0, out_dir=out)
    assert "temperature 0.5" in " ".join((connect(to_it).show("tiny-hub").parameters or "").split())
    connect(to_it).delete("tiny-hub")


@pytest.mark.ollama
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_gguf_file_of_somebody_elses(adds_bos: bool, to_it, tmp_path: Path, monkeypatch, capsys) -> None:
    """One whose tokenizer adds BOS by itself, as llama.cpp's converter makes of R1, must not get two."""
    checkpoint = convert(make_r1(tmp_path / "tiny", "llama"), tmp_path / "checkpoints")
    add = gguf.GGUFWriter.add_add_bos_token
    monkeypatch.setattr(gguf.GGUFWriter, "add_add_bos_token", lambda self, _: add(self, adds_bos))
    monkeypatch.setattr("workflows.ollama.gguf_writer.OURS", "somebody.elses")
    file = tmp_path / "r1.gguf"
    write_gguf(checkpoint, file, "f32", "r1", "0" * 64)
    setup(str(file), "tiny-file")
    out = capsys.readouterr().out
    assert "equal to those of the template in the file" in out and "512 tokens of context" in out
    assert (
        connect(to_it)
        .chat("tiny-file", [{"role": "user", "content": "A"}], options={"num_predict": 1})
        .prompt_eval_count
        == 6
    )
    setup(str(file), "tiny-file", system="S")  # the same file: ours to make anew
    assert (connect(to_it).show("tiny-file").modelfile or "").count("SYSTEM S") == 1
    connect(to_it).create("tiny-copy", from_="tiny-file")  # as of a pulled model
    require_ours(to_it, "tiny-copy", made_from="tiny-file")
    with pytest.raises(UserError, match="it is left alone"):
        require_ours(to_it, "tiny-copy", made_from="tiny")
    connect(to_it).delete("tiny-copy")
    other = tmp_path / "other.gguf"
    write_gguf(checkpoint, other, "f16", "r1", "0" * 64)
    with pytest.raises(UserError, match="it is left alone"):
        setup(str(other), "tiny-file")
    connect(to_it).delete("tiny-file")


@pytest.mark.parametrize(("content", "why"), [(None, "There is no file"), (b"GGUF", "R1.GGUF"), (b"", "R1.GGUF")])
def test_a_gguf_file_that_is_none(content: bytes | None, why: str, monkeypatch, tmp_path: Path) -> None:
    file = tmp_path / "R1.GGUF"
    if content is not None:
        file.write_bytes(content)
    with served(Registry(), monkeypatch), pytest.raises(UserError, match=why):
        setup(str(file))
