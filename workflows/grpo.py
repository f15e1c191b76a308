"""`python -m workflows grpo`: align a checkpoint with rewards, by GRPO and its variants (GSPO, DAPO, Dr. GRPO).

Answers are sampled from the policy, a group to each question, and judged by the rewards of `training/rewards.py`. The
reference policy of the KL is the model without its adapters.
"""

from pathlib import Path
from typing import Any

import lightning as L

from data_prep.rows import Row, iterate_jsonl, row_problem
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import check_checkpoint_dir
from workflows.errors import UserError, report_all
from workflows.training.groups import GRPO, GroupSettings, Question, encode_questions
from workflows.training.loop import TrainArgs
from workflows.training.losses import Normalisation, Scale
from workflows.training.processes import choose_accelerator
from workflows.training.rewards import Rewards, WeightedReward
from workflows.training.step import RunArgs, decided, done_before, run_step


def setup(
    checkpoint_dir: Path,
    data: Path = Path("data/hpo"),
    out_dir: Path = Path("out/grpo"),
    kinds: list[str] | None = None,
    rewards: list[WeightedReward] = [WeightedReward("finding")],  # noqa: B006 (read only)
    group_size: int = 8,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    beta: float = 0.02,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    scale: Scale = "group",
    normalisation: Normalisation = "token",
    sequence_ratio: bool = False,
    updates: int = 1,
    mask_truncated: bool = False,
    sampling_batch: int = 64,
    max_val_rows: int = 100,
    train: TrainArgs = TrainArgs(global_batch_size=4, learning_rate=1e-4, max_norm=1.0),
    **run: Any,
) -> None:
    """Align a checkpoint with rewards.

    Args:
        checkpoint_dir: The LitGPT checkpoint directory to start from; it is the reference, too.
        data: A data directory whose rows have a prompt and what the rewards read ("answers", say).
        out_dir: Where logs and checkpoints go; the result is its `final` folder.
        kinds: Ask only rows whose `kind` is one of these; all that have what the rewards read if null.
        rewards: What an answer is worth, a weighted sum.
        group_size: Answers to each question.
        max_new_tokens: The most tokens of an answer.
        temperature: Sampling's; log-probabilities are of the policy at this temperature.
        top_k: Sample among the k likeliest tokens only.
        top_p: Sample among the fewest tokens whose probabilities reach this sum.
        beta: Weight of the KL to the reference.
        clip_low: How far below 1 a ratio still counts.
        clip_high: How far above 1 (DAPO: 0.28).
        scale: "group" divides advantages by their group's standard deviation, "none" does not (Dr. GRPO).
        normalisation: Every token ("token", DAPO) or every answer ("sequence", GRPO) counts the same, or a constant
            divides ("constant", Dr. GRPO).
        sequence_ratio: One ratio for each answer, of its mean log-probability (GSPO).
        updates: Optimizer steps on the same answers.
        mask_truncated: Learn nothing from answers that did not end.
        sampling_batch: Answers that are sampled side by side.
        max_val_rows: At most this many validation questions are asked each time, greedily.
        train: Training settings; a sample is a question.
        **run: What all training steps take (`workflows.training.step.RunArgs`).

    Raises:
        UserError: If an argument, the checkpoint, the data or a reward is not usable.
    """
    own = {name: value for name, value in locals().items() if name != "run"}
    own["checkpoint_dir"] = checkpoint_dir = check_checkpoint_dir(checkpoint_dir)
    common = RunArgs(**run)
    group_settings = GroupSettings(**{name: own[name] for name in vars(GroupSettings())})
    problems = common.problems(train, checkpoint_dir) + group_settings.problems(train)
    if common.strategy == "fsdp":
        problems.append("--strategy fsdp: answers are sampled from a whole model; use ddp.")
    if common.lora_r == 0 and beta:
        problems.append("--beta needs adapters (--lora_r): the reference is the model without them. Or use --beta 0.")
    if max_val_rows < 1:
        problems.append(f"--max_val_rows must be at least 1, not {max_val_rows}.")
    report_all(problems)
    settings = decided(own, common)
    if done_before(settings):
        return
    composed = Rewards(rewards, settings["precision"], choose_accelerator(common.accelerator))

    def make_objective(fabric: L.Fabric) -> GRPO:
        template, questions = questions_of(fabric, settings, composed)
        return GRPO(questions["train"], questions["validation"], template, composed, train, common.seed, group_settings)

    run_step("grpo", settings, common, make_objective)


def questions_of(
    fabric: L.Fabric, settings: dict[str, Any], rewards: Rewards
) -> tuple[ChatTemplate, dict[str, list[Question]]]:
    """A step's chat template, and its questions for training and validation; says what was left out.

    Raises:
        UserError: If the data is not usable, or no question is left.
    """
    template = ChatTemplate.from_checkpoint(settings["checkpoint_dir"])
    room = settings["train"].max_seq_length - settings["max_new_tokens"]
    questions = {}
    for split, most in (("train", None), ("validation", settings["max_val_rows"])):
        path = Path(settings["data"]) / f"{split}.jsonl"
        rows = read_questions(path, rewards, settings["kinds"])[:most]
        questions[split], told = encode_questions(rows, template, room, str(path))
        fabric.print(told)
        if not questions[split]:
            raise UserError(f"No question is left to ask. {told}\nRaise --train.max_seq_length.")
    return template, questions


def read_questions(path: Path, rewards: Rewards, kinds: list[str] | None) -> list[Row]:
    """Rows that can be asked and judged: verifiable or scoring rows, or conversations that carry "answers".

    Args:
        path: A `.jsonl` file.
        rewards: What is to be read of them.
        kinds: Only rows of these kinds.

    Raises:
        UserError: If the file is missing, a line is malformed, or no row has what the rewards read.
    """
    rows = []
    for number, row in iterate_jsonl(path):
        if isinstance(row, dict) and "messages" in row:
            if problem := row_problem(row, "messages"):
                raise UserError(f"{path}, line {number}: {problem}.")
            row = {**row, "prompt": row["messages"][:-1]}
        shape = "scoring" if isinstance(row, dict) and "choices" in row else "verifiable"
        judged = isinstance(row, dict) and all(field in row for field in rewards.fields)
        if judged and (problem := row_problem({"answers": ["-"], **row}, shape)):
            raise UserError(f"{path}, line {number}: {problem}.")
        if judged and (kinds is None or row.get("kind") in kinds):
            rows.append(row)
    if not rows:
        needed = " and ".join(f'"{field}"' for field in rewards.fields) or "a prompt"
        raise UserError(f"{path} has no rows with {needed}" + (f" of kind {', '.join(kinds)}." if kinds else "."))
    return rows
