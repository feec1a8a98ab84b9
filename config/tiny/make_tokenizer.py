"""Rebuild tokenizer.json from the demo's training rows: python config/tiny/make_tokenizer.py"""

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from dpo.data.film_reviews import make_rows  # noqa: E402 (found only once the repository is on the path)

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
# The whole byte alphabet, though the demo needs little of it, so that any UTF-8 text can be encoded.
trainer = trainers.BpeTrainer(
    vocab_size=960,
    special_tokens=["<|endoftext|>"],
    show_progress=False,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
)
tokenizer.train_from_iterator(
    (row[key] for row in make_rows("train") for key in ("prompt", "chosen", "rejected")), trainer
)
tokenizer.save(str(HERE / "tokenizer.json"))
