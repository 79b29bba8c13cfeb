"""`bwlm export`: a trained model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from bwlm.cli.terminal import Storage, say, show_sentences
from bwlm.progress import loading, working


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="ID[@STEP]",
            help="Id of the run; `bwlm runs list` shows all. ID@400 or ID@best: another checkpoint than its newest.",
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; new or empty.", show_default=False)],
    format_: Annotated[
        Literal["hf"], typer.Option("--format", help="hf: Hugging Face format, for transformers.")
    ] = "hf",
    storage: Storage = None,
) -> None:
    """Export a model with its tokenizer and a model card to a folder that Hugging Face transformers can load.

    Example: `bwlm export demo_forward_d1_lr4_s0 --format hf demo-forward`
    """
    from bwlm.record.experiment import find_checkpoint
    from bwlm.storage.opened import open_storage

    root = open_storage(storage)
    find_checkpoint(root, checkpoint)
    with loading():  # torch takes seconds: mistakes are reported first
        from bwlm.trained.export_hf import check_target, export_hf
        from bwlm.trained.load import load_model

    check_target(target)
    with working(f"exporting {checkpoint}"):
        loaded = load_model(root, checkpoint)
        export_hf(loaded, target)
    run, direction = loaded.config.id, loaded.config.experiment.direction
    if loaded.step < loaded.config.steps:
        say(f"{run}: step {loaded.step:,} of {loaded.config.steps:,}: the model has not finished training")
    show_sentences(f"{run}, step {loaded.step}, reads {direction}: {target / 'README.md'} says how to use it")
    print(f'model = transformers.AutoModelForCausalLM.from_pretrained("{target}")')
    print(f'tokenizer = transformers.AutoTokenizer.from_pretrained("{target}")')
