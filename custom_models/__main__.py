"""`python -m custom_models PROJECT --key value`: the command line of the projects."""

import sys

from workflows.__main__ import main

PROJECTS = {
    "sentiment": (
        "custom_models.projects.sentiment",
        "setup",
        "train a classifier of texts, from scratch or from BERT's kin",
    ),
    "pretrain": ("custom_models.projects.pretrain", "setup", "pretrain an encoder: RoBERTa's way or BERT's"),
    "distill": ("custom_models.projects.distill", "setup", "distil a classifier into one of half its layers"),
    "gpt": ("custom_models.projects.gpt", "setup", "train a GPT on any text"),
    "gpt-sample": ("custom_models.projects.gpt", "sample", "let a GPT write on"),
    "gpt-dpo": ("custom_models.projects.gpt_dpo", "setup", "teach a GPT to answer, and align it by DPO"),
    "lora-scratch": ("custom_models.projects.lora_llama", "setup", "fine-tune a Llama by our LoRA, and by all weights"),
    "pretrain-t5": ("custom_models.projects.pretrain_t5", "setup", "pretrain a T5: write what was cut out of a text"),
    "ner": ("custom_models.projects.ner", "setup", "teach a T5 to name the entities of a sentence"),
    "ner-autotrain": ("custom_models.projects.ner_autotrain", "setup", "teach a T5 the same by AutoTrain"),
    "ner-predict": ("custom_models.projects.ner", "predict", "name the entities of a sentence"),
    "translate": ("custom_models.projects.translate", "setup", "train a Transformer or a T5 to translate"),
    "translate-text": ("custom_models.projects.translator", "translate", "translate a text by it"),
    "predict": ("custom_models.projects.classifier", "predict", "name the class of a text"),
    "summarize": ("custom_models.projects.summarize", "setup", "train a summariser, BERTSum's way or two BERTs"),
    "summary": ("custom_models.projects.summarize", "summary", "summarise a text file"),
    "qa": ("custom_models.projects.qa", "setup", "train a model that finds the answer to a question in a text"),
    "answer": ("custom_models.projects.qa", "answer", "answer a question from a text file"),
    "attention-map": ("custom_models.attention_map", "setup", "draw what the heads of a real model look at"),
    "expert-load": ("custom_models.expert_load", "setup", "draw the load of a mixture's experts, balanced and not"),
}

if __name__ == "__main__":
    sys.exit(main(steps=PROJECTS, program="custom_models"))
