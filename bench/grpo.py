"""`python -m bench.grpo`: whole GRPO steps with LoRA, ours against TRL's GRPOTrainer with PEFT.

The same questions, model, rank, group size and precision; every answer has exactly the most tokens allowed (its end is
forbidden in both), so that all do the same work whatever they sample. Counted are steps per minute: sampling, the
reference's log-probabilities and the update.
"""

import contextlib
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from bench.harness import alternate, by_precision, hf_directory, report, tell, write_report
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError, run_file
from workflows.training.questions import read_questions
from workflows.training.rewards import Rewards, Sample, WeightedReward

RATE = 1e-4
BETA = 0.02
Contender = Literal["ours", "trl"]


def setup(
    checkpoint_dir: Path = Path("checkpoints/embedded/smollm2-135m-instruct"),
    data: Path = Path("data/hpo"),
    steps: int = 4,
    prompts: int = 2,
    group_size: int = 8,
    max_new_tokens: int = 64,
    rounds: int = 3,
    precisions: list[Literal["bf16-true", "32-true"]] = ["bf16-true"],  # noqa: B006
    row_tokens: int = 2048,
    sampling_batch: int = 64,
    trl_micro_batch: int = 8,
    contender: Contender | None = None,
) -> None:
    """Measure, and write out/bench/grpo.json.

    Args:
        checkpoint_dir: The model.
        data: A data directory with questions that carry "answers".
        steps: Steps of one run; one more is taken first and not counted.
        prompts: Questions of a step.
        group_size: Answers to each.
        max_new_tokens: Tokens of an answer.
        rounds: How often each contender runs, in turn.
        precisions: What to measure.
        row_tokens: Capacity of our packed rows.
        sampling_batch: Answers that ours samples side by side; TRL samples all of a step at once.
        trl_micro_batch: Answers that TRL's update computes at once; gradients add up to the step's.
        contender: Run only this one, once, in this process (used by the bench itself).
    """
    if prompts * group_size % trl_micro_batch:
        raise UserError("--prompts times --group_size must be a multiple of --trl_micro_batch.")
    if contender is not None:
        rewards = Rewards([WeightedReward(f"{__spec__.name}.early_letters")])
        rows = read_questions(data / "train.jsonl", Rewards([WeightedReward("finding")]).fields, ["name"])
        rows = rows[: prompts * (steps + 1)]
        with contextlib.redirect_stdout(sys.stderr):
            options = (steps, prompts, group_size, max_new_tokens)
            if contender == "ours":
                seconds, reward = run_ours(
                    checkpoint_dir, rows, rewards, precisions[0], row_tokens, sampling_batch, *options
                )
            else:
                seconds, reward = run_trl(checkpoint_dir, rows, precisions[0], trl_micro_batch, *options)
        tell(rate=60 * steps / seconds, loss=reward)
        return
    hf_directory(checkpoint_dir)
    settings = {
        "steps": steps, "prompts": prompts, "group_size": group_size, "max_new_tokens": max_new_tokens,
        "rounds": rounds, "data": data.name, "beta": BETA, "row_tokens": row_tokens, "sampling_batch": sampling_batch,
        "trl_micro_batch": trl_micro_batch,
    }  # fmt: skip
    reports: dict[str, Any] = {}
    for precision in precisions:
        arguments = [f"--{name}={value}" for name, value in settings.items() if name not in ("rounds", "data", "beta")]
        arguments += [f"--checkpoint_dir={checkpoint_dir}", f"--data={data}", f"--precisions=[{precision}]"]
        runs = alternate("bench.grpo", ["ours", "trl"], arguments, rounds)
        reports[precision] = report("grpo", "steps/min", {**settings, "precision": precision}, runs)
    write_report(by_precision(reports))


def early_letters(sample: Sample) -> float:
    """The share of an answer's letters from the alphabet's first half: cheap, and never the same in a whole group."""
    return share_of_early_letters(sample.text)


def share_of_early_letters(text: str) -> float:
    """See `early_letters`."""
    letters = [c for c in text.lower() if c.isalpha() and c.isascii()]
    return sum(c <= "m" for c in letters) / max(1, len(letters))


def run_ours(
    checkpoint_dir: Path,
    rows: list[Any],
    rewards: Rewards,
    precision: Any,
    row_tokens: int,
    sampling_batch: int,
    steps: int,
    prompts: int,
    group_size: int,
    max_new_tokens: int,
) -> tuple[float, float]:
    """Our loop. Returns seconds of the counted steps, and the mean reward."""
    from dataclasses import replace

    from workflows.training.group_batch import Asked
    from workflows.training.group_settings import GroupSettings
    from workflows.training.groups import GRPO
    from workflows.training.loop import TrainArgs, fit
    from workflows.training.model import LoRAArgs, load_model
    from workflows.training.processes import make_fabric
    from workflows.training.questions import Question

    template = replace(ChatTemplate.from_checkpoint(checkpoint_dir), stop_ids=())
    questions = [Question(row, template.prompt_ids(row["prompt"])) for row in rows]
    stamps: list[float] = []
    given: list[float] = []

    class InOrder(GRPO):
        def batches(self, step: int, rank: int, world_size: int) -> Any:
            stamps.append(time.perf_counter())
            self._largest = {"log_ratio_max": 0.0, "sampling_logp_diff_max": 0.0}
            asked = Asked(group_size)
            with self._whole(self._model):
                self._ask(
                    asked, questions[step * prompts : (step + 1) * prompts], self._draws(prompts * group_size, step)
                )
                found = self._learned(asked, step)
            given.append(self.step_metrics()["reward"])
            return found

    train = TrainArgs(
        max_steps=steps + 1, global_batch_size=prompts, row_tokens=row_tokens, max_seq_length=1024, learning_rate=RATE,
        lr_warmup_steps=0, lr_schedule="constant", max_norm=1.0, eval_interval=10**9, save_interval=10**9,
    )  # fmt: skip
    torch.manual_seed(0)
    model = load_model(checkpoint_dir, LoRAArgs(), precision, 1024)
    settings = GroupSettings(
        group_size=group_size, max_new_tokens=max_new_tokens, beta=BETA, sampling_batch=sampling_batch
    )
    objective = InOrder(questions, questions[:1], template, rewards, train, 0, settings)

    def ended(model: Any) -> dict[str, float]:
        stamps.append(time.perf_counter())
        return {}

    objective.validate = ended  # type: ignore[method-assign]
    with TemporaryDirectory() as out:
        fit(make_fabric(), model, objective, train, Path(out), seed=0, identity={})
    return stamps[-1] - stamps[1], sum(given) / len(given)


def run_trl(
    checkpoint_dir: Path,
    rows: list[Any],
    precision: Any,
    micro_batch: int,
    steps: int,
    prompts: int,
    group_size: int,
    max_new_tokens: int,
) -> tuple[float, float]:
    """TRL's GRPOTrainer with PEFT, on the exported weights; likewise."""
    import datasets
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from workflows.training.model import LoRAArgs

    stamps: list[float] = []
    given: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

    def reward(completions: list[Any], **_: Any) -> list[float | None]:
        found = [share_of_early_letters(completion[0]["content"]) for completion in completions]
        given.append(sum(found) / len(found))
        return [*found]

    torch.manual_seed(0)
    lora = LoRAArgs()
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(hf_directory(checkpoint_dir), dtype=dtype),
        LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules="all-linear"),
    )
    with TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out, max_steps=steps + 1, learning_rate=RATE, beta=BETA, num_generations=group_size,
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=prompts * group_size // micro_batch,
            max_completion_length=max_new_tokens, temperature=1.0, generation_kwargs={"min_new_tokens": max_new_tokens},
            loss_type="dapo", lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(), bf16=False,
            gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, args=config, reward_funcs=reward,
            train_dataset=datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(hf_directory(checkpoint_dir)), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return stamps[-1] - stamps[0], sum(given) / len(given)


if __name__ == "__main__":
    run_file(setup)
