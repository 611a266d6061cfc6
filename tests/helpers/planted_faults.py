"""Faults in the sources of `optprune`, each planted in a copy of the tree: does a test of `make test` notice it?

`python -m tests.helpers.planted_faults` plants one after the other, runs the test files that should notice it, and
writes what was found into the table tests/planted_faults.md: about ten seconds a fault on a quiet core. `--only TEXT`
plants those with the text in their description, their file or their tests, `--missing` those without a row in the
table; rows of other faults stay. `--check` looks only whether each text is in its file.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "planted_faults.md"
HEAD = """# Planted faults

Whether the tests of `make test` in these files notice each fault. Made by `python -m tests.helpers.planted_faults`.

| fault | file in `optprune/` | files in `tests/` | |
|---|---|---|---|
"""
LONGEST = 600
"""number of seconds after which the tests of a fault are ended"""
IMPORTS = ("torch", "transformers.modeling_utils", "hypothesis", "pytest", "cvxpy", "scipy.optimize", "gguf")
"""modules that are imported once, before a process is forked for each fault"""
REIMPORTED = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
"""warning of pytest that is no error here, since its plugins are imported before the fork"""
NOTICED, MISSED, SLOW, BROKEN = "noticed", "NOT noticed", "too slow", "no test ran"


@dataclass(frozen=True)
class Fault:
    """A text of a source file, the wrong text in its place, and the test files that should notice it."""

    description: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = [
    # Runs: what they may go on with, what they are planned to take, and what they reached
    Fault(
        "frontier: one goes on with other settings of its recipes",
        "comparison/frontier_run.py",
        '"the settings": dict(self.settings),',
        '"the settings": {},',
        "comparison/test_frontier.py",
    ),
    Fault(
        "frontier: folders of pruned models are not looked at before the dense rows",
        "comparison/frontier_run.py",
        "            self.wanted.check(name, folder)",
        "            assert name",
        "comparison/test_frontier.py",
    ),
    Fault(
        "comparisons: one that failed before its first result leaves its options",
        "system/folders.py",
        "        if not had and not place.worth_keeping:",
        "        if not had and place.worth_keeping:",
        "comparison/test_frontier.py",
    ),
    Fault(
        "healing: a run goes on with another teacher",
        "healing/heal.py",
        '"the dense model": teacher.digest(),',
        '"the dense model": "",',
        "healing/test_heal.py",
    ),
    Fault(
        "comparisons: seeds do not deviate",
        "comparison/results.py",
        "return stdev(values) if len(values) > 1 else None",
        "return 0.0 if len(values) > 1 else None",
        "comparison/test_compare.py",
    ),
    Fault(
        "plan: the probe's forward pass is not divided by its tokens",
        "pruning/measured_plan.py",
        "lambda: advance(one.blocks[0], stream)) / self.tokens",
        "lambda: advance(one.blocks[0], stream))",
        "program/test_plan.py",
    ),
    Fault(
        "plan: the probe's passes are divided by all of its tokens",
        "pruning/measured_plan.py",
        "/ (tokens - some) if tokens > some",
        "/ tokens if tokens > some",
        "program/test_plan.py",
    ),
    Fault(
        "plan: moments of held-out tokens are not counted",
        "program/memory.py",
        "(3 if drifted else 1) * (2 if held_out else 1) * sum(",
        "(3 if drifted else 1) * sum(",
        "program/test_plan.py",
    ),
    Fault(
        "budget: rounding of rows to nothing is not told",
        "program/rounding.py",
        "if abs(removed - asked) <= max(",
        "if asked - removed <= asked or abs(removed - asked) <= max(",
        "program/test_rounded_budget.py",
    ),
    Fault(
        "budget: answers that remove more than asked are not told",
        "pruning/pipeline.py",
        'return "less" if',
        'return "less" if not records and',
        "pruning/test_shrinking.py",
    ),
    Fault(
        "ray: an address is not tried before Ray waits for it",
        "pruning/ray_workers.py",
        "        if self.address != LOCAL and not connected:",
        "        if self.address == LOCAL and not connected:",
        "pruning/test_ray_workers.py",
    ),
    Fault(
        "errors: an unexpected one does not say what is kept",
        "cli/errors.py",
        'return text if done == NOTHING else f"{text}; {done}"',
        "return text",
        "cli/test_poor_environments.py",
    ),
    Fault(
        "errors: a closed stream stays closed for the processes that are started",
        "cli/errors.py",
        "os.set_inheritable(free, True)",
        "os.set_inheritable(free, False)",
        "cli/test_poor_environments.py",
    ),
    # Input of the Python API, and what its bounds promise
    Fault(
        "checks: numbers of half precision pass",
        "numerics/tensors.py",
        "if value.dtype not in FLOATS:",
        "if False:",
        "house/test_input_errors.py",
    ),
    Fault(
        "checks: a name passes for a solver",
        "solvers/base.py",
        'check_kind("the solver", solver, Solver,',
        'check_kind("the solver", solver, object,',
        "house/test_input_errors.py",
    ),
    Fault(
        "measuring: each term of the loss is cut off at zero",
        "problems/exact.py",
        "return max(sum(self._terms(weight)), 0.0)",
        "return sum(self.measured(weight))",
        "problems/test_exact.py",
    ),
    Fault(
        "removal bound: one of the tied units takes the whole supergradient",
        "solvers/removal_bound.py",
        "_shared(gone, level, slots) / total",
        "gone / total",
        "solvers/test_removal_bound.py",
    ),
    Fault(
        "conjugate gradients: a start far away is kept",
        "solvers/conjugate_gradients.py",
        "torch.where(near, start, own), torch.where(near, residual, slope.neg_())",
        "start, residual",
        "solvers/test_conjugate_gradients.py",
    ),
    # Quantised checkpoints
    Fault(
        "quantised checkpoints: the zero points of GPTQ are taken as they are stored",
        "models/quantised.py",
        "raised=int(first)",
        "raised=0",
        "models/test_quantised.py",
    ),
    Fault(
        "quantised checkpoints: the columns of a word of AWQ follow one another",
        "models/quantised.py",
        "ColumnWordsFormat(4, along_inputs=False, order=AWQ_ORDER)",
        "ColumnWordsFormat(4, along_inputs=False)",
        "models/test_quantised.py",
    ),
    Fault(
        "quantised checkpoints: groups follow one another whatever the index says",
        "models/quantised.py",
        "    return given.long()",
        "    return torch.arange(columns) * count // columns",
        "models/test_quantised.py",
    ),
    Fault(
        "quantised checkpoints: blocks of FP8 divide a matrix evenly",
        "models/quantised.py",
        "                return self.block",
        "                return shape[0] // scales[0], shape[1] // scales[1]",
        "models/test_quantised.py",
    ),
    Fault(
        "quantised checkpoints: packed zero points are left out",
        "models/quantised.py",
        'if ".weight_zero_point" in parts:',
        "if False:",
        "models/test_quantised.py",
    ),
    Fault(
        "quantised checkpoints: scaled weights of any number of bits are read",
        "models/quantised.py",
        '"naive-quantized") and weights["num_bits"] == 8:',
        '"naive-quantized"):',
        "models/test_quantised.py",
    ),
    Fault(
        "quantised checkpoints: the config of the pruned folder still says that it is quantised",
        "models/load.py",
        "vars(config).pop(QUANTISED, None) if whole",
        "vars(config).get(QUANTISED, None) if whole",
        "models/test_quantised.py",
    ),
    # Recovery of experts
    Fault(
        "expert recovery: the router's weights are left out",
        "pruning/expert_recovery.py",
        "self.weights[tokens, places, None]",
        "1.0",
        "pruning/test_expert_recovery.py",
    ),
    Fault(
        "expert recovery: held-out tokens do not shorten a step",
        "pruning/expert_recovery.py",
        "length = min(length, self._held_out_length(number, change))",
        "self._held_out_length(number, change)",
        "pruning/test_expert_recovery.py",
    ),
    Fault(
        "expert recovery: what is left does not follow a change",
        "pruning/expert_recovery.py",
        "each.left[tokens] -= inputs @ done.T",
        "each.left[tokens] += inputs @ done.T",
        "pruning/test_expert_recovery.py",
    ),
    Fault(
        "expert recovery: zeros are filled",
        "pruning/expert_recovery.py",
        ".T.to(gram) * (weight != 0)",
        ".T.to(gram)",
        "pruning/test_expert_recovery.py",
    ),
    Fault(
        "expert recovery: the ridge is half of what was asked for",
        "pruning/expert_recovery.py",
        "ridge = self.damping * float(gram.diagonal().mean())",
        "ridge = 0.5 * self.damping * float(gram.diagonal().mean())",
        "pruning/test_expert_recovery.py",
    ),
    # Given scores of experts
    Fault(
        "given scores: every block has those of the first",
        "solvers/given_scores.py",
        "[self.scores[self.block]]",
        "[self.scores[0]]",
        "cli/test_expert_scores.py",
    ),
    Fault(
        "given scores: the experts with the smallest stay",
        "solvers/experts.py",
        "scores.argsort(descending=True, stable=True)",
        "scores.argsort(descending=False, stable=True)",
        "cli/test_expert_scores.py",
    ),
    Fault(
        "given scores: the recipe of the folder leaves them out",
        "recipe/names.py",
        "return {str(key): list(numbers) for key, numbers in value.items()}",
        "return {}",
        "cli/test_expert_scores.py",
    ),
    # Use of experts by texts
    Fault(
        "use of experts: batches count for the text at the other end",
        "calibration/expert_use.py",
        "passing = dict[str, ExpertUse](), iter(names)",
        "passing = dict[str, ExpertUse](), iter(names[::-1])",
        "calibration/test_expert_use.py",
    ),
    Fault(
        "use of experts: answers are not weighed by the router",
        "calibration/expert_use.py",
        "gates[tokens, number] @ norms[number]",
        "norms[number].sum()",
        "calibration/test_expert_use.py",
    ),
    Fault(
        "use of experts: gates are a softmax where the router has sigmoids",
        "calibration/expert_use.py",
        "gates = router_gates(raw, sigmoids=bool(mixture.correction))",
        "gates = router_gates(raw, sigmoids=False)",
        "calibration/test_expert_use.py",
    ),
    Fault(
        "use of experts: the overlap takes the larger share",
        "calibration/expert_use.py",
        "torch.minimum(*",
        "torch.maximum(*",
        "calibration/test_expert_use.py",
    ),
    # Experts out of a GGUF file
    Fault(
        "gguf experts: the first experts are copied in place of those that stay",
        "export/gguf_experts.py",
        "part = np.ascontiguousarray(tensor.data if chosen is None else tensor.data[chosen])",
        "part = np.ascontiguousarray(tensor.data if chosen is None else tensor.data[: len(chosen)])",
        "export/test_gguf_experts.py",
    ),
    Fault(
        "gguf experts: routers of another model are taken",
        "export/gguf_experts.py",
        "bool((nearest <= ROUNDING * left.double().norm(dim=1)).all())",
        "True",
        "export/test_gguf_experts.py",
    ),
    # Vision-language models
    Fault(
        "vision: tensors around a language part are zeros",
        "export/shards.py",
        "yield self.around[name].read()",
        "yield self.around[name].read() * 0",
        "export/test_around.py",
    ),
    Fault(
        "vision: a language part goes back under the names of a text model",
        "export/shards.py",
        "return self.named.get(name) or self.decoder",
        "return self.decoder",
        "export/test_around.py",
    ),
    Fault(
        "export: blocks whose values were read stay in memory",
        "export/shards.py",
        "                if index != here:\n                    resident.close()\n",
        "                if index != here:\n",
        "models/test_store.py",
    ),
    Fault(
        "vision: config.json keeps the sizes of the dense language part",
        "models/vision.py",
        "TEXT: text | changed}",
        "TEXT: text}",
        "export/test_around.py",
    ),
    Fault(
        "vision: whether embeddings are tied is read off the text_config",
        "models/vision.py",
        "config.tie_word_embeddings = whole.tie_word_embeddings",
        "config.tie_word_embeddings = getattr(whole, TEXT).tie_word_embeddings",
        "models/test_vision.py",
    ),
    Fault(
        "vision: another dtype than the folder's is written",
        "export/around.py",
        "if dtype not in (None, stored):",
        "if False:",
        "export/test_around.py",
    ),
    Fault(
        "pairs: all rows of queries are as far apart as those of whole heads",
        "models/pruned/pruned_decoder.py",
        "dims = torch.cat([pairs, pairs + self.head_dim // 2], dim=1)",
        "dims = torch.cat([pairs, pairs + pairs.shape[1]], dim=1)",
        "models/test_rotary_pairs.py",
    ),
    Fault(
        "pairs: heads of queries read the list of another KV head",
        "models/pruned/pruned_decoder.py",
        "query, key = query.unflatten(1, (len(pairs), -1)).transpose(1, 2), key[:, None]",
        "query, key = query.unflatten(1, (-1, len(pairs))), key[:, None]",
        "models/test_rotary_pairs.py",
    ),
    Fault(
        "pairs: outputs have weight 1 in the problem",
        "problems/loss.py",
        "outputs = given.average if given.full else torch.diag(given.average)",
        "outputs = torch.eye(len(own)).to(own)",
        "models/test_rotary_pairs.py",
    ),
    Fault(
        "pairs: the mean of the inputs is left out of the column of the bias",
        "problems/loss.py",
        "mean = moments.mean[:, None]",
        "mean = 0 * moments.mean[:, None]",
        "models/test_rotary_pairs.py",
    ),
    Fault(
        "pairs: what goes with the attention counts as saved",
        "allocation/width_costs.py",
        "        if pairs:\n",
        "        if False:\n",
        "models/test_rotary_pairs.py",
    ),
    Fault(
        "pairs: zeros of a GGUF file are behind the rows that are left",
        "export/gguf_tensors.py",
        "first = heads.dim * torch.arange(len(pairs))[:, None] + pairs",
        "first = heads.dim * torch.arange(len(pairs))[:, None] + torch.arange(pairs.shape[1])",
        "models/test_rotary_pairs.py",
    ),
    Fault(
        "images: features are left out",
        "models/images.py",
        "mixed = embeddings.masked_scatter(here[..., None], rows.to(embeddings))",
        "mixed = embeddings",
        "calibration/test_images.py",
    ),
    Fault(
        "images: the tokens of an image see no later ones",
        "models/vision.py",
        "further=_of_gemma3,",
        "further=None,",
        "calibration/test_images.py",
    ),
    Fault(
        "images: a block of Gemma 4 gets the numbers of the first token for an image",
        "models/vision.py",
        "inner.get_per_layer_inputs(ids.masked_fill(images, config.pad_token_id), embeddings)",
        "inner.get_per_layer_inputs(ids.masked_fill(images, 1), embeddings)",
        "calibration/test_images.py",
    ),
    Fault(
        "images: nothing is added to the first blocks of Qwen3-VL",
        "models/images.py",
        "return output.index_put((here,), features.to(output), accumulate=True)",
        "return output",
        "calibration/test_images.py",
    ),
    Fault(
        "images: the positions of Qwen3-VL are those of another record",
        "models/images.py",
        "self.positions[bisect_right(self.firsts, int(numbers[here][0])) - 1]",
        "self.positions[0].flip(0)",
        "calibration/test_images.py",
    ),
    Fault(
        "images: masks are those of any record of the length",
        "models/images.py",
        "return ids.shape, () if self.further is None else tuple((ids >= self.vocabulary).flatten().tolist())",
        "return ids.shape",
        "calibration/test_images.py",
    ),
    Fault(
        "images: the metric predicts the tokens of an image",
        "calibration/fisher_pass.py",
        "drawn = drawn.masked_fill(text >= logits.shape[-1], NO_LABEL)",
        "drawn = drawn.clamp(max=logits.shape[-1] - 1)",
        "calibration/test_images.py",
    ),
    Fault(
        "images: the divergence counts predictions of the tokens of an image",
        "calibration/divergence.py",
        "(next_tokens(ids) < vocabulary).flatten()",
        "(next_tokens(ids) < 2 * vocabulary).flatten()",
        "calibration/test_images.py",
    ),
    Fault(
        "images: a run is continued whatever its images are",
        "calibration/stream.py",
        '{} if decoder.images is None else {"the calibration images"',
        '{} if decoder is not None else {"the calibration images"',
        "cli/test_image_records.py",
    ),
    Fault(
        "images: the plan counts the tokens of the options",
        "program/program.py",
        "return sum(self.request.lengths) or (self",
        "return (self",
        "cli/test_image_records.py",
    ),
    Fault(
        "vision: blocks that features are added to are removed",
        "program/check.py",
        "if architecture.ordered and",
        "if not architecture.ordered and",
        "export/test_around.py",
    ),
    Fault(
        "vision: files behind links are copied",
        "export/around.py",
        "if own_file(folder, name) is None:",
        "if False:",
        "export/test_around.py",
    ),
    Fault(
        "vision: the path of the source is in config.json",
        "models/vision.py",
        'OF_SAVING = ("_name_or_path", "transformers',
        'OF_SAVING = ("transformers',
        "export/test_around.py",
    ),
    Fault(
        "vision: Qwen3-VL of different shapes has no norms of heads",
        "models/pruned/modeling_pruned_qwen3_vl.py",
        'norms = "head"',
        "norms = None",
        "export/test_around.py",
    ),
    Fault(
        "vision: the plan leaves out the vision part",
        "program/memory.py",
        "resident + program.request.around",
        "resident",
        "export/test_around.py",
    ),
    Fault(
        "vision: the dtype is read off the text_config",
        "models/vision.py",
        "config.dtype = whole.dtype or config.dtype",
        "config.dtype = config.dtype",
        "models/test_vision.py",
    ),
    # Grids
    Fault(
        "gptq: no compensation within a group",
        "solvers/gridded.py",
        "inner[:, j + 1 :].addr_(errors[:, j], local[j, j + 1 :], alpha=-1)",
        "inner[:, j + 1 :].addr_(errors[:, j], local[j, j + 1 :], alpha=0)",
        "solvers/test_gridded.py",
    ),
    Fault(
        "gptq: no compensation of later groups",
        "solvers/gridded.py",
        "weight[:, last:] -= errors @ upper[first:last, last:]",
        "weight[:, last:] -= 0 * errors @ upper[first:last, last:]",
        "solvers/test_gridded.py",
    ),
    Fault(
        "gptq: with a mask it begins at the minimiser without one",
        "solvers/gridded.py",
        "weight = restored_on_mask(problem, start).to(weight)",
        "pass",
        "solvers/test_gridded.py",
    ),
    Fault(
        "rounding: the original weights are rounded, not the start",
        "solvers/gridded.py",
        "else problem.rounded(start))",
        "else own)",
        "solvers/test_gridded.py",
    ),
    Fault(
        "gptq: weights outside the mask are kept",
        "solvers/gridded.py",
        "grid.round(inner[:, j], scales, lows) * kept[:, first + j]",
        "grid.round(inner[:, j], scales, lows)",
        "solvers/test_gridded.py",
    ),
    Fault(
        "grid descent: half a step to the best integer",
        "solvers/gridded.py",
        "self.grid.round(self.weight[:, j] - self._step(slope, product), self.scales, self.lows)",
        "self.grid.round(self.weight[:, j] - self._step(slope, product) / 2, self.scales, self.lows)",
        "solvers/test_gridded.py",
    ),
    Fault(
        "grid descent: scales never move",
        "solvers/gridded.py",
        "wanted = self.grid.stored(self.scales - self._step(slope, own))",
        "wanted = self.scales",
        "solvers/test_gridded.py",
    ),
    Fault(
        "grid descent: the residual is not updated",
        "solvers/gridded.py",
        "self.residual.addr_(self._weighed(change), self.gram[column])",
        "self.residual.addr_(self._weighed(change), self.gram[column], alpha=0)",
        "solvers/test_gridded.py",
    ),
    Fault(
        "gptq: errors of rows are not compensated by later rows",
        "solvers/gridded.py",
        "weight[later] -= shares.T @ errors",
        "weight[later] -= 0 * shares.T @ errors",
        "solvers/test_gridded.py",
    ),
    Fault(
        "grid descent: coupled rows change as if alone",
        "solvers/gridded.py",
        "made = torch.where(gain >= alone[best], made, torch.where(alone[best] > 0, one, 0.0))",
        "made = torch.where(alone > 0, change, 0.0)",
        "solvers/test_gridded.py",
    ),
    Fault(
        "grid descent: no single row is changed where several hinder each other",
        "solvers/gridded.py",
        "made = torch.where(gain >= alone[best], made, torch.where(alone[best] > 0, one, 0.0))",
        "made = torch.where(gain > 0, made, 0.0)",
        "solvers/test_gridded.py",
    ),
    Fault(
        "grids: one scale is tried",
        "grids.py",
        "TRIED = 19",
        "TRIED = 2",
        "solvers/test_gridded.py",
    ),
    Fault(
        "grids: scales are not rounded to what is stored",
        "grids.py",
        "return scales.clamp(-most, most).to(self.scale_dtype).to(scales.dtype)",
        "return scales.clamp(-most, most)",
        "export/test_gguf_packing.py solvers/test_gridded.py",
    ),
    Fault(
        "q4_0: nibbles exchanged",
        "export/ggml.py",
        "low | high << 4",
        "high | low << 4",
        "export/test_gguf_packing.py",
    ),
    Fault(
        "packed folders: words from the highest bits",
        "export/packed_folder.py",
        "places = BITS * torch.arange(PER_WORD)\n    return (raised",
        "places = BITS * torch.arange(PER_WORD).flip(0)\n    return (raised",
        "export/test_packed_folder.py",
    ),
    Fault(
        "packed folders: a word is filled up with eights",
        "export/packed_folder.py",
        "(0, -integers.shape[1] % PER_WORD))",
        "(0, -integers.shape[1] % PER_WORD), value=HALF)",
        "export/test_packed_folder.py",
    ),
    # Penalties, patterns and moments
    Fault(
        "l1: half the threshold",
        "penalties.py",
        "return shrink(weight, self.strength * step)\n",
        "return shrink(weight, self.strength * step / 2)\n",
        "vocabulary/test_penalties.py",
    ),
    Fault(
        "weighted l1: the least share as the dual norm",
        "penalties.py",
        "nan=0.0, posinf=math.inf).max())\n\n    def reach",
        "nan=0.0, posinf=math.inf).min())\n\n    def reach",
        "vocabulary/test_penalties.py",
    ),
    Fault(
        "elastic net: ridge without the step",
        "penalties.py",
        "/ (1 + self.ridge * step)",
        "/ (1 + self.ridge)",
        "vocabulary/test_penalties.py",
    ),
    Fault(
        "elastic net: a conjugate twice as large",
        "penalties.py",
        "/ (2 * self.ridge)",
        "/ self.ridge",
        "vocabulary/test_penalties.py",
    ),
    Fault(
        "column groups: half the threshold",
        "penalties.py",
        "(norms - self.strength * step).clamp",
        "(norms - self.strength * step / 2).clamp",
        "vocabulary/test_penalties.py",
    ),
    Fault(
        "patterns: a tied entry too few",
        "patterns.py",
        "tied.cumsum(1) <= missing",
        "tied.cumsum(1) < missing",
        "vocabulary/test_patterns.py",
    ),
    Fault(
        "rows: the number that a layer keeps is rounded as a whole and not by row",
        "patterns.py",
        "return outputs * round(share * inputs)",
        "return round(share * outputs * inputs)",
        "vocabulary/test_patterns.py",
    ),
    Fault(
        "rows: a row keeps a weight too many",
        "patterns.py",
        "RowWise(round(share * inputs))",
        "RowWise(min(int(share * inputs) + 1, inputs))",
        "vocabulary/test_patterns.py",
    ),
    Fault(
        "solve: the bound of a file counts as proved",
        "solvers/files.py",
        "str(proof[1]), stated_by_file=True)",
        "str(proof[1]))",
        "solvers/test_solution_files.py",
    ),
    Fault(
        "solve: an answer of another dtype passes",
        "solvers/base.py",
        "if value.dtype != weight.dtype or value.device != weight.device:",
        "if value.device != weight.device:",
        "solvers/test_own_solvers.py",
    ),
    Fault(
        "N:M: the smallest scores are kept",
        "patterns.py",
        "largest(score.reshape(-1, self.m), self.n)",
        "largest(-score.reshape(-1, self.m), self.n)",
        "vocabulary/test_patterns.py",
    ),
    Fault(
        "slots: taken to be in order",
        "patterns.py",
        "torch.argsort(self.slots, stable=True)",
        "torch.arange(len(self.slots))",
        "vocabulary/test_patterns.py problems/test_structured_problem.py",
    ),
    Fault(
        "patterns: NaN scores are ranked",
        "patterns.py",
        "if not finite and bool",
        "if False and bool",
        "vocabulary/test_patterns.py",
    ),
    Fault(
        "moments: a merge that ignores the numbers of tokens",
        "moments.py",
        "self.mixed(other, other.tokens / max(1, self.tokens + other.tokens))",
        "self.mixed(other, 0.5)",
        "vocabulary/test_moments.py",
    ),
    Fault(
        "moments: a merge without the distance of the means",
        "moments.py",
        "mixed[0].addr_(apart, apart, alpha=between)",
        "pass",
        "vocabulary/test_moments.py",
    ),
    Fault(
        "moments: a factor applied once",
        "moments.py",
        "covariance = self.covariance * factor * factor",
        "covariance = self.covariance * factor",
        "vocabulary/test_moments.py",
    ),
    Fault(
        "moments: the drift is not shortened",
        "moments.py",
        "drift.mean * share)",
        "drift.mean)",
        "vocabulary/test_moments.py",
    ),
    Fault(
        "calibration: a policy corrects for the whole drift",
        "calibration/propagation.py",
        "correction=policy.correction,",
        "correction=1.0,",
        "pruning/test_pipeline.py",
    ),
    Fault(
        "calibration: recovery corrects for the whole drift",
        "calibration/propagation.py",
        "if self.path.policy.correction == 1:",
        "if self.path.policy.correction <= 1:",
        "calibration/test_own_policy.py",
    ),
    Fault(
        "inverse: nearly singular Gram matrices are not noted",
        "solvers/inverse.py",
        "if not notes and bool((inflation > MOST_INFLATION).any()):",
        "if not notes and False:",
        "solvers/test_refitted_swaps.py solvers/test_channel_swaps.py",
    ),
    Fault(
        "restoration: masks that depend on each other are proved one by one",
        "solvers/restore.py",
        " or (verified.outputs is not None and len(different) > 1)",
        "",
        "solvers/test_restoration.py",
    ),
    Fault(
        "metric: gradients in half precision are summed as they are",
        "metric.py",
        "torch.promote_types(like.dtype, torch.float32)",
        "like.dtype",
        "vocabulary/test_metric.py",
    ),
    Fault(
        "problem files: the hash of a number depends on its class in numpy",
        "numerics/fingerprint.py",
        "    value = plain(value)\n",
        "",
        "problems/test_problem_files.py",
    ),
    Fault(
        "metric: no damping",
        "metric.py",
        "torch.addcmul(self.average @ change, self.damping[:, None], change)",
        "self.average @ change",
        "vocabulary/test_metric.py",
    ),
    Fault(
        "divergence: the other sign",
        "numerics/tensors.py",
        "(log_p - log_q)",
        "(log_q - log_p)",
        "vocabulary/test_kullback_leibler.py measure/test_divergence.py",
    ),
    Fault(
        "patterns: a row may keep more than its limit",
        "patterns.py",
        "room = largest(score, most) & ~first",
        "room = ~first",
        "vocabulary/test_patterns.py",
    ),
    Fault(
        "patterns: what must go may stay",
        "patterns.py",
        ".masked_fill(self.goes, -torch.inf)",
        "",
        "problems/test_composing.py",
    ),
    # Problems
    Fault(
        "mixtures: shares that are not relative to what was mixed before",
        "problems/loss.py",
        "share / sofar)",
        "share / total)",
        "problems/test_composing.py",
    ),
    Fault(
        "mixtures: the damping of the first loss for all",
        "problems/loss.py",
        "damping = damping + loss.damping * (share / total)",
        "damping = first.damping",
        "problems/test_composing.py",
    ),
    Fault(
        "cvxpy: bounds of the weights without their spread",
        "problems/cvxpy_model.py",
        "most = np.abs(minimiser) + np.sqrt(2 * spread * reach) * (1 + 1e-9)",
        "most = np.abs(minimiser)",
        "problems/test_cvxpy_model.py problems/test_composing.py",
    ),
    Fault(
        "cvxpy: bounds from the sign of the minimiser alone",
        "problems/cvxpy_model.py",
        "limits = [*limits, share <= kept, -share <= kept]",
        "limits = [*limits, share <= kept, share >= 0]",
        "problems/test_cvxpy_model.py problems/test_composing.py",
    ),
    Fault(
        "cvxpy: the metric is left out",
        "problems/cvxpy_model.py",
        "root, size = quadratic.root, np.sqrt(unit)",
        "root, size = np.eye(len(quadratic.metric)), np.sqrt(unit)",
        "problems/test_cvxpy_model.py",
    ),
    Fault(
        "cvxpy: a row of an N:M pattern counts as one group",
        "problems/cvxpy_model.py",
        "return [cvxpy.sum(groups, axis=1) == n]",
        "return [cvxpy.sum(choice) == n * choice.size // m]",
        "problems/test_composing.py problems/test_cvxpy_model.py",
    ),
    Fault(
        "loss: no damping in the Gram matrix",
        "problems/loss.py",
        "gram.diagonal().add_(self.damping)",
        "gram.diagonal()",
        "problems/test_loss.py",
    ),
    Fault(
        "loss: a damping of NaN is taken",
        "problems/loss.py",
        "if not bool(((self.damping >= 0) & torch.isfinite(self.damping)).all()):",
        "if False:",
        "problems/test_loss.py",
    ),
    Fault(
        "laws: an objective below the optimum passes",
        "testing/laws.py",
        "    assert solution.objective >= best.optimum - slack, (",
        "    assert solution.objective >= best.optimum - 2 * abs(best.optimum) - slack, (",
        "testing/test_planted_faults.py",
    ),
    Fault(
        "references: any mask obeys the pattern where a metric couples the rows",
        "testing/references.py",
        "masks = [mask for mask in bits if pattern.admits(torch.tensor(mask))]",
        "masks = list(bits)",
        "testing/test_references.py",
    ),
    Fault(
        "references: the optimum on a grid is that of stored scales",
        "testing/references.py",
        "best[row] = found[_row_losses(quadratic, found, row).argmin()]",
        "best[row] = other[_row_losses(quadratic, other, row).argmin()]",
        "testing/test_references.py",
    ),
    # Solvers
    Fault(
        "FISTA: momentum twice as fast",
        "solvers/fista.py",
        "(state.momentum - 1) / momentum",
        "2 * (state.momentum - 1) / momentum",
        "solvers/test_fista.py",
    ),
    Fault(
        "FISTA: a step uphill under a metric",
        "solvers/fista.py",
        "self.shift - self.step * self.metric",
        "self.shift + self.step * self.metric",
        "solvers/test_fista.py solvers/test_metric_laws.py",
    ),
    Fault(
        "greedy removal: the most expensive unit first",
        "solvers/greedy_obs.py",
        "order = cost.argsort(stable=True)",
        "order = (-cost).argsort(stable=True)",
        "solvers/test_greedy_obs.py",
    ),
    Fault(
        "removal curve: without the loss at its start",
        "solvers/greedy_obs.py",
        "problem.loss.value(form.minimiser) + rise",
        "rise",
        "solvers/test_greedy_obs.py",
    ),
    Fault(
        "SparseGPT: errors are added inside a block",
        "solvers/sparsegpt.py",
        "local[j, j:], alpha=-1)",
        "local[j, j:], alpha=1)",
        "solvers/test_sparsegpt.py",
    ),
    Fault(
        "SparseGPT: errors are added after a block",
        "solvers/sparsegpt.py",
        "weight[:, last:] -= errors",
        "weight[:, last:] += errors",
        "solvers/test_sparsegpt.py",
    ),
    Fault(
        "SparseGPT: a count of the block from its end alone",
        "solvers/sparsegpt.py",
        "pattern.keep * last // width - pattern.keep * first // width",
        "pattern.keep * (last - first) // width",
        "solvers/test_sparsegpt.py",
    ),
    Fault(
        "ADMM: the dual's other sign",
        "solvers/admm.py",
        "alpha=1 / state.rho",
        "alpha=-1 / state.rho",
        "solvers/test_admm.py",
    ),
    Fault(
        "ADMM: a dual without rho",
        "solvers/admm.py",
        ".sub_(sparse).mul_(state.rho)",
        ".sub_(sparse)",
        "solvers/test_admm.py",
    ),
    Fault(
        "ADMM: weights of dead inputs are scored",
        "solvers/admm.py",
        "mask = problem.mask(problem.project(within(state.alive, point.square())))",
        "mask = problem.mask(problem.project(point.square()))",
        "solvers/test_tiny_optima.py",
    ),
    Fault(
        "patterns: a row gives a weight below its least",
        "patterns.py",
        "return counts > least, counts < most",
        "return counts > 0, counts < most",
        "vocabulary/test_patterns.py",
    ),
    Fault(
        "patterns: fixed weights change places",
        "patterns.py",
        "return torch.ones_like(mask) if self.fixed is None else ~self.fixed",
        "return torch.ones_like(mask)",
        "vocabulary/test_patterns.py",
    ),
    Fault(
        "refitted swaps: exchanges of coupled rows leave the pattern",
        "patterns.py",
        "pairs = part[:, None] == part",
        "pairs = part[:, None] >= 0 * part",
        "vocabulary/test_patterns.py",
    ),
    Fault(
        "refitted swaps: no exchange that does not gain",
        "solvers/refitted_swaps.py",
        "(self.away < search.depth)",
        "(self.away < 0)",
        "solvers/test_tiny_optima.py",
    ),
    Fault(
        "grid beam: errors of a block are not compensated by later ones",
        "solvers/grid_beam.py",
        "beam[..., later] -= errors @ upper[block, later]",
        "beam[..., later] -= 0 * errors @ upper[block, later]",
        "solvers/test_gridded.py",
    ),
    Fault(
        "rotation: small slots are not searched",
        "solvers/value_basis.py",
        "directions = _searched(problem, directions)",
        "pass",
        "solvers/test_tiny_optima.py",
    ),
    Fault(
        "rotation: the search has the gradient of other directions",
        "solvers/value_basis.py",
        "linalg.solve_upper(factor, slope.mT).mT",
        "slope",
        "solvers/test_value_basis.py",
    ),
    Fault(
        "rotation: the last descent counts, not the best",
        "solvers/value_basis.py",
        "torch.where(reached > gain, ended, best)",
        "ended",
        "solvers/test_value_basis.py",
    ),
    Fault(
        "swaps: the gradient's other sign",
        "solvers/swaps.py",
        "gram.diagonal() / 2 - state.gradient",
        "gram.diagonal() / 2 + state.gradient",
        "solvers/test_swaps.py",
    ),
    Fault(
        "refitted swaps: the crossing of the two weights is added with the other sign",
        "solvers/refitted_swaps.py",
        "after = pivot[at, p][..., None, :] + across * pulled",
        "after = pivot[at, p][..., None, :] - across * pulled",
        "solvers/test_refitted_swaps.py",
    ),
    Fault(
        "refitted swaps: an answer between two refits counts",
        "solvers/refitted_swaps.py",
        "weight = (state.weight if state.before is None else state.before).reshape(shape)",
        "weight = state.weight.reshape(shape)",
        "solvers/test_refitted_swaps.py",
    ),
    Fault(
        "program files: a row of an inequality turns round",
        "problems/program_file.py",
        "model.addCons(row(place) <= float(right[place]))",
        "model.addCons(row(place) >= float(right[place]))",
        "problems/test_program_files.py",
    ),
    Fault(
        "moments: the mean is not taken out of the average",
        "moments.py",
        "average.addr_(mean[stripe], mean[stripe.start :], alpha=-1)",
        "part",
        "vocabulary/test_moments.py",
    ),
    Fault(
        "moments: a block on the diagonal is not made symmetric",
        "moments.py",
        "average[:, : len(part)] = (square + square.T).div_(2 * self.tokens)",
        "pass",
        "vocabulary/test_moments.py",
    ),
    Fault(
        "metric: gradients of tokens are not clipped",
        "metric.py",
        "    return gradients * (clip * middle / norms).clamp(max=1).nan_to_num(nan=1)",
        "    return gradients",
        "calibration/test_fisher.py",
    ),
    Fault(
        "metric: a recipe's clip is not used",
        "pruning/run.py",
        "widest, setting.clip, on_pass",
        "widest, None, on_pass",
        "pruning/test_metric_pipeline.py",
    ),
    Fault(
        "metric: the median counts tokens of all sequences",
        "metric.py",
        ", 0.5, dim=-2, keepdim=True)",
        ", 0.5)",
        "calibration/test_fisher.py",
    ),
    Fault(
        "generated text: windows of it are held out",
        "calibration/generated.py",
        "torch.cat([fitted, real[len(real) - apart :]])",
        "torch.cat([real[len(real) - apart :], fitted])",
        "cli/test_generated_option.py",
    ),
    Fault(
        "windows: packed-no-bos begins with BOS too",
        "texts/calibration.py",
        'return [] if sequences == "packed-no-bos" else begin_tokens(tokenizer)',
        "return begin_tokens(tokenizer)",
        "texts/test_begin_tokens.py",
    ),
    Fault(
        "windows: BOS moves the text of a window on by a token",
        "texts/windows.py",
        "    replaced[:, : len(begin)] = torch.tensor(begin, dtype=windows.dtype)",
        "    replaced = torch.cat([torch.tensor(begin).expand(len(windows), -1), windows[:, : -len(begin)]], dim=1)",
        "texts/test_begin_tokens.py",
    ),
    Fault(
        "windows: those of an evaluation begin without BOS",
        "cli/evaluation.py",
        "        begin = () if text is None else tuple(begin_for(model, sequences))",
        "        begin = ()",
        "cli/test_sequences_option.py",
    ),
    Fault(
        "generated text: pieces begin without BOS",
        "calibration/generated.py",
        "    begin = _shared_first(windows)",
        "    begin = windows[0][:0]",
        "calibration/test_generated.py",
    ),
    Fault(
        "generated text: a long window is one piece",
        "calibration/generated.py",
        "pieces = max(1, round(length / piece))",
        "pieces = 1",
        "calibration/test_generated.py",
    ),
    Fault(
        "rotated units: directions are kept where each dimension has a factor",
        "models/units.py",
        "rotated=self.rotated and not decoder.heads.gated",
        "rotated=self.rotated",
        "models/test_recurrent_mixers.py",
    ),
    Fault(
        "generated text: a resumed run generates it again",
        "calibration/generated.py",
        "None if folder is None else folder.kept(name, _windows)",
        "None",
        "cli/test_generated_option.py",
    ),
    Fault(
        "folders: a manifest that names what is outside is read",
        "system/folders.py",
        " or not _is_sound(content):",
        ":",
        "system/test_folders.py",
    ),
    Fault(
        "folders: a file behind a link is taken for ours",
        "system/folders.py",
        " and not file.parent.is_symlink()",
        "",
        "system/test_folders.py",
    ),
    Fault(
        "folders: a name leads out",
        "system/folders.py",
        "        self._check_name(name, 2)\n",
        "",
        "system/test_folders.py",
    ),
    Fault(
        "folders: a lock with content is emptied",
        "system/folders.py",
        "if place.exists() and place.stat().st_size:",
        "if False:",
        "system/test_folders.py",
    ),
    Fault(
        "run folder: a restart deletes at once",
        "system/folders.py",
        "            self.replaces = self.begun\n",
        "            self.replaces = False\n",
        "pruning/test_journal.py",
    ),
    Fault(
        "run folder: files of the replaced run count",
        "system/folders.py",
        "return not self.replaces and super().lists(name)",
        "return super().lists(name)",
        "pruning/test_journal.py",
    ),
    Fault(
        "run folder: beginning deletes its own scratch",
        "system/folders.py",
        "self.clear(but=(SCRATCH,) if self._has_own_scratch else ())",
        "self.clear()",
        "pruning/test_journal.py",
    ),
    Fault(
        "run folder: old temporary files are used again",
        "system/folders.py",
        "_delete_all(self._left_in_scratch())",
        "pass",
        "pruning/test_journal.py",
    ),
    Fault(
        "run folder: converted weights are deleted before the new run begins",
        "system/folders.py",
        "_delete_all(self._left_in_scratch())",
        "_delete_all((self.folder / SCRATCH).iterdir())",
        "pruning/test_journal.py",
    ),
    Fault(
        "run folder: drafts are deleted when it is opened",
        "system/folders.py",
        "self._left_behind = self._drafts()",
        "self._left_behind = _delete_all(self._drafts()) or []",
        "system/test_folders.py",
    ),
    Fault(
        "run folder: drafts are never deleted",
        "system/folders.py",
        "        _delete_all(self._left_behind)\n",
        "",
        "system/test_folders.py",
    ),
    Fault(
        "tableau: the columns of the pivots are read too",
        "solvers/inverse.py",
        "torch.addmm(matrix, pivot.T, across, alpha=-1)",
        "torch.addmm(matrix, matrix[:, pivots], across, alpha=-1)",
        "solvers/test_spap.py",
    ),
    Fault(
        "solve: a solver may write into its problem",
        "solvers/run.py",
        "if _versions(problem) != versions:",
        "if False:",
        "solvers/test_driver.py",
    ),
    Fault(
        "solve: a start keeps its dtype",
        "solvers/run.py",
        "return given.to(weight)",
        "return given",
        "solvers/test_driver.py",
    ),
    Fault(
        "solutions: the stated violation is not compared",
        "solvers/files.py",
        "if not math.isclose(violation, outside, rel_tol=ROUNDING):",
        "if False:",
        "solvers/test_solution_files.py",
    ),
    Fault(
        "files: a file of others is replaced",
        "system/files.py",
        "if place.is_file() and not is_marked(place):",
        "if False:",
        "solvers/test_solution_files.py",
    ),
    Fault(
        "moments: a mean may contradict the Gram matrix",
        "moments.py",
        "if bool((below & (gram.diagonal() >= 0)).any()):",
        "if False:",
        "vocabulary/test_definite.py",
    ),
    Fault(
        "units: indices are where the weights are",
        "models/units.py",
        'return torch.device("cpu") if weight.is_meta else weight.device',
        "return weight.device",
        "pruning/test_permuted_inputs.py",
    ),
    Fault(
        "run folder: a refused restart discards the run",
        "cli/run_folder.py",
        "        if journal.replaces or (",
        "        if (",
        "cli/test_resume.py",
    ),
    Fault(
        "drafts: they are deleted before the checks",
        "cli/run_folder.py",
        "        return kind(run_folder_of(",
        "        self.delete_left_behind(print)\n        return kind(run_folder_of(",
        "cli/test_resume.py",
    ),
    Fault(
        "drafts: they are never deleted",
        "cli/prune_run.py",
        "        self.output.delete_left_behind(reporter.say)\n",
        "",
        "cli/test_resume.py",
    ),
    Fault(
        "vocabulary: the tokens are not kept",
        "cli/prune_run.py",
        "and not journal.holds(CHOSEN_TOKENS):",
        "and False:",
        "cli/test_chosen_tokens.py",
    ),
    Fault(
        "GGUF: converted weights are written through a link",
        "models/gguf.py",
        "    if folder.is_symlink():\n",
        "    if False:\n",
        "models/test_gguf.py",
    ),
    Fault(
        "outputs: the model that is read is replaced",
        "cli/run_folder.py",
        "        check_apart(self.folder, self.reads)\n",
        "",
        "cli/test_bad_output.py",
    ),
    Fault(
        "outputs: a file of another format is overwritten",
        "export/place.py",
        "if magic and not _begins_with(place, magic):",
        "if False:",
        "export/test_gguf_file.py",
    ),
    Fault(
        "export: a GGUF file says that no text begins with BOS",
        "export/gguf_vocabulary.py",
        '"bos": first, "eos": False',
        '"bos": False, "eos": False',
        "export/test_gguf_file.py",
    ),
    Fault(
        "export: a GGUF file says the opposite of the space before a text",
        "export/gguf_vocabulary.py",
        "add_add_space_prefix(self.space_first)",
        "add_add_space_prefix(not self.space_first)",
        "export/test_gguf_file.py",
    ),
    Fault(
        "export: infinity is written into a GGUF file",
        "export/ggml.py",
        "    if found is None or not is_finite(found, kind):",
        "    if found is None:",
        "export/test_gguf_types.py",
    ),
    Fault(
        "store: a model that is opened block by block has no generation config of its own",
        "models/load.py",
        "model.generation_config if gguf else GenerationConfig.from_pretrained(where)",
        "model.generation_config",
        "models/test_store.py",
    ),
    Fault(
        "report: figures of other weights are taken",
        "cli/report.py",
        "    if weights != digest_of_source(str(folder)):",
        "    if False:",
        "cli/test_report_command.py",
    ),
    Fault(
        "outputs: a file that the user changed is overwritten",
        "export/place.py",
        "if name in digests and _digest(path, *_state(path)) != digests[name]:",
        "if False:",
        "export/test_saving.py",
    ),
    Fault(
        "healing: it may end in the first half of its steps",
        "healing/heal.py",
        "found.step > len(self.batches) / 2",
        "True",
        "healing/test_heal.py",
    ),
    Fault(
        "output: the teacher may be replaced",
        "cli/heal.py",
        "reads=(model, teacher)",
        "reads=(model,)",
        "cli/test_bad_output.py",
    ),
    Fault(
        "output: prune_model does not say what it reads",
        "cli/one_call.py",
        "reads=(named,) if named else ()",
        "reads=()",
        "cli/test_bad_output.py",
    ),
    Fault(
        "batches: padded tokens are kept",
        "texts/token_batches.py",
        "    return row[kept[0] : kept[-1] + 1] if kept else row[:0]\n",
        "    return row\n",
        "pruning/test_padded_batches.py",
    ),
    Fault(
        "batches: a mask is not read",
        "texts/token_batches.py",
        "batch.get(MASK)",
        "None",
        "pruning/test_padded_batches.py",
    ),
    Fault(
        "prune_model: the folder of a model in memory is written over",
        "cli/one_call.py",
        "            replace(self.output, reads=(self.loaded.source,)).check()\n",
        "            self.output.check()\n",
        "cli/test_prune_model_in_memory.py",
    ),
    Fault(
        "prune: a keyword is no field of the recipe",
        "pruning/pipeline.py",
        "    recipe = recipe_with(recipe, fields)\n",
        "    recipe = recipe_with(recipe, {})\n",
        "pruning/test_padded_batches.py",
    ),
    Fault(
        "solve: a bound that is no number hides one that was proved",
        "solvers/run.py",
        "key=lambda one: -math.inf if math.isnan(one.lower_bound) else one.lower_bound",
        "key=lambda one: one.lower_bound",
        "solvers/test_driver.py",
    ),
    Fault(
        "layer_problem: a keyword is no field of the recipe",
        "pruning/one_layer.py",
        "settings_of(recipe, allocation, fields)",
        "settings_of(recipe, allocation, {})",
        "pruning/test_one_layer.py",
    ),
    Fault(
        "output: save_model replaces the teacher",
        "export/folder.py",
        "    check_apart(folder, [teacher])\n",
        "",
        "export/test_saving.py",
    ),
    Fault(
        "output: a folder is compared by its name alone",
        "export/place.py",
        "if parent == place or _is_same(parent, place):",
        "if parent == place:",
        "export/test_saving.py",
    ),
    Fault(
        "output: the GGUF file of the dense model is replaced",
        "export/gguf_experts.py",
        "        check_apart(output, [str(self.original)])\n",
        "",
        "export/test_gguf_experts.py",
    ),
    Fault(
        "output: a pipe is replaced by a file",
        "export/place.py",
        "        if not place.is_file():\n            raise",
        "        if False:\n            raise",
        "export/test_gguf_file.py",
    ),
    Fault(
        "output: a folder without a record of ours is overwritten",
        "export/place.py",
        "    if not isinstance(digests, dict):\n        raise",
        "    digests = digests if isinstance(digests, dict) else entries(place)\n    if False:\n        raise",
        "export/test_saving.py",
    ),
    Fault(
        "output: a link may lie among compiled modules",
        "export/place.py",
        "if not (own and is_own_file(path)):",
        "if not (own and (compiled or is_own_file(path))):",
        "export/test_saving.py",
    ),
    Fault(
        "output: what is written after the check is not flushed",
        "export/place.py",
        "    flush_all(draft)\n",
        "",
        "export/test_saving.py",
    ),
    Fault(
        "output: the old folder goes before the new name is on the disk",
        "export/place.py",
        "    flush_name(place)\n    if replaced:",
        "    if replaced:",
        "export/test_saving.py",
    ),
    Fault(
        "output: a draft without room is kept as unchecked",
        "export/exporter.py",
        " and not (checked and no_room_behind(error))",
        "",
        "export/test_saving.py",
    ),
    Fault(
        "outputs: a file of others is replaced",
        "cli/outputs.py",
        "and not replaces(place):",
        "and False:",
        "cli/test_json_output.py",
    ),
    Fault(
        "outputs: two options write one file",
        "cli/outputs.py",
        "        if places[number] in places[:number]:",
        "        if False:",
        "cli/test_json_output.py",
    ),
    Fault(
        "outputs: a page is written through a link",
        "cli/report.py",
        "    if output is None and place.is_symlink():",
        "    if False:",
        "cli/test_report_command.py",
    ),
    Fault(
        "statistics: files of others are deleted",
        "calibration/statistics_cache.py",
        'if re.fullmatch(r"[0-9a-f]{32}", file.stem):',
        "if file.name != FACTS_FILE:",
        "calibration/test_collected.py",
    ),
    Fault(
        "generated text: it is generated before the run begins",
        "cli/prune_run.py",
        "        SharedJournal(journal, partial_sums.peers).begin(decided)\n",
        "",
        "cli/test_generated_option.py",
    ),
    Fault(
        "generated text: a comparison holds it out",
        "comparison/session.py",
        "held_out=self.grid.held_out",
        "held_out=0.0",
        "comparison/test_compare.py",
    ),
    Fault(
        "generated text: a run goes on with another number of windows",
        "program/program.py",
        "self.request.generated,",
        "None,",
        "cli/test_generated_option.py",
    ),
    Fault(
        "generated text: a quality is tried without it",
        "cli/goal.py",
        "batches = list(whole.with_generated(resolved.program, batches, SingleProcess()))",
        "batches = list(batches)",
        "cli/test_generated_option.py",
    ),
    Fault(
        "swaps: coupled rows are not refused",
        "solvers/swaps.py",
        "(COUPLED if problem.loss.coupled else None)",
        "None",
        "solvers/test_metric_laws.py solvers/test_swaps.py",
    ),
    Fault(
        "refit: the worst damping",
        "solvers/ridge.py",
        "best = losses.index(min(losses))",
        "best = losses.index(max(losses))",
        "solvers/test_ridge.py",
    ),
    Fault(
        "spap: a walk moves a unit back that has just come",
        "solvers/spap.py",
        "moved[found.leaving] = moved[found.entering] = step",
        "moved[found.leaving] = step",
        "solvers/test_spap.py",
    ),
    # Allocation
    Fault(
        "shares: a range the wrong way round is taken",
        "allocation/knapsack.py",
        "if not 0 <= low <= high <= 1:",
        "if False:",
        "allocation/test_budget.py allocation/test_allocation.py",
    ),
    Fault(
        "shares: ties are left out",
        "allocation/knapsack.py",
        "kept[name] += tied",
        "kept[name] += 0",
        "allocation/test_budget.py allocation/test_allocation.py",
    ),
    Fault(
        "shares: no least count",
        "allocation/knapsack.py",
        "math.ceil(low * cost.numel())",
        "0",
        "allocation/test_budget.py allocation/test_allocation.py",
    ),
    Fault(
        "curves: falling prices are taken",
        "allocation/knapsack.py",
        "if bool((self.prices.diff() <= 0).any()):",
        "if False:",
        "allocation/test_budget.py allocation/test_prices.py",
    ),
    Fault(
        "probe: the ratio upside down",
        "allocation/by_cost.py",
        "(measured + NOISE_FLOOR_NATS) / (predicted + NOISE_FLOOR_NATS)",
        "(predicted + NOISE_FLOOR_NATS) / (measured + NOISE_FLOOR_NATS)",
        "allocation/test_by_cost.py allocation/test_measured_costs.py calibration/test_probe.py",
    ),
    Fault(
        "plan: the layers that a probe tries in float32 are not counted",
        "allocation/by_cost.py",
        "            if probe_tokens:\n                # The layers",
        "            if False:\n                # The layers",
        "allocation/test_allocator_work.py",
    ),
    Fault(
        "operations: attention is free",
        "allocation/currency.py",
        "2 * (_weights_used(decoder, shape) + attention)",
        "2 * _weights_used(decoder, shape)",
        "allocation/test_prices.py",
    ),
    Fault(
        "operations: every expert computes",
        "allocation/currency.py",
        "weights - one * (shape.experts - decoder.experts_for_a_token)",
        "weights",
        "allocation/test_prices.py allocation/test_expert_budget.py",
    ),
    Fault(
        "journal: kept costs are read onto the CPU",
        "pruning/journal.py",
        'return self._read(name, str(device or "cpu"))',
        'return self._read(name, "cpu")',
        "pruning/test_journal.py",
    ),
    Fault(
        "journal: costs of removal lose their notes",
        "pruning/journal.py",
        'return Measured({"order": order, "losses": losses}, list(notes))',
        'return Measured({"order": order, "losses": losses}, [])',
        "pruning/test_journal.py",
    ),
    Fault(
        "journal: costs of removal are those of another batch",
        "pruning/journal.py",
        '("removal", problem.fingerprint(), str(device), batch)',
        '("removal", problem.fingerprint(), str(device))',
        "pruning/test_journal.py",
    ),
    Fault(
        "metric: a process without batches has none",
        "calibration/fisher_pass.py",
        "        if not self._done:\n            for index",
        "        if False:\n            for index",
        "calibration/test_fisher.py",
    ),
    # Calibration and pruning
    Fault(
        "calibration: held-out batches are fitted",
        "calibration/moments_pass.py",
        "first_apart = count - share.apart(count, held_out)",
        "first_apart = count",
        "solvers/test_ridge.py",
    ),
    Fault(
        "calibration: a stream that does not advance",
        "calibration/moments_pass.py",
        "output.hidden[index] = after",
        "output.hidden[index] = hidden",
        "calibration/test_collected.py calibration/test_policies.py",
    ),
    Fault(
        "recurrent heads: rows of a convolution stand head by head",
        "models/decoder.py",
        "keep(self.blocks[block], name, entries[choice].reshape(-1).sort().values)",
        "keep(self.blocks[block], name, entries[choice].reshape(-1))",
        "models/test_recurrent_heads.py",
    ),
    Fault(
        "recurrent heads: the first decays and steps stay, whichever heads do",
        "models/units.py",
        "vectors = {name: rows_of(runs) for",
        "vectors = {name: rows_of(runs) if len(runs) > 1 else rows_of(runs).flip(0) for",
        "models/test_recurrent_heads.py",
    ),
    Fault(
        "recurrent heads: a layer that makes all of a head is taken for runs of each",
        "models/families.py",
        '"linear_attn.in_proj_qkvz": (lambda config: 2 * (keys_of_delta_net(config) + values_of_delta_net(config)),),',
        '"linear_attn.in_proj_qkvz": (*KEYS_AND_VALUES, values_of_delta_net),',
        "models/test_recurrent_heads.py",
    ),
    Fault(
        "recurrent heads: a mixer that was narrowed for a while keeps its sizes",
        "models/decoder.py",
        "                vars(place).update(numbers)\n",
        "",
        "models/test_recurrent_heads.py",
    ),
    Fault(
        "recurrent heads: a config of the stock class keeps its counts",
        "models/decoder.py",
        "            mixer.record(config, recurrent)",
        "            pass",
        "models/test_recurrent_heads.py",
    ),
    Fault(
        "recurrent heads: mixers that differ are written as GGUF",
        "export/gguf_families.py",
        "    alike = alike and len({shape.recurrent for shape in shapes if shape.recurrent}) < 2\n",
        "",
        "models/test_recurrent_heads.py",
    ),
    Fault(
        "calibration: experts of the dense model route by themselves",
        "calibration/moments_pass.py",
        "return args[0], routes[path], *args[2:]",
        "return args",
        "models/test_mixture.py",
    ),
    Fault(
        "strict: a note of a layer is no error",
        "pruning/layer.py",
        "if task.method.strict and",
        "if False and",
        "pruning/test_pipeline.py pruning/test_one_layer.py pruning/test_sparse_pipeline.py",
    ),
    Fault(
        "journal: weights of any kind have one digest",
        "models/checkpoint.py",
        "digest.update(of_file.digest())",
        "pass",
        "pruning/test_journal.py pruning/test_streaming.py",
    ),
    Fault(
        "workers: those of a script are not looked at",
        "pruning/pipeline.py",
        "    workers.check(program.policy)\n",
        "",
        "pruning/test_workers.py",
    ),
    Fault(
        "recovery: the error on the fitted tokens is told without the rounding",
        "pruning/refinement.py",
        "        after = loss.error(fit)\n    return RecoveredPart(",
        "        pass\n    return RecoveredPart(",
        "pruning/test_recovery.py",
    ),
    Fault(
        "strict: a division by squared errors is no error",
        "pruning/run.py",
        "notes += program.notes + warn_or_raise(strict, program.allocator.warnings)",
        "notes += program.notes + program.allocator.warnings",
        "pruning/test_pipeline.py",
    ),
    Fault(
        "workers: of several jobs that end at once one is replaced",
        "pruning/workers.py",
        "under_way += [pool.send(job) for job in islice(jobs, len(done))]",
        "under_way += [pool.send(job) for job in islice(jobs, 1)]",
        "pruning/test_workers.py",
    ),
    # Folders and export
    Fault(
        "folders: the bytes of a file are not checked",
        "system/folders.py",
        "digest_of_file(self.folder / name) in self._manifest[FILES][name]",
        "True",
        "system/test_folders.py",
    ),
    Fault(
        "folders: an edited manifest is read",
        "system/folders.py",
        "digest != digest_of(content) or",
        "",
        "system/test_folders.py",
    ),
    Fault(
        "interrupts: one that Python ignores is printed",
        "system/interrupts.py",
        "        if not (_RECEIVED and ignored.exc_type is KeyboardInterrupt):",
        "        if True:",
        "system/test_interrupts.py",
    ),
    Fault(
        "folders: a foreign file is written over",
        "system/folders.py",
        "if name not in files or not is_own_file(file):",
        "if False:",
        "system/test_folders.py",
    ),
    Fault(
        "comparison: a refusal clears its work",
        "comparison/kept_folder.py",
        "        if self._others is None:\n",
        "        if True:\n",
        "comparison/test_comparison_folder.py",
    ),
    Fault(
        "output: an existing folder is replaced unasked",
        "export/place.py",
        "        if not overwrite:",
        "        if False:",
        "export/test_saving.py",
    ),
    Fault(
        "output: the old folder is not put back",
        "export/place.py",
        "old.rename(place)",
        "pass",
        "export/test_saving.py",
    ),
    Fault(
        "output: empty folders of others are deleted",
        "export/place.py",
        "stat.S_IMODE(folder.stat().st_mode) == SCRATCH_MODE and",
        "",
        "export/test_gguf_file.py",
    ),
    Fault(
        "GGUF: experts in the order of words",
        "export/gguf_tensors.py",
        "for number in range(len(numbered)) for one in numbered[number]]",
        "for number in sorted(numbered, key=str) for one in numbered[number]]",
        "export/test_gguf_file.py",
    ),
    Fault(
        "GGUF: heads are not interleaved",
        "export/gguf_tensors.py",
        ".transpose(1, 2).flatten(0, 2)",
        ".flatten(0, 2)",
        "export/test_gguf_file.py",
    ),
    Fault(
        "GGUF: norms of Qwen3.5 and Qwen3-Next are stored as they are",
        "export/gguf_families.py",
        '"zeros": False,\n    "shift": 1.0,',
        '"zeros": False,',
        "export/test_gguf_delta_nets.py",
    ),
    Fault(
        "GGUF: the norm of a delta network is stored one higher too",
        "export/gguf_tensors.py",
        'name.endswith("norm.weight") and not self._of_mixer(name)',
        'name.endswith("norm.weight")',
        "export/test_gguf_delta_nets.py",
    ),
    Fault(
        "GGUF: value heads of Qwen3.5 stay with their key head",
        "export/gguf_tensors.py",
        "self.family.tiled[run](config)).transpose(0, 1).flatten()",
        "self.family.tiled[run](config)).flatten()",
        "export/test_gguf_delta_nets.py",
    ),
    Fault(
        "GGUF: what reads the value heads of Qwen3.5 keeps their order",
        "export/gguf_tensors.py",
        "return replace(target, columns=_chosen_columns(",
        "return target or replace(target, columns=_chosen_columns(",
        "export/test_gguf_delta_nets.py",
    ),
    Fault(
        "GGUF: keys and values of Qwen3-Next stay with their head",
        "export/gguf_tensors.py",
        "chosen = torch.cat([next(columns).flatten() for _ in runs])",
        "chosen = torch.cat([next(columns) for _ in runs], 1).flatten()",
        "export/test_gguf_delta_nets.py",
    ),
    Fault(
        "GGUF: the counts of a recurrent mixer are those of the dense model",
        "export/gguf_file.py",
        "            mixer.record(config, left)",
        "            pass",
        "export/test_gguf_delta_nets.py",
    ),
    Fault(
        "GGUF: keys of Falcon-H1 have the multiplier of the attention's inputs alone",
        "export/gguf_families.py",
        "(attention * config.key_multiplier,)",
        "(attention,)",
        "export/test_gguf_falcon_h1.py",
    ),
    Fault(
        "GGUF: tied embeddings of Falcon-H1 are a head without its multiplier",
        "export/gguf_tensors.py",
        ', factor=self._factor("lm_head.weight"))',
        ")",
        "export/test_gguf_falcon_h1.py",
    ),
    Fault(
        "GGUF: a Falcon-H1 with a norm before the gate is written",
        "export/gguf_families.py",
        "    if config.mamba_rms_norm and config.mamba_norm_before_gate:",
        "    if False:",
        "export/test_gguf_falcon_h1.py",
    ),
    Fault(
        "GGUF: a block that lacks one of two mixers is written",
        "export/gguf_families.py",
        "shape.parts not in decoder.architecture.whole for shape in shapes",
        "len(shape.parts) < 2 for shape in shapes",
        "export/test_gguf_falcon_h1.py",
    ),
    Fault(
        "GGUF: zeros of hidden units behind the gate and the other rows together",
        "export/gguf_tensors.py",
        "apart = tensor.unflatten(0, (parts, -1))\n        zeros = apart.new_zeros(parts, missing, *tensor.shape[1:])",
        "apart = tensor[None]\n        zeros = apart.new_zeros(1, parts * missing, *tensor.shape[1:])",
        "export/test_gguf_types.py",
    ),
    Fault(
        "GGUF: an importance without the zeros of its columns",
        "export/gguf_tensors.py",
        "every = [self.columns(squares[layer][None])[0] for layer in layers]",
        "every = [squares[layer] for layer in layers]",
        "export/test_gguf_types.py",
    ),
    Fault(
        "GGUF: every third layer with more bits, from another one on",
        "export/gguf_types.py",
        "(number - count // 8) % 3 == 2",
        "(number - count // 8) % 3 == 0",
        "export/test_gguf_types.py",
    ),
    Fault(
        "ggml: every expert has the importance of the first",
        "export/ggml.py",
        "every = importance.double().reshape(-1, importance.shape[-1]).expand(count, -1)",
        "every = importance.double().reshape(-1, importance.shape[-1])[:1].expand(count, -1)",
        "export/test_gguf_types.py",
    ),
    Fault(
        "importance: sums in place of means",
        "calibration/input_squares.py",
        "own.squares / max(own.tokens, 1)",
        "own.squares",
        "export/test_gguf_types.py",
    ),
    Fault(
        "decoded GGUF: zeros that fill up blocks are taken for weights",
        "export/gguf_decoded.py",
        "found[places[places > 0] - 1] = plain.flatten()[places > 0]",
        "found[(places - 1).clamp_min(0)] = plain.flatten()",
        "export/test_gguf_decoded.py",
    ),
    Fault(
        "frontier: a row in a gap between types wins",
        "comparison/frontier.py",
        "return self.smaller.bits_per_byte + max(share, 0.0) * rise",
        "return self.smaller.bits_per_byte",
        "comparison/test_frontier.py",
    ),
    Fault(
        "frontier: a row dominates its equal",
        "comparison/frontier.py",
        "return self.bits_per_byte < other.bits_per_byte or self.bytes * SAME_SIZE < other.bytes",
        "return True",
        "comparison/test_frontier.py",
    ),
    Fault(
        "frontier: speeds of other rows are taken",
        "comparison/frontier_folder.py",
        "if set(found) == set(names):",
        "if found:",
        "comparison/test_frontier.py",
    ),
    Fault(
        "frontier: the weights of another row are measured",
        "comparison/frontier_session.py",
        "            decode_into(",
        "            False and decode_into(",
        "comparison/test_frontier.py",
    ),
    Fault(
        "frontier: speeds of the prompt and of new tokens are exchanged",
        "comparison/frontier_session.py",
        "Speed(one.prefill.values, one.decode.values, one.peak_bytes)",
        "Speed(one.decode.values, one.prefill.values, one.peak_bytes)",
        "comparison/test_frontier.py",
    ),
    # Program, measure and healing
    Fault(
        "plan: Gram products cost nothing",
        "calibration/moments_pass.py",
        "return passing + gram_work(decoder, index, taps) * tokens + Work(",
        "return passing + Work(",
        "calibration/test_collected.py",
    ),
    Fault(
        "divergence: vocabularies are not compared",
        "measure/divergence.py",
        "if own != other:",
        "if False:",
        "measure/test_divergence.py",
    ),
    Fault(
        "healing: what is kept is cleared",
        "healing/zeros.py",
        "tensor.masked_fill_(self.kept[name].logical_not(), 0.0)",
        "tensor.masked_fill_(self.kept[name], 0.0)",
        "healing/test_zeros.py",
    ),
    Fault(
        "healing: filled zeros pass",
        "healing/zeros.py",
        "        if filled:",
        "        if False:",
        "healing/test_zeros.py",
    ),
    Fault(
        "healing: gradients are not clipped",
        "healing/training.py",
        "self.settings.clip)",
        "1e9)",
        "healing/test_heal.py",
    ),
    Fault(
        "healing: no warm-up",
        "healing/settings.py",
        "rising = round(self.warmup * steps)",
        "rising = 0",
        "healing/test_heal.py",
    ),
    Fault(
        "drafts: an attention in no module of its own is understood",
        "models/tracing/trace.py",
        "    if not module:\n        unplaced",
        "    if False:\n        unplaced",
        "models/test_tracing.py",
    ),
    Fault(
        "drafts: of many heads the first sixteen are looked at",
        "models/tracing/roles.py",
        "range(0, len(rows), SEQUENCES)",
        "range(0, min(len(rows), SEQUENCES), SEQUENCES)",
        "models/test_tracing.py",
    ),
    Fault(
        "recipes: a plain field is not set",
        "recipe/settings.py",
        'elif path not in ("units", "units.weights"):',
        'elif path not in ("units", "units.weights", "damping"):',
        "recipe/test_settings.py",
    ),
    Fault(
        "recipes: a later pattern does not override that of the units",
        "recipe/settings.py",
        "if units.family in (ANYWHERE, family) or age < 0:\n            return Weights(family)",
        "if units.family in (ANYWHERE, family):\n            return Weights(family)",
        "recipe/test_settings.py",
    ),
    Fault(
        "pages: what every window begins with is left out",
        "report/html_page.py",
        'start = f", each begun with {found.begin}" if found.begin else ""',
        'start = ""',
        "report/test_page.py",
    ),
    Fault(
        "records: a part of a message without its text passes",
        "texts/records.py",
        'return part["type"] != TEXT or isinstance(part.get(TEXT), str)',
        "return True",
        "texts/test_records.py",
    ),
    # Tokens
    Fault(
        "tokens: a kept token without its parts",
        "tokens/token_models.py",
        "        return found[::-1]\n",
        "        return [text]\n",
        "tokens/test_smaller_tokenizer.py",
    ),
    Fault(
        "tokens: parts are needed less for their tokens",
        "tokens/token_models.py",
        "needed[self._ids[part]] += needed[self._ids[text]]",
        "needed[self._ids[part]] -= needed[self._ids[text]]",
        "tokens/test_smaller_tokenizer.py",
    ),
    Fault(
        "tokens: the first token of a text keeps its old id",
        "tokens/tokenizer.py",
        "[new[index] for index in value] if name",
        "value if name",
        "tokens/test_smaller_tokenizer.py",
    ),
    Fault(
        "tokens: the padding row keeps its number",
        "tokens/rows.py",
        "vocabulary.new_ids.get(padding)",
        "padding",
        "tokens/test_rows.py",
    ),
    Fault(
        "tokens: a piece behind a token as if none went on",
        "tokens/targets.py",
        "(now * (ended / whole))",
        "now",
        "tokens/test_targets.py",
    ),
    Fault(
        "tokens: the states of the head weigh alike",
        "tokens/head.py",
        "- states.targets) * states.weights[:, None]",
        "- states.targets)",
        "tokens/test_refitted_rows.py",
    ),
    Fault(
        "tokens: the refit is left out",
        "tokens/prune.py",
        "            rows.head.weight.data[kept] = matched.rows.to(rows.head.weight.dtype)\n",
        "",
        "tokens/test_refitted_rows.py",
    ),
    Fault(
        "goals: a size is not asked for again when widths are rounded",
        "pruning/goal.py",
        "            if size <= self.bytes:\n",
        "            if tried:\n",
        "pruning/test_goals.py",
    ),
    Fault(
        "goals: a smaller vocabulary is not counted in a size",
        "program/program.py",
        "self.dense_numbers - self.vocabulary_removed - removed",
        "self.dense_numbers - removed",
        "pruning/test_goals.py",
    ),
    Fault(
        "goals: the first model that is timed is taken",
        "pruning/goal.py",
        "            slope = (1 - 1 / factor) / sparsity\n",
        "            break\n",
        "pruning/test_goals.py",
    ),
    Fault(
        "goals: a loss above the goal is taken",
        "pruning/goal.py",
        "if one[1] <= self.ratio]",
        "]",
        "pruning/test_goals.py",
    ),
    Fault(
        "goals: a run that is continued searches again",
        "cli/goal.py",
        "        if earlier is not None:\n",
        "        if False:\n",
        "pruning/test_goals.py",
    ),
    Fault(
        "files: a matrix with -0.0 and 0.0 counts as symmetric",
        "problems/files.py",
        "    bits = matrix.view(BITS[matrix.dtype])",
        "    bits = matrix",
        "problems/test_problem_files.py",
    ),
    Fault(
        "files: the digest of the tensors is not compared",
        "problems/files.py",
        '    if fingerprint(list(tensors.items())) != header["tensors"]:\n',
        "    if False:\n",
        "problems/test_problem_files.py",
    ),
    Fault(
        "files: the digest of the header is not compared",
        "problems/files.py",
        "    if digest != digest_of(header) or",
        "    if",
        "problems/test_problem_files.py",
    ),
    Fault(
        "files: the triangle is read one column late",
        "problems/files.py",
        "        found[row:, row] = part\n",
        "        found[row:, row] = part.roll(1)\n",
        "problems/test_problem_files.py",
    ),
    Fault(
        "solutions: the objective is not measured again",
        "solvers/files.py",
        "    if not math.isclose(objective, stated, rel_tol=0.0, abs_tol=2 * error):\n",
        "    if False:\n",
        "solvers/test_solution_files.py",
    ),
    Fault(
        "teacher: a window is read by single pieces",
        "tokens/targets.py",
        "range(min(longest, len(ids) - place), 1, -1)",
        "range(1, 1, -1)",
        "tokens/test_teacher.py",
    ),
    Fault(
        "healing: text for a smaller vocabulary has no removed tokens",
        "tokens/teacher.py",
        "self.push.new_ids(new)[: len(window)]",
        "self.push.new_ids(old)[: len(window)]",
        "tokens/test_teacher.py",
    ),
    Fault(
        "vocabulary: predictions do not count in the choice",
        "tokens/prune.py",
        "counts = counts + np.round(expected(windows) * (counts.sum() / windows.numel()), 2)",
        "expected(windows)",
        "tokens/test_expected_counts.py",
    ),
    Fault(
        "plan: predictions by which tokens are chosen take no time",
        "program/time.py",
        "return predicted + CHOICE * program.vocabulary",
        "return CHOICE * program.vocabulary",
        "program/test_plan.py",
    ),
    Fault(
        "plan: predictions by which tokens are chosen take no memory",
        "program/memory.py",
        'return [Part("imports", base, HOST), *_choice_of_tokens(program)]',
        'return [Part("imports", base, HOST)]',
        "program/test_plan.py",
    ),
    Fault(
        "texts: a digest is of the first document alone",
        "texts/calibration.py",
        "        for document in self.documents:\n            plain",
        "        for document in self.documents[:1]:\n            plain",
        "texts/test_calibration.py",
    ),
    Fault(
        "vocabulary: a run that goes on chooses its tokens again",
        "cli/tokens.py",
        "        if chosen is None:",
        "        if chosen is None or journal is not None:",
        "cli/test_chosen_tokens.py",
    ),
    Fault(
        "vocabulary: chosen tokens are not kept before the rows are refitted",
        "cli/prune_run.py",
        "        SharedJournal(journal, partial_sums.peers).begin(decided)\n",
        "        SharedJournal(None, partial_sums.peers).begin(decided)\n",
        "cli/test_chosen_tokens.py",
    ),
    Fault(
        "vocabulary: a run goes on with tokens of another text",
        "program/program.py",
        '{"the text of the vocabulary": self.request.text}',
        '{"the text of the vocabulary": "any"}',
        "cli/test_chosen_tokens.py",
    ),
    Fault(
        "vocabulary: a run goes on with tokens of another tokenizer",
        "program/program.py",
        '{"the tokenizer": self.request.tokenizer}',
        '{"the tokenizer": "any"}',
        "cli/test_chosen_tokens.py",
    ),
    Fault(
        "run folder: what a run without facts left is used by any other",
        "system/folders.py",
        "return self.read_as(name, parse) if self.begun and self.holds(name) else None",
        "return self.read_as(name, parse) if self.holds(name) else None",
        "cli/test_chosen_tokens.py",
    ),
    Fault(
        "run folder: what nobody can use is kept",
        "pruning/journal.py",
        "            return self.has_scratch",
        "            return True",
        "cli/test_chosen_tokens.py",
    ),
    Fault(
        "vocabulary: removed tokens in a text are all equally likely",
        "tokens/replacing.py",
        "torch.multinomial(among[place], 1, generator=generator)",
        "torch.multinomial(torch.ones_like(among[place]), 1, generator=generator)",
        "tokens/test_teacher.py",
    ),
    Fault(
        "healing: the head is trained though it is not asked for",
        "healing/training.py",
        "left = tables if head is None else [*tables, head]",
        "left = tables",
        "healing/test_heal.py",
    ),
    Fault(
        "vision: the config of a language part that was quantised still says so",
        "models/vision.py",
        "if name not in (*OF_CODE, QUANTISED)}",
        "if name not in OF_CODE}",
        "export/test_quantised_parts.py",
    ),
    Fault(
        "vision: other parts may be quantised",
        "models/vision.py",
        "for name in method.layers(around, self.source).keys() ^ around.keys():",
        "for name in ():",
        "export/test_quantised_parts.py",
    ),
    Fault(
        "teacher: what is inside of a token is read from its end",
        "tokens/teacher.py",
        "inside = ~push.ends(tokens)",
        "inside = push.ends(tokens)",
        "tokens/test_teacher.py",
    ),
    Fault(
        "own code: a run does not keep what it is",
        "program/program.py",
        "        own_code = self.request.recipe.own_code()\n",
        "        own_code = {}\n",
        "pruning/test_journal.py",
    ),
    Fault(
        "own code: a comparison does not keep what it is",
        "comparison/grid.py",
        "{name: found for name, recipe in first.items() if (found := recipe.own_code())}",
        "{}",
        "comparison/test_comparison_folder.py",
    ),
    Fault(
        "own code: functions that a function calls are left out",
        "numerics/fingerprint.py",
        "                    yield from _code_texts(named, package, seen)\n",
        "                    pass\n",
        "vocabulary/test_fingerprint.py",
    ),
    Fault(
        "notes: those of several layers show the numbers of the first",
        "pruning/layer.py",
        'return least if least == most else f"{least} to {most}"',
        "return least",
        "pruning/test_pipeline.py",
    ),
    Fault(
        "own code: a card says that the recipe file alone makes the model",
        "pruning/pipeline.py",
        "        own_code=program.request.recipe.own_code(),\n",
        "",
        "export/test_card.py",
    ),
    # Plans and the demo
    Fault(
        "the plan: a shortfall below a quarter passes",
        "program/room.py",
        "one.needed > one.there), None)",
        "one.needed > 1.25 * one.there), None)",
        "program/test_plan.py",
    ),
    Fault(
        "the plan: hidden states stay on the device where they do not fit",
        "program/room.py",
        'if program.request.states != "auto":',
        "if True:",
        "program/test_plan.py",
    ),
    Fault(
        "the demo: the reloaded column measures the model in memory",
        "cli/demo_run.py",
        "reloaded = _measure(again, ",
        "reloaded = _measure(loaded.model, ",
        "cli/test_cli.py",
    ),
    Fault(
        "vocabulary: the teacher's logits are neither scaled nor capped",
        "tokens/teacher.py",
        "scale_logits(self.model.config, self.rows.head(hidden.last_hidden_state[0]))",
        "self.rows.head(hidden.last_hidden_state[0])",
        "tokens/test_teacher.py",
    ),
    Fault(
        "questions: a token across the border is left out of the choice",
        "measure/questions.py",
        "shared = next((at for at, (one, other) in enumerate(pairs) if one != other), len(alone))",
        "shared = len(alone)",
        "measure/test_questions.py",
    ),
    Fault(
        "memory: a system that tells nothing is sampled",
        "measure/memory.py",
        "if self._largest is not None:",
        "if True:",
        "measure/test_memory.py",
    ),
    Fault(
        "plan: a probe is given too little text for its windows",
        "cli/plan.py",
        "needed = max(PIECE, CHARACTERS * probe_batches(resolved.program) * resolved.program.batch_tokens)",
        "needed = PIECE",
        "cli/test_plan_command.py",
    ),
    Fault(
        "plan: a dense block that is kept for a second path alone is not counted",
        "program/program.py",
        "return self.policy.dense_target or self.two_paths",
        "return self.policy.dense_target",
        "program/test_plan.py",
    ),
    Fault(
        "plan: a block with experts that is measured alone has none",
        "models/skeleton.py",
        "        setattr(config, field, value)\n    model = ",
        "        pass\n    model = ",
        "models/test_blocks_of_several_kinds.py",
    ),
]


def source(fault: Fault, tree: Path) -> Path:
    """Return the file of a fault in a tree. Raises SystemExit unless it has the text."""
    file = tree / "optprune" / fault.file
    if not file.is_file() or fault.old not in file.read_text(encoding="utf-8"):
        raise SystemExit(f"{fault.description}: optprune/{fault.file} has no {fault.old!r}: change the table of faults")
    return file


@contextmanager
def planted(fault: Fault, tree: Path) -> Iterator[None]:
    """Plant a fault in a tree: its text is replaced wherever it occurs in the file."""
    file = source(fault, tree)
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(text, encoding="utf-8")


def copy(tree: Path) -> None:
    """Copy the files that git lists into a folder."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        place = tree / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place)


def _tests(tests: str, tree: Path, log: Path) -> int:
    """Return the exit status of pytest for the tests of a tree, whose modules take the place of this one's."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.alarm(LONGEST)
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "OPTPRUNE_HYPOTHESIS": "unshrunk"}
    for name in list(sys.modules):
        if name.partition(".")[0] in ("optprune", "tests", "benchmarks"):
            del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    import pytest

    words = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not e2e", "-W", REIMPORTED]
    return int(pytest.main([*words, *(f"tests/{name}" for name in tests.split())]))


def run(tests: str, tree: Path, log: Path) -> str:
    """Return whether test files notice the fault in a tree, by running them in a forked process up to a failure."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = _tests(tests, tree, log)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: MISSED, 1: NOTICED, -signal.SIGALRM: SLOW}.get(status, BROKEN)


def rows() -> dict[str, str]:
    """Return the rows of the table by the descriptions of their faults."""
    lines = TABLE.read_text(encoding="utf-8").removeprefix(HEAD).splitlines() if TABLE.exists() else []
    return {line.removeprefix("| ").partition(" | ")[0]: line for line in lines}


def write(fault: Fault, found: str) -> None:
    """Write the row of a fault into the table, in the order of the faults, beside the rows of other faults."""
    row = f"| {fault.description} | `{fault.file}` | {fault.tests.replace(' ', ', ')} | {found} |"
    table = rows() | {fault.description: row}
    lines = [table[each.description] for each in FAULTS if each.description in table]
    TABLE.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Plant the faults, print what the tests said, and write it into the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="a text of the faults to plant")
    parser.add_argument("--missing", action="store_true", help="plant those without a row in the table")
    parser.add_argument("--check", action="store_true", help="plant nothing: look for the texts")
    asked = parser.parse_args()
    chosen = [each for each in FAULTS if asked.only in f"{each.description} {each.file} {each.tests}"]
    if asked.missing:
        in_table = rows()
        chosen = [each for each in chosen if each.description not in in_table]
    for each in chosen:
        source(each, ROOT)
    if asked.check:
        return
    for name in IMPORTS:
        __import__(name)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        tree, log = Path(folder) / "tree", Path(folder) / "log"
        copy(tree)
        for each in chosen:
            began = time.monotonic()
            with planted(each, tree):
                found = run(each.tests, tree, log)
            print(f"{found}: {each.description} ({each.file}, {time.monotonic() - began:.0f} s)", flush=True)
            if found in (BROKEN, SLOW):
                print(log.read_text(encoding="utf-8")[-1500:], flush=True)
            write(each, found)


if __name__ == "__main__":
    main()
