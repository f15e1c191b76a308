"""`python -m bench.dpo`: DPO with LoRA, ours against TRL's DPOTrainer with PEFT.

The same pairs in the same order of steps, the same model, rank, beta, precision and thread count. Counted are pairs per
second of one epoch, the reference's log-probabilities included: ours computes them before the first step, TRL in each.
"""

import contextlib
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from bench.harness import alternate, by_precision, hf_directory, report, tell, write_report
from data_prep.rows import read_rows
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError, run_file
from workflows.training.answers import encode_answers
from workflows.training.batch import Tree

RATE = 2e-4
BETA = 0.1
Contender = Literal["ours", "trl"]


def setup(
    checkpoint_dir: Path = Path("checkpoints/embedded/smollm2-135m-instruct"),
    data: Path = Path("data/hpo_pairs"),
    pairs: int = 96,
    max_seq_length: int = 512,
    batch: int = 8,
    rounds: int = 3,
    precisions: list[Literal["bf16-true", "32-true"]] = ["bf16-true"],  # noqa: B006
    row_tokens: int = 384,
    trl_micro_batch: int = 2,
    contender: Contender | None = None,
) -> None:
    """Measure, and write out/bench/dpo.json.

    Args:
        checkpoint_dir: The model.
        data: A data directory of pairs; the first ones of its training split are taken, sorted by length.
        pairs: How many, a multiple of --batch; one epoch is one run.
        max_seq_length: Longest prompt with an answer in tokens.
        batch: Pairs of an optimizer step.
        rounds: How often each contender runs, in turn.
        precisions: What to measure.
        row_tokens: Capacity of our packed rows: 1,024 is a quarter faster and takes 0.3 GB more.
        trl_micro_batch: Pairs that TRL computes at once; gradients add up to the batch.
        contender: Run only this one, once, in this process (used by the bench itself).
    """
    if pairs % batch or batch % trl_micro_batch:
        raise UserError(f"--pairs must be a multiple of --batch {batch}, and that one of --trl_micro_batch.")
    if contender is not None:
        trees = choose_pairs(checkpoint_dir, data, pairs, max_seq_length)
        with contextlib.redirect_stdout(sys.stderr):
            if contender == "ours":
                seconds, loss = run_ours(checkpoint_dir, trees, precisions[0], max_seq_length, batch, row_tokens)
            else:
                seconds, loss = run_trl(checkpoint_dir, trees, precisions[0], max_seq_length, batch, trl_micro_batch)
        tell(rate=len(trees) / seconds, loss=loss)
        return
    hf_directory(checkpoint_dir)
    settings = {
        "pairs": pairs, "max_seq_length": max_seq_length, "batch": batch, "rounds": rounds, "data": data.name,
        "beta": BETA, "row_tokens": row_tokens, "trl_micro_batch": trl_micro_batch,
    }  # fmt: skip
    reports: dict[str, Any] = {}
    for precision in precisions:
        arguments = [
            f"--checkpoint_dir={checkpoint_dir}", f"--data={data}", f"--pairs={pairs}",
            f"--max_seq_length={max_seq_length}", f"--precisions=[{precision}]", f"--row_tokens={row_tokens}",
            f"--trl_micro_batch={trl_micro_batch}", f"--batch={batch}",
        ]  # fmt: skip
        runs = alternate("bench.dpo", ["ours", "trl"], arguments, rounds)
        losses = {name: rounds_[0]["loss"] for name, rounds_ in runs.items()}
        if max(losses.values()) - min(losses.values()) > 0.03:
            raise UserError(f"The contenders do not do the same work: their mean losses are {losses}.")
        reports[precision] = report("dpo", "pairs/s", {**settings, "precision": precision}, runs)
    write_report(by_precision(reports))


def choose_pairs(checkpoint_dir: Path, data: Path, pairs: int, max_seq_length: int) -> list[Tree]:
    """Pairs sorted by length, so that a padding trainer pads as little as can be."""
    rows = read_rows(data / "train.jsonl", "preference")[: 2 * pairs]
    answers, told = encode_answers(rows, ChatTemplate.from_checkpoint(checkpoint_dir), max_seq_length, str(data))
    if len(answers) < pairs:
        raise UserError(f"{told}\nThat is fewer than --pairs {pairs}.")
    return sorted((answer.tree for answer in answers[:pairs]), key=lambda tree: tree.real_tokens)


def run_ours(
    checkpoint_dir: Path, trees: list[Tree], precision: Any, max_seq_length: int, batch: int, row_tokens: int
) -> tuple[float, float]:
    """Our loop. Returns seconds of reference and training, and the mean loss of the steps."""
    from workflows.training.loop import TrainArgs, fit
    from workflows.training.model import LoRAArgs, load_model
    from workflows.training.pairs import DPO, PairBatch, PairSettings
    from workflows.training.processes import make_fabric

    class InOrder(DPO):
        def begin(self, *args: Any) -> None:
            began = time.perf_counter()
            super().begin(*args)
            reference.append(time.perf_counter() - began)

        def batches(self, step: int, rank: int, world_size: int) -> list[PairBatch]:
            return self._packed(range(step * batch, (step + 1) * batch))

    reference: list[float] = []
    train = TrainArgs(
        max_steps=len(trees) // batch, global_batch_size=batch, row_tokens=row_tokens, max_seq_length=max_seq_length,
        learning_rate=RATE, lr_warmup_steps=0, lr_schedule="constant", max_norm=None,
        eval_interval=10**9, save_interval=10**9,
    )  # fmt: skip
    torch.manual_seed(0)
    model = load_model(checkpoint_dir, LoRAArgs(), precision, max_seq_length)
    objective = InOrder(trees, [], train, 0, PairSettings(beta=BETA), {})
    objective.validate = lambda model: {}  # type: ignore[method-assign]
    with TemporaryDirectory() as out:
        result = fit(make_fabric(), model, objective, train, Path(out), seed=0, identity={})
    return result.seconds + reference[0], sum(result.losses) / len(result.losses)


def run_trl(
    checkpoint_dir: Path, trees: list[Tree], precision: Any, max_seq_length: int, batch: int, micro_batch: int
) -> tuple[float, float]:
    """TRL's DPOTrainer with PEFT, on the exported weights; likewise."""
    import datasets
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from workflows.training.model import LoRAArgs

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            dataset: Any = self.train_dataset
            return SequentialSampler(dataset)

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # these are token ids already

    torch.manual_seed(0)
    lora = LoRAArgs()
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(hf_directory(checkpoint_dir), dtype=dtype),
        LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules="all-linear"),
    )
    rows = [
        {"prompt_ids": tree.prompt, "chosen_ids": tree.completions[0], "rejected_ids": tree.completions[1]}
        for tree in trees
    ]
    with TemporaryDirectory() as out:
        config = DPOConfig(
            output_dir=out, num_train_epochs=1, learning_rate=RATE, beta=BETA,
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=batch // micro_batch,
            lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0, logging_steps=1, report_to=[],
            save_strategy="no", use_cpu=not torch.cuda.is_available(), bf16=False, gradient_checkpointing=False,
            max_length=max_seq_length, disable_tqdm=True,
        )  # fmt: skip
        trainer = InOrder(
            model=model, args=config, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(hf_directory(checkpoint_dir)),
        )  # fmt: skip
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return seconds, sum(losses) / len(losses)


if __name__ == "__main__":
    run_file(setup)
