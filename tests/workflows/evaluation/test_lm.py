"""Our lm-eval model against lm-eval's own `hf` model on the same weights: same numbers, same texts."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing

from data_prep.rows import read_rows
from tests.conftest import CHATML, convert, make_llama
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.evaluation.lm import LitGPTLM, load_for_evaluation, model_hash

pytestmark = pytest.mark.long

CHOICES = ["Tachypnea", "Anemia of the blood", "Leiomyoma — 子宮", "A"]
QUESTIONS = [
    "Which clinical finding does this describe? An abnormally increased rate of breathing.",
    "Which clinical finding does this describe? The presence of a leiomyoma of the uterus.",
    "Ünïcödé 🙂 and digits 1234567",
]


def requests(*args):
    return [SimpleNamespace(args=each, task_name="test") for each in args]


def ours_of(checkpoint: Path, **settings) -> LitGPTLM:
    model = load_for_evaluation(checkpoint, "32-true")
    return LitGPTLM(model, ChatTemplate.from_checkpoint(checkpoint), progress=False, **settings)


def hf_of(directory: Path) -> HFLM:
    return HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def pairs_of_models(tiny_llama, tiny_llama_hf, tiny_qwen2, tiny_qwen2_hf, tmp_path_factory):
    """(ours, hf) for Llama and Qwen2, and for a tokenizer that adds a BOS token by itself."""
    bos_hf = make_llama(tmp_path_factory.mktemp("hf") / "tiny-bos")
    tokenizer = json.loads((bos_hf / "tokenizer.json").read_text())
    tokenizer["post_processor"] = json.loads(
        TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
        ).__getstate__()
    )
    (bos_hf / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((bos_hf / "tokenizer_config.json").read_text())
    (bos_hf / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<|endoftext|>"}))
    (bos_hf / "chat_template.jinja").write_text("{{ bos_token }}" + CHATML)
    bos = convert(bos_hf, tmp_path_factory.mktemp("checkpoints"))
    return {
        "llama": (ours_of(tiny_llama, row_tokens=256), hf_of(tiny_llama_hf)),
        "qwen2": (ours_of(tiny_qwen2, row_tokens=256), hf_of(tiny_qwen2_hf)),
        "bos": (ours_of(bos, row_tokens=256), hf_of(bos_hf)),
    }


@pytest.fixture(params=["llama", "qwen2", "bos"])
def both(request, pairs_of_models):
    return pairs_of_models[request.param]


def assert_same_scores(ours, theirs, tolerance=1e-3):
    for (mine, my_greedy), (expected, greedy) in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(expected, abs=tolerance)
        assert my_greedy == greedy


def test_loglikelihoods_of_plain_and_chat_prompts(both):
    ours, hf = both
    contexts = [question + end for question in QUESTIONS for end in ("\nAnswer:", "\nAnswer: ", "\n\n", "")]
    contexts += ["", "<|endoftext|>Text that begins with a special token."]
    asked = requests(*((context, f" {choice}") for context in contexts for choice in CHOICES))
    assert_same_scores(ours.loglikelihood(asked), hf.loglikelihood(asked, disable_tqdm=True))

    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    chats.append([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    rendered = [ours.apply_chat_template(chat) for chat in chats]
    assert rendered == [hf.apply_chat_template(chat) for chat in chats]
    asked = requests(*((prompt, choice) for prompt in rendered for choice in CHOICES))
    for request in asked:
        assert ours._encode_pair(*request.args) == hf._encode_pair(*request.args)
    assert_same_scores(ours.loglikelihood(asked), hf.loglikelihood(asked, disable_tqdm=True))


def test_a_greedy_continuation_is_seen_as_one(both):
    ours, hf = both
    context = "Which clinical finding"
    written = hf.generate_until(requests((context, {"max_gen_toks": 6, "until": []})), disable_tqdm=True)[0]
    asked = requests((context, written), (context, written + " no"))
    scores = ours.loglikelihood(asked)
    assert_same_scores(scores, hf.loglikelihood(asked, disable_tqdm=True))


def test_an_open_last_message_is_rendered_like_transformers(both):
    ours, hf = both
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer is "}]
    assert ours.apply_chat_template(chat, False) == hf.apply_chat_template(chat, add_generation_prompt=False)


def test_rolling_loglikelihood_in_windows(both):
    ours, hf = both
    asked = requests(("A short text.",), ("An abnormally increased rate of breathing. " * 240,), ("",))
    mine, expected = ours.loglikelihood_rolling(asked), hf.loglikelihood_rolling(asked, disable_tqdm=True)
    assert len(ours.tok_encode(asked[1].args[0])) > 2 * ours.max_length
    assert mine == pytest.approx(expected, abs=1e-3, rel=1e-6)


def test_contexts_beyond_the_model_are_cut_on_the_left_and_counted(both):
    ours, hf = both
    long = "The presence of a leiomyoma of the uterus. " * 240
    asked = requests((long, " Anemia"), (long, " A"), ("Short", " A"))
    before = ours.truncated
    assert_same_scores(ours.loglikelihood(asked), hf.loglikelihood(asked, disable_tqdm=True))
    assert ours.truncated == before + 2


def test_generated_texts_and_stop_strings(both):
    ours, hf = both
    free = {"max_gen_toks": 24, "until": []}
    texts = hf.generate_until(requests(*((question, free) for question in QUESTIONS)), disable_tqdm=True)
    assert ours.generate_until(requests(*((question, free) for question in QUESTIONS))) == texts
    stops = [text[8:10] for text in texts if len(text) > 10]  # strings that do come up, across token borders
    settings = {"max_gen_toks": 24, "until": stops}
    long = "The presence of a leiomyoma of the uterus. " * 240
    asked = requests(*((context, settings) for context in (*QUESTIONS, long)), (QUESTIONS[0], free))
    stopped = hf.generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked) == stopped
    assert any(len(text) < len(full) for text, full in zip(stopped, texts, strict=False))


def test_sampled_answers_differ_and_repeat(tiny_llama):
    settings = {"max_gen_toks": 12, "until": [], "do_sample": True, "temperature": 1.0, "top_p": 0.95}
    asked = requests((QUESTIONS[0], settings), (QUESTIONS[0], settings), (QUESTIONS[1], settings))
    first = ours_of(tiny_llama).generate_until(asked)
    assert first[0] != first[1]  # two samples of one prompt
    assert ours_of(tiny_llama).generate_until(asked) == first
    assert ours_of(tiny_llama, seed=5).generate_until(asked) != first


def test_packing_changes_nothing_but_the_work(tiny_llama):
    asked = requests(
        *((f"{question} Case {i}.", choice) for i in range(9) for question in QUESTIONS for choice in CHOICES)
    )
    work = {}
    scores = {}
    for row_tokens in (1, 200, 4000):
        lm = ours_of(tiny_llama, row_tokens=row_tokens)
        lengths = []
        score = lm.model.score

        def counted(batch, score=score, lengths=lengths):
            lengths.append(batch.input_ids.size(1))
            return score(batch)

        lm.model.score = counted
        scores[row_tokens] = lm.loglikelihood(asked)
        work[row_tokens] = lengths
        assert lm.cache.tokens == sum(len(a) + len(b) for a, b in (lm._encode_pair(*r.args) for r in asked))
    assert_same_scores(scores[1], scores[200], 1e-4)
    assert_same_scores(scores[1], scores[4000], 1e-4)
    assert len(work[1]) == 27 and len(work[4000]) == 1
    assert sum(work[1]) < lm.cache.tokens / 2  # a question's context is computed once for its four choices


def test_unmerged_adapters_score_like_merged_ones(tiny_llama, tmp_path):
    from workflows.checkpoint import LORA_WEIGHTS, WEIGHTS, copy_companions, write_hyperparameters
    from workflows.merge import write_merged
    from workflows.training.model import LoRAArgs, load_model

    lora = LoRAArgs(r=4, alpha=8, key=False)
    model = load_model(tiny_llama, lora)
    torch.manual_seed(1)
    adapters = {n: torch.randn_like(p) * 0.1 for n, p in model.named_parameters() if "lora_" in n}
    merged, apart = tmp_path / "merged", tmp_path / "apart"
    for directory in (merged, apart):
        directory.mkdir()
        copy_companions(tiny_llama, directory)
    write_merged(tiny_llama, adapters, lora, merged)
    torch.save({"model": adapters}, apart / LORA_WEIGHTS)
    write_hyperparameters(apart, {"checkpoint_dir": tiny_llama, **lora.config_fields()})

    asked = requests(*((question, choice) for question in QUESTIONS for choice in CHOICES))
    expected = ours_of(merged).loglikelihood(asked)
    assert_same_scores(ours_of(apart).loglikelihood(asked), expected, 1e-4)
    assert abs(expected[0][0] - ours_of(tiny_llama).loglikelihood(asked)[0][0]) > 0.01
    assert set(model_hash(apart)) == {LORA_WEIGHTS, f"base/{WEIGHTS}"}
    assert model_hash(merged) != model_hash(tiny_llama)

    write_hyperparameters(apart, {"checkpoint_dir": tiny_llama, **lora.config_fields(), "lora_key": True})
    with pytest.raises(UserError, match="do not fit"):
        load_for_evaluation(apart, "32-true")


def test_impossible_requests_are_explained(tiny_llama):
    lm = ours_of(tiny_llama)
    with pytest.raises(UserError, match="a text of 0 tokens"):
        lm.loglikelihood(requests(("context", "")))
    with pytest.raises(UserError, match="context of 512"):
        lm.loglikelihood(requests(("context", " of a leiomyoma" * 600)))
    with pytest.raises(UserError, match="no room"):
        lm.generate_until(requests(("context", {"max_gen_toks": 512, "until": []})))
    with pytest.raises(UserError, match="num_beams"):
        lm.generate_until(requests(("context", {"num_beams": 4, "until": []})))


@pytest.mark.checkpoint
def test_real_checkpoint_scores_like_hf(embedded_checkpoint, embedded_hf, hpo_data):
    rows = read_rows(hpo_data / "hpo_mcq" / "test.jsonl", "scoring")[:8]
    template = ChatTemplate.from_checkpoint(embedded_checkpoint)
    asked = requests(
        *((template.render(row["prompt"], add_generation_prompt=True), c) for row in rows for c in row["choices"])
    )
    ours = [score for score, _ in ours_of(embedded_checkpoint).loglikelihood(asked)]  # an argmax may be a near tie
    theirs = [score for score, _ in hf_of(embedded_hf).loglikelihood(asked, disable_tqdm=True)]
    assert ours == pytest.approx(theirs, abs=2e-3)
