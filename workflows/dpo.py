"""`make dpo`: align a checkpoint with preferences, by DPO or its variants, or by KTO with labelled answers.

A pair is one tree: the prompt is computed once, chosen and rejected answer behind it. The reference policy is the model
without its adapters; its log-probabilities are computed once and kept in `OUT_DIR/reference.safetensors`.
"""

from pathlib import Path
from typing import Any, Literal

import lightning as L

from data_prep.rows import iterate_jsonl, read_rows
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import check_checkpoint_dir
from workflows.errors import report_all
from workflows.training.answers import Labelled, encode_answers
from workflows.training.drift import DriftCheck, probes_of_answers
from workflows.training.loop import Objective, TrainArgs
from workflows.training.pairs import DPO, PairLoss, PairSettings
from workflows.training.step import RunArgs, decided, done_before, model_identity, row_limit_problems, run_step
from workflows.training.unpaired import KTO, KTOSettings, label_balance


def setup(
    checkpoint_dir: Path,
    data: Path = Path("data/hpo_pairs"),
    out_dir: Path = Path("out/dpo"),
    loss: PairLoss | Literal["kto"] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    per_token: bool = False,
    gamma: float = 0.5,
    sft_weight: float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    max_val_rows: int = 200,
    max_test_rows: int = 1000,
    max_new_tokens: int = 64,
    train: TrainArgs = TrainArgs(learning_rate=2e-4),
    **run: Any,
) -> None:
    """Align a checkpoint with preferences.

    Args:
        checkpoint_dir: The LitGPT checkpoint directory to start from; it is the reference, too.
        data: A data directory of {"prompt", "chosen", "rejected"} rows; for kto {"prompt", "completion", "label"} rows
            will do, too.
        out_dir: Where logs and checkpoints go; the result is its `final` folder.
        loss: "sigmoid" (DPO), "robust", "ipo", "hinge", "kto"; "simpo" and "orpo" need no reference.
        beta: KL coefficient: larger values keep the policy closer to the reference (orpo: weight of the odds ratio).
        label_smoothing: Label-noise rate: share of pairs with chosen and rejected swapped (sigmoid:
            conservative DPO; robust).
        per_token: Divide log-ratios by the answers' lengths.
        gamma: The margin that simpo aims at.
        sft_weight: Weight of the chosen answer's mean negative log-likelihood, added to the loss.
        desirable_weight: Weight of good answers (kto). Times their number it should be 1 to 4/3 times
            undesirable_weight times the number of bad ones; weights that balance the data are printed before training.
        undesirable_weight: Weight of bad answers (kto).
        max_val_rows: At most this many validation rows are scored each time.
        max_test_rows: At most this many test pairs are scored at the end, and at most 50 of their prompts are
            answered before and after training; 0 for none.
        max_new_tokens: Maximum number of tokens of the answers that are compared before and after training.
        train: Training settings; a sample is a pair (kto: a prompt with its labelled answers).
        **run: What all training steps take (`workflows.training.step.RunArgs`).

    Raises:
        UserError: If an argument, the checkpoint or the data is not usable.
    """
    own = {name: value for name, value in locals().items() if name != "run"}
    own["checkpoint_dir"] = checkpoint_dir = check_checkpoint_dir(checkpoint_dir)
    common = RunArgs(**run)
    problems = common.problems(train, checkpoint_dir)
    kto_settings = KTOSettings(beta, desirable_weight, undesirable_weight)
    if loss == "kto":
        problems += kto_settings.problems()
        if label_smoothing or per_token or sft_weight:
            problems.append("--label_smoothing, --per_token and --sft_weight belong to losses of pairs, not to kto.")
    else:
        pair_settings = PairSettings(loss, beta, label_smoothing, per_token, gamma, sft_weight)
        problems += pair_settings.problems()
        if (desirable_weight, undesirable_weight) != (1.0, 1.0):
            problems.append("--desirable_weight and --undesirable_weight belong to --loss kto.")
    if loss != "simpo" and gamma != PairSettings.gamma:
        problems.append("--gamma belongs to --loss simpo.")
    problems += row_limit_problems(max_val_rows, max_test_rows)
    if max_new_tokens < 1:
        problems.append(f"--max_new_tokens must be at least 1, not {max_new_tokens}.")
    report_all(problems)
    settings = decided(own, common)
    if done_before(settings):
        return

    def make_objective(fabric: L.Fabric) -> Objective:
        template = ChatTemplate.from_checkpoint(checkpoint_dir).with_reasoning(common.reasoning)
        first: Any = next((row for _, row in iterate_jsonl(data / "train.jsonl")), {})
        shape = "labelled" if loss == "kto" and isinstance(first, dict) and "label" in first else "preference"

        def encoded(split: str, most: int | None) -> list[Labelled]:
            rows = read_rows(data / f"{split}.jsonl", shape)[:most]
            answers, told = encode_answers(rows, template, train.max_seq_length, str(data / split))
            fabric.print(told)
            return answers

        splits = (encoded("train", None), encoded("validation", max_val_rows))
        identity = model_identity(settings)
        test = encoded("test", max_test_rows) if max_test_rows and (data / "test.jsonl").is_file() else []
        drift = DriftCheck(
            probes_of_answers(test),
            template,
            identity,
            max_new_tokens=max_new_tokens,
            max_seq_length=train.max_seq_length,
            row_tokens=train.row_tokens,
            cure=_cure(loss, train.learning_rate),
        )
        if loss == "kto":
            fabric.print(label_balance(splits[0], kto_settings))
            return KTO(*splits, train, common.seed, kto_settings, identity, test, drift)
        trained, validated = ([answer.tree for answer in answers] for answers in splits)
        tested = [answer.tree for answer in test]
        return DPO(trained, validated, train, common.seed, pair_settings, identity, tested, drift)

    run_step("dpo", settings, common, make_objective)


def _cure(loss: str, learning_rate: float) -> str:
    """What to do where the model got worse, by the loss."""
    more = "" if loss == "kto" else ", a larger --sft_weight (1, say)"
    beta = {"simpo": "", "orpo": ", a smaller --beta (it weighs the odds ratio)"}.get(loss, ", a larger --beta")
    return f"Use a lower --train.learning_rate (it was {learning_rate:g}){more}{beta}, or fewer --train.max_steps."
