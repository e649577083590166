"""What learning rates do: LoRA+ as a ratio, and what alpha, the start of A and both rates have in common."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import build_examples, one_batch

from lora_cli import adapter, config_file, lora, model
from lora_cli.config import LoraConfig, ModelConfig, TrainConfig
from lora_cli.forward import target_loss
from lora_cli.interrupt import StopRequest
from lora_cli.optim import build_optimizer, set_rate, start_rate
from lora_cli.records import Finished
from lora_cli.train import train


def trained(folder: str, rows: str, alpha: float, start: float, rate: float, ratio: float) -> list[float]:
    """The losses of 30 steps on the same rows, A started so many times as large."""
    base = ModelConfig(path=folder)
    header = model.read_header(base)
    loaded = model.load_model(header, base, torch.device("cpu"))
    examples, _ = build_examples(rows, header.tokenizer)
    lora.apply_lora(loaded.module, LoraConfig(rank=4, alpha=alpha), seed=0)
    parameters = lora.trainable(loaded.module)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith("lora_A"):
                parameter *= start
    optimizer = build_optimizer(parameters, TrainConfig(loraplus_ratio=ratio))
    for group in optimizer.param_groups:
        group["eps"] = 1e-20  # what is not scaled with the rest
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = target_loss(loaded, one_batch(examples[:4]))
        (loss.total / loss.targets).backward()
        set_rate(optimizer, rate)
        optimizer.step()
        losses.append(loss.mean)
    return losses


@pytest.mark.parametrize(("p", "q"), [(2.0, 1.0), (1.0, 4.0), (0.5, 8.0), (3.0, 0.2)])
def test_only_two_of_alpha_start_and_rates_are_free(
    p: float, q: float, model_folder: Callable[[str], str], rows_file: str
):
    """Adam does not see the size of a gradient, so A p times and B q times as large and as fast is the same training.

    alpha is then divided by p q (LoRA Without Regret, section on parametrisation).
    """
    folder = model_folder("llama")
    plain = trained(folder, rows_file, 16.0, 1.0, 2e-3, 1.0)
    scaled = trained(folder, rows_file, 16.0 / (p * q), p, 2e-3 * p, q / p)

    assert plain[-1] < 0.8 * plain[0]
    assert scaled == pytest.approx(plain, rel=1e-4)


def test_a_ratio_of_rates_is_that_of_the_first_updates(make_config: Callable[..., Path], tmp_path: Path):
    """Adam's first update is as large as the rate: lora_B's is four times what it is without."""
    moved = {}
    for ratio in (1.0, 4.0):
        settings = {
            "train.loraplus_ratio": ratio,
            "train.max_steps": 1,
            "data.validation": 0,
            "train.warmup_ratio": 0.0,
        }
        config = config_file.load(make_config(**settings, output_dir=f"{tmp_path}/{ratio}"))
        assert isinstance(list(train(config, StopRequest()))[-1], Finished)
        found = adapter.read(tmp_path / str(ratio) / "adapter")
        moved[ratio] = torch.cat([tensor.flatten() for tensor in found.lora_B.values()])

    assert moved[1.0].abs().max() > 1e-3
    assert torch.allclose(moved[4.0], 4 * moved[1.0], rtol=1e-4)


def test_the_usual_rate_falls_with_scale_and_ratio(make_config: Callable[..., Path]):
    """With the root of both; that of PiSSA and of full fine-tuning is a tenth."""

    def usual(*settings: str) -> float:
        return start_rate(2000, config_file.load(make_config(**{"lora.rank": 16, "lora.alpha": 32.0}), settings))

    assert usual() == 5e-4
    assert usual("lora.alpha=128") == 2e-4
    assert usual("lora.method=rslora", "lora.rank=256") == 1e-4
    assert usual("train.loraplus_ratio=16") == 1e-4
    assert usual("lora.init=pissa") == 5e-5
