"""The steps that are killed, on a model and data that are small enough to do it a hundred times."""

import json
from pathlib import Path

from tests.conftest import convert, make_llama
from tests.kills.engine import Step

WORDS = ("breathing", "rate", "uterus", "density", "blood", "reduction", "clinical", "finding")
SIZES = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3}  # files take long enough to be cut
STEPS = (
    "lora",
    "dpo",
    "reward",
    "ppo",
    "grpo",
    "shrink",
    "teach",
    "distill-lm",
    "evaluate",
    "export",
    "download",
    "data",
)


def make_steps(work: Path) -> dict[str, Step]:
    """Make models and data, and the steps that use them.

    Args:
        work: An empty folder; each step writes to a folder of its own in it.
    """
    hf = make_llama(work / "hf" / "one", seed=0, **SIZES)
    one = convert(hf, work / "checkpoints")
    two = convert(make_llama(work / "hf" / "two", seed=1, **SIZES), work / "checkpoints")
    chats, questions, exam = _write_chats(work / "chats"), _write_questions(work), _write_exam(work / "exam")

    pairs, asked = _write_pairs(work / "pairs"), _write_asked(work / "asked")

    def train(step: str, data: Path, *options: str) -> list[str]:
        command = [step, "--checkpoint_dir", str(one), "--data", str(data), "--out_dir", str(work / step), *options]
        command += ["--precision", "32-true", "--train.max_steps", "6", "--train.save_interval", "2"]
        command += ["--train.eval_interval", "3", "--train.global_batch_size", "4", "--train.row_tokens", "256"]
        return [*command, "--train.max_seq_length", "256", "--train.lr_warmup_steps", "2", "--train.learning_rate"]

    lora, dpo, reward = train("lora", chats, "--lora_dropout", "0.1"), train("dpo", pairs), train("reward", pairs)
    ppo = train("ppo", asked, "--rewards", "[{reward: finding}]", "--max_new_tokens", "8", "--updates", "2")
    grpo = train("grpo", asked, "--group_size", "3", "--max_new_tokens", "8")
    shrink = ["shrink", "--checkpoint_dir", str(one), "--out_dir", str(work / "shrink"), "--layers"]
    teach = ["teach", "--checkpoint_dir", str(one), "--data", str(chats), "--out_dir", str(work / "teach" / "taught")]
    teach += ["--max_new_tokens", "16", "--samples", "8", "--temperature", "1", "--precision", "32-true", "--seed"]
    distill = train("distill-lm", chats, "--teacher_dir", str(two))
    evaluate = ["evaluate", "--tasks", "[toy_mcq]", "--data_dir", str(questions), "--out_dir", str(work / "evaluate")]
    evaluate += ["--precision", "32-true", "--row_tokens", "128", "--checkpoint_dir"]
    export = ["export", "--name", "tiny", "--create", "false", "--shard_size", "1", "--out_dir", str(work / "export")]
    export += ["--checkpoint_dir"]
    download = ["download", "--model", str(hf), "--checkpoints_dir", str(work / "download")]
    data = ["data", "--data", "medqa", "--raw_dir", str(exam), "--out_dir", str(work / "data"), "--validation_size"]
    steps = (
        Step(
            "lora",
            work / "lora",
            [*lora, "1e-2"],
            [*lora, "2e-2"],
            whole=("final",),
            working=("metrics.csv", "checkpoints/step-*.pth"),
        ),
        Step(
            "dpo",
            work / "dpo",
            [*dpo, "1e-2"],
            [*dpo, "2e-2"],
            whole=("final",),
            working=("metrics.csv", "checkpoints/step-*.pth", "reference.safetensors"),
        ),
        Step(
            "reward",
            work / "reward",
            [*reward, "1e-2"],
            [*reward, "2e-2"],
            whole=("final",),
            working=("metrics.csv", "checkpoints/step-*.pth"),
        ),
        Step(
            "ppo",
            work / "ppo",
            [*ppo, "1e-2"],
            [*ppo, "2e-2"],
            whole=("final",),
            working=("metrics.csv", "checkpoints/step-*.pth", "completions.jsonl"),
        ),
        Step(
            "grpo",
            work / "grpo",
            [*grpo, "1e-2"],
            [*grpo, "2e-2"],
            whole=("final",),
            working=("metrics.csv", "checkpoints/step-*.pth", "completions.jsonl"),
        ),
        Step("shrink", work / "shrink", [*shrink, "2"], [*shrink, "1"], whole=("final",)),
        Step(
            "teach", work / "teach", [*teach, "1"], [*teach, "2"], whole=("taught",), working=("taught.unfinished/*",)
        ),
        Step(
            "distill-lm",
            work / "distill-lm",
            [*distill, "1e-2"],
            [*distill, "2e-2"],
            whole=("final",),
            working=("metrics.csv", "checkpoints/step-*.pth"),
        ),
        Step(
            "evaluate",
            work / "evaluate",
            [*evaluate, str(one)],
            [*evaluate, str(two)],
            marker="metrics.json",
            working=("unfinished.jsonl",),
        ),
        Step(
            "export",
            work / "export",
            [*export, str(one)],
            [*export, str(two)],
            whole=("hf",),
            marker="metrics.json",
        ),
        Step(
            "download",
            work / "download",
            [*download, "--path_file", str(work / "download" / "path")],
            whole=("local/one",),
        ),
        Step("data", work / "data", [*data, "12"], [*data, "15"], whole=("medqa", "medqa_mcq")),
    )
    return {step.name: step for step in steps}


def _write_chats(folder: Path) -> Path:
    """Conversations to train on."""
    folder.mkdir()
    for split, numbers in {"train": range(30), "validation": range(100, 106)}.items():
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"What is {WORDS[i % 8]} number {i}?"},
                    {"role": "assistant", "content": f"It is {WORDS[i * 3 % 8]} {i % 5}."},
                ]
            }
            for i in numbers
        ]
        _write_rows(folder / f"{split}.jsonl", rows)
    (folder / "manifest.json").write_text("{}")
    return folder


def _write_pairs(folder: Path) -> Path:
    """Preferences to learn from, and to be tested on."""
    folder.mkdir()
    for split, numbers in {"train": range(30), "validation": range(100, 104), "test": range(200, 204)}.items():
        rows = [
            {
                "prompt": [{"role": "user", "content": f"What is {WORDS[i % 8]} number {i}?"}],
                "chosen": [{"role": "assistant", "content": f"It is {WORDS[i * 3 % 8]} {i % 5}."}],
                "rejected": [{"role": "assistant", "content": f"A {WORDS[i * 5 % 7]}."}],
            }
            for i in numbers
        ]
        _write_rows(folder / f"{split}.jsonl", rows)
    (folder / "manifest.json").write_text("{}")
    return folder


def _write_asked(folder: Path) -> Path:
    """Questions to be answered and judged."""
    folder.mkdir()
    for split, numbers in {"train": range(30), "validation": range(100, 104), "test": range(200, 204)}.items():
        rows = [
            {
                "prompt": [{"role": "user", "content": f"What is {WORDS[i % 8]} number {i}?"}],
                "answers": ["the rate of e breathing a"],
            }
            for i in numbers
        ]
        _write_rows(folder / f"{split}.jsonl", rows)
    (folder / "manifest.json").write_text("{}")
    return folder


def _write_questions(folder: Path) -> Path:
    """Questions to score a model on, as the task toy_mcq."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}: {WORDS[i % 8]} of {WORDS[i * 3 % 7]}?"}],
            "choices": list(WORDS[i % 4 : i % 4 + 4]),
            "answer": i % 4,
        }
        for i in range(60)
    ]
    (folder / "toy_mcq").mkdir()
    _write_rows(folder / "toy_mcq" / "test.jsonl", rows)
    return folder


def _write_exam(folder: Path) -> Path:
    """Raw files in MedQA's columns; preparing them makes two folders."""
    folder.mkdir()
    for split, numbers in {"train": range(60), "test": range(100, 120)}.items():
        rows = [
            {
                "question": f"Patient {i} has a fever. What helps?",
                "options": {letter: f"drug {letter}{i}" for letter in "ABCD"},
                "answer_idx": "ABCD"[i % 4],
            }
            for i in numbers
        ]
        _write_rows(folder / f"{split}.jsonl", rows)
    return folder


def _write_rows(file: Path, rows: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
