"""Heads that fill masks are transformers'; masks are drawn BERT's way; training names hidden tokens."""

import pytest
import torch
import torch.nn.functional as F

from custom_models.encoder import Encoder, bert, distilbert
from custom_models.masked_language_model import IGNORED, MaskedLanguageModel, load_masked_language_model, mask_tokens
from tests.custom_models.test_encoder import CLASSES, texts, tiny
from workflows.errors import UserError


@pytest.mark.parametrize(("family", "head"), [*((name, "ForMaskedLM") for name in CLASSES), ("bert", "ForPreTraining")])
def test_logits_are_transformers(family, head, tmp_path):
    theirs = tiny(family, tmp_path, head)
    model = load_masked_language_model(tmp_path).eval()
    ids, lengths = texts(model.encoder.config.pad_id)
    real = torch.arange(12) < lengths[:, None]
    targets = torch.where((ids % 3 == 0) & real, ids, IGNORED)
    with torch.no_grad():
        more = {"next_sentence_label": torch.tensor([0, 1, 0])} if head == "ForPreTraining" else {}
        expected = theirs(ids, attention_mask=real.long(), labels=targets, **more)
        follows = torch.tensor([True, False, True]) if more else None
        loss, told = model.loss(ids, targets, lengths, follows=follows)
        logits = model(ids, lengths)
    theirs_logits = expected.prediction_logits if more else expected.logits
    torch.testing.assert_close(logits[real], theirs_logits[real], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    assert ("next_sentence_loss" in told) == bool(more)


def test_masks_are_drawn_berts_way():
    ids = torch.randint(10, 1000, (200, 500), generator=torch.Generator().manual_seed(0))
    maskable = torch.ones_like(ids, dtype=torch.bool)
    maskable[:, ::5] = False
    hidden, targets = mask_tokens(ids, maskable, 3, 1000, torch.Generator().manual_seed(1))
    asked = targets != IGNORED
    assert not asked[~maskable].any() and torch.equal(targets[asked], ids[asked])
    assert torch.equal(hidden[~asked], ids[~asked])
    assert float(asked[maskable].float().mean()) == pytest.approx(0.15, abs=0.005)
    masked, same = (hidden == 3)[asked].float().mean(), (hidden == ids)[asked].float().mean()
    assert float(masked) == pytest.approx(0.8, abs=0.01) and float(same) == pytest.approx(0.1, abs=0.01)
    again, _ = mask_tokens(ids, maskable, 3, 1000, torch.Generator().manual_seed(2))
    assert not torch.equal(hidden, again)  # drawn anew each time


def test_the_loss_is_the_mean_over_hidden_tokens_and_gradients_reach_the_embeddings():
    torch.manual_seed(0)
    model = MaskedLanguageModel(Encoder(distilbert(60, width=16, n_layer=1, n_head=2, inner_width=16))).eval()
    ids, lengths = texts()
    targets = torch.full_like(ids, IGNORED)
    targets[0, 2], targets[1, 4] = 7, 9
    loss, told = model.loss(ids, targets, lengths)
    expected = F.cross_entropy(model(ids, lengths).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.encoder.tokens.weight.grad.abs().sum() > 0 and 0 <= float(told["masked_accuracy"]) <= 1
    nothing, _ = model.loss(ids, torch.full_like(ids, IGNORED), lengths)
    assert float(nothing) == 0


def test_what_has_no_head_is_refused(tmp_path):
    tiny("bert", tmp_path)
    with pytest.raises(UserError, match="no head that fills masks"):
        load_masked_language_model(tmp_path)
    with pytest.raises(UserError, match="no pooler"):
        MaskedLanguageModel(Encoder(bert(60, width=16, n_layer=1, n_head=2, inner_width=16, pooler=False)), True)
