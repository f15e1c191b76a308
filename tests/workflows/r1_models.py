"""Tiny models with the special tokens and the template of DeepSeek-R1's distilled models, Qwen2- and Llama-shaped.

They say nothing about the real vocabulary: only how such tokens and such a template come through our export to Ollama.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.conftest import TEXT, make_llama, make_qwen2
from tests.workflows.conftest import speak_ascii
from workflows.gguf_tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
R1 = (
    "{% set ns = namespace(system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)


def write_r1_tokenizer(folder: Path, split: str, ignore_merges: bool) -> None:
    """R1's files over a small byte-level BPE; as in its own, the marks of turns and thoughts are not called special."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=378, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT + " 1234 567\n\n\n"] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS)])
    marks = (USER, ASSISTANT, "<think>", "</think>")
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(R1)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": tokenizer.token_to_id(EOS)}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def make_r1(folder: Path, shape: str) -> Path:
    """A random model of that shape ("qwen2" or "llama") in Hugging Face's form, its head untied as in R1's own."""
    qwen2 = shape == "qwen2"
    make = make_qwen2 if qwen2 else make_llama
    make(folder, tied=False, vocab_size=384, hidden_size=64, intermediate_size=128)
    write_r1_tokenizer(folder, QWEN2_SPLIT if qwen2 else LLAMA3_SPLIT, ignore_merges=not qwen2)
    return speak_ascii(folder)
