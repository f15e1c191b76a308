"""LitGPT's command line, run in this process: another one would load torch and LitGPT for ten seconds."""

import sys
from unittest.mock import patch

import litgpt.__main__
import torch


def run_litgpt(*arguments: object) -> None:
    """Run `litgpt ARGUMENTS`, and set back what it changes for the whole process."""
    precision = torch.get_float32_matmul_precision()
    try:
        with patch.object(sys, "argv", ["litgpt", *map(str, arguments)]):
            litgpt.__main__.main()
    finally:
        torch.set_float32_matmul_precision(precision)
