"""The reward model on a tiny model: it tells pairs apart, is read back as it was, and can be a reward."""

import math
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from tests.workflows.alignment import TRAIN, log_of, on_test_split, pair
from workflows import reward
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import check_checkpoint_dir, load_weights
from workflows.errors import UserError
from workflows.training.batch import Tree, pack_row
from workflows.training.model import LoRAArgs, load_model
from workflows.training.rewards import Rewards, Sample, WeightedReward
from workflows.training.scalar_heads import LearnedReward, RewardModel, pack_scored, scored, with_head

pytestmark = pytest.mark.long


def test_a_reward_model_learns_to_tell_pairs_apart(judge, pairs):
    log = log_of(judge.parent)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and log[0]["accuracy"] == 0.5
    assert log[-1]["loss"] < 0.4 and log[-1]["val_accuracy"] > 0.9
    assert on_test_split(judge.parent)["pair_accuracy"]["value"] > 0.9
    assert check_checkpoint_dir(judge) == judge
    head = safetensors.torch.load_file(judge / "reward_head.safetensors")
    assert head["weight"].abs().sum() > 0 and head["std"] > 0
    rows = [pair(n) for n in range(60, 70)]
    learned = LearnedReward(judge, "32-true")
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (learned(prompts, [row[side][0]["content"] for row in rows]) for side in ("chosen", "rejected"))
    assert sum(c > r for c, r in zip(chosen, rejected, strict=True)) >= 9
    assert learned(prompts[:1], ["It is fever, a finding."]) == pytest.approx(
        learned(prompts, ["It is fever, a finding."] * 10)[:1], abs=1e-4
    )


def test_the_saved_head_gives_the_rewards_of_training(judge, tiny_llama):
    """Merged trunk and saved head against adapters and the number that training validated with."""
    head = safetensors.torch.load_file(judge / "reward_head.safetensors")
    template = ChatTemplate.from_checkpoint(judge)
    row = pair(3)
    chat = template.encode_chat([*row["prompt"], *row["chosen"]], 1)
    model = with_head(load_model(tiny_llama, LoRAArgs(r=4, alpha=32)), RewardModel, "reward_head")
    adapters = torch.load(judge / "lit_model.pth.lora", weights_only=True)["model"]
    model.load_state_dict({**adapters, "reward_head.weight": head["weight"]}, strict=False)
    with torch.no_grad():
        given = float(model(pack_row([scored(Tree(chat.prompt, [chat.completion]))])))
    expected = (given - float(head["mean"])) / float(head["std"])
    assert LearnedReward(judge, "32-true")([row["prompt"]], [row["chosen"][0]["content"]]) == pytest.approx(
        [expected], abs=1e-4
    )


def test_a_reward_is_read_where_the_answers_last_token_is_the_input():
    trees = [Tree([5, 6, 7], [[8, 9, 10], [11, 12]]), Tree([5, 6, 8], [[13]])]
    ((_, row),) = pack_scored(trees, 64)
    assert row.input_ids[0, row.predictors].tolist() == [10, 12, 13]
    assert row.real_tokens == sum(tree.real_tokens for tree in trees)


def test_the_token_that_ends_an_answer_decides_its_reward(judge, tiny_llama):
    """The states that are read are the plain model's at the end token, or at the last token of a truncated answer."""
    learned = LearnedReward(judge, "32-true")
    row = pair(3)
    prompt, answer = row["prompt"], row["chosen"][0]["content"]
    chat = learned.template.encode_chat([*prompt, *row["chosen"]], 1)
    assert chat.completion[-1] in learned.template.stop_ids
    expected = []
    for ids in ([*chat.prompt, *chat.completion], [*chat.prompt, *chat.completion[:-1]]):
        plain = load_model(judge)
        plain.lm_head = torch.nn.Identity()  # the model's own forward then gives its final states
        with torch.no_grad():
            state = plain(torch.tensor([ids]))[0, -1]
        expected.append((float(state @ learned.model.reward_head.weight[0]) - learned.mean) / learned.std)
    found = learned([prompt, prompt], [answer, answer], [False, True])
    assert found == pytest.approx(expected, abs=1e-4)
    assert abs(found[0] - found[1]) > 1e-3
    assert learned([prompt], [""], [True])[0] != pytest.approx(learned([prompt], [""])[0], abs=1e-3)


def test_rewards_ask_the_judge_without_an_end_for_truncated_answers(judge):
    row = pair(3)
    samples = [Sample(row, "It is fever, a finding.", 9, truncated, 9) for truncated in (False, True)]
    found = [given["total"] for given in Rewards([WeightedReward(str(judge))])(samples)]
    learned = LearnedReward(judge, "32-true")
    texts = [sample.text for sample in samples]
    assert found == pytest.approx(learned([row["prompt"]] * 2, texts, [False, True]), abs=1e-5)
    assert abs(found[0] - found[1]) > 1e-3


def test_an_answer_without_room_for_its_end_is_read_at_its_last_token(judge):
    learned = LearnedReward(judge, "32-true")
    prompt = pair(3)["prompt"]
    long = "fever " * 600
    assert learned([prompt], [long]) == pytest.approx(learned([prompt], [long], [True]), abs=1e-5)


def test_a_head_of_an_earlier_version_is_refused(judge, tmp_path):
    old = shutil.copytree(judge, tmp_path / "judge")
    head = old / "reward_head.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(head), head)  # without the metadata
    with pytest.raises(UserError, match=r"read rewards before the token that ends an answer.*--resume false"):
        LearnedReward(old, "32-true")


def test_full_weights_of_a_model_with_a_head_of_its_own(tiny_qwen2, pairs, tmp_path):
    """Nothing depends on that head: it is not trained, and stays in the checkpoint as it was."""
    train = replace(TRAIN, max_steps=8, learning_rate=1e-3)
    reward.setup(tiny_qwen2, pairs, tmp_path, train=train, precision="32-true", lora_r=0)
    assert log_of(tmp_path)[-1]["loss"] < log_of(tmp_path)[0]["loss"]
    before, after = (load_weights(folder) for folder in (tiny_qwen2, tmp_path / "final"))
    assert before.keys() == after.keys() and torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert not torch.equal(before["transformer.wte.weight"], after["transformer.wte.weight"])
    sizes = [(folder / "lit_model.pth").stat().st_size for folder in (tiny_qwen2, tmp_path / "final")]
    assert sizes[1] < 1.1 * sizes[0]  # nothing is written twice
    LearnedReward(tmp_path / "final", "32-true")


def test_a_result_of_full_weights_is_of_one_precision(tiny_qwen2, pairs, tmp_path):
    """The untrained head, too: exports name one type for all."""
    reward.setup(tiny_qwen2, pairs, tmp_path, train=replace(TRAIN, max_steps=1), precision="bf16-true", lora_r=0)
    assert {tensor.dtype for tensor in load_weights(tmp_path / "final").values()} == {torch.bfloat16}


def test_what_is_no_reward_model_is_refused(tiny_llama):
    with pytest.raises(UserError, match="is no reward model"):
        LearnedReward(tiny_llama, "32-true")
