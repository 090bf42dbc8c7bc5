"""Text as a condition: prompts through a T5 encoder, padded on the left.

transformers, which runs the encoder, is an optional extra: `pip install 'bitlaw[text]'`.

Legend: B prompts, T text tokens, E width of the features.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote_plus

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextCondition:
    """Features of a batch of prompts; it is cut into batches and moved like a tensor of labels.

    features_BTE: float32, zero where the mask is False
    mask_BT: bool, which tokens are text; a prompt's tokens are the last ones of its row
    """

    features_BTE: Tensor
    mask_BT: Tensor

    @classmethod
    def of(cls, features_BTE: Tensor, mask_BT: Tensor | None = None) -> Self:
        """From features padded on the left, and their mask (None: all of it is text). ValueError for other shapes."""
        if mask_BT is None:
            mask_BT = torch.ones(features_BTE.shape[:2], dtype=torch.bool, device=features_BTE.device)
        if features_BTE.dim() != 3 or features_BTE.shape[:2] != mask_BT.shape:
            raise ValueError(
                f"text features {tuple(features_BTE.shape)} with mask {tuple(mask_BT.shape)}: expected (prompts, "
                "tokens, width) and (prompts, tokens)"
            )
        mask_BT = mask_BT.bool()
        return cls(features_BTE.float() * mask_BT[..., None], mask_BT)

    def __len__(self) -> int:
        return len(self.features_BTE)

    def __getitem__(self, rows: slice) -> Self:
        return type(self)(self.features_BTE[rows], self.mask_BT[rows])

    def to(self, device: torch.device | str) -> Self:
        """On a device."""
        return type(self)(self.features_BTE.to(device), self.mask_BT.to(device))


class TextEncoder:
    """The encoder of a T5 model with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def open(
        cls, source: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "TextEncoder":
        """From a directory or a name on the Hugging Face hub. ValueError says what is missing."""
        try:
            from transformers import AutoTokenizer, T5EncoderModel  # slow to import, and an optional extra
        except ImportError as error:
            raise ValueError(f"prompts need transformers ({error}); pip install 'bitlaw[text]'") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source))
            model = T5EncoderModel.from_pretrained(str(source), dtype=dtype)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{source}: no T5 encoder with its tokenizer, neither a directory nor a name on the hub ({reason})"
            ) from error
        return cls(model.eval().requires_grad_(False).to(device), tokenizer)

    @property
    def width(self) -> int:
        """E."""
        return int(self.model.config.d_model)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], num_tokens: int) -> TextCondition:
        """Features of cleaned prompts, cut after `num_tokens` tokens, on the encoder's device."""
        device = self.model.device
        tokens = self.tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            max_length=num_tokens,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(device)
        mask_BT = tokens["attention_mask"].bool()
        features_BTE = self.model(input_ids=tokens["input_ids"], attention_mask=mask_BT).last_hidden_state
        # T5 pads on the right. A stable sort of the mask moves the padding to the left and keeps the order of the text.
        order_BT = mask_BT.to(torch.uint8).argsort(dim=1, stable=True)
        features_BTE = features_BTE.gather(1, order_BT[..., None].expand(-1, -1, features_BTE.shape[-1]))
        return TextCondition.of(features_BTE, mask_BT.gather(1, order_BT))


_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"

# What is left out of a prompt or replaced in it, in this order.
_REPLACED = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        # mark-up, links, names, scripts
        (r"<person>", "person"),
        (r"\bhttps?:(?:/{1,3}|(?=[a-z0-9%]))", ""),
        (r"\b(?:www:)?[a-z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)", ""),
        (r"<[^<>]*>", ""),
        (r"@\w+\b", ""),
        (r"[\u31c0-\u31ff\u3200-\u4dff\u4e00-\u9fff]+", ""),
        # one kind of dash, of double and of single quote
        (r"[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40]+", "-"),
        (r"[\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+", "-"),
        (r"[`´«»“”¨]", '"'),  # noqa: RUF001 - these are what is meant
        (r"[‘’]", "'"),  # noqa: RUF001
        # numbers that say nothing, names of files
        (r"\d{1,3}(?:\.\d{1,3}){3}", " "),
        (r"\d:\d\d\s+$", ""),
        (r"\\n", " "),
        (r"#(?:\d{1,3}|\d{5,})\b|\b\d{6,}\b", ""),
        (rf"\S+\.(?:{_FILE_TYPES})", ""),
        # ornaments
        (r"[\"']{2,}", '"'),
        (r"\.{2,}", " "),
        (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
        (r"\s+\.\s+", " "),
        (r"^((?:[^-_]*[-_]){4}.*)$", lambda found: re.sub("[-_]", " ", found.group(1))),
        # codes of articles, phrases of web shops
        (r"\b[a-z]{1,3}\d{3,15}\b|\b[a-z]+\d+[a-z]+\b", ""),
        (r"\b\d+[a-z]+\d+\b", ""),
        (r"(?:worldwide\s+)?(?:free\s+)?shipping|(?:free\s)?download(?:\sfree)?|\bclick\s(?:for|on)\s\w+", ""),
        (rf"\b(?:{_FILE_TYPES})(?:\simages?)?|\bpage\s+\d+\b", ""),
        (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),
        (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # noqa: RUF001
        # spaces, and what is left over at the ends
        (r"\b\s+:\s+", ": "),
        (r"(\D[,./])\b", r"\1 "),
        (r"\s+", " "),
        (r"^[\"'](.+)[\"']$", r"\1"),
        (r"^['_,\-:;]|['_,\-:+]$|^\.\S+$", ""),
    )
)


def clean_prompt(prompt: str) -> str:
    """A prompt as the texts that LlamaGen was trained on: in lower case, without mark-up, links and codes.

    As the official cleaning, which also mends broken encodings; mark-up is taken out without parsing it.
    """
    for _ in range(2):  # once is not enough where taking something out makes something new; the official code does two
        prompt = html.unescape(unquote_plus(prompt)).strip().lower()
        for pattern, by in _REPLACED:
            prompt = pattern.sub(by, prompt)
        prompt = prompt.strip()
    return prompt
