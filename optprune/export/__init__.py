"""Export of models: folders for transformers, GGUF files, ONNX; each appears whole or not at all, and is checked."""

from optprune.export.exporter import Draft, Exported, Exporter, ModelSource, export
from optprune.export.folder import SavedModel, TransformersFolder, cast, save_model, save_pruned
from optprune.export.gguf_experts import GgufExperts
from optprune.export.gguf_file import GgufFile
from optprune.export.hub import push_to_hub
from optprune.export.importance import Importance, importance_of
from optprune.export.onnx_folder import OnnxFolder
from optprune.export.packed_folder import PackedFolder
from optprune.export.place import check_output
from optprune.export.serving import Serving, serving
from optprune.export.source_files import check_own_files

EXPORTERS: dict[str, type[Exporter]] = {
    GgufFile.name: GgufFile,
    OnnxFolder.name: OnnxFolder,
    PackedFolder.name: PackedFolder,
    TransformersFolder.name: TransformersFolder,
}
"""the shipped exporters, by the name of their format"""

__all__ = [
    "EXPORTERS",
    "Draft",
    "Exported",
    "Exporter",
    "GgufExperts",
    "GgufFile",
    "Importance",
    "ModelSource",
    "OnnxFolder",
    "PackedFolder",
    "SavedModel",
    "Serving",
    "TransformersFolder",
    "cast",
    "check_output",
    "check_own_files",
    "export",
    "importance_of",
    "push_to_hub",
    "save_model",
    "save_pruned",
    "serving",
]
