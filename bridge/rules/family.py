"""A family of models: a plug-in of data and pure functions, registered as ``bridge.adapters``.

Everything that the core has to say, assume or write for a family is here: its models, its words
for messages, the pytree its runtime saves, the files it wants beside the weights, and how a whole
model of it is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bridge.errors import Problem
from bridge.plugins import load
from bridge.rules.fact import Fact, FactTable
from bridge.rules.model import Layout, Model, Sizes
from bridge.rules.option import Option


@dataclass(frozen=True)
class Tree:
    """What a runtime puts before and after the paths of the rules when it saves a pytree."""

    root: str = "params/"
    suffix: str = "/value"
    """flax's ``nnx.State`` adds it; a checkpoint has it on all leaves or on none."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the files beside the weights are made from."""

    model: Model
    sizes: Sizes
    layout: Layout
    contents: str
    """``"base"`` for weights, ``"lora"`` for an adapter, ``"base+lora"`` for a pytree with LoRA leaves."""
    dtype: str
    """dtype of most weights."""
    settings: Mapping[str, Any]
    """The family's own options, by keyword: facts that only the user knows."""
    assets: Mapping[str, bytes]
    """Files that travel with the checkpoint, by path."""
    in_jax: bool = False
    """Whether the weights are a pytree, which has no layout of PyTorch names."""
    known: Mapping[str, Fact] = field(default_factory=dict)
    """The facts that are in no weight, by key: :attr:`Family.facts`."""
    kept: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    """The source's own files where the layout stays: group -> name -> bytes."""


@dataclass(frozen=True)
class Companions:
    """Files that loaders of the PyTorch model want beside the weights, and notes about them."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()
    assets: Mapping[str, bytes] | None = None
    """What travels in place of the checkpoint's assets, by path; None leaves them as they are."""


@dataclass(frozen=True, kw_only=True)
class AssetDirectory:
    """A directory beside the weights that belongs to the model and always travels with it."""

    directory: str
    notes: Callable[[str, Mapping[str, bytes]], tuple[str, ...]] | None = None
    """Notes about its files, by path, given the directory's full name."""
    matters: str = "the model would not be the same"
    """What it means when they differ."""


@dataclass(frozen=True, kw_only=True)
class FullModel:
    """A runtime that runs a whole model of the family on a recorded input."""

    runtime: str
    """The library, for messages."""
    needs: tuple[str, ...] = ()
    """What it is run with, each as ``module:name``: checked before anything else is done."""
    layout: str
    """The layout whose modules are named as in the runtime's network."""
    models: frozenset[str]
    """Names of the models that it has a network for."""
    inputs: frozenset[str]
    """Arrays that a recording must have, the output's included."""
    output: str
    """Name of the recorded output, such as ``"actions"``."""
    load: Callable[[Path, Mapping[str, np.ndarray]], tuple[Any, Problem | None]]
    """Load a directory's weights in float32; a problem where they are not loaded whole."""
    run: Callable[[Any, Mapping[str, np.ndarray]], np.ndarray]
    """The output for a recording's inputs."""
    allowed: float
    """Largest difference of an output in float32."""
    allowed_narrow: float
    """The same where weights were rounded to 16 bits."""
    record_with: str
    """How a recording is made, for messages."""


@dataclass(frozen=True, kw_only=True)
class Resize:
    """An axis that an option of the family cuts or pads to the length it gives."""

    axis: str
    """Qualified, such as ``"projections.action"``."""
    used: Callable[[Mapping[str, bytes], Mapping[str, Any]], Mapping[str, int]]
    """How many of its entries are used, by the words for what says so: from assets, and from a
    ``config.json`` (empty where there is none)."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What bridge knows of one family of models."""

    name: str
    models: tuple[Model, ...]
    title: str = ""
    """The runtime's name in sentences; by default ``name``."""
    noun: str = "model"
    """What a trained model of the family is called: ``"policy"``."""
    part_noun: str = "part"
    """What a part that carries LoRA is called in tables."""
    tree: Tree = Tree()
    export_dtype: str = "keep"
    """dtype of weights exported without LoRA by default."""
    fold_dtype: str = "float32"
    """dtype of weights with LoRA folded in by default."""
    frozen_dtype: str | None = None
    """dtype in which a LoRA run saves what it froze, where it saves what it trained in float32."""
    trained_beside: str = ""
    """What a LoRA run trains in full beside the factors, such as ``"the vision tower"``."""
    unscaled: str = ""
    """Which LoRA factors the runtime never scales, such as those of one kind of layer."""
    companions: Callable[[Facts], Companions] | None = None
    """Makes ``config.json`` and the like. Pure: bridge writes the files."""
    known_sizes: Callable[[Mapping[str, Any]], Mapping[str, int]] | None = None
    """Reads sizes, by qualified axis, from a ``config.json`` that lies beside PyTorch weights."""
    known_model: Callable[[Mapping[str, Any]], str | None] | None = None
    """The model that a ``config.json`` beside an adapter names, where it is one of this family's."""
    size_hint: str = "put the config.json of the model beside them"
    """What to do where tensors alone do not tell every size."""
    assets: AssetDirectory | None = None
    directories: tuple[str, ...] = ()
    """Where its trainers put weights below a step or a run, the innermost first."""
    facts: FactTable | None = None
    """The facts that are in no weight."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """Options of its own, by keyword: a flag of ``bridge convert``, a keyword of :func:`bridge.plan`, and a
    value in :attr:`Facts.settings`."""
    resizes: Mapping[str, Resize] = field(default_factory=dict)
    """Keyword of one of :attr:`options` -> the axis whose length it gives."""
    full_models: tuple[FullModel, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        for keyword, resize in self.resizes.items():
            if keyword not in self.options:
                raise ValueError(f"family {self.name}: {keyword} resizes an axis, and is no option of it")
            for model in self.models:
                model.check_resizable(resize.axis)

    @property
    def runtime(self) -> str:
        """The runtime's name in sentences."""
        return self.title or self.name


def families() -> tuple[Family, ...]:
    """Every installed family. Raises PluginRefused when one cannot be loaded."""
    return load("bridge.adapters", Family)
