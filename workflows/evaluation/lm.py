"""A LitGPT checkpoint as an lm-eval model, without conversion to another form.

Encoding follows lm-eval's own `hf` model to the letter (context and continuation are encoded together and then split;
spaces that end the context belong to the continuation), so that both give the same log-likelihoods. What differs is the
work done: the context that a question's choices share is computed once (a `Tree`), many questions are packed into one
row without padding, and the language-model head runs only where a continuation's token is predicted.
"""

import functools
import logging
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from workflows.chat_template import ChatTemplate, Message
from workflows.checkpoint import LORA_WEIGHTS, PROVENANCE, WEIGHTS, check_checkpoint_dir, load_weights
from workflows.errors import UserError
from workflows.evaluation.cache import ResultCache, request_key
from workflows.files import read_json, sha256
from workflows.merge import read_hyperparameters
from workflows.progress import Bar
from workflows.training.batch import ROW_MULTIPLE, Tree, assign_rows, pack_row
from workflows.training.model import GPT, LoRAArgs, Precision, load_model
from workflows.training.rollouts import generate

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256
"""Generated tokens where a task names no limit; lm-eval's own default."""
_SAMPLING = {"temperature", "top_k", "top_p", "do_sample"}


class LitGPTLM(TemplateLM):
    """Log-likelihoods, rolling log-likelihoods and generation over our GPT.

    Attributes:
        truncated: How many requests were longer than the context and lost tokens on the left, as in lm-eval's `hf`.
        folded: Whether a description was put into a question, since the template takes no system message.
        prompts: The first prompt of each task, as the model is shown it: its text with the special tokens, its number
            of tokens, and the continuation that is scored after it.
    """

    def __init__(
        self,
        model: GPT,
        template: ChatTemplate,
        *,
        name: str = "litgpt",
        row_tokens: int = 1024,
        batch_size: int = 16,
        cache: ResultCache | None = None,
        seed: int = 1234,
        progress: bool = True,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: From `load_model` or `load_for_evaluation`.
            template: The checkpoint's template and tokenizer.
            name: The checkpoint's name in lm-eval's records.
            row_tokens: Capacity of a packed row; a question that is longer gets a row of its own.
            batch_size: Answers generated side by side.
            cache: Where finished results are kept; in memory if None.
            seed: Decides the samples of tasks that sample.
            progress: Show progress bars.
        """
        super().__init__()
        self.model = model.eval()
        self.template = template
        self.row_tokens = row_tokens
        self.batch_size = batch_size
        self.cache = cache if cache is not None else ResultCache()
        self.seed = seed
        self.truncated = 0
        self.folded = False
        self.prompts: dict[str, dict[str, Any]] = {}
        self._name = name
        self._progress = progress
        self._device = next(model.parameters()).device

    # ---- what lm-eval asks about the tokenizer and the model ----

    @property
    def max_length(self) -> int:
        """The context in tokens."""
        return self.model.max_seq_length

    @property
    def eot_token_id(self) -> int:
        """The id of the tokenizer's EOS token."""
        eos = self.template.tokenizer.token_to_id(self.template.eos_token)
        return self.template.stop_ids[0] if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: BOS, or EOS for a model without BOS."""
        bos = self.template.tokenizer.token_to_id(self.template.bos_token)
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The checkpoint's name: lm-eval keys its own caches of rendered prompts by it."""
        return self._name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's Jinja text, for lm-eval's records."""
        return self.template.source if chat_template else None

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """Render a conversation; without generation prompt its last message is left open, to be continued.

        Reasoning that the generation prompt opens is closed, as in local tasks. A task's description opens the first
        question where the template takes no system message.
        """
        if chat_history[0]["role"] == "system" and not self.takes_system:
            self.folded = True
            system, user, *others = chat_history
            chat_history = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *others]
        text = self.template.render(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text + self.template.empty_thoughts
        last = chat_history[-1]["content"]
        if self.template.opens_thoughts:
            return self.apply_chat_template(chat_history[:-1]) + last
        begin = text.rindex(last.strip())
        kept = last.lstrip() if text[begin:].startswith(last.lstrip()) else last.strip()
        return text[: begin + len(kept)]

    @functools.cached_property
    def takes_system(self) -> bool:
        """Return whether the template writes a system message; some refuse it, some leave it out."""
        system, user = "\ue000system\ue001", "\ue000user\ue001"
        try:
            messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
            return system in self.template.render(messages, add_generation_prompt=True)
        except UserError:
            return False

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; by default with the special tokens that tokenizer.json adds.

        A text that begins with BOS, or as the chat template begins one, gets none: it is encoded as in training.
        """
        if add_special_tokens is None:
            bos = self.template.decode([self.prefix_token_id], False)
            add_special_tokens = not string.startswith((bos, *self.template.openings))
        return self.template.encode_answered(string, add_special_tokens)

    def get_model_info(self) -> dict[str, Any]:
        """Facts for lm-eval's results.json."""
        parameters = {id(p): p for p in self.model.parameters()}.values()
        return {
            "model_num_parameters": sum(p.numel() for p in parameters),
            "model_dtype": str(self.model.transformer.wte.weight.dtype),
            "model_name": self._name,
        }

    def _note_prompts(self, requests: list[Instance]) -> None:
        """Keep the first request of each task in `prompts`, and print it."""
        for request in requests:
            name = str(request.task_name)
            if name in self.prompts or not request.args[0]:
                continue
            context, scored = self.tok_encode(request.args[0]), []
            if len(request.args) > 1 and isinstance(request.args[1], str):
                context, scored = self._encode_pair(*request.args[:2])
            shown = {"prompt": self.template.decode(context, False), "tokens": len(context)}
            self.prompts[name] = shown | ({"scored": self.template.decode(scored, False)} if scored else {})
            if self._progress:
                text = textwrap.indent(_shortened(str(shown["prompt"])), "  | ", lambda line: True)
                print(f"{name}, first prompt ({len(context)} tokens):\n{text}")
                if scored:
                    print(f"{name}, scored after it: {self.prompts[name]['scored']!r}")

    # ---- log-likelihoods ----

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether greedy decoding would write it."""
        self._note_prompts(requests)
        return super().loglikelihood(requests, disable_tqdm=True)  # a bar for the tokenizer is not worth a line

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Score continuations; requests with the same context become one tree, trees are packed into rows."""
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        choices: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}  # an ordered set for each context
        for context, continuation in pairs:
            choices.setdefault(context, {})[continuation] = None
        trees = [Tree(list(context), [list(c) for c in found]) for context, found in choices.items()]
        rows = assign_rows([tree.tokens for tree in trees], self.row_tokens)
        for row in self._watch(rows, "log-likelihoods"):
            self._score([trees[i] for i in row])
        keys = [request_key("loglikelihood", *pair) for pair in pairs]
        return [(logprob, greedy) for logprob, greedy in map(self.cache.__getitem__, keys)]

    def _score(self, trees: list[Tree]) -> None:
        """Score one row of trees unless it is finished."""
        keys = [request_key("loglikelihood", tree.prompt, c) for tree in trees for c in tree.completions]
        if self.cache.has(keys):
            return
        began = time.perf_counter()
        batch = pack_row(trees, ROW_MULTIPLE)
        logprobs, greedy = self.model.score(batch.to(self._device))
        sums = torch.zeros(len(keys), dtype=torch.float64).index_add(0, batch.owners, logprobs.cpu().double())
        misses = torch.bincount(batch.owners[~greedy.cpu()], minlength=len(keys))  # tokens that are not the argmax
        answers = zip(sums.tolist(), (misses == 0).tolist(), strict=True)
        self.cache.add(dict(zip(keys, answers, strict=True)), time.perf_counter() - began, batch.real_tokens)

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Cut a context on the left so that what is left fits the model, as lm-eval's `hf` does."""
        if not continuation or len(continuation) > self.max_length:
            raise UserError(
                f"A task asks for the log-likelihood of a text of {len(continuation)} tokens; it must have at least "
                f"one and at most the model's context of {self.max_length}."
            )
        excess = len(context) + len(continuation) - (self.max_length + 1)  # the last token is no input
        self.truncated += excess > 0
        return tuple(context[max(0, excess) :]), tuple(continuation)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the full context that predict each token once."""
        self._note_prompts(requests)
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            of_text = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += of_text
            counts.append(len(of_text))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))  # type: ignore[arg-type]
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    # ---- generation ----

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to one of its task's stop strings, a stop token, or the limit."""
        self._note_prompts(requests)
        settings: dict[str, dict[str, Any]] = {}
        groups: dict[str, list[tuple[int, list[int], str]]] = {}  # settings -> (request's number, prompt, key)
        seen: Counter[str] = Counter()
        for number, request in enumerate(requests):
            context, kwargs = request.args
            name = request_key("settings", kwargs)
            settings.setdefault(name, self._generation_settings(kwargs))
            prompt = self._fit_prompt(self.tok_encode(context), settings[name]["max_new_tokens"])
            key = request_key("generate", prompt, settings[name], self.seed)
            seen[key] += 1  # a task may ask for several samples of the same prompt
            groups.setdefault(name, []).append((number, prompt, f"{key}-{seen[key]}"))

        keys: dict[int, str] = {}
        batches = []
        for name, group in groups.items():
            keys |= {number: key for number, _, key in group}
            group.sort(key=lambda item: (-len(item[1]), item[0]))  # similar lengths side by side
            chunks = [group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size)]
            batches += [(chunk, settings[name], self.seed + i) for i, chunk in enumerate(chunks)]
        for chunk, setting, seed in self._watch(batches, "answers"):
            self._answer([prompt for _, prompt, _ in chunk], [key for _, _, key in chunk], setting, seed)
        return [self.cache[keys[number]] for number in range(len(requests))]

    def write(self, contexts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers to rendered prompts, each up to its end or the limit."""
        settings = self._generation_settings({"until": [], "max_gen_toks": max_new_tokens, "do_sample": False})
        prompts = [self._fit_prompt(self.tok_encode(context), max_new_tokens) for context in contexts]
        keys = [request_key("written", prompt, max_new_tokens) for prompt in prompts]
        for begin in self._watch(range(0, len(prompts), self.batch_size), "answers in words"):
            unit = slice(begin, begin + self.batch_size)
            self._answer(prompts[unit], keys[unit], settings, self.seed)
        return [self.cache[key].strip() for key in keys]

    def _answer(self, prompts: list[list[int]], keys: list[str], settings: dict[str, Any], seed: int) -> None:
        """Generate one batch of answers unless it is finished."""
        if self.cache.has(keys):
            return
        began = time.perf_counter()
        until = settings["until"]
        lookback = max((len(self.tok_encode(stop, False)) for stop in until), default=0) + 2  # as lm-eval's `hf`

        def stop_when(ids: list[int]) -> bool:
            tail = self.template.decode(ids[-lookback:], skip_special_tokens=False)
            return any(stop in tail for stop in until)

        rollouts = generate(
            self.model,
            prompts,
            stop_ids=self.template.stop_ids,
            batch_size=self.batch_size,
            seed=seed,
            stop_when=stop_when,
            **{name: value for name, value in settings.items() if name != "until"},
        )
        answers = [postprocess_generated_text(self.template.decode(r.ids), until, None) for r in rollouts]
        tokens = sum(len(p) + len(r.ids) for p, r in zip(prompts, rollouts, strict=True))
        self.cache.add(dict(zip(keys, answers, strict=True)), time.perf_counter() - began, tokens)

    def _generation_settings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A task's generation arguments as those of `generate`, plus its stop strings."""
        given = dict(normalize_gen_kwargs(kwargs, MAX_NEW_TOKENS))
        until = handle_stop_sequences(given.pop("until"), self.template.decode([self.eot_token_id], False))
        max_new_tokens = given.pop("max_gen_toks")
        odd = {k: v for k, v in given.items() if k not in _SAMPLING and v not in (None, 1, False)}
        if odd:
            raise UserError(f"A task asks for generation settings that are not supported: {odd}.")
        if max_new_tokens >= self.max_length:
            raise UserError(
                f"A task asks for {max_new_tokens} new tokens; the model's context of {self.max_length} has no room "
                "for a prompt then."
            )
        return {
            "until": [stop for stop in until if stop],
            "max_new_tokens": max_new_tokens,
            "temperature": float(given.get("temperature") or 0.0) if given["do_sample"] else 0.0,
            "top_k": given.get("top_k") or None,
            "top_p": float(given.get("top_p") or 1.0),
        }

    def _fit_prompt(self, prompt: list[int], max_new_tokens: int) -> list[int]:
        room = self.max_length - max_new_tokens
        self.truncated += len(prompt) > room
        return prompt[-room:]

    def _watch(self, units: Sequence[Any], what: str) -> Any:
        return Bar(units, desc=what, disable=not self._progress, leave=False)


def _shortened(text: str, most: int = 1600) -> str:
    """A text without its middle if it is long."""
    left_out = len(text) - most
    half = most // 2
    return f"{text[:half]}\n[... {left_out:,} characters ...]\n{text[-half:]}" if left_out > 0 else text


def check_for_evaluation(checkpoint_dir: Path) -> str:
    """Make sure that a checkpoint directory is complete, with merged weights or with adapters.

    Returns:
        The name of the weights file that is evaluated.

    Raises:
        UserError: If something is missing.
    """
    adapters_only = (checkpoint_dir / LORA_WEIGHTS).is_file() and not (checkpoint_dir / WEIGHTS).is_file()
    weights = LORA_WEIGHTS if adapters_only else WEIGHTS
    check_checkpoint_dir(checkpoint_dir, weights)
    return weights


def load_for_evaluation(checkpoint_dir: Path, precision: Precision, device: torch.device | str = "cpu") -> GPT:
    """Load a checkpoint directory; one that holds adapters only is put on top of the base that it names.

    Args:
        checkpoint_dir: A folder with `lit_model.pth`, or with `lit_model.pth.lora` and `hyperparameters.yaml`.
        precision: What the weights and the arithmetic are in.
        device: Where to put the model.

    Raises:
        UserError: If something is missing or the adapters do not fit.
    """
    if check_for_evaluation(checkpoint_dir) == WEIGHTS:
        return load_model(checkpoint_dir, precision=precision, device=device)
    settings = read_hyperparameters(checkpoint_dir)
    lora = LoRAArgs.from_settings(settings)
    model = load_model(settings["checkpoint_dir"], lora, precision, device=device)
    adapters = load_weights(checkpoint_dir, LORA_WEIGHTS)
    expected = {name for name, _ in model.named_parameters() if "lora_" in name}
    try:
        model.load_state_dict(adapters, strict=False)
    except RuntimeError as e:
        raise UserError(f"The adapters in {checkpoint_dir} do not fit {settings['checkpoint_dir']}: {e}") from None
    if set(adapters) != expected:
        odd = sorted(set(adapters) ^ expected)
        raise UserError(f"The adapters in {checkpoint_dir} do not fit hyperparameters.yaml; they differ in {odd[:3]}.")
    return model


def model_hash(checkpoint_dir: Path) -> dict[str, str]:
    """SHA-256 of the weights that are evaluated, as provenance.json has it; computed where that is missing.

    Returns:
        Hashes by file name; for adapters without merged weights the base's too.
    """
    if (checkpoint_dir / PROVENANCE).is_file():
        hashes = dict(read_json(checkpoint_dir / PROVENANCE).get("files", {}))
    else:
        hashes = {file.name: sha256(file) for file in sorted(checkpoint_dir.glob("lit_model.pth*"))}
    if (checkpoint_dir / WEIGHTS).is_file():
        return {WEIGHTS: hashes[WEIGHTS]} if WEIGHTS in hashes else {WEIGHTS: sha256(checkpoint_dir / WEIGHTS)}
    base = model_hash(Path(read_hyperparameters(checkpoint_dir)["checkpoint_dir"]))
    return {LORA_WEIGHTS: sha256(checkpoint_dir / LORA_WEIGHTS), **{f"base/{k}": v for k, v in base.items()}}
