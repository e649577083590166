"""`lora merge`: adapters -> an ordinary Hugging Face folder, read back and compared before it is there."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from lora_cli import adapter, adapter_folder, card, launch, manifest, model, room, storage, tuned, verify
from lora_cli.adapter_folder import Origin
from lora_cli.errors import AdapterError, ModelError
from lora_cli.merged_folder import RECORD, Form, open_weights, require_space, write
from lora_cli.reports import Agreement, CombineReport, MergedLayer, MergeReport
from lora_cli.speed import measure_speeds
from lora_cli.tuned import Result
from lora_cli.update import DENSITIES, Method, Update

# Largest logit difference allowed, as a share of the largest logit, by the dtype the weights are written in.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Together:
    """How several adapters become one update; a weight of 1 each where none are given."""

    weights: Sequence[float] | None = None
    method: Method = "linear"
    density: float | None = None


ONE_EACH, AS_STORED = Together(), Form()


def merge(
    paths: Sequence[Path],
    output: Path,
    base: str | None = None,
    together: Together = ONE_EACH,
    form: Form = AS_STORED,
    force: bool = False,
    speed: bool = False,
) -> MergeReport:
    """Write base + adapters to `output` and prove it: read back from disk it must give the same logits.

    Raises AdapterError, with nothing left behind, when a tensor finds no place, or when the logits differ more than
    `BOUNDS` allows or than half of what the adapters do; such a merge is kept with `force`.
    """
    launch.require_alone("the disk sets the pace of a merge")
    room.require_new(output)
    results, update, skeleton = _open(paths, base, together)
    first = results[0]
    _require_quantised(results, form)
    weights = open_weights(first, skeleton, update, form.onto)
    require_space(weights, first.header.folder, output, form)
    with storage.new_directory(output) as folder, storage.explained(output):
        layers = write(weights, model.read_header(first.base), first.adapter.chat_templates, folder, form)
        agreement = verify.compare(first, update, folder, form.onto)
        dtypes = {form.dtype_of(weights.infos[name]) for name in weights.adapted}
        # A merge that lost half of what the adapter does is refused, however small that is against the logits.
        bound = min(max(BOUNDS.get(dtype, 0.0) for dtype in dtypes) * agreement.largest_logit, agreement.effect / 2)
        over = not agreement.largest_logit_difference <= bound
        if over and not force:
            raise AdapterError(_too_far(output, agreement, bound, layers))
        whose = "adapter" if len(results) == 1 else "first adapter"
        report = MergeReport(
            output=output,
            adapted_tensors=len(layers),
            dtype=", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
            rounding=form.rounding,
            layers=layers,
            agreement=agreement,
            bound=bound,
            forced=over,
            quantization=first.base.quantization,
            onto=form.onto,
            from_trained=verify.from_trained(first, update, form),
            speeds=measure_speeds(first, folder, whose) if speed else None,
        )
        storage.add_json(folder / RECORD, _record(results, update, report))
        if len(results) == 1:  # a card tells of one run
            card.write(folder, card.merged_card(first))
    return report


def combine(paths: Sequence[Path], output: Path, base: str | None, together: Together) -> CombineReport:
    """Write one adapter that does what several do together. Raises AdapterError."""
    launch.require_alone("the disk sets the pace of a merge")
    room.require_new(output)
    results, update, _ = _open(paths, base, together)
    first = results[0]
    adapter.require_low_rank(first.adapter, "`lora merge` writes base and adapter as one model.")
    found = {path: update.low_rank(path) for path in update.paths}
    with storage.new_directory(output) as folder, storage.explained(output):
        origin = Origin(
            first.adapter.base,
            first.adapter.revision,
            first.base_fingerprint,
            first.adapter.chat_templates,
        )
        transposed = adapter.is_transposed(first.adapter.folder)
        adapter_folder.save_factors(
            folder, {path: (down, up) for path, (down, up, _) in found.items()}, origin, transposed
        )
    return CombineReport(
        output=output,
        adapted_tensors=len(found),
        rank=max(len(down) for down, _, _ in found.values()),
        kept=min(kept for _, _, kept in found.values()),
    )


# --- before anything is written ---


def _open(paths: Sequence[Path], base: str | None, together: Together) -> tuple[list[Result], Update, nn.Module]:
    """Find the adapters, check that they belong to one base that can take them, and put them together.

    Returns the base without weights too.
    """
    results = [tuned.find(path, base) for path in paths]
    first = results[0]
    density = DENSITIES[together.method] if together.density is None else together.density
    weights = [1.0] * len(results) if together.weights is None else together.weights
    update = Update([each.adapter for each in results], weights, together.method, density)
    if len({each.base_fingerprint for each in results}) > 1:
        raise AdapterError("The adapters belong to different bases: " + ", ".join(map(str, paths)) + ".")
    for each in results:
        _require_unmerged(each)
    skeleton = model.build_skeleton(first.header, first.base.trust_remote_code)
    for each in results:
        adapter.require_fit(skeleton, each.adapter)
    if getattr(first.header.config, "quantization_config", None):
        raise ModelError(
            f"{first.header.folder}: its weights are stored quantised, and an update added to them would be rounded "
            "away or misread. Name the unquantised model with --base."
        )
    return results, update, skeleton


def _require_quantised(results: Sequence[Result], form: Form) -> None:
    """Raise AdapterError where an update cannot be added to what quantisation leaves of the base."""
    kinds = {each.base.quantization for each in results}
    if form.onto == "dequantised" and (None in kinds or len(kinds) > 1):
        found = ", ".join(f"{each.adapter.folder}: {each.base.quantization or 'not quantised'}" for each in results)
        raise AdapterError(
            f"--onto dequantised: the base must have been quantised, in one way, when it was trained ({found}). "
            "--onto stored takes any."
        )


def _require_unmerged(result: Result) -> None:
    """Raise AdapterError where the base holds this adapter already."""
    path = result.header.folder / RECORD
    if not path.is_file():
        return
    try:
        merged = {str(each["sha256"]) for each in json.loads(path.read_text(encoding="utf-8"))["adapters"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read: {error}.") from None
    if manifest.sha256(result.adapter.folder / adapter.WEIGHTS) in merged:
        raise AdapterError(
            f"{result.header.folder}: {result.adapter.folder} is merged into it already; name the base with --base."
        )


# --- after it ---


def _too_far(output: Path, agreement: Agreement, bound: float, layers: Sequence[MergedLayer]) -> str:
    kept = sorted(layer.kept for layer in layers if layer.kept is not None) or [1.0]
    return (
        f"{output}: the merged model's logits differ from base + adapter by up to "
        f"{agreement.largest_logit_difference:.3g}; at most {bound:.3g} is allowed. The adapter itself moves them by "
        f"up to {agreement.effect:.3g}. Of the updates {kept[0]:.0%} to {kept[-1]:.0%} are left after rounding: "
        "--dtype float32, or --rounding stochastic, keeps more; --force writes it all the same."
    )


def _record(results: Sequence[Result], update: Update, report: MergeReport) -> dict[str, object]:
    """Return what a merged folder says of its making: no path of this machine, and no result that is not its own."""
    agreement = report.agreement
    return {
        "base": Path(results[0].adapter.base).name or results[0].header.folder.name,
        "base_fingerprint": results[0].base_fingerprint,
        "adapters": [
            {"sha256": manifest.sha256(each.adapter.folder / adapter.WEIGHTS), "weight": weight}
            for each, weight in zip(results, update.weights, strict=True)
        ],
        "method": update.method,
        "dtype": report.dtype,
        "rounding": report.rounding,
        "quantization": report.quantization,
        "onto": report.onto,
        "from_trained": {onto: asdict(each) for onto, each in (report.from_trained or {}).items()},
        "largest_logit_difference": agreement.largest_logit_difference,
        "bound": report.bound,
        "mean_kl": agreement.mean_kl,
        "top1_agreement": agreement.top1_agreement,
    }
