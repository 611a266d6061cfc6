"""The arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a .gguf file, a hub name, or 'demo'.")]
SeqLength = Annotated[int, typer.Option("--seq-length", help="Tokens in a window.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results there as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it holds a model.")]
