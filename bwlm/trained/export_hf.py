"""Writes a loaded model as a folder that `transformers` reads as its own `NanoChatForCausalLM`, card included.

Neither `transformers` nor `tokenizers` is needed: the formats are JSON and safetensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from bwlm.errors import UserError
from bwlm.model.gpt import NORM_EPS, ROPE_BASE
from bwlm.model.loss import LOGIT_CAP
from bwlm.paths import atomic_folder, write_json
from bwlm.text.hf_tokenizer import tokenizer_config, tokenizer_json
from bwlm.trained.chat_template import MARK, chat_template, ends
from bwlm.trained.load import LoadedModel
from bwlm.trained.model_card import model_card

_OUTSIDE_BLOCKS = {"embedding.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
_INSIDE_BLOCK = {
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "mlp.up.weight": "mlp.fc1.weight",
    "mlp.down.weight": "mlp.fc2.weight",
}


def export_hf(loaded: LoadedModel, target: Path) -> None:
    """Write the folder `target` whole or not at all.

    Raises `UserError` if `check_target` refuses it or a write fails.
    """
    target = check_target(target)
    weights = {_hf_name(name): tensor.float().cpu() for name, tensor in loaded.model.state_dict().items()}
    try:
        with atomic_folder(target) as folder:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            # safetensors writes files that only their owner may read, but this folder is meant to be shared
            (folder / "model.safetensors").chmod(folder.stat().st_mode & 0o666)
            write_json(folder / "config.json", _model_config(loaded))
            write_json(folder / "generation_config.json", _special_ids(loaded))
            _write_tokenizer(loaded, folder)
            (folder / "README.md").write_text(model_card(loaded), "utf-8")
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}): give another folder") from None
    except SafetensorError as error:
        raise UserError(f"{target}: cannot be written ({error}): give another folder") from None
    if not (target / "config.json").exists():  # the file system did not let us replace an empty folder
        raise UserError(f"{target}: cannot be replaced (is it a mount point?): give a folder inside it")


def check_target(target: Path) -> Path:
    """Return the real path of a new folder.

    Raises `UserError` unless it does not exist, or is empty and not the working folder.
    """
    target = target.expanduser().resolve()
    try:
        taken = target.exists() and (not target.is_dir() or target.samefile(".") or any(target.iterdir()))
    except OSError as error:
        raise UserError(f"{target}: cannot be read ({error.strerror}): give another folder") from None
    if taken:
        raise UserError(f"{target}: exists: give a new folder, or an empty one that is not the working folder")
    return target


def _hf_name(name: str) -> str:
    """Return transformers' name of a parameter. Raises `KeyError` if its model has no such parameter."""
    if not name.startswith("blocks."):
        return _OUTSIDE_BLOCKS[name]
    _, layer, parameter = name.split(".", maxsplit=2)
    return f"model.layers.{layer}.{_INSIDE_BLOCK[parameter]}"


def _model_config(loaded: LoadedModel) -> dict[str, Any]:
    shape, config = loaded.model.config, loaded.config
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": 4 * shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.sequence_length,
        "hidden_act": "relu2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(ROPE_BASE)},
        "final_logit_softcapping": LOGIT_CAP,
        "tie_word_embeddings": False,
        "dtype": "float32",
        **_special_ids(loaded),
        "bwlm": {
            "id": config.id,
            "phase": loaded.meta["phase"],
            "direction": loaded.meta["direction"],
            "reversal": config.experiment.data.reversal,
            "step": loaded.step,
            "fingerprint": config.fingerprint,
            "tokenizer": loaded.tokenizer.digest,
        },
    }


def _special_ids(loaded: LoadedModel) -> dict[str, int | list[int]]:
    """Return the ids of BOS, end and padding.

    A document ends where the next one begins, so BOS also ends a generated document; a message ends with its marker.
    """
    tokenizer, ending = loaded.tokenizer, ends(loaded.config.experiment, loaded.tokenizer)
    eos = ending if len(ending) > 1 else ending[0]
    return {"bos_token_id": tokenizer.bos, "eos_token_id": eos, "pad_token_id": tokenizer.pad}


def _write_tokenizer(loaded: LoadedModel, folder: Path) -> None:
    """Write the tokenizer and, for a model that has one, the chat template beside it."""
    tokenizer, experiment = loaded.tokenizer, loaded.config.experiment
    template = chat_template(experiment)
    mark = MARK if template else ""
    end = next(name for name, index in tokenizer.specials.items() if index == ends(experiment, tokenizer)[0])
    write_json(folder / "tokenizer.json", tokenizer_json(tokenizer, mark))
    write_json(folder / "tokenizer_config.json", tokenizer_config(loaded.model.config.sequence_length, end, mark))
    if template:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
