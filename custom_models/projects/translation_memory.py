"""A translation memory: the known translation of the text that is most alike.

It is what translators had before there were models, and hard to beat where texts repeat themselves. A model may read
what it finds beside the text that is to be translated, and learns what to keep of it and what to change: Bulté and
Tezcan 2019, "Neural Fuzzy Repair", ACL 2019, section 3.
"""

from collections.abc import Sequence
from typing import Any

from custom_models.projects.translation_text import Marked, mark, mark_as, unmark

_CHUNK = 256
"""Texts that are looked up at once: a hundred thousand pairs take 200 MB then."""


class Memory:
    """Pairs of a source and its target, to be found by what is alike in pieces of two to five letters.

    Args:
        pairs: The pairs.
        placeholders: Whether placeholders are marks, so that those of a text can take the places of those that a found
            target has.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], placeholders: bool) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.pairs, self.placeholders = list(pairs), placeholders
        sources = [self._marked(source) for source, _ in self.pairs]
        self.targets = [mark_as(target, source.values) for (_, target), source in zip(pairs, sources, strict=True)]
        self._vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5))
        self._vectors = self._vectorizer.fit_transform([source.text for source in sources])  # (pairs, pieces), sparse

    def _marked(self, text: str) -> Marked:
        return mark(text) if self.placeholders else Marked(text, [])

    def likest(self, texts: Sequence[str]) -> list[str]:
        """For each text the target, with marks, of the source that is most alike."""
        vectors = self._vectorizer.transform([self._marked(text).text for text in texts])  # (texts, pieces), sparse
        return self._nearest(vectors, [[]] * len(texts))

    def likest_others(self, groups: Sequence[int]) -> list[str]:
        """For each pair's source the same, among the pairs of other groups.

        So a pair is to its memory what a pair of another split is, if groups are what splits did not tear apart.

        Args:
            groups: A number for each pair.
        """
        places: dict[int, list[int]] = {}
        for place, group in enumerate(groups):
            places.setdefault(group, []).append(place)
        return self._nearest(self._vectors, [places[group] for group in groups])

    def _nearest(self, vectors: Any, forbidden: Sequence[list[int]]) -> list[str]:
        """Targets of the sources with the highest cosines, those left out that are forbidden to each text."""
        found = []
        for begin in range(0, vectors.shape[0], _CHUNK):
            alike = (vectors[begin : begin + _CHUNK] @ self._vectors.T).toarray()  # (chunk, pairs)
            for row, left_out in zip(alike, forbidden[begin : begin + _CHUNK], strict=True):
                row[left_out] = -1.0
            found += [self.targets[i] for i in alike.argmax(axis=1)]
        return found

    def translate(self, texts: Sequence[str]) -> list[str]:
        """The targets found for texts, with the texts' placeholders."""
        return [
            unmark(target, self._marked(text).values) for text, target in zip(texts, self.likest(texts), strict=True)
        ]
