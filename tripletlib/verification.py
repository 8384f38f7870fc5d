"""Same or different? Measure distances of pairs as a verification system is measured."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest, norm
from torch import Tensor

from tripletlib._precision import within
from tripletlib._validation import check_count, check_labels, check_points
from tripletlib.distances import distances_of, norm_of_rows
from tripletlib.scores import Score

_BLOCK_ELEMENTS = 2**22  # distances computed at once: 16 MB in float32
_CURVE_POINTS = 1000  # of a ROC curve, for either kind of pair


class ErrorRates(NamedTuple):
    """Both errors at one threshold, each with its exact (Clopper-Pearson) interval of 95 %."""

    false_accept_rate: Score
    false_reject_rate: Score


class RocCurve(NamedTuple):
    """Rates at rising thresholds: arrays of one length, float64."""

    false_accept_rate: np.ndarray
    true_accept_rate: np.ndarray
    thresholds: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class VerificationReport:
    """How well a distance tells pairs of one class from pairs of two; see `verification_report`.

    A pair is *accepted* as same if its distance is at most the threshold. The false accept rate
    (FAR) is the fraction of different pairs that are accepted, the true accept rate (TAR) that of
    same pairs, and the false reject rate (FRR) is 1 - TAR.

    Attributes
    ----------
    same_distances : array, shape (s,)
        Distances of pairs of one class, sorted.
    different_distances : array, shape (d,)
        Distances of pairs of two classes, sorted.

    Notes
    -----
    All intervals are of confidence 95 % and take the pairs as drawn independently. Pairs that share
    an image are not: n images make n (n - 1) / 2 pairs but are only n draws, so that for all pairs
    of a set of images the intervals are too narrow, often by several times. Where that matters,
    draw anew what was drawn, the classes (a bootstrap; chapter 9 has it), or measure on others.
    """

    same_distances: np.ndarray
    different_distances: np.ndarray

    @property
    def same_pairs(self) -> int:
        """The number of pairs of one class."""
        return len(self.same_distances)

    @property
    def different_pairs(self) -> int:
        """The number of pairs of two classes."""
        return len(self.different_distances)

    @cached_property
    def auc(self) -> Score:
        """Area under the ROC curve: how often a same pair is closer than a different pair.

        Ties count half. The interval is DeLong's (1988); where no two pairs are in the wrong order,
        or all tie, it is a point.
        """
        _, of_same = _mean_and_its_variance(self.different_distances, self.same_distances)
        auc, of_different = _mean_and_its_variance(self.same_distances, self.different_distances)
        half = norm.ppf(0.975) * math.sqrt(of_same + of_different)
        low, high = max(0.0, auc - half), min(1.0, auc + half)
        return Score(auc, low, high, self.same_pairs + self.different_pairs)

    @cached_property
    def equal_error_threshold(self) -> float:
        """The smallest distance of the data at which FAR is at least FRR."""

        def reached(threshold: float) -> bool:
            false_accepts, true_accepts = self._accepted(threshold)
            return (
                false_accepts * self.same_pairs + true_accepts * self.different_pairs
                >= self.same_pairs * self.different_pairs
            )

        places = (
            (distances, bisect_left(distances, True, key=reached))
            for distances in (self.same_distances, self.different_distances)
        )
        return min(float(distances[i]) for distances, i in places if i < len(distances))

    @cached_property
    def equal_error_rate(self) -> Score:
        """The rate (EER) at which the ROC curve, drawn with straight lines, has FAR = FRR.

        Where one threshold makes them equal it is that rate. Otherwise the curve jumps over the
        equality at `equal_error_threshold`, and the rate is read off the line of the jump. If all
        distances are equal, it is 50 %.

        At any fixed threshold the true EER lies between the true FAR and FRR. The interval so runs
        from the lower to the upper end of their exact intervals, of confidence 97.5 % each, at
        `equal_error_threshold`.
        """
        threshold = self.equal_error_threshold
        far, tar = self._rates(threshold)
        far_before, tar_before = self._rates(threshold, side="left")
        gap, gap_before = far + tar - 1, 1 - far_before - tar_before  # FAR - FRR, FRR - FAR
        weight = gap_before / (gap + gap_before)
        rate = far_before + weight * (far - far_before)
        false_accepts, true_accepts = self._accepted(threshold)
        intervals = [
            binomtest(errors, pairs).proportion_ci(0.975, method="exact")
            for errors, pairs in (
                (false_accepts, self.different_pairs),
                (self.same_pairs - true_accepts, self.same_pairs),
            )
        ]
        low, high = min(i.low for i in intervals), max(i.high for i in intervals)
        return Score(rate, float(low), float(high), self.same_pairs + self.different_pairs)

    def at(self, threshold: float) -> ErrorRates:
        """Return both error rates of accepting pairs of distance at most `threshold`.

        They are compared in the distances' own precision, as by ``distances <= threshold``.

        Raises
        ------
        TypeError, ValueError
            If the threshold is no number, or NaN.
        """
        threshold = _as_double(threshold, "threshold")
        if math.isnan(threshold):
            raise ValueError("threshold must be a number, got nan")
        false_accepts, true_accepts = self._accepted(threshold)
        return ErrorRates(
            Score.of_successes(false_accepts, self.different_pairs),
            Score.of_successes(self.same_pairs - true_accepts, self.same_pairs),
        )

    def threshold_at_far(self, far: float) -> float:
        """Return the largest threshold, in the distances' own precision, with a FAR within `far`.

        It lies just below the distance of the first different pair too many. If none may be
        accepted, because there are fewer than 1 / `far` different pairs, that is the closest of
        them. If all may be, the threshold is infinity.

        Raises
        ------
        TypeError, ValueError
            If `far` is no number between 0 and 1.
        """
        far = _as_double(far, "far")
        if not 0 <= far <= 1:
            raise ValueError(f"far must be between 0 and 1, got {far}")
        # By division, as the rate is computed: far * pairs may be rounded over a whole number.
        allowed = bisect_right(
            range(1, self.different_pairs + 1), far, key=lambda pairs: pairs / self.different_pairs
        )
        if allowed >= self.different_pairs:
            return math.inf
        too_far = self.different_distances[allowed]
        return float(np.nextafter(too_far, too_far.dtype.type(-np.inf)))

    def tar_at_far(self, far: float) -> Score:
        """Return the TAR at `threshold_at_far`, with its exact (Clopper-Pearson) interval.

        The interval is for that threshold as if it had been given; that the threshold was found
        on these pairs too is not in it. With fewer than 1 / `far` different pairs the rate is the
        TAR without any false accept, and says little about `far`.

        Raises
        ------
        TypeError, ValueError
            If `far` is no number between 0 and 1.
        """
        _, true_accepts = self._accepted(self.threshold_at_far(far))
        return Score.of_successes(true_accepts, self.same_pairs)

    @cached_property
    def roc(self) -> RocCurve:
        """The ROC curve from (0, 0), at threshold minus infinity, to (1, 1).

        Up to 1 000 pairs of a kind, each of their distances is a threshold. Of more, about as many
        are taken, denser towards both ends, where curves are read on logarithmic axes; the rates
        there are those of all pairs.
        """
        thresholds = np.union1d(
            *(
                distances[_ranks(len(distances))]
                for distances in (self.same_distances, self.different_distances)
            )
        )
        far, tar = self._rates(thresholds)
        return RocCurve(
            np.append(0.0, far), np.append(0.0, tar), np.append(-np.inf, thresholds.astype(float))
        )

    def frame(self) -> pd.DataFrame:
        """Return AUC, EER, TAR at FAR 1 % and 0.1 %, with intervals and thresholds, as a table."""
        rows = {
            "AUC": (self.auc, math.nan),
            "EER": (self.equal_error_rate, self.equal_error_threshold),
            "TAR at FAR 1 %": (self.tar_at_far(0.01), self.threshold_at_far(0.01)),
            "TAR at FAR 0.1 %": (self.tar_at_far(0.001), self.threshold_at_far(0.001)),
        }
        return pd.DataFrame.from_dict(
            {name: (float(s), s.low, s.high, threshold) for name, (s, threshold) in rows.items()},
            orient="index",
            columns=["value", "low", "high", "threshold"],
        )

    def __str__(self) -> str:
        lines = [f"{self.same_pairs:,} same and {self.different_pairs:,} different pairs"]
        for name, value, low, high, threshold in self.frame().itertuples():
            place = "" if math.isnan(threshold) else f", threshold {threshold:.4g}"
            lines.append(f"{name:<17}{Score(value, low, high)}{place}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *_ = str(self).partition("\n")
        rates = dict.fromkeys(("value", "low", "high"), "{:.2%}".format)
        table = self.frame().to_html(formatters=rates, float_format="{:.4g}".format, na_rep="")
        return f"<p>{head}</p>{table}"

    def _accepted(self, threshold: float) -> tuple[int, int]:
        """Count the different and the same pairs of distance at most `threshold`."""
        with np.errstate(over="ignore"):  # one too large for the type is above all distances
            counts = [
                int(np.searchsorted(distances, distances.dtype.type(threshold), side="right"))
                for distances in (self.different_distances, self.same_distances)
            ]
        return counts[0], counts[1]

    def _rates(
        self, thresholds: np.ndarray | float, side: str = "right"
    ) -> tuple[np.ndarray, np.ndarray]:
        """FAR and TAR at thresholds, or just below them if side is "left"."""
        # In the distances' own type: any other would make a copy of them.
        far, tar = (
            np.searchsorted(distances, distances.dtype.type(thresholds), side=side) / len(distances)
            for distances in (self.different_distances, self.same_distances)
        )
        return far, tar


def verification_report(
    distances: Tensor | np.ndarray, same: Tensor | np.ndarray
) -> VerificationReport:
    """Measure how well a distance tells whether two images are of the same class.

    Parameters
    ----------
    distances : Tensor or array, floating point, shape (n,)
        How far apart the two of each pair are, by any distance; the smaller, the more alike.
    same : Tensor or array of bool, shape (n,)
        Whether they are of one class.

    Returns
    -------
    VerificationReport
        With ``.auc``, ``.equal_error_rate``, ``.tar_at_far(0.01)`` and more, each with its
        interval, and ``.roc``. It keeps the distances, sorted, and nothing larger.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or shape, a distance is NaN or infinite, or all pairs are
        of one kind.

    Examples
    --------
    >>> import torch
    >>> distances = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.9])
    >>> same = torch.tensor([True, True, False, True, False])
    >>> report = verification_report(distances, same)
    >>> print(report.at(0.25).false_reject_rate)
    33.33% (95 % interval 0.84% to 90.57%)

    References
    ----------
    E. R. DeLong, D. M. DeLong, D. L. Clarke-Pearson, "Comparing the areas under two or more
    correlated receiver operating characteristic curves: a nonparametric approach", Biometrics,
    1988 (the interval of the AUC).

    C. J. Clopper, E. S. Pearson, "The use of confidence or fiducial limits illustrated in the case
    of the binomial", Biometrika, 1934 (all others).
    """
    distances, same = _as_vector(distances, "distances"), _as_vector(same, "same")
    if distances.dtype.kind != "f":
        raise TypeError(f"distances must be floating point, got {distances.dtype}")
    if same.dtype != np.bool_:
        raise TypeError(f"same must be bool, got {same.dtype}")
    if same.shape != distances.shape:
        raise ValueError(
            f"same must have shape {distances.shape}, one for each of distances, got {same.shape}"
        )
    if not np.isfinite(distances).all():
        place = int(np.flatnonzero(~np.isfinite(distances))[0])
        raise ValueError(f"distances must be finite, got {distances[place]} at {place}")
    if same.all() or not same.any():
        count = int(same.sum())
        raise ValueError(
            f"same must hold pairs of both kinds, got {count} of one class and "
            f"{len(same) - count} of two"
        )
    return VerificationReport(np.sort(distances[same]), np.sort(distances[~same]))


def pair_distances(
    embeddings: Tensor,
    labels: Tensor,
    count: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the distances of pairs of embeddings, and which pairs are of one class.

    Parameters
    ----------
    embeddings : Tensor, floating point, shape (n, d)
        At least two.
    labels : Tensor of integers, shape (n,)
        Their classes.
    count : int, optional
        How many pairs to draw at random, each independently of the others, so that a pair may come
        twice. By default all n (n - 1) / 2 pairs are taken, each once, in the order of
        ``torch.triu_indices(n, n, offset=1)``.
    generator : torch.Generator, optional
        Where the draws come from; by default torch's global generator.

    Returns
    -------
    distances : Tensor, shape (pairs,)
        Euclidean distances, not squared. They are computed in blocks: memory is that of the result
        and a few dozen megabytes.
    same : Tensor of bool, shape (pairs,)
        Whether the two labels are equal. Both are on the device of the embeddings; the labels and
        the generator may be elsewhere.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or shape, there are fewer than two embeddings, or one
        holds NaN or infinity.
    """
    check_points(embeddings)
    check_labels(labels, len(embeddings))
    if len(embeddings) < 2:
        raise ValueError(f"embeddings must hold at least two rows, got {len(embeddings)}")
    embeddings, labels = embeddings.detach(), labels.to(embeddings.device)
    if count is None:
        return _all_pairs(embeddings, labels)
    check_count(count, "count")
    return _drawn_pairs(embeddings, labels, count, generator)


def _all_pairs(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    n = len(embeddings)
    distances = embeddings.new_empty(n * (n - 1) // 2, dtype=_distance_dtype(embeddings))
    same = torch.empty(len(distances), dtype=torch.bool, device=embeddings.device)
    step, filled = max(1, _BLOCK_ELEMENTS // n), 0
    for start in range(0, n - 1, step):
        rows, others = slice(start, start + step), slice(start, n)
        block = distances_of(embeddings[rows], embeddings[others])
        upper = torch.ones_like(block, dtype=torch.bool).triu(diagonal=1)
        part = slice(filled, filled + int(upper.sum()))
        distances[part] = block[upper]
        same[part] = (labels[rows, None] == labels[others])[upper]
        filled = part.stop
    return distances, same


def _drawn_pairs(
    embeddings: Tensor, labels: Tensor, count: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    n = len(embeddings)
    where = None if generator is None else generator.device
    first = torch.randint(n, (count,), generator=generator, device=where)
    # Any but the first itself: so many places further on, around the end.
    second = (first + torch.randint(1, n, (count,), generator=generator, device=where)) % n
    first, second = first.to(embeddings.device), second.to(embeddings.device)
    step = max(1, _BLOCK_ELEMENTS // max(1, embeddings.shape[1]))
    parts = zip(first.split(step), second.split(step), strict=True)
    distances = [norm_of_rows((embeddings[a], embeddings[b]))[0] for a, b in parts]
    distances = within(torch.cat(distances), _distance_dtype(embeddings))
    return distances, labels[first] == labels[second]


def _distance_dtype(embeddings: Tensor) -> torch.dtype:
    """Distances of half-precision embeddings are in float32, as in `pairwise_distances`."""
    return torch.promote_types(embeddings.dtype, torch.float32)


def _mean_and_its_variance(distances: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Which fraction of the distances is smaller than a value (ties by half), over all values.

    Both are sorted. A single value tells no variance; it is taken as zero.
    """
    below = np.searchsorted(distances, values, side="left")
    below += np.searchsorted(distances, values, side="right")
    scale = 2 * len(distances)
    variance = below.var(ddof=1) / len(below) if len(below) > 1 else 0.0
    return float(below.mean() / scale), float(variance / scale**2)


def _ranks(count: int) -> np.ndarray:
    """Places in a sorted array of `count`: all if they are few, else denser at both ends."""
    if count <= _CURVE_POINTS:
        return np.arange(count)
    towards_start = np.geomspace(1, count, _CURVE_POINTS // 2).astype(int) - 1
    evenly = np.linspace(0, count - 1, _CURVE_POINTS // 2).astype(int)
    return np.unique(np.concatenate([towards_start, evenly, count - 1 - towards_start]))


def _as_double(value: float, name: str) -> np.float64:
    """Return a number, or a tensor of one, as float64, or an error that names it."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return np.float64(value)


def _as_vector(values: Tensor | np.ndarray, name: str) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if not isinstance(values, np.ndarray):
        raise TypeError(f"{name} must be a torch.Tensor or array, got {type(values).__name__}")
    if values.ndim != 1:
        raise ValueError(f"{name} must have shape (n,), got {values.shape}")
    return values
