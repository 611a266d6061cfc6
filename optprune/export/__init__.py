"""Export: folders of pruned models, whole or not at all, that are checked by loading them."""

from optprune.export.folder import save_pruned
from optprune.export.save import SavedModel, cast, check_output, save_model

__all__ = ["SavedModel", "cast", "check_output", "save_model", "save_pruned"]
