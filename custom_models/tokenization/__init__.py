"""From text to ids and back: words, sentences, characters, and byte-pair encoding."""
