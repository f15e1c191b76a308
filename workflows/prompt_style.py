"""LitGPT's own commands get our prompts: a `PromptStyle` for every checkpoint directory.

LitGPT stores only the class path of a prompt style (`prompt_style.yaml`) and builds it again without arguments. Where
one of its built-in styles gives the same ids as the checkpoint's chat template, that one is stored. Elsewhere the
class's name itself carries the text around the user's message: `workflows.prompt_style.Template_78DA…`, looked up by
this module's `__getattr__`, so that it can be rebuilt from any folder and on any machine where this package is
installed.
"""

import json
import sys
import zlib
from pathlib import Path

import litgpt.prompts
import yaml
from litgpt.prompts import PromptStyle, prompt_styles, save_prompt_style
from litgpt.tokenizer import Tokenizer

from workflows.chat_template import ChatTemplate, Reasoning
from workflows.errors import UserError
from workflows.files import read_json, read_text, write_json, write_text
from workflows.template_sandbox import LONGEST
from workflows.untrusted import parse_yaml

_PREFIX = "Template_"
_PROBES = ("Name the finding.", "  two lines,\n\nspaces \t and a number 1234 ", "Ünïcödé 漢字 🙂 <b>&amp;</b>")


def __getattr__(name: str) -> type[PromptStyle]:
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        packed = bytes.fromhex(name.removeprefix(_PREFIX))
        before, after, trims = json.loads(zlib.decompressobj().decompress(packed, LONGEST))
        return _style_class(str(before), str(after), bool(trims))
    except (ValueError, TypeError, zlib.error) as e:
        raise AttributeError(f"{name} is not a prompt style of ours: {e}") from None


def _style_class(before: str, after: str, trims: bool) -> type[PromptStyle]:
    def apply(self: PromptStyle, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        return before + (prompt.strip() if trims else prompt) + after

    packed = zlib.compress(json.dumps([before, after, trims]).encode(), level=9)
    return type(_PREFIX + packed.hex().upper(), (PromptStyle,), {"apply": apply, "__module__": __name__})


def read_prompt_style(checkpoint_dir: Path) -> PromptStyle:
    """The style that `prompt_style.yaml` names. LitGPT's own reader imports and calls whatever stands there.

    Raises:
        UserError: If it is neither one of LitGPT's nor one of ours.
    """
    file = checkpoint_dir / "prompt_style.yaml"
    try:
        module, _, name = parse_yaml(read_text(file))["class_path"].rpartition(".")
        known = {"litgpt.prompts": litgpt.prompts, __name__: sys.modules[__name__]}
        style = getattr(known[module], name)
        if not issubclass(style, PromptStyle):
            raise TypeError(name)
        return style()
    except (yaml.YAMLError, KeyError, AttributeError, TypeError):
        raise UserError(
            f"{file} names no prompt style of LitGPT's or of this project. Delete it; the chat template says the same."
        ) from None


def writes_bos(template: ChatTemplate) -> bool:
    """Return whether a prompt begins with the BOS token."""
    opening = template.render([{"role": "user", "content": "?"}], add_generation_prompt=True)
    return bool(template.bos_token) and opening.startswith(template.bos_token)


def choose_prompt_style(checkpoint_dir: Path, template: ChatTemplate, add_bos_token: bool | None = None) -> PromptStyle:
    """The style with which LitGPT's CLI makes the same prompt ids as the checkpoint's chat template.

    Args:
        checkpoint_dir: The folder with the tokenizer's files.
        template: The chat template, of the folder or in place of its own.
        add_bos_token: The flag that tokenizer_config.json will have; the one that it has if None.

    Raises:
        UserError: If not even our own class gives the same ids through LitGPT's tokenizer (a BOS token too many, or a
            template that changes the message).
    """
    try:
        tokenizer = Tokenizer(checkpoint_dir)
    except (ValueError, TypeError, KeyError, AttributeError) as e:  # a BOS or EOS token that tokenizer.json lacks, …
        raise UserError(
            f"{checkpoint_dir}: tokenizer_config.json does not fit tokenizer.json ({e}). Correct the tokens that it "
            "names (bos_token, eos_token), or get both files again from where the model comes from."
        ) from None
    if add_bos_token is not None:
        tokenizer.use_bos = add_bos_token
    wanted = [template.prompt_ids([{"role": "user", "content": probe}]) for probe in _PROBES]

    def agrees(style: PromptStyle) -> bool:
        return [tokenizer.encode(style.apply(probe)).tolist() for probe in _PROBES] == wanted

    for candidate in prompt_styles.values():
        if agrees(style := candidate()):
            return style
    before, after, trims = template.single_turn()
    # LitGPT's tokenizer lets tokenizer.json add its BOS token; text that begins with it too would have two.
    for text in (before, before.removeprefix(template.bos_token)):
        if agrees(own := _style_class(text, after, trims)()):
            return own
    own = _style_class(before, after, trims)()
    if any(own.apply(probe) != template.render([{"role": "user", "content": probe}], True) for probe in _PROBES):
        raise UserError(
            f"{checkpoint_dir}: the chat template does more to a user's message than to surround it and to strip its "
            "white space, which LitGPT's commands cannot follow. Correct chat_template.jinja."
        )
    raise UserError(
        f"{checkpoint_dir}: LitGPT's tokenizer does not reproduce the chat template's ids. `add_bos_token` in "
        "tokenizer_config.json must be true exactly when the template begins with the BOS token."
    )


def write_prompt_files(checkpoint_dir: Path, template: ChatTemplate) -> None:
    """Write `prompt_style.yaml`, and `add_bos_token` in tokenizer_config.json as LitGPT's tokenizer needs it.

    LitGPT strips a leading BOS from every prompt when the flag is false, and adds one where it is absent when true.

    Raises:
        UserError: If no style gives the chat template's ids on text with newlines, digits and unicode.
    """
    file = checkpoint_dir / "tokenizer_config.json"
    write_json(file, {**read_json(file), "add_bos_token": writes_bos(template)})
    save_prompt_style(choose_prompt_style(checkpoint_dir, template), checkpoint_dir)


def replace_chat_template(checkpoint_dir: Path, template_file: Path | None, reasoning: Reasoning = "keep") -> None:
    """Give a checkpoint directory the chat template that it was trained with, and the prompt style that goes with it.

    Args:
        checkpoint_dir: The folder.
        template_file: A Jinja file that takes the place of the folder's own template; None for no other.
        reasoning: "none" switches thinking off in the template.
    """
    template = ChatTemplate.from_checkpoint(checkpoint_dir, template_file)
    changed = template.with_reasoning(reasoning)
    if template_file is None and changed.source == template.source:
        return
    write_text(checkpoint_dir / "chat_template.jinja", changed.source)
    write_prompt_files(checkpoint_dir, changed)
