"""A T5 from the Hub taught to name entities by transformers' Seq2SeqTrainer, on the same lists as our own.

What it leaves is a folder of transformers' form, which `ner_model.load_entity_model` reads into our T5.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers.trainer_utils import get_last_checkpoint

from custom_models.encoder_checkpoint import save_tokenizer, tokenizer_of
from custom_models.encoder_decoder_checkpoint import t5_directory
from custom_models.masked_language_model import IGNORED
from custom_models.projects.entity_scores import Tagged
from custom_models.projects.fitting import FitArgs, fast_precision
from custom_models.projects.keeping import folder_named
from custom_models.projects.ner_model import Asking, Codec, Sentence
from custom_models.projects.seq2seq import padded
from workflows.files import atomic_dir, read_json, write_json
from workflows.progress import note
from workflows.training.stopping import Stopping


def fine_tune(
    place: str,
    splits: dict[str, list[Tagged]],
    types: Sequence[str],
    fit: FitArgs,
    asking: Asking,
    seed: int,
    folder: Path,
    data: str,
) -> list[dict[str, float]]:
    """Fine-tune a T5 and write it, whole or not at all.

    Args:
        place: Its folder, or its id on the Hub.
        splits: Tagged sentences; train and validation are used.
        types: The types of entities.
        fit: Batch, rate, warm-up, decay and epochs.
        asking: How it will be asked.
        seed: Of order and dropout.
        folder: Where the model goes.
        data: The name of what it learned from.

    Returns:
        The numbers of each epoch.

    Raises:
        UserError: If the model cannot be had or is no T5.
    """
    import torch
    from transformers import (
        EarlyStoppingCallback,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        T5ForConditionalGeneration,
        TrainerCallback,
        set_seed,
    )

    directory = t5_directory(place)
    set_seed(seed)
    model = T5ForConditionalGeneration.from_pretrained(directory)
    tokenizer = tokenizer_of(directory)
    codec = Codec(tokenizer, types, int(model.config.eos_token_id))
    rows: dict[str, list[Sentence]] = {}
    for split in ("train", "validation"):
        rows[split] = [codec.encode(words, tags, asking.longest) for words, tags in splits[split]]
        cut = sum(len(row.words) < len(words) for row, (words, _) in zip(rows[split], splits[split], strict=True))
        print(f"{split}: {len(rows[split]):,} sentences; {cut:,} cut: over {asking.longest} tokens")

    def collate(chosen: list[Sentence]) -> dict[str, Any]:
        source = padded([row.source for row in chosen], model.config.pad_token_id)  # (B, Ts)
        lengths = torch.tensor([len(row.source) for row in chosen])  # (B,)
        mask = torch.arange(source.shape[1]) < lengths[:, None]  # (B, Ts)
        return {
            "input_ids": source,
            "attention_mask": mask.long(),
            "labels": padded([r.target for r in chosen], IGNORED),
        }

    def right(found: Any) -> dict[str, float]:
        real = found.label_ids != IGNORED  # (rows, T)
        return {"accuracy": float((found.predictions == found.label_ids)[real].mean())}

    settings = (fit, asking, list(types), seed, str(directory), rows)
    runs = folder_named([repr(settings).encode()], folder.parent)
    done, told = runs / "done", runs / "epochs.json"
    if told.is_file():
        kept: list[dict[str, float]] = read_json(told)["epochs"]
        print(f"trained before: {len(kept)} epochs")
        _copy(done, folder)
        return kept
    stop = Stopping()

    class Interrupted(TrainerCallback):
        """Lets Ctrl-C end the training after a step, with a checkpoint."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.first, self.began = state.global_step, time.time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            note(state.global_step, state.max_steps, unit="step", first=self.first, began=self.began)
            if stop.asked():
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stop.asked():
                raise KeyboardInterrupt

    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            output_dir=str(runs),
            per_device_train_batch_size=fit.batch_size,
            per_device_eval_batch_size=fit.batch_size,
            learning_rate=fit.learning_rate,
            warmup_steps=round(fit.warmup * fit.max_epochs * -(-len(rows["train"]) // fit.batch_size)),
            weight_decay=fit.weight_decay,
            max_grad_norm=fit.max_norm,
            num_train_epochs=fit.max_epochs,
            bf16=(fit.precision or fast_precision(fit.accelerator)) == "bf16-mixed",
            use_cpu=fit.accelerator == "cpu",
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_strategy="epoch",
            save_total_limit=2,
            restore_callback_states_from_checkpoint=True,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            report_to=[],
            seed=seed,
        ),
        data_collator=collate,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],  # type: ignore[arg-type]
        compute_metrics=right,
        callbacks=[EarlyStoppingCallback(fit.patience), Interrupted()],
        preprocess_logits_for_metrics=lambda logits, labels: (
            logits[0] if isinstance(logits, tuple) else logits
        ).argmax(-1),
    )
    with stop:
        trainer.train(resume_from_checkpoint=_last_whole_checkpoint(runs))
    save_entity_t5(model.cpu(), tokenizer, types, asking, data, done)
    epochs = _epochs(trainer.state.log_history)
    for checkpoint in runs.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    write_json(told, {"epochs": epochs})
    _copy(done, folder)
    return epochs


def _copy(source: Path, target: Path) -> None:
    with atomic_dir(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)


def _last_whole_checkpoint(runs: Path) -> str | None:
    """The trainer's newest checkpoint that has all its files; those that have not are deleted."""
    for checkpoint in runs.glob("checkpoint-*"):
        if not (checkpoint / "trainer_state.json").is_file():  # what is written last
            print(f"{checkpoint} was not written to its end, and is deleted")
            shutil.rmtree(checkpoint)
    return get_last_checkpoint(str(runs)) if runs.is_dir() else None


def save_entity_t5(
    model: Any, tokenizer: Tokenizer, types: Sequence[str], asking: Asking, data: str, folder: Path
) -> None:
    """Write a T5 of transformers' with what `ner_model.load_entity_model` has to know of it, whole or not at all.

    Args:
        model: A `T5ForConditionalGeneration`.
        tokenizer: Its tokenizer.
        types: The types of entities that it names.
        asking: How it is asked.
        data: The name of what it learned from.
        folder: Where.
    """
    model.config.update({"entity_types": list(types), **asdict(asking), "data": data})
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary)
        save_tokenizer(tokenizer, temporary)


def _epochs(log: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The trainer's log as the numbers of each epoch, under the names that pictures are drawn from."""
    losses = [entry["loss"] for entry in log if "loss" in entry]
    looks = [entry for entry in log if "eval_loss" in entry]
    return [
        {"epoch": number, "train_loss": loss, "val_loss": look["eval_loss"], "val_accuracy": look["eval_accuracy"]}
        for number, (loss, look) in enumerate(zip(losses, looks, strict=False))
    ]
