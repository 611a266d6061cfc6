"""Chat data: conversations, which the chat template of a tokenizer writes as text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optprune.errors import InputError, is_out_of_memory
from optprune.system.wording import one_line, shown

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase as Tokenizer

MESSAGES = "messages"
"""the column that chat data has in place of a text"""
EXAMPLE = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
TOGETHER = 32
"""how many conversations are with the tokenizer at a time"""


@dataclass(frozen=True)
class Conversation:
    """Messages in turn, each with a role and a content: one document of chat data."""

    messages: tuple[Mapping[str, Any], ...]
    where: str = "a conversation"
    """where it stands, for errors"""

    @classmethod
    def read(cls, value: Sequence[Any], where: str, column: str) -> "Conversation":
        """The conversation in a list of messages; InputError where one of them has no role, or no text as content."""
        messages = list[dict[str, Any]]()
        for number, message in enumerate(value, start=1):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InputError(
                    f"message {number} of the column {column!r} in {where} is {shown(message)}, which has no role and "
                    f"content: write {EXAMPLE}"
                )
            content = message.get("content")
            if content is not None and not isinstance(content, str):
                raise InputError(
                    f"the content of message {number} of the column {column!r} in {where} is {shown(content)}, which "
                    "is not a text: write its text alone"
                )
            # A table has a null for each key that only other messages have.
            messages.append({key: part for key, part in message.items() if part is not None or key == "content"})
        return cls(tuple(messages), where)

    @property
    def contents(self) -> tuple[str, ...]:
        """What its messages say."""
        return tuple(message["content"] for message in self.messages if message.get("content"))

    def __len__(self) -> int:
        """How many characters its messages have."""
        return sum(map(len, self.contents))

    def text(self, tokenizer: "Tokenizer") -> str:
        """The conversation as the chat template of a tokenizer writes it, with all special tokens.

        InputError where there is no template, or the template has no way to write these messages.
        """
        if tokenizer.chat_template is None:
            raise InputError(
                "the tokenizer has no chat template, by which chat data is written as text: put a chat_template.jinja "
                "into the model's folder, or give a text in place of messages"
            )
        try:
            text = tokenizer.apply_chat_template([dict(message) for message in self.messages], tokenize=False)
            str(text).encode()
        except Exception as error:  # a template is a program: what it raises is of many kinds
            if is_out_of_memory(error):
                raise
            reason = one_line(error) or type(error).__name__
            raise InputError(
                f"the chat template of the tokenizer cannot write {self.where} ({reason}): repair or remove it there"
            ) from error
        return str(text)


def conversation_pieces(tokenizer: "Tokenizer", conversations: Sequence[Conversation]) -> Iterator[list[int]]:
    """The token ids of one conversation after the other, a few of which are with the tokenizer at a time.

    Each is tokenised by itself, and the template brings its special tokens: the tokenizer adds none.
    """
    for first in range(0, len(conversations), TOGETHER):
        texts = [conversation.text(tokenizer) for conversation in conversations[first : first + TOGETHER]]
        yield from tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
