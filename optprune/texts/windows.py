"""Windows: a text tokenised once, and cut into windows for calibration or evaluation."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from optprune.errors import InputError
from optprune.system.wording import counted
from optprune.texts.conversations import Conversation, conversation_pieces
from optprune.texts.documents import Document
from optprune.texts.pieces import NoCut, token_pieces

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from torch import IntTensor, LongTensor, Tensor
    from transformers import PretrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer


def tokenise(tokenizer: "Tokenizer", documents: Iterable[Document], most: int | None = None) -> "IntTensor":
    """The token ids [tokens] of the documents joined by blank lines and tokenised once, as the papers do.

    Conversations follow each other as the chat template of the tokenizer writes them, with nothing between; InputError
    where it has none, or where there are texts as well. `most` is how many are needed: there are as many or a few more,
    or all. A piece of the text is tokenised at a time where that is seen to give the same tokens, so that ids take four
    bytes each.
    """
    import torch

    documents = documents if isinstance(documents, Sequence) else list(documents)
    texts = [document for document in documents if isinstance(document, str)]
    chats = [document for document in documents if isinstance(document, Conversation)]
    if texts and chats:
        raise InputError("texts and conversations cannot be joined: tokenise them as two texts")
    pieces, held = list[torch.Tensor](), 0
    try:
        for ids in conversation_pieces(tokenizer, chats) if chats else token_pieces(tokenizer, texts):
            pieces.append(torch.tensor(ids, dtype=torch.int32))
            held += len(ids)
            if most is not None and held >= most:
                break
    except NoCut:
        whole = tokenizer("\n\n".join(texts), verbose=False)["input_ids"]
        pieces = [torch.tensor(whole, dtype=torch.int32)]
    return torch.cat(pieces)  # type: ignore[return-value]  # IntTensor is only a name


def evaluation_windows(tokens: "Tensor", seq_length: int, windows: int | None = None) -> "LongTensor":
    """The first `windows` (None: all) consecutive windows [n, seq_length]; what is left at the end is dropped.

    InputError when fewer fit than were asked for, or none.
    """
    at_least("--seq-length", seq_length, 2)
    if windows is not None:
        at_least("--windows", windows, 1)
    fitting = len(tokens) // seq_length
    wanted = fitting if windows is None else windows
    if fitting < max(wanted, 1):
        raise InputError(_too_short("evaluation text", len(tokens), fitting, max(wanted, 1), seq_length, "--windows"))
    return tokens[: wanted * seq_length].view(wanted, seq_length).long()  # type: ignore[return-value]


def calibration_batches(
    tokens: "Tensor", samples: int, seq_length: int, seed: int, tokens_per_batch: int = 2048
) -> "list[LongTensor]":
    """`samples` distinct windows that do not overlap, drawn by the seed, in batches of about `tokens_per_batch`.

    InputError when the tokens are too few for so many windows.
    """
    return batched(drawn_windows(tokens, samples, seq_length, seed), tokens_per_batch)


def drawn_windows(
    tokens: "Tensor", samples: int, seq_length: int, seed: int, what: str = "calibration text"
) -> "LongTensor":
    """The windows [samples, seq_length] of `calibration_batches`, of which fewer are the first of more.

    InputError, which calls the text `what`, when its tokens are too few.
    """
    import torch

    at_least("--samples", samples, 1)
    at_least("--seq-length", seq_length, 2)
    fitting = len(tokens) // seq_length
    if fitting < samples:
        raise InputError(_too_short(what, len(tokens), fitting, samples, seq_length, "--samples"))
    generator = torch.Generator().manual_seed(seed)
    # Where the first window begins is drawn too, so that the tokens beyond the last whole window have their chance.
    start = int(torch.randint(len(tokens) - fitting * seq_length + 1, (), generator=generator))
    windows = tokens[start : start + fitting * seq_length].view(fitting, seq_length)
    return windows[torch.randperm(fitting, generator=generator)[:samples]].long()  # type: ignore[return-value]


def batched(windows: "LongTensor", tokens_per_batch: int = 2048) -> "list[LongTensor]":
    """Windows [n, length] in batches of about so many tokens, in their order."""
    return list(windows.split(max(1, tokens_per_batch // windows.shape[1])))  # type: ignore[arg-type]


def check_seq_length(config: "PretrainedConfig", seq_length: int) -> None:
    """Raise InputError when windows are longer than the positions a model knows."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and seq_length > limit:
        raise InputError(
            f"windows of {seq_length} tokens are longer than the {limit} positions of the model: "
            f"pass --seq-length {limit} or less"
        )


def check_vocabulary(config: "PretrainedConfig", tokens: "Tensor") -> None:
    """Raise InputError when the tokenizer gave ids for which the model has no embedding."""
    largest = int(tokens.max()) if len(tokens) else 0
    if largest >= config.vocab_size:
        raise InputError(
            f"the tokenizer gives token {largest}, but the model has only {config.vocab_size} embeddings: "
            "the tokenizer belongs to another model"
        )


def _too_short(what: str, tokens: int, fitting: int, wanted: int, seq_length: int, option: str) -> str:
    return (
        f"the {what} has {counted(tokens, 'token')}, room for {counted(fitting, 'window')} of {seq_length}, fewer than "
        f"the {wanted} needed: lower {option if fitting else '--seq-length'}, or give a longer text"
    )


def at_least(option: str, value: int, least: int) -> None:
    """Raise InputError when the value of an option is too small."""
    if value < least:
        raise InputError(f"{option} cannot be {value}: it is at least {least}")
