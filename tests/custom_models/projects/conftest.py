"""What the tests of naming entities share: sentences, and tokenizers and models that are small."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from custom_models.projects.ner_model import Codec
from custom_models.projects.seq2seq import learn_t5_vocabulary
from data_prep.iob import Entity, tags_of
from data_prep.rows import write_rows

DRUGS, ILLS = ["aspirin", "Ibuprofen", "lithium"], ["gastric ulcer", "fever", "renal failure"]


def sentence(chance: random.Random) -> dict[str, list[str]]:
    """A drug and an illness with words between them."""
    drug, ill = chance.choice(DRUGS), chance.choice(ILLS)
    words = [chance.choice(["Oral", "High"]), drug, chance.choice(["causes", "after"]), *ill.split(), "."]
    entities = [Entity("Chemical", 1, 2), Entity("Disease", 3, len(words) - 1)]
    return {"tokens": words, "tags": tags_of(entities, len(words))}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder, chance = tmp_path_factory.mktemp("data"), random.Random(0)
    for split, n in {"train": 80, "validation": 12, "test": 20}.items():
        write_rows(folder / f"{split}.jsonl", [sentence(chance) for _ in range(n)])
    return folder


@pytest.fixture(scope="module")
def codec(data) -> Codec:
    lines = [" ".join(json.loads(line)["tokens"]) for line in (data / "train.jsonl").read_text().splitlines()]
    tokenizer = learn_t5_vocabulary(lines, 400)
    return Codec(tokenizer, ["Chemical", "Disease"], tokenizer.token_to_id("<end>"))


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory) -> Path:
    """A T5 of transformers' with a tokenizer that marks words as T5's own does."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    chance = random.Random(0)
    texts = [" ".join(sentence(chance)["tokens"]) + " ; Chemical: Disease: / @ 0123456789" for _ in range(40)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    size = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    config = T5Config(vocab_size=tokenizer.get_vocab_size(), decoder_start_token_id=0, **size)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder
