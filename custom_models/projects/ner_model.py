"""A T5 that names the entities of a sentence: its decoder writes their list, its encoder tags each word, or both.

The encoder learns to tag in all three, as its first word piece says; where the decoder writes, that is an auxiliary
task which tells the encoder, word by word, what the decoder will have to know of it. A list has a probability by either
half: by its tokens as the decoder writes them, and by its words' tags. `by_both` takes the likeliest by the two.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from custom_models.beam_search import beam_search
from custom_models.configuration import configured
from custom_models.encoder_checkpoint import tokenizer_of
from custom_models.encoder_decoder import EncoderDecoder
from custom_models.encoder_decoder_checkpoint import load_encoder_decoder, read_own, save_encoder_decoder
from custom_models.masked_language_model import IGNORED
from custom_models.projects.entity_text import Grammar, entities_in, list_of
from custom_models.projects.fitting import FitArgs, device_of, no_shares, too_small
from custom_models.projects.seq2seq import PairBatch, padded, text_loss
from custom_models.weights import fill
from data_prep.iob import OUTSIDE, Entity, entities_of, tags_of
from workflows.errors import UserError, report_all
from workflows.files import read_json

Head = Literal["text", "tokens", "both"]
"""What a model answers by: the decoder's lists, the encoder's tags, or the two together."""


@dataclass(frozen=True)
class Asking:
    """How a model is asked for entities; its checkpoint says so, for it is to be asked as it was scored.

    Attributes:
        head: "text": the decoder writes a list; "tokens": the encoder tags each word; "both": the two together.
        constrained: Whether the decoder can write nothing but a list of the sentence's own words.
        n_beam: Beams; 1 is greedy search.
        tag_share: How much the encoder counts with the head "both".
        longest: The longest sentence in tokens; words beyond it are not read.

    Raises:
        UserError: If a number is out of its range.
    """

    head: Head = "text"
    constrained: bool = True
    n_beam: int = 4
    tag_share: float = 0.75
    longest: int = 256

    def __post_init__(self) -> None:
        found = too_small(n_beam=(self.n_beam, 1), longest=(self.longest, 3))
        report_all(found + no_shares(tag_share=self.tag_share))


class Sentence(NamedTuple):
    """A sentence for the model.

    Attributes:
        words: As the model reads them; what is beyond its limit is missing.
        source: Their ids, and the end.
        firsts: Where each word begins in `source`.
        target: Ids of its list of entities, and the end.
        tags: The class of each word.
    """

    words: list[str]
    source: list[int]
    firsts: list[int]
    target: list[int]
    tags: list[int]


class Codec:
    """Sentences and lists of entities as token ids, and back.

    Args:
        tokenizer: Whose ids; words are encoded one by one, so that a word is the same in the sentence and in the list.
        types: The types of entities.
        end_id: What ends a sentence and a list.

    Raises:
        UserError: If types differ in case only: a list, which is read without it, could not tell them apart.
    """

    def __init__(self, tokenizer: Tokenizer, types: Sequence[str], end_id: int) -> None:
        named: dict[str, str] = {}
        for kind in types:
            if (other := named.setdefault(kind.casefold(), kind)) != kind:
                raise UserError(f"The types {other} and {kind} differ in case only. Give one of them another name.")
        tokenizer.encode_special_tokens = True  # a word such as <pad> is a word
        unknown = tokenizer.token_to_id("<unk>")
        # T5's own tokenizer finds </s> among its pieces even so; to it such a word is one that it does not know
        special = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
        self._instead = dict.fromkeys(special, unknown) if unknown is not None else {}
        self.tokenizer, self.types, self.end_id = tokenizer, list(types), end_id
        self.labels = [OUTSIDE, *(f"{prefix}-{kind}" for kind in self.types for prefix in "BI")]
        self.ids_of = lru_cache(maxsize=None)(self._ids_of)
        self.seen = lru_cache(maxsize=None)(lambda word: self.text(self.ids_of(word)).casefold())

    def plain(self, word: str) -> str:
        """A word as it is encoded: one even where a tokenizer such as T5's makes two of it ("¨": space, accent)."""
        normalizer = self.tokenizer.normalizer
        return word if normalizer is None else "".join(normalizer.normalize_str(word).split())

    def _ids_of(self, word: str) -> list[int]:
        ids = self.tokenizer.encode(self.plain(word), add_special_tokens=False).ids
        return [self._instead.get(i, i) for i in ids]

    def text(self, ids: Sequence[int]) -> str:
        """What ids stand for, the end left out."""
        return self.tokenizer.decode([i for i in ids if i != self.end_id], skip_special_tokens=False).strip()

    def encode(
        self,
        words: Sequence[str],
        tags: Sequence[str],
        longest: int,
        ids_of: Callable[[str], list[int]] | None = None,
    ) -> Sentence:
        """A sentence with its entities; words that begin beyond `longest` tokens, and their entities, are missing.

        Args:
            words: The sentence.
            tags: Of each word.
            longest: The most tokens, the end included.
            ids_of: A word's ids, if not the vocabulary's own.
        """
        source: list[int] = []
        firsts: list[int] = []
        ids_of = ids_of or self.ids_of
        for word in words:
            ids = ids_of(word)
            if len(source) + len(ids) >= longest:
                break
            firsts.append(len(source))
            source += ids
        read, kept = list(words[: len(firsts)]), list(tags[: len(firsts)])
        target = self.target(read, entities_of(kept), ids_of)
        classes = [self.labels.index(tag) for tag in kept]
        return Sentence(read, [*source, self.end_id], firsts, target, classes)

    def target(
        self, words: Sequence[str], entities: Sequence[Entity], ids_of: Callable[[str], list[int]] | None = None
    ) -> list[int]:
        """The list of a sentence's entities, and the end; arguments as for `encode`."""
        return [
            *(i for word in list_of(words, entities, self.seen) for i in (ids_of or self.ids_of)(word)),
            self.end_id,
        ]

    def grammar(self, words: Sequence[str]) -> Grammar:
        """What the decoder may write about a sentence."""
        return Grammar(words, self.types, self.ids_of, self.end_id, self.seen)

    def entities(self, ids: Sequence[int], words: Sequence[str]) -> tuple[list[Entity], int]:
        """The entities that a written list names, and how many of its entries are malformed."""
        return entities_in(self.text(ids), words, self.types, self.seen)


def batch_of(sentences: Sequence[Sentence], pad_id: int) -> PairBatch:
    """Sentences, lists and tags as one batch."""
    source = padded([sentence.source for sentence in sentences], pad_id)  # (B, Ts)
    tags = torch.full_like(source, IGNORED)  # (B, Ts)
    for row, sentence in zip(tags, sentences, strict=True):
        row[sentence.firsts] = torch.tensor(sentence.tags, dtype=torch.long)  # no words, no tags
    lengths = torch.tensor([len(sentence.source) for sentence in sentences])  # (B,)
    return PairBatch(source, lengths, padded([sentence.target for sentence in sentences], pad_id), tags)


class Written(NamedTuple):
    """What was found in sentences.

    Attributes:
        entities: Of each sentence.
        malformed: Entries of written lists that name no entity of the sentence.
        unfinished: Lists that reached the limit of tokens.
        lists: Token ids of the lists that the beams kept for each sentence, the best first; none without a decoder.
    """

    entities: list[list[Entity]]
    malformed: int
    unfinished: int
    lists: Sequence[list[list[int]]] = ()


class EntityModel(nn.Module):
    """A T5 with a second head, which names the class of each word.

    Args:
        t5: The encoder-decoder.
        types: The types of entities.
    """

    def __init__(self, t5: EncoderDecoder, types: Sequence[str]) -> None:
        super().__init__()
        self.t5, self.types = t5, list(types)
        self.tag_head = nn.Linear(t5.config.width, 1 + 2 * len(self.types))

    def tag_logits(self, context: Tensor) -> Tensor:
        """The encoder's output, (B, Ts, width) -> logits of each token's class, (B, Ts, n_label)."""
        return self.tag_head(context)  # (B, Ts, n_label)

    def save(self, tokenizer: Tokenizer, folder: Path, asking: Asking, data: str) -> None:
        """Write a checkpoint, whole or not at all.

        Args:
            tokenizer: Whose ids it reads.
            folder: Where.
            asking: How it is asked.
            data: The name of what it learned from.
        """
        more = {"entity_types": self.types, **asdict(asking), "data": data}
        save_encoder_decoder(self, self.t5.config, tokenizer, folder, **more)

    @torch.no_grad()
    def by_tags(self, sentences: Sequence[Sentence], batch_size: int = 64) -> Written:
        """The entities by the encoder's tags."""
        found = {i: self.tagged(logprobs) for i, logprobs, _ in self.read(sentences, batch_size)}
        return Written([found[i] for i in range(len(sentences))], 0, 0)

    @torch.no_grad()
    def read(self, sentences: Sequence[Sentence], batch_size: int = 64) -> Iterator[tuple[int, Tensor, Tensor]]:
        """What the encoder makes of sentences.

        Yields:
            In the order of their lengths each one's number, the log-probabilities of its words' classes,
            (n_word, n_label), on the CPU, and the encoder's output, (1, T, width), where the model is.
        """
        self.eval()
        for numbers in _by_length(sentences, batch_size):
            chosen = [sentences[i] for i in numbers]
            batch = batch_of(chosen, self.t5.config.pad_id).to(device_of(self))
            context = self.t5.encode(batch.source, batch.lengths)  # (B, Ts, width)
            logprobs = self.tag_logits(context).log_softmax(dim=-1).cpu()  # (B, Ts, n_label)
            for i, sentence, row, vectors in zip(numbers, chosen, logprobs, context, strict=True):
                yield i, row[sentence.firsts], vectors[None, : len(sentence.source)]

    def tagged(self, logprobs: Tensor) -> list[Entity]:
        """The entities of (n_word, n_label): for each word the likeliest tag that may follow the one before it."""
        labels = [OUTSIDE, *(f"{prefix}-{kind}" for kind in self.types for prefix in "BI")]
        # An I-TYPE follows B-TYPE or I-TYPE, which stand before it and at its own place in the list.
        may = [[after % 2 == 1 or after == 0 or before in (after - 1, after) for after in range(len(labels))]
               for before in range(len(labels))]  # fmt: skip
        follows = torch.tensor(may)  # (n_label, n_label)
        before, tags = 0, []
        for scores in logprobs:  # (n_label,)
            before = int(scores.masked_fill(~follows[before], -torch.inf).argmax())
            tags.append(labels[before])
        return entities_of(tags)


@torch.no_grad()
def by_text(
    model: EncoderDecoder,
    codec: Codec,
    sentences: Sequence[Sentence],
    constrained: bool = True,
    n_beam: int = 4,
    length_penalty: float = 1.0,
    max_new_tokens: int = 160,
    batch_size: int = 64,
) -> Written:
    """The entities by the lists that a model writes.

    Args:
        model: In evaluation mode.
        codec: Its ids.
        sentences: What is read.
        constrained: Whether it can write nothing but a list of the sentence's own words.
        n_beam: Beams; 1 is greedy search.
        length_penalty: Above 0 favours long lists.
        max_new_tokens: The longest list, in tokens.
        batch_size: Sentences at a time.
    """
    lists: dict[int, list[list[int]]] = {}
    for numbers in _by_length(sentences, batch_size):
        chosen = [sentences[i] for i in numbers]
        batch = batch_of(chosen, model.config.pad_id).to(device_of(model))
        writer = model.writer(batch.source, batch.lengths)
        grammars = [codec.grammar(sentence.words) for sentence in chosen] if constrained else []
        written = beam_search(
            writer,
            writer.prompts,
            max_new_tokens,
            n_beam=n_beam,
            length_penalty=length_penalty,
            stop_ids=[codec.end_id],
            allowed=partial(_allowed, grammars) if constrained else None,
        )
        lists.update(zip(numbers, written.answers, strict=True))
    kept = [lists[i] for i in range(len(sentences))]
    named = [codec.entities(best, sentence.words) for sentence, (best, *_) in zip(sentences, kept, strict=True)]
    unfinished = sum(best[-1] != codec.end_id for best, *_ in kept)
    return Written([entities for entities, _ in named], sum(malformed for _, malformed in named), unfinished, kept)


@torch.no_grad()
def by_both(
    model: EntityModel, codec: Codec, sentences: Sequence[Sentence], written: Written, tag_share: float = 0.75
) -> Written:
    """The entities by the lists that decoder and encoder together find likeliest.

    Candidates are what the beams keep, and the list of the encoder's own tags. A list's score is
    (1 - tag_share) * log p(its tokens by the decoder) + tag_share * log p(its words' tags by the encoder).

    Args:
        model: Both of its heads are trained.
        codec: Its ids.
        sentences: What is read.
        written: What `by_text` has made of them.
        tag_share: How much the encoder counts.
    """
    t5 = model.t5.eval()
    found: dict[int, list[Entity]] = {}
    for i, tag_logprobs, context in model.read(sentences):  # (n_word, n_label), (1, T, width)
        words = sentences[i].words
        candidates = [codec.entities(ids, words)[0] for ids in written.lists[i]]
        candidates += [] if (tagged := model.tagged(tag_logprobs)) in candidates else [tagged]
        targets = padded([codec.target(words, each) for each in candidates], t5.config.pad_id)  # (N, T)
        targets = targets.to(context.device)
        logits = t5.decode(t5.shift(targets), context.expand(len(targets), -1, -1))  # (N, T, vocab_size)
        of_tokens = -F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=t5.config.pad_id,
                                     reduction="none").sum(dim=1).cpu()  # (N,)  # fmt: skip
        tags = [[codec.labels.index(tag) for tag in tags_of(each, len(words))] for each in candidates]
        of_tags = tag_logprobs.gather(1, torch.tensor(tags, dtype=torch.long).T).sum(dim=0)  # (N,)
        found[i] = candidates[int(((1 - tag_share) * of_tokens + tag_share * of_tags).argmax())]
    return written._replace(entities=[found[i] for i in range(len(sentences))])


def _allowed(grammars: Sequence[Grammar], text: int, ids: list[int]) -> list[int]:
    return grammars[text].allowed(ids)


def _by_length(sentences: Sequence[Sentence], batch_size: int) -> list[list[int]]:
    """Numbers of sentences in batches of similar length."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i].source))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def load_entity_model(folder: Path) -> tuple[EntityModel, Codec, Asking]:
    """Read a checkpoint that `make ner` left: ours, or a T5 of transformers'.

    Returns:
        The model in evaluation mode, its codec, and how it is asked.

    Raises:
        UserError: If it is none, or damaged.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model that names entities. Train one with `make ner`, or name its folder.")
    config = read_json(folder / "config.json")
    types = config.get("entity_types")
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise UserError(f"{folder} is a model that names no entities. Train one with `make ner`.")
    values = {field.name: config[field.name] for field in fields(Asking) if field.name in config}
    asking = configured(Asking, values, f"{folder}/config.json")
    if config.get("model_type") == "t5":
        t5, tokenizer = load_encoder_decoder(folder)
        model = EntityModel(t5, types)
    else:
        _, shape, weights = read_own(folder)
        model = EntityModel(EncoderDecoder(shape), types)
        fill(model, weights, str(folder))
        tokenizer = tokenizer_of(folder)
    return model.eval(), Codec(tokenizer, types, model.t5.config.end_id), asking


class EntityTask(L.LightningModule):
    """How it is trained: the list's tokens by cross-entropy, and each word's class.

    Args:
        model: The model.
        fit: Rate and schedule.
        total_steps: Optimizer steps in all.
        head: What it will answer by; with "tokens" it does not learn to write.
        tag_weight: Of the classes' loss beside the list's.
    """

    def __init__(self, model: EntityModel, fit: FitArgs, total_steps: int, head: Head, tag_weight: float) -> None:
        super().__init__()
        self.model, self.fit_args, self.total_steps = model, fit, total_steps
        self.head, self.tag_weight = head, tag_weight

    def losses(self, batch: PairBatch) -> tuple[Tensor, Tensor, int]:
        """The loss of a batch, how many tokens (words, with the head "tokens") are right, and how many there are."""
        t5 = self.model.t5
        context = t5.encode(batch.source, batch.lengths)  # (B, Ts, width)
        assert batch.tags is not None
        logits = self.model.tag_logits(context)  # (B, Ts, n_label)
        n_tagged = max(1, int((batch.tags != IGNORED).sum()))  # none, if the limit leaves no sentence a word
        tag_loss = F.cross_entropy(logits.flatten(0, 1), batch.tags.flatten(), ignore_index=IGNORED, reduction="sum")
        tag_loss = tag_loss / n_tagged
        if self.head == "tokens":
            right = (logits.argmax(dim=-1) == batch.tags).sum()
            return tag_loss, right, n_tagged
        loss, right, n = text_loss(t5, batch, context)
        return loss + self.tag_weight * tag_loss, right, n

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """The loss, logged."""
        loss, _, _ = self.losses(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.source))
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """The loss, and the share of tokens or words that are right."""
        loss, right, n = self.losses(batch)
        self.log("val_loss", loss, batch_size=n)
        self.log("val_accuracy", right / n, batch_size=n, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with the rate's schedule."""
        return self.fit_args.optimizer(self, self.total_steps)
