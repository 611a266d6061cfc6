"""Runtimes: the models that each of them loads, as data, so that a run is fitted to one before any weight is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PretrainedConfig

from optprune.allocation import Allocation
from optprune.allocation.uniform import Uniform
from optprune.errors import InputError, OptpruneError
from optprune.models import (
    ARCHITECTURES,
    BlockShape,
    Decoder,
    Mlp,
    is_stock,
    load_config,
    load_shapes,
)
from optprune.models.architecture import DENSE, rope_types
from optprune.models.uneven import Uneven, uneven
from optprune.recipe.groups import DepthSearch, GivenBlocks, GlobalBudget, UniformShares
from optprune.recipe.recipe import Recipe, allocator_of

NARROW_MLPS = "prune with --units mlp, as --recipe structured_uniform_best does"
LAYERS = "remove whole layers, --recipe depth --set allocation.parts=layers"
MLPS_ALONE = "remove MLPs alone, --set allocation.parts=mlp"
ALIKE = "let all blocks keep the same, --allocation uniform"
REMEDIES = {
    Uneven.PARTS: LAYERS,
    Uneven.PAIRS: NARROW_MLPS,
    Uneven.VALUES: NARROW_MLPS,
    Uneven.SIZES: ALIKE,
    Uneven.EXPERTS: "prune with --units experts or weights",
}
"""what to do instead, by the reason why a class with equal blocks cannot hold some shapes"""
FIXED = ("default", "linear", "llama3", "yarn")
"""the scalings of rotary embeddings whose angles do not go by the length of the text"""


RECURRENT = tuple(name for name, one in ARCHITECTURES.items() if one.recurrent is not None)
SHARING = tuple(name for name, one in ARCHITECTURES.items() if one.shared is not None)
"""families whose blocks hand keys and values on to others"""
LATENT = tuple(name for name, one in ARCHITECTURES.items() if one.latent is not None)
DELTA_NETS = tuple(
    name for name, one in ARCHITECTURES.items() if one.recurrent and one.recurrent.module == "linear_attn"
)
"""families with gated delta networks"""
NOT_TRIED = (*RECURRENT, *SHARING)
TRIED_IN_VLLM = (
    *("deepseek_v2", "deepseek_v3", "exaone4", "falcon_h1", "gemma2", "gemma3_text", "glm4_moe"),
    *("granitemoehybrid", "llama", "ministral3", "mistral", "mixtral", "nemotron_h", "olmo2", "opt"),
    *("phi3", "qwen2", "qwen3_moe", "smollm3"),
)
"""families whose pruned models have the same logits in vLLM as in transformers: benchmarks/results/vllm_loads.md"""
DIVIDED_IN_VLLM = ("granitemoehybrid", "olmoe", "qwen2", "qwen2_moe")
"""families of which vLLM takes a head to have the hidden size divided by the number of heads"""
WITH_DIVISORS = ("exaone4", "granite", "granitemoehybrid", "llama", "mistral", "mixtral")
"""families of which llama.cpp reads divisors of the rotary frequencies from a file"""
WITHOUT_EXPERTS = tuple(name for name, one in ARCHITECTURES.items() if one.mixture is None and name not in NOT_TRIED)


@dataclass(frozen=True)
class Runtime:
    """Requirements of a runtime on pruned models."""

    name: str
    families: tuple[str, ...] = tuple(ARCHITECTURES)
    rotary: tuple[str, ...] = (*FIXED, "dynamic", "longrope")
    """the scalings of rotary embeddings that it knows"""
    rotary_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """the scalings that it knows of a family, where those are others"""
    drafted: bool = False
    """whether it loads other models of transformers, as drafts describe them"""
    uneven: tuple[str, ...] = ()
    """the families whose blocks may differ in shape, lack a sub-block, or have fewer value dimensions than key ones"""
    attending: tuple[str, ...] = ()
    """those of them in which every block must have attention"""
    ordered: tuple[str, ...] = ()
    """the families of which it takes all blocks only: what a block does goes by its number there"""
    fewer_heads: tuple[str, ...] = tuple(name for name, one in ARCHITECTURES.items() if one.head_dim_is_free)
    """the families whose heads may be fewer than the hidden size says, where blocks are alike"""
    multiple: int = 1
    """the multiple that MLP widths get where the recipe leaves them open"""
    otherwise: Mapping[str, Callable[[PretrainedConfig], str]] = field(default_factory=dict)
    """functions of a config, by family, that return what it does not take or would compute otherwise, empty for none"""
    parts: bool = False
    """whether it loads the vision-language models of which language parts are pruned"""
    own_vocabulary: bool = False
    """whether it tokenises with its own code, so that it must know the tokenizer"""
    tried: str = ""
    """the version in which small models were tried, where a benchmark did"""
    tried_families: tuple[str, ...] = ()
    """the families whose pruned models have the same logits there as in transformers"""
    of_values: str = ""
    """a note for runs that remove value dimensions"""
    of_zeros: str = ""
    """a note for runs that remove single weights"""

    def fitted(
        self, recipe: Recipe, decoder: Decoder, allocation: Allocation | None = None
    ) -> tuple[Recipe, tuple[str, ...]]:
        """Return a recipe as it is run for this runtime, and notes on the fields that were set.

        The model's weights need not be there. InputError where the runtime does not take the model, or what the
        recipe, or an allocation that is given, would make of it; the sentence says what it would take.
        """
        self._check_model(decoder)
        notes, allocation = list[str](), allocation or recipe.given
        if isinstance(recipe.allocation, DepthSearch) and decoder.architecture.model_type in self.ordered:
            raise InputError(
                f"the target {self.name} sets the attention of a {decoder.architecture.model_type} block by the "
                "block's number, so no block can be removed: prune units mlp or weights, or choose another target"
            )
        search = recipe.allocation if isinstance(recipe.allocation, DepthSearch) else None
        if search is not None and search.parts != "mlp" and decoder.architecture.model_type in self.attending:
            raise InputError(f"the target {self.name} does not take {self._without_attention(decoder)}")
        if allocation is None and not self._may_differ(decoder):
            recipe = self._alike(recipe, decoder, notes)
        if allocation is None:
            recipe = self._aligned(recipe, decoder, notes)
        wrong = self.refuses(decoder, _expected(recipe, decoder, allocation))
        if wrong:
            raise InputError(f"the target {self.name} does not take {wrong}")
        if any(kind.of_heads for kind in recipe.units.kinds) and self.of_values:
            notes.append(self.of_values)
        if recipe.units.family is not None and self.of_zeros:
            notes.append(self.of_zeros)
        return recipe, tuple(notes)

    def _without_attention(self, decoder: Decoder) -> str:
        return f"{decoder.architecture.model_type} blocks without attention: {MLPS_ALONE}"

    def refuses(self, before: Decoder, shapes: Sequence[BlockShape]) -> str | None:
        """Return why it does not load a model with these blocks, and what it would load; None where it loads them.

        `before` is the model that is pruned. Blocks without anything are gone.
        """
        left = [shape for shape in shapes if shape.parts or before.architecture.stays]
        if before.architecture.model_type in self.attending and any(not shape.kv_heads for shape in left):
            return self._without_attention(before)
        return None if self._may_differ(before) else self._refuses_shapes(before, left)

    def refuses_model(self, decoder: Decoder) -> str | None:
        """Return what it does not take of a model as it is, and what it would take; None where it loads the model."""
        wrong = self._refuses_kind(decoder) or self.refuses(decoder, decoder.shapes())
        heads, free = decoder.heads, decoder.architecture.head_dim_is_free
        other = free and heads.query * heads.dim != decoder.model.config.hidden_size
        return wrong or (self._refuses_free_heads(decoder) if other else None)

    def _refuses_shapes(self, before: Decoder, left: Sequence[BlockShape]) -> str | None:
        """Return the property of blocks that a class with equal blocks cannot hold; None where there is none."""
        for reason in uneven(before.architecture, before.model.config, left):
            if reason in REMEDIES:
                return f"{reason.value}: {REMEDIES[reason]}"
        having = [shape for shape in left if shape.kv_heads]
        return None if before.heads.by_block or not having else self._refuses_heads(before, having[0].kv_heads)

    def check_folder(self, before: Decoder, folder: Path) -> None:
        """Raise OptpruneError when what is in a folder, of the model `before`, is not what the runtime takes."""
        config = load_config(folder)
        wrong = self.refuses(before, load_shapes(folder, config).shapes())
        if not wrong and not self._may_differ(before) and not is_stock(config):
            wrong = "classes of optprune's own: please report this"
        if wrong:
            raise OptpruneError(f"the pruned model is in {folder}, but the target {self.name} does not take {wrong}")

    def _refuses_heads(self, before: Decoder, kv_heads: int) -> str | None:
        heads, hidden = kv_heads * before.heads.group, before.model.config.hidden_size
        if kv_heads == before.heads.kv or heads * before.heads.dim == hidden:
            return None  # in many families the heads of the dense model do not make up the hidden size
        uneven = f"{heads} heads, which do not divide the hidden size of {hidden}: ask for another sparsity"
        return self._refuses_free_heads(before) or (uneven if hidden % heads else None)

    def _refuses_free_heads(self, decoder: Decoder) -> str | None:
        """Return why a model's heads cannot be fewer than the hidden size says; None where they can."""
        family = decoder.architecture.model_type
        if family in self.fewer_heads or (self._drafted(decoder) and decoder.architecture.head_dim_is_free):
            return None
        return f"models of the kind {family} with fewer heads than the hidden size says: {NARROW_MLPS}"

    def _may_differ(self, decoder: Decoder) -> bool:
        # Of experts it takes one number and one width.
        return decoder.architecture.model_type in self.uneven and decoder.architecture.mixture is None

    def _drafted(self, decoder: Decoder) -> bool:
        """Return whether a model is read by a draft and the runtime loads such models."""
        return self.drafted and decoder.architecture.pruned is None

    def _check_model(self, decoder: Decoder) -> None:
        wrong = self._refuses_kind(decoder)
        if wrong:
            raise InputError(f"the target {self.name} does not take {wrong}")

    def _refuses_kind(self, decoder: Decoder) -> str | None:
        """Return the property of a model, beside its shapes, that it does not take."""
        family, whole = decoder.architecture.model_type, decoder.architecture.part_of
        if whole and not self.parts:
            return (
                f"{whole} models: leave out --target, or prune the language part alone, which "
                "load_model(FOLDER).model.save_pretrained(TEXT_FOLDER) writes"
            )
        if family not in self.families and not self._drafted(decoder):
            return f"models of the kind {family}: it takes {', '.join(self.families)}"
        wrong = self.otherwise[family](decoder.model.config) if family in self.otherwise else ""
        if wrong:
            return wrong
        known = self.scalings(family)
        for kind in rope_types(decoder.model.config):
            if kind not in known:
                return f"rotary embeddings scaled by {kind}: it takes {', '.join(known)}"
        return None

    def scalings(self, family: str) -> tuple[str, ...]:
        """Return the scalings of rotary embeddings that it knows of a family."""
        return self.rotary_of.get(family, self.rotary)

    def _alike(self, recipe: Recipe, decoder: Decoder, notes: list[str]) -> Recipe:
        """Return the recipe with equal blocks: a budget for the whole model is divided evenly, where that is enough."""
        asked, several = recipe.allocation, any(len(parts) > 1 for parts in decoder.architecture.whole)
        if isinstance(asked, DepthSearch) and asked.parts != "layers" and several:
            raise InputError(
                f"the target {self.name} does not take blocks without attention or without an MLP: {LAYERS}"
            )
        if not isinstance(asked, GlobalBudget) or not (recipe.units.kinds or recipe.units.experts):
            return recipe
        wrong = (
            f"the target {self.name} does not take blocks of different shapes, as the recipe {recipe.name} makes them"
        )
        if any(kind.of_heads for kind in recipe.units.kinds):
            raise InputError(f"{wrong}: {NARROW_MLPS}")
        if asked.currency != "parameters":
            raise InputError(f"{wrong} for a budget of {asked.currency}: {ALIKE}")
        notes.append(f"the allocation is uniform in place of {asked.kind}, since all blocks are to be alike")
        return recipe.model_copy(update={"allocation": UniformShares(multiple=asked.multiple)})

    def _aligned(self, recipe: Recipe, decoder: Decoder, notes: list[str]) -> Recipe:
        """Return the recipe with the multiple of MLP widths of the runtime, where the recipe sets none."""
        asked, kinds = recipe.allocation, recipe.units.kinds
        if isinstance(asked, DepthSearch | GivenBlocks) or Mlp() not in kinds or asked.multiple:
            return recipe
        having = [shape for shape in decoder.shapes() if shape.mlp_width]
        if all(Mlp().multiple(shape, None) % self.multiple == 0 for shape in having):
            return recipe
        # The same number would be asked of value dimensions, of which a head has few.
        if any(kind.of_heads for kind in kinds):
            return recipe
        notes.append(f"MLP widths are multiples of {self.multiple}")
        return recipe.model_copy(update={"allocation": asked.model_copy(update={"multiple": self.multiple})})


def _expected(recipe: Recipe, decoder: Decoder, allocation: Allocation | None) -> tuple[BlockShape, ...]:
    """Return the shapes of the blocks as far as they are known before the run; undivided parts keep the model's."""
    recipe = recipe.within(decoder)
    allocator = allocator_of(recipe, allocation)
    allocation = allocation or recipe.given
    if allocation is None and isinstance(allocator, Uniform):
        allocation = allocator.allocation(decoder)
    return decoder.shapes() if allocation is None else tuple(block.shape for block in allocation.blocks)


def _latent_in_vllm(config: PretrainedConfig) -> str:
    """Return what vLLM does not take of a model with latent attention."""
    if getattr(config, "attention_bias", False):
        return "biases of latent attention (attention_bias), which it leaves out"
    if config.model_type in ("deepseek_v3", "pruned_deepseek_v3"):
        for name, value in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid")):
            if getattr(config, name, None) != value:
                return f"a router whose kind its config does not say: put {name} {value} into config.json"
    return ""


def _ministral3_in_vllm(config: PretrainedConfig) -> str:
    """Return what vLLM does not take of a Ministral 3."""
    beta = config.rope_parameters.get("llama_4_scaling_beta")
    if not beta or getattr(config, "llama_4_scaling", None):
        return ""
    return (
        "queries scaled by positions (llama_4_scaling_beta), which it leaves out: put llama_4_scaling with "
        f"original_max_position_embeddings and beta {beta} into config.json"
    )


def _glm4_moe_lite_in_vllm(config: PretrainedConfig) -> str:
    """Return what vLLM does not take of a GLM 4.7 Flash."""
    dense = config.mlp_layer_types.count(DENSE)
    if getattr(config, "first_k_dense_replace", None) != dense:
        return f"blocks whose kind its config does not count: put first_k_dense_replace {dense} into config.json"
    return _latent_in_vllm(config)


def _nemotron_h_in_vllm(config: PretrainedConfig) -> str:
    """Return what of a Nemotron-H was not tried in vLLM."""
    if "moe" in config.layer_types:
        return "experts of two layers, which it does not run on a CPU, so that they were not tried"
    return ""


def _qwen_in_vllm(config: PretrainedConfig) -> str:
    """Return what vLLM does not take of a Qwen2, its mixture or a Qwen3 without experts."""
    if config.model_type.endswith("qwen2_moe") and "sliding_attention" in config.layer_types:
        return "windows in a mixture of Qwen2, of which it gives other logits"
    if (
        config.model_type.endswith(("qwen2", "qwen3"))
        and len(set(config.layer_types)) > 1
        and config.max_window_layers != config.num_hidden_layers
    ):
        return "windows in some blocks only (max_window_layers)"
    return ""


def _gpt_oss_in_vllm(config: PretrainedConfig) -> str:
    """Return what vLLM does not take of a GPT-OSS."""
    lacking = [name for name in ("beta_fast", "beta_slow") if name not in config.rope_parameters]
    return f"rotary embeddings without {lacking[0]}: put it into rope_parameters of config.json" if lacking else ""


def _falcon_h1_in_vllm(config: PretrainedConfig) -> str:
    """Return what vLLM does not take of a Falcon-H1."""
    if config.mamba_rms_norm and config.mamba_norm_before_gate:
        return "recurrent mixers with a norm before a factor (mamba_norm_before_gate), which it has behind it"
    return ""


RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime("transformers", drafted=True, parts=True),
        Runtime(
            "vllm",
            families=tuple(name for name in ARCHITECTURES if name not in NOT_TRIED or name in TRIED_IN_VLLM),
            # Its classes of the others read head_dim from the config; those of these divide the hidden size.
            fewer_heads=tuple(
                name for name, one in ARCHITECTURES.items() if one.head_dim_is_free and name not in DIVIDED_IN_VLLM
            ),
            otherwise={
                **dict.fromkeys(LATENT, _latent_in_vllm),
                "falcon_h1": _falcon_h1_in_vllm,
                "glm4_moe_lite": _glm4_moe_lite_in_vllm,
                "gpt_oss": _gpt_oss_in_vllm,
                "nemotron_h": _nemotron_h_in_vllm,
                **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3"), _qwen_in_vllm),
                "ministral3": _ministral3_in_vllm,
            },
            # Its GPT-OSS gives every other block a window, by its number.
            ordered=("gpt_oss",),
            # Half, a quarter and an eighth of it are multiples of 8, for tensor parallelism.
            multiple=64,
            tried="vLLM 0.32 on a CPU",
            tried_families=TRIED_IN_VLLM,
            of_zeros="vLLM has no kernel for zeros since it gave up 2:4 (vllm#36799): they bring no speed there",
        ),
        Runtime(
            "gguf",
            families=tuple(
                name
                for name, one in ARCHITECTURES.items()
                if name not in ("opt", *NOT_TRIED)
                or name in ("falcon_h1", "gemma4_text", "granitemoehybrid", "lfm2", "nemotron_h", *DELTA_NETS)
            ),
            rotary=("default", "linear"),
            rotary_of={
                # Graphs of the others do not know the divisors of the frequencies, or leave them out.
                **dict.fromkeys(WITH_DIVISORS, ("default", "linear", "llama3")),
                **dict.fromkeys((*LATENT, "ministral3"), ("default", "yarn")),
                "gemma4_text": ("default", "proportional"),
                **dict.fromkeys((*DELTA_NETS, "gpt_oss"), ("default", "linear", "yarn")),
            },
            # Its architecture deci has Llama's blocks; gemma4 has a list of widths.
            uneven=("gemma4_text", "llama", "mistral", "qwen2"),
            attending=("gemma4_text",),
            ordered=("exaone4", "gemma2", "gemma3_text", "gpt_oss", "smollm3"),
            # Where it takes heads and hidden size to be what the file says, each for itself.
            fewer_heads=(
                *LATENT,
                *("gemma2", "gemma3_text", "glm4_moe", "gpt_oss", "granite", "granitemoehybrid", "llama"),
                *("ministral3", "mistral", "mixtral", "nemotron_h", "qwen3", "qwen3_moe", "seed_oss", "smollm3"),
                *("falcon_h1", *DELTA_NETS),
            ),
            # The numbers that share a scale in q8_0.
            multiple=32,
            own_vocabulary=True,
            of_values="value dimensions that go are zeros in a GGUF file: with --units mlp it is smaller, and has MLP "
            "widths for q8_0",
            of_zeros="llama.cpp has no kernel for zeros: they bring no speed there",
        ),
        Runtime(
            "onnx",
            # Which experts are run hangs on the tokens, and a graph is the same for all; and no states are passed on.
            families=WITHOUT_EXPERTS,
            rotary=FIXED,
            uneven=WITHOUT_EXPERTS,
            of_zeros="ONNX Runtime has no kernel for zeros: they bring no speed there",
        ),
    )
}


def runtime_called(name: str) -> Runtime:
    """Return the runtime of a name; InputError when there is none."""
    if name not in RUNTIMES:
        raise InputError(f"the target {name!r} is unknown: give {', '.join(RUNTIMES)}")
    return RUNTIMES[name]
