"""LeRobot itself at tiny sizes: it loads policies, acts, trains a step and saves, as its users have it do.

A script, run by the interpreter of `make lerobot` on a file of jobs: `lerobot_runtime.py JOBS.json OUT`.
Each job leaves `OUT/<name>.npz`, and `OUT/report.json` has what LeRobot printed and, for a job that raised,
the traceback. Changed in LeRobot are the sizes that its code has built in and where tokenizers come from:
the hub's are out of reach, and their vocabulary is wider than a tiny model's.
"""

import contextlib
import importlib
import importlib.metadata
import io
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset
from lerobot.policies import factory
from lerobot.processor import tokenizer_processor
from lerobot.scripts import lerobot_train

MODELS = ("pi0", "pi05", "pi0_fast")
#: what LeRobot's configs call the two sizes of Gemma
VARIANTS = {"gemma_2b": "paligemma", "gemma_300m": "expert"}
#: features of LeRobot and the keys of a recorded observation; the third camera is absent, thus masked
CAMERAS = {
    "observation.images.base_0_rgb": "ex/observation/image",
    "observation.images.left_wrist_0_rgb": "ex/observation/wrist_image",
}
THIRD_CAMERA = "observation.images.right_wrist_0_rgb"
STATE, ACTIONS = 8, 7


class Tokenizer:
    """A sentencepiece model, called as LeRobot calls the hub's tokenizer, with openpi's result.

    openpi (models/tokenizer.py) encodes the newline that ends pi0's prompt by itself.
    """

    def __init__(self, model: str) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=model)
        self.vocab_size = self.pieces.vocab_size()
        self.bos_token_id = self.pieces.bos_id()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        head, newline = (text[:-1], text[-1:]) if text.endswith("\n") else (text, "")
        tokens = self.pieces.encode(head, add_bos=add_special_tokens)
        return [*tokens, *(self.pieces.encode(newline) if newline else ())]

    def __call__(self, texts: list[str], *, max_length: int, **_: object) -> dict[str, torch.Tensor]:
        rows = [self.encode(text) for text in texts]
        ids = torch.zeros(len(rows), max_length, dtype=torch.int64)
        mask = torch.zeros(len(rows), max_length, dtype=torch.int64)
        for row, tokens in enumerate(rows):
            assert len(tokens) <= max_length, f"{len(tokens)} tokens"
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return {"input_ids": ids, "attention_mask": mask}


def tokenize_actions(actions: torch.Tensor) -> list[list[int]]:
    """In the place of pi0-FAST's action tokenizer: the first actions in steps of a hundredth."""
    return [((row.flatten()[:16].clip(-1, 1) + 1) * 100).int().tolist() for row in actions]


class Served:
    """In the place of transformers' AutoTokenizer and AutoProcessor: one object, whatever the name."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def from_pretrained(self, name: str, **_: object) -> Any:
        return self.tokenizer


def shrink(sizes: Mapping[str, Any]) -> None:
    """Replace the sizes in LeRobot's code: get_gemma_config, the vocabulary 257152, SigLIP's 4304 and 2048."""

    def resized(network: Callable[..., Any]) -> Callable[..., Any]:
        def make(config: Any) -> Any:
            getattr(config, "text_config", config).vocab_size = sizes["vocabulary"]
            if hasattr(config, "vision_config"):
                for field, size in sizes["siglip"].items():
                    setattr(config.vision_config, field, size)
                config.vision_config.projection_dim = sizes["paligemma"]["width"]
            return network(config=config)

        return make

    for name in MODELS:
        module = importlib.import_module(f"lerobot.policies.{name}.modeling_{name}")
        gemma = module.GemmaConfig
        module.get_gemma_config = lambda variant, gemma=gemma: gemma(**sizes[VARIANTS[variant]])
        for network in ("PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM"):
            if hasattr(module, network):
                setattr(module, network, resized(getattr(module, network)))


def serve(tokenizer: Tokenizer) -> None:
    fast = importlib.import_module("lerobot.policies.pi0_fast.modeling_pi0_fast")
    for module in (tokenizer_processor, fast):
        module.AutoTokenizer, module.AutoProcessor = Served(tokenizer), Served(tokenize_actions)


def make_dataset(root: Path) -> LeRobotDataset:
    """Two episodes of noise, with the features that the policies of these tests have."""
    rng = np.random.default_rng(0)
    image = {"dtype": "image", "shape": (28, 28, 3), "names": ["height", "width", "channel"]}
    dataset = LeRobotDataset.create(
        "tiny/robot",
        fps=10,
        root=root,
        use_videos=False,
        features={
            **dict.fromkeys((*CAMERAS, THIRD_CAMERA), image),
            "observation.state": {
                "dtype": "float32",
                "shape": (STATE,),
                "names": [f"s{i}" for i in range(STATE)],
            },
            "action": {"dtype": "float32", "shape": (ACTIONS,), "names": [f"a{i}" for i in range(ACTIONS)]},
        },
    )
    for _ in range(2):
        for _ in range(12):
            dataset.add_frame(
                {
                    **{
                        camera: rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)
                        for camera in (*CAMERAS, THIRD_CAMERA)
                    },
                    "observation.state": rng.normal(size=STATE).astype(np.float32),
                    "action": rng.normal(size=ACTIONS).astype(np.float32),
                    "task": "pick up the red block",
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return LeRobotDataset("tiny/robot", root=root)


def load(policy: str, dataset: LeRobotDataset) -> Any:
    """The policy, by LeRobot's own way: from_pretrained, and make_policy where there is an adapter."""
    config = PreTrainedConfig.from_pretrained(policy)
    config.device = "cpu"
    config.pretrained_path = Path(policy)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if config.use_peft:
            loaded = factory.make_policy(config, ds_meta=dataset.meta)
        else:
            loaded = factory.get_policy_class(config.type).from_pretrained(policy, config=config)
    # it only prints what does not fit, and returns random weights
    assert "All keys loaded successfully!" in said.getvalue(), said.getvalue()
    return loaded.eval()


def act(job: Mapping[str, Any], dataset: LeRobotDataset) -> dict[str, np.ndarray]:
    """From a raw observation to unnormalised actions, with the policy's own processors."""
    policy, recorded = load(job["policy"], dataset), np.load(job["recorded"])
    before, after = factory.make_pre_post_processors(
        policy.config,
        pretrained_path=job["policy"],
        preprocessor_overrides={"device_processor": {"device": "cpu"}},
        postprocessor_overrides={"device_processor": {"device": "cpu"}},
    )
    observation: dict[str, Any] = {
        camera: torch.from_numpy(recorded[key]).permute(2, 0, 1) / 255 for camera, key in CAMERAS.items()
    }
    observation["observation.state"] = torch.from_numpy(recorded["ex/observation/state"])
    observation["task"] = str(recorded["ex/prompt"])
    batch = before(observation)
    raw = policy.predict_action_chunk(batch, noise=torch.from_numpy(recorded["noise"])[None])
    return {
        "actions": after(raw)[0].numpy(),
        "raw": raw[0].numpy(),
        "state": batch["observation.state"][0].numpy(),
        "tokens": batch["observation.language.tokens"][0].numpy(),
        "token_mask": batch["observation.language.attention_mask"][0].numpy(),
    }


def train(job: Mapping[str, Any], dataset: LeRobotDataset) -> dict[str, np.ndarray]:
    """One step of lerobot-train on the command line of its users; then what it saved acts on what is recorded."""
    sys.argv = [
        "lerobot-train",
        f"--policy.path={job['policy']}",
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        "--dataset.repo_id=tiny/robot",
        f"--dataset.root={dataset.root}",
        f"--output_dir={job['output']}",
        "--steps=1",
        "--batch_size=1",
        "--num_workers=0",
        *job["arguments"],
    ]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        lerobot_train.main()
    assert "All keys loaded successfully!" in said.getvalue(), said.getvalue()
    saved = Path(job["output"], "checkpoints", "last", "pretrained_model")
    return act({**job, "policy": str(saved)}, dataset) if job["recorded"] else {}


def logits(job: Mapping[str, Any], dataset: LeRobotDataset) -> dict[str, np.ndarray]:
    """pi0-FAST's logits of every position, with LeRobot's own embedding, masks and positions."""
    policy, recorded = load(job["policy"], dataset), np.load(job["recorded"])
    network = policy.model.paligemma_with_expert
    images = [
        torch.from_numpy(recorded[f"image/{camera}"]).permute(0, 3, 1, 2)
        for camera in recorded["camera_order"]
    ]
    # openpi has prompt and actions in one row; LeRobot takes them apart
    prompt = int(recorded["token_ar_mask"][0].argmax())
    tokens, mask = torch.from_numpy(recorded["tokens"]), torch.from_numpy(recorded["token_mask"])
    with torch.no_grad():
        embedded, padding, attention, *_ = policy.model.embed_prefix_fast(
            images,
            [torch.ones(1, dtype=torch.bool)] * len(images),
            tokens[:, :prompt],
            mask[:, :prompt],
            tokens[:, prompt:],
            mask[:, prompt:],
        )
        vla_utils = importlib.import_module("lerobot.policies.common.vla_utils")
        (hidden, _), _ = network.forward(
            attention_mask=vla_utils.prepare_attention_masks_4d(attention, dtype=embedded.dtype),
            position_ids=torch.cumsum(padding, dim=1) - 1,
            inputs_embeds=[embedded, None],
            use_cache=False,
        )
        return {"logits": network.paligemma.lm_head(hidden).numpy()}


def main(jobs: Path, out: Path) -> None:
    told = json.loads(jobs.read_text())
    shrink(told["sizes"])
    serve(Tokenizer(told["tokenizer"]))
    torch.set_num_threads(1)
    dataset = make_dataset(out / "dataset")
    report: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in ("lerobot", "torch", "transformers")}
    }
    for job in told["jobs"]:
        try:
            arrays = {"act": act, "train": train, "logits": logits}[job["do"]](job, dataset)
            np.savez(out / f"{job['name']}.npz", **arrays)
            report[job["name"]] = None
        except (Exception, SystemExit):
            report[job["name"]] = traceback.format_exc()
    (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
