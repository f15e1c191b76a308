"""Stands in for Python where make calls a step: notes the call, and writes the file that make waits for."""

import json
import sys
from pathlib import Path

assert sys.argv[1] == "-m" and sys.argv[2] in ("workflows", "custom_models"), sys.argv
step, *args = sys.argv[3:]
with open("stages.jsonl" if step == "stage" else "calls.jsonl", "a") as f:
    f.write(json.dumps([step, *args]) + "\n")
fails = json.loads(Path("fails.json").read_text()) if Path("fails.json").exists() else []
if "--fail" in args or (fails and step == fails[0] and fails[1] in args):
    sys.exit(1)
made = {
    "download": ("--path_file", ""),
    **dict.fromkeys(
        ["lora", "dpo", "reward", "ppo", "grpo", "shrink", "distill-lm"], ("--out_dir", "final/provenance.json")
    ),
    "teach": ("--out_dir", "manifest.json"),
    **dict.fromkeys(
        ["sentiment", "distill", "gpt", "gpt-dpo", "summarize", "qa", "ner", "ner-autotrain", "translate"],
        ("--out_dir", "final/config.json"),
    ),
    "evaluate": ("--out_dir", "metrics.json"),
    "export": ("--out_dir", "verification.json"),
    "panel": ("--run_dir", "panel/metrics.json"),
}
parts = {"hpo": ["hpo_pairs", "hpo_mcq"], "assistant": ["assistant_pairs", "assistant_questions"]}
if step == "data":
    name = args[args.index("--data") + 1]
    file = Path("data", name, "manifest.json")
    for part in parts.get(name, []):
        Path("data", part).mkdir(parents=True, exist_ok=True)
        Path("data", part, "manifest.json").touch()
elif step == "demo" and "--show" not in args:
    file = Path(args[args.index("--run_dir") + 1], "summary.json")
elif step in made:
    option, name = made[step]
    file = Path(args[args.index(option) + 1], name)
else:
    sys.exit(0)
file.parent.mkdir(parents=True, exist_ok=True)
file.write_text("checkpoints/made/up")
if sys.argv[2] == "custom_models":
    Path(args[args.index("--out_dir") + 1], "metrics.json").write_text(" ".join(args))
