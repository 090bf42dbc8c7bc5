"""LlamaGen: image tokens drawn one after the other by a LLaMA. A step is a position.

Legend: B images, T text tokens, E width of text features, N = g^2 image tokens, n tokens drawn so far, V vocabulary.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bitlaw.models.autoencoders import Autoencoder
from bitlaw.models.autoencoders.token_vq import TokenVQ
from bitlaw.models.generator import Absorber, Extracted, ImageGenerator, Noise, Site, StepClock
from bitlaw.models.networks.llamagen import LlamaGenConfig, LlamaGenTransformer, Memory, TextEmbedding
from bitlaw.models.official import WeightsFile
from bitlaw.models.parts.guidance import check_guidance, guide
from bitlaw.models.parts.pixels import Rounding, from_uint8, to_uint8
from bitlaw.models.parts.sampling import draw, filter_nucleus
from bitlaw.models.storage import build
from bitlaw.models.text import TextCondition, TextEncoder
from bitlaw.names import unknown_name

EVALUATION_SIZE = 256
"""Pixels to which larger images are scaled for the published scores."""


@dataclass(frozen=True)
class LlamaGenSampling:
    """Sampler settings.

    guidance: w, 1 is off
    guidance_interval: the last position but one at which guidance acts: token i > guidance_interval + 1 is drawn from
    the conditional model alone. -1 is off: guidance everywhere
    temperature: of the guided logits, before the filters
    top_k, top_p: filters, switched off by 0 and 1 (see `parts.sampling.filter_nucleus`)
    sample: draw tokens; otherwise take the most probable one
    output_size: pixels a side to which images are scaled, bicubically; 0 leaves them as they are
    """

    guidance: float = 2.0
    guidance_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    sample: bool = True
    output_size: int = 0
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        check_guidance(self.guidance, least=1)  # the official sampler knows no less
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature:g}: must not be negative")
        if self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise ValueError(f"top_k {self.top_k}, top_p {self.top_p:g}: top_k is at least 0, top_p from 0 to 1")
        if self.output_size < 0:
            raise ValueError(f"output_size {self.output_size}: a number of pixels, or 0 for the model's own")


class LlamaGenState(NamedTuple):
    """The tokens drawn so far (B, n), and the network's memory (None at the start)."""

    condition: Tensor | TextCondition
    tokens_Bn: Tensor
    memory: Memory | None
    noise: Noise


class LlamaGenBatch(NamedTuple):
    """All tokens (B, N) of images, each of which is asked given those before it."""

    condition: Tensor | TextCondition
    tokens_BN: Tensor


class LlamaGen(ImageGenerator[LlamaGenState]):
    """A class- or text-conditional LlamaGen with its tokenizer. A step is a position.

    text_encoder: directory or hub name of the T5 encoder that prompts go through; "" if there is none
    image_size: of the tokens' map; the official tokenizers have 16 or 8 pixels to a token
    """

    family = "llamagen"
    autoencoder_names = ("vq_ds16_c2i.pt", "vq_ds8_c2i.pt")
    official_wrapper = "model"
    net: LlamaGenTransformer

    def __init__(
        self,
        net: LlamaGenTransformer,
        tokenizer: Autoencoder | None,
        sampling: LlamaGenSampling | None = None,
        *,
        text_encoder: str = "",
    ):
        self.net, self.autoencoder, self.text_encoder = net, tokenizer, text_encoder
        self.num_classes = net.config.num_classes
        self.image_size = (tokenizer.downsampling if tokenizer else _DOWNSAMPLING) * net.config.side
        self.sampling = sampling or _default_sampling(net.config)
        self.clock = StepClock()
        self._encoder: TextEncoder | None = None
        if tokenizer is not None and not isinstance(tokenizer, TokenVQ):
            raise ValueError(f"LlamaGen needs its VQ tokenizer, and this is a {tokenizer.kind} autoencoder")
        if tokenizer is not None and tokenizer.vocab_size != net.config.vocab_size:
            raise ValueError(
                f"LlamaGen vocab_size {net.config.vocab_size} does not go with the tokenizer's {tokenizer.vocab_size}"
            )

    @property
    def tokenizer(self) -> TokenVQ:
        """Its autoencoder. ValueError if the model was loaded without."""
        if self.autoencoder is None:
            wanted = _TEXT_TOKENIZER if self.is_text_conditional else self.autoencoder_names[0]
            raise ValueError(f"this LlamaGen was loaded without its tokenizer ({wanted}), which this needs")
        assert isinstance(self.autoencoder, TokenVQ)
        return self.autoencoder

    @property
    def is_text_conditional(self) -> bool:
        """Whether it draws prompts, not classes."""
        return self.num_classes == 0

    @property
    def null_label(self) -> int | None:
        """The class after the last; None for a model of texts, or one whose class table has no such row."""
        return self.num_classes if self.num_classes and self.net.config.null_class else None

    @property
    def recipes(self) -> Mapping[str, LlamaGenSampling]:
        """The published evaluation as "paper", and that of the official demonstration as "demo".

        Classes are evaluated at 256 pixels, with guidance 2 for B and L, 1.75 for XL and XXL, 1.65 for 3B; other sizes
        get 2. Texts have guidance 7.5 and top-k 1000 in both.
        """
        paper = _default_sampling(self.net.config)
        if self.is_text_conditional:
            return {"paper": paper, "demo": paper}
        if self.image_size > EVALUATION_SIZE:
            paper = replace(paper, output_size=EVALUATION_SIZE)
        return {"paper": paper, "demo": LlamaGenSampling(guidance=4.0, top_k=2000)}

    @property
    def num_steps(self) -> int:
        """N."""
        return self.net.config.num_tokens

    @property
    def sampler_name(self) -> str:
        """Temperature, filters, and what else differs from plain sampling."""
        s = self.sampling
        parts = [f"temperature={s.temperature:g}", f"top_k={s.top_k}", f"top_p={s.top_p:g}"]
        parts += [f"guidance_interval={s.guidance_interval}"] * (s.guidance_interval >= 0)
        parts += ["argmax"] * (not s.sample)
        parts += [f"output_size={s.output_size}"] * (s.output_size > 0)
        return " ".join(parts)

    def sites(self) -> list[Site]:
        """Every linear, in order of execution. The last token is not fed; logits are those of one token at a time."""
        config = self.net.config
        fed = config.condition_tokens + config.num_tokens - 1
        sites = [
            Site(f"cls_embedding.cap_proj.{name}", "embed", None, "embed", config.text_tokens)
            for name in ("fc1", "fc2")
            if self.is_text_conditional
        ]
        for i in range(config.depth):
            before_attention = Absorber.norm(f"layers.{i}.attention_norm", shifts=False)
            values = Absorber.rows(f"layers.{i}.attention.wqkv", 2 * config.width, 3 * config.width, shifts=False)
            before_mlp = Absorber.norm(f"layers.{i}.ffn_norm", shifts=False)
            gated = Absorber.rows(f"layers.{i}.feed_forward.w3", 0, config.hidden, shifts=False)
            sites += [
                Site(f"layers.{i}.attention.wqkv", "qkv", i, "blocks", fed, before_attention),
                Site(f"layers.{i}.attention.wo", "proj", i, "blocks", fed, values),
                Site(f"layers.{i}.feed_forward.w1", "fc1", i, "blocks", fed, before_mlp),
                Site(f"layers.{i}.feed_forward.w3", "fc1", i, "blocks", fed, before_mlp),
                Site(f"layers.{i}.feed_forward.w2", "fc2", i, "blocks", fed, gated),
            ]
        return [*sites, Site("output", "head", None, "head", config.num_tokens, Absorber.norm("norm", shifts=False))]

    # ---- conditions ------------------------------------------------------------------------------

    def check_labels(self, labels: Any) -> Any:
        """Class numbers as a tensor; for a text-conditional model prompts as a `TextCondition`, both on its device.

        A text-conditional model takes prompts, a `TextCondition`, features (B, T, E) padded on the left, or a pair of
        features and mask (B, T). ValueError says what is wrong with them, or how to get an encoder.
        """
        if not self.is_text_conditional:
            if isinstance(labels, TextCondition):
                raise ValueError(f"a class-conditional model: give class numbers 0 to {self.num_classes - 1}")
            return super().check_labels(labels)
        config = self.net.config
        if isinstance(labels, Tensor) and labels.dim() == 3:
            condition = TextCondition.of(labels)
        elif isinstance(labels, tuple) and labels and isinstance(labels[0], Tensor):
            condition = TextCondition.of(*labels)
        elif isinstance(labels, TextCondition):
            condition = labels
        else:
            condition = self._encode(labels)
        found = tuple(condition.features_BTE.shape)
        if found[1:] != (config.text_tokens, config.text_width):
            raise ValueError(
                f"text features {found}: expected (prompts, {config.text_tokens}, {config.text_width}) for this model"
            )
        if not len(condition):
            raise ValueError("no prompts given")
        return condition.to(self.device)

    def _encode(self, prompts: Any) -> TextCondition:
        if isinstance(prompts, str) or not (
            isinstance(prompts, Sequence) and all(isinstance(prompt, str) for prompt in prompts)
        ):
            raise ValueError(f"a text-conditional model: give prompts, such as ['a red fox'], not {prompts!r:.80}")
        if not prompts:
            raise ValueError("no prompts given")
        if self._encoder is None:
            if not self.text_encoder:
                raise ValueError(
                    "prompts need a T5 encoder: load the model with text_encoder='google/flan-t5-xl' or the directory "
                    "of one, or give features of one instead of prompts"
                )
            self._encoder = TextEncoder.open(self.text_encoder, self.dtype, self.device)
        if self._encoder.width != self.net.config.text_width:
            raise ValueError(
                f"{self.text_encoder}: features of {self._encoder.width} numbers, this model was trained on those of "
                f"flan-t5-xl's kind, {self.net.config.text_width}"
            )
        return self._encoder.encode(prompts, self.net.config.text_tokens)

    def rows(self, condition: Tensor | TextCondition, guided: bool) -> tuple[Tensor, Tensor | None]:
        """What the network takes for the rows, unconditional ones last, and the mask of a text."""
        if isinstance(condition, Tensor):
            null_B = torch.full_like(condition, self.num_classes)
            return torch.cat([condition, null_B]) if guided else condition, None
        features, mask = condition.features_BTE.to(self.dtype), condition.mask_BT
        if not guided:
            return features, mask
        embedding = self.net.cls_embedding
        assert isinstance(embedding, TextEmbedding)
        return torch.cat([features, embedding.uncond_embedding.expand_as(features)]), torch.cat([mask, mask])

    # ---- the loop --------------------------------------------------------------------------------

    def start(self, labels_B: Tensor | TextCondition, noise: Noise) -> LlamaGenState:
        """No tokens."""
        if self.sampling.guidance > 1 and self.num_classes and self.null_label is None:
            raise ValueError("this LlamaGen has no row for no class in its class table; guidance must be 1")
        tokens_Bn = torch.empty(len(labels_B), 0, dtype=torch.int64, device=self.device)
        return LlamaGenState(labels_B, tokens_Bn, None, noise)

    def with_cache(self, state: LlamaGenState, cache: Any) -> LlamaGenState:
        """`state` with another memory."""
        return state._replace(memory=cache)

    def extract(self, state: LlamaGenState, step: int) -> Extracted:
        """Guided logits (B, 1, V) of token `step`, before temperature and filters; the cache is the grown memory."""
        batch, w, interval = len(state.condition), self.sampling.guidance, self.sampling.guidance_interval
        if state.memory is None:
            logits, memory = self.net.begin(*self.rows(state.condition, w > 1))
        else:
            guided = w > 1 and not (interval >= 0 and step - 1 > interval)
            rows = 2 * batch if guided else batch
            if rows > state.memory.rows:
                raise ValueError(f"step {step} with guidance {w:g} from a state that was grown without guidance")
            logits, memory = self.net.step(state.memory, state.tokens_Bn[:, -1], rows)
        if len(logits) == batch:
            return Extracted(logits, memory)
        cond, uncond = logits.split(batch)
        return Extracted(guide(cond, uncond, w), memory)

    def reconstruct(self, state: LlamaGenState, extracted: Extracted, step: int) -> LlamaGenState:
        """Draw the token."""
        sampling = self.sampling
        logits_B1V = extracted.features / max(sampling.temperature, 1e-5)
        if sampling.sample:
            logits_B1V = filter_nucleus(logits_B1V, sampling.top_k, sampling.top_p)
            token_B1 = draw(logits_B1V, state.noise.gumbel(step + 1, logits_B1V.shape[1:]))
        else:
            token_B1 = logits_B1V.argmax(-1)
        tokens_Bn = torch.cat([state.tokens_Bn, token_B1], 1)
        return state._replace(tokens_Bn=tokens_Bn, memory=extracted.cache)

    def decode(self, state: LlamaGenState) -> Tensor:
        """uint8 images (B, 3, H, W)."""
        size = self.sampling.output_size
        images = []
        for tokens_BN in state.tokens_Bn.split(_DECODED_AT_A_TIME):
            part_BCHW = self.tokenizer.decode(self.tokenizer.embed(tokens_BN))
            if size and size != self.image_size:
                part_BCHW = F.interpolate(part_BCHW, size=(size, size), mode="bicubic")
            images.append(to_uint8(part_BCHW, self.sampling.rounding))
        return torch.cat(images)

    # ---- training --------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.net.config.vocab_size

    @torch.no_grad()
    def encode_images(self, images_BCHW: Tensor) -> Tensor:
        """Tokens (B, N), int64, row by row."""
        return self.tokenizer.encode_to_tokens(from_uint8(images_BCHW))

    def encoded_of(self, state: LlamaGenState) -> Tensor:
        """The tokens that were drawn, (B, N)."""
        return state.tokens_Bn.clone()

    def teacher_forced(self, encoded: Tensor, labels_B: Tensor | TextCondition, noise: Noise) -> LlamaGenBatch:
        """All positions at once; it needs no noise."""
        return LlamaGenBatch(labels_B, encoded)

    def predict(self, batch: LlamaGenBatch) -> dict[str, Tensor]:
        """As "logits" (B, N, V). Quantized layers take all positions for the last one."""
        self.clock.step = self.num_steps - 1
        condition, mask_BT = self.rows(batch.condition, guided=False)
        return {"logits": self.net(condition, batch.tokens_BN[:, :-1], mask_BT)}

    def training_loss(self, batch: LlamaGenBatch, prediction: dict[str, Tensor]) -> Tensor:
        """Cross entropy of the tokens of each image in nats, mean over positions, (B,)."""
        logits_BVN = prediction["logits"].transpose(1, 2)
        return F.cross_entropy(logits_BVN, batch.tokens_BN, reduction="none").mean(1)

    # ---- checkpoints -----------------------------------------------------------------------------

    @classmethod
    def recognizes(cls, file: WeightsFile) -> bool:
        """A table of image tokens, and LLaMA's blocks with q, k and v fused."""
        return "tok_embeddings.weight" in file and "layers.0.attention.wqkv.weight" in file

    @classmethod
    def config_of(cls, file: WeightsFile, autoencoder: Autoencoder | None, **options: Any) -> dict[str, Any]:
        """Sizes from shapes. What they do not tell:

        heads: 64 wide if not given, 100 in 3B and 128 in 7B
        image_size: else that of a training run's arguments, else of the file's name (`c2i_B_384.pt`), else 256
        null_class: False for a class table without a row for no class
        text_encoder: directory or hub name of the T5 encoder for prompts
        """
        known = ("heads", "image_size", "null_class", "text_encoder")
        if unknown := options.keys() - set(known):
            raise unknown_name(min(unknown), known, "option of LlamaGen")
        vocab_size, width = file.shape("tok_embeddings.weight")
        heads = options.get("heads") or width // _HEAD_WIDTHS.get(width, 64) or 1
        if width % heads or width // heads % 4:
            raise ValueError(f"width {width} does not go with {heads} heads; give heads=")
        null_class = bool(options.get("null_class", True))
        is_text = _UNCONDITIONAL_TEXT in file
        if is_text:
            text_tokens, text_width = file.shape(_UNCONDITIONAL_TEXT)
            conditions = {"num_classes": 0, "text_tokens": text_tokens, "text_width": text_width}
        else:
            rows = file.shape("cls_embedding.embedding_table.weight")[0]
            conditions = {"num_classes": rows - null_class}
        if options.get("text_encoder") and not is_text:
            raise ValueError("text_encoder is for text-conditional models, and this one draws classes")
        config = LlamaGenConfig(
            depth=file.count(r"layers\.(\d+)\."),
            width=width,
            heads=heads,
            side=_side_of(file, autoencoder, options.get("image_size")),
            vocab_size=vocab_size,
            hidden=file.shape("layers.0.feed_forward.w1.weight")[0],
            null_class=null_class,
            **conditions,
        )
        return {
            "net": asdict(config),
            "sampling": asdict(_default_sampling(config)),
            "text_encoder": str(options.get("text_encoder") or ""),
        }

    def to_config(self) -> dict[str, Any]:
        """Sizes of the network, sampler settings, and where the text encoder is."""
        return {
            "net": asdict(self.net.config),
            "sampling": asdict(self.sampling),
            "text_encoder": self.text_encoder,
        }

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        autoencoder: Autoencoder | None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The model."""
        net_config = LlamaGenConfig(**config["net"])
        net = build(lambda: LlamaGenTransformer(net_config), tensors, "LlamaGen", dtype=dtype)
        sampling = LlamaGenSampling(**config["sampling"])
        return cls(net, autoencoder, sampling, text_encoder=config.get("text_encoder", ""))

    @classmethod
    def autoencoder_names_for(cls, file: WeightsFile) -> tuple[str, ...]:
        """The text-conditional models have a tokenizer of their own, of the same shapes."""
        return (_TEXT_TOKENIZER,) if _UNCONDITIONAL_TEXT in file else cls.autoencoder_names

    @classmethod
    def from_official_names(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Without the rotary table, which some files have."""
        return {name: tensor for name, tensor in tensors.items() if name != "freqs_cis"}


_TEXT_TOKENIZER = "vq_ds16_t2i.pt"
_UNCONDITIONAL_TEXT = "cls_embedding.uncond_embedding"
_DOWNSAMPLING = 16
_DECODED_AT_A_TIME = 8
"""Images: one of 384 pixels takes a quarter of a gigabyte in the tokenizer."""
_HEAD_WIDTHS = {3200: 100, 4096: 128}
_PAPER_GUIDANCE = {768: 2.0, 1024: 2.0, 1280: 1.75, 1536: 1.75, 3200: 1.65}


def _default_sampling(config: LlamaGenConfig) -> LlamaGenSampling:
    """Of the published evaluation, without its change of size."""
    if config.text_tokens:
        return LlamaGenSampling(guidance=7.5, top_k=1000)
    return LlamaGenSampling(guidance=_PAPER_GUIDANCE.get(config.width, 2.0))


def _side_of(file: WeightsFile, autoencoder: Autoencoder | None, image_size: int | None) -> int:
    """Image tokens in a row; see `LlamaGen.config_of`. ValueError if the size is no multiple of a token's."""
    named = re.search(r"_(256|384|512)(?!\d)", file.path.stem)
    size = int(image_size or file.metadata.get("image_size") or (named.group(1) if named else 256))
    pixels = autoencoder.downsampling if autoencoder else file.metadata.get("downsample_size", _DOWNSAMPLING)
    if size < pixels or size % pixels:
        raise ValueError(f"image_size {size} is not a multiple of the {pixels} pixels a side of a token")
    return size // pixels
