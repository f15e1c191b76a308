"""What a step would take, computed from its settings and the model's configuration: see `workflows/plan.py`."""

TRAINING = ("lora", "dpo", "reward", "ppo", "grpo", "distill-lm")
PLANNED = (*TRAINING, "shrink", "teach", "merge", "evaluate", "export")
"""The steps that have a plan."""
