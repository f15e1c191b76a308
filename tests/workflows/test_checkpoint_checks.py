"""What a later step would refuse is found when a checkpoint is downloaded, and again before training and export."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, normalizers

from tests.conftest import CHATML, convert, make_llama
from tests.workflows.test_lora import TRAIN, write_rows
from workflows import export, lora
from workflows.chat_spans import OTHER_HEADER
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import load_config
from workflows.checkpoint_checks import HF_ONLY, checkpoint_problems
from workflows.download import setup
from workflows.errors import UserError
from workflows.ollama.gguf_writer import write_gguf
from workflows.ollama.modelfile import make_modelfile

SHA = "0" * 64
BASE_STOP = {"eos_token": "<|endoftext|>"}
COUNTED = CHATML.replace(
    "+ message['role'] +", "+ message['role'] + (loop.index | string if message['role'] == 'user' else '') +"
)
"""A template that numbers its questions: training follows it, a Go template of Ollama cannot."""


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def download(folder: Path, checkpoints: Path, **options: Any) -> Path:
    setup(model=str(folder), checkpoints_dir=checkpoints, **options)
    return checkpoints / "local" / folder.name


@pytest.fixture
def folder(tiny_llama_hf: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder to spoil."""
    return shutil.copytree(tiny_llama_hf, tmp_path / "mine")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "toy"
    directory.mkdir()
    write_rows(directory / "train.jsonl", 8)
    write_rows(directory / "validation.jsonl", 4, offset=100)
    (directory / "manifest.json").write_text("{}")
    return directory


def train(checkpoint: Path, data: Path, out_dir: Path, **changes: Any) -> None:
    settings = {"max_steps": 1, "global_batch_size": 2, "lr_warmup_steps": 0, "eval_interval": 1, "save_interval": 1}
    lora.setup(
        checkpoint_dir=checkpoint,
        data=data,
        out_dir=out_dir,
        train=type(TRAIN)(**{**vars(TRAIN), **settings}),
        precision="32-true",
        lora_r=2,
        **changes,
    )


def stripping(folder: Path) -> None:
    """Let a token take the white space beside it, as Phi's do."""
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    data["added_tokens"][2]["rstrip"] = True
    file.write_text(json.dumps(data))


def sentencepiece_like(folder: Path) -> None:
    """Give the tokenizer what Llama 2's has: a marked space before every text, and bytes for unknown characters."""
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.normalizer = normalizers.Prepend("Ġ")
    tokenizer.save(str(file))
    data = json.loads(file.read_text())
    data["model"]["byte_fallback"] = True
    file.write_text(json.dumps(data))


def add_token(folder: Path, text: str) -> int:
    """Add a token to the tokenizer, but no row to the embedding; returns its id."""
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens([AddedToken(text, special=True)])
    tokenizer.save(str(file))
    return tokenizer.token_to_id(text)


def test_a_sound_checkpoint_has_no_problems(tiny_llama, tiny_qwen2):
    for checkpoint in (tiny_llama, tiny_qwen2):
        found = checkpoint_problems(checkpoint)
        assert (found.training, found.export, found.notes, found.notes_on("x")) == ([], [], [], "")


@pytest.mark.checkpoint
def test_the_embedded_checkpoint_has_no_problems(embedded_checkpoint):
    assert checkpoint_problems(embedded_checkpoint).notes_on("x") == ""


EXPORT_ONLY = {
    "a tokenizer that llama.cpp lacks": (sentencepiece_like, "not SentencePiece ones"),
    "tokens that take white space": (stripping, r"the tokens <\|im_end\|> take the white space beside them"),
    "a template that Ollama lacks": (
        lambda f: (f / "chat_template.jinja").write_text(COUNTED),
        "TEMPLATE cannot follow",
    ),
    "settings that are no numbers": (
        lambda f: edit_json(f / "generation_config.json", temperature="hot"),
        "temperature is 'hot', not a number",
    ),
}


@pytest.mark.parametrize("case", EXPORT_ONLY)
def test_what_only_the_export_refuses_is_said_at_download_before_training_and_before_the_export_writes(
    case, folder, data, tmp_path, capsys
):
    spoil, reason = EXPORT_ONLY[case]
    spoil(folder)
    checkpoint = download(folder, tmp_path / "c")
    told = capsys.readouterr().out
    assert f"{folder}: training and evaluation work, but `make export` cannot make an Ollama model" in told
    assert re.search(reason, told) and ".part" not in told
    train(checkpoint, data, tmp_path / "run")
    told = capsys.readouterr().out
    assert told.count("training and evaluation work, but") == 1 and re.search(reason, told)
    with pytest.raises(UserError, match=reason) as error:
        export.setup(tmp_path / "run" / "final", out_dir=tmp_path / "out", create=False)
    assert str(error.value).endswith(HF_ONLY)
    assert not (tmp_path / "out").exists()
    export.setup(tmp_path / "run" / "final", out_dir=tmp_path / "out", quantize=[], adapter=True, create=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"hf", "adapter", "metrics.json", "provenance.json"}


def test_a_token_that_takes_white_space_is_no_problem_where_the_template_writes_none_beside_it(folder, tmp_path):
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    data["added_tokens"][0]["rstrip"] = True  # <|endoftext|>, which the template does not write
    file.write_text(json.dumps(data))
    assert checkpoint_problems(download(folder, tmp_path / "c")).export == []


def test_what_is_not_learned_of_several_answers_is_said_where_it_is_learned(folder, data, tmp_path, capsys):
    empty = "<think>\n\n</think>\n\n"
    source = CHATML.replace("assistant\n' }}", "assistant\n" + empty + "' }}")
    source = source.replace(
        "+ message['content']",
        f"+ ('{empty}' if loop.last and message['role'] == 'assistant' else '') + message['content']",
    )
    (folder / "chat_template.jinja").write_text(source)
    checkpoint = download(folder, tmp_path / "c")
    said = "in training on conversations with several answers, earlier answers not learned"
    assert said in capsys.readouterr().out
    found = checkpoint_problems(checkpoint)
    assert found.unlearned == [OTHER_HEADER] and found.notes == []
    export.setup(checkpoint, out_dir=tmp_path / "out", create=False)
    assert "not learned" not in capsys.readouterr().out


def test_no_type_and_nothing_else_is_no_export(tiny_llama, tmp_path):
    for options in ({"create": True}, {"create": False, "hf": False}):
        with pytest.raises(UserError, match="--quantize is empty, which needs --create false, and --hf or"):
            export.setup(tiny_llama, out_dir=tmp_path / "out", quantize=[], verify_prompts=0, **options)


def test_an_unused_token_without_a_row_is_a_note_and_left_out_of_the_gguf(folder, data, tmp_path, capsys):
    extra = add_token(folder, "<pad>")
    checkpoint = download(folder, tmp_path / "c")
    rows = load_config(checkpoint).vocab_size
    assert extra == rows
    told = capsys.readouterr().out
    assert f"tokens without a row in the embedding of {rows} rows: '<pad>' ({rows}). Neither" in told
    assert "training and evaluation work, but" not in told
    train(checkpoint, data, tmp_path / "run")
    assert "'<pad>'" in capsys.readouterr().out
    export.setup(checkpoint, name="mine", out_dir=tmp_path / "out", quantize="f32", create=False)
    assert "a GGUF file leaves them out" in capsys.readouterr().out
    tokens = GGUFReader(tmp_path / "out" / "mine-f32.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == rows and "<pad>" not in tokens


def use_in_template(folder: Path) -> None:
    add_token(folder, "<|user|>")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("'<|im_start|>' + message", "'<|user|>' + message"))


def use_as_stop(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[2, add_token(folder, "<|stop|>")])


def longer_vocabulary(folder: Path) -> None:
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"] |= {"zzz": len(data["model"]["vocab"])}
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("spoil", "token"), [(use_in_template, "'<|user|>'"), (use_as_stop, "'<|stop|>'"), (longer_vocabulary, "'zzz'")]
)
def test_a_needed_token_without_a_row_is_refused(spoil, token, folder, data, tmp_path):
    checkpoint = shutil.copytree(download(folder, tmp_path / "c"), tmp_path / "sound")
    spoil(folder)
    with pytest.raises(UserError, match="needed but have no row in the embedding") as error:
        download(folder, tmp_path / "d")
    assert token in str(error.value) and "resize_token_embeddings" in str(error.value)
    assert not (tmp_path / "d" / "local" / "mine").exists()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(folder / name, checkpoint / name)
    with pytest.raises(UserError, match="needed but have no row in the embedding"):
        train(checkpoint, data, tmp_path / "run")  # it came from elsewhere, or was edited
    with pytest.raises(UserError, match="needed but have no row in the embedding"):
        export.setup(checkpoint, out_dir=tmp_path / "out", create=False)


def test_a_base_models_tokenizer_must_fit_its_embedding_too(folder, tmp_path):
    (folder / "chat_template.jinja").unlink()
    longer_vocabulary(folder)
    with pytest.raises(UserError, match="'zzz'"):
        download(folder, tmp_path / "c")


def test_named_chat_templates_without_a_default_are_not_called_none(folder, tmp_path, capsys):
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": CHATML}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    checkpoint = download(folder, tmp_path / "c")
    assert "none of its chat templates is called default, so none is used (tool_use)" in capsys.readouterr().out
    assert not (checkpoint / "chat_template.jinja").exists()


def test_stop_tokens_that_are_none_are_named(folder, tmp_path, capsys):
    edit_json(folder / "generation_config.json", eos_token_id=[2, 99999])
    download(folder, tmp_path / "c")
    assert "stop tokens that the tokenizer does not have: [99999]. They are ignored" in capsys.readouterr().out


def as_base(folder: Path) -> None:
    """Give a model what Qwen2.5's base models have: a ChatML template, but the end of the text as only EOS token."""
    edit_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    edit_json(folder / "generation_config.json", eos_token_id=0)


def test_the_templates_own_turn_end_becomes_a_stop_token_everywhere(folder, data, tmp_path, capsys):
    as_base(folder)
    checkpoint = download(folder, tmp_path / "c")
    assert "ends a turn with <|im_end|>, which is none of the checkpoint's stop tokens" in capsys.readouterr().out
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2]
    template = ChatTemplate.from_checkpoint(checkpoint)
    assert (template.stop_ids, template.turn_end) == ((0, 2), "<|im_end|>")
    stops = make_modelfile(template, generation, num_ctx=8, num_thread=1).parameters["stop"]
    assert stops == ["<|endoftext|>", "<|im_end|>"]
    write_gguf(checkpoint, tmp_path / "m.gguf", "f32", "mine", SHA)
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")] == [0, 2]
    train(checkpoint, data, tmp_path / "run")
    assert (tmp_path / "run" / "final" / "generation_config.json").read_text() == (
        checkpoint / "generation_config.json"
    ).read_text()


TWO_ENDS = CHATML.replace("'<|im_end|>'", "'<|im_end|><|im_start|>'")


def test_a_turn_end_of_several_tokens_is_refused_until_one_is_named(folder, tmp_path):
    as_base(folder)
    assert TWO_ENDS != CHATML
    (folder / "chat_template.jinja").write_text(TWO_ENDS)
    with pytest.raises(UserError, match=r"none of the model's stop tokens(.|\n)*--stop TOKEN and --chat_template FILE"):
        download(folder, tmp_path / "c")
    with pytest.raises(UserError, match=r"--stop 'im_end' is not one token of this tokenizer. .*<\|im_end\|>"):
        download(folder, tmp_path / "c", stop="im_end")
    checkpoint = download(folder, tmp_path / "c", stop="<|im_end|>")
    assert ChatTemplate.from_checkpoint(checkpoint).turn_end == "<|im_end|>"
    provenance = json.loads((checkpoint / "provenance.json").read_text())["sources"]["model"]
    assert provenance["stop"] == ["<|im_end|>"]
    download(folder, tmp_path / "c")  # as the other make targets ask for it
    with pytest.raises(UserError, match="was made from something else: stop"):
        download(folder, tmp_path / "c", stop=["<|im_start|>"])


def test_a_base_model_gets_a_template_here_or_in_training(folder, data, tmp_path, capsys):
    as_base(folder)
    (folder / "chat_template.jinja").unlink()
    bare = download(folder, tmp_path / "bare")
    assert "it is a base model. Training and export need one: give a Jinja file with --chat_template" in (
        capsys.readouterr().out
    )
    with pytest.raises(UserError, match="has no chat template"):
        train(bare, data, tmp_path / "run")
    template = tmp_path / "mine.jinja"
    template.write_text(CHATML)
    with pytest.raises(UserError, match="there is no such file"):
        download(folder, tmp_path / "c", chat_template=tmp_path / "absent.jinja")
    checkpoint = download(folder, tmp_path / "c", chat_template=template)
    assert (checkpoint / "chat_template.jinja").read_text() == CHATML
    assert ChatTemplate.from_checkpoint(checkpoint).stop_ids == (0, 2)
    assert (checkpoint / "prompt_style.yaml").is_file()
    train(checkpoint, data, tmp_path / "run")
    download(folder, tmp_path / "c")
    template.write_text(CHATML + " ")
    with pytest.raises(UserError, match="was made from something else: chat_template"):
        download(folder, tmp_path / "c", chat_template=template)


def test_a_template_for_training_is_tried_before_the_first_step(folder, data, tmp_path, capsys):
    """Its prompt style is written with the result only, and needs the BOS flag that the template calls for."""
    edit_json(folder / "tokenizer_config.json", bos_token="<|endoftext|>", add_bos_token=False)
    checkpoint = download(folder, tmp_path / "c")
    capsys.readouterr()
    template = tmp_path / "mine.jinja"
    template.write_text("{{ bos_token }}" + COUNTED)
    train(checkpoint, data, tmp_path / "run", chat_template=template)
    assert "TEMPLATE cannot follow" in capsys.readouterr().out
    final = tmp_path / "run" / "final"
    assert json.loads((final / "tokenizer_config.json").read_text())["add_bos_token"] is True
    template.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}A{{ x.y }}"
    )
    with pytest.raises(UserError, match="refuses this conversation"):
        train(checkpoint, data, tmp_path / "other", chat_template=template)
    assert not (tmp_path / "other" / "metrics.csv").exists()


def test_other_architectures_are_named_before_training(tmp_path, data, capsys):
    checkpoint = convert(make_llama(tmp_path / "mine"), tmp_path / "c")
    edit_json(checkpoint / "config.json", architectures=["FalconForCausalLM"])
    capsys.readouterr()
    train(checkpoint, data, tmp_path / "run")
    assert "FalconForCausalLM cannot be exported" in capsys.readouterr().out
