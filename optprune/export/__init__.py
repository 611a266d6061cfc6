"""Export: folders of pruned models, whole or not at all, that are checked by loading them."""

from optprune.export.folder import save_pruned
from optprune.export.gguf_file import GgufFile, export_gguf
from optprune.export.healed import save_healed
from optprune.export.onnx_folder import OnnxFolder, export_onnx
from optprune.export.own_files import check_own_files
from optprune.export.place import check_output
from optprune.export.save import SavedModel, cast, save_model

__all__ = [
    "GgufFile",
    "OnnxFolder",
    "SavedModel",
    "cast",
    "check_output",
    "check_own_files",
    "export_gguf",
    "export_onnx",
    "save_healed",
    "save_model",
    "save_pruned",
]
