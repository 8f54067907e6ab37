"""Encoders of transformers and sentence-transformers, of images and, where they have a text tower, of sentences."""

import inspect
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from captum_fam._files import FOLDER, irregular
from captum_fam.encoders._loaded import IMAGENET_SIZE, LoadedEncoder, SameModules, pictures
from captum_fam.encoders._loading import first_sentence, load_state, load_tokenizer, optional, quiet


class _TransformersEncoder(SameModules):
    def __init__(self, model: Any, has_pooler: bool, path: str) -> None:
        super().__init__(model)
        self._has_pooler, self._path, self._tokenizer = has_pooler, path, None
        parameters = inspect.signature(self._images()).parameters
        # Positions for images of another size; it changes nothing for those of the model's own.
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}

    def _images(self) -> Any:
        return self.model.get_image_features if hasattr(self.model, "get_image_features") else self.model.forward

    def forward(self, images: Tensor) -> Tensor:
        function = self._images() if hasattr(self.model, "get_image_features") else self.model
        try:
            output = function(pixel_values=images, **self._options)
        except ValueError as error:  # in the words of transformers, without advice
            raise RuntimeError(str(error)) from error
        if isinstance(output, Tensor):  # get_image_features before transformers 5
            return output
        names = ("image_embeds", "pooler_output") if self._has_pooler else ()
        for value in (getattr(output, name, None) for name in names):
            if isinstance(value, Tensor):
                return value.flatten(1)
        tokens: Any = getattr(output, "last_hidden_state", None)
        if self._has_pooler or tokens is None or tokens.ndim != 3:
            raise ValueError(f"its output has no image_embeds or pooler_output, only {', '.join(output)}")
        return tokens[:, 0]  # type: ignore[no-any-return]


class _TransformersOfText(_TransformersEncoder):
    def embed_text(self, sentences: list[str]) -> Any:
        """Embeds sentences as transformers' own zero-shot classification of images does."""
        if self._tokenizer is None:  # images need none
            load = optional("transformers").AutoTokenizer.from_pretrained
            self._tokenizer = load_tokenizer(f"hf:{self._path}", lambda: load(self._path, trust_remote_code=False))
        # SigLIP was trained on sentences that are filled up, and reads its sentence off the last place.
        siglip = str(self.model.config.model_type).startswith("siglip")
        longest = getattr(getattr(self.model.config, "text_config", None), "max_position_embeddings", None)
        own: Any = self._tokenizer
        tokens = own(
            sentences,
            padding="max_length" if siglip else True,
            max_length=min(longest or own.model_max_length, own.model_max_length),
            truncation=True,
            return_tensors="pt",
        )
        taken = inspect.signature(self.model.get_text_features).parameters
        output = self.model.get_text_features(**{k: v.to(self.device) for k, v in tokens.items() if k in taken})
        return output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)


def hugging_face(name: str, path: str, weights: Path | None) -> LoadedEncoder:
    transformers = optional("transformers")
    _check_files(name, path, "a folder that save_pretrained wrote")
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
            # AutoModel would leave out the projection, and with it the space of the embeddings.
            projected = [a for a in config.architectures or () if a.endswith("ModelWithProjection")]
            model_class = getattr(transformers, projected[0]) if projected else transformers.AutoModel
            if weights is None:
                model, info = model_class.from_pretrained(
                    path, config=config, trust_remote_code=False, output_loading_info=True
                )
            elif projected:
                model = model_class(config)
            else:
                model = model_class.from_config(config, trust_remote_code=False)
    except Exception as error:  # of transformers, the hub or its client
        raise _unloadable(name, error, "a folder that save_pretrained wrote") from error
    if model.main_input_name != "pixel_values" and not hasattr(model, "get_image_features"):
        raise ValueError(f"{name} is a {type(model).__name__}, which takes no images: pass a model that does")
    pooler = "pooler.dense."  # of checkpoints without one, transformers makes a random one
    missing = sorted(info["missing_keys"]) if weights is None else load_state(model, weights, pooler)
    if not all(key.startswith(pooler) for key in missing):
        raise ValueError(
            f"{name} lacks weights of its {type(model).__name__} ({missing[0]}, ...): pass a state dict as --weights"
            " FILE"
        )
    of_text = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
    encoder = (_TransformersOfText if of_text else _TransformersEncoder)(model, not missing, path)
    own = getattr(getattr(config, "vision_config", config), "image_size", None)
    side = own[0] if isinstance(own, (list, tuple)) else own
    try:
        with quiet():
            processor = transformers.AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    except (ImportError, OSError, ValueError):
        warnings.warn(
            f"{name} has no image processor, so its images are normalised as ImageNet's: see --mean and --std",
            stacklevel=2,
        )
        return LoadedEncoder(encoder, side or IMAGENET_SIZE)

    def process(image: Any) -> Any:
        return processor(images=image, return_tensors="pt")["pixel_values"]

    return LoadedEncoder(encoder, **pictures(name, process, processor.to_dict(), side))


class _SentenceEncoder(SameModules):
    def __init__(self, model: Any, name: str) -> None:
        super().__init__(model)
        self._name, self.native = name, 0  # the side of the images of the model's own

    def forward(self, images: Tensor) -> Tensor:
        features: dict[str, Any] = {"pixel_values": images, "modality": "image"}
        if images.shape[-1] != self.native:
            features["interpolate_pos_encoding"] = True
        z: Tensor = self.model(features)["sentence_embedding"]
        return z


class _SentenceEncoderOfText(_SentenceEncoder):
    def embed_text(self, sentences: list[str]) -> Any:
        load_tokenizer(self._name, lambda: self.model.tokenizer)
        z = self.model.encode(sentences, convert_to_tensor=True, device=str(self.device), show_progress_bar=False)
        return z.clone()  # of inference mode, which references cannot be


def sentence_transformers(name: str, path: str, weights: Path | None) -> LoadedEncoder:
    library = optional("sentence_transformers", "sentence-transformers")
    _check_files(name, path, "a folder that SentenceTransformer.save wrote")
    try:
        with quiet():
            model = library.SentenceTransformer(path, device="cpu")
    except Exception as error:  # of any of three libraries
        raise _unloadable(name, error, "a folder that SentenceTransformer.save wrote") from error
    if not model.supports("image"):
        raise ValueError(f"{name} takes {', '.join(map(str, model.modalities))}, no images: pass a model that does")
    if weights is not None:
        load_state(model, weights)
    if model.supports("message"):
        raise ValueError(f"{name} reads images within a text: pass a model with a tower of its own for images")

    def process(image: Any) -> Any:
        features = model.preprocess([image])
        return features["pixel_values"] if {*features} == {"pixel_values", "modality"} else None

    processors = [m.processor for m in model.modules() if hasattr(m, "processor")]
    images = [getattr(p, "image_processor", p) for p in processors]
    settings: dict[str, Any] = next((i.to_dict() for i in images if hasattr(i, "image_mean")), {})
    encoder = (_SentenceEncoderOfText if model.supports("text") else _SentenceEncoder)(model, name)
    seen = pictures(name, process, settings, None)
    encoder.native = seen["size"]
    return LoadedEncoder(encoder, **seen)


def _check_files(name: str, path: str, cure: str) -> None:
    for file in Path(path).iterdir() if Path(path).is_dir() else ():
        if file.exists() and irregular(file) not in ("", FOLDER):
            raise ValueError(f"cannot load {name}: {file} is {irregular(file)}, pass {cure}")


def _unloadable(name: str, error: Exception, folder: str) -> ValueError:
    cure = f"{folder}, or a model's name on huggingface.co"
    if "trust_remote_code" in str(error):  # no option of ours
        cure = "module.path:factory, for a factory of your own that runs it"
    return ValueError(f"cannot load {name} ({first_sentence(error)}): pass {cure}")
