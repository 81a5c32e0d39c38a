"""openpi's policies, pi0 and pi0.5: the tables, the facts that no shape tells, the configs.

A policy is a SigLIP tower, a projector, two Gemma experts and a few dense layers for states,
actions and time. Leaves: openpi, models/pi0.py; PyTorch names: models_pytorch/pi0_pytorch.py.
"""

from __future__ import annotations

from bridge import (
    AssetDirectory,
    Family,
    Form,
    Layout,
    LecunNormal,
    Model,
    Multiple,
    Number,
    Option,
    Part,
    Resize,
    Rule,
    State,
    Unused,
    Zeros,
)

from . import lerobot, lerobot_before, policy_facts
from .configs import companions, known_model, known_sizes
from .gemma import expert
from .pi0_actions import IN_TRANSFORMERS
from .siglip import tower
from .widths import robot_widths

_PALIGEMMA = "paligemma_with_expert.paligemma"
_EXPERT = "paligemma_with_expert.gemma_expert"
_EMBEDDING = f"{_PALIGEMMA}.model.language_model.embed_tokens.weight"


def _dense(name: str, inner: str, outer: str) -> tuple[Rule, ...]:
    return (
        # as nnx.Linear starts (flax, nnx/nn/linear.py)
        Rule(f"{name}/kernel", f"{name}.weight", f"{inner} {outer} -> {outer} {inner}", start=LecunNormal()),
        Rule(f"{name}/bias", f"{name}.bias", f"{outer} -> {outer}", start=Zeros()),
    )


_OPENPI = Layout(
    name="openpi",
    loading="""\
from safetensors.torch import load_model
from peft import PeftModel

policy = PI0Pytorch(config)  # openpi, models_pytorch/pi0_pytorch.py
load_model(policy, "BASE/model.safetensors")
policy = PeftModel.from_pretrained(policy, "ADAPTER")""",
)

#: transformers, models/pi0/modeling_pi0.py: the names of PI0ForConditionalGeneration's own modules
_TRANSFORMERS = Layout(
    name="transformers",
    prefixes=(
        (f"{_PALIGEMMA}.model.vision_tower.vision_model.", "model.vlm.vision_tower."),
        (f"{_PALIGEMMA}.model.multi_modal_projector.", "model.vlm.multi_modal_projector."),
        (f"{_PALIGEMMA}.model.language_model.", "model.vlm.language_model."),
        (f"{_PALIGEMMA}.lm_head.", "model.vlm.language_model.embed_tokens."),
        (f"{_EXPERT}.model.", "model.dit."),
        (f"{_EXPERT}.lm_head.", "model.dit.embed_tokens."),
        ("action_in_proj.", "embed_action_time.action_in_proj."),
        ("state_proj.", "embed_action_time.state_proj."),
        ("action_time_mlp_in.", "embed_action_time.action_time_mlp_in."),
        ("action_time_mlp_out.", "embed_action_time.action_time_mlp_out."),
    ),
    loading="""\
from transformers import PI0ForConditionalGeneration
from peft import PeftModel

policy = PI0ForConditionalGeneration.from_pretrained("BASE")
policy = PeftModel.from_pretrained(policy, "ADAPTER")""",
)

#: lerobot, policies/pi0/modeling_pi0.py: openpi's names under the policy's `model`, nothing tied
_LEROBOT = Layout(
    name="lerobot",
    prefixes=(("", "model."),),
    ties=False,
    needs_base_name=True,
    facts=lerobot_before.BUFFER,
    loading="""\
from lerobot.policies.pi0.modeling_pi0 import PI0Policy  # pi05: PI05Policy
from peft import PeftModel

policy = PI0Policy.from_pretrained("BASE")
policy = PeftModel.from_pretrained(policy, "ADAPTER")""",
)

#: lerobot 0.1 to 0.3, policies/pi0/modeling_pi0.py: names of transformers before 4.52, and norm stats in the file
_LEROBOT_BEFORE = Layout(
    name=lerobot_before.LAYOUT,
    prefixes=(
        (f"{_PALIGEMMA}.model.vision_tower.", f"model.{_PALIGEMMA}.vision_tower."),
        (f"{_PALIGEMMA}.model.multi_modal_projector.", f"model.{_PALIGEMMA}.multi_modal_projector."),
        (f"{_PALIGEMMA}.model.language_model.", f"model.{_PALIGEMMA}.language_model.model."),
        (f"{_PALIGEMMA}.lm_head.", f"model.{_PALIGEMMA}.language_model.lm_head."),
        ("", "model."),
    ),
    replaced_by="lerobot",
    facts=lerobot_before.BUFFER,
)


def _model(name: str, *, adaptive: bool, fused_qkv: bool) -> Model:
    projections = (
        *_dense("action_in_proj", "action", "width"),
        *_dense("action_out_proj", "width", "action"),
        *(
            (*_dense("time_mlp_in", "time", "width"), *_dense("time_mlp_out", "width", "mixed"))
            if adaptive
            else (
                *_dense("state_proj", "state", "width"),
                *_dense("action_time_mlp_in", "action_time", "width"),
                *_dense("action_time_mlp_out", "width", "mixed"),
            )
        ),
    )
    gemma = ["layer", "head", "dim"] + ([] if fused_qkv else ["group"])
    return Model(
        name=name,
        parts=(
            Part("siglip", tower(f"{_PALIGEMMA}.model.vision_tower.vision_model")),
            Part(
                "projector",
                (
                    Rule("PaliGemma/img/head/kernel", f"{_PALIGEMMA}.model.multi_modal_projector.linear.weight",
                         "image width -> width image"),
                    Rule("PaliGemma/img/head/bias", f"{_PALIGEMMA}.model.multi_modal_projector.linear.bias",
                         "width -> width"),
                ),
            ),
            Part(
                "paligemma",
                (
                    Rule("PaliGemma/llm/embedder/input_embedding", f"{_PALIGEMMA}.lm_head.weight",
                         "vocab width -> vocab width"),
                    *expert("", f"{_PALIGEMMA}.model.language_model", fused_qkv=fused_qkv, adaptive=False),
                ),
                stock_alpha={16: 16.0},
            ),
            Part(
                "expert",
                expert("_1", f"{_EXPERT}.model", fused_qkv=fused_qkv, adaptive=adaptive),
                stock_alpha={32: 32.0},
            ),
            Part("projections", projections),
        ),
        same=(
            *((f"paligemma.{axis}", f"expert.{axis}") for axis in gemma),
            ("siglip.width", "projector.image"),
            ("paligemma.width", "projector.width"),
            ("expert.width", "projections.width", "projections.mixed", *(("projections.time",) if adaptive else ())),
            *(() if adaptive else (("projections.action", "projections.state"),)),
        ),
        multiples=(
            Multiple("expert.modulation", 3, "expert.width")
            if adaptive
            else Multiple("projections.action_time", 2, "projections.width"),
        ),
        # openpi's PyTorch keeps one tensor under both names, and its strict loader wants this one in the file
        tied={_EMBEDDING: f"{_PALIGEMMA}.lm_head.weight"},
        # LeRobot keeps two. A policy predicts no tokens: the head has no gradient, and stays what it was
        # (lerobot, policies/pi0/modeling_pi0.py, embed_language_tokens)
        applied=frozenset({_EMBEDDING}),
        unused=(
            Unused(
                f"{_EXPERT}.lm_head.weight",
                ("paligemma.vocab", "expert.width"),
                "the action expert predicts no tokens; strict loaders want the name",
            ),
        ),
        # every Gemma of openpi and its one SigLIP have these (models/gemma.py, models/siglip.py)
        stock={"paligemma.dim": 256, "siglip.head": 16},
        # transformers has no pi0.5, and LeRobot had none in those names
        layouts=(_OPENPI, _LEROBOT) if adaptive else (_OPENPI, _LEROBOT, _TRANSFORMERS, _LEROBOT_BEFORE),
    )  # fmt: skip


def _has_weights(source: State, target: State) -> bool:
    return target.form is not Form.ADAPTER


FAMILY = Family(
    name="openpi",
    noun="policy",
    part_noun="expert",
    models=tuple(
        _model(name, adaptive=adaptive, fused_qkv=fused_qkv)
        for name, adaptive in (("pi0", False), ("pi05", True))
        for fused_qkv in (False, True)
    ),
    # openpi serves in bfloat16; LoRA folded into 16 bits would lose most of what was trained (openpi, issue 960)
    export_dtype="bfloat16",
    fold_dtype="float32",
    # scripts/train.py casts what a LoRA run freezes, and nothing else
    frozen_dtype="bfloat16",
    trained_beside="vision tower, projector and projections",
    unscaled="feed-forward",
    companions=companions,
    known_sizes=known_sizes,
    known_model=known_model,
    size_hint="put the config.json of the model beside them (num_attention_heads, head_dim)",
    # assets/<asset_id>/norm_stats.json (openpi, training/checkpoints.py, load_norm_stats)
    assets=AssetDirectory(
        directory="assets",
        matters="the policy would use wrong normalization",
    ),
    directories=lerobot.DIRECTORIES,
    facts=policy_facts.TABLE,
    options={
        **policy_facts.OPTIONS,
        "action_dim": Option(
            kind=Number(),
            help="Width of action and state vectors in the model: its projections are cut to it, or padded with "
            "entries as openpi initialises them.",
            fits=_has_weights,
        ),
    },
    # what openpi's maintainers recommend where a robot's width is not the model's (openpi, issue 551)
    resizes={"action_dim": Resize(axis="projections.action", used=robot_widths)},
    full_models=(IN_TRANSFORMERS,),
)
