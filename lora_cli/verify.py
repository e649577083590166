"""Whether a merged folder does what base + adapter does, on real rows, in float32 on a CPU."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli import model, streamed
from lora_cli.config import ModelConfig
from lora_cli.data_reader import held_out_of, run_to_end
from lora_cli.errors import UserError
from lora_cli.model import ModelHeader
from lora_cli.reports import Agreement
from lora_cli.streamed import CannotStream
from lora_cli.tuned import Result
from lora_cli.update import Update
from lora_cli.weights import Weights

_ROWS, _LONGEST = 4, 128
_OPERATIONS = 1.5e11  # of a pass, so that a large model is compared on fewer tokens
_SENTENCES = (
    "The library opens at nine on weekdays and at ten on Saturdays.",
    "def mean(values):\n    return sum(values) / len(values)",
    "To bake bread you need flour, water, salt and a little patience.",
)


@torch.inference_mode()
def compare(result: Result, update: Update, merged: Path) -> Agreement:
    """Run base + update and the merged folder, read from disk, on the same tokens."""
    parameters = sum(p.numel() for p in model.build_skeleton(result.header, result.base.trust_remote_code).parameters())
    ids = _probes(result, round(min(_ROWS * _LONGEST, max(64, _OPERATIONS / (2 * parameters)))))
    try:
        open_model = _from_disk
        plain, wanted = streamed.with_and_without(open_model(result.header, result.base), update, ids)
    except CannotStream:
        open_model = _loaded
        base = open_model(result.header, result.base)
        plain = streamed.logits(base, ids)
        with streamed.adding(base, update):
            wanted = streamed.logits(base, ids)
        del base
    section = result.base.model_copy(update={"path": str(merged), "revision": None})
    got = streamed.logits(open_model(model.read_header(section), section), ids)
    difference = float((got - wanted).abs().max())
    kl = F.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum") / len(got)
    return Agreement(
        positions=len(got),
        largest_logit_difference=difference,
        largest_logit=float(wanted.abs().max()),
        effect=float((wanted - plain).abs().max()),
        mean_kl=max(0.0, float(kl)),
        top1_agreement=float((got.argmax(-1) == wanted.argmax(-1)).float().mean()),
    )


def _from_disk(header: ModelHeader, section: ModelConfig) -> nn.Module:
    """Return a model that reads its weights as it runs. Raises CannotStream."""
    skeleton = model.build_skeleton(header, section.trust_remote_code)
    return streamed.open_model(header, Weights(header.folder, skeleton), section.trust_remote_code)


def _loaded(header: ModelHeader, section: ModelConfig) -> nn.Module:
    """Return a whole model in memory."""
    loaded = model.load_model(header, section.model_copy(update={"dtype": "float32"}), torch.device("cpu"))
    loaded.module.set_attn_implementation(loaded.own_attention)
    return loaded.module


def _probes(result: Result, tokens: int) -> Tensor:
    """Return tokens [B, T]: the beginnings of real rows of the run where they are still there, else of sentences."""
    rows: Sequence[Sequence[int]] = result.header.tokenizer(list(_SENTENCES))["input_ids"]
    if result.config is not None and result.data is not None:
        try:
            found, _, _ = run_to_end(held_out_of(result.data, result.config.seed, result.header))
            rows = [example.input_ids for example in found[: 2 * _ROWS]]
        except UserError:
            pass  # the data moved away: the comparison is as strict on any other text
    rows = sorted(rows, key=len)[-_ROWS:]
    length = max(1, min(len(rows[0]), tokens // len(rows)))
    return torch.tensor([list(row[:length]) for row in rows])
