"""`make bench-bpe`: learning 1,024 merges from 1 MB of English, and encoding it with GPT-2's vocabulary.

Contenders in training: ours, the textbook loop (pure Python, counts all pairs anew for each merge) and the Rust trainer
of `tokenizers`; all cut the text by GPT-2's pattern, on one thread. The loop takes minutes, so it runs once and each
round of ours is set against that run. Ours and the loop must learn the same merges; `tokenizers` breaks ties in another
way, so the share of tokens that both have is reported.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from bench.harness import alternate, report, run_contender, write_report
from workflows.errors import UserError, run_file
from workflows.files import read_text

LEAST_FASTER_THAN_TEXTBOOK, MOST_SLOWER_THAN_TOKENIZERS = 50, 10
Learned = tuple[list[tuple[int, int]] | None, list[bytes]]
"""Merges by id (None where ids differ from ours) and the tokens' bytes."""


def setup(
    merges: int = 1024,
    megabytes: float = 1.0,
    rounds: int = 5,
    contender: str | None = None,
    task: Literal["train", "encode"] = "train",
) -> None:
    """Measure, and write out/bench/bpe.json.

    Args:
        merges: How many merges to learn.
        megabytes: Size of the text: Shakespeare's from WORKFLOW_DATA if that is set, else the ontology's definitions.
        rounds: How often each contender runs, the textbook loop aside.
        contender: Run only this one, once, in this process (used by the bench itself).
        task: What it does.

    Raises:
        UserError: If merges or ids differ, or the training is slower than its limits.
    """
    text, source = english(megabytes)
    if contender is not None:
        print(json.dumps(train_once(contender, text, merges) if task == "train" else encode_once(contender, text)))
        return
    arguments = ["--merges", str(merges), "--megabytes", str(megabytes)]
    runs = alternate("bench.bpe", ["ours", "tokenizers"], arguments, rounds)
    textbook = run_contender("bench.bpe", "textbook", arguments)
    print(f"textbook, once: {textbook['rate']:.3g} ({textbook['seconds']:.0f} s)", flush=True)
    if any(run["merges"] != textbook["merges"] for run in runs["ours"]):
        raise UserError("Ours and the textbook loop learned different merges.")
    settings = {
        "text": source,
        "bytes": len(text.encode()),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "merges": merges,
        "pattern": "GPT-2's",
        "threads": 1,
        "rounds": rounds,
        "textbook_runs": 1,
        "timed": "from the text to the merges, its cutting into words included",
    }
    named = {"ours": runs["ours"], "textbook": [textbook] * rounds, "tokenizers": runs["tokenizers"]}
    reported = report("bpe", "MB of text/s", settings, named)
    del reported["losses"]
    reported["seconds"] = {name: sorted(run["seconds"] for run in done) for name, done in named.items()}
    ours, theirs = (set(runs[name][0]["tokens"]) for name in ("ours", "tokenizers"))
    reported["vocabulary_shared"] = {"tokenizers": len(ours & theirs) / len(ours)}
    reported["encoding"] = encoding(arguments, rounds)
    write_report(reported)
    print(f"  of our tokens {reported['vocabulary_shared']['tokenizers']:.1%} are among those of tokenizers")
    for name, row in {"ours": reported["encoding"]["ours"], **reported["encoding"]["peers"]}.items():
        print(f"  encoding: {name:<11}{row['median']:>12,.0f} tokens/s, the same text again {row['again']:>12,.0f}")
    slowest = {peer: ratio["min"] for peer, ratio in reported["ratio"].items()}
    if slowest["textbook"] < LEAST_FASTER_THAN_TEXTBOOK or slowest["tokenizers"] * MOST_SLOWER_THAN_TOKENIZERS < 1:
        raise UserError(
            f"Training was {slowest['textbook']:.0f}x the textbook loop and {slowest['tokenizers']:.2f}x tokenizers; "
            f"at least {LEAST_FASTER_THAN_TEXTBOOK}x and {1 / MOST_SLOWER_THAN_TOKENIZERS:.2f}x are wanted."
        )


def english(megabytes: float) -> tuple[str, str]:
    """The text and where it is from."""
    folder = os.environ.get("WORKFLOW_DATA")
    if folder:
        path = Path(folder) / "tinyshakespeare" / "input.txt"
        text, source = read_text(path), "tinyshakespeare/input.txt"
    else:
        from custom_models.demo import definitions

        text, source = definitions(), "definitions of the Human Phenotype Ontology"
    data = text.encode()
    size = int(megabytes * 1e6)
    if not 0 < size <= len(data):
        raise UserError(f"--megabytes must be above 0 and at most {len(data) / 1e6:.2f}, the size of {source}.")
    return data[:size].decode(errors="ignore"), source


def train_once(contender: str, text: str, merges: int) -> dict[str, Any]:
    """Learn the merges once."""
    learn = {"ours": learn_ours, "textbook": learn_textbook, "tokenizers": learn_tokenizers}[contender](merges)
    began = time.perf_counter()
    pairs, tokens = learn(text)
    seconds = time.perf_counter() - began
    rate = len(text.encode()) / 1e6 / seconds
    return {"rate": rate, "seconds": seconds, "merges": pairs, "tokens": [token.hex() for token in tokens]}


def learn_ours(merges: int) -> Callable[[str], Learned]:
    from custom_models.tokenization.bpe import RegexBPE

    def learn(text: str) -> Learned:
        tokenizer = RegexBPE()
        tokenizer.train(text, merges)
        return list(tokenizer.merges), tokenizer.vocabulary

    return learn


def learn_textbook(merges: int) -> Callable[[str], Learned]:
    from custom_models.tokenization.bpe import ByteBPE, RegexBPE
    from tests.custom_models.tokenization.textbook import textbook_merges

    def learn(text: str) -> Learned:
        pairs = textbook_merges([word.encode() for word in RegexBPE().split(text)], merges)
        return pairs, ByteBPE(pairs).vocabulary

    return learn


def learn_tokenizers(merges: int) -> Callable[[str], Learned]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from custom_models.tokenization.gpt2_files import to_bytes

    def learn(text: str) -> Learned:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # cuts by GPT-2's pattern
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator([text], trainer)
        return None, [to_bytes(token) for token in tokenizer.get_vocab()]

    return learn


def encoding(arguments: list[str], rounds: int) -> dict[str, Any]:
    """Measure encoding with GPT-2's vocabulary, each time in a fresh process: once, and once more.

    Raises:
        UserError: If the contenders' ids differ.
    """
    runs = alternate("bench.bpe", ["ours", "tiktoken", "tokenizers"], [*arguments, "--task", "encode"], rounds)
    if len({run["ids"] for done in runs.values() for run in done}) > 1:
        raise UserError("The contenders encoded the text to different ids.")
    reported = report("encoding", "tokens/s", {"vocabulary": "GPT-2's", "tokens": runs["ours"][0]["tokens"]}, runs)
    rows = {"ours": reported["ours"], **reported["peers"]}
    for name, row in rows.items():
        row["again"] = sorted(run["again"] for run in runs[name])[rounds // 2]
    return {key: reported[key] for key in ("unit", "settings", "ours", "peers", "ratio")}


def encode_once(contender: str, text: str) -> dict[str, Any]:
    """Encode the text with nothing remembered, and a second time."""
    encode = {"ours": encode_ours, "tiktoken": encode_tiktoken, "tokenizers": encode_tokenizers}[contender]()
    seconds, ids = [], []
    for _ in range(2):
        began = time.perf_counter()
        ids = encode(text)
        seconds.append(time.perf_counter() - began)
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    return {"rate": len(ids) / seconds[0], "again": len(ids) / seconds[1], "tokens": len(ids), "ids": digest}


def encode_ours() -> Callable[[str], list[int]]:
    from custom_models.tokenization.gpt2_files import read_gpt2

    return read_gpt2().encode


def encode_tiktoken() -> Callable[[str], list[int]]:
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    from custom_models.tokenization.gpt2_files import read_gpt2

    gpt2 = read_gpt2()
    ranks = {token: i for i, token in enumerate(gpt2.vocabulary) if i not in gpt2.special_tokens.values()}
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=dict(gpt2.special_tokens)
    )
    return encoding.encode


def encode_tokenizers() -> Callable[[str], list[int]]:
    from tempfile import TemporaryDirectory

    from tokenizers import Tokenizer

    from custom_models.tokenization.gpt2_files import read_gpt2
    from custom_models.tokenization.tokenizer_json import save

    with TemporaryDirectory() as folder:
        save(read_gpt2(), Path(folder) / "tokenizer.json")
        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    return lambda text: tokenizer.encode(text).ids


if __name__ == "__main__":
    run_file(setup)
