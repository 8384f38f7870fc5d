"""A scikit-learn face: learn an embedding with `fit`, apply it with `transform`."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from PIL import Image
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from tripletlib._precision import power_of_two
from tripletlib._validation import check_choice, check_count
from tripletlib.losses import TripletLoss
from tripletlib.networks import EmbeddingNet
from tripletlib.training import embed, fit

KINDS = ("linear", "deep")
_FLOATS = (np.float64, np.float32)
_LEAST_STEPS = 100
_HIDDEN = 128
_LEAST_SIDE, _SIDE = 24, 28  # of an image: what `EmbeddingNet` takes, and what is made of less


class TripletEmbedder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Embed samples so that those of one class lie close and those of different classes apart.

    The data are centred, and divided by one number so that margin and learning rate mean the same
    for any data; how features compare with each other is left as it is. Where they have different
    units, put a ``StandardScaler`` before.

    Parameters
    ----------
    n_components : int, default 64
        Length of an embedding.
    kind : {"linear", "deep"}, default "linear"
        "linear" learns a matrix L, and with it the Mahalanobis distance of matrix LᵀL, beginning
        with a random rotation or projection. "deep" trains `EmbeddingNet` on images, with small
        random changes (`jitter`), and a network of one hidden layer on feature rows; its
        embeddings have length one.
    margin : float, default 0.2
        Of the triplet loss over all triplets of a batch, in squared distance.
    epochs : int, optional
        Passes over the data. By default as many as make 100 batches, but at least 2.
    batch_size : int, default 512
        Samples a step.
    learning_rate : float, default 4e-3
        Peak of the one-cycle schedule; see `tripletlib.fit`.
    random_state : int, RandomState or None, default None
        Fixes initial weights, order and augmentation. Torch's own random state is left as it was.
    verbose : bool, default False
        Show a progress bar.

    Attributes
    ----------
    network_ : nn.Module
        The trained network; it takes centred and scaled data.
    components_ : ndarray of shape (n_components, n_features)
        The matrix L, for data that are centred but not scaled; only if linear.
    mean_ : ndarray of shape (n_features,)
        What is taken off.
    scale_ : float
        What is then divided by: the root mean square of all numbers.
    classes_ : ndarray
        The labels seen.
    history_ : History
        How the loss and the triplets went, a row a step.
    sample_shape_ : tuple of int
        (n_features,), or an image's (height, width) or (channels, height, width).
    n_features_in_ : int
        Numbers in a sample, all pixels of an image.
    feature_names_in_ : ndarray of str
        Names of the features, if a data frame gave them.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> from sklearn.neighbors import KNeighborsClassifier
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> X, y = load_wine(return_X_y=True)
    >>> embedder = TripletEmbedder(n_components=2, random_state=0)
    >>> model = make_pipeline(StandardScaler(), embedder, KNeighborsClassifier())
    >>> model.fit(X[::2], y[::2]).score(X[1::2], y[1::2]) > 0.9
    True
    """

    def __init__(
        self,
        n_components: int = 64,
        *,
        kind: str = "linear",
        margin: float = 0.2,
        epochs: int | None = None,
        batch_size: int = 512,
        learning_rate: float = 4e-3,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.n_components = n_components
        self.kind = kind
        self.margin = margin
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: ArrayLike) -> TripletEmbedder:
        """Learn the embedding.

        Parameters
        ----------
        X : array-like of shape (n, n_features), (n, height, width) or (n, channels, height, width)
            Feature rows or images, also a list of images (arrays, tensors or ``PIL.Image``) of one
            shape; of ``PIL.Image`` in colour the channels are put first, here and in `transform`.
            With "deep", images of less than 24 pixels a side are scaled up.
        y : array-like of shape (n,)
            Labels of at least two classes, numbers or words.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            If a parameter or the data have the wrong type, shape or range, or channels seem to come
            last in images.
        """
        check_choice(self.kind, KINDS, "kind")
        check_count(self.n_components, "n_components")
        check_count(self.batch_size, "batch_size", low=2)
        X, shape = _rows(X)
        if (
            self.kind == "deep"
            and len(shape) == 3
            and shape[-1] in (1, 3, 4)
            and min(shape[:2]) > 4
        ):
            raise ValueError(
                f"X must have its channels before height and width, got images of shape {shape}, "
                "where they seem to come last: np.moveaxis(X, -1, 1) puts them there"
            )
        X, y = validate_data(self, X, y, dtype=_FLOATS, ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("y must hold at least two classes, got one class")
        self.sample_shape_ = shape or X.shape[1:]
        self.mean_ = X.mean(axis=0, dtype=np.float64)
        deviations = X - self.mean_
        # A power of two divides without rounding, and leaves no square out of range.
        size = power_of_two(torch.from_numpy(deviations)).item()
        scale = float(np.sqrt(np.mean((deviations / size) ** 2)) * size)
        if not math.isfinite(scale):
            largest = np.abs(X).max()
            raise ValueError(f"X must have a mean in float64's range, got {largest:.3g} in it")
        self.scale_ = scale if scale >= np.finfo(np.float64).tiny else 1.0

        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        samples = self._samples(X)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network_ = self._network(samples)
        epochs = self.epochs
        if epochs is None:
            epochs = max(2, math.ceil(_LEAST_STEPS / math.ceil(len(X) / self.batch_size)))
        self.history_ = fit(
            self.network_,
            samples,
            torch.from_numpy(codes),
            loss=TripletLoss(self.margin),
            epochs=epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=seed,
            progress=self.verbose,
        )
        if self.kind == "linear":
            self.components_ = self.network_.weight.detach().double().numpy() / self.scale_
        return self

    def transform(self, X: ArrayLike) -> np.ndarray:
        """Embed samples.

        Parameters
        ----------
        X : array-like
            Samples of the shape that `fit` saw, or that shape as rows.

        Returns
        -------
        ndarray of shape (n, n_components)
            In float32 if `X` is, else in float64.

        Raises
        ------
        ValueError
            If `X` has another shape or is not finite.
        """
        check_is_fitted(self)
        X, shape = _rows(X)
        if shape and shape != self.sample_shape_:
            raise ValueError(f"X must hold samples of shape {self.sample_shape_}, got {shape}")
        X = validate_data(self, X, dtype=_FLOATS, reset=False)
        if self.kind == "linear":
            return ((X - self.mean_) @ self.components_.T).astype(X.dtype, copy=False)
        return embed(self.network_, self._samples(X)).numpy().astype(X.dtype, copy=False)

    def _samples(self, X: np.ndarray) -> Tensor:
        """Make what the network takes."""
        samples = torch.from_numpy(((X - self.mean_) / self.scale_).astype(np.float32))
        if self.kind == "linear" or len(self.sample_shape_) == 1:
            return samples
        channels, height, width = (1, *self.sample_shape_)[-3:]
        images = samples.reshape(-1, channels, height, width)
        if min(height, width) >= _LEAST_SIDE:
            return images
        size = [max(height, _SIDE), max(width, _SIDE)]
        return F.interpolate(images, size, mode="bilinear", align_corners=False)

    def _network(self, samples: Tensor) -> nn.Module:
        """Make the untrained network."""
        if samples.dim() == 4:
            return EmbeddingNet(self.n_components, in_channels=samples.shape[1])
        features = samples.shape[1]
        if self.kind == "deep":
            return _OnSphere(
                nn.BatchNorm1d(features),
                nn.Linear(features, _HIDDEN),
                nn.BatchNorm1d(_HIDDEN),
                nn.ReLU(),
                nn.Linear(_HIDDEN, self.n_components, bias=False),
            )
        network = nn.Linear(features, self.n_components, bias=False)
        nn.init.orthogonal_(network.weight, features**-0.5)
        return network

    @property
    def _n_features_out(self) -> int:
        return self.n_components

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class _OnSphere(nn.Sequential):
    """Layers whose outputs are scaled to length one."""

    def forward(self, samples: Tensor) -> Tensor:
        return F.normalize(super().forward(samples))


def _rows(X: ArrayLike) -> tuple[ArrayLike, tuple[int, ...]]:
    """Flatten images to rows, and give the shape of one; leave anything else to scikit-learn."""
    if isinstance(X, (list, tuple)) and X and np.ndim(X[0]) > 1:
        samples = [_as_image(sample) for sample in X]
        shapes = list(dict.fromkeys(sample.shape for sample in samples))
        if len(shapes) > 1:
            raise ValueError(f"X must hold images of one shape, got {shapes[0]} and {shapes[1]}")
        X = np.stack(samples)
    if getattr(X, "ndim", 2) not in (3, 4):
        return X, ()
    return X.reshape(len(X), -1), tuple(X.shape[1:])


def _as_image(sample: ArrayLike | Image.Image) -> np.ndarray:
    """Make an array of one image, with channels first if it is one of PIL's, which has them last.

    In any other the layout is the caller's.
    """
    pixels = np.asarray(sample)
    in_colour = isinstance(sample, Image.Image) and pixels.ndim == 3
    return np.moveaxis(pixels, -1, 0) if in_colour else pixels
