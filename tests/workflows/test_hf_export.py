"""Hugging Face directories and PEFT adapters that we write, loaded by transformers and PEFT."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import convert
from tests.workflows.conftest import file_size_limit
from workflows.checkpoint import write_hyperparameters
from workflows.errors import UserError
from workflows.hf_export import hf_module_names, write_hf
from workflows.merge import write_merged
from workflows.peft_export import Base, write_adapter
from workflows.training.model import LoRAArgs, load_model

IDS = torch.tensor([[5, 70, 12, 200, 33, 9, 141, 7]])


def hf_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def lit_logits(checkpoint: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(checkpoint)(IDS)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_export_gives_the_logits_of_litgpt_and_of_the_original(family: str, tmp_path: Path, request) -> None:
    checkpoint = request.getfixturevalue(f"tiny_{family}")
    original = request.getfixturevalue(f"tiny_{family}_hf")
    write_hf(checkpoint, tmp_path / "hf", "# card")
    assert torch.equal(hf_logits(tmp_path / "hf"), hf_logits(original))
    assert (hf_logits(tmp_path / "hf") - lit_logits(checkpoint)).abs().max() <= 1e-4
    assert (tmp_path / "hf" / "README.md").read_text() == "# card"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": "What is anemia?"}]
    expected = AutoTokenizer.from_pretrained(original).apply_chat_template(messages, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == expected


def test_shards_are_no_larger_than_asked_and_load_alike(tiny_qwen2: Path, tmp_path: Path) -> None:
    write_hf(tiny_qwen2, tmp_path / "one", "")
    write_hf(tiny_qwen2, tmp_path / "many", "", shard_bytes=100_000)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 100_000 + 10_000 for shard in shards)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert torch.equal(hf_logits(tmp_path / "one"), hf_logits(tmp_path / "many"))


def test_a_tied_head_stays_tied_unless_its_weights_differ(tiny_llama: Path, tmp_path: Path) -> None:
    write_hf(tiny_llama, tmp_path / "tied", "")
    with safe_open(tmp_path / "tied" / "model.safetensors", "pt") as f:
        assert "lm_head.weight" not in f.keys()  # noqa: SIM118
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"] is True

    changed = shutil.copytree(tiny_llama, tmp_path / "changed")
    weights = torch.load(changed / "lit_model.pth", weights_only=True)
    weights["lm_head.weight"] = weights["lm_head.weight"] * 2
    torch.save(weights, changed / "lit_model.pth")
    write_hf(changed, tmp_path / "untied", "")
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.allclose(hf_logits(tmp_path / "untied"), 2 * hf_logits(tmp_path / "tied"), atol=1e-5)


def test_bos_is_added_by_the_exported_tokenizer_as_by_the_original(tiny_llama_hf: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama_hf, tmp_path / "with-bos")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = "<|endoftext|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": bos}))
    checkpoint = convert(folder, tmp_path / "checkpoints")
    # LitGPT's rule: this template does not write BOS, so LitGPT must not either
    assert json.loads((checkpoint / "tokenizer_config.json").read_text())["add_bos_token"] is False
    write_hf(checkpoint, tmp_path / "hf", "")
    for text in ("What is anemia?", bos + "x"):
        ours = AutoTokenizer.from_pretrained(tmp_path / "hf")(text)["input_ids"]
        assert ours == AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer.encode(text).ids
        assert ours[0] == tokenizer.token_to_id(bos)


def test_a_full_disk_leaves_the_old_directory(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    out.mkdir()
    (out / "old").write_text("kept")
    with file_size_limit(50_000), pytest.raises(UserError, match="Could not write"):
        write_hf(tiny_llama, out, "")
    assert (out / "old").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_other_architectures_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["FalconForCausalLM"]}))
    with pytest.raises(UserError, match="FalconForCausalLM cannot be exported"):
        write_hf(other, tmp_path / "hf", "")
    with pytest.raises(UserError, match="not a weight of the Llama or Qwen2"):
        hf_module_names("transformer.h.0.attn.norm_q")


ADAPTED = {
    "all-linear": LoRAArgs(r=4, alpha=12),
    "query and value": LoRAArgs(r=2, alpha=4, key=False, projection=False, mlp=False),
    "key only": LoRAArgs(r=3, alpha=3, query=False, value=False, projection=False, mlp=False),
    "with the head": LoRAArgs(r=4, alpha=8, head=True),
}


def trained(base: Path, lora: LoRAArgs, final: Path) -> torch.Tensor:
    """Write what a LoRA step on `base` ends with, and return the logits of its model."""
    model = load_model(base, lora)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        expected = model(IDS)
    shutil.copytree(base, final, ignore=shutil.ignore_patterns("lit_model.pth"))
    adapters = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    torch.save({"model": adapters}, final / "lit_model.pth.lora")
    write_hyperparameters(final, {"checkpoint_dir": str(base), **lora.config_fields()})
    write_merged(base, adapters, lora, final)
    return expected


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("adapted", ADAPTED)
def test_peft_gives_the_adapted_models_logits(family: str, adapted: str, tmp_path: Path, request) -> None:
    """Adapted, merged by PEFT, and saved and loaded again; the tiny Llama's head is tied, the tiny Qwen2's is not."""
    from peft import PeftModel

    base, lora = request.getfixturevalue(f"tiny_{family}"), ADAPTED[adapted]
    expected = trained(base, lora, tmp_path / "final")
    write_adapter(tmp_path / "final", tmp_path / "adapter", Base(str(base)), "# card")

    hf = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(f"tiny_{family}_hf"))
    with torch.no_grad():
        before = hf(IDS).logits
        model = PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()
        got = model(IDS).logits
        merged = model.merge_and_unload()
        assert (merged(IDS).logits - expected).abs().max() <= 1e-4
    assert (got - expected).abs().max() <= 1e-4
    assert (got - before).abs().max() > 0.1  # the adapter does something
    merged.save_pretrained(tmp_path / "merged")
    assert (hf_logits(tmp_path / "merged") - expected).abs().max() <= 1e-4


def test_an_adapter_of_a_tied_head_alone_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    nothing_else = {"query": False, "key": False, "value": False, "projection": False, "mlp": False}
    trained(tiny_llama, LoRAArgs(r=4, head=True, **nothing_else), tmp_path / "final")
    with pytest.raises(UserError, match="only the head was adapted, and the base ties it"):
        write_adapter(tmp_path / "final", tmp_path / "adapter", Base("base"), "")


def test_an_adapter_needs_a_lora_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lacks lit_model.pth.lora"):
        write_adapter(tiny_llama, tmp_path / "adapter", Base("base"), "")
