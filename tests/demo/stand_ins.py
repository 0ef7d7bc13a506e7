"""Stand-ins for the parts of the real demo: photographs that are drawn here, a tiny random LLM, an
encoder of mean colours."""

import dataclasses

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers import PreTrainedTokenizerFast as Fast

from pre_kernels.demo.real import arm, model
from pre_kernels.demo.real.llms import LLMS
from pre_kernels.demo.real.photographs import CATEGORIES
from pre_kernels.demo.real.scenes import SIDE
from pre_kernels.demo.real.settings import QUICK

TINY = dataclasses.replace(QUICK, align_steps=2, tune_steps=3, every=1, traced_every=2)
LLM = dataclasses.replace(LLMS["smollm2"], prompt="user:", image_token=1)


def draw(root):
    """Fill a folder with drawings of 12 things of each category."""
    chance = np.random.default_rng(0)
    for category, name in enumerate(CATEGORIES):
        (root / "stamps" / name / "kind").mkdir(parents=True)
        for number in range(12):
            pixels = np.zeros((150, 120, 4), np.uint8)
            # A category has a colour.
            pixels[10:140, 20:100, category % 3] = 255 - 80 * (category // 3)
            pixels[10:140, 20:100, 3] = 255
            pixels[..., :3] ^= chance.integers(0, 30, (150, 120, 3), dtype=np.uint8)
            path = root / "stamps" / name / "kind" / f"{number}.png"
            Image.fromarray(pixels).save(path)
            path.with_suffix(".txt").write_text(f"Thing {number}.\nde.utf8=Ding\n")


def tokenizer():
    """Return a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: n for n, word in enumerate(["<end>", "<image>", *alphabet])}
    bytes_ = Tokenizer(models.BPE(vocab=words, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return Fast(tokenizer_object=bytes_, eos_token="<end>")


class Means(nn.Module):
    """An encoder that sees the mean colour of each patch."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, model.CHANNELS, 1)

    def extract_features(self, pixels):
        return self.mix(nn.functional.avg_pool2d(pixels, SIDE // 7))


def tiny_model(llm, parts, scenes, seed):
    """Return a LLaVA with a random LLM of four layers and a random encoder."""
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=model.LiteConfig(),
        text_config=text,
        image_token_index=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    made = LlavaForConditionalGeneration(config)
    made.model.vision_tower.fit(scenes)
    made.config.use_cache = False
    return made.eval()


def replace_parts(monkeypatch):
    """Replace the LLM and the encoder."""
    monkeypatch.setattr(EfficientNet, "from_name", lambda name: Means())
    monkeypatch.setattr(arm, "build", tiny_model)
    monkeypatch.setattr(arm, "_tokenizer", lambda llm, parts: tokenizer())
    monkeypatch.setattr(arm, "CALIBRATION", 4)
    monkeypatch.setitem(LLMS, "smollm2", LLM)
