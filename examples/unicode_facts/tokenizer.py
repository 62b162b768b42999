"""The demo's tokenizer: byte-level BPE trained on the names, with the hex digits of a code point kept single.

Single digits make the model compose an address from four or five tokens. Pairs of digits would be easier to look up
and would hide what the memory is for; a token per code point would be a lookup table of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data import PHRASINGS, Fact

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

# Onigmo has no variable-length look-behind: one alternative per number of digits already passed.
_HEX_DIGIT = "|".join(rf"(?<=U\+{f'[0-9A-F]{{{passed}}}' if passed else ''})[0-9A-F]" for passed in range(6))
_WORD = r" ?U\+|[0-9]| ?[A-Za-z]+|[^A-Za-z0-9]"
_PROMPT_COPIES = 200  # enough that every word of a phrasing becomes one token


def train_tokenizer(facts: Sequence[Fact], vocabulary: int) -> Tokenizer:
    """A tokenizer of at most `vocabulary` tokens. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_HEX_DIGIT), "isolated"),
        pre_tokenizers.Split(Regex(_WORD), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prompts = [phrasing % 0x2603 for phrasing in PHRASINGS for _ in range(_PROMPT_COPIES)]
    tokenizer.train_from_iterator([fact.name for fact in facts] + prompts, trainer)
    return tokenizer
