"""Low-rank adapters (LoRA), through peft."""

from typing import Any

from pipeline.config_training import LoraConfig
from pipeline.errors import ConfigError


def add_adapters(model: Any, config: LoraConfig) -> Any:
    """Put low-rank adapters into a model, so that nothing else is trained; what merges them.

    Raises:
        ConfigError: The model has no such modules.
    """
    import peft  # of an extra

    try:
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,  # type: ignore[arg-type]  # a factor
                lora_dropout=config.dropout,
                target_modules=config.targets,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as err:
        raise ConfigError(f"train.lora.targets: {err}") from err
