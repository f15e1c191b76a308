"""`make bench-lora`: LoRA fine-tuning, ours against LitGPT's `finetune_lora` and TRL's SFTTrainer with PEFT.

The same rows in the same order of steps, the same model, rank, precision and thread count. Counted are the tokens of
the samples, without padding, per second of training (no start-up, validation or saving). Peers' settings are the best
of those tried (docs/performance.md); samples are sorted by length, so that whoever pads pads little.
"""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch

from bench.harness import alternate, by_precision, hf_directory, report, tell, write_report
from data_prep.rows import read_rows
from workflows.chat_template import ChatTemplate, EncodedChat
from workflows.errors import UserError, run_file
from workflows.training.model import LoRAArgs

RATE = 2e-4
CONTENDERS = ("ours", "litgpt", "trl")
Contender = Literal["ours", "litgpt", "trl"]
TRLBatching = Literal["padded", "padding_free", "packed"]


def setup(
    checkpoint_dir: Path = Path("checkpoints/embedded/smollm2-135m-instruct"),
    data: Path = Path("data/hpo"),
    rows: int = 200,
    max_seq_length: int = 512,
    batch: int = 8,
    rounds: int = 3,
    precisions: list[Literal["bf16-true", "32-true"]] = ["bf16-true", "32-true"],  # noqa: B006
    row_tokens: int = 2048,
    litgpt_micro_batch: int = 2,
    trl_batching: TRLBatching = "packed",
    trl_micro_batch: int = 1,
    contender: Contender | None = None,
) -> None:
    """Measure, and write out/bench/lora.json.

    Args:
        checkpoint_dir: The model.
        data: A data directory; rows of all lengths are taken from its training split.
        rows: Samples, a multiple of --batch; one epoch is one run.
        max_seq_length: Longest sample in tokens.
        batch: Samples of an optimizer step.
        rounds: How often each contender runs, in turn.
        precisions: What to measure.
        row_tokens: Capacity of our packed rows.
        litgpt_micro_batch: Samples that LitGPT pads together.
        trl_batching: How TRL makes a batch: samples of about equal length padded, the same end to end in one row, or
            samples packed into rows of max_seq_length; in the last two transformers' mask keeps the samples apart.
        trl_micro_batch: Samples (rows where they are packed) that TRL computes at once; gradients add up to the batch.
        contender: Run only this one, once, in this process (used by the bench itself).
    """
    if rows % batch:
        raise UserError(f"--rows must be a multiple of --batch {batch}, not {rows}.")
    if contender is not None:
        chats = choose_rows(checkpoint_dir, data, rows, max_seq_length)
        with contextlib.redirect_stdout(sys.stderr):
            options: dict[str, dict[str, Any]] = {
                "ours": {"row_tokens": row_tokens},
                "litgpt": {"micro_batch": litgpt_micro_batch},
                "trl": {"batching": trl_batching, "micro_batch": trl_micro_batch},
            }
            seconds, loss = _RUN[contender](
                checkpoint_dir, chats, precisions[0], max_seq_length, batch, **options[contender]
            )
        tokens = sum(len(chat.prompt) + len(chat.completion) for chat in chats)
        tell(rate=tokens / seconds, loss=loss)
        return

    hf_directory(checkpoint_dir)
    settings = {
        "rows": rows, "max_seq_length": max_seq_length, "batch": batch, "rounds": rounds, "data": data.name,
        "row_tokens": row_tokens, "litgpt_micro_batch": litgpt_micro_batch,
        "trl_batching": trl_batching, "trl_micro_batch": trl_micro_batch,
    }  # fmt: skip
    reports: dict[str, Any] = {}
    for precision in precisions:
        arguments = [
            f"--checkpoint_dir={checkpoint_dir}", f"--data={data}", f"--rows={rows}",
            f"--max_seq_length={max_seq_length}", f"--precisions=[{precision}]", f"--batch={batch}",
            f"--row_tokens={row_tokens}", f"--litgpt_micro_batch={litgpt_micro_batch}",
            f"--trl_batching={trl_batching}", f"--trl_micro_batch={trl_micro_batch}",
        ]  # fmt: skip
        runs = alternate("bench.lora", list(CONTENDERS), arguments, rounds)
        losses = {name: rounds_[0]["loss"] for name, rounds_ in runs.items()}
        if max(losses.values()) - min(losses.values()) > 0.05:
            raise UserError(
                f"The contenders do not do the same work: the mean losses of their learned tokens are {losses}."
            )
        reports[precision] = report("lora", "tokens/s", {**settings, "precision": precision}, runs)
    write_report(by_precision(reports))


def choose_rows(checkpoint_dir: Path, data: Path, rows: int, max_seq_length: int) -> list[EncodedChat]:
    """Rows of mixed length, sorted by it, so that a padding trainer pads as little as can be."""
    template = ChatTemplate.from_checkpoint(checkpoint_dir)
    encoded = [template.encode_chat(row["messages"]) for row in read_rows(data / "train.jsonl")[: rows * 20]]
    fitting = [c for c in encoded if len(c.prompt) + len(c.completion) <= max_seq_length]
    by_length = sorted(fitting, key=lambda c: len(c.prompt) + len(c.completion))
    chosen = by_length[:: max(1, len(by_length) // rows)][:rows]
    if len(chosen) < rows:
        raise UserError(f"{data} has only {len(chosen)} rows of up to {max_seq_length} tokens; lower --rows.")
    return chosen


def weighted_mean(losses: list[float], learned: list[int], samples: int) -> float:
    """Mean loss of all learned tokens, from the means of every `samples` samples and each sample's learned tokens."""
    tokens = [sum(learned[i : i + samples]) for i in range(0, len(learned), samples)]
    return sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens)


def run_ours(
    checkpoint_dir: Path, chats: list[EncodedChat], precision: Any, max_seq_length: int, batch: int, row_tokens: int
) -> tuple[float, float]:
    """Our loop. Returns seconds of training and the mean loss of the epoch's learned tokens."""
    from tempfile import TemporaryDirectory

    from workflows.lora import SFT
    from workflows.training.loop import TrainArgs, fit
    from workflows.training.model import load_model
    from workflows.training.processes import make_fabric

    class InOrder(SFT):
        def batches(self, step: int, rank: int, world_size: int) -> list[Any]:
            from workflows.training.batch import pack

            return [packed for _, packed in pack(self.trees[step * batch : (step + 1) * batch], self.train.row_tokens)]

    steps = len(chats) // batch
    train = TrainArgs(
        max_steps=steps, global_batch_size=batch, row_tokens=row_tokens, max_seq_length=max_seq_length,
        learning_rate=RATE, lr_warmup_steps=0, lr_schedule="constant", max_norm=None,
        eval_interval=10**9, save_interval=10**9,
    )  # fmt: skip
    torch.manual_seed(0)
    model = load_model(checkpoint_dir, LoRAArgs(), precision, max_seq_length)
    with TemporaryDirectory() as out:
        result = fit(make_fabric(), model, InOrder(chats, chats[:1], train, 0), train, Path(out), seed=0, identity={})
    learned = [sum(chat.loss_mask) for chat in chats]
    return result.seconds, weighted_mean(result.losses, learned, batch)


def run_litgpt(
    checkpoint_dir: Path, chats: list[EncodedChat], precision: Any, max_seq_length: int, batch: int, micro_batch: int
) -> tuple[float, float]:
    """LitGPT's own `finetune_lora`, its training loop timed from outside."""
    from tempfile import TemporaryDirectory

    import litgpt.finetune.lora as finetune
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule, get_sft_collate_fn
    from litgpt.prompts import Default
    from torch.utils.data import DataLoader

    items = [
        {
            "input_ids": torch.tensor(chat.prompt + chat.completion),
            "labels": torch.tensor([-100] * len(chat.prompt) + chat.completion),
            "token_counts": {"raw": 1, "raw_plus_prompt_template": 1},
        }
        for chat in chats
    ]

    class InOrder(DataModule):
        prompt_style = Default()

        def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
            self.batch_size = batch_size

        def train_dataloader(self) -> Any:
            rows: Any = items
            return DataLoader(rows, batch_size=self.batch_size, collate_fn=get_sft_collate_fn())

        def val_dataloader(self) -> Any:
            rows: Any = items[:1]
            return DataLoader(rows, batch_size=1, collate_fn=get_sft_collate_fn())

    seconds: list[float] = []
    losses: list[float] = []
    fit, cross_entropy = finetune.fit, finetune.chunked_cross_entropy

    def timed_fit(**kwargs: Any) -> Any:
        kwargs["data"].val_dataloader = lambda: []
        began = time.perf_counter()
        counts = fit(**kwargs)
        seconds.append(time.perf_counter() - began)
        return counts

    def watched(*args: Any, **kwargs: Any) -> Any:
        loss = cross_entropy(*args, **kwargs)
        if torch.is_grad_enabled():
            losses.append(float(loss))
        return loss

    def constant(optimizer: Any, warmup_steps: int, max_steps: int) -> Any:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    quiet: dict[str, Any] = {
        "fit": timed_fit,
        "chunked_cross_entropy": watched,
        "get_lr_scheduler": constant,
        "validate": lambda *_, **__: torch.tensor(0.0),
        "generate_example": lambda *_: None,
        "save_hyperparameters": lambda *_: None,
        "merge_lora": lambda **_: None,
    }
    for name, replacement in quiet.items():
        setattr(finetune, name, replacement)
    with TemporaryDirectory() as out:
        finetune.setup(
            checkpoint_dir=checkpoint_dir, out_dir=Path(out), precision=precision, data=InOrder(), seed=0,
            train=TrainArgs(
                save_interval=10**9, log_interval=1, global_batch_size=batch, micro_batch_size=micro_batch,
                lr_warmup_steps=1, epochs=2, max_steps=len(chats) // batch,
            ),
            eval=EvalArgs(interval=10**9, max_new_tokens=1, max_iters=1, final_validation=False),
            optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": RATE, "weight_decay": 0.0}},
            **LoRAArgs().config_fields(),
        )  # fmt: skip
    learned = [sum(chat.loss_mask) for chat in chats]
    return seconds[0], weighted_mean(losses, learned, micro_batch)


def run_trl(
    checkpoint_dir: Path,
    chats: list[EncodedChat],
    precision: Any,
    max_seq_length: int,
    batch: int,
    batching: TRLBatching,
    micro_batch: int,
) -> tuple[float, float]:
    """TRL's SFTTrainer with PEFT, on the exported weights."""
    from tempfile import TemporaryDirectory

    import datasets
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            dataset: Any = self.train_dataset
            return SequentialSampler(dataset)

    torch.manual_seed(0)
    lora = LoRAArgs()
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(hf_directory(checkpoint_dir), dtype=dtype),
        LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules="all-linear"),
    )
    rows = [
        {"input_ids": chat.prompt + chat.completion, "labels": [-100] * len(chat.prompt) + chat.completion}
        for chat in chats
    ]
    a_step = batch // 2 if batching == "packed" else batch  # packed rows hold about two samples
    with TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out, num_train_epochs=1, learning_rate=RATE,
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=a_step // micro_batch,
            lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0, logging_steps=1, report_to=[],
            save_strategy="no", use_cpu=not torch.cuda.is_available(), bf16=False, gradient_checkpointing=False,
            max_length=None if batching == "padding_free" else max_seq_length, disable_tqdm=True,
            packing=batching == "packed", padding_free=batching == "padding_free",
        )  # fmt: skip
        trainer = InOrder(
            model=model, args=config, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(hf_directory(checkpoint_dir)),
        )  # fmt: skip
        if batching != "padded":
            require_apart(trainer)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    packed_rows: Any = trainer.train_dataset  # the samples themselves where it does not pack
    learned = [sum(label != -100 for label in row["labels"]) for row in packed_rows]
    return seconds, weighted_mean(losses, learned, a_step)


def require_apart(trainer: Any) -> None:
    """Check that samples which a trainer puts into one row do not see each other.

    Raises:
        UserError: If a sample's logits change with the sample before it in the row.
    """
    inputs = next(batch for batch in trainer.get_train_dataloader() if (batch["position_ids"] == 0).sum() > 1)
    second = int((inputs["position_ids"][0] == 0).nonzero()[1])  # where the row's second sample begins
    other = inputs["input_ids"].clone()
    other[0, :second] = other[0, :second].flip(0)
    with torch.no_grad():
        logits = [
            trainer.model(input_ids=ids, position_ids=inputs["position_ids"], use_cache=False).logits[0, second:]
            for ids in (inputs["input_ids"], other)
        ]
    if not torch.equal(*logits):
        raise UserError("TRL's packed samples see each other on this machine; measure with --trl_batching padded.")


_RUN: dict[str, Any] = {"ours": run_ours, "litgpt": run_litgpt, "trl": run_trl}

if __name__ == "__main__":
    run_file(setup)
