"""Origins: where each run of a comparison gets the dense model that it prunes."""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.errors import InputError
from optprune.models import LoadedModel, load_config, load_model, load_tokenizer, need_tokenizer, open_model
from optprune.models.load import Described


class Origin(ABC):
    """A dense model that can be had again and again."""

    source: str
    """the name that the user calls it by"""

    @abstractmethod
    def fresh(self, scratch: Path | None, *, whole: bool = False) -> LoadedModel:
        """The dense model, for one run; what does not stay goes into `scratch`. With `whole`, all of it in memory."""

    @abstractmethod
    def dense(self, scratch: Path | None, *, whole: bool = False) -> LoadedModel:
        """The dense model, to be left as it is."""

    @abstractmethod
    def config(self) -> PretrainedConfig:
        """Its config."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer; InputError where it has none."""


@dataclass(frozen=True)
class FromFiles(Origin):
    """A model that is read from its files, a block at a time."""

    source: str
    dtype: str
    device: str
    architecture: Described | None = None
    """what an architecture that is not known is read by"""

    def fresh(self, scratch: Path | None, *, whole: bool = False) -> LoadedModel:
        if whole:
            return load_model(self.source, dtype=self.dtype, device=self.device, architecture=self.architecture)
        return open_model(
            self.source, dtype=self.dtype, device=self.device, scratch=scratch, architecture=self.architecture
        )

    def dense(self, scratch: Path | None, *, whole: bool = False) -> LoadedModel:
        return self.fresh(scratch, whole=whole)

    def config(self) -> PretrainedConfig:
        return load_config(self.source, self.architecture)

    def tokenizer(self) -> Tokenizer:
        return need_tokenizer(load_tokenizer(self.source), self.source)


@dataclass(frozen=True, eq=False)
class InMemory(Origin):
    """A model that is in memory, of which each run gets a copy."""

    loaded: LoadedModel

    def __post_init__(self) -> None:
        if self.loaded.store is not None:
            raise InputError(f"the blocks of {self.loaded.source} are in its files: name the model instead")

    @property
    def source(self) -> str:  # type: ignore[override]
        return self.loaded.source

    def fresh(self, scratch: Path | None, *, whole: bool = False) -> LoadedModel:
        return LoadedModel(copy.deepcopy(self.loaded.model), self.loaded.tokenizer, self.loaded.source)

    def dense(self, scratch: Path | None, *, whole: bool = False) -> LoadedModel:
        return self.loaded

    def config(self) -> PretrainedConfig:
        return self.loaded.model.config

    def tokenizer(self) -> Tokenizer:
        return need_tokenizer(self.loaded.tokenizer, self.loaded.source)


def origin_of(
    model: str | Path | LoadedModel, dtype: str, device: str, architecture: Described | None = None
) -> Origin:
    """The origin of a model that is named, or is in memory and stays as it is."""
    return InMemory(model) if isinstance(model, LoadedModel) else FromFiles(str(model), dtype, device, architecture)
