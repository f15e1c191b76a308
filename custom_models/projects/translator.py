"""A trained translator: texts in, beam search, texts out; how it is saved, and asked by `make translate-text`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch

from custom_models.beam_search import beam_search
from custom_models.configuration import configured
from custom_models.encoder_checkpoint import tokenizer_of
from custom_models.encoder_decoder import EncoderDecoder
from custom_models.encoder_decoder_checkpoint import read_own, save_encoder_decoder
from custom_models.projects.fitting import device_of
from custom_models.projects.seq2seq import batch_of
from custom_models.projects.translation_memory import Memory
from custom_models.projects.translation_text import Codec
from custom_models.span_corruption import Pair
from custom_models.weights import fill
from workflows.errors import UserError
from workflows.files import read_text


@dataclass
class BeamArgs:
    """How translations are searched for."""

    n_beam: int = 4
    """Beginnings that are kept."""
    length_penalty: float = 1.0
    """Above 0 favours long translations."""

    def problems(self) -> list[str]:
        """Everything that is wrong with them, as messages."""
        return [] if self.n_beam >= 1 else [f"--beam.n_beam must be at least 1, not {self.n_beam}."]


@dataclass(frozen=True)
class Reading:
    """What a checkpoint says of a translator's texts; as for `Codec`.

    Raises:
        UserError: If no text is short enough to be read.
    """

    placeholders: bool
    longest: int
    multiline: bool

    def __post_init__(self) -> None:
        if self.longest < 4:
            raise UserError(f"longest must be at least 4, not {self.longest}. Train it again.")


class Written(NamedTuple):
    """Translations.

    Attributes:
        texts: In the order of their sources.
        cut: Sources that were too long and were not read to their end.
        unfinished: Translations that reached the limit of tokens.
        limit: The most tokens that one of those could have; 0 if there is none.
    """

    texts: list[str]
    cut: int
    unfinished: int
    limit: int


class Translator:
    """A trained encoder-decoder with its codec.

    Args:
        model: The encoder-decoder.
        codec: Its texts.
        beam: How it searches.
        memory: What it reads beside each text, if anything.
    """

    def __init__(self, model: EncoderDecoder, codec: Codec, beam: BeamArgs, memory: Memory | None = None) -> None:
        self.model, self.codec, self.beam, self.memory = model.eval(), codec, beam, memory

    def save(self, folder: Path, data: str) -> None:
        """Write a checkpoint, whole or not at all; `data` is the name of what it learned from."""
        reading = Reading(self.codec.placeholders, self.codec.longest, self.codec.multiline)
        how = {**asdict(reading), "beam": asdict(self.beam),
               "memory": self.memory.pairs if self.memory else None}  # fmt: skip
        save_encoder_decoder(self.model, self.model.config, self.codec.tokenizer, folder, translator=how, data=data)

    @classmethod
    def load(cls, folder: Path) -> "Translator":
        """Read what `save` wrote.

        Raises:
            UserError: If it is no translator of ours, or damaged.
        """
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} holds no translator. Train one with `make translate`, or name its folder.")
        config, shape, weights = read_own(folder)
        how = config.get("translator")
        if not isinstance(how, dict):
            raise UserError(f"{folder} is no translator. Train one with `make translate`.")
        try:
            place = f"{folder}/config.json"
            reading = configured(Reading, {field.name: how[field.name] for field in fields(Reading)}, place)
            codec = Codec(tokenizer_of(folder), **asdict(reading))
            beam = configured(BeamArgs, how["beam"], place)
            pairs = how["memory"] and [(str(source), str(target)) for source, target in how["memory"]]
            memory = Memory(pairs, codec.placeholders) if pairs else None
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"{folder} is damaged ({type(e).__name__}: {e}). Train it again.") from None
        if problems := beam.problems():
            raise UserError(f"{place}: {' '.join(problems)} Train it again.")
        model = EncoderDecoder(shape)
        fill(model, weights, str(folder))
        return cls(model, codec, beam, memory)

    @torch.no_grad()
    def translate(self, texts: Sequence[str], batch_size: int = 32) -> Written:
        """Translate texts.

        Raises:
            UserError: If one is empty.
        """
        found_for = self.memory.likest(texts) if self.memory else [None] * len(texts)
        read = [self.codec.source(text, found) for text, found in zip(texts, found_for, strict=True)]
        order = sorted(range(len(texts)), key=lambda i: len(read[i][0]))
        translated, unfinished, limit = [""] * len(texts), 0, 0
        for begin in range(0, len(order), batch_size):
            places = order[begin : begin + batch_size]
            sources = [read[i][0] for i in places]
            batch = batch_of([Pair(ids, ids) for ids in sources], self.codec.pad_id).to(device_of(self.model))
            writer = self.model.writer(batch.source, batch.lengths)
            most = min(self.codec.longest, 2 * batch.source.shape[1] + 20)
            written = beam_search(
                writer,
                writer.prompts,
                most,
                n_beam=self.beam.n_beam,
                length_penalty=self.beam.length_penalty,
                stop_ids=[self.codec.end_id],
                allowed=self.codec.allowed([read[i][1] for i in places]) if self.codec.placeholders else None,
            )
            for i, ids in zip(places, written.ids, strict=True):
                translated[i] = self.codec.text(ids, read[i][1])
                if ids[-1] != self.codec.end_id:
                    unfinished, limit = unfinished + 1, max(limit, most)
        return Written(translated, sum(cut for _, _, cut in read), unfinished, limit)


def translate(checkpoint_dir: Path, text: str = "", file: Path | None = None) -> None:
    """Translate a text, line by line, or whole if the translator learned from texts of several lines, as programs are.

    Args:
        checkpoint_dir: A translator's folder, such as out/translate/catalogues_fr/final.
        text: What to translate.
        file: A file with it.

    Raises:
        UserError: If the folder holds no translator, the text is empty, or the file cannot be read.
    """
    text = text if file is None else read_text(file).rstrip("\n")
    translator = Translator.load(checkpoint_dir)
    lines = [text] if translator.codec.multiline or not text.strip() else text.split("\n")
    written = translator.translate([line for line in lines if line.strip()] or lines)
    translated = iter(written.texts)
    print("\n".join(next(translated) if line.strip() else "" for line in lines))
    if written.cut:
        print(f"{_of(written.cut, lines)}only the first {translator.codec.longest} tokens were read")
    if written.unfinished:
        print(f"{_of(written.unfinished, lines)}the translation was broken off after {written.limit} tokens")


def _of(n: int, lines: Sequence[str]) -> str:
    """Of how many lines something is said; of a text that is one it need not be."""
    return "" if len(lines) == 1 else f"{n} of {len(lines)} lines: "
