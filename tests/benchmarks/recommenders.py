"""Ways to recommend that the book's triplets are measured against.

Each takes `uses`, who uses what among the projects to learn from, and `visible`, what is known of
the projects to recommend to (sparse arrays of zeros and ones, shapes (n, items) and (m, items));
each gives scores of shape (m, items), the greater, the better.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_array
from sklearn.decomposition import TruncatedSVD
from torch import Tensor, nn


def popularity(uses: csr_array, visible: csr_array) -> np.ndarray:
    """Score a library by how many projects use it."""
    return np.broadcast_to(uses.sum(axis=0), visible.shape)


def item_knn(uses: csr_array, visible: csr_array, shrink: float = 3.0) -> np.ndarray:
    """Score a library by its cosines with those of the basket, in sum, all of them neighbours.

    `shrink`, added to the denominator, distrusts cosines of libraries that few use.
    """
    together = (uses.T @ uses).toarray()
    lengths = np.sqrt(together.diagonal().clip(min=1))  # a library may have no project here
    cosines = together / (np.outer(lengths, lengths) + shrink)
    np.fill_diagonal(cosines, 0)
    return visible @ cosines


def truncated_svd(uses: csr_array, visible: csr_array, rank: int = 64) -> np.ndarray:
    """Project baskets on the leading singular vectors, and back."""
    axes = TruncatedSVD(rank, random_state=0).fit(uses).components_
    return (visible @ axes.T) @ axes


def ease(uses: csr_array, visible: csr_array, penalty: float = 30.0) -> np.ndarray:
    """Regress each library on all others, by least squares with a squared penalty.

    H. Steck, "Embarrassingly shallow autoencoders for sparse data", 2019, equation 8.
    """
    gram = (uses.T @ uses).toarray().astype(np.float64)
    inverse = np.linalg.inv(gram + penalty * np.eye(len(gram)))
    weights = -inverse / inverse.diagonal()
    np.fill_diagonal(weights, 0)
    return visible @ weights


def _solve(of: csr_array, others: np.ndarray, weight: float, penalty: float) -> np.ndarray:
    """Fit a vector for each row, all others' vectors given: one half of a step of ALS."""
    gram = others.T @ others + penalty * np.eye(others.shape[1], dtype=others.dtype)
    fitted = np.zeros((of.shape[0], others.shape[1]), others.dtype)
    for row, columns in enumerate(np.split(of.indices, of.indptr[1:-1])):
        used = others[columns]
        fitted[row] = np.linalg.solve(gram + weight * used.T @ used, (1 + weight) * used.sum(0))
    return fitted


def weighted_als(
    uses: csr_array,
    visible: csr_array,
    rank: int = 128,
    weight: float = 10.0,
    penalty: float = 10.0,
    rounds: int = 8,
) -> np.ndarray:
    """Factorise by alternating least squares, a use counting 1 + weight times what a zero does.

    A new project gets the vector that fits its visible libraries, as any other does. Y. Hu, Y.
    Koren, C. Volinsky, "Collaborative filtering for implicit feedback datasets", 2008.
    """
    items = np.random.default_rng(0).normal(0, 0.1, (uses.shape[1], rank)).astype(np.float32)
    turned = csr_array(uses.T)
    for _ in range(rounds):
        items = _solve(turned, _solve(uses, items, weight, penalty), weight, penalty)
    return _solve(visible, items, weight, penalty) @ items.T


def _into_ball(table: Tensor) -> None:
    """Shorten what is longer than one."""
    with torch.no_grad():
        table.div_(table.norm(dim=1, keepdim=True).clamp(min=1))


def _pull_and_push(users: Tensor, items: Tensor, used: Tensor, margin: float) -> Tensor:
    """Hinge loss of (project, library used, nearest of 50 not used), weighted by its rank.

    The share of those 50 within the margin estimates how many of all are, and the loss counts by
    the logarithm of that (Hsieh et al. 2017, section 3.3).
    """
    rows, columns = used.nonzero(as_tuple=True)
    drawn = torch.randint(len(items), (len(rows), 50))
    near = (users[rows] - items[columns]).square().sum(dim=1)
    squares = users.square().sum(dim=1)[:, None] + items.square().sum(dim=1)
    far = (squares - 2 * users @ items.T)[rows[:, None], drawn]
    gaps = (near[:, None] - far + margin).masked_fill(used[rows[:, None], drawn], 0).relu()
    rank = (gaps > 0).float().mean(dim=1) * len(items)
    return (torch.log1p(rank) * gaps.amax(dim=1)).mean()


def metric_learning(
    uses: csr_array,
    visible: csr_array,
    dimensions: int = 128,
    margin: float = 1.5,
    epochs: int = 20,
    decorrelate: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """Learn a vector for each project and each library, near where one uses the other.

    Collaborative metric learning (C.-K. Hsieh and others, 2017), with Adam. A new project has no
    vector: it starts at the mean of its visible libraries, which then stay, and is moved by the
    same loss.
    """
    torch.manual_seed(seed)
    users, items = (nn.Parameter(torch.randn(n, dimensions) / dimensions**0.5) for n in uses.shape)

    def learn(table: nn.Parameter, of: csr_array, moved: list[nn.Parameter], epochs: int) -> None:
        optimizer = torch.optim.Adam(moved, lr=0.02)
        for _ in range(epochs):
            for rows in torch.randperm(len(table)).split(256):
                used = torch.from_numpy(of[rows.numpy()].toarray() > 0)
                loss = _pull_and_push(table[rows], items, used, margin)
                points = torch.cat([table[rows], items])
                covariance = torch.cov(points.T)
                away = covariance - covariance.diag().diag()
                optimizer.zero_grad()
                (loss + decorrelate * away.norm() / dimensions).backward()
                optimizer.step()
                for other in moved:
                    _into_ball(other)

    learn(users, uses, [users, items], epochs)
    with torch.no_grad():
        known = torch.from_numpy(visible.toarray())
        new = nn.Parameter(known @ items / known.sum(dim=1, keepdim=True))
    learn(new, visible, [new], 5)
    with torch.no_grad():
        return -torch.cdist(new, items).numpy()
