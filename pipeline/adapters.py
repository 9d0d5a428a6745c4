"""Low-rank adapters (LoRA), through peft."""

import warnings
from typing import Any

import torch

from pipeline.config_training import LoraConfig
from pipeline.errors import ConfigError


def add_adapters(model: Any, config: LoraConfig, seed: int) -> Any:
    """Put low-rank adapters into a model, so that nothing else is trained; what merges them.

    They begin at random, by the seed: alike in every worker, whatever it did before.

    Raises:
        ConfigError: The model has no such modules.
    """
    import peft  # of an extra

    torch.manual_seed(seed)
    adapters = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # a factor
        lora_dropout=config.dropout,
        target_modules=config.targets,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():  # peft asks transformers by a name that it will lose
            warnings.simplefilter("ignore", FutureWarning)
            return peft.get_peft_model(model, adapters)
    except ValueError as err:
        raise ConfigError(f"train.lora.targets: {err}") from err
