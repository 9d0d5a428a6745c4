"""Models: from files of this node to a tokenizer, a config, or a model that is resident.

Where the files come from is model_files.py's affair. No code of a model is ever run.
"""

import hashlib
import os
import shutil
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from pipeline.errors import ModelError
from pipeline.model_files import description_files, local_directory
from pipeline.settings import ModelRef

_WRITTEN_WITH_WEIGHTS = {
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "_MANIFEST.json",
}


def load_tokenizer(ref: ModelRef) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: It has none.
    """
    directory = local_directory(ref, weights=False)
    names = set(os.listdir(directory))
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"}:
        raise ModelError(
            f"model.path {ref.path}: it has no tokenizer (has: {', '.join(sorted(names))}). "
            "Put its tokenizer.json and tokenizer_config.json beside the weights."
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ModelError(f"model.path {ref.path}: its tokenizer cannot be read: {err}") from err
    return tokenizer


def load_config(ref: ModelRef) -> Any:
    """The architecture's config; what is asked of it is said of its `get_text_config()`.

    Raises:
        ModelError: It is missing, or of no architecture that transformers knows.
    """
    directory = local_directory(ref, weights=False)
    if os.path.exists(os.path.join(directory, "adapter_config.json")):
        raise ModelError(
            f"model.path {ref.path}: an adapter lies in it (adapter_config.json), which is loaded "
            "or not depending on what is installed. Merge it (peft: merge_and_unload) and save the "
            "whole model, or take its files away."
        )
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as err:
        raise ModelError(f"model.path {ref.path}: its config cannot be read: {err}") from err
    return config


def outline(config: Any) -> Any:
    """A model of an architecture without the memory of its weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError as err:
        raise ModelError(f"model: {config.model_type} is no causal language model: {err}") from err


def load(ref: ModelRef, dtype: torch.dtype, device: torch.device, num_devices: int = 1) -> Any:
    """Load the model for inference.

    Args:
        ref: Of its files.
        dtype: Of its weights.
        device: Where it goes.
        num_devices: GPUs over which its layers are spread, equally, where one is too small.

    Raises:
        ModelError: It cannot be read, it does not fit, or weights are missing, which transformers
            would fill with random numbers.
    """
    transformers.utils.logging.disable_progress_bar()
    directory = local_directory(ref)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            device_map="balanced" if num_devices > 1 else None,
        )
    except (OSError, ValueError, KeyError) as err:
        raise ModelError(f"model.path {ref.path}: cannot be loaded: {err}") from err
    model, info = loaded
    if info["missing_keys"]:
        raise ModelError(
            f"model.path {ref.path}: its weights lack {', '.join(sorted(info['missing_keys'])[:5])}"
        )
    for config in (model.config, model.config.get_text_config()):
        config.return_dict = True  # files may ask for tuples, which transformers trips over itself
    if num_devices == 1:
        return model.to(device)
    places = {str(parameter.device) for parameter in model.parameters()}
    places |= set(map(str, getattr(model, "hf_device_map", {}).values()))
    if elsewhere := {"cpu", "disk", "meta"} & places:
        raise ModelError(
            f"model.path {ref.path}: it does not fit {num_devices} GPUs, part of it went to the "
            f"{' and '.join(sorted(elsewhere))}. Raise cluster.gpus_per_actor."
        )
    return model


def copy_tokenizer(ref: ModelRef, into: str) -> None:
    """Copy what describes a model but is neither weights nor config, file by file.

    A tokenizer that is loaded and saved again may come out as another one.
    """
    directory = local_directory(ref, weights=False)
    for name in description_files(directory):
        if name not in _WRITTEN_WITH_WEIGHTS:
            shutil.copyfile(os.path.join(directory, name), os.path.join(into, name))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that turns text into ids."""
    state = tokenizer.backend_tokenizer.to_str()
    state += "split special tokens" * tokenizer.split_special_tokens  # no part of the state
    return hashlib.sha256(state.encode()).hexdigest()
