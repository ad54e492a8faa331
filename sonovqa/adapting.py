"""Attach to a loaded model what is to be trained: LoRA matrices on chosen layers, or every weight."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from sonovqa import devices, families, models
from sonovqa.cli import UserError


@dataclass(frozen=True)
class Adapting:
    """What is trained: LoRA's size and Unsloth's four toggles, or all weights; and whether activations are recomputed.

    Source: LoRA, arXiv:2106.09685; the toggles are those of Unsloth's ``FastVisionModel.get_peft_model``.
    """

    rank: int = 16
    alpha: int = 16
    dropout: float = 0.0
    vision: bool = True
    language: bool = True
    attention: bool = True
    mlp: bool = True
    full: bool = False
    checkpointing: bool = True
    seed: int = 42


def of_arguments(args: argparse.Namespace) -> Adapting:
    """What train.py's flags ask for."""
    toggles = (args.vision, args.language, args.attention, args.mlp)
    return Adapting(args.rank, args.alpha, args.dropout, *toggles, args.full, args.checkpointing, args.seed)


def adapt(loaded: models.Loaded, how: Adapting):
    """Attach what is to be trained and return the model: LoRA matrices, or every weight with ``how.full``.

    Raises:
        UserError: if the toggles leave nothing to train, or all weights of a quantised model were asked for.
    """
    model = loaded.model
    if how.full:
        if getattr(model, "is_quantized", False):
            raise UserError("--full; quantised weights cannot be trained; only 16 bits can; use --bits 16 with --full")
        model.requires_grad_(True)
        return model
    if not (how.vision or how.language) or not (how.attention or how.mlp):
        raise UserError("nothing to train: keep one of --vision/--language and one of --attention/--mlp on")
    if loaded.backend == "unsloth":
        import unsloth

        adapted = unsloth.FastVisionModel.get_peft_model(
            model, r=how.rank, lora_alpha=how.alpha, lora_dropout=how.dropout, bias="none", random_state=how.seed,
            finetune_vision_layers=how.vision, finetune_language_layers=how.language,
            finetune_attention_modules=how.attention, finetune_mlp_modules=how.mlp,
            use_gradient_checkpointing=devices.recomputing(how.checkpointing),  # its default overrides the loader's choice
        )  # fmt: skip
        if devices.processes() > 1:
            # unsloth_zoo 2026.10.7 (`peft_utils`, `register_other_hooks`) registers Unsloth's hook on the vision tower again, but
            # without the keyword arguments it needs, which ends the first step. This registers it as it was; for one process
            # Unsloth does so itself, with checkpointing TRL.
            adapted.enable_input_require_grads()
        return adapted
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(how.seed)
    names = lora_targets(model, how)
    return get_peft_model(
        model, LoraConfig(r=how.rank, lora_alpha=how.alpha, lora_dropout=how.dropout, bias="none", target_modules=names)
    )


def lora_targets(model, how: Adapting) -> list[str]:
    """Full names of the linear layers that ``how``'s toggles choose among its family's; the LM head is never one of them, nor
    a layer whose output is not read.

    A layer under one of the family's vision modules is vision's, every other language's; one with ``attn``/``attention`` in
    its name is attention's, every other (feed-forward layers and the merger between the towers) the MLP's, as Unsloth sorts
    them.
    """
    import torch

    family, head, unread = families.of(model.config), model.get_output_embeddings(), families.unread_layers(model.config)
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or module is head or any(part in name for part in unread):
            continue
        if family.lora.targets and name.rpartition(".")[2] not in family.lora.targets:
            continue
        side = how.vision if any(part in name for part in family.vision) else how.language
        part = how.attention if "attn" in name or "attention" in name else how.mlp
        if side and part:
            names.append(name)
    return names
