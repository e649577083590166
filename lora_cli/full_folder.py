"""The files of a fully tuned model: its weights, under the names that its base's files have for them.

model.safetensors     in a checkpoint; a finished model has the files of its base
base.json             the fingerprint of the base it was trained from
chat_template.jinja   the chat template its rows were written with, where transformers looks for it
"""

from pathlib import Path

import torch
from torch import nn

from lora_cli import loading, storage
from lora_cli.adapter import BASE
from lora_cli.adapter_folder import Origin, save_templates
from lora_cli.base_folder import weight_files
from lora_cli.errors import AdapterError, ModelError
from lora_cli.tensor_file import read_all_infos, write_whole

WEIGHTS = "model.safetensors"


def names_in(module: nn.Module, base: Path) -> dict[str, str]:
    """Return the parameter of each tensor in a base's files that is one of them.

    Raises ModelError where a parameter is not there under a name and in a shape of its own: it could not be written.
    """
    infos = read_all_infos(weight_files(base))
    if loading.find_places(module, infos) is None:
        raise ModelError(
            f"{base}: its files hold weights in another form than the model runs with (as where experts are stored one "
            "by one), so that they could not be written back. lora.method: full cannot train it; lora can."
        )
    prefix = getattr(module, "base_model_prefix", "")
    found = (
        (loading.name_in(infos, name, prefix), name) for name, _ in module.named_parameters(remove_duplicate=False)
    )
    return {stored: name for stored, name in found if stored is not None}


def save(folder: Path, module: nn.Module, origin: Origin) -> None:
    """Write the weights of a fully tuned model into a checkpoint."""
    assert origin.folder is not None, "the base is loaded"
    names = names_in(module, origin.folder)
    write_whole(folder / WEIGHTS, {stored: module.get_parameter(name) for stored, name in names.items()})
    save_base(folder, origin)
    save_templates(folder, origin.chat_templates)


def save_base(folder: Path, origin: Origin) -> None:
    """Write which base a tuned model's folder comes from."""
    storage.add_json(folder / BASE, {"fingerprint": origin.base_fingerprint})


@torch.no_grad()
def load(folder: Path, module: nn.Module) -> None:
    """Read the weights of a tuned model into its base, which is prepared to be trained. Raises AdapterError."""
    places = loading.find_places(module, read_all_infos(weight_files(folder)))
    if places is None:
        raise AdapterError(f"{folder}: its weights are not those of this base model; fetch or copy it again.")
    for piece in loading.read_pieces(places):
        parameter = module.get_parameter(piece.name)
        (parameter[piece.begin : piece.end] if parameter.ndim else parameter).copy_(piece.rows)
