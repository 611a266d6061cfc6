"""A tokenizer that puts special tokens before every text."""

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny_models import tiny_tokenizer


def begun_tokenizer(single: str = "<s> $A") -> PreTrainedTokenizerFast:
    """The tiny tokenizer, which writes a text as the template says: with BOS before it where nothing else is given."""
    tokenizer = tiny_tokenizer()
    special = [(token, int(tokenizer.convert_tokens_to_ids(token))) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single, "$A $B", special)
    return tokenizer
