"""What a run makes: an adapter, or a whole model where all of it is trained (lora.method: full)."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lora_cli import adapter, adapter_folder, card, full_folder, merged_folder, model, storage
from lora_cli.adapter_folder import Origin
from lora_cli.base_folder import weight_files
from lora_cli.config import RunConfig
from lora_cli.records import Finished
from lora_cli.run_dir import RunDir
from lora_cli.tensor_file import read_all_infos
from lora_cli.weights import Weights


@dataclass(frozen=True)
class Product:
    """How it is written, into checkpoints and at the end."""

    config: RunConfig
    run: RunDir
    origin: Origin

    @property
    def place(self) -> Path:
        """Where it stands when the run is finished."""
        return self.run.result(self.config.lora.method)

    def save(self, folder: Path, module: nn.Module) -> None:
        """Write what is trained into a checkpoint's folder."""
        if self.config.lora.method == "full":
            full_folder.save(folder, module, self.origin)
        else:
            adapter_folder.save(folder, module, self.config.lora, self.origin)

    def finish(self, chosen: Path, module: nn.Module, finished: Finished) -> None:
        """Write the result out of the chosen checkpoint; it appears whole or not at all."""
        with storage.explained(self.place), storage.new_directory(self.place) as folder:
            if self.config.lora.method == "full":
                self._write_model(chosen, module, folder)
                card.write(folder, card.full_card(chosen, self.origin, self.run, finished))
            else:
                adapter_folder.copy(chosen, folder)
                card.write(folder, card.peft_card(adapter.read(chosen), self.run, finished))

    def _write_model(self, chosen: Path, module: nn.Module, folder: Path) -> None:
        """Write the files of the base with the chosen checkpoint's weights in them."""
        own = model.read_header(self.config.model)
        tuned = read_all_infos(weight_files(chosen))
        weights = Weights(own.folder, module, tuned=tuned)
        merged_folder.write(weights, own, self.origin.chat_templates, folder, merged_folder.Form("float32"))
        full_folder.save_base(folder, self.origin)
