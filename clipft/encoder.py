"""A model to use from Python: features, scores, classes, token embeddings, and losses that guide an image."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from clipft.conf_files import default_tag
from clipft.config import ModelConfig
from clipft.data.caption import only_words, shortened
from clipft.data.decode import decode_rgb, picture_of
from clipft.data.sample import BadSample
from clipft.guide import Augment, GuideLoss, guide_loss, random_views
from clipft.judge.zero_shot import class_prototypes
from clipft.model.encode import can_trim, encode_image, encode_text, token_states
from clipft.model.load import Clip, load_model
from clipft.model.sources import kind_of

ImageLike = str | Path | Image.Image | Tensor
Images = Sequence[ImageLike] | Tensor
MAX_PIXELS = 178_956_970  # Pillow's own limit
CLIPSCORE_WEIGHT, CLIPSCORE_PREFIX = 2.5, "A photo depicts "  # Hessel et al. 2021, sec. 3 (arXiv 2104.08718)
TEMPLATES = ("a photo of a {c}.",)


def load_encoder(
    name: str | Path, pretrained: str | None, checkpoint: str, device: str | torch.device | None
) -> "Encoder":
    """See clipft.load."""
    name = str(name)
    if pretrained == "default":
        pretrained = default_tag(name) if kind_of(name) == "architecture" else None
    clip = load_model(ModelConfig(name=name, pretrained=pretrained, checkpoint=checkpoint), seed=0)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    clip.model.to(chosen).eval().requires_grad_(False)
    return Encoder(clip, chosen, can_trim(clip.model, clip.tokenize))


@dataclass(frozen=True, eq=False)
class Encoder:
    """A CLIP in evaluation mode. All features have unit norm, are float32, and lie on the CPU."""

    clip: Clip
    device: torch.device
    trim: bool
    """Whether captions are cut after their end token, which changes nothing but the time."""

    @property
    def scale(self) -> float:
        """exp(logit_scale), by which the model multiplies cosines."""
        return float(self.clip.model.logit_scale.exp())

    def preprocess(self, image: Image.Image) -> Float[Tensor, "3 S S"]:
        """The model's evaluation transform of open_clip; transparency on white, EXIF orientation applied."""
        return self.clip.preprocess(Image.fromarray(picture_of(image)))

    def tokenize(self, texts: Sequence[str]) -> Int64[Tensor, "N L"]:
        """Tokens as training made them, padded to the context length; longer texts are cut."""
        return self.clip.tokenize([only_words(shortened(text)) for text in as_list("texts", texts)])

    def encode_image(self, images: Images, batch_size: int = 64) -> Float[Tensor, "N D"]:
        """Features of any number of images, `batch_size` at a time.

        An image is a path, a PIL image, or a float tensor [3, S, S] as `preprocess` makes it. A tensor [N, 3, S, S]
        is a batch of these. ValueError names the first one that cannot be read, and why.
        """
        features = [self._no_features()]
        with ThreadPoolExecutor() as pool:
            for part in batches(as_list("images", images), batch_size):
                pixels = torch.stack(list(pool.map(self._pixels, part)))
                with torch.inference_mode():
                    features.append(encode_image(self.clip.model, pixels.to(self.device)).cpu())
        return torch.cat(features).clone()  # outside of inference mode, so that autograd may use it

    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> Float[Tensor, "N D"]:
        """Features of any number of texts, `batch_size` at a time; tokens beyond the context length are not seen."""
        features = [self._no_features()]
        for part in batches(as_list("texts", texts), batch_size):
            with torch.inference_mode():
                tokens = self.tokenize(part).to(self.device)
                features.append(encode_text(self.clip.model, tokens, self.trim).cpu())
        return torch.cat(features).clone()

    def score(
        self, images: Images, texts: Sequence[str], kind: str = "cosine", batch_size: int = 64
    ) -> Float[Tensor, " N"]:
        """How well image i fits text i.

        cosine: in -1..1. clipscore: 2.5 max(cosine, 0) with the text behind "A photo depicts" (Hessel et al. 2021).
        """
        if kind not in ("cosine", "clipscore"):
            raise ValueError(f"kind={kind!r} is unknown. Use cosine or clipscore.")
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts: give one text for each image.")
        if kind == "clipscore":
            texts = [CLIPSCORE_PREFIX + text for text in as_list("texts", texts)]
        cosine = (self.encode_image(images, batch_size) * self.encode_text(texts)).sum(dim=-1)
        return CLIPSCORE_WEIGHT * cosine.clamp(min=0) if kind == "clipscore" else cosine

    def classify(
        self,
        images: Images,
        classnames: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
        batch_size: int = 64,
    ) -> Float[Tensor, "N C"]:
        """Probability of each class: softmax of scaled cosines to the classes' mean prompt features.

        A template holds {c} where the class name goes (Radford et al. 2021, sec. 3.1.4).
        """
        names, patterns = as_list("classnames", classnames), as_list("templates", templates)
        if not names or not patterns:
            raise ValueError(f"{len(names)} classnames and {len(patterns)} templates: at least one of each is needed.")
        lacking = [pattern for pattern in patterns if "{c}" not in pattern]
        if lacking:
            raise ValueError(f"templates: {lacking[0]!r} has no {{c}}, the place of the class name.")
        prompts = self.encode_text([pattern.replace("{c}", name) for name in names for pattern in patterns])
        prototypes = class_prototypes(prompts.view(len(names), len(patterns), -1))
        return (self.scale * self.encode_image(images, batch_size) @ prototypes.T).softmax(dim=-1)

    def token_embeddings(
        self, texts: Sequence[str], pad: str = "eot", batch_size: int = 64
    ) -> Float[Tensor, "N L width"]:
        """The text tower's output at every position after its final norm: [N, 77, 768] for ViT-L-14.

        `pad` fills the positions behind a text: eot, its end token again, which image generators such as Stable
        Diffusion 1.x condition on; zero, token 0, which CLIP itself was trained with. ValueError for towers without
        causal attention and end token.
        """
        if pad not in ("eot", "zero"):
            raise ValueError(f"pad={pad!r} is unknown. Use eot or zero.")
        parts = []
        for part in batches(as_list("texts", texts), batch_size):
            with torch.inference_mode():
                parts.append(token_states(self.clip.model, self.tokenize(part).to(self.device), pad).cpu())
        if not parts:
            raise ValueError("texts is empty: give at least one.")
        return torch.cat(parts).clone()

    def prompt_loss(self, text: str, num_crops: int = 16, augment: Augment | None = None) -> GuideLoss:
        """A differentiable function: image [3, H, W] in 0..1, of any size -> its distance to the text, a scalar.

        The mean over `num_crops` random views of the image of 2 arcsin(|a - b| / 2)^2, half the squared angle between
        the unit features of view and text (in 0..pi^2 / 2). `augment` makes a view [3, S, S] of an image; None is a
        random resized crop, an affine map and a flip. num_crops=0 takes the whole image, resized, without chance.
        Draws come from torch's global generator: torch.manual_seed repeats them.
        """
        if num_crops < 0:
            raise ValueError(f"num_crops={num_crops} must be 0 or more.")
        return guide_loss(
            lambda pixels: encode_image(self.clip.model, pixels),
            self.encode_text([text])[0].to(self.device),
            random_views(self.clip.side, num_crops, augment),
            self.clip.preprocess_cfg["mean"],
            self.clip.preprocess_cfg["std"],
        )

    def _no_features(self) -> Float[Tensor, "0 D"]:
        return torch.zeros(0, self.clip.model_cfg["embed_dim"])

    def _pixels(self, image: ImageLike) -> Float[Tensor, "3 S S"]:
        if isinstance(image, Tensor):
            side = self.clip.side
            if not image.is_floating_point() or image.shape != (3, side, side):
                raise ValueError(
                    f"an image tensor must be float [3, {side}, {side}] as preprocess makes it, and is {image.dtype} "
                    f"{list(image.shape)}. Give PIL images or paths for anything else."
                )
            return image.detach().cpu().float()
        if isinstance(image, Image.Image):
            return readable("an image", lambda: self.preprocess(image))
        path = Path(image).expanduser()
        return readable(
            str(path), lambda: self.clip.preprocess(Image.fromarray(decode_rgb(path.read_bytes(), MAX_PIXELS)))
        )


def readable(name: str, read: Callable[[], Any]) -> Any:
    """What is read; ValueError with the name where it cannot be."""
    try:
        return read()
    except BadSample as bad:
        raise ValueError(f"{name} cannot be used: {bad.reason}.") from bad
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}.") from error


def as_list(name: str, items: Any) -> list[Any]:
    """The items; a single text, path or picture is refused, since what comes back is a row for each item."""
    if isinstance(items, str | Path | Image.Image) or (isinstance(items, Tensor) and items.ndim < 4):
        raise ValueError(f"{name} must be a list: write [{name.removesuffix('s')}] for a single one.")
    return list(items)


def batches(items: list[Any], batch_size: int) -> Iterator[list[Any]]:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be greater than 0.")
    for start in range(0, len(items), batch_size):
        yield items[start : start + batch_size]
