"""LitGPT names that its own scripts use but its package does not export, gathered here in one place.

If an upgrade of LitGPT moves one of them, this is the file to mend.
"""

from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama, copy_weights_qwen_2_5
from litgpt.utils import incremental_save

__all__ = ["copy_weights_hf_llama", "copy_weights_qwen_2_5", "incremental_save"]
