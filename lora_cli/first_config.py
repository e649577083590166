"""A config for what was seen: which keys get another value than their default, and why. Pure."""

from collections.abc import Iterator

from lora_cli.config import RunConfig
from lora_cli.init_report import Decision, Fit, Survey
from lora_cli.records import gigabytes
from lora_cli.schema import rules

_FEWEST_ROWS = 10  # of which some can be held out
_FEW_ROWS, _MANY_ROWS = 200, 20_000  # of which a tenth is too few, or more than a validation pass needs
_ENOUGH_HELD_OUT = 1000
_FEWEST_STEPS = 8  # in an epoch; a smaller batch makes more of them
_STEPS_A_PASS = 5  # steps at least between two validation passes
_MANY_EXAMPLES, _VERY_MANY = 10_000, 50_000  # of which two passes do, and one
_STEPS_TO_TRY = 100  # of a run of so many, a tenth of the steps ranks learning rates (docs/hyperparameters.md)
_BUDGET = 0.1  # nats a token
_SHORTEST = 64  # tokens a data.max_length has at least
_SHARED = 0.95  # of the rows; where there are fewer prompts it is worth a word


def decide(seen: Survey, keep: bool = False) -> list[Decision]:
    """Return what differs from the defaults; `keep`: what the model knows beyond the task is to stay."""
    made: list[Decision] = []
    if seen.data is not None:
        made += [Decision(key, value, seen.data.reasons[key]) for key, value in seen.data.settings.items()]
        made += _of_rows(seen)
        if seen.data.counts is not None:
            made += _of_length(seen)
    made += _of_memory(seen)
    if keep:
        made.append(Decision("eval.forgetting_budget", _BUDGET, "what it knows is to stay: nats on general text"))
    order = [key for key, _ in rules(RunConfig)]
    return sorted(made, key=lambda each: order.index(each.key))


def warnings(seen: Survey, keep: bool = False) -> Iterator[str]:
    """Iterate over what to know of the data, the model and the machine before training."""
    yield from seen.warnings
    if keep:
        yield "Where it was measured, general rows mixed in (data.replay) did most against forgetting; name yours."
    data, model, fit = seen.data, seen.model, _fit(seen)
    if data is not None and "chosen" in str(data.settings):
        yield "The rows are preference pairs: their chosen answers are learned, and nothing from the rejected ones."
    if data is not None and data.rows < _FEWEST_ROWS:
        yield f"{data.rows} rows are too few to hold some out: nobody sees when training makes the model worse."
    if data is not None and data.prompts is not None and 1 < data.prompts < _SHARED * data.rows:
        yield (
            f"{data.rows:,} rows ask {data.prompts:,} different prompts; rows with the same prompt stay on one side of "
            "the split (data.split_by)."
        )
    if fit is not None and data is not None and data.counts is not None and fit.longer:
        share = fit.longer / data.counts.examples
        yield f"Longer than {fit.length:,} tokens: {share:.1%} of the sequences; see data.too_long."
    if fit is not None and fit.fits is False:
        yield (
            f"It does not fit: about {gigabytes(fit.total)} are needed and {gigabytes(fit.free or 0)} are free. A "
            "smaller model fits, or several devices with train.shard."
        )
    if model is not None and not model.weights:
        yield "The model's weights are not here; `lora train` fetches them."
    if seen.machine is not None and seen.machine.devices > 1:
        count = seen.machine.devices
        yield f"There are {count} GPUs: `lora train CONFIG --nproc {count}` uses them all."


def _fit(seen: Survey) -> Fit | None:
    return seen.machine.fits[-1] if seen.machine is not None and seen.machine.fits else None


# --- rows ---


def _of_rows(seen: Survey) -> Iterator[Decision]:
    """Decide what depends on how many rows there are: what is held out, passes, batch, rate, how often is measured."""
    assert seen.data is not None
    rows, held_out = seen.data.rows, seen.data.rows // 10
    if rows < _FEWEST_ROWS:
        held_out = 0
        yield Decision("data.validation", 0, f"of {rows} rows none can be spared")
    elif rows < _FEW_ROWS:
        held_out = max(2, min(20, rows // 5))
        yield Decision("data.validation", held_out, f"a tenth of {rows} rows would say little")
    elif rows > _MANY_ROWS:
        held_out = _ENOUGH_HELD_OUT
        yield Decision("data.validation", held_out, f"so many are enough; a tenth of {rows:,} rows would cost time")
    if held_out and seen.data.prompts == 1:
        yield Decision("data.split_by", "row", "all rows have the same prompt")
        yield Decision("data.allow_overlap", True, "all rows have the same prompt")
    examples = rows - held_out
    batch = next((size for size in (16, 8, 4) if examples >= size * _FEWEST_STEPS), 2)
    steps = -(-examples // batch)
    if batch != 16:
        yield Decision("train.batch_size", batch, f"{examples} rows make {steps} steps an epoch")
    epochs = 1 if examples >= _VERY_MANY else 2 if examples >= _MANY_EXAMPLES else 3
    if epochs != 3:
        yield Decision("train.epochs", epochs, f"{examples:,} rows make {steps:,} steps an epoch")
    if held_out and steps < 4 * _STEPS_A_PASS:
        passes = max(1, steps // _STEPS_A_PASS)
        yield Decision("eval.per_epoch", passes, f"an epoch has {steps} steps")
        yield Decision("save.per_epoch", passes, f"an epoch has {steps} steps")
    yield from _of_rate(seen, steps * epochs, bool(held_out))


def _of_rate(seen: Survey, steps: int, held_out: bool) -> Iterator[Decision]:
    if held_out and steps >= _STEPS_TO_TRY:
        yield Decision("train.learning_rate", "auto", f"four rates are tried on a tenth of the {steps:,} steps each")
    elif seen.model is not None:
        few = f"{steps} steps are too few to try any" if held_out else "without validation rows none can be tried"
        reason = f"usual for a model of width {seen.model.width}; {few}"
        yield Decision("train.learning_rate", seen.model.usual_rate, reason)


# --- length and memory ---


def _of_length(seen: Survey) -> Iterator[Decision]:
    """Decide how long sequences may be: all that there are, where the model has the positions and they fit."""
    assert seen.data is not None
    assert seen.data.counts is not None
    longest, examples, fit = seen.data.longest, seen.data.counts.examples, _fit(seen)
    positions = seen.model.positions if seen.model else None
    if fit is None or not fit.longer:
        room = 1 << (max(longest, _SHORTEST) - 1).bit_length()  # the next power of two
        yield Decision("data.max_length", min(room, positions or room), f"the longest example is {longest:,} tokens")
        return
    why = f"the model has no more positions; the longest example is {longest:,} tokens"
    if fit.length != positions:
        why = f"99 % of the examples are no longer; the longest, {longest:,} tokens, does not fit into memory"
    yield Decision("data.max_length", fit.length, why)
    only_text = set(seen.data.formats) == {"text"}
    if only_text or fit.longer > examples / 2:
        why = f"{fit.longer:,} of {examples:,} examples are longer" + ("" if only_text else "; their answers are cut")
        yield Decision("data.too_long", "truncate", why)
    else:
        yield Decision("data.too_long", "drop", f"leaves out {fit.longer:,} of {examples:,} examples")


def _of_memory(seen: Survey) -> Iterator[Decision]:
    """Decide what makes training fit."""
    fit = _fit(seen)
    if fit is None or seen.machine is None:
        return
    first = seen.machine.fits[0]
    for key, value in fit.settings.items():
        without = f"without it about {gigabytes(first.total)} are needed, and {gigabytes(first.free or 0)} are free"
        yield Decision(key, value, without)
