"""The first five losses of a LoRA run equal LitGPT's own `finetune_lora` and TRL's SFTTrainer on identical rows.

float32, no dropout, one micro-batch a step, the same A matrices (B is zero), the same constant learning rate, no
clipping. Ours packs the rows into trees, theirs pad them.
"""

import csv
from pathlib import Path

import litgpt.finetune.lora as litgpt_lora
import pytest
import torch
from litgpt.args import EvalArgs
from litgpt.args import TrainArgs as LitGPTTrainArgs
from litgpt.data import DataModule, get_sft_collate_fn
from litgpt.prompts import Default
from torch.utils.data import DataLoader, SequentialSampler

from tests.workflows.peft_twin import peft_twin
from workflows.chat_template import ChatTemplate
from workflows.lora import SFT
from workflows.training.loop import TrainArgs, fit, step_indices
from workflows.training.model import LoRAArgs, load_model
from workflows.training.processes import make_fabric

STEPS, BATCH, SEED, RATE = 5, 4, 11, 1e-2
TRAIN = TrainArgs(
    max_steps=STEPS,
    global_batch_size=BATCH,
    row_tokens=4096,
    max_seq_length=512,
    learning_rate=RATE,
    lr_warmup_steps=0,
    lr_schedule="constant",
    weight_decay=0.0,
    max_norm=None,
)
LORA = LoRAArgs(r=4, alpha=8)
TEXT = "fever cough pain of the left arm with a rash that spreads slowly over days and weeks 12 34"
WORDS = TEXT.split(" ")


@pytest.fixture(scope="module")
def rows(tiny_llama):
    template = ChatTemplate.from_checkpoint(tiny_llama)
    g = torch.Generator().manual_seed(0)

    def text(low, high):
        count = int(torch.randint(low, high, (1,), generator=g))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (count,), generator=g).tolist())

    return [
        template.encode_chat([{"role": "user", "content": text(3, 30)}, {"role": "assistant", "content": text(1, 9)}])
        for _ in range(STEPS * BATCH)
    ]


@pytest.fixture(scope="module")
def in_order(rows):
    """The rows as our run takes them, for trainers that take them one after another."""
    return [rows[i] for step in range(STEPS) for i in step_indices(step, len(rows), BATCH, SEED)]


@pytest.fixture(scope="module")
def adapters(tiny_llama):
    torch.manual_seed(21)
    model = load_model(tiny_llama, LORA)
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}


@pytest.fixture(scope="module")
def our_losses(tiny_llama, rows, adapters, tmp_path_factory):
    model = load_model(tiny_llama, LORA)
    model.load_state_dict(adapters, strict=False)
    objective = SFT(rows, rows[:2], TRAIN, SEED)
    out = tmp_path_factory.mktemp("ours")
    return fit(make_fabric(), model, objective, TRAIN, out, seed=SEED, identity={}).losses


class InOrder(DataModule):
    """The same rows for LitGPT, unshuffled."""

    prompt_style = Default()

    def __init__(self, rows):
        super().__init__()
        self.items = [
            {
                "input_ids": torch.tensor(row.prompt + row.completion),
                "labels": torch.tensor([-100] * len(row.prompt) + row.completion),
                "token_counts": {"raw": 1, "raw_plus_prompt_template": 1},
            }
            for row in rows
        ]

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(self.items, batch_size=self.batch_size, collate_fn=get_sft_collate_fn())

    def val_dataloader(self):
        return DataLoader(self.items[:2], batch_size=2, collate_fn=get_sft_collate_fn())


def test_losses_equal_litgpts_finetune_lora(tiny_llama, in_order, adapters, our_losses, tmp_path, monkeypatch):
    load = litgpt_lora.load_checkpoint

    def load_and_copy_adapters(fabric, model, path, strict=True):
        load(fabric, model, path, strict)
        model.load_state_dict(adapters, strict=False)

    def constant(optimizer, warmup_steps, max_steps):
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    monkeypatch.setattr(litgpt_lora, "load_checkpoint", load_and_copy_adapters)
    monkeypatch.setattr(litgpt_lora, "get_lr_scheduler", constant)
    monkeypatch.setattr(litgpt_lora, "generate_example", lambda *_: None)  # the random model's babble
    monkeypatch.setattr(litgpt_lora, "save_hyperparameters", lambda *_: None)  # it parses pytest's own arguments
    monkeypatch.setattr(litgpt_lora, "merge_lora", lambda **_: None)
    litgpt_lora.setup(
        checkpoint_dir=tiny_llama,
        out_dir=tmp_path,
        precision="32-true",
        data=InOrder(in_order),
        train=LitGPTTrainArgs(
            save_interval=1000,
            log_interval=1,
            global_batch_size=BATCH,
            micro_batch_size=BATCH,
            lr_warmup_steps=1,
            epochs=2,
            max_steps=STEPS,
        ),
        eval=EvalArgs(interval=1000, max_new_tokens=1, max_iters=1),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": RATE, "weight_decay": 0.0}},
        **{**LORA.config_fields(), "lora_dropout": 0.0},
    )
    (log,) = Path(tmp_path).rglob("metrics.csv")
    theirs = [float(row["loss"]) for row in csv.DictReader(log.read_text().splitlines()) if row["loss"]]
    assert len(theirs) == STEPS
    assert theirs[0] - theirs[-1] > 0.05  # it does learn: equal losses of a frozen model would prove nothing
    assert our_losses == pytest.approx(theirs, abs=1e-4)


def test_losses_equal_trls(tiny_llama_hf, in_order, adapters, our_losses, tmp_path):
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = peft_twin(tiny_llama_hf, adapters, LORA)

    class InOrderTrainer(SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    data = datasets.Dataset.from_list(
        [
            {"input_ids": row.prompt + row.completion, "labels": [-100] * len(row.prompt) + row.completion}
            for row in in_order
        ]
    )
    config = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=512,
        disable_tqdm=True,
    )
    trainer = InOrderTrainer(
        model=model, args=config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(tiny_llama_hf)
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == STEPS
    assert our_losses == pytest.approx(theirs, abs=1e-4)
