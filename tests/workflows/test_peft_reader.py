"""A LoRA adapter of PEFT's is a model: merged with its base it gives PEFT's logits, or it is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from litgpt import GPT
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import convert, make_llama
from workflows.checkpoint import check_checkpoint_dir, is_tied, load_config, load_weights
from workflows.download import setup
from workflows.errors import UserError
from workflows.model_card import base_model_of, lineage
from workflows.peft_export import find_base

pytestmark = pytest.mark.long

IDS = torch.tensor([[5, 70, 12, 200, 33, 9, 141, 7]])


def make_adapter(base: Path, folder: Path, resize: int | None = None, **settings: Any) -> torch.Tensor:
    """Write an adapter with PEFT, random in all that it trains, and return the adapted model's logits."""
    torch.manual_seed(1)
    hf = AutoModelForCausalLM.from_pretrained(base)
    if resize is not None:
        hf.resize_token_embeddings(resize)
    options = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", "init_lora_weights": False, **settings}
    model = get_peft_model(hf, LoraConfig(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        logits = model(IDS).logits
    model.save_pretrained(folder)
    return logits


def download(model: Path, checkpoints: Path, **options: Any) -> Path:
    setup(model=str(model), checkpoints_dir=checkpoints, **options)
    return check_checkpoint_dir(checkpoints / "local" / model.name)


@torch.no_grad()
def logits_of(checkpoint: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    model = GPT(load_config(checkpoint)).eval()
    model.load_state_dict(load_weights(checkpoint))
    return model(ids)


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTED: dict[str, dict[str, Any]] = {
    "all linear layers": {"target_modules": ALL},
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "ranks and alphas of their own": {
        "target_modules": ALL,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 6},
        "alpha_pattern": {"^model.layers.1.mlp.up_proj": 3, r".*\.1\.self_attn\.[kv]_proj": 5},
    },
    "rsLoRA": {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"v_proj": 9}},
    "DoRA": {"target_modules": ALL, "use_dora": True},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "both tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "norms saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]},
    "trained tokens by module": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [70, 7]}},
    "biases of adapted layers": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
}
STAYS_TIED = ("trained tokens", "trained tokens by module", "both tied")
CHANGES_BOTH = ("the head", "the embedding", "embedding saved whole", "both saved whole", "head saved whole")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("adapted", ADAPTED)
def test_the_merged_checkpoint_gives_pefts_logits(family: str, adapted: str, tmp_path: Path, request) -> None:
    """The tiny Llama's head is tied, the tiny Qwen2 has biases and a head of its own."""
    base = request.getfixturevalue(f"tiny_{family}_hf")
    expected = make_adapter(base, tmp_path / "adapter", **ADAPTED[adapted])
    made = download(tmp_path / "adapter", tmp_path / "c")
    got = logits_of(made)
    assert (got - expected).abs().max() <= 1e-4
    if not (family == "llama" and adapted in ("the head", "the embedding")):  # PEFT merges these into the shared matrix
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
        with torch.no_grad():
            assert (peft.merge_and_unload()(IDS).logits - got).abs().max() <= 1e-4
    assert is_tied(made) == (family == "llama" and (adapted in STAYS_TIED or adapted not in CHANGES_BOTH))


def test_base_and_adapter_are_recorded_and_a_changed_one_is_noticed(tiny_llama_hf, tmp_path, capsys):
    base = shutil.copytree(tiny_llama_hf, tmp_path / "base")
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    made = download(tmp_path / "adapter", tmp_path / "c")
    assert f"is a LoRA adapter for {base}; the two are merged" in capsys.readouterr().out
    provenance = json.loads((made / "provenance.json").read_text())["sources"]["model"]
    assert provenance["place"] == str(tmp_path / "adapter") and provenance["base"]["place"] == str(base)
    assert "adapter_model.safetensors" in provenance["sha256"] and "model.safetensors" in provenance["base"]["sha256"]
    assert base_model_of(lineage(made)) == f"{base} with the LoRA adapter {tmp_path / 'adapter'}"

    setup(model=str(tmp_path / "adapter"), checkpoints_dir=tmp_path / "c")
    assert "already there" in capsys.readouterr().out
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"base, the base of .*adapter, has changed since"):
        setup(model=str(tmp_path / "adapter"), checkpoints_dir=tmp_path / "c")
    shutil.rmtree(base)  # the checkpoint needs it no more
    setup(model=str(tmp_path / "adapter"), checkpoints_dir=tmp_path / "c")


def test_an_adapter_trained_on_a_merged_hub_adapter_does_not_name_the_hub_as_its_base(tiny_llama, tmp_path):
    merged = shutil.copytree(tiny_llama, tmp_path / "merged")
    source = {"kind": "hub", "place": "org/adapter", "commit": "1", "base": {"kind": "hub", "place": "org/base"}}
    (merged / "provenance.json").write_text(json.dumps({"step": "download", "sources": {"model": source}, "files": {}}))
    final = tmp_path / "final"
    final.mkdir()
    (final / "hyperparameters.yaml").write_text(f"lora_r: 4\ncheckpoint_dir: {merged}\n")
    assert find_base(final, tmp_path / "x").made_by is not None


def test_a_base_is_named_or_taken_from_a_checkpoint(tiny_llama_hf, tiny_llama, tmp_path, capsys):
    expected = make_adapter(tiny_llama_hf, tmp_path / "adapter", target_modules=ALL)
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    for name, message in (
        ("no-such-model", r"adapter for no-such-model. Unknown model(.|\n)*--base"),
        (None, r"does not name its base model. Name it with --base"),
        (str(tmp_path / "adapter"), r"The base is an adapter, too"),
    ):
        file.write_text(json.dumps({**config, "base_model_name_or_path": name}))
        with pytest.raises(UserError, match=message):
            download(tmp_path / "adapter", tmp_path / "c")
    file.write_text(json.dumps({**config, "base_model_name_or_path": "gone"}))
    for base in (tiny_llama, tiny_llama_hf):
        made = download(tmp_path / "adapter", tmp_path / base.parent.name, base=str(base))
        assert (logits_of(made) - expected).abs().max() <= 1e-4
        download(tmp_path / "adapter", tmp_path / base.parent.name, base=str(base))
        assert "already there" in capsys.readouterr().out
    with pytest.raises(UserError, match="was made from something else: base"):
        download(tmp_path / "adapter", tmp_path / tiny_llama.parent.name, base=str(tiny_llama_hf))
    with pytest.raises(UserError, match="--base is only for a LoRA adapter"):
        download(tiny_llama_hf, tmp_path / "d", base=str(tiny_llama))


def test_another_base_does_not_fit(tiny_qwen2_hf, tmp_path):
    make_adapter(tiny_qwen2_hf, tmp_path / "adapter", target_modules=["q_proj"], bias="lora_only")
    with pytest.raises(UserError, match=r"does not fit its base .*no .*q_proj.bias(.|\n)*--base"):
        download(tmp_path / "adapter", tmp_path / "c", base=str(make_llama(tmp_path / "llama")))
    make_adapter(tiny_qwen2_hf, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"shapes A \(4, 48\) and B \(48, 4\)(.|\n)*--base"):
        download(tmp_path / "adapter", tmp_path / "c", base=str(make_llama(tmp_path / "wide", hidden_size=64)))


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_come_with_their_rows_of_the_embedding(tied: bool, tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", tied=tied)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
    expected = make_adapter(base, tmp_path / "adapter", resize=len(tokenizer), target_modules=ALL)
    tokenizer.save_pretrained(tmp_path / "adapter")
    made = download(tmp_path / "adapter", tmp_path / "c")
    assert (logits_of(made) - expected).abs().max() <= 1e-4
    assert is_tied(made) == tied
    config = json.loads((made / "config.json").read_text())
    assert config["vocab_size"] == load_config(made).vocab_size == len(tokenizer)
    assert Tokenizer.from_file(str(made / "tokenizer.json")).token_to_id("<|tool|>") == len(tokenizer) - 1


def test_the_adapters_template_is_taken_and_bf16_stays_bf16(tiny_qwen2_hf, tmp_path):
    base = shutil.copytree(tiny_qwen2_hf, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, base / "model.safetensors")
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file)
    template = (base / "chat_template.jinja").read_text().replace("tiny model", "tuned model")
    (tmp_path / "adapter" / "chat_template.jinja").write_text(template)
    made = download(tmp_path / "adapter", tmp_path / "c")
    assert {tensor.dtype for tensor in load_weights(made).values()} == {torch.bfloat16}
    assert (made / "chat_template.jinja").read_text() == template


def test_pickled_weights_and_names_with_the_adapters_name_mean_the_same(tiny_llama_hf, tmp_path):
    expected = make_adapter(tiny_llama_hf, tmp_path / "adapter", target_modules=ALL)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in load_file(file).items()}
    torch.save(named, tmp_path / "adapter" / "adapter_model.bin")
    file.unlink()
    assert (logits_of(download(tmp_path / "adapter", tmp_path / "c")) - expected).abs().max() <= 1e-4


def test_a_folder_with_a_whole_model_too_is_that_model(tiny_llama_hf, tmp_path, capsys):
    folder = shutil.copytree(tiny_llama_hf, tmp_path / "both")
    make_adapter(tiny_llama_hf, tmp_path / "adapter", target_modules=ALL)
    for file in (tmp_path / "adapter").glob("adapter_*"):
        shutil.copyfile(file, folder / file.name)
    made = download(folder, tmp_path / "c")
    assert "holds a whole model and an adapter" in capsys.readouterr().out
    expected = load_weights(convert(tiny_llama_hf, tmp_path / "d"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_weights(made).items())


def test_of_several_adapters_one_is_given(tiny_llama_hf, tmp_path, capsys):
    for name in ("one", "two"):
        make_adapter(tiny_llama_hf, tmp_path / "run" / name, target_modules=ALL)
    with pytest.raises(UserError, match="holds adapters in subfolders; give one of them: one, two"):
        download(tmp_path / "run", tmp_path / "c")
    make_adapter(tiny_llama_hf, tmp_path / "run", target_modules=ALL)
    download(tmp_path / "run", tmp_path / "c")
    assert "further adapters in subfolders (one, two); they are left out" in capsys.readouterr().out


def test_an_adapter_as_checkpoint_directory_is_called_what_it_is(tiny_llama_hf, tmp_path):
    make_adapter(tiny_llama_hf, tmp_path / "adapter", target_modules=ALL)
    with pytest.raises(UserError, match=r"is an adapter in PEFT's format for .*not a model: .*make download MODEL="):
        check_checkpoint_dir(tmp_path / "adapter")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "PEFT adapter of the type 'IA3' for"),
    "a classifier": ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
    "another layout": ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
    "copied layers": ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    "a later invention": ({"use_newer_lora": True}, "use_newer_lora True"),
    "biases of the adapter": ({"lora_bias": True}, "lora_bias True"),
    "weights of its own": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base's weights"),
    "several": (
        {"use_qalora": True, "target_parameters": ["x"]},
        r"2 problems:(.|\n)*target_parameters(.|\n)*use_qalora",
    ),
    "no rank": ({"r": None}, "r is None, not a rank"),
    "another rank": ({"r": 8}, "of rank 4, but adapter_config.json says 8"),
    "a slow pattern": ({"alpha_pattern": {"(a*)*b": 2}}, r"pattern '\(a\*\)\*b' is not supported"),
    "no pattern": ({"alpha_pattern": {"(": 2}}, "'\\(' is not a regular expression"),
    "magnitudes missing": ({"use_dora": True}, "no magnitudes"),
    "a module missing": ({"modules_to_save": ["lm_head"]}, r"lm_head \(in modules_to_save, but not in the file\)"),
    "tokens missing": ({"trainable_token_indices": [1]}, r"trainable_token_indices \(not in the file\)"),
}


@pytest.fixture(scope="module")
def plain_adapter(tiny_llama_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    make_adapter(tiny_llama_hf, folder, target_modules=ALL)
    return folder


def test_an_adapter_of_another_tool_is_called_what_it_is(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "model": "a/b"}))
    with pytest.raises(UserError, match=r"names no peft_type, so the adapter is not in PEFT's format.*mlx_lm.fuse"):
        setup(model=str(tmp_path), checkpoints_dir=tmp_path / "c")


def test_a_relative_base_that_is_not_here_is_no_hub_id(plain_adapter, tmp_path, capsys):
    folder = shutil.copytree(plain_adapter, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "../base"}))
    with pytest.raises(UserError, match=r"Unknown model '../base'(.|\n)*--base names another base"):
        setup(model=str(folder), checkpoints_dir=tmp_path / "c")
    assert "Hugging Face Hub" not in capsys.readouterr().out


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case, plain_adapter, tmp_path):
    changes, message = REFUSED[case]
    folder = shutil.copytree(plain_adapter, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        download(folder, tmp_path / "c")
    assert not list((tmp_path / "c").glob("local/*"))


ODD = "base_model.model.model.layers.0.self_attn.q_proj."
SPOILED: dict[str, tuple[Any, str]] = {
    "half of a layer": (lambda w: w.pop(ODD + "lora_B.weight"), "model.layers.0.self_attn.q_proj"),
    "a bias in B": (lambda w: w.update({ODD + "lora_B.bias": torch.ones(48)}), "has no .*q_proj.lora_B.bias"),
    "a foreign prefix": (lambda w: w.update({"model.norm.weight": torch.ones(48)}), "model.norm.weight"),
    "no matrix": (lambda w: w.update({ODD + "lora_A.weight": torch.tensor(1.0)}), r"A \(\)"),
    "nothing": (lambda w: w.clear(), "there are none"),
    "DoRA of an embedding": (
        lambda w: w.update(
            {
                f"base_model.model.model.embed_tokens.{part}": torch.ones(3, 3)
                for part in ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
            }
        ),
        "DoRA of an embedding",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_weights_that_are_none_of_an_adapter_are_refused(case, plain_adapter, tmp_path):
    spoil, message = SPOILED[case]
    folder = shutil.copytree(plain_adapter, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    spoil(weights)
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        download(folder, tmp_path / "c")


def test_an_adapter_without_weights_is_refused(plain_adapter, tmp_path):
    folder = shutil.copytree(plain_adapter, tmp_path / "adapter", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=r"has an adapter_config.json, but no adapter_model.safetensors or"):
        download(folder, tmp_path / "c")
