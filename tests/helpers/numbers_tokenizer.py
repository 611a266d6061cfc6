"""A tokenizer whose tokens are numbers with spaces between, so that every token of a text tells its place."""

import functools

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MOST = 5000
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
"""a chat template for tokenizers that have none"""


@functools.cache
def numbers_tokenizer() -> PreTrainedTokenizerFast:
    """The number n, from 0 to 4999, is the token n; what is none is the token 5000."""
    vocabulary = {str(number): number for number in range(MOST)} | {"<unk>": MOST}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def counted(first: int, length: int) -> str:
    """A document of so many consecutive numbers."""
    return " ".join(map(str, range(first, first + length)))
