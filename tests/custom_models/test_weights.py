"""The command lines of the readers of checkpoints: each compares itself with the reference."""

import re

import pytest
import torch
import transformers

from custom_models import (
    deepseek_checkpoint,
    encoder_checkpoint,
    encoder_decoder_checkpoint,
    gpt_checkpoint,
    llama_checkpoint,
)
from custom_models.weights import tell_difference
from workflows.errors import UserError

READERS = {
    "encoder": (encoder_checkpoint, "103 tensors are the encoder's"),
    "gpt": (gpt_checkpoint, "-> blocks.0.attention.k.weight (64, 64)"),
    "llama": (llama_checkpoint, "and 29 layers more; the head is the embedding"),
    "T5": (encoder_decoder_checkpoint, "decoder.0.cross.out.weight"),
    "deepseek": (deepseek_checkpoint, "layers.1.feed_forward.router.bias"),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_shows_that_it_computes_what_the_reference_does(reader, capsys):
    module, shown = READERS[reader]
    module.main()
    out = capsys.readouterr().out
    assert shown in out and float(re.search(r"by at most (\S+),", out)[1]) < 1e-4


def test_checkpoints_of_ones_own_are_compared_too(tmp_path, capsys):
    config = transformers.GPT2Config(vocab_size=70, n_positions=40, n_embd=32, n_layer=1, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    gpt_checkpoint.main(str(tmp_path))
    assert "logits (2, 32, 70): differ from the reference by at most" in capsys.readouterr().out
    with pytest.raises(UserError, match="of the architecture 'gpt2'"):
        deepseek_checkpoint.main(tmp_path)
    with pytest.raises(UserError, match="of the architecture 'gpt2'"):
        encoder_checkpoint.main(str(tmp_path))


def test_a_difference_is_told(capsys):
    tell_difference("states", torch.zeros(2, 3), torch.full((2, 3), -0.5))
    assert (
        capsys.readouterr().out == "states (2, 3): differ from the reference by at most 5.0e-01, of sizes up to 0.5\n"
    )
