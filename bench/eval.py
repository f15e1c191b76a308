"""`make bench-eval`: scoring multiple-choice questions, ours against lm-eval's own `hf` model on the exported weights.

Both get the same rendered questions from the same task object; counted are questions per second of the whole
evaluation, without loading. In float32 the accuracies must be equal and the log-likelihoods within 1e-3.
"""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any, Literal

from bench.harness import alternate, by_precision, hf_directory, report, tell, write_report
from workflows.errors import UserError, run_file

TASK = "hpo_mcq"
TOLERANCE = 1e-3
Contender = Literal["ours", "hf"]


def setup(
    checkpoint_dir: Path = Path("checkpoints/embedded/smollm2-135m-instruct"),
    data_dir: Path = Path("data"),
    questions: int = 200,
    rounds: int = 3,
    precisions: list[Literal["bf16-true", "32-true"]] = ["bf16-true", "32-true"],  # noqa: B006
    hf_batch_size: int = 8,
    contender: Contender | None = None,
) -> None:
    """Measure, and write out/bench/eval.json.

    Args:
        checkpoint_dir: The model.
        data_dir: The folder of prepared data, with hpo_mcq in it.
        questions: Four-choice questions to score.
        rounds: How often each contender runs, in turn.
        precisions: What to measure.
        hf_batch_size: Requests that lm-eval's `hf` pads together; it sorts them by length.
        contender: Run only this one, once, in this process (used by the bench itself).
    """
    if contender is not None:
        with contextlib.redirect_stdout(sys.stderr):
            measured = score(contender, checkpoint_dir, data_dir, questions, precisions[0], hf_batch_size)
        tell(**measured)
        return
    hf_directory(checkpoint_dir)
    settings = {"task": TASK, "questions": questions, "rounds": rounds, "hf_batch_size": hf_batch_size}
    reports: dict[str, Any] = {}
    for precision in precisions:
        arguments = [
            f"--checkpoint_dir={checkpoint_dir}", f"--data_dir={data_dir}", f"--questions={questions}",
            f"--precisions=[{precision}]", f"--hf_batch_size={hf_batch_size}",
        ]  # fmt: skip
        runs = alternate("bench.eval", ["ours", "hf"], arguments, rounds)
        ours, theirs = runs["ours"][0], runs["hf"][0]
        apart = max(abs(a - b) for a, b in zip(ours["logprobs"], theirs["logprobs"], strict=True))
        found = {"acc": {"ours": ours["acc"], "hf": theirs["acc"]}, "largest_difference": apart}
        print(f"{precision}: acc {ours['acc']} and {theirs['acc']}, log-likelihoods at most {apart:.2g} apart")
        if precision == "32-true" and (ours["acc"] != theirs["acc"] or apart > TOLERANCE):
            raise UserError(f"The contenders do not give the same scores: {found}.")
        reports[precision] = {**report("eval", "questions/s", {**settings, "precision": precision}, runs), **found}
    write_report(by_precision(reports))


def score(
    contender: Contender, checkpoint_dir: Path, data_dir: Path, questions: int, precision: Any, hf_batch_size: int
) -> dict[str, Any]:
    """Questions per second of one contender, with its accuracy and every choice's log-likelihood."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from workflows.chat_template import ChatTemplate
    from workflows.evaluate import quiet_lm_eval
    from workflows.evaluation.tasks import load_tasks
    from workflows.training.processes import choose_accelerator

    quiet_lm_eval()
    template = ChatTemplate.from_checkpoint(checkpoint_dir)
    model: Any
    if contender == "ours":
        from workflows.evaluation.lm import LitGPTLM, load_for_evaluation

        model = LitGPTLM(load_for_evaluation(checkpoint_dir, precision, choose_accelerator()), template, progress=False)
    else:
        from lm_eval.models.huggingface import HFLM

        dtype = "bfloat16" if precision == "bf16-true" else "float32"
        model = HFLM(
            pretrained=str(hf_directory(checkpoint_dir)),
            device=choose_accelerator(),
            dtype=dtype,
            batch_size=hf_batch_size,
        )
    tasks = load_tasks([TASK], data_dir, template)
    began = time.perf_counter()
    results = simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        limit=questions,
        bootstrap_iters=0,
    )
    seconds = time.perf_counter() - began
    logprobs = [resp[0][0] for sample in results["samples"][TASK] for resp in sample["resps"]]
    return {"rate": questions / seconds, "acc": results["results"][TASK]["acc,none"], "logprobs": logprobs}


if __name__ == "__main__":
    run_file(setup)
