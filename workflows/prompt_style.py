"""LitGPT's own commands get our prompts: a `PromptStyle` for every checkpoint directory.

LitGPT stores only the class path of a prompt style (`prompt_style.yaml`) and builds it again without arguments. Where
one of its built-in styles gives the same ids as the checkpoint's chat template, that one is stored. Elsewhere the
class's name itself carries the text around the user's message: `workflows.prompt_style.Template_78DA…`, looked up by
this module's `__getattr__`, so that it can be rebuilt from any folder and on any machine where this package is
installed.
"""

import json
import zlib
from pathlib import Path

from litgpt.prompts import PromptStyle, prompt_styles, save_prompt_style
from litgpt.tokenizer import Tokenizer

from workflows.chat_template import ChatTemplate
from workflows.errors import UserError

_PREFIX = "Template_"
_PROBES = ("Name the finding.", "  two lines,\n\nspaces \t and a number 1234 ", "Ünïcödé 漢字 🙂 <b>&amp;</b>")


def __getattr__(name: str) -> type[PromptStyle]:
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        before, after, trims = json.loads(zlib.decompress(bytes.fromhex(name.removeprefix(_PREFIX))))
    except (ValueError, zlib.error) as e:
        raise AttributeError(f"{name} is not a prompt style of ours: {e}") from None
    return _style_class(before, after, trims)


def _style_class(before: str, after: str, trims: bool) -> type[PromptStyle]:
    def apply(self: PromptStyle, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        return before + (prompt.strip() if trims else prompt) + after

    packed = zlib.compress(json.dumps([before, after, trims]).encode(), level=9)
    return type(_PREFIX + packed.hex().upper(), (PromptStyle,), {"apply": apply, "__module__": __name__})


def choose_prompt_style(checkpoint_dir: Path, template: ChatTemplate) -> PromptStyle:
    """The style with which LitGPT's CLI makes the same prompt ids as the checkpoint's chat template.

    Raises:
        UserError: If not even our own class gives the same ids through LitGPT's tokenizer (a BOS token too many).
    """
    tokenizer = Tokenizer(checkpoint_dir)
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
    raise UserError(
        f"{checkpoint_dir}: LitGPT's tokenizer does not reproduce the chat template's ids. `add_bos_token` in "
        "tokenizer_config.json must be true exactly when the template begins with the BOS token."
    )


def write_prompt_style(checkpoint_dir: Path, template: ChatTemplate) -> None:
    """Write `prompt_style.yaml`, checked against the chat template on text with newlines, digits and unicode."""
    save_prompt_style(choose_prompt_style(checkpoint_dir, template), checkpoint_dir)
