"""A family of one's own: two stacked layers with LoRA, and an embedding. Nothing of bridge is edited.

The tables below are all there is to write: names, and axis equations. Sizes come from the
checkpoint; export, restore and LoRA are derived.
"""

from bridge import Factoring, Family, Model, Part, Rule

EINSUM = Factoring(leaf="/w", a="/lora_a", b="/lora_b", rank="rank", scaled=True)

BODY = Part(
    "body",
    (
        Rule("embed", "embed.weight", "token width -> token width"),
        Rule("mix/w", "layers.{layer}.mix.weight", "layer head width dim -> (head dim) width", EINSUM),
        Rule("out/w", "layers.{layer}.out.weight", "layer head dim width -> width (head dim)", EINSUM),
    ),
)

FAMILY = Family(name="toy", models=(Model(name="toy", parts=(BODY,)),))
