"""LitGPT's own commands, started anywhere, make the prompt ids of the checkpoint's chat template."""

import json
from pathlib import Path
from typing import Any

import litgpt.generate.base
import pytest
import torch

from tests.conftest import make_llama
from tests.workflows.test_chat_template import FAMILIES, write_family
from workflows.chat_template import ChatTemplate
from workflows.conversion import write_checkpoint
from workflows.errors import UserError
from workflows.hf_reader import read_hf_dir
from workflows.prompt_style import choose_prompt_style, read_prompt_style

PROMPTS = [
    "Which clinical finding does this describe? Abnormally fast breathing.",
    "  two lines,\n\nspaces \t and a number 1234 ",
    "Ünïcödé 漢字 🙂 <b>&amp;</b> {not_a_format}",
    "it writes <|im_end|> or <｜User｜> or <|eot_id|> itself",
]


class Stop(Exception):
    """Raised where LitGPT would begin to generate."""


def litgpt_prompt_ids(
    checkpoint_dirs: list[Path], prompts: list[str], cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[Path, list[list[int]]]:
    """The ids that `litgpt generate`, run in another folder, hands to the model for each prompt."""
    seen: list[list[int]] = []

    def generate(model: Any, prompt: torch.Tensor, *_: Any, **__: Any) -> None:
        seen.append(prompt.tolist())
        raise Stop

    asked = [directory.resolve() for directory in checkpoint_dirs]
    monkeypatch.setattr(litgpt.generate.base, "generate", generate)
    monkeypatch.chdir(cwd)
    for directory in asked:
        for prompt in prompts:
            with pytest.raises(Stop):
                litgpt.generate.base.main(directory, prompt=prompt, max_new_tokens=1)
    n = len(prompts)
    return {directory: seen[i * n : (i + 1) * n] for i, directory in enumerate(checkpoint_dirs)}


def make_checkpoint(folder: Path, family: str) -> Path:
    hf_dir = make_llama(folder / f"{family}-hf", vocab_size=420, initializer_range=0.02)
    write_family(hf_dir, family)
    output = folder / family
    output.mkdir()
    write_checkpoint(read_hf_dir(hf_dir), output, family)
    return output


@pytest.mark.long
def test_litgpt_generate_uses_the_templates_ids_for_every_family(tmp_path, monkeypatch):
    checkpoint_dirs = [make_checkpoint(tmp_path, family) for family in FAMILIES]
    got = litgpt_prompt_ids(checkpoint_dirs, PROMPTS, tmp_path, monkeypatch)
    for directory in checkpoint_dirs:
        template = ChatTemplate.from_checkpoint(directory)
        expected = [template.prompt_ids([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
        assert got[directory] == expected, directory.name
        bos = template.tokenizer.token_to_id(template.bos_token) if template.bos_token else None
        if template.bos_token and directory.name != "smollm2":  # there BOS also opens every turn
            assert all(ids.count(bos) == 1 for ids in expected)


@pytest.mark.checkpoint
def test_litgpt_generate_uses_the_templates_ids_for_the_embedded_checkpoint(embedded_checkpoint, tmp_path, monkeypatch):
    (got,) = litgpt_prompt_ids([embedded_checkpoint], PROMPTS, tmp_path, monkeypatch).values()
    template = ChatTemplate.from_checkpoint(embedded_checkpoint)
    assert got == [template.prompt_ids([{"role": "user", "content": prompt}]) for prompt in PROMPTS]


def test_a_style_that_is_not_litgpts_is_rebuilt_from_its_name(tmp_path):
    directory = make_checkpoint(tmp_path, "llama-3.2")
    style = (directory / "prompt_style.yaml").read_text()
    assert "workflows.prompt_style.Template_" in style
    from litgpt.prompts import load_prompt_style

    applied = load_prompt_style(directory).apply("  Name it. ")
    assert applied.endswith("<|end_header_id|>\n\nName it.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert read_prompt_style(directory).apply("  Name it. ") == applied

    import workflows.prompt_style

    with pytest.raises(AttributeError, match="is not a prompt style of ours"):
        workflows.prompt_style.Template_00FF  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        workflows.prompt_style.Other  # noqa: B018


def test_a_litgpt_style_is_used_where_its_ids_match(tmp_path):
    directory = make_checkpoint(tmp_path, "smollm2")
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    text = (directory / "chat_template.jinja").read_text().replace("You are a tiny model", system)
    (directory / "chat_template.jinja").write_text(text)
    style = choose_prompt_style(directory, ChatTemplate.from_checkpoint(directory))
    assert type(style).__name__ == "SmolLM2"


def test_a_wrong_bos_setting_is_refused(tmp_path):
    directory = make_checkpoint(tmp_path, "smollm2")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    with pytest.raises(UserError, match="add_bos_token"):
        choose_prompt_style(directory, ChatTemplate.from_checkpoint(directory))


def test_a_template_that_changes_the_message_is_named(tmp_path):
    directory = make_checkpoint(tmp_path, "smollm2")
    text = (directory / "chat_template.jinja").read_text()
    for change in ("|upper", ".lstrip()", ".replace('\\n', ' ')"):
        (directory / "chat_template.jinja").write_text(
            text.replace("message['content']", f"(message['content']){change}")
        )
        with pytest.raises(UserError, match="does more to a user's message"):
            choose_prompt_style(directory, ChatTemplate.from_checkpoint(directory))


@pytest.mark.parametrize(
    "text",
    [
        "class_path: antigravity.fly",
        "class_path: os.abort",
        "class_path: litgpt.prompts.importlib.import_module",
        "class_path: litgpt.prompts.Path",
        "class_path: workflows.prompt_style.Template_00FF",
        "class_path: 1",
        "- class_path",
        "class_path: [",
    ],
)
def test_a_strangers_prompt_style_runs_no_code(text, tmp_path):
    """LitGPT's own reader would import the module and call what is named there."""
    (tmp_path / "prompt_style.yaml").write_text(text)
    with pytest.raises(UserError, match=r"prompt_style.yaml names no prompt style"):
        read_prompt_style(tmp_path)
